"""The throughput meter tells a user whose devices wait for data, once."""

import jax.numpy as jnp
import pytest

from resnet_jax.errors import UserError
from resnet_jax.persistence.checkpoints import Progress
from resnet_jax.persistence.metric_writers import Writer
from resnet_jax.training.experiment import Experiment
from resnet_jax.training.meter import ThroughputMeter
from tests.helpers import tiny
from tests.helpers.pictures import encode, noise, write_folder


class Rows(Writer):
    """A writer that keeps the rows."""

    def __init__(self):
        self.values = []

    def train(self, step, values, eta):
        self.values.append(values | {"eta": eta})


class Clock:
    """A clock that tests set."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def metrics_of(loss: float = 1.0) -> dict:
    """Returns the metrics of a step that is done at once."""
    ones = {key: jnp.ones(()) for key in ("top1", "grad_norm")}
    return ones | {"loss": jnp.float32(loss)}


def measure(experiment: Experiment, fetching: float) -> tuple[Rows, Progress]:
    """Returns the rows and the progress of twelve steps, which take 0.25 s each.

    Args:
      experiment: The experiment.
      fetching: The seconds in which each batch is fetched.
    """
    rows, progress, clock = Rows(), Progress(), Clock()
    meter = ThroughputMeter(experiment, progress, rows, clock)
    # Three measurements, since the first one includes the start of the loader.
    for _ in range(3):
        for _ in range(4):
            with meter.waiting():
                clock.now += fetching
            meter.add(metrics_of())
            clock.now += 0.25
            progress.step += 1
        meter.flush()
    return rows, progress


@pytest.mark.parametrize(("fetching", "warnings"), [(0.25, 1), (0.0, 0)])
def test_devices_that_wait_for_data_are_reported_once(fetching, warnings, caplog):
    rows, progress = measure(tiny.setup(), fetching)
    assert caplog.text.count("The devices waited for images") == warnings
    # Binary fractions, so that the quotients are exact.
    assert rows.values[-1]["data_wait"] == fetching / (fetching + 0.25)
    # Batches of 16 images.
    assert rows.values[-1]["images_per_second"] == 16 / (fetching + 0.25)
    assert progress.seconds == 12 * (fetching + 0.25)


@pytest.mark.parametrize(("cache", "in_memory"), [("small", True), ("none", False)])
def test_remedies_for_decoding_are_named_only_where_images_are_decoded(
    cache, in_memory, tmp_path, caplog
):
    image = encode(noise(0, 8, 8), "PNG")
    names = [f"train/{label}/{index}.png" for label in "ab" for index in range(16)]
    source = write_folder(tmp_path, dict.fromkeys(names, image))
    changes = {"data.source": source, "data.eval_split": "train", "data.cache": cache}
    measure(tiny.setup(changes), fetching=0.25)
    assert "more cores for each device" in caplog.text
    assert ("--config.data.cache=ram" in caplog.text) is not in_memory
    assert ("--max_side=400" in caplog.text) is not in_memory


def test_fetching_while_the_devices_work_is_not_waiting():
    class Running:
        def is_ready(self):
            return False

    clock = Clock()
    rows, progress = Rows(), Progress(step=2)
    meter = ThroughputMeter(tiny.setup(), progress, rows, clock)
    meter.add(metrics_of() | {"loss": Running()})
    with meter.waiting():
        clock.now += 1.0
    # The step is done by the end of the measurement.
    meter._pending[-1]["loss"] = jnp.ones(())
    meter.flush()
    assert rows.values[-1]["data_wait"] == 0


def test_the_logged_learning_rate_is_that_of_the_last_step():
    rows, clock = Rows(), Clock()
    progress = Progress(step=3, plateau={"best": 0.5, "bad": 0, "factor": 0.25})
    experiment = tiny.setup()
    meter = ThroughputMeter(experiment, progress, rows, clock)
    meter.add(metrics_of())
    clock.now = 1.0
    meter.flush()
    # The third update follows two others.
    assert rows.values[-1]["learning_rate"] == float(experiment.schedule(2)) * 0.25


def test_steps_whose_loss_is_not_finite_are_an_error_that_names_the_first():
    progress = Progress()
    meter = ThroughputMeter(tiny.setup(), progress, Rows(), Clock())
    for loss in (1.0, float("nan"), float("inf")):
        progress.step += 1
        meter.add(metrics_of(loss))
    with pytest.raises(UserError, match="not finite at step 2 and 1 later ones"):
        meter.settle()
