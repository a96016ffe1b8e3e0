"""Our networks against Keras Applications' and the tutorial's, on its JAX backend."""

import os

# Before keras is imported.
os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

from resnet_jax.models import ZOO, build, list_models
from resnet_jax.weights import SCHEMES, keras_files
from resnet_jax.weights.keras import list_layers
from resnet_jax.weights.naming import from_theirs, to_theirs
from tests import keyed

TUTORIAL = "tutorial_keras_resnet50"
APPLICATIONS = list_models("keras_*")
NAMES = [*APPLICATIONS, TUTORIAL]
# At odd sizes, wrong padding goes unnoticed: 'SAME' and explicit padding coincide.
SIZES = (64, 65)


def of_zoo(name: str):
    """The spec and the naming scheme."""
    return ZOO[name].spec, SCHEMES[ZOO[name].scheme]


def build_keras(name: str, size: int | None = None) -> keras.Model:
    """Returns Keras's network with the keyed values; `size` is free for Applications."""
    if name == TUTORIAL:
        network = tutorial(size)
    else:
        make = getattr(keras.applications, class_name(name))
        network = make(
            weights=None,
            input_tensor=keras.Input((size, size, 3)),
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
    return to_theirs(keyed.variables(spec), spec, scheme)


def fill(network: keras.Model, tensors) -> keras.Model:
    """Gives every variable of a network its value."""
    assert {variable.path for variable in network.variables} == tensors.keys()
    for variable in network.variables:
        variable.assign(tensors[variable.path])
    return network


def values(network: keras.Model) -> dict[str, np.ndarray]:
    """The variables of a network by their names."""
    return {variable.path: np.asarray(variable.value) for variable in network.variables}


def tutorial(size: int) -> keras.Model:
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
    stages = [("abc", 64, 1), ("abcd", 128, 2), ("abcdef", 256, 2), ("abc", 512, 2)]
    for i, (letters, width, stride) in enumerate(stages, 2):
        for letter in letters:
            widths = (width, width, 4 * width)
            x = block(x, f"{i}{letter}", widths, stride if letter == "a" else None)
    x = layers.Flatten()(layers.AveragePooling2D(2)(x))
    return keras.Model([inputs], layers.Dense(6, name="fc6")(x))


def train_keras(network: keras.Model, images, labels) -> dict[str, np.ndarray]:
    """Gradients and new running statistics, by name."""
    trainable = [variable.value for variable in network.trainable_variables]
    others = [variable.value for variable in network.non_trainable_variables]

    def loss(trainable):
        logits, others_after = network.stateless_call(
            trainable, others, [images], training=True
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
    return to_theirs({"params": gradients, **updated}, spec, scheme)


def cross_entropy(logits, labels):
    """The mean over examples."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def reference_logits(name: str, images: np.ndarray) -> np.ndarray:
    """Keras's logits of a network with the keyed values, in evaluation mode."""
    return np.asarray(build_keras(name, images.shape[1])([images], training=False))
