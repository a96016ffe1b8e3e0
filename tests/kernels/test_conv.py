"""Every form of a convolution gives what XLA's convolution does, on any devices."""

import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from resnet_jax.kernels import conv, onednn, pool
from resnet_jax.kernels.conv import blocks_of, convolve, form_of
from resnet_jax.kernels.cpu.conv import FORMS, Geometry, apply, forms_of
from resnet_jax.plan import hlo
from tests.helpers import keyed, runs, tiny


def same(pad: int) -> tuple:
    return ((pad, pad), (pad, pad))


# Kernel, stride, padding, dilation, height, width, channels, features: the layers of
# the zoo at even and odd sizes, 'SAME' at an even size, and windows that leave pixels.
KINDS = [
    (1, Geometry(), 5, 6, 4, 6),
    (1, Geometry(), 5, 6, 6, 3),
    (1, Geometry(2), 5, 6, 6, 8),
    (1, Geometry(2), 6, 5, 3, 2),
    (3, Geometry(1, same(1)), 5, 6, 8, 6),
    (3, Geometry(1, same(0)), 6, 5, 8, 8),
    (3, Geometry(2, same(1)), 7, 6, 8, 4),
    (3, Geometry(2, ((0, 1), (0, 1))), 6, 8, 4, 8),
    (3, Geometry(2, ((0, 1), (1, 1))), 6, 7, 8, 8),
    (3, Geometry(1, same(2), 2), 9, 8, 8, 4),
    (3, Geometry(2, same(2), 2), 9, 8, 4, 8),
    (5, Geometry(3, same(2)), 13, 11, 8, 8),
    (7, Geometry(2, same(3)), 16, 13, 3, 8),
    (3, Geometry(1, same(1)), 4, 5, 3, 8),
]
CASES = [
    pytest.param(direction, form, *kind, id=f"{direction}-{form}-{i}")
    for i, kind in enumerate(KINDS)
    for direction in FORMS
    for form in forms_of(direction, *kind[:2])
]


def draw(dtype, *shape: int) -> jax.Array:
    values = keyed.generator(str(shape)).standard_normal(shape, np.float32)
    return jnp.asarray(values, dtype)


def inputs(k, where, h, w, c, f, dtype):
    """An image, a kernel and a gradient of the output."""
    x, kernel = draw(dtype, 8, h, w, c), draw(dtype, k, k, c, f)
    return x, kernel, draw(dtype, 8, where.output(h, 0, k), where.output(w, 1, k), f)


def call(direction, form, x, kernel, g, where):
    args = {"forward": (x, kernel), "input": (g, kernel), "kernel": (x, g)}[direction]
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return apply(direction, form, *args, like, len(kernel), where)


