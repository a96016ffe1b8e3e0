"""The command `predict`, which prints text or JSON and draws a picture."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resnet_jax import predict
from resnet_jax.errors import UserError
from resnet_jax.models import build
from resnet_jax.weights.card import CIFAR10_CLASSES
from resnet_jax.weights.save import save
from tests.helpers import small_networks
from tests.helpers.real_data import real_data


@pytest.fixture
def weights(tmp_path) -> str:
    """Writes weights of a small network for CIFAR-10; returns the path."""
    card, variables = small_networks.card_and_variables(
        "akamaster_resnet20", num_classes=10
    )
    path = str(tmp_path / "w.safetensors")
    save(path, variables, card)
    return path


@pytest.fixture
def images(tmp_path) -> list[str]:
    """Writes a colour and a grey image of other sizes than the network's."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / "colour.png", tmp_path / "grey.jpg"]
    for path, shape in zip(paths, ((40, 50, 3), (32, 31)), strict=True):
        Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


def test_the_five_best_classes_of_each_image_are_printed(weights, images, capsys):
    predict.main(["predict", weights, *images])
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[6]] == images
    names = {line.split()[-1] for line in lines[1:6]}
    assert len(names) == 5
    assert names < set(CIFAR10_CLASSES)


def test_json_is_one_document_with_the_logits_of_the_network(weights, images, capsys):
    predict.main(["predict", weights, *images, "--json", "--logits"])
    document = json.loads(capsys.readouterr().out)
    assert document["network"] == "akamaster_resnet20"
    card, variables = small_networks.card_and_variables(
        "akamaster_resnet20", num_classes=10
    )
    pixels = card.crop(images)
    logits = build(card.make_spec()).apply(
        variables, card.normalize(jnp.asarray(pixels))
    )
    given = [image["logits"] for image in document["images"]]
    # The command computes the same sums in another order.
    np.testing.assert_allclose(given, logits, rtol=1e-4, atol=1e-5)
    for image in document["images"]:
        best = image["top"][0]
        assert best["index"] == int(np.argmax(image["logits"]))
        assert sum(row["probability"] for row in image["top"]) <= 1 + 1e-9


def test_a_picture_shows_the_predictions(weights, images, tmp_path):
    predict.main(["predict", weights, *images, f"--save={tmp_path / 'shown.png'}"])
    with Image.open(tmp_path / "shown.png") as picture:
        picture.load()
        assert picture.width > 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.png"], r"gone\.png: No such file"),
        ([__file__], "not an image in a known format"),
        (["{image}", "--save=picture.xyz"], r"picture\.xyz cannot be written"),
        (["{image}", "--model=resnet50"], "does not fit resnet50"),
        (["{image}", "--model=resnet5"], "Did you mean resnet50"),
    ],
)
def test_each_mistake_gets_one_line(weights, images, arguments, message):
    arguments = [argument.format(image=images[0]) for argument in arguments]
    with pytest.raises(UserError, match=message) as error:
        predict.main(["predict", weights, *arguments])
    assert "\n" not in str(error.value)


def test_a_network_without_a_head_is_rejected(tmp_path, images):
    card, variables = small_networks.card_and_variables("resnet50", num_classes=0)
    save(str(tmp_path / "w.npz"), variables, card)
    with pytest.raises(UserError, match="has no head"):
        predict.main(["predict", str(tmp_path / "w.npz"), images[0]])


def test_real_images_of_any_size_are_read(weights, capsys):
    directory = real_data("cifar10-samples")
    paths = [str(path) for path in sorted(directory.glob("*.png"))]
    predict.main(["predict", weights, *paths, "--json"])
    found = json.loads(capsys.readouterr().out)["images"]
    assert [image["file"] for image in found] == paths
