"""Combined sources, slices, few-shot subsets and new label numbers."""

import pickle
import re
from collections import Counter

import numpy as np
import pytest

from resnet_jax.data.augment import Augment
from resnet_jax.data.cache import cached
from resnet_jax.data.derived_sources import (
    Balanced,
    Combined,
    balanced,
    check_same_classes,
    few_shot,
    hold_out,
    labels_of,
    turns_of,
    with_classes,
)
from resnet_jax.data.loader import Examples, epoch_order, permutation, train_batches
from resnet_jax.data.memory_source import MemorySource
from resnet_jax.data.sources import FakeSource, FolderSource, open_source
from resnet_jax.errors import UserError
from resnet_jax.prepare import main
from tests.helpers.pictures import encode, noise, write_folder


def write_pictures(root, counts: dict[str, int]) -> str:
    """Writes a folder with some pictures of each `split/class`, all different."""
    files = {
        f"{name}/{index:03}.png": encode(noise(index + 1000 * k, 8, 8), "PNG")
        for k, (name, count) in enumerate(counts.items())
        for index in range(count)
    }
    return write_folder(root, files)


def names(source, indices) -> list[str]:
    return [source.name(int(index)) for index in indices]


def batches(source, *, steps, batch_size=10, seed=0, workers=0) -> list[dict]:
    examples = Examples(
        source=source,
        augment=Augment(size=8, crop="pad", pad=1, flip=True),
        channels=source[0][0].shape[-1] if source.title[:3] == "fak" else 3,
        skip_bad=False,
    )
    with train_batches(
        examples, seed=seed, batch_size=batch_size, steps=steps, num_workers=workers
    ) as made:
        return list(made)


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> str:
    counts = {"train/cat": 12, "train/dog": 28, "val/cat": 3, "val/dog": 2}
    return write_pictures(tmp_path_factory.mktemp("pets"), counts)


@pytest.fixture(scope="module")
def strays(tmp_path_factory) -> str:
    counts = {"all/cat": 5, "all/dog": 5}
    return write_pictures(tmp_path_factory.mktemp("strays"), counts)


# The order.


def test_the_order_of_a_single_source_is_its_permutation():
    for epoch in (0, 1, 7):
        indices, epochs = epoch_order(3, epoch, (17,), (17,))
        assert indices.tolist() == permutation(3, epoch, 17).tolist()
        assert set(epochs.tolist()) == {epoch}


def test_combined_sources_are_taken_in_proportion_to_their_weights(pets, strays):
    combined = open_source(f"mix:3*{pets},{strays}@all", "train")
    # 37.5 and 12.5, rounded.
    assert (len(combined), combined.shares) == (50, (38, 12))
    for epoch in range(5):
        indices, _ = epoch_order(0, epoch, combined.sizes, combined.shares)
        counts = Counter("strays" in name for name in names(combined, indices))
        assert counts == {False: 38, True: 12}


def test_all_images_of_a_combined_source_are_seen_equally_often():
    sizes, shares = (40, 10), (35, 15)
    seen = Counter()
    for epoch in range(8):
        indices, _ = epoch_order(0, epoch, sizes, shares)
        seen.update(indices.tolist())
    # 8 epochs take 280 images from the 40 of the first source, and 120 from the 10 of
    # the second one.
    assert seen == dict.fromkeys(range(40), 7) | dict.fromkeys(range(40, 50), 12)


def test_combined_sources_are_interleaved_evenly():
    indices, _ = epoch_order(0, 0, (5000, 5000), (5000, 5000))
    fractions = (indices >= 5000).reshape(100, 100).mean(axis=1)
    # 4.5 standard deviations, of 0.05, of the fraction in 100 fair draws.
    assert np.abs(fractions - 0.5).max() < 0.225


def test_an_image_that_is_repeated_in_an_epoch_is_augmented_differently():
    combined = Combined((FakeSource("train", (8, 8, 1), 2, 64), Few()), (1.0, 1.0))
    images = {}
    for batch in batches(combined, steps=range(7)):
        for image, index in zip(batch["image"], batch["index"], strict=True):
            images.setdefault(int(index), set()).add(image.tobytes())
    # 35 of the 70 images of an epoch are from the second source, which has 6 images.
    for index in range(64, 70):
        assert len(images[index]) >= 3


class Few(FakeSource):
    """Six images."""

    def __init__(self):
        super().__init__("train", (8, 8, 1), 2, 6)


