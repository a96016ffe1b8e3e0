"""Keras's networks with keyed values, on its JAX backend."""

import os

# Keras chooses its backend when it is imported.
os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
import numpy as np
import optax
import pytest
from keras.src.backend.common import dtypes

from resnet_jax.models import ZOO
from resnet_jax.models.zoo import Spec
from resnet_jax.weights import SCHEMES
from resnet_jax.weights.naming import Scheme, to_foreign
from tests.helpers import keyed

TUTORIAL = "tutorial_keras_resnet50"


def spec_and_scheme(name: str) -> tuple[Spec, Scheme]:
    """Returns the spec and the naming scheme of a network of the zoo."""
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
    """Returns the name of Keras's function: `keras_resnet50v2` -> `ResNet50V2`."""
    depth, v, two = name.removeprefix("keras_resnet").partition("v")
    return f"ResNet{depth}{v.upper()}{two}"


def keyed_tensors(name: str) -> dict[str, np.ndarray]:
    """Returns the keyed values of a network under Keras's names."""
    spec, scheme = spec_and_scheme(name)
    return to_foreign(keyed.variables(spec), spec, scheme)


def fill(network: keras.Model, tensors: dict[str, np.ndarray]) -> keras.Model:
    """Assigns a value to every variable of a network, and returns the network."""
    assert {variable.path for variable in network.variables} == tensors.keys()
    for variable in network.variables:
        variable.assign(tensors[variable.path])
    return network


def values(network: keras.Model) -> dict[str, np.ndarray]:
    """Returns the variables of a network by their names."""
    return {variable.path: np.asarray(variable.value) for variable in network.variables}


def tutorial(size: int, stage_sizes=(3, 4, 6, 3)) -> keras.Model:
    """Returns the ResNet-50 of the tutorial's notebook, for 64x64 images of signs."""
    layers = keras.layers

    def conv(x, name, *args, **options):
        init = "glorot_uniform"
        return layers.Conv2D(*args, kernel_initializer=init, name=name, **options)(x)

    def norm(x, name):
        return layers.BatchNormalization(axis=3, name=name)(x)

    def block(x, name, widths, stride=None):
        shortcut = x
        x = conv(x, f"res{name}_branch2a", widths[0], 1, strides=stride or 1)
        x = layers.ReLU()(norm(x, f"bn{name}_branch2a"))
        x = conv(x, f"res{name}_branch2b", widths[1], 3, padding="same")
        x = layers.ReLU()(norm(x, f"bn{name}_branch2b"))
        x = conv(x, f"res{name}_branch2c", widths[2], 1)
        x = norm(x, f"bn{name}_branch2c")
        if stride:
            shortcut = conv(
                shortcut, f"res{name}_branch1", widths[2], 1, strides=stride
            )
            shortcut = norm(shortcut, f"bn{name}_branch1")
        return layers.ReLU()(layers.Add()([x, shortcut]))

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
    """Returns gradients and new running statistics of a training step, by name."""
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


def cross_entropy(logits, labels):
    """Returns the mean cross entropy over examples."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def reference_logits(name: str, images: np.ndarray) -> np.ndarray:
    """Returns Keras's logits of a network with the keyed values, in evaluation mode."""
    return np.asarray(build_keras(name, images.shape[1])(images, training=False))


@pytest.fixture
def keras_in_float64(in_float64, monkeypatch):
    """Makes Keras compute in float64 too, which it would round on JAX."""
    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_dtype_policy(policy)
