"""Kinds of arguments that several commands take, for `argparse`."""

import argparse


def count(text: str) -> int:
    """A whole number above 0."""
    try:
        found = int(text)
    except ValueError:
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return found


def counts(text: str) -> list[int]:
    """Some of these, such as `128,256`."""
    return [count(part) for part in text.split(",")]


def words(text: str) -> list[str]:
    """Some words, such as `float32,bfloat16`."""
    return text.split(",")
