"""Twenty steps of published recipes, tested against the code that they come from.

Both sides start from the same weights and see the same real images, in the same order
and without random augmentation. This project's side is the shortened recipe of
`configs/` with its compiled step. The hyperparameters of the other side are repeated
here as its source has them.

Both compute in float64. In float32, if the input of a rectifier rounds to the other
side of zero, its whole gradient is passed or stopped, and training amplifies this. The
losses of torch's own float32 run of ResNet-18 are 1e-4 from those of its float64 run at
the second step and 8e-2 at the twentieth, so a bound on them could not tell a wrong
decay from rounding.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import torch
import torchvision
from ml_collections import ConfigDict
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel
from torchvision.ops._utils import split_normalization_params
from torchvision.transforms import v2

# The helper is imported before keras, since it chooses Keras's backend.
from tests.oracles import keras_networks  # isort: skip
import keras

from resnet_jax import config as config_lib
from resnet_jax.models import ZOO
from resnet_jax.parallel import sharding
from resnet_jax.training import programs, step
from resnet_jax.training.experiment import Experiment, set_up
from resnet_jax.training.mixup import Drawn, Mix
from resnet_jax.training.step import TrainState
from resnet_jax.weights import SCHEMES
from resnet_jax.weights.naming import to_foreign
from tests.helpers import tiny
from tests.helpers.real_data import ROOT, real_data
from tests.oracles import networks

STEPS = 20
SIZE = 32
CLASSES = BATCH = 20

# Float64 rounds at 1e-16. The errors that were measured after twenty steps are 5e-14 of
# a loss if the losses fall, 1e-10 if the learning rate is so high that they rise, and
# 2e-10 of a tensor. Another form of Adam's eps causes 1e-4 in the second step, and a
# learning rate in float32 1e-8.
BOUND = 1e-9

# Fixtures are found by their names in this module.
keras_in_float64 = keras_networks.keras_in_float64


@pytest.fixture(scope="module")
def tiny_imagenet(tmp_path_factory) -> Path:
    """Unpacks real images of 20 classes, 64x64; returns their directory."""
    return unpack("tiny-imagenet-20", tmp_path_factory)


@pytest.fixture(scope="module")
def sign_digits(tmp_path_factory) -> Path:
    """Unpacks real images of 6 classes, 100x100; returns their directory."""
    return unpack("sign-digits", tmp_path_factory)


def unpack(name: str, tmp_path_factory) -> Path:
    """Unpacks a ZIP file of images; returns its directory."""
    directory = tmp_path_factory.mktemp("data")
    shutil.unpack_archive(real_data(f"{name}.zip"), directory)
    return directory / name


@pytest.fixture
def one_device(monkeypatch):
    """Gives runs a single device, so that a batch may have any size."""
    monkeypatch.setattr(sharding, "make_mesh", lambda: tiny.mesh_of(1))


@pytest.fixture
def torch_in_float64(in_float64, one_device):
    """Makes torch's libraries create float64 tensors, too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def with_64_bits(setup: Experiment) -> Experiment:
    """Widens the state of a run to 64 bits, its step included, which sets the rate."""
    wide = {"float32": "float64", "int32": "int64"}

    def init() -> TrainState:
        state = setup.init()
        return jax.tree.map(lambda x: x.astype(wide.get(x.dtype.name, x.dtype)), state)

    model = setup.model.clone(dtype=jnp.float64)
    return dataclasses.replace(setup, model=model, init=init)


def shorten(recipe: str, changes: dict) -> Experiment:
    """Sets a recipe up for twenty steps on one device, without augmentation."""
    config = config_lib.load(str(ROOT / "configs" / recipe))
    with config.ignore_type():
        # The fixture `in_float64` makes this float64.
        config.model.dtype = "float32"
        config.model.bn_group_size = "global"
        config.data.num_workers = 0
        config.data.image_size, config.data.eval_size = SIZE, 0
        config.data.train_crop, config.data.crop_fraction = "center", 1.0
        config.data.flip, config.data.policy = False, ""
        config.data.erase, config.data.repeats = 0.0, 1
        for key, value in changes.items():
            section, _, last = key.rpartition(".")
            part = config
            for name in filter(None, section.split(".")):
                part = part[name]
            part[last] = ConfigDict(value) if isinstance(value, dict) else value
    setup = set_up(config)
    assert setup.total_steps == STEPS
    return with_64_bits(setup)


