"""Cards, their defaults, their JSON and the input that they describe."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resnet_jax.errors import UserError
from resnet_jax.models import ZOO
from resnet_jax.weights.card import default_card, from_json, timm_card
from tests.helpers.timm_config import CONFIG


@pytest.mark.parametrize("name", ["resnet50", "vgg19", "highway19", "keras_resnet50"])
def test_a_card_survives_json(name):
    card = default_card(name, license="mit", origin="here", top1=76.1)
    again = from_json(card.to_json(), "a card")
    assert again == card
    assert again.make_spec() == ZOO[name].spec


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no JSON", "Expecting value"),
        ("[]", "no attribute"),
        ("{}", "missing"),
        (default_card("resnet18").to_json().replace("bgr", "rbg"), "'rbg'"),
        (default_card("resnet18").to_json().replace(", 0.406", ""), "3 entries"),
        (default_card("resnet18").to_json().replace("0.225", "0.0"), "std above 0"),
        (default_card("resnet18").to_json().replace("0.406", "NaN"), "be finite"),
    ],
)
def test_an_invalid_card_is_rejected_with_the_reason(text, reason):
    with pytest.raises(UserError, match=f"card of w.npz cannot be used: .*{reason}"):
        from_json(text, "w.npz")


def test_a_card_with_an_unknown_field_of_the_spec_is_rejected():
    card = default_card("resnet18")
    card = dataclasses.replace(card, spec={**card.spec, "wings": 2})
    with pytest.raises(UserError, match="no field 'wings'"):
        card.make_spec()


def test_every_network_of_the_zoo_has_a_default_card():
    for name, entry in ZOO.items():
        card = default_card(name)
        assert len(card.mean) == 3
        assert len(card.classes) in (0, entry.spec.num_classes)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("resnet50", {"interpolation": "bicubic", "crop_fraction": 0.875}),
        ("torchvision_resnet50", {"interpolation": "bilinear", "image_size": 224}),
        ("resnetv2_50", {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}),
        ("resnetv2_50x1_bit", {"mean": (0.5, 0.5, 0.5), "image_size": 448}),
        ("keras_resnet50v2", {"mean": (0.5, 0.5, 0.5), "bgr": False}),
        ("akamaster_resnet20", {"mean": (0.485, 0.456, 0.406), "image_size": 32}),
        ("tutorial_keras_resnet50", {"mean": (0, 0, 0), "image_size": 64}),
    ],
)
def test_the_default_card_follows_the_conventions_of_the_family(name, fields):
    card = default_card(name)
    assert {key: getattr(card, key) for key in fields} == fields


def test_classes_of_imagenet_and_cifar_have_names():
    assert default_card("resnet50").class_name(0) == "n01440764"
    assert default_card("resnet50").class_name(999) == "n15075141"
    assert default_card("akamaster_resnet20").class_name(3) == "cat"
    assert default_card("tutorial_keras_resnet50").class_name(3) == "class 3"


def test_keras_v1_takes_bgr_minus_the_mean():
    pixels = np.array([[[[10, 20, 30]]]], np.uint8)
    inputs = default_card("keras_resnet50").normalize(jnp.asarray(pixels))
    # Float32 rounds values of 0 to 255 at 1e-5.
    expected = [[[[30 - 103.939, 20 - 116.779, 10 - 123.68]]]]
    np.testing.assert_allclose(inputs, expected, atol=1e-4)


def test_an_image_is_resized_and_cropped_by_the_card(tmp_path):
    ramp = np.linspace(0, 255, 90 * 60 * 3).reshape(60, 90, 3).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    card = default_card("resnet18", image_size=20, crop_fraction=0.5)
    # The short side becomes 40 pixels, and the middle 20 of 60 x 40 are kept.
    resized = Image.fromarray(ramp).resize((60, 40), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((20, 10, 40, 30)))
    np.testing.assert_array_equal(card.crop(tmp_path / "ramp.png")[0], expected)


@pytest.mark.parametrize(
    ("channels", "mean"), [(1, [0.3]), (2, [0.1, 0.2]), (5, [0.1, 0.2, 0.6, 0.1, 0.2])]
)
def test_mean_and_std_are_adapted_to_the_number_of_channels(channels, mean):
    card = default_card("resnet18", mean=(0.1, 0.2, 0.6))
    card = card.for_spec(dataclasses.replace(card.make_spec(), in_channels=channels))
    assert card.mean == pytest.approx(mean)
    assert len(card.std) == channels


def test_a_network_of_four_channels_takes_no_image_files(tmp_path):
    card = default_card("resnet18")
    card = card.for_spec(dataclasses.replace(card.make_spec(), in_channels=4))
    with pytest.raises(UserError, match="takes 4 channels; image files have 1 or 3"):
        card.preprocess(tmp_path / "image.png")


def test_a_card_is_made_from_the_config_of_timm():
    card = timm_card(CONFIG, "timm:resnet50.tv_in1k")
    assert (card.network, card.image_size, card.crop_fraction) == (
        "resnet50",
        176,
        0.95,
    )
    assert (card.mean, card.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (card.interpolation, card.license) == ("bicubic", "apache-2.0")
    # The zoo's accuracy is that of the weights with this tag only.
    assert card.top1 == ZOO["resnet50"].top1
    config = json.loads(json.dumps(CONFIG).replace("tv_in1k", "a1_in1k"))
    assert timm_card(config, "").top1 is None


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ({"label_names": ["a", "b", "c"]}, ("a", "b", "c")),
        ({"label_names": {"0": "a", "2": "c"}}, ("a", "class 1", "c")),
        (
            {"label_names": ["a", "b", "c"], "label_descriptions": {"b": "bee"}},
            ("a", "bee", "c"),
        ),
        ({}, ()),
    ],
)
def test_the_labels_of_timm_are_the_names_of_the_classes(labels, classes):
    assert timm_card(CONFIG | {"num_classes": 3} | labels, "").classes == classes


def test_a_network_of_timm_that_is_not_in_the_zoo_is_rejected():
    with pytest.raises(UserError, match="no network 'convnext_tiny'"):
        timm_card(CONFIG | {"architecture": "convnext_tiny"}, "")
