"""Sources: every image once with its label, and what they say to mistakes."""

import io
import json
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from resnet_jax.data.decode import Picture
from resnet_jax.data.sources import IMAGE_SUFFIXES, check_same_classes, open_source
from resnet_jax.errors import UserError
from tests.helpers.pictures import encode, noise, write_folder

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    "source, nearest",
    [
        ("tdfs:cifar10", "Did you mean tfds"),
        ("folders:/tmp", "Did you mean folder"),
        ("digit", "Did you mean digits"),
        ("digits:1", "Did you mean digits"),
        ("tfds", "tfds:NAME"),
        ("folder:", "folder:PATH"),
        ("fake:ten", "fake[:CLASSES[:SIZE]]"),
        ("fake:0", "fake[:CLASSES[:SIZE]]"),
        ("fake:1:2:3", "fake[:CLASSES[:SIZE]]"),
        ("webdataset", "tfds:NAME"),
        ("", "tfds:NAME"),
    ],
)
def test_an_unknown_source_is_told_with_the_nearest(source, nearest):
    with pytest.raises(UserError) as raised:
        open_source(source, "train")
    assert repr(source) in str(raised.value)
    assert nearest in str(raised.value)


def test_digits_are_split_1437_to_360():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.classes == test.classes == tuple("0123456789")


def test_each_of_the_1797_digits_is_in_one_split_with_its_label():
    from sklearn.datasets import load_digits

    original = load_digits()
    # Some digits are equal to the last pixel, so they are counted.
    wanted = sorted(
        (np.round(image * (255 / 16)).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(original.images, original.target, strict=True)
    )
    found = []
    for split in ("train", "test"):
        source = open_source("digits", split)
        for index in range(len(source)):
            image, label = source[index]
            assert image.shape == (8, 8, 1)
            assert image.dtype == np.uint8
            found.append((image.tobytes(), label))
    assert len(wanted) == 1797
    assert sorted(found) == wanted


def test_digits_span_black_to_white():
    images = open_source("digits", "train").images
    assert (images.min(), images.max()) == (0, 255)


def test_the_split_of_the_digits_never_changes():
    # Another split would make accuracies of before and after incomparable.
    firsts = {
        split: [open_source("digits", split)[index][1] for index in range(10)]
        for split in ("train", "test")
    }
    assert firsts == {
        "train": [6, 6, 2, 5, 6, 2, 2, 1, 9, 0],
        "test": [6, 6, 1, 9, 5, 1, 0, 2, 4, 4],
    }


def test_the_digits_have_no_other_split():
    with pytest.raises(UserError, match=r"'tets'\. Did you mean test"):
        open_source("digits", "tets")


def test_fake_images_have_the_shape_and_the_classes_asked_for():
    source = open_source("fake:7:50", "train", fake_shape=(5, 6, 3))
    assert len(source) == 50
    assert len(source.classes) == 7
    examples = [source[index] for index in range(50)]
    assert {image.shape for image, _ in examples} == {(5, 6, 3)}
    assert {label for _, label in examples} == set(range(7))
    # Noise, and the same whenever it is asked for.
    assert examples[0][0].std() > 10
    again = open_source("fake:7:50", "train", fake_shape=(5, 6, 3))
    assert all((again[i][0] == examples[i][0]).all() for i in range(50))


def test_fake_has_the_size_of_imagenet_unless_told_otherwise():
    assert len(open_source("fake", "train")) == 1_281_167
    assert len(open_source("fake", "validation")) == 50_000
    assert len(open_source("fake", "train").classes) == 1000


def test_fake_has_no_other_split():
    with pytest.raises(UserError, match=r"'valid'\. Did you mean validation"):
        open_source("fake", "valid")


JPEG = encode(noise(0, 12, 10), "JPEG")
ZOO = {
    "train/dog/b.jpg": JPEG,
    "train/dog/a.jpg": encode(noise(1, 12, 10), "JPEG"),
    "train/Cat/1.JPEG": JPEG,
    "train/Cat/2.JPG": JPEG,
    "train/Cat/3.PnG": encode(noise(2, 12, 10), "PNG"),
    "train/ant/x.png": encode(noise(3, 12, 10), "PNG"),
    "val/ant/x.png": encode(noise(4, 12, 10), "PNG"),
    "val/Cat/1.jpg": JPEG,
    "val/dog/1.jpg": JPEG,
    # None of these is an image, a class or a split.
    "train/dog/.hidden.jpg": JPEG,
    "train/dog/._b.jpg": b"what macOS leaves on foreign disks",
    "train/dog/notes.txt": b"good dogs",
    "train/dog/Thumbs.db": b"what Windows leaves",
    "train/.cache/x.jpg": JPEG,
    "train/classes.txt": b"",
    ".git/config/x.jpg": JPEG,
    "README.md": b"",
}


def test_a_folder_gives_its_images_by_class_in_alphabetical_order(tmp_path):
    source = open_source(write_folder(tmp_path, ZOO), "train")
    # As Python sorts, capitals first; torchvision's ImageFolder does the same.
    assert source.classes == ("Cat", "ant", "dog")
    expected = [
        ("Cat/1.JPEG", 0),
        ("Cat/2.JPG", 0),
        ("Cat/3.PnG", 0),
        ("ant/x.png", 1),
        ("dog/a.jpg", 2),
        ("dog/b.jpg", 2),
    ]
    assert len(source) == len(expected)
    for index, (name, label) in enumerate(expected):
        assert source[index] == (ZOO[f"train/{name}"], label)
        assert source.name(index) == str(tmp_path / "train" / name)


def test_both_splits_of_a_folder_number_the_classes_alike(tmp_path):
    where = write_folder(tmp_path, ZOO)
    train, val = open_source(where, "train"), open_source(where, "val")
    assert train.classes == val.classes
    check_same_classes(train, val)


def test_linked_classes_count(tmp_path):
    write_folder(tmp_path / "elsewhere", {"dog/1.jpg": JPEG})
    where = write_folder(tmp_path / "data", {"train/cat/1.jpg": JPEG})
    (tmp_path / "data/train/dog").symlink_to(tmp_path / "elsewhere/dog")
    source = open_source(where, "train")
    assert source.classes == ("cat", "dog")
    assert source[1] == (JPEG, 1)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_suffix_stands_for_a_format_that_is_decoded(suffix, tmp_path):
    path = tmp_path / "train" / "cat" / f"1{suffix}"
    path.parent.mkdir(parents=True)
    image = noise(0, 12, 10)
    (image.convert("L") if suffix == ".pgm" else image).save(path)
    content, label = open_source(f"folder:{tmp_path}", "train")[0]
    assert Picture(content, 3).size == (12, 10)
    assert label == 0


def test_a_folder_under_the_home_directory_is_found(tmp_path, monkeypatch):
    write_folder(tmp_path / "pets", ZOO)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_source("folder:~/pets", "train")) == 6


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(UserError, match=f"no folder {tmp_path}/nowhere"):
        open_source(f"folder:{tmp_path}/nowhere", "train")


