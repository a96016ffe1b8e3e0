"""The order of examples is a function of (seed, step), on any number of workers."""

import dataclasses
import multiprocessing
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from resnet_jax.data.cache import cached
from resnet_jax.data.loader import (
    ResizeSchedule,
    bad_indices,
    eval_batches,
    permutation,
    spread,
    train_batches,
)
from resnet_jax.data.memory_source import MemorySource
from resnet_jax.errors import BadImageError, UserError
from tests.helpers.pictures import encode, examples, noise, write_folder

ROOT = pathlib.Path(__file__).parents[2]
NUM_PICTURES = 14
RANDOM = {"crop": "random_resized", "flip": True}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    """A folder source of 14 JPEGs of different sizes in two classes."""
    files = {
        f"train/{'ab'[index % 2]}/{index:02}.jpg": encode(
            noise(index, 20 + index, 30 - index), "JPEG"
        )
        for index in range(NUM_PICTURES)
    }
    return write_folder(tmp_path_factory.mktemp("pictures"), files)


# The indices of the broken images, in the order of the folder, class by class.
BAD = {3, 9}


@pytest.fixture(scope="module")
def broken_pictures(tmp_path_factory) -> str:
    """A folder source of 12 PNGs in two classes, of which two cannot be decoded."""
    files = {
        f"train/{'ab'[index // 6]}/{index:02}.png": encode(noise(index, 9, 9), "PNG")
        for index in range(12)
    }
    files["train/a/03.png"] = b""
    files["train/b/09.png"] = files["train/b/09.png"][:100]
    return write_folder(tmp_path_factory.mktemp("broken"), files)


def train(
    source,
    *,
    steps,
    seed=0,
    batch_size=4,
    rows=None,
    workers=0,
    threads=1,
    resize=None,
):
    """Returns all batches of the steps."""
    with train_batches(
        source,
        seed=seed,
        batch_size=batch_size,
        steps=steps,
        rows=rows,
        num_workers=workers,
        num_threads=threads,
        resize=resize,
    ) as batches:
        return list(batches)


def evaluate(source, *, batch_size, rows=None, workers=0, threads=1):
    """Returns all batches of an evaluation."""
    with eval_batches(
        source,
        batch_size=batch_size,
        rows=rows,
        num_workers=workers,
        num_threads=threads,
    ) as batches:
        return list(batches)


def assert_same(batches, expected):
    """Checks that keys, types, shapes and values are the same, batch by batch."""
    assert len(batches) == len(expected) > 0
    for batch, wanted in zip(batches, expected, strict=True):
        assert batch.keys() == wanted.keys()
        for key, value in batch.items():
            np.testing.assert_array_equal(value, wanted[key], strict=True, err_msg=key)


def join(batches, key):
    return np.concatenate([batch[key] for batch in batches])


