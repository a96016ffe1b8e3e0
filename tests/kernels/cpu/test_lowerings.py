"""Every lowering of a convolution computes what XLA's convolution does."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from resnet_jax.kernels.cpu.lowerings import LOWERINGS, possible_lowerings
from resnet_jax.kernels.geometry import Geometry
from resnet_jax.plan import hlo
from tests.helpers import tiny
from tests.helpers.convolutions import KINDS, compute, draw_problem, same

CASES = [
    pytest.param(direction, lowering, *kind, id=f"{direction}-{lowering}-{i}")
    for i, kind in enumerate(KINDS)
    for direction in LOWERINGS
    for lowering in possible_lowerings(direction, *kind[:2])
]


def exact(direction, x, kernel, g, geometry) -> tuple[np.ndarray, np.ndarray]:
    """Returns the result in float64, and the sum of its terms' absolute values."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, kernel, g)]
        value = compute(direction, "convolution", *wide, geometry)
        size = compute(direction, "convolution", *map(jnp.abs, wide), geometry)
        return np.asarray(value), np.asarray(size)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("direction", "lowering", "k", "geometry", "h", "w", "c", "f"), CASES
)
def test_every_lowering_is_the_convolution_up_to_rounding(
    direction, lowering, k, geometry, h, w, c, f, dtype
):
    x, kernel, g = draw_problem(k, geometry, h, w, c, f, dtype)
    got = compute(direction, lowering, x, kernel, g, geometry)
    assert got.dtype == dtype
    expected, size = exact(direction, x, kernel, g, geometry)
    assert got.shape == expected.shape
    # A float32 sum of at most 8 x 8 x 13 terms in any order: at worst 832 roundings,
    # typically some 30. The result is rounded once more to bfloat16's 8 digits.
    bound = 64 * 2**-24 * size
    if dtype == "bfloat16":
        bound = bound + 2**-8 * np.abs(expected)
    assert (np.abs(np.asarray(got, np.float64) - expected) <= bound).all()


@pytest.mark.parametrize("direction", ["forward", "input", "kernel"])
def test_bfloat16_is_summed_in_float32(direction):
    geometry = Geometry(1, same(1))
    x, kernel, g = draw_problem(3, geometry, 14, 14, 128, 128, "bfloat16")
    expected, size = exact(direction, x, kernel, g, geometry)
    for lowering in possible_lowerings(direction, 3, geometry):
        got = compute(direction, lowering, x, kernel, g, geometry)
        # A bfloat16 sum of 1152 terms would be off by some sqrt(1152) x 2^-9 of a
        # term's size, an eighth of the values.
        bound = 2**-8 * np.abs(expected) + 64 * 2**-24 * size
        error = np.abs(np.asarray(got, np.float64) - expected)
        assert (error <= bound).all(), lowering


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "geometry", "h", "w", "c", "f"), [KINDS[i] for i in (4, 6)]
)
def test_every_lowering_has_derivatives_in_bfloat16(k, geometry, h, w, c, f):
    x, kernel, g = draw_problem(k, geometry, h, w, c, f, "bfloat16")

    def derivatives(direction, lowering):
        def function(*arrays):
            return compute(direction, lowering, *arrays, geometry)

        @jax.jit
        def pulled(*arrays):
            out, pull = jax.vjp(function, *arrays)
            return pull(out)

        return [array.astype("float32") for array in pulled(x, kernel, g)]

    for direction in LOWERINGS:
        expected = derivatives(direction, "convolution")
        for lowering in possible_lowerings(direction, k, geometry):
            got = derivatives(direction, lowering)
            # Sums of at most 9 x 48 terms, rounded to bfloat16 in between.
            assert tiny.difference(got, expected) < 2**-6, lowering


@pytest.mark.parametrize(("k", "geometry", "h", "w", "c", "f"), KINDS)
def test_bfloat16_is_moved_as_bfloat16(k, geometry, h, w, c, f):
    """Twice as much would be moved in float32."""
    x, kernel, g = draw_problem(k, geometry, h, w, c, f, "bfloat16")
    for direction in LOWERINGS:
        for lowering in possible_lowerings(direction, k, geometry):
            function = functools.partial(compute, direction, lowering)
            jitted = jax.jit(function, static_argnums=3)
            program = jitted.lower(x, kernel, g, geometry).compile().as_text()
            wide = re.search(r"= f32\S* concatenate\(", program)
            assert not wide, (direction, lowering)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "input", "kernel"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("k", "geometry"),
    [(1, Geometry(2)), (3, Geometry(1, same(1))), (3, Geometry(2, same(1)))],
)
def test_every_lowering_keeps_the_batch_on_its_devices(k, geometry, dtype, direction):
    x, kernel, g = draw_problem(k, geometry, 8, 8, 8, 8, dtype)
    mesh = tiny.mesh_of(8)
    sharded, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    shardings = sharded, replicated, sharded
    sums = direction == "kernel"
    for lowering in possible_lowerings(direction, k, geometry):

        def function(x, kernel, g, lowering=lowering):
            return compute(direction, lowering, x, kernel, g, geometry)

        jitted = jax.jit(
            function,
            in_shardings=shardings,
            out_shardings=replicated if sums else sharded,
        )
        compiled = jitted.lower(x, kernel, g).compile()
        kinds = {each.kind for each in hlo.collectives(compiled.as_text())}
        assert kinds == ({"all-reduce"} if sums else set()), lowering
        expected = jax.jit(function)(x, kernel, g).astype(jnp.float32)
        got = compiled(*map(jax.device_put, (x, kernel, g), shardings))
        # Sums of eight parts, each rounded to the dtype.
        bound = 1e-5 if dtype == "float32" else 2**-6
        assert tiny.difference(got.astype(jnp.float32), expected) < bound
