"""Our networks against Keras Applications' and the tutorial's, on its JAX backend."""

import os

# Before keras is imported.
os.environ.setdefault("KERAS_BACKEND", "jax")

import json
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from keras.src.backend.common import dtypes
from keras.src.legacy.saving import legacy_h5_format

from resnet_jax.models import ZOO, build, list_models
from resnet_jax.weights import SCHEMES, keras_files
from resnet_jax.weights.keras import list_layers
from resnet_jax.weights.naming import from_foreign, to_foreign
from tests.helpers import keyed
from tests.helpers.network_names import one_of_each_kind

GOLDEN = Path(__file__).parents[1] / "golden" / "logits.json"
TUTORIAL = "tutorial_keras_resnet50"
APPLICATIONS = list_models("keras_*")
NAMES = [*APPLICATIONS, TUTORIAL]
# At odd sizes, wrong padding goes unnoticed: 'SAME' and explicit padding coincide.
SIZES = (64, 65)
# Float32 rounds at 6e-8; 1e-6 of the largest logit was the most that was measured, and
# is far below what any difference of definition makes.
LOGITS_BOUND = 1e-4


def of_zoo(name: str):
    """The spec and the naming scheme."""
    return ZOO[name].spec, SCHEMES[ZOO[name].scheme]


def build_keras(name: str, size: int) -> keras.Model:
    """Returns Keras's network with the keyed values."""
    if name == TUTORIAL:
        network = tutorial(size)
    else:
        make = getattr(keras.applications, class_name(name))
        network = make(
            weights=None,
            input_shape=(size, size, 3),
            classifier_activation=None,
        )
    return fill(network, keyed_tensors(name))


def class_name(name: str) -> str:
    """`keras_resnet50v2` -> `ResNet50V2`."""
    depth, v, two = name.removeprefix("keras_resnet").partition("v")
    return f"ResNet{depth}{v.upper()}{two}"


def keyed_tensors(name: str) -> dict[str, np.ndarray]:
    """The keyed values under Keras's names."""
    spec, scheme = of_zoo(name)
    return to_foreign(keyed.variables(spec), spec, scheme)


def fill(network: keras.Model, tensors) -> keras.Model:
    """Gives every variable of a network its value."""
    assert {variable.path for variable in network.variables} == tensors.keys()
    for variable in network.variables:
        variable.assign(tensors[variable.path])
    return network


def values(network: keras.Model) -> dict[str, np.ndarray]:
    """The variables of a network by their names."""
    return {variable.path: np.asarray(variable.value) for variable in network.variables}


def tutorial(size: int, stage_sizes=(3, 4, 6, 3)) -> keras.Model:
    """The ResNet-50 of the course's notebook: 64x64 pictures of hand signs."""
    layers = keras.layers

    def conv(x, name, *args, **more):
        init = "glorot_uniform"
        return layers.Conv2D(*args, kernel_initializer=init, name=name, **more)(x)

    def norm(x, name):
        return layers.BatchNormalization(axis=3, name=name)(x)

    def block(x, place, widths, stride=None):
        first = x
        x = conv(x, f"res{place}_branch2a", widths[0], 1, strides=stride or 1)
        x = layers.ReLU()(norm(x, f"bn{place}_branch2a"))
        x = conv(x, f"res{place}_branch2b", widths[1], 3, padding="same")
        x = layers.ReLU()(norm(x, f"bn{place}_branch2b"))
        x = conv(x, f"res{place}_branch2c", widths[2], 1)
        x = norm(x, f"bn{place}_branch2c")
        if stride:
            first = conv(first, f"res{place}_branch1", widths[2], 1, strides=stride)
            first = norm(first, f"bn{place}_branch1")
        return layers.ReLU()(layers.Add()([x, first]))

    inputs = keras.Input((size, size, 3))
    x = conv(layers.ZeroPadding2D(3)(inputs), "conv1", 64, 7, strides=2)
    x = layers.ReLU()(norm(x, "bn_conv1"))
    x = layers.MaxPooling2D(3, strides=2)(x)
    stages = zip(stage_sizes, (64, 128, 256, 512), (1, 2, 2, 2), strict=True)
    for i, (blocks, width, stride) in enumerate(stages, 2):
        for letter in "abcdef"[:blocks]:
            widths = (width, width, 4 * width)
            x = block(x, f"{i}{letter}", widths, stride if letter == "a" else None)
    x = layers.Flatten()(layers.AveragePooling2D(2)(x))
    return keras.Model(inputs, layers.Dense(6, name="fc6")(x))


def train_keras(network: keras.Model, images, labels) -> dict[str, np.ndarray]:
    """Gradients and new running statistics, by name."""
    trainable = [variable.value for variable in network.trainable_variables]
    others = [variable.value for variable in network.non_trainable_variables]

    def loss(trainable):
        logits, others_after = network.stateless_call(
            trainable, others, images, training=True
        )
        return cross_entropy(logits, labels), others_after

    gradients, statistics = jax.grad(loss, has_aux=True)(trainable)
    return {
        variable.path: np.asarray(value)
        for variable, value in zip(
            network.trainable_variables + network.non_trainable_variables,
            gradients + statistics,
            strict=True,
        )
    }


