"""Preparing data sets from every kind of source, and the errors of each."""

import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import shutil
import signal
import struct
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from resnet_jax.data.decode import Picture
from resnet_jax.data.prepare.builders import advice_on
from resnet_jax.data.prepare.originals import IMAGENET, Tar
from resnet_jax.data.shards import read_shard
from resnet_jax.data.sources import open_source
from resnet_jax.errors import UserError
from resnet_jax.prepare import main
from tests.helpers import runs
from tests.helpers.pictures import encode, noise, write_folder
from tests.helpers.real_data import real_data
from tests.helpers.tiny_pictures import TinyPictures, levels, prepare, tfds_image


def run(*arguments: object, **options: object) -> None:
    """Runs the command in this process; `options` are fields of `Options`."""
    main(["prepare", *map(str, arguments), "--num_workers=1"], **options)


def contents(source) -> dict[bytes, int]:
    """Returns every image of a source with its label."""
    return dict(source[index] for index in range(len(source)))


def snapshot(directory: pathlib.Path) -> dict[str, bytes]:
    """Returns every file of a prepared directory but the one with the command."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "prepared.json"
    }


# ImageNet


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def tar_of(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            add(archive, name, content)
    return stream.getvalue()


SYNSETS = ("n01440764", "n02119789", "n15075141")
TRAIN = {
    f"{synset}_{index}.JPEG": encode(noise(10 * number + index, 40, 30), "JPEG")
    for number, synset in enumerate(SYNSETS)
    for index in range(4)
}
VAL = {
    f"ILSVRC2012_val_{index:08d}.JPEG": encode(noise(99 + index, 40, 30), "JPEG")
    for index in (1, 2, 3, 50_000)
}


@dataclasses.dataclass(frozen=True)
class SmallImageNet:
    """Two tar files like those of ImageNet, with a few images.

    Attributes:
      directory: The directory of the tar files.
      known: The names, sizes and numbers of images that are expected.
    """

    directory: pathlib.Path
    known: dict[str, Tar]

    @property
    def root(self) -> pathlib.Path:
        """The directory in which tests write."""
        return self.directory.parent

    def path(self, split: str) -> pathlib.Path:
        """Returns the path of the tar file of a split."""
        return self.directory / self.known[split].name

    def prepare(self, *flags: str) -> pathlib.Path:
        """Runs the command and returns its data_dir."""
        run(
            *("imagenet2012", f"--manual_dir={self.directory}"),
            *(f"--data_dir={self.root / 'data'}", *flags),
            imagenet_tars=self.known,
        )
        return self.root / "data"


@pytest.fixture
def imagenet(tmp_path) -> SmallImageNet:
    directory = tmp_path / "tars"
    directory.mkdir()
    inner = {
        f"{synset}.tar": tar_of(
            {name: image for name, image in TRAIN.items() if name.startswith(synset)}
        )
        for synset in SYNSETS
    }
    known = {}
    for split, name, files, count in (
        ("train", "ILSVRC2012_img_train.tar", inner, len(TRAIN)),
        ("validation", "ILSVRC2012_img_val.tar", VAL, len(VAL)),
    ):
        content = tar_of(files)
        (directory / name).write_bytes(content)
        known[split] = Tar(name, len(content), count)
    return SmallImageNet(directory, known)


def test_the_archives_of_imagenet_have_known_sizes_and_numbers_of_images():
    train, validation = IMAGENET["train"], IMAGENET["validation"]
    assert (train.size, train.images) == (147_897_477_120, 1_281_167)
    assert (validation.size, validation.images) == (6_744_924_160, 50_000)


def test_imagenet_opens_as_the_builder_of_tfds_has_it(imagenet, capsys):
    data_dir = imagenet.prepare()
    assert "train 12, validation 4 images" in capsys.readouterr().out
    builder = tfds.builder("imagenet2012", data_dir=data_dir)
    names = builder.info.features["label"]
    for split, files in (("train", TRAIN), ("validation", VAL)):
        source = open_source("tfds:imagenet2012", split, data_dir=str(data_dir))
        assert len(source.classes) == 1000
        # The bytes are those of the files in the tar files.
        assert contents(source).keys() == set(files.values())
        for example in builder.as_data_source(
            split, decoders={"image": tfds.decode.SkipDecoding()}
        ):
            file_name = example["file_name"].decode()
            assert files[file_name] == example["image"]
            if split == "train":
                synset = file_name.split("_")[0]
                assert names.int2str(int(example["label"])) == synset
    # The published labels of the first three images of the validation set.
    truth = {image: name for name, image in VAL.items()}
    labels = {truth[image]: label for image, label in contents(source).items()}
    for number, synset in enumerate(("n01751748", "n09193705", "n02105855"), start=1):
        label = labels[f"ILSVRC2012_val_{number:08d}.JPEG"]
        assert names.int2str(label) == synset


KILLED = """
import os, signal, sys
from resnet_jax import prepare
from resnet_jax.data.prepare import pack
from resnet_jax.data.prepare.originals import Tar

