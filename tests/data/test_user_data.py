"""Data that a user passes to `train`: arrays, or a source of the user's own."""

import inspect
import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resnet_jax.config.saved import from_saved
from resnet_jax.data.decode import Picture
from resnet_jax.data.derived_sources import Subset
from resnet_jax.data.source_protocol import NamedSource, Source
from resnet_jax.data.sources import DigitsSource
from resnet_jax.data.user_data import config_of_given, open_given
from resnet_jax.errors import UserError
from resnet_jax.training.loop import train
from tests.helpers import runs, tiny

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (80, 8, 8, 3), np.uint8)
LABELS = np.arange(80) % 4


class Own:
    """A source as a user would write it."""

    classes = ("a", "b", "c", "d")

    def __init__(self, images=IMAGES, labels=LABELS):
        self.images, self.image_labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.image_labels[index]


def config(**changes):
    """Returns the config of a run of four steps on the digits."""
    digits = {"data.eval_split": "test", "data.source": "digits"}
    return tiny.config(digits | {"checkpoint.keep_last": 1} | changes)


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def opened(data, eval_data=None) -> NamedSource:
    """Returns the training split."""
    return open_given(data, eval_data or data, config(**{"data.channels": 3}))["train"]


@pytest.mark.parametrize(
    "images",
    [
        IMAGES,
        list(IMAGES),
        [encoded(image) for image in IMAGES],
        [Image.fromarray(image) for image in IMAGES],
        jnp.asarray(IMAGES),
    ],
    ids=["array", "list", "files", "pillow", "jax"],
)
def test_images_come_in_any_form(images):
    source = opened((images, LABELS))
    assert len(source) == 80 and source.classes == ("0", "1", "2", "3")
    image, label = source[7]
    if isinstance(image, bytes):
        image = np.asarray(Image.open(io.BytesIO(image)))
    assert np.array_equal(image, IMAGES[7]) and label == 3


def test_images_of_pillow_are_made_upright_as_their_files_are():
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(IMAGES[7]).save(file, "png", exif=exif)
    image, _ = opened(([Image.open(file)] * 80, LABELS))[0]
    assert np.array_equal(image, Picture(file.getvalue(), image.shape[-1]).pixels())
    assert not np.array_equal(image, IMAGES[7])


def test_images_may_be_paths(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, image in zip(paths, IMAGES, strict=False):
        path.write_bytes(encoded(image))
    assert opened((paths, LABELS[:5]))[4] == (paths[4].read_bytes(), 0)
    with pytest.raises(UserError, match=r"6\.png: No such file or directory"):
        opened(([*paths, tmp_path / "6.png"], LABELS[:6]))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (LABELS.tolist(), ("0", "1", "2", "3")),
        (LABELS[:, None], ("0", "1", "2", "3")),
        (LABELS.astype(np.uint8), ("0", "1", "2", "3")),
        (LABELS > 1, ("0", "1")),
        (np.array(["dog", "ant", "cat", "bee"])[LABELS], ("ant", "bee", "cat", "dog")),
        (["dog", "cat"] * 40, ("cat", "dog")),
    ],
)
def test_labels_are_numbers_or_names(labels, classes):
    source = opened((IMAGES, labels))
    assert source.classes == classes
    number_or_name = np.ravel(labels)[5]
    label = source[5][1]
    if isinstance(number_or_name, str):
        assert classes[label] == number_or_name
    else:
        assert label == number_or_name


def test_classes_without_images_are_reported_once(caplog):
    assert opened((IMAGES, LABELS)).classes == ("0", "1", "2", "3")
    assert not caplog.messages
    # Labels that count from 1.
    opened((IMAGES, LABELS + 1), (IMAGES, LABELS))
    opened((IMAGES, 10 * LABELS), (IMAGES, LABELS))
    assert caplog.messages == [
        "1 of the 5 classes of data have no image (0); labels count from 0.",
        "27 of the 31 classes of data have no image (1, 2, 3, 4, 5, ...); labels count"
        " from 0.",
    ]


def test_a_slice_that_given_data_do_not_follow_is_reported(caplog):
    config_of_given(config())
    assert not caplog.messages
    config_of_given(config(**{"data.train_split": "train[:0]"}))
    assert caplog.messages == [
        "config.data.train_split='train[:0]' has no effect, since the images are those"
        " that were passed to train; pass a part of them."
    ]


def test_labels_that_are_no_numbers_of_classes_are_reported():
    with pytest.raises(UserError, match=r"Label 79 of data is 1\d+\. Number the clas"):
        opened((IMAGES, LABELS + 10**12 * (np.arange(80) == 79)))


