"""Slices have tfds's meaning in every source, and an empty one is never the whole."""

import pathlib

import pytest
import tensorflow_datasets as tfds

from resnet_jax.data.sources import open_source
from resnet_jax.data.splits import Slice, slices_of
from resnet_jax.errors import UserError
from tests.helpers.pictures import encode, noise, write_folder
from tests.helpers.tiny_pictures import prepare

SIZES = {"train": 30, "val": 7}
# Bounds of slices, with percentages that fall between two images.
BOUNDS = ("", "0", "1", "17", "-3", "-30", "30", "1%", "2%", "2.5%", "50%", "95%")


def count(text: str, size: int = 30) -> int:
    parts = slices_of(text, ["train"], lambda name: [size], "fake")
    return sum(stop - start for _, start, stop in parts)


def count_by_tfds(text: str, size: int) -> int:
    template = tfds.core.ShardedFileTemplate(
        data_dir=pathlib.Path(), dataset_name="x", filetype_suffix="array_record"
    )
    info = tfds.core.SplitInfo(
        name="train", shard_lengths=[size], num_bytes=0, filename_template=template
    )
    instruction = tfds.core.ReadInstruction.from_spec(text)
    (absolute,) = instruction.to_absolute({"train": info})
    if (absolute.from_ or 0) >= (size if absolute.to is None else absolute.to):
        # Of a slice that ends before it starts, tfds makes any number of images.
        return 0
    return tfds.core.splits.SplitDict([info])[text].num_examples


@pytest.mark.parametrize("size", [30, 99, 1437])
def test_slices_have_as_many_images_as_in_tfds(size):
    empty = 0
    for text in (f"train[{a}:{b}]" for a in BOUNDS for b in BOUNDS if a or b):
        if wanted := count_by_tfds(text, size):
            assert count(text, size) == wanted, text
        else:
            empty += 1
            with pytest.raises(UserError, match="holds no image"):
                count(text, size)
    assert empty > 20


@pytest.mark.parametrize(
    "split", ["train", "train[0:30]", "train[-0:]", "train[:100%]"]
)
def test_a_slice_may_be_the_whole_split(split):
    assert count(split) == 30


@pytest.mark.parametrize(
    "split",
    [
        *("train[:0]", "train[:0%]", "train[:1%]", "train[0:0]", "train[:-30]"),
        *("train[30:]", "train[100%:]", "train[5:3]", "train[-3:-5]", "train[50%:50%]"),
        # tfds rounds the last 1 % to all images, and all but the last 1 % to none.
        *("train[-1%:]", "train[:-1%]"),
        *("train[:0]+train[30:]", "train[1shard]"),
    ],
)
def test_an_empty_slice_is_reported_with_the_number_of_images(split):
    with pytest.raises(UserError) as raised:
        count(split)
    assert str(raised.value) == (
        f"The split {split!r} of fake holds no image (train has 30 in all); take a"
        " larger slice, or the whole split with train."
    )


def test_empty_slices_of_a_sum_are_left_out():
    def slices(text):
        return slices_of(text, SIZES, lambda name: [SIZES[name]], "fake")

    assert slices("train[:0] + val") == [Slice("val", 0, 7)]
    assert slices("train[9:2]+train[2:9]") == [Slice("train", 2, 9)]
    assert slices("all") == [Slice("train", 0, 30), Slice("val", 0, 7)]


@pytest.mark.parametrize(
    "split",
    [
        *("train[", "train[]", "train[:]", "train[a:b]", "train[::2]", "train[5]"),
        *("train[:200%]", "train[1.5:3]", "train[:10", "train[.:]", "train[:5]]"),
        "train[:5],val",
    ],
)
def test_a_malformed_slice_is_reported_with_examples(split):
    with pytest.raises(UserError, match=r"cannot be read; slices are .* train\[:10%\]"):
        count(split)


@pytest.mark.parametrize("split", ["train[31:]", "train[:-31]", "train[:9999999999]"])
def test_a_slice_outside_of_its_split_is_reported_with_the_bounds(split):
    with pytest.raises(UserError, match="30 images; its bounds can be from -30 to 30"):
        count(split)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, dict]:
    """A source of each kind whose splits `train` and `test` have 10 and 4 images."""
    root = tmp_path_factory.mktemp("sources")
    prepare(root, "jpeg")
    files = {
        f"{split}/{name}/{index}.png": encode(noise(index, 8, 8), "PNG")
        for split, number in (("train", 5), ("test", 2))
        for name in "ab"
        for index in range(number)
    }
    return {
        write_folder(root / "in", files): {},
        "fake:2:10": {"fake_shape": (8, 8, 1)},
        "tfds:tiny_pictures/jpeg": {"data_dir": str(root)},
    }


@pytest.mark.parametrize(
    ("split", "size"),
    [
        *(("train[:1]", 1), ("train[:-1]", 9), ("train[5%:95%]", 10)),
        *(("train[9:2]+train[:3]", 3), (" train [2:5] ", 3), ("train[1:2]+test", 5)),
    ],
)
def test_all_kinds_of_sources_take_the_same_slices(split, size, sources):
    for source, options in sources.items():
        if not source.startswith("fake") or "test" not in split:
            opened = open_source(source, split, **options)
            assert len(opened) == size
            assert len({opened.name(index) for index in range(size)}) == size


@pytest.mark.parametrize("split", ["train[:0]", "train[:1%]", "train[5:3]+test[9:2]"])
def test_no_kind_of_source_has_an_empty_slice(split, sources):
    for source, options in sources.items():
        with pytest.raises(UserError, match=f"of {source} (holds no image|lies out)"):
            open_source(source, split, **options)


def test_folders_whose_names_are_not_those_of_splits_in_tfds_can_be_sliced(tmp_path):
    names = ("all", "my photos", "v1.2", "a+b", "2012")
    files = {
        f"{name}/cat/{index}.png": encode(noise(index, 8, 8), "PNG")
        for name in names
        for index in range(4)
    }
    folder = write_folder(tmp_path, files)
    for name in names:
        assert len(open_source(folder, name)) == 4
    for name in set(names) - {"a+b"}:
        assert len(open_source(folder, f"{name}[:50%]")) == 2
    assert len(open_source(folder, "all+my photos[:1]")) == 5


def test_an_image_of_a_slice_of_tfds_has_the_name_that_it_has_in_the_split(sources):
    source, options = next(reversed(sources.items()))
    opened = open_source(source, "train[8:]+test[1:3]", **options)
    names = [opened.name(index) for index in range(4)]
    places = ("train[8]", "train[9]", "test[1]", "test[2]")
    assert names == [f"{source}/{place}" for place in places]
