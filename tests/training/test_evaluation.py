"""Exact evaluation: every image once, whatever the batch and the devices."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from resnet_jax.data.sources import FakeSource
from resnet_jax.errors import BadImageError, UserError
from resnet_jax.reports.samples import SamplePredictions
from resnet_jax.training.evaluation import Evaluation, evaluate
from resnet_jax.training.experiment import Setup
from resnet_jax.training.step import TrainState
from tests.helpers import tiny

SIZE = 37  # a prime, so that no batch and no number of devices divides it


@pytest.fixture(scope="module", params=[16, 64], ids=["batch 16", "batch 64"])
def evaluated(request) -> tuple[Setup, object, TrainState]:
    """Setup, compiled step and a state with an average; 64 is more than the split."""
    changes = {
        "data.source": f"fake:10:{SIZE}",
        "evaluate.batch_size": request.param,
        "ema_decay": 0.9,
    }
    setup = tiny.setup(changes)
    return setup, setup.compile_eval_step(), tiny.state(setup)


def run(setup: Setup, eval_step, state: TrainState, **changes) -> Evaluation:
    """Evaluates with nothing special."""
    arguments = {"after_batch": lambda: None, "samples": SamplePredictions()}
    return evaluate(setup, eval_step, state, **(arguments | changes))


def one_by_one(setup: Setup, state: TrainState, leave_out=()) -> dict[str, float]:
    """The same by a loop over single images, in float64 behind the network."""
    apply = jax.jit(setup.model.apply)
    top1, top5, losses = [], [], []
    for index in sorted(set(range(SIZE)) - set(leave_out)):
        example = setup.test.eval([index])
        image = (example["image"] / np.float32(255) - 0.5) / np.float32(0.5)
        logits = np.asarray(apply(state.ema, image.astype(np.float32)), np.float64)[0]
        label = example["label"][0]
        order = np.argsort(-logits, kind="stable").tolist()
        top1.append(order[0] == label)
        top5.append(label in order[:5])
        losses.append(np.log(np.exp(logits).sum()) - logits[label])
    return {
        "top1": np.mean(top1).item(),
        "top5": np.mean(top5).item(),
        "loss": np.mean(losses).item(),
    }


def assert_equal(result: Evaluation, expected: dict[str, float]) -> None:
    """Equal, to the rounding of sums where there is any."""
    assert result.top1 == pytest.approx(expected["top1"], rel=1e-12)  # counts
    assert result.top5 == pytest.approx(expected["top5"], rel=1e-12)
    # Logits near 10 are computed in float32, in another order: some 10 x 2^-22.
    assert result.loss == pytest.approx(expected["loss"], rel=1e-5)


def replace_source(setup: Setup, source, skip_bad: bool) -> Setup:
    """The setup with another test split."""
    test = dataclasses.replace(setup.test, source=source, skip_bad=skip_bad)
    return dataclasses.replace(setup, test=test)


def test_an_evaluation_equals_a_loop_over_single_images(evaluated):
    setup, _, state = evaluated
    expected = one_by_one(setup, state)
    # Neither all nor none, or half of the test would be empty.
    assert 0 < expected["top1"] < expected["top5"] < 1
    result = run(*evaluated)
    assert_equal(result, expected)
    assert (result.n_seen, result.bad_images) == (SIZE, [])
    assert result.scalars() == {
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "n_seen": SIZE,
    }


def test_padding_never_enters(evaluated, monkeypatch):
    clean = run(*evaluated)
    batches_of = Setup.eval_batches
    padded = []

    @contextlib.contextmanager
    def with_junk(setup):
        def spoil(batch):
            rows = ~batch["mask"]
            padded.append(rows.sum())
            image, label = batch["image"].copy(), batch["label"].copy()
            image[rows], label[rows] = 255, np.arange(rows.sum()) % 10
            return batch | {"image": image, "label": label}

        with batches_of(setup) as batches:
            yield map(spoil, batches)

    monkeypatch.setattr(Setup, "eval_batches", with_junk)
    assert run(*evaluated) == clean
    assert sum(padded) == -SIZE % evaluated[0].eval_batch_size


@pytest.mark.parametrize("seen", ["too few", "too many"])
def test_an_image_too_few_or_too_many_is_an_error(evaluated, monkeypatch, seen):
    setup = evaluated[0]
    batches_of = Setup.eval_batches
    size = setup.eval_batch_size

    @contextlib.contextmanager
    def miscounted(setup):
        with batches_of(setup) as batches:
            whole = list(batches)
        if seen == "too many":
            yield iter([*whole, whole[0]])
        else:
            yield iter(whole[:-1])

    monkeypatch.setattr(Setup, "eval_batches", miscounted)
    number = SIZE // size * size if seen == "too few" else SIZE + min(size, SIZE)
    with pytest.raises(UserError, match=f"saw {number} images .* split has {SIZE}"):
        run(*evaluated)


class Holey(FakeSource):
    """Some of its images cannot be decoded."""

    holes = (3, 17, 36)

    def __getitem__(self, index: int):
        image, label = super().__getitem__(index)
        return (b"no image" if index in self.holes else image), label


def test_bad_images_are_passed_over_and_counted(evaluated):
    setup, eval_step, state = evaluated
    holey = Holey("validation", (8, 8, 1), 10, SIZE)
    result = run(replace_source(setup, holey, skip_bad=True), eval_step, state)
    assert result.bad_images == list(Holey.holes)
    assert result.n_seen == SIZE - 3
    assert_equal(result, one_by_one(setup, state, leave_out=Holey.holes))


def test_a_bad_image_stops_the_evaluation_and_is_named(evaluated):
    setup, eval_step, state = evaluated
    holey = Holey("validation", (8, 8, 1), 10, SIZE)
    with pytest.raises(BadImageError, match="fake/validation/3: cannot be decoded"):
        run(replace_source(setup, holey, skip_bad=False), eval_step, state)


def test_a_split_without_one_good_image_is_an_error(evaluated):
    class Rotten(Holey):
        holes = range(SIZE)

    setup, eval_step, state = evaluated
    rotten = Rotten("validation", (8, 8, 1), 10, SIZE)
    with pytest.raises(UserError, match="no image to evaluate"):
        run(replace_source(setup, rotten, skip_bad=True), eval_step, state)


def test_the_samples_takes_right_and_wrong_images_and_no_padding(evaluated):
    setup, _, _ = evaluated
    samples = SamplePredictions(wanted=2)
    run(*evaluated, samples=samples)
    assert sorted(row["right"] for row in samples.rows) == [False, False, True, True]
    pictures = [setup.test.eval([index]) for index in range(SIZE)]
    for row in samples.rows:
        assert row["right"] == (row["predicted"] == row["label"])
        assert 0.1 < row["probability"] <= 1  # the largest of ten
        assert any(
            row["label"] == picture["label"]
            and (row["image"] == picture["image"][0]).all()
            for picture in pictures
        )


def test_an_unfilled_samples_holds_every_image_once(evaluated):
    samples = SamplePredictions(wanted=1000)
    result = run(*evaluated, samples=samples)
    assert len(samples.rows) == SIZE
    right = sum(row["right"] for row in samples.rows)
    assert right / SIZE == pytest.approx(result.top1, rel=1e-12)


def test_after_batch_is_called_for_each_batch_and_may_stop(evaluated):
    setup = evaluated[0]
    calls = []
    run(*evaluated, after_batch=lambda: calls.append(1))
    assert len(calls) == -(-SIZE // setup.eval_batch_size)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(*evaluated, after_batch=stop)


@pytest.mark.parametrize("views", ["flip", "ten_crop"])
def test_several_views_count_by_the_mean_of_their_logits(views):
    setup = tiny.setup(
        {
            "data.source": f"fake:10:{SIZE}",
            "data.crop_fraction": 0.5,
            "evaluate.views": views,
            "ema_decay": 0.9,
        }
    )
    state = tiny.state(setup)
    samples = SamplePredictions()
    result = run(setup, setup.compile_eval_step(), state, samples=samples)
    apply = jax.jit(setup.model.apply)
    right, losses = [], []
    for index in range(SIZE):
        example = setup.test.eval([index])
        images = example["image"]
        if views == "ten_crop":
            assert images.shape[:2] == (1, 5)
            (images,) = images
        images = np.concatenate([images, images[:, :, ::-1]])
        images = (images / np.float32(255) - 0.5) / np.float32(0.5)
        logits = np.asarray(apply(state.ema, images.astype(np.float32)), np.float64)
        # Or the test would tell nothing of the mean.
        assert logits.std(axis=0).max() > 1e-3
        logits, label = logits.mean(axis=0), example["label"][0]
        right.append(np.argmax(logits) == label)
        losses.append(np.log(np.exp(logits).sum()) - logits[label])
    assert result.top1 == pytest.approx(np.mean(right), rel=1e-12)
    # As for single views.
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert {row["image"].shape for row in samples.rows} == {(8, 8, 1)}


def test_unknown_views_are_told():
    with pytest.raises(UserError, match=r"evaluate\.views='ten'.* mean ten_crop"):
        tiny.setup({"evaluate.views": "ten"})


def test_images_may_be_evaluated_at_another_size():
    setup = tiny.setup({"data.source": f"fake:10:{SIZE}", "data.eval_size": 12})
    assert setup.batch_like(16, "image")["image"].shape == (16, 8, 8, 1)
    state = tiny.state(setup)
    result = run(setup, setup.compile_eval_step(), state)
    apply = jax.jit(setup.model.apply)
    logits = []
    for index in range(SIZE):
        image = setup.test.eval([index])["image"]
        assert image.shape == (1, 12, 12, 1)
        image = (image / np.float32(255) - 0.5) / np.float32(0.5)
        logits.append(apply(state.evaluated(), image.astype(np.float32))[0])
    labels = np.arange(SIZE) % 10
    assert result.top1 == pytest.approx(np.mean(np.argmax(logits, axis=1) == labels))