def test_gray_images_need_no_axis_of_channels():
    assert opened((IMAGES[..., 0], LABELS))[3][0].shape == (8, 8, 1)
    assert opened(Own(IMAGES[..., 0]))[3][0].shape == (8, 8, 1)


def test_a_users_source_needs_three_members():
    own = Own([Image.fromarray(image) for image in IMAGES], LABELS.astype(np.int64))
    assert isinstance(own, Source) and not isinstance(own, NamedSource)
    source = opened(own)
    assert isinstance(source, NamedSource)
    image, label = source[5]
    assert np.array_equal(image, IMAGES[5]) and (label, type(label)) == (1, int)
    assert source.classes == own.classes and source.name(5) == "data/5"


@pytest.mark.parametrize(("fraction", "size"), [(0.29, 29), (0.2, 20), (0.999, 99)])
def test_the_fraction_of_the_data_that_is_held_out_can_be_set(fraction, size):
    images, labels = np.zeros((100, 4, 4), np.uint8), np.arange(100) % 2
    changes = {"data.eval_fraction": fraction}
    splits = open_given((images, labels), None, config(**changes))
    assert [len(splits[name]) for name in ("train", "test")] == [100 - size, size]


def test_a_fifth_of_the_data_is_held_out_without_eval_data():
    splits = open_given((IMAGES, LABELS), None, config(seed=3))
    train, test = splits["train"], splits["test"]
    assert isinstance(train, Subset) and isinstance(test, Subset)
    assert (len(train), len(test)) == (64, 16)
    assert set(train.indices) | set(test.indices) == set(range(80))
    image, label = train[3]
    assert np.array_equal(image, IMAGES[train.indices[3]]) and type(label) is int
    again, with_another_seed = (
        open_given((IMAGES, LABELS), None, config(seed=seed))["test"] for seed in (3, 4)
    )
    assert again.digest() == test.digest() != with_another_seed.digest()


def test_other_images_labels_or_classes_are_other_data():
    changed_labels, changed_images = LABELS.copy(), IMAGES.copy()
    changed_labels[70], changed_images[70, 3, 3, 1] = 0, 1
    digests = [
        opened(data).digest()
        for data in (
            (IMAGES, LABELS),
            (IMAGES, changed_labels),
            (changed_images, LABELS),
            (IMAGES[1:], LABELS[1:]),
            Own(),
            Own(labels=(LABELS + 1) % 4),
            Own(IMAGES[1:], LABELS[1:]),
        )
    ]
    assert len(set(digests)) == len(digests)
    assert opened((list(IMAGES), LABELS)).digest() == digests[0]
    # Views, whose bytes are in another order in memory.
    channels_first = np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2))
    view = np.moveaxis(channels_first, -3, -1)
    assert opened((view, LABELS)).digest() == digests[0]
    assert opened((list(view), LABELS)).digest() == digests[0]


class Nameless(Own):
    classes = ()


class Number(Own):
    classes = 4


class OneName(Own):
    classes = "abcd"


class Twice(Own):
    classes = ("a", "b", "a", "d")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            IMAGES,
            r"data is uint8\[80, 8, 8, 3\]\. Give \(images, labels\), which",
        ),
        ("folder:x", r"data is str\. Give \(images, labels\)"),
        (
            (IMAGES / 255, LABELS),
            r"data\[0\] is an array of float64, .*'uint8'",
        ),
        ((IMAGES[0, 0], LABELS), r"uint8\[8, 3\]\. Give uint8\[n, h, w, c\]"),
        ((IMAGES.transpose(0, 3, 1, 2), LABELS), r"numpy\.moveaxis\(x, -3, -1\)"),
        (
            ([IMAGES, IMAGES], LABELS),
            r"data/0 is uint8\[80, 8, 8, 3\]\. Give one",
        ),
        ((IMAGES, LABELS[1:]), "80 images and 79 labels"),
        ((IMAGES[:0], LABELS[:0]), "0 images and 0 labels"),
        ((IMAGES, np.eye(4)[LABELS]), r"float64\[80, 4\]\. .*labels\.argmax"),
        ((IMAGES, LABELS / 1), r"float64\[80\]\. .*labels\.astype"),
        ((IMAGES, None), r"labels of data are object\[\]"),
        ((IMAGES, [0, None] * 40), r"labels of data are object\[80\]"),
        (list(zip(IMAGES, LABELS, strict=True)), r"zip\(\*pairs\) makes of pairs"),
        ((IMAGES, LABELS - 1), r"Label 0 of data is -1\. Count from 0\."),
        (([*IMAGES[1:], "cat.png"], LABELS), r"cat\.png: No such file"),
        (([*IMAGES[1:], IMAGES[0] / 2], LABELS), r"data/79 is an array of float64"),
        (Nameless(), r"classes of data are \(\)"),
        (Number(), "classes of data are 4"),
        (OneName(), "classes of data are 'abcd'"),
        (Twice(), "Two classes of data have the same name"),
        (Own(IMAGES[:0]), "data holds no image"),
    ],
)
def test_data_other_than_images_and_labels_are_reported(data, message):
    with pytest.raises(UserError, match=message):
        open_given(data, data, config())


