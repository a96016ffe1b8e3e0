"""Data sets of tfds: every image with its label, errors, and the cost of opening."""

import dataclasses
import json
import os
import pathlib
import pickle
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from resnet_jax.data.prepare import pack
from resnet_jax.data.sources import open_source
from resnet_jax.errors import UserError
from resnet_jax.prepare import main
from tests.helpers.pictures import encode, noise, write_folder
from tests.helpers.tiny_pictures import CLASSES, levels, prepare, tfds_image

ROOT = pathlib.Path(__file__).parents[2]
NAME = "tfds:tiny_pictures"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    """The data_dir of the prepared data set, which lacks the config `png`."""
    directory = tmp_path_factory.mktemp("tfds")
    for config in ("jpeg", "unlabelled", "numbers"):
        prepare(directory, config)
    return str(directory)


def test_a_tfds_split_gives_every_image_undecoded_with_its_label(data_dir):
    source = open_source(NAME, "train", data_dir=data_dir)
    assert len(source) == 10
    assert source.classes == CLASSES
    files = {tfds_image("train", index): index % 3 for index in range(10)}
    # The bytes are those that were put in, neither decoded nor encoded again.
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
def test_slices_in_the_syntax_of_tfds_are_understood(split, size, data_dir):
    source = open_source(NAME, split, data_dir=data_dir)
    assert len(source) == len(levels(source)) == size


def test_two_slices_of_tfds_make_the_complete_split(data_dir):
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
    # It pickles its arguments alone, since every worker process gets a copy.
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
        ("tiny_pictures", "train[:50", "split 'train.:50' of tfds"),
        ("tiny_pictures", "train[20:]", "has 10 images; its bounds"),
        ("tiny_pictures", "", "no split ''. Known: train, test"),
        ("tiny_pictures/unlabelled", "train", "does not map an image to a class"),
        ("tiny_pictures/numbers", "train", "does not map an image to a class"),
    ],
)
def test_a_mistake_about_tfds_is_reported_in_one_line(
    dataset, split, message, data_dir
):
    with pytest.raises(UserError, match=message) as raised:
        open_source(f"tfds:{dataset}", split, data_dir=data_dir)
    assert "\n" not in str(raised.value)
    assert "builder_kwargs" not in str(raised.value)


def test_a_data_set_that_is_not_prepared_is_reported_with_the_command(data_dir):
    command = f"python -m resnet_jax.prepare {NAME}/png --data_dir={data_dir}"
    with pytest.raises(UserError) as raised:
        open_source(f"{NAME}/png", "train", data_dir=data_dir)
    assert f"`{command}`" in str(raised.value)


def test_the_command_has_no_data_dir_if_none_was_given(tmp_path, monkeypatch):
    # Otherwise it would find the data sets of whoever runs the tests.
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(UserError) as raised:
        open_source("tfds:cifar10", "train")
    assert f"not prepared in {tmp_path}" in str(raised.value)
    assert "`python -m resnet_jax.prepare tfds:cifar10`" in str(raised.value)


def test_a_data_set_that_is_not_arrayrecord_is_reported_with_the_command(tmp_path):
    # Writing TFRecords needs TensorFlow, but tfds reads the format from the metadata.
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


def cut(path: pathlib.Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def make_directory(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        make_directory,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"[]"),
        lambda path: path.write_bytes(b"\xff\xfe\x00"),
    ],
)
@pytest.mark.parametrize(
    "name",
    ["dataset_info.json", "features.json", "label.labels.txt", "prepared.json"],
)
def test_damaged_metadata_are_reported_in_one_line(name, damage, tmp_path):
    folder = write_folder(
        tmp_path / "in",
        {f"train/{c}/1.png": encode(noise(0, 8, 8), "PNG") for c in "ab"},
    )
    out = tmp_path / "out"
    main(["prepare", folder, f"--out={out}", "--num_workers=1"])
    wanted = (out / name).read_bytes()
    damage(out / name)
    for read in (
        lambda: open_source(f"tfds:{out}", "train"),
        lambda: main(["prepare", "verify", str(out)]),
    ):
        with pytest.raises(UserError, match=str(out)) as raised:
            read()
        assert "\n" not in str(raised.value)
    if damage != make_directory and name != "prepared.json":
        # The command that made the data set repairs it.
        main(["prepare", folder, f"--out={out}", "--num_workers=1"])
        assert (out / name).read_bytes() == wanted
        assert len(open_source(f"tfds:{out}", "train")) == 2


