"""Networks, tested against Keras Applications' and the Keras tutorial's.

Keras runs on its JAX backend.
"""

import json
from pathlib import Path

# The helper is imported first, since it chooses Keras's backend.
from tests.oracles import keras_networks  # isort: skip
from tests.oracles.keras_networks import (  # isort: skip
    TUTORIAL,
    build_keras,
    cross_entropy,
    fill,
    keyed_tensors,
    reference_logits,
    spec_and_scheme,
    train_keras,
    values,
)

import h5py
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras.src.legacy.saving import legacy_h5_format

from resnet_jax.models import ZOO, build, get_spec, list_models
from resnet_jax.weights import keras_files
from resnet_jax.weights.card import default_card
from resnet_jax.weights.naming import from_foreign, to_foreign
from resnet_jax.weights.receivers import receiver_of
from resnet_jax.weights.save import save as save_weights
from resnet_jax.weights.schemes.keras import list_layers
from tests.helpers import keyed
from tests.helpers.network_names import one_of_each_kind

GOLDEN = Path(__file__).parents[1] / "golden" / "logits.json"
APPLICATIONS = list_models("keras_*")
NAMES = [*APPLICATIONS, TUTORIAL]
# At odd sizes 'SAME' and explicit padding coincide, so an even one is needed, too.
SIZES = (64, 65)
# Float32 rounds at 6e-8. The largest difference that was measured is 1e-6 of the
# largest logit, and any difference of definition is far above this bound.
LOGITS_BOUND = 1e-4

# Fixtures are found by their names in this module.
keras_in_float64 = keras_networks.keras_in_float64


def train_ours(name: str, images, labels) -> dict[str, np.ndarray]:
    """Returns the same as `train_keras`, of this project's network."""
    spec, scheme = spec_and_scheme(name)
    images = jnp.asarray(images)
    model = build(spec, dtype=images.dtype)
    variables = jax.tree.map(
        lambda value: jnp.asarray(value, images.dtype), keyed.variables(spec)
    )

    def loss(params):
        logits, updated = model.apply(
            variables | {"params": params}, images, train=True, mutable=["batch_stats"]
        )
        return cross_entropy(logits, labels), updated

    gradients, updated = jax.grad(loss, has_aux=True)(variables["params"])
    return to_foreign({"params": gradients, **updated}, spec, scheme)


@pytest.mark.parametrize("name", one_of_each_kind(NAMES))
def test_logits_counts_and_order_of_layers_equal_keras(name):
    spec, scheme = spec_and_scheme(name)
    variables = keyed.variables(spec)
    for size in SIZES:
        network = build_keras(name, size)
        images = keyed.images(1, size)
        theirs = np.asarray(network(images, training=False))
        # Without jit, equal layers share their compiled programs.
        ours = np.asarray(build(spec).apply(variables, jnp.asarray(images)))
        assert ours.shape == theirs.shape
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error <= LOGITS_BOUND, f"at {size} pixels: {error:.1e}"
    assert sum(v.value.size for v in network.trainable_variables) == ZOO[name].params
    # Keras's files depend on the order of layers.
    order = [layer.name for layer in network.layers if layer.weights]
    assert [layer.name for layer in list_layers(spec, scheme)] == order


@pytest.mark.parametrize("name", one_of_each_kind(NAMES))
def test_golden_figures_equal_those_of_keras(name):
    images = keyed.images(1, keyed.sizes(ZOO[name].spec)[0])
    fresh = keyed.golden_sample(reference_logits(name, images))
    kept = json.loads(GOLDEN.read_text()).get(name)
    assert kept, "run python -m tests.oracles.make_golden"
    # Another machine may sum in another order in float32.
    atol = LOGITS_BOUND * np.abs(fresh).max()
    np.testing.assert_allclose(kept, fresh, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["keras_resnet50", "keras_resnet50v2", TUTORIAL])