@pytest.mark.parametrize("label", [4, -1, 1.0, "a", np.array([1])])
def test_a_label_that_is_not_a_class_is_reported_with_its_index(label):
    source = opened(Own(labels=[0, label, *[0] * 78]))
    with pytest.raises(UserError, match=r"label of data/1 is .* from 0 to 3"):
        source[1]


@pytest.mark.parametrize("example", [None, IMAGES[0], {"image": 0, "label": 1}, (1,)])
def test_an_example_that_is_not_a_pair_is_reported_with_its_index(example):
    class Wrong(Own):
        def __getitem__(self, index):
            return example

    with pytest.raises(UserError, match=r"data/1 is .* Give an image and its label"):
        opened(Wrong())[1]


def test_an_error_in_a_users_source_names_the_image_that_was_read():
    class Broken(Own):
        def __getitem__(self, index):
            return 1 / 0

    with pytest.raises(ZeroDivisionError) as caught:
        opened(Broken())[3]
    assert caught.value.__notes__ == ["It was raised while data/3 was read."]


def test_too_few_images_to_hold_some_out_are_reported():
    with pytest.raises(UserError, match=r"data has 4 images, too few .* eval_data"):
        open_given((IMAGES[:4], LABELS[:4]), None, config())


def arrays(split: str):
    digits = DigitsSource(split)
    return digits.images, digits.labels


def test_arrays_train_like_the_same_images_opened_by_name(tmp_path):
    evaluations = []
    by_name = train(config(), tmp_path / "name")
    given = train(
        config(),
        str(tmp_path / "given"),
        data=arrays("train"),
        eval_data=arrays("test"),
        callback=evaluations.append,
    )
    assert (given["loss"], given["top1"]) == (by_name["loss"], by_name["top1"])
    assert [x["step"] for x in evaluations] == [4]
    assert evaluations[0]["loss"] == given["loss"]
    saved = runs.read_json(tmp_path / "given" / "config.json")
    assert saved["data"]["source"] == "train(data=...)"
    # The command line cannot open the arrays.
    with pytest.raises(UserError, match=r"handed to resnet_jax\.train\(data=\.\.\.\)"):
        train(from_saved(saved), tmp_path / "given")


def test_a_run_on_given_data_resumes_after_its_callback_failed(tmp_path):
    half = config()
    half.evaluate.every = half.checkpoint.every = {"steps": 2}
    seen = []

    def fail_once(evaluation):
        seen.append(evaluation["step"])
        if len(seen) == 1:
            raise RuntimeError("the callback's own")

    data = Own(*arrays("train"))
    data.classes = tuple("0123456789")
    with pytest.raises(RuntimeError, match="the callback's own"):
        train(half, tmp_path / "run", data=data, callback=fail_once)
    result = train(half, tmp_path / "run", data=data, callback=fail_once)
    assert seen == [2, 4]
    whole = train(half, tmp_path / "whole", data=data)
    assert result["loss"] == whole["loss"] and result["n_seen"] == 287
    changed = Own(255 - data.images, (data.image_labels + 1) % 10)
    changed.classes = data.classes
    with pytest.raises(UserError, match="other data"):
        train(half, tmp_path / "run", data=changed)


def test_eval_data_without_data_are_rejected(tmp_path):
    with pytest.raises(UserError, match="eval_data also needs data"):
        train(config(), tmp_path / "run", eval_data=(IMAGES, LABELS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"epochs": 3}}, "config is dict. Give a ConfigDict"),
        ({"workdir": None}, "workdir is NoneType. Give the path of a directory"),
        ({"callback": [print]}, "callback is list. Give one function"),
    ],
)
def test_an_argument_of_a_wrong_type_is_reported_before_anything_is_done(
    change, message, tmp_path
):
    arguments = {"config": config(), "workdir": tmp_path / "run"} | change
    # Without the type checks of the tests, whose message says less.
    with pytest.raises(UserError, match=message):
        inspect.unwrap(train)(**arguments)
    assert not (tmp_path / "run").exists()