def exact(direction, x, kernel, g, where) -> tuple[np.ndarray, np.ndarray]:
    """The result in float64, and the sum of the sizes of what is added."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, kernel, g)]
        value = call(direction, "convolution", *wide, where)
        return np.asarray(value), np.asarray(
            call(direction, "convolution", *map(jnp.abs, wide), where)
        )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("direction", "form", "k", "where", "h", "w", "c", "f"), CASES)
def test_every_form_is_the_convolution_to_rounding(
    direction, form, k, where, h, w, c, f, dtype
):
    x, kernel, g = inputs(k, where, h, w, c, f, dtype)
    got = call(direction, form, x, kernel, g, where)
    assert got.dtype == dtype
    expected, size = exact(direction, x, kernel, g, where)
    assert got.shape == expected.shape
    # A float32 sum of at most 8 x 8 x 13 terms in any order: 832 roundings at worst,
    # and some 30 as they come. The result is rounded once more to bfloat16's 8 digits.
    bound = 64 * 2**-24 * size
    if dtype == "bfloat16":
        bound = bound + 2**-8 * np.abs(expected)
    assert (np.abs(np.asarray(got, np.float64) - expected) <= bound).all()


@pytest.mark.parametrize("direction", ["forward", "input", "kernel"])
def test_bfloat16_is_summed_in_float32(direction):
    where = Geometry(1, same(1))
    x, kernel, g = inputs(3, where, 14, 14, 128, 128, "bfloat16")
    expected, size = exact(direction, x, kernel, g, where)
    for form in forms_of(direction, 3, where):
        got = np.asarray(call(direction, form, x, kernel, g, where), np.float64)
        # A bfloat16 sum of 1152 terms would be off by some sqrt(1152) x 2^-9 of a
        # term's size, an eighth of the values.
        bound = 2**-8 * np.abs(expected) + 64 * 2**-24 * size
        assert (np.abs(got - expected) <= bound).all(), form


@pytest.mark.parametrize(("k", "where", "h", "w", "c", "f"), KINDS)
def test_gradients_are_those_of_the_convolution(k, where, h, w, c, f):
    x, kernel, g = inputs(k, where, h, w, c, f, "float32")

    def plain(x, kernel):
        return FORMS["forward"]["convolution"](x, kernel, where)

    out, pull = jax.vjp(lambda x, kernel: convolve(x, kernel, where), x, kernel)
    expected, pull_plain = jax.vjp(plain, x, kernel)
    # As above: a few roundings of sums of at most 832 terms of size 1.
    difference = tiny.difference((out, *pull(g)), (expected, *pull_plain(g)))
    assert difference < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("groups", "c", "f", "where"),
    [
        (4, 8, 8, Geometry(1, same(1))),
        (32, 128, 64, Geometry(2, same(1))),
        (2, 64, 128, Geometry(1, same(2), 2)),
        (6, 72, 12, Geometry(2, ((0, 1), (0, 1)))),
    ],
)
def test_groups_are_those_of_the_convolution(groups, c, f, where, dtype):
    x, kernel = draw(dtype, 2, 7, 6, c), draw(dtype, 3, 3, c // groups, f)

    def with_gradients(convolution):
        out, pull = jax.vjp(lambda x, k: convolution(x, k, where, groups), x, kernel)
        return out, *pull(draw(dtype, *out.shape))

    got = with_gradients(convolve)
    expected = with_gradients(FORMS["forward"]["convolution"])
    for one, other in zip(got, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        # Sums of at most 9 x 64 terms, rounded once to the type.
        bound = 1e-5 if dtype == "float32" else 2**-7
        assert tiny.difference(one.astype("float32"), other.astype("float32")) < bound


def test_blocks_have_32_channels_where_there_are_so_many():
    assert blocks_of(128, 32) == 4
    assert blocks_of(1024, 32) == 32
    assert blocks_of(256, 2) == 2
    assert blocks_of(72, 6) == 2
    assert blocks_of(16, 4) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("k", "where", "h", "w", "c", "f"), [KINDS[i] for i in (4, 6)])
def test_every_form_has_derivatives_in_bfloat16(k, where, h, w, c, f):
    x, kernel, g = inputs(k, where, h, w, c, f, "bfloat16")

    def derivatives(direction, form):
        @jax.jit
        def compute(*given):
            found, pull = jax.vjp(
                lambda *given: call(direction, form, *given, where), *given
            )
            return pull(found)

        return [one.astype("float32") for one in compute(x, kernel, g)]

    for direction in FORMS:
        plain = derivatives(direction, "convolution")
        for form in forms_of(direction, k, where):
            # Sums of at most 9 x 48 terms, rounded to bfloat16 on the way.
            assert tiny.difference(derivatives(direction, form), plain) < 2**-6, form


@pytest.mark.parametrize(("k", "where", "h", "w", "c", "f"), KINDS)
def test_bfloat16_is_laid_side_by_side_as_it_is(k, where, h, w, c, f):
    """In float32 it would be twice as much to move."""
    x, kernel, g = inputs(k, where, h, w, c, f, "bfloat16")
    for direction in FORMS:
        for form in forms_of(direction, k, where):
            traced = jax.jit(functools.partial(call, direction, form), static_argnums=3)
            program = traced.lower(x, kernel, g, where).compile().as_text()
            assert not re.search(r"= f32\S* concatenate\(", program), (direction, form)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("over", ["forward", "reverse"])
def test_the_hessian_is_at_hand(over, dtype):
    # As the curvature of a loss is computed, and a penalty of its gradient.
    x, kernel, _ = inputs(3, Geometry(1, same(1)), 5, 6, 8, 6, dtype)

    def loss(convolution, kernel):
        out = convolution(x, kernel, Geometry(1, same(1)))
        return jnp.square(out.astype("float32")).sum()

    def product(convolution):
        grad = jax.grad(functools.partial(loss, convolution))
        if over == "reverse":
            return jax.grad(lambda k: jnp.vdot(grad(k), kernel))(kernel)
        return jax.jvp(grad, (kernel,), (kernel,))[1]

    found, plain = (
        product(convolution).astype("float32")
        for convolution in (convolve, FORMS["forward"]["convolution"])
    )
    # Sums of at most 240 terms, rounded to the type in between and behind.
    bound = 1e-5 if dtype == "float32" else 2**-7
    assert tiny.difference(found, plain) < bound


@pytest.mark.parametrize(
    ("k", "where", "size", "groups", "f"),
    [
        (3, Geometry(2), 2, 1, 8),
        (7, Geometry(1), 2, 4, 8),
        (1, Geometry(2), 0, 1, 8),
        (3, Geometry(1, same(1)), 5, 1, 0),
    ],
)
def test_of_nothing_comes_nothing(k, where, size, groups, f):
    """Images smaller than the kernel, or without pixels, and no features."""
    x, kernel = jnp.ones((2, size, size, 8)), jnp.ones((k, k, 8 // groups, f))

    def with_gradients(function):
        out, pull = jax.vjp(functools.partial(function, groups=groups), x, kernel)
        return out, *pull(jnp.ones_like(out))

    xla = FORMS["forward"]["convolution"]
    plain, found = (
        with_gradients(functools.partial(function, where=where))
        for function in (xla, convolve)
    )
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    assert found[0].size == 0


# What is compiled.


def train_like(x, kernel, where, groups=1):
    """A convolution, a pooling and their gradients."""

    def loss(x, kernel):
        y = convolve(x, kernel, where, groups)
        y = pool.max_pool(y, 3, Geometry(2, same(1)))
        return jnp.square(y.astype(jnp.float32)).sum()

    return jax.grad(loss, (0, 1))(x, kernel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("k", "groups"), [(1, 1), (3, 1), (3, 4)])
def test_other_platforms_keep_the_convolution(k, groups, dtype):
    where = Geometry(1, same(k // 2))
    x, kernel = draw(dtype, 8, 8, 8, 8), draw(dtype, k, k, 8 // groups, 8)
    traced = jax.jit(train_like, static_argnums=(2, 3)).trace(x, kernel, where, groups)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.convolution") == 3
    assert text.count("stablehlo.reduce_window") == 1
    assert text.count("stablehlo.select_and_scatter") == 1
    for other in ("dot_general", "concatenate", "barrier"):
        assert other not in text
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "select_and_scatter" not in text
    assert "dot_general" in text


def test_one_export_serves_all_platforms():
    where = Geometry(1, same(1))
    x, kernel, _ = inputs(3, where, 8, 8, 8, 8, "float32")
    function = jax.jit(functools.partial(train_like, where=where))
    exported = jax.export.export(function, platforms=("cpu", "tpu"))(x, kernel)
    difference = tiny.difference(exported.call(x, kernel), function(x, kernel))
    assert difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "input", "kernel"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("k", "where"),
    [(1, Geometry(2)), (3, Geometry(1, same(1))), (3, Geometry(2, same(1)))],
)
def test_the_batch_stays_on_its_devices(k, where, dtype, direction):
    x, kernel, g = inputs(k, where, 8, 8, 8, 8, dtype)
    mesh = tiny.mesh_of(8)
    cut, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    for form in forms_of(direction, k, where):

        def function(x, kernel, g, form=form):
            return call(direction, form, x, kernel, g, where)

        compiled = (
            jax.jit(
                function,
                in_shardings=(cut, whole, cut),
                out_shardings=whole if direction == "kernel" else cut,
            )
            .lower(x, kernel, g)
            .compile()
        )
        kinds = {one.kind for one in hlo.collectives(compiled.as_text())}
        assert kinds == ({"all-reduce"} if direction == "kernel" else set()), form
        one = jax.jit(function)(x, kernel, g).astype(jnp.float32)
        placed = [
            jax.device_put(a, s) for a, s in ((x, cut), (kernel, whole), (g, cut))
        ]
        many = compiled(*placed).astype(jnp.float32)
        # Sums of eight parts, each rounded to the type.
        bound = 1e-5 if dtype == "float32" else 2**-6
        assert tiny.difference(many, one) < bound


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_batch_of_groups_stays_on_its_devices(stride, dtype):
    where = Geometry(stride, same(1))
    x, kernel = draw(dtype, 8, 8, 8, 64), draw(dtype, 3, 3, 8, 64)
    g = draw(dtype, 8, 8 // stride, 8 // stride, 64)

    def function(x, kernel, g):
        out, pull = jax.vjp(lambda x, k: convolve(x, k, where, 8), x, kernel)
        return out, *pull(g)

    mesh = tiny.mesh_of(8)
    cut, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    many = jax.jit(
        function, in_shardings=(cut, whole, cut), out_shardings=(cut, cut, whole)
    )
    found = hlo.collectives(many.lower(x, kernel, g).compile().as_text())
    assert {one.kind for one in found} == {"all-reduce"}
    # As above.
    bound = 1e-5 if dtype == "float32" else 2**-6
    one, other = (
        jax.tree.map(lambda a: a.astype(jnp.float32), f(x, kernel, g))
        for f in (many, jax.jit(function))
    )
    assert tiny.difference(one, other) < bound


def test_the_choice_is_a_form_that_can_compute_it(monkeypatch):
    options = itertools.product(
        KINDS, FORMS, (1, 64), ("float32", "bfloat16"), (False, True)
    )
    for (k, where, h, _, c, _), direction, b, dtype, flag in options:
        monkeypatch.setattr(conv, "xla_has_onednn", lambda found=flag: found)
        size = where.output(h, 0, k)
        chosen = form_of(direction, b, size, c, k, where, dtype)
        assert chosen in forms_of(direction, k, where)


@pytest.mark.parametrize("cpu", ["widens", "has_amx", "neither"])
def test_onednn_takes_what_it_is_faster_at_where_it_is_installed(monkeypatch, cpu):
    monkeypatch.setattr(onednn, "computes", lambda dtype: dtype != "float16")
    monkeypatch.setattr(onednn, "widens", lambda: cpu == "widens")
    monkeypatch.setattr(onednn, "has_amx", lambda: cpu == "has_amx")
    amx = cpu == "has_amx"

    def chosen(direction, b, size, k, dtype="float32", stride=1):
        return form_of(direction, b, size, 64, k, Geometry(stride), dtype)

    for direction in FORMS:
        assert chosen(direction, 128, 32, 3) == "onednn"
        assert chosen(direction, 128, 32, 3, "bfloat16") == "onednn"
        assert chosen(direction, 32, 7, 3) == "onednn"
        # Few pixels.
        some = chosen(direction, 32, 7, 3, "bfloat16")
        assert (some == "onednn") == (cpu != "neither")
        few = chosen(direction, 1, 14, 3, "bfloat16")
        assert (few == "onednn") == (amx and direction == "forward")
        assert (chosen(direction, 32, 56, 1, "bfloat16") == "onednn") == amx
        assert chosen(direction, 1, 56, 3) == "onednn"
        assert chosen(direction, 32, 56, 1) == "product"
        assert chosen(direction, 128, 32, 3, "float16") != "onednn"
    assert chosen("input", 32, 7, 3, "bfloat16", stride=2) == "onednn"


def test_what_made_an_image_is_not_repeated_in_its_transposition():
    where = Geometry(1, same(1))
    x, kernel, g = inputs(3, where, 8, 8, 16, 16, "float32")
    assert form_of("kernel", *x.shape[:2], 16, 3, where, x.dtype) == "convolution"

    def loss(kernel, x):
        return jnp.vdot(convolve(jnp.maximum(x, 0.5), kernel, where), g)

    text = jax.jit(jax.grad(loss)).lower(kernel, x).compile().as_text()
    transposed = [part for part in text.split("\n\n") if " transpose(" in part]
    assert transposed
    assert not any(" maximum(" in part for part in transposed)


# What `XLA_FLAGS` asks of XLA is read once, at the start of a process.
ONEDNN = """
import json
import jax
from resnet_jax.kernels.conv import convolve, xla_has_onednn
from resnet_jax.kernels.cpu.conv import Geometry, convolution

