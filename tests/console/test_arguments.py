"""The types of flags that all commands share, and checks of whole command lines."""

import argparse

import pytest

from resnet_jax.console.arguments import (
    Parser,
    check_values,
    count,
    counts,
    positive_number,
    seconds,
    whole_number,
    words,
)
from resnet_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "number"), [("1", 1), ("1e3", 1000), ("1_000", 1000), ("8.0", 8)]
)
def test_a_whole_number_may_be_written_in_several_ways(text, number):
    assert count(text) == number
    assert type(count(text)) is int


@pytest.mark.parametrize(
    "text", ["0", "-1", "1.5", "nan", "inf", "0x10", "", "two", "1e400", "2147483648"]
)
def test_what_is_not_a_count_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number"):
        count(text)


def test_a_number_out_of_its_range_is_refused_with_the_range():
    with pytest.raises(argparse.ArgumentTypeError, match="from 1 to 100"):
        whole_number(1, 100)("101")
    assert whole_number(0)("0") == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("25", 25), ("25s", 25), ("5m", 300), ("0.5h", 1800), ("0", 0), ("1e2s", 100)],
)
def test_a_time_is_in_seconds(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize(
    "text", ["", "s", "-1", "-5m", "nan", "nans", "inf", "infh", "1e400", "1d", "5M"]
)
def test_what_is_not_a_time_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="not a time, such as 25s"):
        seconds(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "", "x"])
def test_what_is_not_a_positive_number_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="not a number above 0"):
        positive_number(text)


def test_a_list_has_no_empty_part():
    assert counts("1,2e1") == [1, 20]
    assert words("a,b") == ["a", "b"]
    for parse, text in ((counts, "1,,2"), (words, "a,"), (words, ",")):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


@pytest.mark.parametrize(
    ("arguments", "subject"),
    [
        (["--out="], "--out is"),
        (["--out=  "], "--out is"),
        (["--out", ""], "--out is"),
        (["-out="], "--out is"),
        (["", "--out=x"], "An argument is"),
        (["--switch="], "--switch is"),
    ],
)
def test_an_empty_value_is_refused(arguments, subject):
    with pytest.raises(UserError, match=f"^{subject} empty; is a variable unset"):
        check_values(arguments, ["--out"])


def test_values_that_look_like_flags_are_values():
    check_values(["--out", "--out", "--switch", "x", "--", ""], ["--out"])


def test_a_flag_that_is_given_twice_is_a_warning(capsys):
    check_values(["--out=1", "--out", "1", "--other=2", "--out=3"], ["--out"])
    said = capsys.readouterr().err
    assert said == "warning: --out is given more than once; the last one counts: 3\n"


def test_a_flag_without_an_effect_is_a_warning(capsys):
    parser = Parser("x", "")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--size", type=count, default=1)
    parser.warn_of_unused(parser.parse(["--size=2"]), ("fast", "size"), "--slow")
    assert capsys.readouterr().err == "warning: --size has no effect with --slow.\n"