def train_ours(name: str, images, labels) -> dict[str, np.ndarray]:
    """The same of our network."""
    spec, scheme = of_zoo(name)
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


def cross_entropy(logits, labels):
    """The mean over examples."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def reference_logits(name: str, images: np.ndarray) -> np.ndarray:
    """Keras's logits of a network with the keyed values, in evaluation mode."""
    return np.asarray(build_keras(name, images.shape[1])(images, training=False))


@pytest.fixture
def keras_in_float64(in_float64, monkeypatch):
    """Lets Keras compute in float64, too, where it would round on JAX."""
    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy(policy)


@pytest.mark.parametrize("name", one_of_each_kind(NAMES))
def test_logits_counts_and_order_of_layers_equal_keras(name):
    spec, scheme = of_zoo(name)
    variables = keyed.variables(spec)
    for size in SIZES:
        network = build_keras(name, size)
        images = keyed.images(1, size)
        theirs = np.asarray(network(images, training=False))
        # Without jit, equal layers share what is compiled.
        ours = np.asarray(build(spec).apply(variables, jnp.asarray(images)))
        assert ours.shape == theirs.shape
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error <= LOGITS_BOUND, f"at {size} pixels: {error:.1e}"
    assert sum(v.value.size for v in network.trainable_variables) == ZOO[name].params
    # Files go by it.
    order = [layer.name for layer in network.layers if layer.weights]
    assert [layer.name for layer in list_layers(spec, scheme)] == order


@pytest.mark.parametrize("name", one_of_each_kind(NAMES))
def test_golden_figures_are_those_of_keras(name):
    images = keyed.images(1, keyed.sizes(ZOO[name].spec)[0])
    fresh = keyed.golden_sample(reference_logits(name, images))
    kept = json.loads(GOLDEN.read_text()).get(name)
    assert kept, "run python -m tests.oracles.make_golden"
    # Another machine's float32 may add up in another order.
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
        # A norm subtracts a bias before it, whose gradient is zero but for rounding.
        scale = np.abs(value).max()
        scale = largest if scale < 1e-9 * largest else scale
        # Float64 rounds at 1e-16; 1e-13 of each tensor's scale was measured. Were a
        # single rectifier to fall on the other side of zero, it would be above 1e-6.
        error = np.abs(ours[tensor] - value).max() / scale
        assert error <= 1e-9, f"{tensor}: {error:.1e}"


@pytest.fixture(scope="module")
def resnet50():
    """A network of Keras, for its variables only."""
    return build_keras("keras_resnet50", 64)


def save(network: keras.Model, path: Path) -> None:
    """Saves in the kind of file that the name says; `weights_only.h5` as Keras 2."""
    if path.name == "weights_only.h5":
        with h5py.File(path, "w") as file:
            legacy_h5_format.save_weights_to_hdf5_group(file, network)
    elif path.name.endswith(".weights.h5"):
        network.save_weights(path)
    else:
        network.save(path)


def assert_loads(network: keras.Model, path: Path, tensors) -> None:
    """Keras finds in a file exactly these values."""
    for variable in network.variables:
        variable.assign(np.zeros(variable.shape))
    network.load_weights(path)
    for name, value in values(network).items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


@pytest.mark.parametrize(
    "file", ["new.weights.h5", "model.keras", "model.h5", "weights_only.h5"]
)
def test_files_of_keras_come_in_and_go_out_unchanged(file, resnet50, tmp_path):
    spec, scheme = of_zoo("keras_resnet50")
    tensors = keyed_tensors("keras_resnet50")
    save(fill(resnet50, tensors), tmp_path / file)
    read = keras_files.read(tmp_path / file, spec, scheme)
    again = to_foreign(from_foreign(read, spec, scheme), spec, scheme)

    out = tmp_path / ("out.h5" if file.endswith("l.h5") else "out.weights.h5")
    keras_files.write(out, again, spec, scheme)
    assert_loads(resnet50, out, tensors)


@pytest.mark.parametrize("file", ["out.weights.h5", "out.h5"])
@pytest.mark.parametrize("name", ["keras_resnet50v2", TUTORIAL])
def test_keras_loads_our_files(name, file, tmp_path):
    tensors = keyed_tensors(name)
    keras_files.write(tmp_path / file, tensors, *of_zoo(name))
    assert_loads(build_keras(name, 64), tmp_path / file, tensors)


def test_files_without_names_are_read_by_order(resnet50, tmp_path):
    path = tmp_path / "old.weights.h5"
    save(fill(resnet50, keyed_tensors("keras_resnet50")), path)
    with h5py.File(path, "a") as file:
        for layer in file["layers"].values():
            # Keras wrote none before 3.6.
            del layer["vars"].attrs["name"]
    read = keras_files.read(path, *of_zoo("keras_resnet50"))
    for name, value in keyed_tensors("keras_resnet50").items():
        np.testing.assert_array_equal(read[name], value, err_msg=name)
