"""Networks without kernels use plain operations and give equal results."""

import contextlib
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from resnet_jax.kernels import conv, plain_operations
from resnet_jax.kernels.geometry import Geometry
from resnet_jax.kernels.platforms import fused_over, target_platform
from resnet_jax.models import ZOO, ResNetSpec, build
from tests.helpers import keyed, small_networks, tiny

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "logits.json"
# One network of each kind: its blocks, norms, stem, padding or attention.
NAMES = [
    *("cifar_resnet20", "keras_resnet50", "seresnext26t_32x4d"),
    *("resnetblur18", "skresnet18", "resnest14d", "res2net50_26w_4s", "resnetv2_18"),
    *("resnetv2_50x1_bit", "resnetv2_50d_evos", "resnetv2_50d_frn", "dm_nfnet_f0"),
    *("vgg19_bn", "highway19"),
]
FASTEST_FIRST = [
    NAMES[0],
    *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:]),
]


@pytest.mark.parametrize("name", FASTEST_FIRST)
def test_logits_equal_the_golden_figures_without_kernels(name):
    spec = ZOO[name].spec
    images = jnp.asarray(keyed.images(1, keyed.sizes(spec)[0]))
    with jax.default_matmul_precision("highest"), plain_operations():
        logits = np.asarray(build(spec).apply(keyed.variables(spec), images))
    expected = np.asarray(json.loads(GOLDEN.read_text())[name])
    # The bound of tests/models/test_golden.py for networks with kernels.
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(keyed.golden_sample(logits), expected, rtol=0, atol=atol)


def training_gradients(name: str, **attributes):
    """Returns a small network's gradient function in training, and its arguments."""
    # A block a stage, for programs that compile sooner.
    fields = {"stage_sizes": (1, 1)} if isinstance(ZOO[name].spec, ResNetSpec) else {}
    spec = small_networks.spec_of(name, **fields)
    if hasattr(build(spec), "bn_group_size"):
        # Two ghost batches. Split attention and selective kernels normalise features
        # of one pixel. In a ghost batch of two, they would become 1 and -1 whatever
        # they are, so that their gradients would cancel but for a little.
        attributes["bn_group_size"] = 4
    model, variables = build(spec).clone(**attributes), keyed.variables(spec)
    images = jnp.asarray(keyed.images(8, 24))

    def loss(params):
        logits, updated = model.apply(
            variables | {"params": params},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        return jnp.square(logits).mean(), updated

    return jax.grad(loss, has_aux=True), variables["params"]


# The biases of convolutions before a batch norm, which subtracts them again. Their
# gradients are zero: 1e-16 in float64, and what float32 rounds otherwise.
WITHOUT_GRADIENT = {
    "keras_resnet50": r"conv\d?/bias",
    "resnest14d": r"fc1/bias",
    "vgg19_bn": r"conv\d/bias",
}


@pytest.mark.parametrize("name", FASTEST_FIRST)
def test_each_gradient_in_training_equals_that_without_kernels(name):
    gradients, params = training_gradients(name)
    expected, stats = jax.jit(gradients)(params)
    with plain_operations():
        got, plain_stats = jax.jit(gradients)(params)
    got, expected = (flatten_dict(tree, sep="/") for tree in (got, expected))
    total = float(optax.tree.norm(expected))
    for path, gradient in expected.items():
        difference = float(optax.tree.norm(got[path] - gradient))
        if re.search(WITHOUT_GRADIENT.get(name, "$^"), path):
            # Float32 rounds at 6e-8 of the summands, which are about as large as the
            # other gradients. The largest difference that was measured is 6e-8.
            assert difference < 1e-6 * total, path
        else:
            # Relative to its own norm, so that an error of 1 % in one leaf is found
            # however small the leaf is. Float32 sums in another order, through some
            # ten layers and back; the largest difference that was measured is 8e-6.
            assert difference < 1e-4 * float(optax.tree.norm(gradient)), path
    if stats:
        assert tiny.difference(plain_stats, stats) < 1e-4


def operations_of(function, *args) -> tuple[str, str]:
    """Returns a function's jaxpr and its StableHLO as they are traced now."""
    traced = jax.jit(function).trace(*args)
    return str(traced.jaxpr), traced.lower().as_text()


# Names of operations and calls that kernels use and the plain operations do not.
KERNELS = re.compile(r"custom_vjp|platform_index|optimization_barrier|concatenate\[")


@pytest.mark.parametrize("platform", [None, "cpu", "tpu"])
def test_plain_operations_are_traced_on_every_platform(platform):
    # Its last convolutions could be fused with their batch norms.
    gradients, params = training_gradients("resnet26")
    with target_platform(platform), fused_over(tiny.mesh_of(1)):
        jaxpr, _ = operations_of(gradients, params)
        assert KERNELS.search(jaxpr)
        with plain_operations():
            jaxpr, program = operations_of(gradients, params)
    assert not KERNELS.search(jaxpr)
    # The stem, two convolutions and one of the shortcut per stage, and so on: each has
    # a gradient by its kernel, and by its input but for the stem's.
    convolutions = sum("conv" in name for name in names_of_kernels(params))
    assert program.count("stablehlo.convolution") == 3 * convolutions - 1
    assert program.count("stablehlo.dot_general") == 3  # The head.
    assert program.count("stablehlo.select_and_scatter") == 1
    assert "custom_call" not in program


def names_of_kernels(params) -> list[str]:
    """Returns the paths of a network's kernels."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    return [name for name in names if "kernel" in name]


def test_programs_with_and_without_kernels_are_cached_apart():
    traced = []

    @jax.jit
    def convolve(x, kernel):
        traced.append(None)
        return conv.convolve(x, kernel, Geometry())

    x, kernel = jnp.ones((1, 4, 4, 8)), jnp.ones((1, 1, 8, 8))
    for count, use_plain in ((1, False), (2, True)):
        for _ in range(2):
            with plain_operations() if use_plain else contextlib.nullcontext():
                convolve(x, kernel)
        assert len(traced) == count
    # Both stay in the cache.
    convolve(x, kernel)
    with plain_operations():
        convolve(x, kernel)
    assert len(traced) == 2


def test_a_plain_network_has_a_derivative_in_forward_mode():
    spec = small_networks.spec_of("resnet18")
    variables, model = keyed.variables(spec), build(spec)
    images = jnp.asarray(keyed.images(2, 32))
    direction = jnp.ones_like(images)

    def loss(images):
        return model.apply(variables, images).sum()

    with plain_operations():
        _, tangent = jax.jit(lambda: jax.jvp(loss, (images,), (direction,)))()
    # The same derivative in reverse mode, with kernels.
    expected = jnp.vdot(jax.jit(jax.grad(loss))(images), direction)
    np.testing.assert_allclose(tangent, expected, rtol=1e-3)