def shorten_epochs(
    recipe: str, pictures: Path, epochs: int, changes: dict
) -> Experiment:
    """Sets a recipe up for so many epochs, each of which shows every image once."""
    changes = {
        "batch_size": BATCH,
        "total": {"epochs": epochs},
        "data.source": f"folder:{pictures}",
        "data.eval_split": "val",
        # Each batch has one image of each class.
        "data.shots": STEPS // epochs,
        **changes,
    }
    return shorten(recipe, changes)


@dataclasses.dataclass
class Run:
    """The record of twenty steps of this project.

    Attributes:
      setup: The run's setup.
      losses: The loss of each step.
      first: The state before the first step.
      last: The state after the last step.
      batches: The batches of the input pipeline.
    """

    setup: Experiment
    losses: list[float]
    first: TrainState
    last: TrainState
    batches: list[dict]

    @classmethod
    def train(cls, setup: Experiment) -> "Run":
        """Trains for as long as the setup says, and records it."""
        first = jax.device_get(programs.init_state(setup))
        state = jax.device_put(first, sharding.replicated(setup.mesh))
        train_step = programs.compile_train_step(setup)
        losses, seen = [], []
        with setup.train_batches(0) as batches:
            for batch in batches:
                state, metrics = train_step(state, setup.to_devices(batch))
                losses.append(float(metrics["loss"]))
                seen.append(batch)
        return cls(setup, losses, first, jax.device_get(state), seen)

    def tensors(self, variables: dict) -> dict[str, np.ndarray]:
        """Returns variables under the names of the other side."""
        scheme = SCHEMES[ZOO[self.setup.config.model.name].scheme]
        return to_foreign(variables, self.setup.model.spec, scheme)

    def images(self, batch: dict) -> np.ndarray:
        """Returns the normalised images [b, h, w, c] of a batch in float64."""
        mean, std = self.setup.config.data.mean, self.setup.config.data.std
        return (batch["image"] / 255 - np.array(mean)) / np.array(std)

    def mixing(self, number: int) -> Drawn:
        """Returns the random numbers by which a step mixed its batch."""
        key = jax.random.fold_in(jax.random.key(self.setup.config.seed), number)
        key = jax.random.fold_in(key, step.MIXING)
        return Mix.from_config(self.setup.config.mix).draw(key, 1, SIZE, SIZE)

    def assert_equals(self, losses: Sequence[float], tensors: dict) -> None:
        """Compares the losses, and the state after the last step."""
        assert len(losses) == len(self.losses) == STEPS
        assert max(self.losses) > 1.1 * min(self.losses)
        np.testing.assert_allclose(self.losses, losses, rtol=BOUND)
        state = {"params": self.last.params, "batch_stats": self.last.batch_stats}
        assert_tensors_equal(self.tensors(state), tensors)


def assert_tensors_equal(tensors: dict, expected: dict) -> None:
    """Compares tensors by name, each relative to its largest value."""
    assert tensors.keys() <= expected.keys()
    for name, value in tensors.items():
        # A bias before a norm stays at zero except for rounding, hence the minimum.
        scale = max(np.abs(expected[name]).max(), 0.1)
        error = np.abs(value - expected[name]).max() / scale
        assert error <= BOUND, f"{name}: {error:.1e}"