@pytest.mark.slow
def test_combined_sources_give_the_same_batches_on_workers_and_after_a_restart(
    pets, strays
):
    combined = open_source(f"mix:1*{pets},2*{strays}@all", "train")
    whole = batches(combined, steps=range(12))
    resumed = batches(combined, steps=range(7, 12), workers=2)
    for expected, batch in zip(whole[7:], resumed, strict=True):
        for key, value in expected.items():
            np.testing.assert_array_equal(batch[key], value, err_msg=key)


def test_another_seed_interleaves_in_another_order():
    orders = [epoch_order(seed, 0, (30, 30), (40, 20))[0].tolist() for seed in (0, 1)]
    assert orders[0] != orders[1]


# Opening combined sources.


def test_combined_sources_hold_every_image_once(pets, strays):
    combined = open_source(f"mix:5*{pets}, {strays}@all", "val")
    assert len(combined) == 15
    assert len(set(names(combined, range(15)))) == 15
    for index in range(15):
        assert combined.classes[combined[index][1]] in combined.name(index)
    pickle.loads(pickle.dumps(combined))


def test_combined_sources_may_number_their_classes_differently():
    source = FakeSource("train", (4, 4, 1), 3, 9)
    relabelled = with_classes(source, ("class 2", "class 0", "class 1"))
    assert [relabelled[index][1] for index in range(4)] == [1, 2, 0, 1]
    assert relabelled.name(3) == source.name(3)


def test_sources_of_different_classes_cannot_be_combined(pets, tmp_path):
    birds = write_pictures(tmp_path, {"train/cat": 1, "train/emu": 1})
    with pytest.raises(UserError, match=r"'dog' is in .* but not in"):
        open_source(f"mix:{pets},{birds}", "train")


@pytest.mark.parametrize(
    ("name", "twin"), [("\u00e9", "e\u0301"), ("cat", "Cat"), ("cat", "cat ")]
)
def test_names_of_classes_that_look_alike_are_told_apart(name, twin, tmp_path):
    folder = write_pictures(tmp_path, {f"train/{name}": 1, f"val/{twin}": 1})
    train, val = open_source(folder, "train"), open_source(folder, "val")
    message = f"(but {twin!a}, which is not the same text as {name!a})"
    with pytest.raises(UserError, match=re.escape(message)):
        check_same_classes(train, val)
    with pytest.raises(UserError, match=re.escape(f"the same text as {twin!a}")):
        with_classes(val, train.classes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mix:", "no data source 'mix:'"),
        ("mix:three*digits", "weight 'three' in .* is not a number"),
        ("mix:-1*digits", "weight '-1' in"),
        ("mix:nan*digits", "weight 'nan' in"),
        ("mix:digits,", "no data source ''"),
        ("mix:digits,digit", "no data source 'digit'. Did you mean digits"),
        ("mix:digits,digits@tets", "no split 'tets'. Did you mean test"),
        ("mix:digits,0*digits", "The weight 0 of digits/train leaves it no image"),
        ("mix:1e-9*digits", "weight '1e-9' in"),
        ("mix:digits,.00001*digits", "The weight 1e-05 of digits/train"),
    ],
)
def test_a_mistake_in_a_combination_is_reported(text, message):
    with pytest.raises(UserError, match=message):
        open_source(text, "train")


# Slices.


@pytest.mark.parametrize(
    ("split", "size"),
    [
        ("train[:10%]", 4),
        ("train[10%:]", 36),
        ("train[-25%:]", 10),
        ("train[:3]", 3),
        ("train[5:7]", 2),
        ("train+val", 45),
        ("train[:10%] + val[:2]", 6),
        ("train[:5]+train[10:15]", 10),
    ],
)
def test_slices_in_the_syntax_of_tfds_work_on_folders(pets, split, size):
    source = open_source(pets, split)
    assert len(source) == len(set(names(source, range(size)))) == size
    assert source.classes == ("cat", "dog")
    for index in range(size):
        assert source.classes[source[index][1]] in source.name(index)


def test_two_slices_make_the_complete_split_and_each_has_all_classes(pets):
    first, second = (open_source(pets, f"train[{part}]") for part in (":50%", "50%:"))
    both = names(first, range(20)) + names(second, range(20))
    whole = open_source(pets, "train")
    assert sorted(both) == sorted(names(whole, range(40)))
    # A slice is not in the order of the folder, which is sorted by class.
    for half in (first, second):
        assert {half[index][1] for index in range(20)} == {0, 1}


