"""Trained models predict classes, logits and features of images."""

import dataclasses
import pickle
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

import resnet_jax
from resnet_jax.errors import UserError
from resnet_jax.models import build
from resnet_jax.weights import Card, Prediction, TrainedModel
from resnet_jax.weights.card import CIFAR10_CLASSES
from resnet_jax.weights.save import save
from tests.helpers import small_networks

# These tests compile for too long for `make test-fast`, which has test_predict.py.
pytestmark = pytest.mark.slow


def pixels(count: int, side: int = 32) -> np.ndarray:
    """Returns random images."""
    shape = (count, side, side, 3)
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def model_of(name: str, *, image_size: int = 32, **fields) -> TrainedModel:
    """Returns a small network with keyed values; keywords replace its spec's fields."""
    card, variables = small_networks.card_and_variables(name, **fields)
    card = dataclasses.replace(card, image_size=image_size)
    return TrainedModel(build(card.make_spec()), variables, card)


@pytest.fixture
def path(tmp_path) -> str:
    """Writes weights of a small network for CIFAR-10 and returns their path."""
    card, variables = small_networks.card_and_variables(
        "akamaster_resnet20", num_classes=10
    )
    save(str(tmp_path / "w.safetensors"), variables, card)
    return str(tmp_path / "w.safetensors")


def test_a_trained_model_unpacks_to_module_variables_and_card(path):
    module, variables, card = model = resnet_jax.load(path)
    assert isinstance(module, nn.Module)
    assert isinstance(card, Card)
    assert (module, variables, card) == (model.module, model.variables, model.card)
    logits = module.apply(variables, card.preprocess(list(pixels(3))))
    # The same sums are taken in another order.
    np.testing.assert_allclose(model.logits(pixels(3)), logits, rtol=1e-4, atol=1e-5)


def test_load_takes_path_objects_and_other_numbers_of_classes(tmp_path, path):
    model = resnet_jax.load(tmp_path / "w.safetensors", num_classes=3, seed=1)
    assert model.logits(pixels(2)).shape == (2, 3)
    with pytest.raises(UserError, match="does not fit resnet50"):
        resnet_jax.load(path, "resnet50")


def test_predictions_are_the_most_probable_classes_by_name(path):
    model = resnet_jax.load(path)
    predictions, logits = model.predict(pixels(3), k=4), model.logits(pixels(3))
    for top, values in zip(predictions, logits, strict=True):
        assert [prediction.index for prediction in top] == np.argsort(-values)[
            :4
        ].tolist()
        names = [CIFAR10_CLASSES[prediction.index] for prediction in top]
        assert [prediction.name for prediction in top] == names
        expected = np.exp(values) / np.exp(values).sum()
        np.testing.assert_allclose(
            [prediction.probability for prediction in top],
            np.sort(expected)[::-1][:4],
            rtol=1e-5,
        )
    assert isinstance(predictions[0][0], Prediction)
    assert len(model.predict(pixels(1), k=99)[0]) == 10
    with pytest.raises(UserError, match=r"k=0 .*at least 1"):
        model.predict(pixels(1), k=0)


# One network of each family, and one whose head does not follow a global average.
@pytest.mark.parametrize(
    "name",
    [
        *("test_resnet", "resnetv2_50x1_bit", "dm_nfnet_f0", "vgg19_bn", "highway19"),
        "tutorial_keras_resnet50",
    ],
)
def test_features_are_the_input_of_the_head(name):
    model = model_of(name, image_size=64 if name.startswith("tutorial") else 32)
    features, head = model.features(pixels(2)), model.variables["params"]["head"]
    assert features.dtype == np.float32
    logits = features @ head["kernel"] + head.get("bias", 0)
    # The same sums are taken in another order.
    np.testing.assert_allclose(model.logits(pixels(2)), logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["akamaster_resnet20", "vgg19_bn"])
def test_a_network_without_a_head_has_the_same_features(name):
    model, without = model_of(name), model_of(name, num_classes=0)
    features = model.features(pixels(2))
    np.testing.assert_array_equal(without.features(pixels(2)), features)
    assert model.features([]).shape == without.features([]).shape
    assert model.features([]).shape == (0, features.shape[1])


def test_a_network_without_a_head_predicts_nothing():
    model = model_of("akamaster_resnet20", num_classes=0)
    for method in (model.predict, model.logits):
        with pytest.raises(UserError, match=r"has no head.*`features`"):
            method(pixels(1))


def test_no_images_give_empty_results_of_the_right_shape():
    model = model_of("akamaster_resnet20")
    assert model.predict([]) == []
    assert model.logits([]).shape == (0, 6)
    assert model.logits([]).dtype == np.float32


