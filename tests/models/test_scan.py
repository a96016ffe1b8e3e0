"""Scanned blocks compute the same function, and their variables can be converted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models import ZOO, build, get_spec
from resnet_jax.models.cost import init_shapes
from resnet_jax.models.scan import applies, stack_blocks, unstack_blocks
from tests.helpers import keyed

# The runs of equal blocks start at a stage's first block, after its projection, or in
# its middle.
SPECS = {
    "basic": get_spec("cifar_resnet20"),
    "bottleneck": get_spec("resnet50", stage_sizes=(3, 1, 2, 3)),
    "squeeze": get_spec("seresnet18"),
    "no running statistics": get_spec("nf_resnet50", stage_sizes=(1, 3, 3, 1)),
    "pre-activation": get_spec("preact164", stage_sizes=(2, 3, 4)),
    "strides last": get_spec("keras_resnet50v2", stage_sizes=(4, 3, 1, 3)),
    "dilated": get_spec("resnet50", stage_sizes=(1, 1, 4, 3), output_stride=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPECS)
def test_scanned_blocks_are_the_same_function(kind):
    spec = SPECS[kind]
    variables = keyed.variables(spec)
    images = jnp.asarray(keyed.images(2, keyed.sizes(spec)[0]))
    plain = build(spec).apply(variables, images)
    stacked = stack_blocks(variables, spec)
    scanned = build(spec, scan_blocks=True).apply(stacked, images)
    # The sums are taken in two orders in float32.
    np.testing.assert_allclose(scanned, plain, rtol=0, atol=1e-5 * np.abs(plain).max())


@pytest.mark.parametrize("kind", SPECS)
def test_stacked_variables_have_the_network_s_shapes_and_can_be_unstacked(kind):
    spec = SPECS[kind]
    variables = keyed.variables(spec)
    stacked = stack_blocks(variables, spec)
    shapes = init_shapes(build(spec, scan_blocks=True), 64)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, dict(shapes))
    jax.tree.map(
        np.testing.assert_array_equal, unstack_blocks(stacked, spec), variables
    )


@pytest.mark.slow
def test_training_a_scanned_network_gives_the_same_gradients_and_statistics():
    spec = SPECS["basic"]
    variables = keyed.variables(spec)
    images = jnp.asarray(keyed.images(4, 16))

    def train(model, variables):
        def loss(params):
            logits, updated = model.apply(
                variables | {"params": params},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.sum(jnp.square(logits)), updated["batch_stats"]

        gradients, stats = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
        return {"params": gradients, "batch_stats": stats}

    plain = train(build(spec), variables)
    scanned = train(build(spec, scan_blocks=True), stack_blocks(variables, spec))
    for got, expected in zip(
        jax.tree.leaves(unstack_blocks(scanned, spec)),
        jax.tree.leaves(plain),
        strict=True,
    ):
        # Float32 rounds in 20 layers, and rectifiers near zero amplify it.
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert error < 1e-3


@pytest.mark.slow
def test_scanned_blocks_have_drop_path_rates_of_their_own():
    spec = get_spec("stochastic_depth110", stage_sizes=(4, 4, 4), drop_path=1.0)
    # The rates are 1/12, 2/12, ... 12/12, so the last block is always dropped.
    model = build(spec, scan_blocks=True)
    variables = stack_blocks(keyed.variables(spec), spec)
    changed = jax.tree.map(np.copy, variables)
    kernel = changed["params"]["stage3_block2to4"]["conv1"]["kernel"]
    images = jnp.asarray(keyed.images(4, 16))

    def logits(variables):
        return model.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )[0]

    before = logits(variables)
    kernel[2] += 1
    np.testing.assert_array_equal(before, logits(changed))
    kernel[0] += 1
    assert np.abs(before - logits(changed)).max() > 0


def test_scan_applies_to_networks_with_consecutive_equal_blocks():
    assert applies(ZOO["resnet50"].spec)
    assert applies(ZOO["cifar_resnet1202"].spec)
    assert not applies(ZOO["resnet14t"].spec)
    assert not applies(ZOO["ecaresnet50d_pruned"].spec)
    assert not applies(ZOO["vgg19"].spec)
    plain = dataclasses.replace(ZOO["cifar_resnet20"].spec, stage_sizes=(1, 2, 2))
    assert not applies(plain)