def train_torch(
    run: Run,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler,
    *,
    epochs: int,
    loss: Callable,
    mix: Callable = lambda images, labels, number: (images, labels),
    after_step: Callable[[int, int], None] = lambda epoch, i: None,
) -> list[float]:
    """Trains as the sources do, which step their schedulers once per epoch.

    Returns the loss of each step.
    """
    losses = []
    network.train()
    for number, batch in enumerate(run.batches):
        epoch, i = divmod(number, STEPS // epochs)
        images = networks.nchw(run.images(batch))
        images, labels = mix(images, torch.from_numpy(batch["label"]).long(), number)
        value = loss(network(images), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
        after_step(epoch, i)
        if i + 1 == STEPS // epochs:
            scheduler(epoch + 1)
    return losses


def load(network: nn.Module, run: Run) -> nn.Module:
    """Loads the initial weights of a run into a network, and returns the network."""
    first = {"params": run.first.params, "batch_stats": run.first.batch_stats}
    networks.load(network, run.tensors(first))
    return network


def test_twenty_steps_of_torchvision_v1(tiny_imagenet, torch_in_float64):
    # The source has 90 epochs with decays at 30 and 60.
    changes = {"optim.decay_at": ({"epochs": 2}, {"epochs": 4})}
    recipe = "torchvision_v1.py:resnet18"
    run = Run.train(shorten_epochs(recipe, tiny_imagenet, 5, changes))

    network = load(torchvision.models.resnet18(num_classes=CLASSES), run)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1 * BATCH / 256, momentum=0.9, weight_decay=1e-4
    )
    scheduler = lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    losses = train_torch(
        run,
        network,
        optimizer,
        lambda epoch: scheduler.step(),
        epochs=5,
        loss=nn.CrossEntropyLoss(),
    )
    run.assert_equals(losses, networks.arrays(network))


def mix_as_torchvision(run: Run, images, labels, number: int):
    """Mixes a batch by torchvision's transforms with the random numbers of a run."""
    mixing = run.mixing(number)
    mixup, cutmix = v2.MixUp(alpha=0.2), v2.CutMix(alpha=1.0)
    y1, y2, x1, x2 = mixing.box[0].tolist()
    area = (x2 - x1) * (y2 - y1) / SIZE**2
    mixup.make_params = lambda _: {"lam": mixing.lam.item()}
    cutmix.make_params = lambda _: {"box": (x1, y1, x2, y2), "lam_adjusted": 1 - area}
    # Labels are one-hot here, since the transforms would make them float32.
    labels = nn.functional.one_hot(labels, CLASSES).double()
    return (cutmix if mixing.cut.item() else mixup)(images, labels)


@pytest.mark.long
def test_twenty_steps_of_torchvision_v2(tiny_imagenet, torch_in_float64):
    rate = 0.5 * BATCH / 1024
    changes = {
        "model.overrides.stage_sizes": (1, 1, 1, 1),
        # The source has 600 epochs, of which 5 warm up, and an EMA every 32 steps.
        "optim.warmup": {"epochs": 2},
        "optim.warmup_from": 0.01 * rate,
        "ema_every": 2,
        # With this decay rate the EMA changes in as few steps.
        "ema_decay": 0.6,
    }
    recipe = "torchvision_v2.py:resnet50"
    run = Run.train(shorten_epochs(recipe, tiny_imagenet, 5, changes))
    assert {run.mixing(number).cut.item() for number in range(STEPS)} == {True, False}

    bottleneck = torchvision.models.resnet.Bottleneck
    network = torchvision.models.ResNet(bottleneck, [1, 1, 1, 1], num_classes=CLASSES)
    network = load(network, run)
    norms, others = split_normalization_params(network)
    groups = [
        {"params": norms, "weight_decay": 0.0},
        {"params": others, "weight_decay": 2e-5},
    ]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=2)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=5 - 2, eta_min=0.0)
    scheduler = lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[2])
    average = AveragedModel(
        network, avg_fn=lambda old, new, n: 0.6 * old + 0.4 * new, use_buffers=True
    )

    def update_average(epoch: int, i: int) -> None:
        # torchvision's references/classification/train.py does the same.
        if i % 2 == 0:
            average.update_parameters(network)
            if epoch < 2:
                average.n_averaged.fill_(0)

    losses = train_torch(
        run,
        network,
        optimizer,
        lambda epoch: scheduler.step(),
        epochs=5,
        loss=nn.CrossEntropyLoss(label_smoothing=0.1),
        mix=functools.partial(mix_as_torchvision, run),
        after_step=update_average,
    )
    run.assert_equals(losses, networks.arrays(network))
    assert_tensors_equal(run.tensors(run.last.ema), networks.arrays(average.module))


