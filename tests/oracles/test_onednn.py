"""oneDNN's convolutions and products are XLA's, to rounding."""

import json

import numpy as np
import pytest

from tests.helpers import runs

# For a process of its own, of one device.
KINDS = """
import functools, itertools, json, logging
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from resnet_jax.kernels import onednn
from resnet_jax.kernels.conv import cast_kernel, convolve
from resnet_jax.kernels.cpu.lowerings import LOWERINGS, possible_lowerings
from resnet_jax.kernels.geometry import Geometry
from resnet_jax.kernels.plain import convolution
from tests.helpers.convolutions import KINDS, compute, draw

def wide(x):
    return x.astype(jnp.float32)

def difference(found, wanted):
    return float(abs(wide(found) - wanted).max() / abs(wanted).max())

logging.basicConfig(level=logging.WARNING)
print("uses", onednn.computes("float32"), onednn.computes("bfloat16"))
"""
DIRECTIONS = """
worst = {}
# So much that each thread takes bfloat16 to float32 in several parts.
large = 3, Geometry(1, ((1, 1), (1, 1))), 40, 40, 32, 24
# As many channels as whole blocks of oneDNN's kernels have.
whole = [(1, Geometry(), 9, 7, 64, 192), (3, large[1], 9, 7, 96, 64)]
kinds = [*itertools.product(KINDS, (1, 2, 7)), (large, 23), *((w, 2) for w in whole)]
for dtype, (kind, b) in itertools.product(("float32", "bfloat16"), kinds):
    k, geometry, h, w, c, f = kind
    g = geometry.output_length(h, 0, k), geometry.output_length(w, 1, k), f
    x, kernel, g = draw(dtype, b, h, w, c), draw(dtype, k, k, c, f), draw(dtype, b, *g)
    for direction in LOWERINGS:
        exact = map(wide, (x, kernel, g))
        expected = compute(direction, "convolution", *exact, geometry)
        for lowering in ("onednn", *possible_lowerings(direction, k, geometry)):
            got = compute(direction, lowering, x, kernel, g, geometry)
            assert got.dtype == dtype
            key = f"{lowering} {dtype}"
            worst[key] = max(worst.get(key, 0), difference(got, expected))
print(json.dumps(worst))
"""
# All axes can be the longest, and are divided into several parts a thread, too; 31 and
# 33 leave parts of other lengths.
PRODUCTS = """
def multiply(left, right, contracted, dtype):
    shape = left.shape[1 - contracted[0]], right.shape[1 - contracted[1]]
    like = jax.ShapeDtypeStruct(shape, dtype)
    return onednn.multiply(left, right, contracted, like)

worst = {}
options = (
    [
        (49, 5, 600),
        (700, 33, 31),
        (33, 700, 31),
        (1, 1, 1),
        (3, 64, 100),
        (20011, 64, 48),
        (48, 20011, 64),
    ],
    itertools.product((0, 1), repeat=2),
    (None, 1, 5),
    [("float32",) * 2, ("bfloat16",) * 2, ("bfloat16", "float32")],
)
for (m, k, n), contracted, batch, (dtype, out) in itertools.product(*options):
    lead = () if batch is None else (batch,)
    left, right = draw(dtype, *lead, m, k), draw(dtype, *lead, k, n)
    wanted = wide(left) @ wide(right)
    left = left if contracted[0] else left.swapaxes(-2, -1)
    right = right.swapaxes(-2, -1) if contracted[1] else right
    call = functools.partial(multiply, contracted=contracted, dtype=out)
    found = jax.jit(call if batch is None else jax.vmap(call))(left, right)
    assert found.dtype == out and found.shape == wanted.shape
    worst[out] = max(worst.get(out, 0), difference(found, wanted))
print(json.dumps(worst))
"""
# Sums of two numbers are exact in float32.
ROUNDING = """
rng = np.random.default_rng(0)
special = [(1, 2**-8), (1 + 2**-7, 2**-8), (-1, -(2**-8)), (3e38, 3e38)]
special += [(np.inf, 1), (np.inf, -np.inf), (np.nan, 1), (0.0, -0.0)]
drawn = rng.standard_normal((20000, 2)) * 2.0 ** rng.integers(-9, 9, (20000, 2))
pairs = jnp.asarray(np.concatenate([special, drawn]), "bfloat16")
wanted = wide(pairs).sum(1, keepdims=True).astype("bfloat16")
for n in (1, 3):
    ones = jnp.ones((2, n), "bfloat16")
    result = jax.ShapeDtypeStruct((len(pairs), n), "bfloat16")
    found = onednn.multiply(pairs, ones, (1, 0), result)
    for column in wide(found).T:
        np.testing.assert_array_equal(column, wide(wanted)[:, 0])
print("equal")
"""
# The kernel that is taken is rounded where the network is not differentiated, too.
KERNELS = """
rng = np.random.default_rng(0)
geometry = Geometry(1, ((1, 1), (1, 1)))
for c, f in ((64, 192), (96, 64), (5, 7)):
    x = draw("bfloat16", 2, 9, 7, c)
    exact = draw("bfloat16", 3, 3, c, f).astype("float32")
    # Halves of the last digit are ties.
    near = exact * (1 + rng.choice([-0.5, -0.3, 0, 0.3, 0.5], exact.shape) * 2.0**-8)
    rounded = near.astype("bfloat16")
    taken = cast_kernel(near, x.dtype)
    assert taken.dtype == ("float32" if onednn.rounds(x.dtype) else "bfloat16")

    def all_of(kernel):
        y, pull = jax.vjp(lambda kernel: convolve(x, kernel, geometry), kernel)
        (dk,) = pull(y)
        assert dk.dtype == kernel.dtype
        return convolve(x, kernel, geometry), y, dk

    for ours, expected in zip(*map(jax.jit(all_of), (taken, rounded))):
        # XLA may leave out a rounding that is widened right behind it.
        ours, expected = wide(ours.astype(x.dtype)), wide(expected)
        np.testing.assert_array_equal(ours, expected)
print("equal")
"""
DERIVATIVES = """
AUTO = jax.sharding.AxisType.Auto

def loss(convolve, kernel, x):
    return jnp.sum(jnp.sin(convolve(x, kernel)))

def all_of(convolve, kernel, x):
    grad = jax.grad(loss, 1)
    def twice(kernel, x):
        return jnp.sum(grad(convolve, kernel, x) ** 2)
    each = jax.vmap(lambda x: grad(convolve, kernel, jnp.stack([x] * 16)))(x[:3])
    shared = jax.shard_map(
        lambda kernel, x: jax.lax.psum(grad(convolve, kernel, x), "data"),
        mesh=jax.make_mesh((1,), ("data",), (AUTO,)),
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    return (
        grad(convolve, kernel, x),
        jax.grad(twice)(kernel, x),
        jax.grad(jax.checkpoint(lambda k: loss(convolve, k, x)))(kernel),
        each,
        shared(kernel, x),
    )

found = {}
options = [
    (3, 8, 1, onednn.CONVOLVE),
    (1, 8, 1, onednn.MULTIPLY),
    (3, 64, 2, onednn.MULTIPLY),
]
for k, c, groups, target in options:
    x, kernel = draw("float32", 16, 16, 18, c), draw("float32", k, k, c // groups, 4)
    given = {"geometry": Geometry(1, ((k // 2,) * 2,) * 2), "groups": groups}
    ours, xlas = (functools.partial(f, **given) for f in (convolve, convolution))
    text = jax.jit(all_of, static_argnums=0).lower(ours, kernel, x).compile().as_text()
    assert target in text
    both = zip(all_of(ours, kernel, x), all_of(xlas, kernel, x))
    found[f"{k}x{k} {groups}"] = [difference(*pair) for pair in both]
print(json.dumps(found))
"""


