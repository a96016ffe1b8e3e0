"""Evaluation sees every image once, for any batch size and number of devices."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from resnet_jax.data.sources import FakeSource
from resnet_jax.data.user_data import OwnSource
from resnet_jax.errors import BadImageError, UserError
from resnet_jax.reports.samples import SamplePredictions
from resnet_jax.training.evaluation import Evaluation, evaluate
from resnet_jax.training.experiment import Experiment
from resnet_jax.training.programs import compile_eval_steps, train_batch_like
from resnet_jax.training.step import TrainState
from tests.helpers import tiny
from tests.helpers.pictures import encode, noise

SIZE = 37  # a prime, so that no batch size and no number of devices divides it


@pytest.fixture(scope="module", params=[16, 64], ids=["batch 16", "batch 64"])
def evaluated(request) -> tuple[Experiment, dict, TrainState]:
    """An experiment, its compiled steps and a state with an EMA.

    A batch of 64 is larger than the split.
    """
    changes = {
        "data.source": f"fake:10:{SIZE}",
        "evaluate.batch_size": request.param,
        "ema_decay": 0.9,
    }
    experiment = tiny.setup(changes)
    return experiment, compile_eval_steps(experiment), tiny.state(experiment)


def run(experiment, eval_steps, state, **changes) -> Evaluation:
    """Evaluates the eval split, with nothing that could stop it."""
    arguments = {"after_batch": lambda: None, "samples": SamplePredictions()}
    arguments |= changes
    return evaluate(experiment, experiment.eval, eval_steps, state, **arguments)


def evaluate_one_by_one(experiment, state, leave_out=()) -> dict[str, float]:
    """Evaluates single images in a loop, in float64 after the network."""
    apply = jax.jit(experiment.model.apply)
    top1, top5, losses = [], [], []
    for index in sorted(set(range(SIZE)) - set(leave_out)):
        example = experiment.eval.eval([index])
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
    """Compares results, to the rounding of sums where there is any."""
    assert result.top1 == pytest.approx(expected["top1"], rel=1e-12)  # counts
    assert result.top5 == pytest.approx(expected["top5"], rel=1e-12)
    # Logits near 10 are computed in float32, in another order: some 10 x 2^-22.
    assert result.loss == pytest.approx(expected["loss"], rel=1e-5)


def replace_source(experiment, source, skip_bad: bool) -> Experiment:
    """Returns the experiment with another eval split."""
    examples = dataclasses.replace(experiment.eval, source=source, skip_bad=skip_bad)
    return dataclasses.replace(experiment, eval=examples)


def change_batches(experiment, change) -> Experiment:
    """Returns the experiment with other evaluation batches: `change(batches)`."""

    class Changed(Experiment):
        @contextlib.contextmanager
        def eval_batches(self, examples):
            with super().eval_batches(examples) as batches:
                yield change(batches)

    fields = dataclasses.fields(Experiment)
    return Changed(**{field.name: getattr(experiment, field.name) for field in fields})


def test_an_evaluation_equals_a_loop_over_single_images(evaluated):
    experiment, _, state = evaluated
    expected = evaluate_one_by_one(experiment, state)
    # Some are right and some wrong, so that both are tested.
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


def test_padding_does_not_change_the_result(evaluated):
    experiment, eval_steps, state = evaluated
    padded = []

    def spoil(batch):
        rows = ~batch["mask"]
        padded.append(rows.sum())
        image, label = batch["image"].copy(), batch["label"].copy()
        image[rows], label[rows] = 255, np.arange(rows.sum()) % 10
        return batch | {"image": image, "label": label}

    spoilt = change_batches(experiment, lambda batches: map(spoil, batches))
    assert run(spoilt, eval_steps, state) == run(*evaluated)
    assert sum(padded) == -SIZE % experiment.eval_batch_size


def leave_out_the_last(batches):
    return iter(list(batches)[:-1])


def repeat_the_first(batches):
    every = list(batches)
    return iter([*every, every[0]])


@pytest.mark.parametrize("change", [leave_out_the_last, repeat_the_first])
def test_images_that_are_missing_or_seen_twice_are_an_error(evaluated, change):
    experiment, eval_steps, state = evaluated
    size = experiment.eval_batch_size
    seen = SIZE + min(size, SIZE)
    if change is leave_out_the_last:
        seen = SIZE // size * size
    with pytest.raises(UserError, match=f"saw {seen} images .* split has {SIZE}"):
        run(change_batches(experiment, change), eval_steps, state)


class Holey(FakeSource):
    """A source some of whose images cannot be decoded."""

    holes = (3, 17, 36)

    def __getitem__(self, index: int):
        image, label = super().__getitem__(index)
        return (b"no image" if index in self.holes else image), label


def test_bad_images_are_skipped_and_counted(evaluated):
    experiment, eval_steps, state = evaluated
    holey = Holey("validation", (8, 8, 1), 10, SIZE)
    result = run(replace_source(experiment, holey, skip_bad=True), eval_steps, state)
    assert result.bad_images == list(Holey.holes)
    assert result.n_seen == SIZE - 3
    assert_equal(result, evaluate_one_by_one(experiment, state, leave_out=Holey.holes))


@pytest.mark.parametrize("gone", ["nothing.png", ""])
def test_a_users_source_may_hold_paths_that_cannot_be_read(tmp_path, evaluated, gone):
    (tmp_path / "a.png").write_bytes(encode(noise(0, 8, 8), "PNG"))

    class Paths(FakeSource):
        def __getitem__(self, index: int):
            _, label = super().__getitem__(index)
            return tmp_path / ("a.png" if index % 2 else gone), label

    experiment, eval_steps, state = evaluated
    paths = OwnSource(Paths("validation", (8, 8, 1), 10, SIZE), 1, "data")
    result = run(replace_source(experiment, paths, skip_bad=True), eval_steps, state)
    assert result.bad_images == list(range(0, SIZE, 2))
    with pytest.raises(BadImageError, match=r"data.on_bad_image=skip"):
        run(replace_source(experiment, paths, skip_bad=False), eval_steps, state)


def test_a_bad_image_stops_the_evaluation_and_is_named(evaluated):
    experiment, eval_steps, state = evaluated
    holey = Holey("validation", (8, 8, 1), 10, SIZE)
    with pytest.raises(BadImageError, match="fake/validation/3: cannot be decoded"):
        run(replace_source(experiment, holey, skip_bad=False), eval_steps, state)


def test_a_split_without_one_good_image_is_an_error(evaluated):
    class Rotten(Holey):
        holes = range(SIZE)

    experiment, eval_steps, state = evaluated
    rotten = Rotten("validation", (8, 8, 1), 10, SIZE)
    with pytest.raises(UserError, match="to evaluate, as 37 cannot be"):
        run(replace_source(experiment, rotten, skip_bad=True), eval_steps, state)


def test_samples_are_right_and_wrong_images_and_no_padding(evaluated):
    experiment, _, _ = evaluated
    samples = SamplePredictions(per_kind=2)
    run(*evaluated, samples=samples)
    assert sorted(row["right"] for row in samples.rows) == [False, False, True, True]
    pictures = [experiment.eval.eval([index]) for index in range(SIZE)]
    for row in samples.rows:
        assert row["right"] == (row["predicted"] == row["label"])
        assert 0.1 < row["probability"] <= 1  # the largest of ten
        assert any(
            row["label"] == picture["label"]
            and (row["image"] == picture["image"][0]).all()
            for picture in pictures
        )


def test_samples_that_want_more_than_there_are_hold_every_image_once(evaluated):
    samples = SamplePredictions(per_kind=1000)
    result = run(*evaluated, samples=samples)
    assert len(samples.rows) == SIZE
    right = sum(row["right"] for row in samples.rows)
    assert right / SIZE == pytest.approx(result.top1, rel=1e-12)


def test_after_batch_is_called_for_each_batch_and_may_raise_to_stop(evaluated):
    experiment = evaluated[0]
    calls = []
    run(*evaluated, after_batch=lambda: calls.append(1))
    assert len(calls) == -(-SIZE // experiment.eval_batch_size)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(*evaluated, after_batch=stop)


@pytest.mark.parametrize("views", ["flip", "ten_crop"])
def test_several_views_are_evaluated_by_the_mean_of_their_logits(views):
    experiment = tiny.setup(
        {
            "data.source": f"fake:10:{SIZE}",
            "data.crop_fraction": 0.5,
            "evaluate.views": views,
            "ema_decay": 0.9,
        }
    )
    state = tiny.state(experiment)
    samples = SamplePredictions()
    result = run(experiment, compile_eval_steps(experiment), state, samples=samples)
    apply = jax.jit(experiment.model.apply)
    right, losses = [], []
    for index in range(SIZE):
        example = experiment.eval.eval([index])
        images = example["image"]
        if views == "ten_crop":
            assert images.shape[:2] == (1, 5)
            (images,) = images
        images = np.concatenate([images, images[:, :, ::-1]])
        images = (images / np.float32(255) - 0.5) / np.float32(0.5)
        logits = np.asarray(apply(state.ema, images.astype(np.float32)), np.float64)
        # The logits of the views differ, so that their mean is tested.
        assert logits.std(axis=0).max() > 1e-3
        logits, label = logits.mean(axis=0), example["label"][0]
        right.append(np.argmax(logits) == label)
        losses.append(np.log(np.exp(logits).sum()) - logits[label])
    assert result.top1 == pytest.approx(np.mean(right), rel=1e-12)
    # As for single views.
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert {row["image"].shape for row in samples.rows} == {(8, 8, 1)}


def test_unknown_views_are_rejected_with_the_nearest():
    with pytest.raises(UserError, match=r"evaluate\.views='ten'.* mean ten_crop"):
        tiny.setup({"evaluate.views": "ten"})


def test_images_can_be_evaluated_at_another_size():
    experiment = tiny.setup({"data.source": f"fake:10:{SIZE}", "data.eval_size": 12})
    assert train_batch_like(experiment)["image"].shape == (16, 8, 8, 1)
    state = tiny.state(experiment)
    result = run(experiment, compile_eval_steps(experiment), state)
    apply = jax.jit(experiment.model.apply)
    logits = []
    for index in range(SIZE):
        image = experiment.eval.eval([index])["image"]
        assert image.shape == (1, 12, 12, 1)
        image = (image / np.float32(255) - 0.5) / np.float32(0.5)
        logits.append(apply(state.evaluated(), image.astype(np.float32))[0])
    labels = np.arange(SIZE) % 10
    assert result.top1 == pytest.approx(np.mean(np.argmax(logits, axis=1) == labels))