def join_rows(*parts):
    """Concatenates the rows of several processes, batch by batch."""
    return [
        {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        for batches in zip(*parts, strict=True)
    ]


def test_a_batch_has_the_documented_types_and_shapes(pictures):
    (batch,) = train(examples(pictures, size=16, **RANDOM), steps=range(1))
    types = {key: (value.dtype.name, value.shape) for key, value in batch.items()}
    assert types == {
        "image": ("uint8", (4, 16, 16, 3)),
        "label": ("int32", (4,)),
        "mask": ("bool", (4,)),
        "index": ("int64", (4,)),
        "bad": ("int64", (4,)),
    }
    assert batch["mask"].all()
    assert bad_indices(batch) == set()


def test_labels_stay_with_their_images(pictures):
    source = examples(pictures, size=16)
    for batch in train(source, steps=range(7)):
        for image, label, index in zip(
            batch["image"], batch["label"], batch["index"], strict=True
        ):
            expected = source.eval([int(index)])
            assert label == expected["label"][0]
            np.testing.assert_array_equal(image, expected["image"][0])


def test_threads_do_not_change_the_pixels(pictures):
    source = examples(pictures, size=16, **RANDOM)
    for make in (
        lambda threads: train(source, steps=range(9), threads=threads),
        lambda threads: evaluate(examples(pictures), batch_size=4, threads=threads),
    ):
        assert_same(make(threads=4), make(threads=1))


def test_workers_do_not_change_the_pixels_nor_where_they_start(pictures):
    source = examples(pictures, size=16, **RANDOM)
    whole = train(source, steps=range(9))
    # 7 batches cannot be divided evenly between 2 workers.
    assert_same(train(source, steps=range(2, 9), workers=2), whole[2:])


@pytest.mark.slow
def test_workers_do_not_change_an_evaluation(broken_pictures):
    source = examples(broken_pictures, skip_bad=True)
    assert_same(
        evaluate(source, batch_size=5, workers=2), evaluate(source, batch_size=5)
    )


@pytest.mark.parametrize("first", (1, 3, 4, 8))
def test_starting_at_a_step_continues_the_order(first, pictures):
    # With 14 images and batches of 4, two epochs end within a batch, one between two.
    source = examples(pictures, size=16, **RANDOM)
    whole = train(source, steps=range(9))
    assert_same(train(source, steps=range(first, 9)), whole[first:])


@pytest.mark.parametrize(
    "parts",
    [
        [range(0, 4), range(4, 8)],
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [range(0, 1), range(1, 8)],
    ],
)
def test_the_rows_of_all_processes_make_the_batch_of_one(parts, pictures):
    source = examples(pictures, size=16, **RANDOM)
    options = {"steps": range(2, 6), "batch_size": 8}
    made = [train(source, rows=rows, **options) for rows in parts]
    assert_same(join_rows(*made), train(source, **options))


def test_the_rows_of_a_process_need_not_be_adjacent(pictures):
    source = examples(pictures, size=16, **RANDOM)
    options = {"steps": range(2, 6), "batch_size": 6}
    rows = [5, 0, 2]
    expected = [
        {key: value[rows] for key, value in batch.items()}
        for batch in train(source, **options)
    ]
    assert_same(train(source, rows=rows, **options), expected)


@pytest.mark.parametrize("batch_size", (1, 4, 7, 14, 20, 50))
def test_each_epoch_holds_every_image_once(batch_size, pictures):
    epochs = 5
    steps = -(-epochs * NUM_PICTURES // batch_size)
    source = examples(pictures)
    indices = join(train(source, steps=range(steps), batch_size=batch_size), "index")
    for epoch in range(epochs):
        seen = indices[epoch * NUM_PICTURES : (epoch + 1) * NUM_PICTURES]
        np.testing.assert_array_equal(np.sort(seen), np.arange(NUM_PICTURES))


def test_each_epoch_of_the_digits_holds_every_image_once():
    source = examples("digits", channels=1)
    # 1,437 is not a multiple of 128, so both epochs end within a batch.
    indices = join(train(source, steps=range(23), batch_size=128), "index")
    for epoch in range(2):
        seen = indices[epoch * 1437 : (epoch + 1) * 1437]
        np.testing.assert_array_equal(np.sort(seen), np.arange(1437))


def test_every_epoch_and_every_seed_has_another_order():
    orders = [permutation(seed, epoch, 1000) for seed in range(5) for epoch in range(5)]
    for place, order in enumerate(orders):
        np.testing.assert_array_equal(np.sort(order), np.arange(1000))
        for earlier in orders[:place]:
            # Two random orders agree in one place on average, and in more than 8 once
            # in a million times; there are 300 pairs.
            assert (order == earlier).sum() <= 8


def test_the_order_is_that_of_earlier_versions():
    # With another order, older runs could not be resumed or repeated.
    assert permutation(0, 0, 10)[:5].tolist() == [4, 6, 2, 7, 3]
    assert permutation(0, 1, 10)[:5].tolist() == [5, 1, 6, 3, 4]
    assert permutation(1, 0, 10)[:5].tolist() == [9, 1, 3, 8, 7]
    assert permutation(0, 89, 1_281_167)[0] == 65458


def test_the_augmentation_is_that_of_earlier_versions():
    # One pixel of each image depends on its shift and on its flip.
    source = examples("fake:10:4", size=16, crop="pad", flip=True)
    (batch,) = train(source, steps=range(1))
    assert batch["image"][:, 8, 8, 0].tolist() == [106, 112, 197, 180]


def test_seeds_change_the_batches(pictures):
    source = examples(pictures, size=16, **RANDOM)
    first, second = (train(source, steps=range(3), seed=seed) for seed in (0, 1))
    assert (join(first, "index") != join(second, "index")).any()


def test_seeds_change_the_augmentation_of_the_same_image():
    source = examples("fake:1:1", size=16, **RANDOM)
    images = [
        train(source, steps=range(1), batch_size=1, seed=seed)[0]["image"].tobytes()
        for seed in range(10)
    ]
    # Equal crops would be a coincidence of many random numbers.
    assert len(set(images)) == 10


def test_epochs_change_the_augmentation_of_the_same_image():
    # With one image, each step is an epoch.
    source = examples("fake:1:1", size=16, **RANDOM)
    batches = train(source, steps=range(10), batch_size=1)
    assert join(batches, "index").tolist() == [0] * 10
    assert len({batch["image"].tobytes() for batch in batches}) == 10


def test_images_of_one_batch_are_augmented_differently():
    # There are 16 images of noise, so the images 0, 16, 32 and 48 are the same.
    source = examples("fake:1:64", size=16, **RANDOM)
    (batch,) = train(source, steps=range(1), batch_size=64)
    same = np.isin(batch["index"], (0, 16, 32, 48))
    assert len({image.tobytes() for image in batch["image"][same]}) == 4


def test_an_augmentation_does_not_depend_on_the_batch_size(pictures):
    source = examples(pictures, size=16, **RANDOM)
    small = train(source, steps=range(14), batch_size=4)
    large = train(source, steps=range(7), batch_size=8)
    for key in small[0]:
        np.testing.assert_array_equal(join(small, key), join(large, key))


@pytest.mark.parametrize("size", (1, 7, 8, 13, 16))
@pytest.mark.parametrize("batch_size", (1, 3, 4, 20))
def test_an_evaluation_holds_every_image_once(size, batch_size):
    source = examples(f"fake:10:{size}", "test")
    batches = evaluate(source, batch_size=batch_size)
    assert all(len(batch["image"]) == batch_size for batch in batches)
    mask = join(batches, "mask")
    assert mask.sum() == size
    np.testing.assert_array_equal(join(batches, "index")[mask], np.arange(size))
    np.testing.assert_array_equal(join(batches, "label")[mask], np.arange(size) % 10)
    # There is no batch of padding alone.
    assert len(batches) == -(-size // batch_size)


def test_padding_is_black_and_masked_and_has_no_index():
    source = examples("fake:10:5", "test")
    last = evaluate(source, batch_size=4)[-1]
    assert last["mask"].tolist() == [True, False, False, False]
    assert (last["image"][1:] == 0).all()
    assert last["index"].tolist() == [4, -1, -1, -1]
    assert bad_indices(last) == set()


@pytest.mark.parametrize("size", (1, 3, 4, 5, 8, 13, 16))
def test_several_processes_together_evaluate_every_image_once(size):
    source = examples(f"fake:10:{size}", "test")
    parts = [
        evaluate(source, batch_size=8, rows=rows) for rows in (range(0, 4), range(4, 8))
    ]
    # Each has as many batches, since they compute together.
    assert_same(join_rows(*parts), evaluate(source, batch_size=8))


def test_a_process_without_images_gets_padding_alone():
    source = examples("fake:10:3", "test")
    (batch,) = evaluate(source, batch_size=8, rows=range(4, 8))
    assert batch["image"].shape == (4, 8, 8, 3)
    assert not batch["mask"].any()


def test_an_evaluation_is_the_same_each_time(pictures):
    source = examples(pictures, size=16)
    first = evaluate(source, batch_size=4)
    assert_same(evaluate(source, batch_size=4), first)


def test_a_bad_image_stops_the_training_with_its_name(broken_pictures):
    source = examples(broken_pictures)
    with pytest.raises(BadImageError, match=r"/train/[ab]/(03|09)\.png: "):
        train(source, steps=range(3))


def test_a_bad_image_stops_the_evaluation_with_its_name(broken_pictures):
    with pytest.raises(BadImageError, match=r"/train/a/03\.png: the file is empty"):
        evaluate(examples(broken_pictures), batch_size=4)


@pytest.mark.slow
def test_a_bad_image_in_a_worker_stops_the_training_with_its_name(broken_pictures):
    source = examples(broken_pictures)
    with pytest.raises(BadImageError, match=r"/train/[ab]/(03|09)\.png: "):
        train(source, steps=range(3), workers=2)


@pytest.mark.parametrize("threads", (1, 4))
def test_a_skipped_image_is_replaced_by_the_next_of_the_order(threads, broken_pictures):
    source = examples(broken_pictures, skip_bad=True, **RANDOM)
    epochs, in_a_row = 10, 0
    batches = train(source, steps=range(3 * epochs), threads=threads)
    indices, bad = join(batches, "index"), join(batches, "bad")
    assert join(batches, "mask").all()
    for epoch in range(epochs):
        order = permutation(0, epoch, 12).tolist()
        for offset, wanted in enumerate(order):
            place = epoch * 12 + offset
            if wanted in BAD:
                following = [*order[offset + 1 :], *order]
                good = next(index for index in following if index not in BAD)
                assert (indices[place], bad[place]) == (good, wanted)
                in_a_row += following[0] in BAD
            else:
                assert (indices[place], bad[place]) == (wanted, -1)
    assert set.union(*(bad_indices(batch) for batch in batches)) == BAD
    # In some epoch two bad images follow each other.
    assert in_a_row > 0


def test_good_images_are_the_same_whether_bad_ones_are_skipped_or_not(pictures):
    stop = examples(pictures, size=16, **RANDOM)
    skip = examples(pictures, size=16, skip_bad=True, **RANDOM)
    assert_same(train(skip, steps=range(5)), train(stop, steps=range(5)))


def test_a_skipped_image_is_masked_in_the_evaluation_and_counted(broken_pictures):
    source = examples(broken_pictures, skip_bad=True)
    batches = evaluate(source, batch_size=5)
    mask, bad = join(batches, "mask"), join(batches, "bad")
    # 12 images, 2 of them bad, in 3 batches of 5.
    assert mask.tolist() == [index < 12 and index not in BAD for index in range(15)]
    assert set.union(*(bad_indices(batch) for batch in batches)) == BAD
    assert np.flatnonzero(bad >= 0).tolist() == sorted(BAD)
    assert (join(batches, "image")[~mask] == 0).all()
    # An evaluation compares this sum with the size of the split.
    assert mask.sum() + len(BAD) == len(source.source)


def test_a_source_without_a_good_image_is_an_error(tmp_path):
    folder = write_folder(
        tmp_path, {"train/a/1.jpg": b"", "train/b/1.jpg": b"neither is this"}
    )
    source = examples(folder, skip_bad=True)
    # The reason may be the same for all, such as a package that is missing.
    message = (
        rf"{tmp_path}/train holds no image .* example, {tmp_path}/train/(a|b)/1.jpg: "
    )
    with pytest.raises(UserError, match=message):
        train(source, steps=range(1))


@pytest.mark.parametrize("cache", ("none", "ram"))
def test_an_image_beyond_the_limit_of_pixels_is_a_bad_image(tmp_path, cache):
    sizes = {"a/0": (20, 20), "a/1": (20, 21), "b/2": (30, 20), "b/3": (9, 9)}
    files = {
        f"train/{name}.{kind.lower()}": encode(noise(0, *size), kind)
        for (name, size), kind in zip(
            sizes.items(), ("PNG", "GIF", "JPEG", "WEBP"), strict=True
        )
    }
    folder = write_folder(tmp_path, files)

    def limited(max_pixels: int, **options):
        made = examples(folder, **options)
        source = cached(made.source, 3, cache, max_pixels)
        return dataclasses.replace(made, source=source, max_pixels=max_pixels)

    with pytest.raises(BadImageError, match=r"b/2\.jpeg claims 30x20 = 600 ") as raised:
        evaluate(limited(599), batch_size=2)
    assert "--config.data.on_bad_image=skip" in str(raised.value)
    with pytest.raises(BadImageError, match=r"claims 30x20 = 600 pixels"):
        train(limited(599), steps=range(3))
    batches = evaluate(limited(400, skip_bad=True), batch_size=2)
    assert set.union(*(bad_indices(batch) for batch in batches)) == {1, 2}
    batches = train(limited(400, skip_bad=True), steps=range(3))
    assert set.union(*(bad_indices(batch) for batch in batches)) == {1, 2}
    assert join(evaluate(limited(600), batch_size=2), "mask").all()


def children() -> set[int]:
    return {process.pid for process in multiprocessing.active_children()}


@pytest.mark.slow
def test_closing_in_the_middle_leaves_no_process(pictures):
    before = children()
    source = examples(pictures, size=16, **RANDOM)
    batches = train_batches(
        source, seed=0, batch_size=4, steps=range(10_000), num_workers=2
    )
    next(batches)
    assert len(children() - before) >= 1
    batches.close()
    assert children() == before


def test_closing_before_the_first_batch_is_allowed(pictures):
    before = children()
    train_batches(
        examples(pictures), seed=0, batch_size=4, steps=range(10), num_workers=2
    ).close()
    assert children() == before


SHARE_AND_CLOSE = """
import gc, pathlib, sys, time
from resnet_jax.data.loader import train_batches
from tests.helpers.pictures import examples

if __name__ == "__main__":
    source = examples(sys.argv[1], size=32)
    options = {"seed": 0, "batch_size": 4, "steps": range(10_000), "num_workers": 2}
    with train_batches(source, **options) as batches:
        for _ in range(5):
            next(batches)
        # A chunk lies in memory that workers share; a batch is a copy.
        chunk = next(batches._iterator)
    assert "psm_" in pathlib.Path("/proc/self/maps").read_text()
    del chunk, batches
    # Grain frees the memory in a thread.
    deadline = time.monotonic() + 30
    while "psm_" in pathlib.Path("/proc/self/maps").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    print("closed")
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="reads /proc")
def test_closing_leaves_no_shared_memory(pictures, tmp_path):
    # In a process of its own, whose resource tracker reports shared memory that is left
    # at the end.
    script = tmp_path / "share_and_close.py"
    script.write_text(SHARE_AND_CLOSE)
    run = subprocess.run(
        [sys.executable, script, pictures],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stdout) == (0, "closed\n"), run.stderr
    assert "leaked" not in run.stderr


def test_images_in_memory_give_the_same_batches(tmp_path):
    for split, number in (("train", 12), ("test", 4)):
        for i in range(number):
            path = tmp_path / split / str(i % 3) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise(i, 16, 16).save(path)
    for crop, policy in (("pad", ""), ("pad", "trivial_wide"), ("random_resized", "")):
        source = examples(
            f"folder:{tmp_path}", size=16, crop=crop, flip=True, policy=policy
        )
        memory = dataclasses.replace(source, source=cached(source.source, 3, "small"))
        is_cropped_from_memory = memory.memory_to_crop is not None
        assert is_cropped_from_memory == (crop == "pad" and not policy)
        assert_same(train(memory, steps=range(6)), train(source, steps=range(6)))


@pytest.mark.parametrize(
    ("requested", "cores", "expected"),
    [
        ((-1, 0), 2, (0, 2)),
        ((-1, 0), 16, (0, 16)),
        ((-1, 0), 200, (25, 8)),
        ((0, 0), 200, (0, 16)),
        ((4, 0), 2, (4, 1)),
        ((3, 5), 200, (3, 5)),
    ],
)
def test_workers_and_threads_are_chosen_by_the_number_of_cores(
    requested, cores, expected
):
    assert spread(*requested, cores) == expected


@pytest.mark.parametrize("crop", ("pad", "random_resized"))
def test_repeated_images_come_in_a_row_and_look_different(crop, pictures):
    source = dataclasses.replace(
        examples(pictures, size=16, crop=crop, flip=True), repeats=3
    )
    size = len(source.source)
    (batch,) = train(source, steps=range(1), batch_size=size // 3 * 3)
    rows = batch["index"].reshape(-1, 3)
    assert (rows == rows[:, :1]).all()
    assert len(set(rows[:, 0].tolist())) == len(rows)
    views = batch["image"].reshape(len(rows), 3, -1)
    different = [len({view.tobytes() for view in three}) for three in views]
    # Two random crops are hardly ever equal.
    assert np.mean(different) > 2.5


def test_the_repr_of_images_in_memory_is_short():
    # Grain takes the repr of its functions, which would take minutes for ImageNet.
    source = MemorySource([bytes(1000)] * 1000)
    assert len(repr(source)) < 200


@pytest.mark.parametrize(("crop", "images"), [("center", 4), ("five", 20)])
def test_images_that_the_host_cannot_hold_are_an_error(crop, images, pictures):
    sentence = f"This host has too little memory for this run: {images} images of 1000"
    with pytest.raises(UserError, match=sentence):
        evaluate(examples(pictures, size=1_000_000, crop=crop), batch_size=4)


RESIZE = ResizeSchedule(first=8, last=24, start=2.0, end=6.0, multiple=4)


def test_the_size_of_images_is_a_function_of_the_step():
    sides = [RESIZE(step) for step in range(9)]
    assert sides == [8, 8, 8, 12, 16, 20, 24, 24, 24]
    assert RESIZE.sides(range(9)) == [8, 12, 16, 20, 24]
    # FFCV's rn50 grows from epoch 65 to 76; an epoch is one step here.
    ffcv = ResizeSchedule(first=160, last=192, start=65.0, end=76.0, multiple=32)
    assert ffcv.sides(range(88)) == [160, 192]
    expected = [
        int(np.round(np.interp(e, [65, 76], [160, 192]) / 32)) * 32 for e in range(88)
    ]
    assert [ffcv(epoch) for epoch in range(88)] == expected
    # Composer's schedule: half of 176 px for 0.4 of the run, 176 px for the last 0.2.
    composer = ResizeSchedule(first=88, last=176, start=400.0, end=800.0, multiple=4)
    scale = [0.5 + 0.5 * min(max(t - 400, 0) / 400, 1) for t in range(1000)]
    assert [composer(t) for t in range(1000)] == [round(176 * x / 4) * 4 for x in scale]


@pytest.mark.parametrize("crop", ("pad", "random_resized"))
def test_the_images_of_a_batch_have_the_size_of_their_step(crop, pictures):
    source = examples(pictures, size=24, crop=crop, flip=True, policy="trivial_wide")
    batches = train(source, steps=range(9), resize=RESIZE)
    sides = [batch["image"].shape[1:3] for batch in batches]
    assert sides == [(RESIZE(step),) * 2 for step in range(9)]
    assert_same(train(source, steps=range(4, 9), resize=RESIZE), batches[4:])
    # Batches of the last size are the same as without a schedule.
    assert_same(train(source, steps=range(6, 9)), batches[6:])


@pytest.mark.slow
def test_workers_make_batches_of_several_sizes(pictures):
    source = examples(pictures, size=24, policy="rand-m9-mstd0.5", **RANDOM)
    alone = train(source, steps=range(9), resize=RESIZE)
    assert_same(train(source, steps=range(9), resize=RESIZE, workers=2), alone)
