"""Precise batch norm takes its statistics over training batches, after training."""

import jax
import numpy as np
import pytest

from resnet_jax.data.sources import FakeSource
from resnet_jax.errors import UserError
from resnet_jax.models.inputs import normalize
from resnet_jax.training.experiment import set_up
from resnet_jax.training.precise_bn import pool, precise_batch_norm
from tests.helpers import keyed, tiny


def test_pooled_statistics_are_those_of_all_values():
    values = 3 + keyed.generator("values").standard_normal((5, 100, 4))
    batches = [{"norm": {"mean": x.mean(axis=0), "var": x.var(axis=0)}} for x in values]
    got = pool(batches)["norm"]
    # One float32 rounding.
    np.testing.assert_allclose(got["mean"], values.mean(axis=(0, 1)), rtol=1e-6)
    np.testing.assert_allclose(got["var"], values.var(axis=(0, 1)), rtol=1e-6)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_statistics_are_those_of_the_batches_after_the_last_step(ema_decay):
    changes = {"precise_bn": 3, "model.bn_group_size": "global"}
    experiment = tiny.setup(changes | {"ema_decay": ema_decay})
    state = tiny.state(experiment, step=4)
    before = jax.device_get(state)
    seen = []
    after = precise_batch_norm(experiment, state, after_batch=lambda: seen.append(1))
    assert len(seen) == 3
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)

    # The stem's convolution is repeated here, since no norm has changed its input.
    data = experiment.config.data
    with experiment.train_batches(4, 7) as batches:
        images = np.concatenate([batch["image"] for batch in batches])
    images = normalize(jax.numpy.asarray(images), data.mean, data.std, np.float32)
    pairs = [(before.params, after.batch_stats)]
    if ema_decay:
        pairs.append((before.ema["params"], after.ema["batch_stats"]))
    for params, statistics in pairs:
        outputs = jax.lax.conv_general_dilated(
            images,
            params["stem_conv1"]["kernel"],
            (1, 1),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        outputs = np.asarray(outputs, np.float64).reshape(3, -1, outputs.shape[-1])
        n = outputs.shape[1]
        within = outputs.var(axis=1).mean(axis=0) * n / (n - 1)
        var = within + outputs.mean(axis=1).var(axis=0)
        stem = statistics["stem_norm1"]
        # Float32 sums of 3072 numbers.
        np.testing.assert_allclose(stem["mean"], outputs.mean((0, 1)), atol=1e-5)
        np.testing.assert_allclose(stem["var"], var, rtol=1e-5)


def test_a_network_without_batch_norm_is_rejected():
    with pytest.raises(UserError, match=r"precise_bn=2 .* model\.name="):
        tiny.setup({"precise_bn": 2, "model.overrides.norm": "none"})


class Counted:
    """A source that counts how often its images are read."""

    def __init__(self, source):
        self.source, self.classes, self.title = source, source.classes, source.title
        self.name, self.digest = source.name, source.digest
        self.reads = 0

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.reads += 1
        return self.source[index]


def test_the_training_split_is_decoded_once():
    source = Counted(FakeSource("train", (8, 8, 1), 10, 64))
    experiment = set_up(tiny.config({"precise_bn": 1}), train=source)
    # An evaluation alone does not read it.
    assert source.reads == 0
    reads = []
    for first in range(2):
        with experiment.train_batches(first, first + 1) as batches:
            next(batches)
        reads.append(source.reads)
    assert reads[0] == reads[1] >= len(source)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_global_ghost_batch_is_the_whole_batch_whatever_the_microbatches(
    microbatches,
):
    changes = {"precise_bn": 1, "model.bn_group_size": "global"}
    experiment = tiny.setup(changes | {"optim.microbatches": microbatches})
    assert experiment.model_of_whole_batch().bn_group_size == 16
    assert experiment.model.bn_group_size == 16 // microbatches