def test_slices_work_on_digits_and_fake_images():
    assert len(open_source("digits", "train[:10%]")) == 144
    assert len(open_source("digits", "train+test")) == 1797
    assert len(open_source("fake:10:50", "train[:10%]", fake_shape=(4, 4, 1))) == 5


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("trian[:10%]", "no split 'trian'. Did you mean train"),
        ("train[:10", "split 'train.:10' of digits cannot be read"),
        ("train[2000:]", "has 1,437 images; its bounds"),
        ("train[:200%]", "percentages from -100% to 100%"),
        ("train+tets", "no split 'tets'. Did you mean test"),
        ("train[5:5]", "holds no image"),
    ],
)
def test_a_mistake_in_a_slice_is_reported_in_one_line(split, message):
    with pytest.raises(UserError, match=message) as raised:
        open_source("digits", split)
    assert "\n" not in str(raised.value)


def test_titles_contain_slices_weights_and_shots():
    def title(source, split="train"):
        return open_source(source, split).title

    assert title("digits", "train[:10%]") == "digits/train[0:144]"
    assert title("digits", "train[1000:]+test") == (
        "digits/train[1000:1437] + digits/test[0:360]"
    )
    combined = "mix:3*digits,0.5*digits@test"
    assert title(combined) == "3 x digits/train + 0.5 x digits/test"
    few = few_shot(open_source("digits", "train[:50%]"), 2, seed=0)
    assert few.title == "digits/train[0:718], 2 a class"


# Few shots.


@pytest.mark.parametrize("shots", [1, 5, 12])
def test_a_few_shot_subset_has_the_same_number_of_images_of_each_class(pets, shots):
    source = few_shot(open_source(pets, "train"), shots, seed=0)
    labels = Counter(source[index][1] for index in range(len(source)))
    assert labels == {0: shots, 1: shots}
    assert len(set(names(source, range(2 * shots)))) == 2 * shots


