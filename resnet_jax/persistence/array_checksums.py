"""Checksums of arrays, which detect any change of a checkpoint.

They are computed on the devices, and do not depend on how an array is sharded.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32


def fingerprint(tree: Any) -> dict[str, str]:
    """Returns a checksum of each array of a tree.

    It is computed on the devices from the bits and the position of each element, and
    does not depend on how an array is sharded, so no array has to be gathered. Each
    element is mixed before the sum: a plain weighted sum would miss an even number of
    flipped sign bits.

    Args:
      tree: A tree of arrays.

    Returns:
      A 64-bit checksum in hexadecimal by the array's name, such as
      `params/head/kernel`.
    """
    return {
        name: "".join(f"{word:08x}" for word in words)
        for name, words in _by_array(tree, _hash).items()
    }


def old_fingerprint(tree: Any) -> dict[str, int]:
    """Returns the 32-bit checksums that versions before 0.2 recorded, by name.

    They miss an even number of flipped sign bits.
    """
    return {name: int(word) for name, word in _by_array(tree, _sum).items()}


def changed_arrays(tree: Any, expected: Mapping[str, str | int]) -> list[str]:
    """Returns the names of the arrays whose checksum is not the expected one.

    Args:
      tree: A tree of arrays.
      expected: The checksums of these arrays, and maybe of others, by name. Integers
        are the checksums of versions before 0.2.
    """
    actual = old_fingerprint(tree) if is_old(expected) else fingerprint(tree)
    return [name for name, value in actual.items() if value != expected.get(name)]


def is_old(checksums: Mapping[str, str | int]) -> bool:
    """Returns whether checksums are those of a version before 0.2."""
    return any(isinstance(value, int) for value in checksums.values())


def _by_array(tree: Any, function: Callable) -> dict[str, np.ndarray]:
    """Applies a jitted function to each array of a tree; returns the values by name."""

    def apply(x: Any) -> jax.Array:
        # This compiles one program per shape, of which a network has few. One program
        # for all arrays takes twice as long to compile.
        x = jnp.asarray(x)
        if x.is_fully_replicated:
            # One device suffices, since each would compute the same.
            return function(x.addressable_data(0))
        # XLA aborts the process where the collectives of many programs wait on CPU
        # devices, so this waits for each program.
        return jax.block_until_ready(function(x))

    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    values = jax.device_get([apply(leaf) for leaf in jax.tree.leaves(tree)])
    return dict(zip(names, values, strict=True))


def _bits_and_positions(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns each element's bits as uint32, and its index in row-major order."""
    if x.dtype != jnp.bool_:
        x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, length in enumerate(x.shape):
        position = position * np.uint32(length)
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return x.astype(jnp.uint32), position


@jax.jit
def _hash(x: jax.Array) -> UInt32[Array, "2"]:
    bits, position = _bits_and_positions(x)
    words = [
        jnp.sum(_mixed(bits ^ _mixed(position + seed)), dtype=jnp.uint32)
        for seed in (np.uint32(0x9E3779B9), np.uint32(0x7F4A7C15))
    ]
    return jnp.stack(words)


def _mixed(x: jax.Array) -> jax.Array:
    """Applies the finalizer of MurmurHash3, a bijection that mixes all bits."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)


@jax.jit
def _sum(x: jax.Array) -> UInt32[Array, ""]:
    bits, position = _bits_and_positions(x)
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)
