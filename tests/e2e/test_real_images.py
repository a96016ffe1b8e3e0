"""Real JPEGs through the ImageNet path; bad images stop a run or are counted."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.helpers import runs
from tests.helpers.real_data import real_data

TINY = "--config.model.overrides={'widths': (8, 8, 8, 8), 'stem': ((7, 2, 8),)}"


@pytest.fixture
def imagenet_folder(tmp_path):
    """Returns a folder of 120 full-size ImageNet JPEGs in 10 classes."""
    root = tmp_path / "imagenet"
    with zipfile.ZipFile(real_data("imagenet-samples.zip")) as archive:
        names = [n for n in archive.namelist() if n.lower().endswith((".jpeg", ".jpg"))]
        for i, name in enumerate(sorted(names)[:120]):
            split = "train" if i % 3 else "validation"
            folder = root / split / f"class{i % 10}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.JPEG").write_bytes(archive.read(name))
    return root


@pytest.mark.long
def test_r50_trains_on_imagenet_jpegs_on_eight_devices(imagenet_folder, tmp_path):
    code, output = runs.run(
        tmp_path / "run",
        "--config=configs/r50.py",
        TINY,
        f"--config.data.source=folder:{imagenet_folder}",
        "--config.data.image_size=64",
        "--config.batch_size=32",
        "--config.model.bn_group_size=8",
        "--config.total.steps=4",
        "--config.optim.schedule=constant",
        "--config.optim.warmup.steps=1",
        JAX_NUM_CPU_DEVICES="8",
    )
    assert code == 0, output
    assert "8 x cpu" in output
    assert runs.result(tmp_path / "run")["n_seen"] == 40


@pytest.fixture
def folder_with_bad_images(tmp_path):
    """Returns a folder with a truncated JPEG in train and an empty file in test."""
    rng = np.random.default_rng(0)
    root = tmp_path / "pictures"
    for split, count in (("train", 12), ("test", 7)):
        for label in ("left", "right"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "JPEG")
                (folder / f"{i}.jpg").write_bytes(buffer.getvalue())
    broken = root / "train" / "left" / "5.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    (root / "test" / "right" / "2.jpg").write_bytes(b"")
    return root


def flags_for(root):
    return (
        "--config=configs/quickstart.py",
        "--config.model.overrides={'stage_sizes': (1, 1, 1)}",
        f"--config.data.source=folder:{root}",
        "--config.batch_size=8",
        "--config.model.bn_group_size=global",
        "--config.total.steps=8",
        "--config.optim.warmup.steps=1",
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_image_stops_the_run_and_is_named(
    folder_with_bad_images, tmp_path, workers
):
    code, output = runs.run(
        tmp_path / "run",
        *flags_for(folder_with_bad_images),
        f"--config.data.num_workers={workers}",
    )
    assert code == 1, output
    error = output.splitlines()[-1]
    assert error.startswith("error: ")
    assert str(folder_with_bad_images / "train" / "left" / "5.jpg") in error
    assert "data.on_bad_image" in error
    assert "Traceback" not in output


@pytest.mark.slow
def test_bad_images_are_skipped_and_counted_on_request(
    folder_with_bad_images, tmp_path
):
    code, output = runs.run(
        tmp_path / "run",
        *flags_for(folder_with_bad_images),
        "--config.data.on_bad_image=skip",
        "--config.evaluate.every.steps=4",
    )
    assert code == 0, output
    # Each of them once, although several epochs and two evaluations meet it.
    for text in (
        "train/left/5.jpg, which cannot be decoded (1 so far)",
        "test/right/2.jpg, which cannot be decoded (1 so far in evaluation)",
    ):
        assert output.count(text) == 1
    result = runs.result(tmp_path / "run")
    assert result["n_seen"] == 13
    assert result["bad_train_images"] == 1
    assert result["bad_eval_images"] == 1
