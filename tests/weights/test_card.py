"""A card says how the input is made, wherever it comes from."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resnet_jax.errors import UserError
from resnet_jax.models import ZOO
from resnet_jax.weights.card import default_card, from_json, timm_card

CONFIG = {
    "architecture": "resnet50",
    "num_classes": 1000,
    "pretrained_cfg": {
        "tag": "tv_in1k",
        "input_size": [3, 176, 176],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "license": "apache-2.0",
    },
}


@pytest.mark.parametrize("name", ["resnet50", "vgg19", "highway19", "keras_resnet50"])
def test_a_card_comes_back_from_its_text(name):
    card = default_card(name, license="mit", origin="here", top1=76.1)
    again = from_json(card.to_json(), "a card")
    assert again == card
    assert again.make_spec() == ZOO[name].spec


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no JSON", "Expecting value"),
        ("[]", "no attribute"),
        ("{}", "missing"),
        (default_card("resnet18").to_json().replace("bgr", "rbg"), "'rbg'"),
        (default_card("resnet18").to_json().replace(", 0.406", ""), "3 entries"),
    ],
)
def test_what_is_no_card_is_refused_in_one_line(text, told):
    with pytest.raises(UserError, match=f"card of w.npz cannot be used: .*{told}"):
        from_json(text, "w.npz")


def test_a_spec_that_the_network_cannot_have_is_refused():
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
    ("name", "facts"),
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
def test_the_default_card_follows_the_family(name, facts):
    card = default_card(name)
    assert {key: getattr(card, key) for key in facts} == facts


def test_classes_of_imagenet_and_cifar_have_names():
    assert default_card("resnet50").class_name(0) == "n01440764"
    assert default_card("resnet50").class_name(999) == "n15075141"
    assert default_card("akamaster_resnet20").class_name(3) == "cat"
    assert default_card("tutorial_keras_resnet50").class_name(3) == "class 3"


def test_keras_v1_sees_bgr_less_its_mean():
    pixels = np.array([[[[10, 20, 30]]]], np.uint8)
    given = default_card("keras_resnet50").normalize(jnp.asarray(pixels))
    # Pixels of 0 to 255: float32 rounds them and the mean at 1e-5.
    wanted = [[[[30 - 103.939, 20 - 116.779, 10 - 123.68]]]]
    np.testing.assert_allclose(given, wanted, atol=1e-4)


def test_an_image_is_read_as_the_card_says(tmp_path):
    ramp = np.linspace(0, 255, 90 * 60 * 3).reshape(60, 90, 3).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    card = default_card("resnet18", image_size=20, crop_fraction=0.5)
    # The short side to 40, then the middle 20 of 60 x 40.
    resized = Image.fromarray(ramp).resize((60, 40), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((20, 10, 40, 30)))
    np.testing.assert_array_equal(card.crop(tmp_path / "ramp.png")[0], expected)


@pytest.mark.parametrize(
    ("channels", "mean"), [(1, [0.3]), (2, [0.1, 0.2]), (5, [0.1, 0.2, 0.6, 0.1, 0.2])]
)
def test_mean_and_std_follow_the_number_of_channels(channels, mean):
    card = default_card("resnet18", mean=(0.1, 0.2, 0.6))
    card = card.for_spec(dataclasses.replace(card.make_spec(), in_channels=channels))
    assert card.mean == pytest.approx(mean)
    assert len(card.std) == channels


def test_no_image_has_as_many_channels_as_some_networks(tmp_path):
    card = default_card("resnet18")
    card = card.for_spec(dataclasses.replace(card.make_spec(), in_channels=4))
    with pytest.raises(UserError, match="takes 4 channels; image files have 1 or 3"):
        card.preprocess(tmp_path / "image.png")


def test_timms_config_says_all_that_the_card_needs():
    card = timm_card(CONFIG, "timm:resnet50.tv_in1k")
    assert (card.network, card.image_size, card.crop_fraction) == (
        "resnet50",
        176,
        0.95,
    )
    assert (card.mean, card.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (card.interpolation, card.license) == ("bicubic", "apache-2.0")
    # What the zoo has on record of the weights with this tag.
    assert card.top1 == ZOO["resnet50"].top1
    other = json.loads(json.dumps(CONFIG).replace("tv_in1k", "a1_in1k"))
    assert timm_card(other, "").top1 is None


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
def test_timms_labels_are_the_names_of_the_classes(labels, classes):
    assert timm_card(CONFIG | {"num_classes": 3} | labels, "").classes == classes


def test_a_network_of_timm_that_the_zoo_does_not_have_is_told():
    with pytest.raises(UserError, match="no network 'convnext_tiny'"):
        timm_card(CONFIG | {"architecture": "convnext_tiny"}, "")
