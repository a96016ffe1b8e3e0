"""What the loop tells of its speed."""

import contextlib
import time

import jax.numpy as jnp
import pytest

from resnet_jax.checkpoints import Progress
from resnet_jax.train import Meter
from resnet_jax.writers import Writer
from tests import tiny


class Rows(Writer):
    """Keeps what a writer would write."""

    def __init__(self):
        self.values = []

    def train(self, step, values, eta):
        self.values.append(values)


@pytest.mark.parametrize(("fetching", "told"), [(0.2, 1), (0.0, 0)])
def test_devices_that_wait_for_data_are_told_once(fetching, told, caplog):
    rows = Rows()
    progress = Progress()
    meter = Meter(tiny.setup(), progress, rows)
    # The first time is the start of the loader.
    for _ in range(3):
        for _ in range(3):
            with meter.waiting():
                if fetching:
                    time.sleep(fetching)
            # The computation takes no time: the devices are done at once.
            meter.add({key: jnp.ones(()) for key in ("loss", "top1", "grad_norm")})
            time.sleep(0.05)
            progress.step += 1
        meter.flush()
    assert caplog.text.count("The devices waited for images") == told
    expected = fetching / (fetching + 0.05)
    assert rows.values[-1]["data_wait"] == pytest.approx(expected, abs=0.2)


def test_fetching_while_the_devices_work_is_no_waiting():
    class Busy:
        def is_ready(self):
            return False

    meter = Meter(tiny.setup(), Progress(), Rows())
    meter.add({"loss": Busy()})
    with contextlib.ExitStack() as stack:
        stack.enter_context(meter.waiting())
        time.sleep(0.02)
    assert meter._waited == 0