def test_gradients_and_running_statistics_equal_keras(name, keras_in_float64):
    images = keyed.images(2, 64).astype(np.float64)
    labels = keyed.labels(2, ZOO[name].spec.num_classes)
    theirs = train_keras(build_keras(name, 64), images, labels)
    ours = train_ours(name, images, labels)
    assert ours.keys() == theirs.keys()
    assert {value.dtype for value in [*ours.values(), *theirs.values()]} == {
        np.dtype(np.float64)
    }
    largest = max(np.abs(value).max() for value in theirs.values())
    for tensor, value in theirs.items():
        # A norm cancels a bias before it, whose gradient is zero except for rounding.
        scale = np.abs(value).max()
        scale = largest if scale < 1e-9 * largest else scale
        # Float64 rounds at 1e-16, and 1e-13 of each tensor's scale was measured. If the
        # input of a single rectifier had the other sign, it would be above 1e-6.
        error = np.abs(ours[tensor] - value).max() / scale
        assert error <= 1e-9, f"{tensor}: {error:.1e}"


@pytest.fixture(scope="module")
def resnet50():
    """Returns a network of Keras, of which tests use only the variables."""
    return build_keras("keras_resnet50", 64)


def save(network: keras.Model, path: Path) -> None:
    """Saves a network in the format of the name; `weights_only.h5` as Keras 2 did."""
    if path.name == "weights_only.h5":
        with h5py.File(path, "w") as file:
            legacy_h5_format.save_weights_to_hdf5_group(file, network)
    elif path.name.endswith(".weights.h5"):
        network.save_weights(path)
    else:
        network.save(path)


def assert_loads(network: keras.Model, path: Path, tensors) -> None:
    """Asserts that Keras loads exactly these values from a file."""
    for variable in network.variables:
        variable.assign(np.zeros(variable.shape))
    network.load_weights(path)
    for name, value in values(network).items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


@pytest.mark.parametrize(
    "file", ["new.weights.h5", "model.keras", "model.h5", "weights_only.h5"]
)
def test_files_of_keras_are_read_and_written_unchanged(file, resnet50, tmp_path):
    spec, scheme = spec_and_scheme("keras_resnet50")
    tensors = keyed_tensors("keras_resnet50")
    save(fill(resnet50, tensors), tmp_path / file)
    read = keras_files.read(tmp_path / file, spec, scheme)
    again = to_foreign(from_foreign(read, spec, scheme), spec, scheme)

    out = tmp_path / ("out.h5" if file.endswith("l.h5") else "out.weights.h5")
    keras_files.write(out, again, spec, scheme)
    assert_loads(resnet50, out, tensors)


@pytest.mark.parametrize("file", ["out.weights.h5", "out.h5"])
@pytest.mark.parametrize("name", ["keras_resnet50v2", TUTORIAL])
def test_keras_loads_written_files(name, file, tmp_path):
    tensors = keyed_tensors(name)
    keras_files.write(tmp_path / file, tensors, *spec_and_scheme(name))
    assert_loads(build_keras(name, 64), tmp_path / file, tensors)


def test_files_without_names_of_layers_are_read_by_order(resnet50, tmp_path):
    path = tmp_path / "old.weights.h5"
    save(fill(resnet50, keyed_tensors("keras_resnet50")), path)
    with h5py.File(path, "a") as file:
        for layer in file["layers"].values():
            # Keras wrote no names before 3.6.
            del layer["vars"].attrs["name"]
    read = keras_files.read(path, *spec_and_scheme("keras_resnet50"))
    for name, value in keyed_tensors("keras_resnet50").items():
        np.testing.assert_array_equal(read[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("keras_resnet50", {"num_classes": 7}),
        ("keras_resnet50", {"num_classes": 0}),
        ("keras_resnet50v2", {"num_classes": 4, "in_channels": 1}),
    ],
)
@pytest.mark.parametrize("file", ["w.weights.h5", "w.h5"])
def test_keras_makes_a_changed_network_by_the_call(tmp_path, name, fields, file):
    spec = get_spec(name, **fields)
    variables = keyed.variables(spec)
    card = save_weights(str(tmp_path / file), variables, default_card(name, spec))
    receiver = receiver_of(card)
    network = eval(receiver.call, {"keras": keras})
    network.load_weights(tmp_path / file)
    images = keyed.generator("images").standard_normal(
        (1, 224, 224, spec.in_channels), np.float32
    )
    theirs = np.asarray(network(images, training=False))
    ours = np.asarray(build(spec).apply(variables, jnp.asarray(images)))
    np.testing.assert_allclose(ours, theirs, atol=LOGITS_BOUND * np.abs(theirs).max())
