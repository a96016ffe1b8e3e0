"""Checksums of arrays, which tell any change of a checkpoint.

They are computed on the devices, and do not depend on how an array is sharded.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32


def fingerprint(tree: Any) -> dict[str, str]:
    """Returns a 64-bit checksum of each array of a tree, in hexadecimal, by name.

    It is computed on the devices from each element's bits and place, and does not
    depend on how an array is sharded, so no array has to be gathered. Each element is
    mixed before the sum: a plain weighted sum would miss an even number of flipped
    sign bits.
    """
    return {
        name: "".join(f"{word:08x}" for word in words)
        for name, words in _of_arrays(tree, _hash).items()
    }


def old_fingerprint(tree: Any) -> dict[str, int]:
    """Returns the fingerprint that versions before 0.2 recorded.

    It misses an even number of flipped sign bits.
    """
    return {name: int(word) for name, word in _of_arrays(tree, _sum).items()}


def changed_arrays(tree: Any, expected: Mapping[str, str | int]) -> list[str]:
    """Returns the names of the arrays whose fingerprint is not the expected one.

    Args:
      tree: Arrays.
      expected: A fingerprint of these arrays and maybe of others. That of a checkpoint
        from before version 0.2 holds integers, and is verified as it was made.
    """
    found = old_fingerprint(tree) if is_old(expected) else fingerprint(tree)
    return [name for name in found if found[name] != expected.get(name)]


def is_old(fingerprint: Mapping[str, str | int]) -> bool:
    return any(isinstance(value, int) for value in fingerprint.values())


def _of_arrays(tree: Any, function: Callable) -> dict[str, np.ndarray]:
    """Applies a jitted function to each array of a tree; keys are the names."""

    def of_array(x: Any) -> jax.Array:
        # One program a shape, of which a network has few: one program for all of them
        # takes twice as long to compile.
        x = jnp.asarray(x)
        if x.is_fully_replicated:
            # On one device; with several, each would compute the same.
            return function(x.addressable_data(0))
        # CPU devices abort where collectives of many programs wait.
        return jax.block_until_ready(function(x))

    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    found = jax.device_get([of_array(leaf) for leaf in jax.tree.leaves(tree)])
    return dict(zip(names, found, strict=True))


def _bits_and_places(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bits of each element as uint32, and its number in row-major order."""
    if x.dtype != jnp.bool_:
        x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, length in enumerate(x.shape):
        place = place * np.uint32(length)
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return x.astype(jnp.uint32), place


@jax.jit
def _hash(x: jax.Array) -> UInt32[Array, "2"]:
    bits, place = _bits_and_places(x)
    words = [
        jnp.sum(_mixed(bits ^ _mixed(place + seed)), dtype=jnp.uint32)
        for seed in (np.uint32(0x9E3779B9), np.uint32(0x7F4A7C15))
    ]
    return jnp.stack(words)


def _mixed(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3, a bijection that spreads each bit over all."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)


@jax.jit
def _sum(x: jax.Array) -> UInt32[Array, ""]:
    bits, place = _bits_and_places(x)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