def test_a_few_shot_subset_is_a_function_of_the_seed():
    train = open_source("digits", "train")
    chosen = [few_shot(train, 3, seed).indices.tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_choosing_a_few_shot_subset_reads_few_images():
    class Counting(FakeSource):
        read = 0

        def __getitem__(self, index):
            Counting.read += 1
            return super().__getitem__(index)

    few_shot(Counting("train", (4, 4, 1), 100), 2, seed=0)
    # There are 1,281,167 images; the last of 100 classes is full after about 800.
    assert Counting.read < 3000


def counts_of(source) -> Counter:
    return Counter(source[index][1] for index in range(len(source)))


@pytest.mark.parametrize(
    "split",
    ["train", "train+val", "train[:50%]+train[50%:]+val", "train+train", "all", "val"],
)
def test_shots_are_those_of_all_splits_together(split, pets, tmp_path):
    main(["prepare", pets, f"--out={tmp_path / 'packed'}", "--num_workers=1"])
    for source in (pets, f"tfds:{tmp_path / 'packed'}"):
        for shots in (1, 2):
            few = few_shot(open_source(source, split), shots, seed=0)
            assert counts_of(few) == {0: shots, 1: shots}
            assert len(set(names(few, range(len(few))))) == 2 * shots


def test_shots_of_combined_sources_are_those_of_all_together(pets, strays):
    source = open_source(f"mix:{pets},{strays}@all", "train")
    assert counts_of(few_shot(source, 2, seed=0)) == {0: 2, 1: 2}


def test_shots_are_chosen_in_proportion_to_the_weights(pets, strays):
    def strays_among(weights: str) -> int:
        source = open_source(weights.format(pets, strays), "train")
        subsets = [few_shot(source, 1, seed) for seed in range(60)]
        return sum("strays" in name for few in subsets for name in names(few, (0, 1)))

    # Of 120 images, 120 * 10 / 50 = 24 are expected if all are equally likely; the
    # weights 0.05 and 20 make 2 and 115.
    assert strays_among("mix:20*{},1*{}@all") < 10
    assert 10 < strays_among("mix:4*{},1*{}@all") < 45
    assert strays_among("mix:1*{},20*{}@all") > 90


def test_more_shots_contain_the_fewer(pets):
    source = open_source(pets, "train+val")
    one, three = (few_shot(source, shots, seed=5) for shots in (1, 3))
    assert set(names(one, range(2))) < set(names(three, range(6)))


def test_shots_of_folders_are_chosen_without_reading_images(pets):
    class Unread(FolderSource):
        def __getitem__(self, index):
            raise AssertionError("an image was read")

    path = pets.removeprefix("folder:")
    parts = (Unread(path, "train"), Unread(path, "val"))
    assert len(few_shot(Combined(parts, (1.0, 1.0)), 2, seed=0)) == 4


def test_a_class_with_too_few_images_is_named(pets):
    with pytest.raises(UserError, match=r"shots=13, but .* has only 12 of class 'cat'"):
        few_shot(open_source(pets, "train"), 13, seed=0)
    # All images of both splits count.
    assert len(few_shot(open_source(pets, "train+val"), 15, seed=0)) == 30
    message = "15 of class 'cat', 30 of class 'dog'; lower data.shots"
    with pytest.raises(UserError, match=message):
        few_shot(open_source(pets, "train+val"), 31, seed=0)


# Fewer images than a batch.


def test_a_batch_may_be_larger_than_the_split():
    source = FakeSource("train", (8, 8, 1), 2, 7)
    whole = batches(source, steps=range(3), batch_size=24)
    indices = np.concatenate([batch["index"] for batch in whole])
    expected = np.concatenate([permutation(0, epoch, 7) for epoch in range(11)])
    assert indices.tolist() == expected[:72].tolist()


@pytest.mark.parametrize(
    "split", ["train", "train[:50%]", "train+val", "val[1:]+train[:3]"]
)
def test_the_labels_of_a_source_are_those_of_its_examples(pets, split):
    source = open_source(pets, split)
    for opened in (source, with_classes(source, ("dog", "bird", "cat"))):
        labels = [opened[index][1] for index in range(len(opened))]
        np.testing.assert_array_equal(labels_of(opened), labels)


# Images that are held out.


def held_out_names(folder: str, *, seed=0, fraction=0.2, split="train") -> list[str]:
    """Returns the paths below the folder of the images that are held out."""
    _, held_out = hold_out(open_source(folder, split), fraction, seed)
    top = folder.removeprefix("folder:")
    return [name.removeprefix(top) for name in names(held_out, range(len(held_out)))]


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_the_same_fraction_of_each_class_is_held_out(fraction, tmp_path):
    counts = {"train/a": 2, "train/b": 5, "train/c": 40}
    source = open_source(write_pictures(tmp_path, counts), "train")
    kept, held_out = hold_out(source, fraction, 0)
    expected = {
        label: min(max(round(n * fraction), 1), n - 1)
        for label, n in enumerate(counts.values())
    }
    assert counts_of(held_out) == expected
    together = names(kept, range(len(kept))) + names(held_out, range(len(held_out)))
    assert sorted(together) == sorted(names(source, range(len(source))))
    assert kept.classes == held_out.classes == ("a", "b", "c")


def test_images_are_held_out_by_the_seed_and_their_names_wherever_they_are(tmp_path):
    counts = {"train/cat": 30, "train/dog": 30}
    here = write_pictures(tmp_path / "here", counts)
    there = write_pictures(tmp_path / "elsewhere/there", counts)
    assert held_out_names(here) == held_out_names(there)
    assert held_out_names(here) != held_out_names(here, seed=1)
    # Most of the 12 stay held out when images are added: of the 12 new ones, about a
    # fifth are held out, and two of these are in addition to the 12.
    more = write_pictures(tmp_path / "more", {"train/cat": 36, "train/dog": 36})
    assert len(set(held_out_names(here)) & set(held_out_names(more))) >= 9


def test_the_order_of_the_rows_of_a_table_does_not_change_what_is_held_out(tmp_path):
    pictures = write_pictures(tmp_path, {"a": 10, "b": 10})
    source = open_source(pictures, "train")
    lines = [f"{path},{path[0]}" for path in source.paths]
    chosen = []
    for ordered in (lines, lines[::-1]):
        (tmp_path / "t.csv").write_text("\n".join(["path,label", *ordered]))
        chosen.append(sorted(held_out_names(f"csv:{tmp_path}/t.csv")))
    assert chosen[0] == chosen[1]
    assert [name.removeprefix(str(tmp_path)) for name in chosen[0]] == sorted(
        held_out_names(pictures)
    )


@pytest.mark.parametrize(
    "split", ["train+train", "train[:60%]+train[40%:]", "train+val+train", "all"]
)
def test_an_image_that_occurs_twice_is_in_one_part(split, pets, tmp_path):
    main(["prepare", pets, f"--out={tmp_path / 'packed'}", "--num_workers=1"])
    for source in (pets, f"tfds:{tmp_path / 'packed'}"):
        parts = hold_out(open_source(source, split), 0.4, 0)
        kept, held_out = (set(names(part, range(len(part)))) for part in parts)
        assert kept and held_out
        assert not kept & held_out
        # It is evaluated once.
        assert len(parts[1]) == len(held_out)


def test_a_class_with_one_image_cannot_be_split(tmp_path):
    folder = write_pictures(tmp_path, {"train/cat": 3, "train/emu": 1})
    with pytest.raises(UserError, match=r"'emu' of .* only one image.*eval_source="):
        hold_out(open_source(folder, "train"), 0.2, 0)
    with pytest.raises(UserError, match=r"'emu' of .* has only one image"):
        hold_out(open_source(folder, "train+train"), 0.2, 0)


def test_no_images_of_a_combination_by_weight_are_held_out(pets, strays):
    source = open_source(f"mix:3*{pets},{strays}@all", "train")
    with pytest.raises(UserError, match=r"since its parts have weights.*eval_source="):
        hold_out(source, 0.2, 0)


# Balanced classes.


@pytest.fixture(scope="module")
def rare(tmp_path_factory) -> Balanced:
    """A balanced source of 40, 13, 7 and 2 images of four classes: 1:20."""
    counts = {"train/a": 40, "train/b": 13, "train/c": 7, "train/d": 2}
    folder = write_pictures(tmp_path_factory.mktemp("rare"), counts)
    return balanced(open_source(folder, "train"))


def epochs_of(source, epochs: int, seed: int = 0) -> list[np.ndarray]:
    return [epoch_order(seed, epoch, *turns_of(source))[0] for epoch in range(epochs)]


def test_a_balanced_source_has_the_same_examples_and_length(rare):
    assert len(rare) == len(rare.source) == 62
    assert counts_of(rare) == {0: 40, 1: 13, 2: 7, 3: 2}
    assert labels_of(rare).tolist() == [rare[i][1] for i in range(62)]
    assert rare.digest() == rare.source.digest()
    assert {len(indices) for indices in epochs_of(rare, 9)} == {62}


def test_the_classes_of_a_balanced_source_are_drawn_equally_often(rare):
    orders = epochs_of(rare, 100)
    counts = np.bincount(labels_of(rare)[np.concatenate(orders)])
    assert counts.tolist() == [1550] * 4
    # An epoch has 15 or 16 images of each class.
    for indices in orders:
        assert set(np.bincount(labels_of(rare)[indices])) <= {15, 16}
    # A class has no fixed place in an epoch: 7 is 4 standard deviations, of 1.7, of the
    # number in one of two halves, and less than half of the class.
    halves = np.array([indices[:31] for indices in orders[:10]])
    for half in labels_of(rare)[halves]:
        assert np.abs(np.bincount(half, minlength=4) - 7.75).max() < 7


def test_the_images_of_a_class_are_drawn_equally_often(rare):
    drawn = np.bincount(np.concatenate(epochs_of(rare, 7)), minlength=62)
    for label in range(4):
        times = drawn[labels_of(rare) == label]
        assert times.max() - times.min() <= 1


def test_balanced_batches_do_not_depend_on_processes_workers_memory_or_restarts(rare):
    whole = batches(rare, steps=range(14))
    for batch, again in zip(
        whole[9:], batches(rare, steps=range(9, 14), workers=1), strict=True
    ):
        np.testing.assert_array_equal(batch["image"], again["image"])
    in_memory = batches(cached(rare, 3, "ram"), steps=range(14))
    examples = Examples(
        source=rare,
        augment=Augment(size=8, crop="pad", pad=1, flip=True),
        channels=3,
        skip_bad=False,
    )
    of_two = []
    for rows in (range(5), range(5, 10)):
        with train_batches(
            examples, seed=0, batch_size=10, steps=range(14), rows=rows, num_workers=0
        ) as made:
            of_two.append(list(made))
    for batch, kept, first, second in zip(whole, in_memory, *of_two, strict=True):
        np.testing.assert_array_equal(batch["image"], kept["image"])
        both = np.concatenate([first["image"], second["image"]])
        np.testing.assert_array_equal(batch["image"], both)


def test_a_combination_by_weight_cannot_be_balanced_but_a_sum_of_splits_can(
    pets, strays
):
    with pytest.raises(UserError, match=r"data\.balance=True .* has weights"):
        balanced(open_source(f"mix:3*{pets},{strays}@all", "train"))
    both = balanced(open_source(pets, "train+val"))
    assert both.sizes == (15, 30)
    few = balanced(few_shot(open_source(f"mix:3*{pets},{strays}@all", "train"), 3, 0))
    assert few.sizes == (3, 3)


def test_a_class_without_images_has_no_share_of_a_balanced_epoch():
    labels = np.array([0, 2, 2, 2])
    images = np.zeros((4, 8, 8, 3), np.uint8)
    source = balanced(MemorySource(images, labels, ("a", "b", "c")))
    drawn = np.concatenate(epochs_of(source, 2))
    assert np.bincount(labels_of(source)[drawn]).tolist() == [4, 0, 4]