def mix_as_timm(run: Run, monkeypatch, images, labels, number: int):
    """Mixes a batch by timm's Mixup with the random numbers of a run."""
    mixing = run.mixing(number)
    mixup = timm.data.Mixup(
        mixup_alpha=0.1, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=CLASSES
    )
    mixup._params_per_batch = lambda: (mixing.lam.item(), mixing.cut.item())
    box = mixing.box[0].tolist()
    # timm computes the fraction of the pixels from the box itself.
    monkeypatch.setattr(timm.data.mixup, "rand_bbox", lambda *_, **__: box)
    return mixup(images, labels)


def test_twenty_steps_of_resnet_strikes_back_a2(
    tiny_imagenet, torch_in_float64, monkeypatch
):
    changes = {
        "model.overrides.stage_sizes": (1, 1, 1, 1),
        "model.overrides.drop_path": 0.0,
        # The source has 300 epochs, of which 5 warm up; its rate is not scaled.
        "optim.warmup": {"epochs": 2},
        "optim.learning_rate_batch": 0,
    }
    run = Run.train(shorten_epochs("rsb.py:a2", tiny_imagenet, 5, changes))
    assert {run.mixing(number).cut.item() for number in range(STEPS)} == {True, False}

    network = timm.create_model("resnet50", num_classes=CLASSES, layers=(1, 1, 1, 1))
    network = load(network, run)
    optimizer = timm.optim.create_optimizer_v2(
        network, opt="lamb", lr=5e-3, weight_decay=0.02
    )
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer, "cosine", 5, warmup_epochs=2, warmup_lr=1e-4, min_lr=1e-6
    )
    losses = train_torch(
        run,
        network,
        optimizer,
        scheduler.step,
        epochs=5,
        loss=timm.loss.BinaryCrossEntropy(smoothing=0.0, target_threshold=0.2),
        mix=functools.partial(mix_as_timm, run, monkeypatch),
    )
    run.assert_equals(losses, networks.arrays(network))


@pytest.mark.long
def test_twenty_steps_of_wide_resnet(tiny_imagenet, torch_in_float64):
    changes = {
        # This makes it WRN-16-1.
        "model.overrides.stage_sizes": (2, 2, 2),
        "model.overrides.widths": (16, 32, 64),
        # The source has 200 epochs with decays at 60, 120 and 160.
        "optim.decay_at": ({"epochs": 3}, {"epochs": 6}, {"epochs": 8}),
    }
    run = Run.train(shorten_epochs("wrn_28_10.py", tiny_imagenet, 10, changes))

    network = networks.Preact((2, 2, 2), (16, 32, 64), False, "projection")
    network.head.fc = nn.Conv2d(64, CLASSES, 1)
    network = load(network, run)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    scheduler = lr_scheduler.MultiStepLR(optimizer, [3, 6, 8], gamma=0.2)
    losses = train_torch(
        run,
        network,
        optimizer,
        lambda epoch: scheduler.step(),
        epochs=10,
        loss=nn.CrossEntropyLoss(),
    )
    run.assert_equals(losses, networks.arrays(network))


@pytest.fixture
def keras_takes_float64(keras_in_float64):
    """Makes Keras's training loop keep float64 input, too."""
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")


@pytest.mark.long
def test_twenty_steps_of_the_tutorial_in_keras(
    sign_digits, keras_takes_float64, one_device
):
    changes = {
        "model.overrides.stage_sizes": (1, 1, 1, 1),
        "batch_size": 8,
        "data.source": f"folder:{sign_digits}",
        # The network's pooling reduces images of this size to one pixel.
        "data.image_size": 64,
        "total": {"steps": STEPS},
    }
    run = Run.train(shorten("tutorial.py:20", changes))

    network = keras_networks.tutorial(64, stage_sizes=(1, 1, 1, 1))
    first = {"params": run.first.params, "batch_stats": run.first.batch_stats}
    keras_networks.fill(network, run.tensors(first))
    network.compile(
        optimizer=keras.optimizers.Adam(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    losses = []
    for batch in run.batches:
        network.reset_metrics()
        losses.append(network.train_on_batch(run.images(batch), batch["label"]))
    run.assert_equals(losses, keras_networks.values(network))