where = Geometry(1, ((1, 1), (1, 1)))
x, kernel, g = (
    jax.random.normal(jax.random.key(i), shape, "bfloat16")
    for i, shape in enumerate([(4, 16, 16, 64), (3, 3, 64, 64), (4, 16, 16, 64)])
)

def differences(*given):
    def directions(convolution, *given):
        x, kernel, g = given
        out, pull = jax.vjp(lambda x, k: convolution(x, k, where), x, kernel)
        return out, *pull(g)
    wide = directions(convolution, *(one.astype("float32") for one in given))
    for one, other in zip(directions(convolve, *given), wide):
        yield float(abs(one.astype("float32") - other).max() / abs(other).max())

compiled = jax.jit(lambda x, k: convolve(x, k, where)).lower(x, kernel).compile()
calls = "onednn$convolution" in compiled.as_text()
print(json.dumps([xla_has_onednn(), calls, list(differences(x, kernel, g))]))
"""


def test_without_cpus_there_is_no_onednn(monkeypatch):
    def no_devices(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_onednn_custom_call=true")
    monkeypatch.setattr(jax, "local_devices", no_devices)
    assert not conv.xla_has_onednn.__wrapped__()


@pytest.mark.slow
@pytest.mark.parametrize("asked", [True, False])
def test_onednn_computes_what_it_is_asked_to(asked):
    flag = f"--xla_cpu_experimental_onednn_custom_call={str(asked).lower()}"
    # Of several devices none is left to the oneDNN that may be installed, too.
    given = {"XLA_FLAGS": flag, "JAX_NUM_CPU_DEVICES": "2"}
    code, output = runs.run_python("-c", ONEDNN, **given)
    assert code == 0, output
    has, calls, differences = json.loads(output.splitlines()[-1])
    assert has == calls
    # Sums of up to 1024 terms in float32, rounded once to bfloat16's 8 digits.
    assert max(differences) < 2**-8
    if not asked:
        assert not has
    elif not has:
        pytest.skip("no oneDNN in XLA before jax 0.12, or no bfloat16 in this CPU")