def test_a_result_does_not_depend_on_the_other_images():
    model, images = model_of("akamaster_resnet20"), pixels(70)
    together = model.logits(images)
    # The same program computes them together with other images and zeros.
    np.testing.assert_array_equal(model.logits(images[5:50])[:40], together[5:45])
    np.testing.assert_array_equal(model.logits(images[60:][::-1])[::-1], together[60:])
    # Programs for fewer images sum in another order.
    for count in (1, 3):
        few = model.logits(images[:count])
        np.testing.assert_allclose(few, together[:count], rtol=1e-4, atol=1e-5)


class Counted(nn.Module):
    """Wraps a network and notes the batch size of each trace."""

    inner: nn.Module
    note: Callable

    def __call__(self, x):
        self.note(x.shape[0])
        return self.inner(x)


def test_each_batch_size_is_compiled_once_per_model():
    model = model_of("akamaster_resnet20")
    traced = []
    variables = {
        kind: {"inner": tree} for kind, tree in model.variables.items() if tree
    }
    counted = TrainedModel(Counted(model.module, traced.append), variables, model.card)
    for count in (1, 2, 5, 8, 6, 1, 33, 70):
        assert counted.logits(pixels(count)).shape == (count, 6)
    assert traced == [1, 2, 8, 32]


def test_the_last_images_are_computed_by_the_program_of_the_others():
    model = model_of("akamaster_resnet20")
    traced = []
    variables = {
        kind: {"inner": tree} for kind, tree in model.variables.items() if tree
    }
    counted = TrainedModel(Counted(model.module, traced.append), variables, model.card)
    expected = counted.logits(pixels(7), batch_size=3)
    assert traced == [3]
    rows = list(counted.stream_logits(pixels(7), batch_size=3, flip=True))
    # Both views of the images are computed by one part of the program.
    assert traced == [3, 3]
    mirrored = counted.logits(pixels(7)[:, :, ::-1], batch_size=3)
    # The same sums are taken in another order.
    np.testing.assert_allclose(rows, (expected + mirrored) / 2, rtol=1e-4, atol=1e-5)
    top = counted.predict(pixels(7), k=1, batch_size=3, flip=True)
    assert [row[0].index for row in top] == np.argmax(rows, axis=1).tolist()
    with pytest.raises(UserError, match=r"batch_size=0 .*at least 1"):
        counted.predict(pixels(1), batch_size=0)


def test_images_are_read_while_earlier_ones_are_computed():
    model, images = model_of("akamaster_resnet20"), pixels(200)
    read = 0

    def crops():
        nonlocal read
        for crop in model.card.crops(images):
            read += 1
            yield crop

    stream = model.stream_logits(crops())
    assert read == 0
    rows = [next(stream)]
    # The second batch is read while the first one is computed.
    assert read == 64
    rows += list(stream)
    np.testing.assert_array_equal(np.stack(rows), model.logits(images))


def test_the_first_bad_image_raises_an_error_that_names_it(tmp_path):
    model = model_of("akamaster_resnet20")
    Image.fromarray(pixels(1)[0]).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    files = [tmp_path / "good.png", tmp_path / "bad.png", tmp_path / "gone.png"]
    for use in (model.predict, model.logits, model.features, model.card.preprocess):
        with pytest.raises(UserError, match=r"/bad\.png: cannot be decoded"):
            use(files)
    for use in (model.predict, model.logits, model.features, model.card.preprocess):
        assert len(use(files[0], max_pixels=1024)) == 1
        with pytest.raises(UserError, match=r"good\.png claims 32x32 = 1,024 pixels"):
            use(files[0], max_pixels=1023)


def test_a_model_can_be_pickled_after_it_was_used(path):
    model = resnet_jax.load(path)
    expected = model.logits(pixels(2))
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.logits(pixels(2)), expected)


def test_the_representation_names_the_network_and_prints_no_arrays(path):
    model = resnet_jax.load(path)
    assert repr(model).startswith("TrainedModel(network='akamaster_resnet20', param")
    assert "classes=10, input=(32, 32, 3)" in repr(model)
    assert len(repr(model)) < 200
    assert len(repr(model.card)) < 500
    parameters = jax.tree.leaves(model.variables["params"])
    assert f"parameters={sum(x.size for x in parameters)}" in repr(model)


def test_images_may_be_files_pillow_images_and_arrays(path, tmp_path):
    image = pixels(1)[0]
    Image.fromarray(image).save(tmp_path / "image.png")
    model = resnet_jax.load(path)
    forms = [tmp_path / "image.png", Image.fromarray(image), image]
    logits = model.logits(forms)
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])