def run(*code: str, **environment: str) -> str:
    environment = {"JAX_NUM_CPU_DEVICES": "1", **environment}
    status, output = runs.run_python("-c", "".join(code), **environment)
    assert status == 0, output
    return output


def check(worst: dict[str, float]) -> None:
    """Sums of up to 2000 terms in another order; bfloat16's 8 digits, rounded once."""
    for name, found in worst.items():
        assert found < (1e-5 if name.endswith("float32") else 2**-8), name


# More threads than images and cores divide images by rows. A CPU without instructions
# for bfloat16 takes it to float32.
ON_CPUS = pytest.mark.parametrize(
    "cpu",
    [{"NPROC": "2"}, {"NPROC": "5", "ONEDNN_MAX_CPU_ISA": "AVX2"}],
    ids=["this", "another"],
)


@ON_CPUS
def test_every_direction_is_that_of_the_convolution(cpu):
    output = run(KINDS, DIRECTIONS, **cpu)
    assert "uses True True" in output
    worst = json.loads(output.splitlines()[-1])
    assert {f"onednn {dtype}" for dtype in ("float32", "bfloat16")} <= set(worst)
    check(worst)


@ON_CPUS
def test_products_of_all_layouts_and_batches(cpu):
    worst = json.loads(run(KINDS, PRODUCTS, **cpu).splitlines()[-1])
    assert set(worst) == {"float32", "bfloat16"}
    check(worst)


@ON_CPUS
def test_products_of_bfloat16_are_rounded_once_to_the_nearest(cpu):
    assert "equal" in run(KINDS, ROUNDING, **cpu)


@ON_CPUS
def test_a_kernel_of_float32_is_rounded_as_before_the_convolution(cpu):
    assert run(KINDS, KERNELS, **cpu).splitlines()[-1] == "equal"


def test_convolutions_by_onednn_can_be_differentiated_batched_and_sharded():
    differences = json.loads(run(KINDS, DERIVATIVES).splitlines()[-1])
    assert {len(each) for each in differences.values()} == {5}
    # As above.
    assert max(map(max, differences.values())) < 1e-5, differences


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("false", "false failed: no reason given"),
        ("no-such-c++", "no-such-c++: No such"),
    ],
)
def test_without_a_compiler_xla_convolves_with_one_warning(compiler, reason):
    output = run(KINDS, CXX=compiler)
    assert "uses False False" in output
    assert output.count(reason) == 1
    assert "needs a C++ compiler" in output


def test_onednn_is_not_used_on_several_devices():
    assert "uses False False" in run(KINDS, JAX_NUM_CPU_DEVICES="2")


def test_two_runs_with_onednn_are_the_same(tmp_path):
    flags = ["--config=configs/quickstart.py", "--config.total.steps=3"]
    flags += ["--config.optim.warmup.steps=1"]
    flags += ["--config.model.name=cifar_resnet20", "--config.model.dtype=bfloat16"]
    for name in "ab":
        status, output = runs.run(tmp_path / name, *flags, JAX_NUM_CPU_DEVICES="1")
        assert status == 0, output
    one, other = (runs.final_arrays(tmp_path / name) for name in "ab")
    assert one
    assert all(np.array_equal(one[key], other[key]) for key in one)