def test_an_unknown_split_of_a_folder_is_told_with_the_nearest(tmp_path):
    where = write_folder(tmp_path, ZOO)
    with pytest.raises(UserError, match=r"'vall'\. Did you mean val"):
        open_source(where, "vall")
    # Hidden folders are not offered.
    with pytest.raises(UserError, match=r"'zzz'\. Known: train, val"):
        open_source(where, "zzz")


@pytest.mark.parametrize(
    "files",
    [
        {"README.md": b""},
        {"train/README.md": b""},
        {"train/1.jpg": JPEG},
        {".hidden/cat/1.jpg": JPEG},
    ],
)
def test_a_folder_without_images_is_told_how_it_should_look(files, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/SPLIT/CLASS/IMAGE.jpg"):
        open_source(write_folder(tmp_path, files), "train")


def test_a_class_without_images_is_named(tmp_path):
    where = write_folder(tmp_path, ZOO | {"train/emu/notes.txt": b""})
    with pytest.raises(UserError, match=f"{tmp_path}/train/emu holds no images"):
        open_source(where, "train")


@pytest.mark.parametrize("richer, poorer", [("train", "val"), ("val", "train")])
def test_a_class_that_one_split_lacks_is_named(richer, poorer, tmp_path):
    where = write_folder(tmp_path, ZOO | {f"{richer}/bee/1.jpg": JPEG})
    train, val = open_source(where, "train"), open_source(where, "val")
    with pytest.raises(UserError) as raised:
        check_same_classes(train, val)
    message = str(raised.value)
    assert "'bee'" in message
    assert f"in {tmp_path}/{richer} but not in {tmp_path}/{poorer}" in message


COUNTS = {"train": 10, "test": 4}
CLASSES = ("ant", "bee", "cat")


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """A data set of tfds, prepared without TensorFlow as ArrayRecord."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = tuple(
        tfds.core.BuilderConfig(name=name)
        for name in ("jpeg", "png", "unlabelled", "numbers")
    )

    def _info(self):
        config = self.builder_config.name
        encoding = "png" if config == "png" else "jpeg"
        label = tfds.features.ClassLabel(names=CLASSES)
        if config == "numbers":
            label = tfds.features.Scalar(np.int64)
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(None, None, 3), encoding_format=encoding
                    ),
                    "label": label,
                }
            ),
            supervised_keys=None if config == "unlabelled" else ("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in COUNTS}

    def _generate_examples(self, split):
        for index in range(COUNTS[split]):
            kind = "PNG" if self.builder_config.name == "png" else "JPEG"
            file = io.BytesIO(tfds_image(split, index, kind))
            yield index, {"image": file, "label": index % 3}


def tfds_image(split: str, index: int, kind: str = "JPEG") -> bytes:
    """A grey level for each image, so that it is known again."""
    level = 10 * index + (5 if split == "test" else 0)
    return encode(Image.new("RGB", (20, 10 + index), (level, level, level)), kind)


def prepare(data_dir: pathlib.Path, config: str) -> pathlib.Path:
    builder = TinyPictures(config=config, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    """Where the data set is prepared, but for the config `png`."""
    directory = tmp_path_factory.mktemp("tfds")
    for config in ("jpeg", "unlabelled", "numbers"):
        prepare(directory, config)
    return str(directory)


NAME = "tfds:tiny_pictures"


def levels(source) -> dict[int, int]:
    """Grey level and label of every image."""
    found = {}
    for index in range(len(source)):
        image, label = source[index]
        level = Picture(image, 3).pixels()[0, 0, 0].item()
        found[level] = label
    return found


def test_a_tfds_split_gives_every_image_undecoded_with_its_label(data_dir):
    source = open_source(NAME, "train", data_dir=data_dir)
    assert len(source) == 10
    assert source.classes == CLASSES
    files = {tfds_image("train", index): index % 3 for index in range(10)}
    # The very bytes that were put in: nobody decoded and encoded them again.
    assert dict(source[index] for index in range(10)) == files
    assert source.name(3) == "tfds:tiny_pictures/train[3]"


def test_the_splits_of_tfds_have_different_images(data_dir):
    test = open_source(NAME, "test", data_dir=data_dir)
    assert levels(test) == {5: 0, 15: 1, 25: 2, 35: 0}


@pytest.mark.parametrize(
    "split, size",
    [
        ("train[:50%]", 5),
        ("train[50%:]", 5),
        ("train[2:5]", 3),
        ("train[-1:]", 1),
        ("train+test", 14),
        ("test+train[:30%]", 7),
        ("train[:3] + train[7:]", 6),
        ("all", 14),
    ],
)
def test_tfdss_slices_are_understood(split, size, data_dir):
    source = open_source(NAME, split, data_dir=data_dir)
    assert len(source) == len(levels(source)) == size


def test_two_slices_of_tfds_make_the_whole(data_dir):
    halves = [
        levels(open_source(NAME, split, data_dir=data_dir))
        for split in ("train[:50%]", "train[50%:]")
    ]
    whole = levels(open_source(NAME, "train", data_dir=data_dir))
    assert not set(halves[0]) & set(halves[1])
    assert halves[0] | halves[1] == whole


def test_a_config_and_a_version_of_tfds_can_be_chosen(tmp_path):
    prepare(tmp_path, "png")
    for name in ("/png", "/png:1.0.0"):
        source = open_source(NAME + name, "test", data_dir=str(tmp_path))
        assert levels(source) == {5: 0, 15: 1, 25: 2, 35: 0}
        assert source[0][0].startswith(b"\x89PNG")


def test_a_tfds_source_pickles_small_and_opens_again(data_dir):
    source = open_source(NAME, "train[:50%]", data_dir=data_dir)
    assert levels(source)
    pickled = pickle.dumps(source)
    # Names only, since every worker process gets a copy.
    assert len(pickled) < 1000
    assert levels(pickle.loads(pickled)) == levels(source)


@pytest.mark.parametrize(
    "dataset, split, message",
    [
        ("tiny_picture", "train", "no data set 'tiny_picture'. Did you mean tiny_pi"),
        ("cifar-10", "train", "'cifar-10'. Did you mean cifar10"),
        ("tiny_pictures/jpg", "train", "tiny_pictures/jpg: .*jpg not found"),
        ("tiny_pictures:9.0.0", "train", "version 9.0.0, only: 1.0.0"),
        ("tiny_pictures", "trian", "no split 'trian'. Did you mean train"),
        ("tiny_pictures", "trian[:50%]", "no split 'trian'. Did you mean train"),
        ("tiny_pictures", "train+tets", "no split 'tets'. Did you mean test"),
        ("tiny_pictures", "train[:50", "split 'train.:50'"),
        ("tiny_pictures", "train[20:]", "20:10.* 10 examples"),
        ("tiny_pictures", "", "no split ''. Known: train, test, all"),
        ("tiny_pictures/unlabelled", "train", "does not map an image to a class"),
        ("tiny_pictures/numbers", "train", "does not map an image to a class"),
    ],
)
def test_a_mistake_about_tfds_is_told_in_one_line(dataset, split, message, data_dir):
    with pytest.raises(UserError, match=message) as raised:
        open_source(f"tfds:{dataset}", split, data_dir=data_dir)
    assert "\n" not in str(raised.value)
    assert "builder_kwargs" not in str(raised.value)


def test_a_data_set_that_is_not_prepared_is_told_the_command(data_dir):
    command = f"python -m resnet_jax.prepare {NAME}/png --data_dir={data_dir}"
    with pytest.raises(UserError) as raised:
        open_source(f"{NAME}/png", "train", data_dir=data_dir)
    assert f"`{command}`" in str(raised.value)


def test_the_command_has_no_data_dir_where_none_was_given(tmp_path, monkeypatch):
    # Not the data sets of whoever runs the tests.
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(UserError) as raised:
        open_source("tfds:cifar10", "train")
    assert f"not prepared in {tmp_path}" in str(raised.value)
    assert "`python -m resnet_jax.prepare tfds:cifar10`" in str(raised.value)


def test_a_data_set_that_is_not_arrayrecord_is_told_the_command(tmp_path):
    # TFRecord cannot be written without TensorFlow; where tfds looks is the metadata.
    directory = prepare(tmp_path, "jpeg")
    path = directory / "dataset_info.json"
    info = json.loads(path.read_text()) | {"fileFormat": "tfrecord"}
    path.write_text(json.dumps(info))
    for records in directory.glob("*.array_record*"):
        records.rename(str(records).replace(".array_record", ".tfrecord"))
    with pytest.raises(UserError) as raised:
        open_source(NAME, "train", data_dir=str(tmp_path))
    message = str(raised.value)
    assert f"{directory} is not ArrayRecord" in message
    assert f"`python -m resnet_jax.prepare convert {directory}`" in message


READ = """
import sys

from resnet_jax.data.augment import Augment
from resnet_jax.data.loader import Examples, eval_batches
from resnet_jax.data.sources import open_source

source = open_source(sys.argv[1], "train", data_dir=sys.argv[2])
augment = Augment(size=8)
examples = Examples(source=source, augment=augment, channels=3, skip_bad=False)
with eval_batches(examples, batch_size=4) as batches:
    print(sum(int(batch["mask"].sum()) for batch in batches), "images")
"""


def test_reading_tfds_neither_imports_tensorflow_nor_uses_a_device(data_dir, tmp_path):
    trap = tmp_path / "tensorflow" / "__init__.py"
    trap.parent.mkdir()
    trap.write_text("print('imports TensorFlow')\nraise ImportError")
    environment = {
        "PYTHONPATH": str(tmp_path),
        # Whoever asks jax for a device finds none.
        "JAX_PLATFORMS": "none_that_exists",
    }
    # In a process that knows nothing of the builder, as worker processes are.
    run = subprocess.run(
        [sys.executable, "-c", READ, NAME, data_dir],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stdout) == (0, "10 images\n"), run.stderr
