"""Values that a config leaves empty are chosen by the weights and by the data."""

import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict

from resnet_jax.config import load, override, values
from resnet_jax.errors import UserError
from resnet_jax.models import get_spec
from resnet_jax.training.completion import complete, with_total
from resnet_jax.weights import save
from resnet_jax.weights.card import Card, default_card
from tests.helpers import keyed, small_networks

# What a card says, in other numbers than any family's.
INPUT = {
    "image_size": 48,
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
    "interpolation": "bicubic",
    "crop_fraction": 0.9,
}


def config_of(*overrides: str) -> ConfigDict:
    config = load("configs/finetune.py")
    override(config, [f"--config.{text}" for text in overrides])
    return config


def weights_for(path, name: str, *, input: dict = INPUT, **fields) -> Card:
    """Writes small weights of a network with their card, and returns the card."""
    card, variables = small_networks.card_and_variables(name, **fields)
    return save.save(str(path), variables, dataclasses.replace(card, **input))


@pytest.mark.parametrize("kind", ["mine", "mine.safetensors"])
def test_the_network_and_its_input_are_those_of_the_card(kind, tmp_path):
    card = weights_for(tmp_path / kind, "seresnet18")
    config = complete(config_of(f"init_from={tmp_path / kind}"))
    assert config.model.name == "seresnet18"
    spec = get_spec("seresnet18", **config.model.overrides)
    assert dataclasses.replace(spec, num_classes=6) == card.make_spec()
    assert {key: config.data[key] for key in INPUT} == INPUT
    assert config.data.channels == 3
    assert not values.empty_keys(config)
    # The user's fields have precedence over those of the card.
    config.model.overrides.drop_path = 0.1
    own = config_of(
        f"init_from={tmp_path / kind}", "model.overrides={'drop_path': 0.1}"
    )
    assert complete(own).model.overrides == config.model.overrides


def test_mean_and_std_of_a_network_for_bgr_are_in_the_order_of_rgb(tmp_path):
    path = tmp_path / "mine.weights.h5"
    weights_for(path, "keras_resnet50", input={})
    config = complete(config_of(f"init_from={path}"))
    assert config.model.name == "keras_resnet50"
    # Caffe's means of ImageNet for blue, green and red, of 255.
    expected = np.array([123.68, 116.779, 103.939]) / 255
    np.testing.assert_allclose(config.data.mean, expected)


def test_a_network_for_grey_images_gets_them(tmp_path):
    grey = {"mean": (0.4,), "std": (0.2,)}
    weights_for(tmp_path / "w", "test_resnet", in_channels=1, input=grey)
    config = complete(config_of(f"init_from={tmp_path / 'w'}"))
    assert (config.data.channels, config.data.mean) == (1, (0.4,))
    assert "in_channels" not in config.model.overrides


def test_weights_for_four_channels_get_colour_images(tmp_path):
    four = {"mean": (0.1, 0.2, 0.3, 0.4), "std": (0.5,) * 4}
    weights_for(tmp_path / "w", "test_resnet", in_channels=4, input=four)
    config = complete(config_of(f"init_from={tmp_path / 'w'}"))
    assert (config.data.channels, config.data.mean) == (3, (0.1, 0.2, 0.3))


def test_a_file_without_a_card_is_recognised(tmp_path):
    path = tmp_path / "mine.npz"
    card = default_card("cifar_resnet20")
    save.save(str(path), keyed.variables(card.make_spec()), card)
    (tmp_path / "mine.npz.card.json").unlink()
    config = complete(config_of(f"init_from={path}"))
    assert (config.model.name, config.data.image_size) == ("cifar_resnet20", 32)


def test_values_that_the_user_gives_are_kept_and_the_others_come_from_the_card(
    tmp_path,
):
    weights_for(tmp_path / "w", "test_resnet")
    flags = ("data.image_size=40", "data.channels=1", "model.name=test_resnet")
    config = complete(config_of(f"init_from={tmp_path / 'w'}", *flags))
    assert (config.data.image_size, config.data.channels) == (40, 1)
    # The mean of three channels, as the first kernel becomes their sum.
    np.testing.assert_allclose(config.data.mean, (0.2,))
    np.testing.assert_allclose(config.data.std, (0.5,))
    assert config.data.interpolation == "bicubic"
    assert config.model.overrides.widths == (4, 8)


def test_without_weights_a_small_network_gets_small_images():
    config = complete(config_of())
    assert (config.model.name, config.data.image_size) == ("resnet18", 128)
    assert config.data.mean == (0.485, 0.456, 0.406)
    # A network for smaller images gets these.
    config = complete(config_of("model.name=cifar_resnet20"))
    assert (config.model.name, config.data.image_size) == ("cifar_resnet20", 32)


def test_a_complete_config_is_returned_as_it_is_and_another_is_not_changed():
    config = load("configs/r50.py")
    assert complete(config) is config
    assert with_total(config, 100) is config
    config = config_of()
    before = config.to_dict()
    with_total(complete(config), 100)
    assert config.to_dict() == before


def test_a_linear_probe_without_weights_is_an_error():
    with pytest.raises(UserError, match=r"all_but_head trains only.*init_from=WEIGHTS"):
        complete(load("configs/linear_probe.py"))


@pytest.mark.parametrize(
    ("images", "with_weights", "without"),
    [
        (12, {"steps": 300}, {"steps": 1000}),
        (100, {"steps": 300}, {"steps": 1000}),
        # 625 and 3,125 steps of 32 images.
        (1000, {"epochs": 20}, {"epochs": 100}),
        # 6,250 and 31,250 steps.
        (10_000, {"epochs": 20}, {"steps": 20_000}),
        (100_000, {"steps": 20_000}, {"steps": 20_000}),
    ],
)
def test_the_length_depends_on_the_number_of_training_images(
    images, with_weights, without
):
    assert with_total(config_of(), images).total.to_dict() == without
    config = config_of("init_from=w")
    assert with_total(config, images).total.to_dict() == with_weights
    config = config_of("total.epochs=5")
    assert with_total(config, images).total.to_dict() == {"epochs": 5}


def test_weights_that_are_not_there_are_an_error_that_names_them(tmp_path):
    with pytest.raises(UserError, match=r"There is no file .*/none\.pth"):
        complete(config_of(f"init_from={tmp_path / 'none.pth'}"), tmp_path)