def test_a_builder_with_damaged_metadata_is_reported_in_one_line(tmp_path):
    directory = prepare(tmp_path, "jpeg")
    (directory / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"tfds:tiny_pictures/jpeg: .* JSON"):
        open_source(f"{NAME}/jpeg", "train", data_dir=str(tmp_path))


def test_class_names_that_were_torn_at_a_line_end_are_reported(tmp_path):
    directory = prepare(tmp_path, "jpeg")
    path = directory / "label.labels.txt"
    path.write_text(path.read_text().replace("\n", "\n\nand\n", 1))
    with pytest.raises(UserError, match=r"labels.txt has 4 lines, but there are 3 cla"):
        open_source(f"tfds:{directory}", "train")


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
        # jax raises an error if it is asked for a device.
        "JAX_PLATFORMS": "none_that_exists",
    }
    # In a process that does not know the builder, as worker processes do not.
    run = subprocess.run(
        [sys.executable, "-c", READ, NAME, data_dir],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stdout) == (0, "10 images\n"), run.stderr


# Opening a data set with the size of ImageNet.

IMAGES, SHARDS = 1_281_167, 1024
OPEN = """
import json, sys, time
import psutil
from resnet_jax.data.sources import open_source
open_source("digits", "train")  # Imports the modules that every source needs.
memory = psutil.Process().memory_info().rss
started = time.perf_counter()
source = open_source(sys.argv[1], "train")
_, label = source[len(source) - 1]
seconds = time.perf_counter() - started
more = psutil.Process().memory_info().rss - memory
figures = {"images": len(source), "label": label}
figures |= {"seconds": seconds, "megabytes": more / 1e6}
print(json.dumps(figures))
"""


@dataclasses.dataclass(frozen=True)
class SamePicture:
    """A shard that holds one picture many times."""

    length: int
    num_bytes: int = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        example = tf_example_pb2.Example()
        features = example.features.feature
        features["image"].bytes_list.value.append(encode(noise(0, 8, 8), "PNG"))
        features["label"].int64_list.value.append(3)
        features["file_name"].bytes_list.value.append(b"picture.png")
        record = example.SerializeToString()
        return iter([record] * self.length)


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> dict[str, float]:
    """Figures of a process that opens a data set with the size of ImageNet."""
    tmp_path = tmp_path_factory.mktemp("many")
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
    )
    lengths = [len(range(first, IMAGES, SHARDS)) for first in range(SHARDS)]
    data = pack.DataSet(
        name="many",
        version="1.0.0",
        features=features,
        splits={"train": [SamePicture(length) for length in lengths]},
        about={"supervised_keys": ("image", "label")},
    )
    pack.pack(data, tmp_path / "many", command="this test", workers=1)
    done = subprocess.run(
        [sys.executable, "-c", OPEN, f"tfds:{tmp_path / 'many'}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.long
def test_opening_a_million_images_takes_300_megabytes(opened):
    assert (opened["images"], opened["label"]) == (IMAGES, 3)
    # 52 MB were measured.
    assert opened["megabytes"] < 300


@pytest.mark.long
def test_opening_a_million_images_takes_two_seconds(opened):
    # 0.9 s were measured, half of it imports, and 2.4 s beside four busy processes.
    assert opened["seconds"] < 2