def read(file, read=pack._read, count=iter(range(10**9))):
    if next(count) == {reads}:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(file)

pack._read = read
prepare.main(["prepare", *sys.argv[1:]], imagenet_tars={tars}, shard_bytes=3000)
"""


def test_a_killed_preparation_of_imagenet_resumes_and_ends_with_the_same_bytes(
    imagenet,
):
    root = imagenet.root

    def run_until(reads: int, data_dir: str) -> tuple[int, str]:
        return runs.run_python(
            "-c",
            KILLED.format(reads=reads, tars=imagenet.known),
            "imagenet2012",
            f"--manual_dir={imagenet.directory}",
            f"--data_dir={root / data_dir}",
            "--num_workers=1",
        )

    code, output = run_until(len(TRAIN) // 2, "data")
    assert code == -signal.SIGKILL
    assert output.count("Looking for images") == 2
    assert not (root / "data/imagenet2012/5.1.0").exists()
    done = len(list(root.glob("data/imagenet2012/*.incomplete/*array_record*")))
    assert done >= 2
    # Of the 16 images, those of finished shards (two each) are not read again, nor are
    # the headers of the tar files.
    code, output = run_until(16 - 2 * done + 1, "data")
    assert code == 0, output
    assert "Looking for images" not in output

    code, output = run_until(10**6, "whole")
    assert code == 0, output
    whole = snapshot(root / "whole/imagenet2012")
    assert snapshot(root / "data/imagenet2012") == whole
    assert sum("array_record" in name for name in whole) == 8


def test_images_that_tfds_converts_to_rgb_jpegs_are_converted(imagenet):
    names = ["n01739381_1309.JPEG", "n02105855_2933.JPEG"]
    picture = Image.new("RGB", (40, 30), (200, 100, 50))
    files = {
        names[0]: encode(picture.convert("CMYK"), "JPEG", quality=100),
        names[1]: encode(picture, "PNG"),
    }
    content = tar_of(
        {f"{name.split('_')[0]}.tar": tar_of({name: files[name]}) for name in names}
    )
    path = imagenet.path("train")
    path.write_bytes(content)
    imagenet.known["train"] = Tar(path.name, len(content), 2)
    data_dir = imagenet.prepare()
    source = open_source("tfds:imagenet2012", "train", data_dir=str(data_dir))
    for image, _ in (source[0], source[1]):
        decoded = Image.open(io.BytesIO(image))
        assert (decoded.format, decoded.mode) == ("JPEG", "RGB")
        # The colours were rounded to CMYK, and by two JPEGs.
        assert np.abs(np.asarray(decoded) - np.array([200, 100, 50])).max() <= 4


def test_a_missing_tar_is_reported_with_its_size_and_its_web_page(imagenet):
    imagenet.path("validation").unlink()
    with pytest.raises(UserError) as raised:
        imagenet.prepare()
    size = f"{imagenet.known['validation'].size:,}"
    assert f"ILSVRC2012_img_val.tar ({size} bytes) is not in" in str(raised.value)
    assert "https://image-net.org" in str(raised.value)
    assert "--manual_dir=DIRECTORY" in str(raised.value)


def test_a_tar_of_another_size_is_reported_before_anything_is_written(imagenet):
    path = imagenet.path("train")
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"train\.tar has .* bytes, not .* not finish"):
        imagenet.prepare()
    assert not (imagenet.root / "data" / "imagenet2012" / "5.1.0").exists()


def test_a_tar_with_other_images_is_reported_before_anything_is_written(imagenet):
    imagenet.known["train"] = dataclasses.replace(imagenet.known["train"], images=13)
    with pytest.raises(UserError, match="holds 12 images, not 13"):
        imagenet.prepare()
    assert not list(imagenet.root.glob("data/**/*array_record*"))


@pytest.mark.parametrize(
    ("split", "name"),
    [
        *(
            ("train", "n99999999_1.JPEG"),
            ("train", "notes.txt"),
            ("train", "._n01440764"),
        ),
        *(("validation", "ILSVRC2012_val_00000000.JPEG"), ("validation", "notes.txt")),
        ("validation", "ILSVRC2012_val_00050001.JPEG"),
    ],
)
def test_a_tar_with_something_else_is_reported(split, name, imagenet):
    path = imagenet.path(split)
    content = tar_of({name: b"?"})
    path.write_bytes(content)
    imagenet.known[split] = Tar(path.name, len(content), 1)
    with pytest.raises(UserError, match=f"holds '{name}', which is not an image"):
        imagenet.prepare()


def test_a_file_that_is_not_a_tar_is_reported(imagenet):
    path = imagenet.path("validation")
    path.write_bytes(b"?" * path.stat().st_size)
    with pytest.raises(UserError, match=r"val\.tar is damaged: .*; fetch it again"):
        imagenet.prepare()


def test_a_data_set_that_tfds_prepared_is_not_overwritten(imagenet):
    directory = imagenet.root / "data" / "imagenet2012" / "5.1.0"
    directory.mkdir(parents=True)
    info = '{"name": "imagenet2012", "version": "5.1.0"}'
    (directory / "dataset_info.json").write_text(info)
    with pytest.raises(UserError, match=f"prepare convert {directory}"):
        imagenet.prepare()
    assert (directory / "dataset_info.json").read_text() == info


# Re-encoding


def test_a_reencoded_data_set_has_small_images_and_a_note(imagenet, capsys):
    data_dir = imagenet.prepare("--max_side=20", "--quality=80")
    name = "imagenet2012_max20_q80"
    assert f"{data_dir}/{name}" in capsys.readouterr().out
    source = open_source(f"tfds:{name}", "train", data_dir=str(data_dir))
    assert source.title == (
        f"tfds:{name}/train (re-encoded: longer side at most 20 px, JPEG quality 80)"
    )
    for index in range(len(source)):
        image = Image.open(io.BytesIO(source[index][0]))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (20, 15))
        # 4:2:0 subsampling.
        assert image.layer[0][1:3] == (2, 2)


def test_reencoding_turns_upright_keeps_grey_and_never_enlarges(tmp_path):
    exif = Image.Exif()
    # An orientation that turns the image by 90 degrees.
    exif[0x0112] = 6
    wide = noise(0, 40, 20)
    source = write_folder(
        tmp_path / "in",
        {
            "train/a/turned.jpg": encode(wide, "JPEG", exif=exif),
            "train/b/small.png": encode(noise(1, 9, 7), "PNG"),
            "train/c/grey.png": encode(noise(2, 90, 3).convert("L"), "PNG"),
        },
    )
    run(source, "--max_side=30", f"--out={tmp_path / 'out'}")
    packed = open_source(f"tfds:{tmp_path / 'out'}", "train")
    sizes = {
        label: Picture(image, 3).size
        for image, label in map(packed.__getitem__, range(3))
    }
    assert sizes == {0: (15, 30), 1: (9, 7), 2: (30, 1)}


def test_reencoding_looks_like_the_original(tmp_path):
    archive = real_data("imagenet-samples.zip")
    shutil.unpack_archive(archive, tmp_path, "zip")
    names = sorted((tmp_path / "imagenet-samples").glob("*.JPEG"))[:4]
    files = {f"train/{i}/x.jpg": path.read_bytes() for i, path in enumerate(names)}
    run(write_folder(tmp_path / "in", files), "--max_side=400")
    packed = open_source(f"tfds:{tmp_path / 'in_max400_q90'}", "train")
    for image, label in map(packed.__getitem__, range(len(packed))):
        original = Image.open(io.BytesIO(files[f"train/{label}/x.jpg"])).convert("RGB")
        small = Image.open(io.BytesIO(image))
        assert max(small.size) == min(400, max(original.size))
        wanted = original.resize(small.size, Image.Resampling.LANCZOS)
        # Only brightness is compared, as 4:2:0 halves the resolution of the colours.
        # JPEG quality 90 costs a few of 255 levels.
        greys = [np.asarray(image.convert("L"), float) for image in (small, wanted)]
        assert np.abs(greys[0] - greys[1]).mean() < 4


def test_an_image_that_cannot_be_decoded_is_reported_and_kept(tmp_path, capsys):
    broken = encode(noise(0, 64, 48), "JPEG")[:700]
    files = {"train/a/1.jpg": broken, "train/b/2.jpg": encode(noise(1, 64, 48), "JPEG")}
    run(write_folder(tmp_path / "in", files), "--quality=50")
    output = capsys.readouterr().out
    assert "truncated" in output
    assert "It is kept as it is." in output
    packed = open_source(f"tfds:{tmp_path / 'in_q50'}", "train")
    assert broken in contents(packed)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--quality=101", "from 1 to 100"),
        ("--quality=-1", "from 1 to 100"),
        ("--max_side=-4", "not a whole number of at least 0"),
    ],
)
def test_impossible_sizes_and_qualities_are_reported(flag, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(f"folder:{tmp_path}", flag)


# Folders

FOLDER = {
    f"{split}/{name}/{index}.jpg": encode(noise(index + 10 * k, 30, 20), "JPEG")
    for k, (split, name) in enumerate(
        [("train", "cat"), ("train", "dog"), ("val", "cat"), ("val", "dog")]
    )
    for index in range(5)
}


# Names as the file system has them, which need not be UTF-8.
LATIN = os.fsdecode(b"\xff")


@pytest.mark.parametrize(
    "name",
    [
        *("all", "a b", "a+b", "train[1]", "v1.2", "-", "_", " train", "train\n"),
        # An e with a combining accent.
        *("e\u0301t\u00e9", "{SPLIT}", "train,val", LATIN),
    ],
)
def test_a_split_that_tfds_could_not_open_is_reported_before_anything_is_written(
    name, tmp_path
):
    files = {f"{split}/cat/1.jpg": b"" for split in ("train", name)}
    folder = write_folder(tmp_path / "in", files)
    with pytest.raises(UserError) as raised:
        run(folder)
    assert f"a split {name!r}, which tfds cannot open" in str(raised.value)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(
    "name", ["2012", "val-1", "_a", "\u00e9t\u00e9", "train2", "ALL"]
)
def test_a_split_of_any_other_name_is_packed_and_opened(name, tmp_path):
    folder = write_folder(
        tmp_path / "in", {f"{name}/cat/1.jpg": FOLDER["val/cat/1.jpg"]}
    )
    run(folder)
    for split in (name, f"{name}[:100%]", "all"):
        packed = open_source(f"tfds:{tmp_path}/in_arrayrecord", split)
        assert contents(packed) == {FOLDER["val/cat/1.jpg"]: 0}


@pytest.mark.parametrize(
    "name",
    [
        *("a\nb", "a\rb", "\n", " dog", "dog ", "dog\t", "dog\u00a0", "dog\u2003"),
        *("dog\x85", "\x1cdog", " ", LATIN),
    ],
)
def test_a_class_that_tfds_would_rename_is_reported_before_anything_is_written(
    name, tmp_path
):
    folder = write_folder(tmp_path / "in", {f"train/{name}/1.jpg": b""})
    with pytest.raises(UserError) as raised:
        run(folder)
    message = f"a class {name!r}, whose name tfds would change"
    assert message in str(raised.value)
    assert os.listdir(tmp_path) == ["in"]


def test_classes_of_any_other_name_are_the_same_once_packed(tmp_path):
    # Among them are names that differ in case or in their Unicode form alone, and
    # what Python, but not tfds, takes for the end of a line.
    names = [
        *(
            "Cat",
            "cat",
            "10",
            "9",
            "-1",
            "a b",
            "a,b",
            "a+b",
            '"',
            "'",
            "\\n",
            "#",
            "%s",
        ),
        *(
            "\u00e9",
            "e\u0301",
            "\u732b",
            "a\u2028b",
            "a\x0bb",
            "a\x85b",
            "a\x1cb",
            "a\u00a0b",
        ),
    ]
    files = {
        f"{split}/{name}/{label}.jpg": encode(noise(label, 8, 8), "JPEG")
        for split in ("train", "val")
        for label, name in enumerate(names)
    }
    folder = write_folder(tmp_path / "in", files)
    run(folder)
    for split in ("train", "val"):
        packed = open_source(f"tfds:{tmp_path}/in_arrayrecord", split)
        source = open_source(folder, split)
        assert packed.classes == source.classes == tuple(sorted(names))
        assert contents(packed) == contents(source)


def test_a_name_that_is_not_utf8_is_reported(tmp_path):
    files = {f"train/cat/{LATIN}.jpg": FOLDER["val/cat/1.jpg"]}
    folder = write_folder(tmp_path / "in", files)
    with pytest.raises(UserError, match="is not UTF-8; rename it"):
        run(folder)
    assert os.listdir(tmp_path) == ["in"]


def test_a_folder_whose_path_is_not_utf8_is_packed_elsewhere(tmp_path):
    folder = write_folder(tmp_path / LATIN, FOLDER)
    with pytest.raises(UserError, match=r"udcff_arrayrecord' is not UTF-8.*; rename"):
        run(folder)
    run(folder, f"--out={tmp_path / 'out'}")
    packed = open_source(f"tfds:{tmp_path / 'out'}", "train")
    assert contents(packed) == contents(open_source(folder, "train"))
    shutil.copytree(tmp_path / "out", tmp_path / f"moved{LATIN}")
    with pytest.raises(UserError, match="is not UTF-8"):
        open_source(f"tfds:{tmp_path}/moved{LATIN}", "train")


def test_images_in_subfolders_and_of_all_formats_are_packed(tmp_path, capsys):
    more = {
        "train/cat/deep/er/a.jfif": encode(noise(90, 9, 9), "JPEG"),
        "train/dog/b.jp2": encode(noise(91, 9, 9), "JPEG2000"),
        "train/dog/c.avif": encode(noise(92, 9, 9), "AVIF"),
        "train/dog/d.jpg?resize=800": encode(noise(93, 9, 9), "JPEG"),
    }
    others = {"train/dog/e.jxl": b"", "train/dog/notes.txt": b"", "val/cat/f.jxl": b""}
    folder = write_folder(tmp_path / "in", FOLDER | more | others)
    run(folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        f"{tmp_path}/in/train: 2 files are left out (.jxl: 1, .txt: 1).",
        f"{tmp_path}/in/val: 1 file is left out (.jxl: 1).",
    ]
    packed = open_source(f"tfds:{tmp_path}/in_arrayrecord", "train")
    assert contents(packed) == contents(open_source(folder, "train"))
    assert len(packed) == 14


def test_a_packed_folder_gives_the_same_images_and_classes(tmp_path, capsys):
    folder = write_folder(tmp_path / "My pets!", FOLDER)
    run(folder)
    out = tmp_path / "My pets!_arrayrecord"
    assert f"--config.data.source=tfds:{out}" in capsys.readouterr().out
    for split in ("train", "val"):
        source, packed = open_source(folder, split), open_source(f"tfds:{out}", split)
        assert packed.classes == source.classes == ("cat", "dog")
        assert contents(packed) == contents(source)
        assert len(packed) == len(source) == 10


def test_a_part_of_a_packed_split_is_a_random_part(tmp_path):
    # As in data sets that tfds prepares. In the order of the folder, the first half
    # would be one class.
    files = {
        f"train/{name}/{index}.jpg": encode(noise(index, 8, 8), "JPEG")
        for name in ("cat", "dog")
        for index in range(50)
    }
    folder = write_folder(tmp_path / "in", files)
    run(folder, f"--out={tmp_path / 'out'}", shard_bytes=5000)
    part = open_source(f"tfds:{tmp_path / 'out'}", "train[:50%]")
    labels = [part[index][1] for index in range(len(part))]
    assert 10 < sum(labels) < 40


def test_a_directory_of_other_images_or_options_is_not_continued(tmp_path):
    folder = write_folder(tmp_path / "in", FOLDER)
    out = f"--out={tmp_path / 'out'}"
    run(folder, out)
    with pytest.raises(UserError, match="other images or with other options"):
        run(folder, out, "--quality=70")
    write_folder(tmp_path / "in", {"train/cat/new.jpg": FOLDER["val/cat/1.jpg"]})
    with pytest.raises(UserError, match="other images or with other options"):
        run(folder, out)
    # The directory is unchanged.
    assert len(open_source(f"tfds:{tmp_path / 'out'}", "train")) == 10


def test_splits_with_different_classes_are_reported(tmp_path):
    folder = write_folder(tmp_path / "in", FOLDER | {"val/emu/1.jpg": b""})
    with pytest.raises(UserError, match="'emu'"):
        run(folder)


# Data sets that tfds has prepared


def tfrecords_without_tensorflow(data_dir: pathlib.Path) -> pathlib.Path:
    """Writes a data set as TFRecord, with checksums of 0, which nobody reads."""
    directory = prepare(data_dir, "jpeg")
    for path in list(directory.glob("*array_record*")):
        records = b"".join(
            struct.pack("<QI", len(record), 0) + record + bytes(4)
            for record in read_shard(path)
        )
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(
            records
        )
        path.unlink()
    info = directory / "dataset_info.json"
    info.write_text(
        json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"})
    )
    return directory


def tfrecords_of_tensorflow(data_dir: pathlib.Path) -> pathlib.Path:
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("tfds writes TFRecords with TensorFlow, which is not installed")
    builder = TinyPictures(config="jpeg", data_dir=data_dir, file_format="tfrecord")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


@pytest.mark.parametrize(
    "write", [tfrecords_without_tensorflow, tfrecords_of_tensorflow]
)
def test_tfrecords_become_arrayrecord(write, tmp_path):
    directory = write(tmp_path)
    before = snapshot(directory)
    name = "tfds:tiny_pictures/jpeg"
    with pytest.raises(UserError, match=f"prepare convert {directory}"):
        open_source(name, "train", data_dir=str(tmp_path))
    with pytest.raises(UserError, match=f"prepare convert {directory}"):
        run(name, f"--data_dir={tmp_path}")
    run("convert", directory)
    # Nothing is left to do.
    run(name, f"--data_dir={tmp_path}")
    for split, count in (("train", 10), ("test", 4)):
        source = open_source(name, split, data_dir=str(tmp_path))
        files = {tfds_image(split, index): index % 3 for index in range(count)}
        assert contents(source) == files
    # The TFRecords are unchanged, and still the format that tfds reads by default.
    after = snapshot(directory)
    assert before.items() - after.items() == {
        ("dataset_info.json", before["dataset_info.json"])
    }
    info = tfds.builder_from_directory(directory).info
    assert info.file_format == tfds.core.FileFormat.TFRECORD


def test_a_damaged_shard_of_converted_tfrecords_is_converted_again(tmp_path):
    directory = tfrecords_without_tensorflow(tmp_path)
    run("convert", directory)
    before = snapshot(directory)
    shard = next(directory.glob("*train.array_record*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"rm -f {shard} && .*convert {directory}`"):
        open_source("tfds:tiny_pictures/jpeg", "train", data_dir=str(tmp_path))
    run("convert", directory)
    assert snapshot(directory) == before


def test_tfrecords_can_be_made_smaller_elsewhere(tmp_path):
    directory = tfrecords_without_tensorflow(tmp_path)
    before = snapshot(directory)
    run("convert", directory, "--max_side=12", f"--out={tmp_path / 'small'}")
    source = open_source(f"tfds:{tmp_path / 'small'}", "test")
    assert sorted(source[index][1] for index in range(4)) == [0, 0, 1, 2]
    assert {max(Picture(source[index][0], 3).size) for index in range(4)} == {12}
    assert snapshot(directory) == before


def test_a_truncated_tfrecord_is_named_and_nothing_looks_converted(tmp_path):
    directory = tfrecords_without_tensorflow(tmp_path)
    shard = next(directory.glob("*train.tfrecord*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{shard} is damaged"):
        run("convert", directory)
    shard.write_bytes(b"")
    with pytest.raises(UserError, match=f"{shard} holds 0 examples, not 10"):
        run("convert", directory)
    with pytest.raises(UserError, match="is not ArrayRecord"):
        open_source("tfds:tiny_pictures/jpeg", "train", data_dir=str(tmp_path))


def test_a_directory_that_cannot_be_converted_is_reported(tmp_path):
    run(write_folder(tmp_path / "in", FOLDER))
    with pytest.raises(UserError, match="is ArrayRecord already"):
        run("convert", f"{tmp_path}/in_arrayrecord")
    with pytest.raises(UserError, match="not a data set that tfds has prepared"):
        run("convert", tmp_path)


# Builders of tfds


def test_a_builder_of_tfds_is_prepared_and_made_smaller(tmp_path):
    run("tfds:tiny_pictures/png", f"--data_dir={tmp_path}", "--max_side=12")
    whole = open_source("tfds:tiny_pictures/png", "test", data_dir=str(tmp_path))
    small = open_source("tfds:tiny_pictures_max12_q90", "test", data_dir=str(tmp_path))
    assert levels(whole) == {5: 0, 15: 1, 25: 2, 35: 0}
    assert small[0][0].startswith(b"\xff\xd8")
    assert len(small) == 4


class Fetched(tfds.core.GeneratorBasedBuilder):
    """A data set of one small file on a server that does not exist."""

    URL = "http://resnet-jax.invalid/pictures.bin"
    VERSION = tfds.core.Version("1.0.0")

    @property
    def url_infos(self):
        info = tfds.core.download.checksums.UrlInfo(
            size=5, checksum=hashlib.sha256(b"right").hexdigest(), filename="p.bin"
        )
        return {self.URL: info}

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict({"name": tfds.features.Text()})
        )

    def _split_generators(self, dl_manager):
        path = dl_manager.download(self.URL)
        return {"train": [(0, {"name": path.read_text()})]}

    def _generate_examples(self):
        raise NotImplementedError


def test_without_a_network_the_file_to_fetch_is_named(tmp_path):
    with pytest.raises(UserError) as raised:
        run("tfds:fetched", f"--data_dir={tmp_path}")
    assert f"fetch {Fetched.URL}, put it into a directory" in str(raised.value)
    assert "--manual_dir=DIRECTORY" in str(raised.value)


def test_a_file_with_a_wrong_checksum_is_named(tmp_path):
    (tmp_path / "p.bin").write_bytes(b"wrong")
    with pytest.raises(UserError) as raised:
        run("tfds:fetched", f"--data_dir={tmp_path}", f"--manual_dir={tmp_path}")
    message = str(raised.value)
    assert f"{tmp_path}/p.bin is not the file that tfds knows" in message
    assert f"delete it, fetch {Fetched.URL} again" in message
    (tmp_path / "p.bin").write_bytes(b"right")
    run("tfds:fetched", f"--data_dir={tmp_path}", f"--manual_dir={tmp_path}")


def test_an_unknown_data_set_is_reported_with_the_nearest_name(tmp_path):
    with pytest.raises(UserError, match="fashion_mnist"):
        run("tfds:fashion_mnits", f"--data_dir={tmp_path}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pictures"], "Write imagenet2012, tfds:NAME"),
        (["folder:"], "Write imagenet2012, tfds:NAME"),
        (["folder:/nowhere/at/all"], "no folder /nowhere/at/all"),
        (["convert"], "convert needs a directory"),
        (["verify"], "verify needs a directory"),
        (["verify", "/nowhere/at/all"], "no prepared data set in /nowhere/at/all"),
        (["tfds:mnist", "--out=x"], "--data_dir=DIRECTORY"),
    ],
)
def test_wrong_arguments_are_reported_with_the_right_ones(arguments, message):
    with pytest.raises(UserError, match=message):
        run(*arguments)


@pytest.mark.parametrize(
    ("cause", "advice"),
    [
        (
            ModuleNotFoundError("No module named 'tensorflow'"),
            "pip install tensorflow,",
        ),
        (ConnectionError("no route to host"), "--manual_dir=DIRECTORY"),
        (FileNotFoundError("train.tar is missing"), "--manual_dir=DIRECTORY"),
        (ValueError("something new"), "ValueError: something new"),
    ],
)
def test_an_error_of_a_builder_is_reported_with_advice(cause, advice):
    error = RuntimeError("tfds failed")
    error.__cause__ = cause
    assert advice in advice_on(error)
