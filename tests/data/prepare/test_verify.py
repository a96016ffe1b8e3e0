"""Verifying names every problem of a data set, and the command that repairs it."""

import pathlib
import re

import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from resnet_jax.data.shards import OPTIONS, ArrayRecordWriter, read_shard
from resnet_jax.errors import UserError
from resnet_jax.prepare import main
from tests.helpers.breakages import flip_byte, truncate
from tests.helpers.oversized import files_that_claim
from tests.helpers.pictures import encode, noise, write_folder
from tests.helpers.tiny_pictures import prepare

JPEG = encode(noise(0, 64, 48), "JPEG")
PNG = encode(noise(1, 64, 48), "PNG")
GIF = encode(noise(2, 64, 48), "GIF")
GOOD = {f"good{index}": content for index, content in enumerate((JPEG, PNG, GIF))}
BROKEN = {
    "empty": b"",
    "a cut JPEG": JPEG[: len(JPEG) // 2],
    "a JPEG without its end": JPEG[:-2],
    "a head alone": JPEG[:20],
    "a cut PNG": PNG[: len(PNG) // 2],
    "a cut GIF": GIF[:200],
    "zeros": bytes(1000),
    "a page of a web server": b"<html><body>404 Not Found</body></html>",
    "text that calls itself a JPEG": b"\xff\xd8\xff" + b"text" * 50,
}


def verify(source: object, capsys, *flags: str) -> tuple[int, list[str]]:
    """Returns the exit code and the lines of the output."""
    capsys.readouterr()
    try:
        main(["prepare", "verify", str(source), "--num_workers=1", *flags])
    except UserError as error:
        lines = capsys.readouterr().out.splitlines()
        count = int(re.search(r" has ([\d,]+) problems?, listed", str(error)).group(1))
        assert count == len(lines)
        return 1, lines
    return 0, capsys.readouterr().out.splitlines()


@pytest.fixture
def files() -> dict[str, bytes]:
    named = {name.replace(" ", "_"): content for name, content in BROKEN.items()}
    return {
        f"train/{name}/1.jpg": content
        for name, content in sorted((GOOD | named).items())
    }


def pack(source: str, out: pathlib.Path) -> pathlib.Path:
    """Packs a folder and returns the shard of its training split."""
    main(["prepare", source, f"--out={out}", "--num_workers=1"])
    return next(out.glob("*train*"))


def test_every_broken_image_of_a_folder_is_named(files, tmp_path, capsys):
    code, lines = verify(write_folder(tmp_path / "in", files), capsys)
    assert code == 1
    named = {re.search(r"/train/(\w+)/1\.jpg: ", line).group(1) for line in lines}
    assert named == {name.replace(" ", "_") for name in BROKEN}


@pytest.mark.parametrize("packed", (False, True))
def test_an_image_beyond_the_limit_of_pixels_is_a_problem(tmp_path, capsys, packed):
    large = files_that_claim(30000)
    files = {
        f"train/{name}/1.jpg": content
        for name, content in (GOOD | {"huge": large["JPEG"]}).items()
    }
    source = write_folder(tmp_path / "in", files)
    if packed:
        pack(source, tmp_path / "out")
        source = tmp_path / "out"
    code, (line,) = verify(source, capsys)
    assert code == 1
    assert "huge/1.jpg" in line and "claims 30000x30000 = 900,000,000 pixels" in line
    code, lines = verify(source, capsys, f"--max_pixels={64 * 48 - 1}")
    assert (code, len(lines)) == (1, 4)
    if packed:
        # It is kept as it is, and named.
        flags = [f"--out={tmp_path / 'small'}", "--max_side=32", "--num_workers=1"]
        main(["prepare", f"folder:{tmp_path / 'in'}", *flags])
        assert "[3] claims 30000x30000" in capsys.readouterr().out
        code, (line,) = verify(tmp_path / "small", capsys)
        assert code == 1 and "huge" in line


def test_every_broken_image_of_a_shard_is_named_by_shard_index_and_name(
    files, tmp_path, capsys
):
    shard = pack(write_folder(tmp_path / "in", files), tmp_path / "out")
    code, lines = verify(tmp_path / "out", capsys)
    assert code == 1
    indices = {}
    for line in lines:
        match = re.match(r"(.*)\[(\d+)\] \((\w+)/1\.jpg\): .+\.$", line)
        assert match.group(1) == str(shard)
        indices[match.group(3)] = int(match.group(2))
    assert indices.keys() == {name.replace(" ", "_") for name in BROKEN}
    for name, index in indices.items():
        record = list(read_shard(shard))[index]
        example = tf_example_pb2.Example.FromString(record).features.feature
        assert example["file_name"].bytes_list.value[0] == f"{name}/1.jpg".encode()


def test_a_data_set_without_problems_is_reported_as_readable(tmp_path, capsys):
    files = {f"train/{name}/1.jpg": content for name, content in GOOD.items()}
    folder = write_folder(tmp_path / "in", files)
    pack(folder, tmp_path / "out")
    for source in (folder, tmp_path / "out", f"tfds:{tmp_path / 'out'}"):
        message = f"All 3 images of {source} are readable."
        assert verify(source, capsys) == (0, [message])


def test_files_that_are_not_taken_for_images_are_counted(tmp_path, capsys):
    files = {f"train/{name}/1.jpg": content for name, content in GOOD.items()}
    others = {"train/good0/a.jxl": b"", "train/good1/b.jxl": b"", "train/c.txt": b""}
    folder = write_folder(tmp_path, files | others | {"val/good0/1.jpg": JPEG})
    assert verify(folder, capsys) == (
        0,
        [
            f"All 4 images of {folder} are readable. 3 files are left out (.jxl: 2,"
            " .txt: 1)."
        ],
    )
    write_folder(tmp_path, {"train/good0/bad.png": b"bad"})
    message = "has 1 problem, listed above; 5 images were read. 3 files are left out"
    with pytest.raises(UserError, match=message):
        main(["prepare", "verify", folder, "--num_workers=1"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"out/in-train\S+: it is truncated or not an \w+ file\. `rm -f .*"),
        (pathlib.Path.unlink, r"out/in-train\S+: it is missing\. `rm -f .*"),
        (flip_byte, r"out/in-train\S+\[\d\]: cannot be read: Corrupted .* `rm -f .*"),
    ],
)
def test_damaged_shards_are_named_with_the_command_that_repairs_them(
    damage, message, tmp_path, capsys
):
    files = {f"train/{i}/1.jpg": encode(noise(i, 64, 48), "JPEG") for i in range(4)}
    damage(pack(write_folder(tmp_path / "in", files), tmp_path / "out"))
    code, lines = verify(tmp_path / "out", capsys)
    assert code == 1
    assert len(lines) == 1
    command = r" folder:\S+/in --out=\S+/out` writes it again"
    assert re.search(message + command, lines[0])


def test_lost_records_and_wrong_labels_are_named(tmp_path, capsys):
    directory = prepare(tmp_path, "jpeg")
    train, test = sorted(directory.glob("*array_record*"), reverse=True)
    rewrite(train, lambda records: records[:-1])

    def change(records):
        return [relabelled(records[0], 3), relabelled(records[1]), *records[2:]]

    rewrite(test, change)
    code, lines = verify("tfds:tiny_pictures/jpeg", capsys, f"--data_dir={tmp_path}")
    assert code == 1
    assert sorted(lines) == [
        f"{test}[0]: label 3 is not one of the 3 classes.",
        f"{test}[1]: has no label.",
        f"{train}: it holds 9 records, not 10. `rm -r {directory} &&"
        f" python -m resnet_jax.prepare tfds:tiny_pictures/jpeg --data_dir={tmp_path}`"
        " writes it again.",
    ]


def rewrite(path: pathlib.Path, change) -> None:
    records = change(list(read_shard(path)))
    writer = ArrayRecordWriter(str(path), OPTIONS)
    for record in records:
        writer.write(record)
    writer.close()


def relabelled(record: bytes, *labels: int) -> bytes:
    example = tf_example_pb2.Example.FromString(record)
    example.features.feature["label"].int64_list.value[:] = labels
    return example.SerializeToString()


def test_a_thousand_images_broken_at_random_are_decoded_or_named(tmp_path, capsys):
    rng = np.random.default_rng(0)
    kinds = [JPEG, PNG, GIF]
    files = {}
    for index in range(1000):
        content = bytearray(kinds[index % 3])
        if rng.random() < 0.5:
            del content[rng.integers(len(content)) :]
        for place in rng.integers(0, max(len(content), 1), rng.integers(1, 20)):
            content[place : place + 1] = bytes([rng.integers(256)])
        files[f"train/{index % 2}/{index}.jpg"] = bytes(content)
    pack(write_folder(tmp_path / "in", files), tmp_path / "out")
    code, lines = verify(tmp_path / "out", capsys)
    assert code == 1
    assert 300 < len(lines) < 1000
    assert all(re.search(r"\[\d+\] \([01]/\d+\.jpg\): .+\.$", line) for line in lines)


def test_a_source_that_cannot_be_verified_is_reported(tmp_path):
    with pytest.raises(UserError, match="is not prepared in"):
        main(["prepare", "verify", "tfds:mnist", f"--data_dir={tmp_path}"])
    with pytest.raises(UserError, match="no folder"):
        main(["prepare", "verify", f"folder:{tmp_path}/nowhere"])
