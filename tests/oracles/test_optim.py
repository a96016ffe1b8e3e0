"""Optimisers, losses, mixing, EMA and schedules, tested against torch and timm."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import timm.data.mixup
import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import nn
from torchvision.transforms import v2

from resnet_jax.config import defaults, rescaled_ema_decay
from resnet_jax.models import ZOO, build
from resnet_jax.training import losses, step
from resnet_jax.training.mixup import Drawn, Mix
from resnet_jax.training.optim import make_optimizer, update_ema
from resnet_jax.training.schedules import make_schedule
from resnet_jax.weights import SCHEMES
from resnet_jax.weights.naming import to_foreign
from tests.helpers import keyed
from tests.oracles import networks

STEPS = 20
# Basic blocks and bottlenecks, batch norm, a dense layer: 0.47 M parameters.
NAME = "test_resnet"
SPEC, SCHEME = ZOO[NAME].spec, SCHEMES[ZOO[NAME].scheme]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def configure(**changes) -> ConfigDict:
    """Returns a config with a cosine over 20 steps; keywords change `optim`."""
    config = defaults.get_config()
    config.batch_size = 8
    config.optim.learning_rate_batch = 0
    config.optim.warmup = ConfigDict({"steps": 0})
    with config.ignore_type():
        for key, value in changes.items():
            config.optim[key] = value
    return config


def schedule_of(config: ConfigDict) -> optax.Schedule:
    """Returns the schedule of a run in epochs of five steps."""
    return make_schedule(config, total_steps=STEPS, train_size=40)


def batch_of(number: int) -> dict[str, np.ndarray]:
    """Returns one of four random batches."""
    rng = keyed.generator("batch", number % 4)
    return {
        "image": rng.integers(256, size=(8, 32, 32, 3), dtype=np.uint8),
        "label": rng.integers(SPEC.num_classes, size=8, dtype=np.int32),
    }


def train_ours(config: ConfigDict) -> dict[str, np.ndarray]:
    """Returns the variables after 20 train steps of this project, by torch's names."""
    model = build(SPEC, dtype=jnp.float64)
    optimizer = make_optimizer(config, schedule_of(config))
    options = step.StepOptions(
        mean=MEAN,
        std=STD,
        loss=losses.make_loss(config),
        sam_rho=config.optim.sam_rho,
        sam_every=config.optim.sam_every,
    )
    train_step = jax.jit(step.make_train_step(model, optimizer, options))
    variables = jax.tree.map(jnp.float64, keyed.variables(SPEC))
    state = step.state_from(variables, optimizer, ema=False)
    for number in range(STEPS):
        state, _ = train_step(state, batch_of(number))
    assert jax.tree.leaves(state.params)[0].dtype == np.float64
    return to_foreign(jax.device_get(state.evaluated()), SPEC, SCHEME)


def loss_of(network: nn.Module, number: int) -> torch.Tensor:
    """Returns torch's loss of a batch."""
    batch = batch_of(number)
    image = (batch["image"] / 255.0 - MEAN) / STD
    label = torch.from_numpy(batch["label"]).long()
    return F.cross_entropy(network(networks.nchw(image)), label)


def train_torch(config: ConfigDict, make, before=None) -> dict[str, np.ndarray]:
    """Returns the variables after 20 train steps of torch.

    Args:
      config: The config, which gives the learning rate of each step.
      make: Makes the optimiser of a network.
      before: Is called with the network and the step's number before each update.
    """
    network = networks.build(NAME).double().train()
    optimizer = make(network)
    schedule = schedule_of(config)
    for number in range(STEPS):
        for group in optimizer.param_groups:
            rate = float(schedule(number))
            # timm's groups of layers have factors of the learning rate.
            group["lr"] = rate * group.get("lr_scale", 1.0)
        optimizer.zero_grad()
        loss_of(network, number).backward()
        if before:
            before(network, number)
        optimizer.step()
    return networks.arrays(network)


def assert_equal_end(variables: dict, expected: dict, bound: float = 1e-8) -> None:
    """Compares all tensors, each relative to its largest value."""
    start = networks.arrays(networks.build(NAME))
    for name, value in variables.items():
        scale = np.abs(expected[name]).max()
        # The training changed every tensor by far more than the bound.
        assert np.abs(expected[name] - start[name]).max() > 100 * bound * scale, name
        error = np.abs(value - expected[name]).max() / scale
        # Float64 rounds at 1e-16. After 20 steps the error is below 1e-9, except if
        # adaptive methods divide by gradients near zero.
        assert error <= bound, f"{name}: {error:.1e}"


def groups(network: nn.Module, decay: float, decays) -> list[dict]:
    """Returns groups of parameters with and without decay."""
    named = list(network.named_parameters())
    return [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]


def everything(name: str, parameter: nn.Parameter) -> bool:
    return True


def not_norm(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 or name.startswith("fc")


def matrices(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1


class Caffe(torch.optim.Optimizer):
    """LARS as in MLPerf's TensorFlow reference: the rate is inside of the momentum."""

    def __init__(self, params, momentum=0.9, coefficient=0.001):
        super().__init__(params, {"lr": 0.0})
        self.momentum, self.coefficient = momentum, coefficient

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                decay, rate, grad = group["weight_decay"], group["lr"], p.grad
                if decay:
                    w, g = torch.linalg.norm(p), torch.linalg.norm(grad)
                    rate = rate * self.coefficient * w / (g + decay * w)
                    grad = grad + decay * p
                state = self.state[p]
                old = state.get("momentum", torch.zeros_like(p))
                state["momentum"] = self.momentum * old - rate * grad
                p += state["momentum"]


class DecoupledSGDW(torch.optim.SGD):
    """Composer's optimiser: SGD after a decay by decay x rate / peak rate."""

    def __init__(self, params, peak: float, decay: float, **options):
        super().__init__(params, lr=peak, **options)
        self.peak, self.decay = peak, decay

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p *= 1 - self.decay * group["lr"] / self.peak
        super().step()


SGD = functools.partial(torch.optim.SGD, lr=0.1)
CASES = {
    "sgd": (
        {"momentum": 0.0, "weight_decay": 0.0},
        lambda n: SGD(n.parameters()),
    ),
    "sgd, momentum, coupled decay": (
        {"nesterov": False, "weight_decay": 0.01},
        lambda n: SGD(n.parameters(), momentum=0.9, weight_decay=0.01),
    ),
    "sgd, nesterov, decay of all but norms": (
        {"weight_decay": 0.01, "weight_decay_exclude": "norm"},
        lambda n: SGD(groups(n, 0.01, not_norm), momentum=0.9, nesterov=True),
    ),
    "sgd, nesterov, decoupled decay of matrices": (
        {
            "weight_decay": 0.1,
            "decay": "decoupled",
            "weight_decay_exclude": "ndim<=1",
        },
        lambda n: timm.optim.create_optimizer_v2(n, "sgdw", lr=0.1, weight_decay=0.1),
    ),
    "sgd, decay by the schedule": (
        {"weight_decay": 0.005, "decay": "schedule", "nesterov": False},
        lambda n: DecoupledSGDW(n.parameters(), 0.1, 0.005, momentum=0.9),
    ),
    "adam, coupled decay": (
        {"name": "adam", "learning_rate": 1e-3, "weight_decay": 0.01},
        lambda n: torch.optim.Adam(n.parameters(), weight_decay=0.01),
    ),
    "adamw": (
        {
            "name": "adamw",
            "learning_rate": 1e-3,
            "betas": (0.8, 0.95),
            "eps": 1e-6,
            "weight_decay": 0.5,
            "decay": "decoupled",
            "weight_decay_exclude": "norm+bias",
        },
        lambda n: torch.optim.AdamW(
            groups(n, 0.5, matrices), betas=(0.8, 0.95), eps=1e-6
        ),
    ),
    "lamb": (
        {
            "name": "lamb",
            "learning_rate": 0.01,
            "weight_decay": 0.02,
            "weight_decay_exclude": "ndim<=1",
        },
        lambda n: timm.optim.create_optimizer_v2(n, "lamb", lr=0.01, weight_decay=0.02),
    ),
    "lars as timm": (
        {
            "name": "lars",
            "learning_rate": 5.0,
            "weight_decay": 1e-3,
            "eps": 1e-8,
            "momentum_form": "torch",
            "weight_decay_exclude": "norm+bias",
        },
        lambda n: timm.optim.Lars(
            groups(n, 1e-3, matrices), momentum=0.9, nesterov=True
        ),
    ),
    "lars as MLPerf": (
        {
            "name": "lars",
            "learning_rate": 5.0,
            "weight_decay": 1e-3,
            "nesterov": False,
            "weight_decay_exclude": "norm+bias",
        },
        lambda n: Caffe(groups(n, 1e-3, matrices)),
    ),
    "rmsprop_tf": (
        {
            "name": "rmsprop_tf",
            "learning_rate": 0.01,
            "weight_decay": 1e-3,
            "eps": 1e-3,
        },
        lambda n: timm.optim.RMSpropTF(
            n.parameters(), momentum=0.9, weight_decay=1e-3, eps=1e-3
        ),
    ),
    "rmsprop_tf, decoupled decay, rate outside": (
        {
            "name": "rmsprop_tf",
            "learning_rate": 0.01,
            "weight_decay": 0.1,
            "decay": "decoupled",
            "momentum_form": "torch",
        },
        lambda n: timm.optim.RMSpropTF(
            n.parameters(),
            momentum=0.9,
            weight_decay=0.1,
            decoupled_decay=True,
            lr_in_momentum=False,
        ),
    ),
    "adamw, layer decay": (
        {
            "name": "adamw",
            "learning_rate": 3e-3,
            "weight_decay": 0.5,
            "decay": "decoupled",
            "weight_decay_exclude": "ndim<=1",
            "layer_decay": 0.7,
        },
        lambda n: timm.optim.create_optimizer_v2(
            n, "adamw", lr=3e-3, weight_decay=0.5, layer_decay=0.7
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_of_each_optimiser_equal_torch(case, in_float64):
    changes, make = CASES[case]
    config = configure(**changes)
    assert_equal_end(train_ours(config), train_torch(config, make))


def test_twenty_steps_with_adaptive_clipping_equal_timm(in_float64):
    config = configure(agc=0.01, weight_decay=0.0)
    clipped = []

    def clip(network, number):
        named = list(network.named_parameters())
        before = [p.grad.clone() for _, p in named]
        timm.utils.adaptive_clip_grad(
            [p for name, p in named if not name.startswith("fc")], clip_factor=0.01
        )
        clipped.append(
            sum(
                not torch.equal(p.grad, g)
                for (_, p), g in zip(named, before, strict=True)
            )
        )

    def make(n):
        return SGD(n.parameters(), momentum=0.9, nesterov=True)

    assert_equal_end(train_ours(config), train_torch(config, make, clip))
    assert min(clipped) > 0


def test_twenty_steps_with_clipping_by_the_global_norm_equal_torch(in_float64):
    config = configure(clip_norm=1.0, weight_decay=0.0)

    def clip(network, number):
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)

    def make(n):
        return SGD(n.parameters(), momentum=0.9, nesterov=True)

    # torch adds 1e-6 to the norm that it divides by.
    assert_equal_end(train_ours(config), train_torch(config, make, clip), bound=1e-5)


@pytest.mark.parametrize("every", [1, 3])
def test_twenty_steps_of_sharpness_aware_minimisation_equal_its_definition(
    every, in_float64
):
    config = configure(
        sam_rho=0.5, sam_every=every, weight_decay=0.01, learning_rate=0.02
    )

    @torch.no_grad()
    def sharpen(network, number):
        """Foret et al. 2021, algorithm 1; Composer's interval."""
        if (number + 1) % every:
            return
        parameters = list(network.parameters())
        norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
        start = [p.clone() for p in parameters]
        for p in parameters:
            p += 0.5 * p.grad / norm
            p.grad = None
        buffers = [b.clone() for b in network.buffers()]
        with torch.enable_grad():
            loss_of(network, number).backward()
        for p, before in zip(parameters, start, strict=True):
            p.copy_(before)
        # The running statistics of the first pass are kept.
        for b, before in zip(network.buffers(), buffers, strict=True):
            b.copy_(before)

    def make(n):
        return SGD(n.parameters(), momentum=0.9, nesterov=True, weight_decay=0.01)

    # The definition adds nothing to the norm, this project 1e-12.
    assert_equal_end(train_ours(config), train_torch(config, make, sharpen))


# Losses.


def logits_and_labels(classes: int = 10):
    rng = keyed.generator("losses")
    logits = 3 * rng.standard_normal((16, classes), np.float32)
    labels = keyed.labels(16, classes)
    soft = rng.dirichlet(np.full(classes, 0.3), 16).astype(np.float32)
    return logits, labels, soft


def loss_config(**changes) -> ConfigDict:
    config = defaults.get_config()
    config.update(changes)
    return config


BCE = timm.loss.BinaryCrossEntropy
LOSSES = {
    "smoothed": (
        {"label_smoothing": 0.1},
        False,
        timm.loss.LabelSmoothingCrossEntropy(0.1),
    ),
    "soft": ({}, True, timm.loss.SoftTargetCrossEntropy()),
    "soft, smoothed": (
        {"label_smoothing": 0.1},
        True,
        nn.CrossEntropyLoss(label_smoothing=0.1),
    ),
    "binary": ({"loss": "binary_cross_entropy"}, False, BCE(smoothing=0.0)),
    "binary, smoothed": (
        {"loss": "binary_cross_entropy", "label_smoothing": 0.1},
        False,
        BCE(smoothing=0.1),
    ),
    "binary, soft": ({"loss": "binary_cross_entropy"}, True, BCE(smoothing=0.0)),
    "binary, soft, threshold": (
        {"loss": "binary_cross_entropy", "bce_target_threshold": 0.2},
        True,
        BCE(smoothing=0.0, target_threshold=0.2),
    ),
    "binary, summed": (
        {
            "loss": "binary_cross_entropy",
            "bce_sum_classes": True,
            "label_smoothing": 0.1,
        },
        False,
        BCE(smoothing=0.1, sum_classes=True),
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_equal_timm(case):
    changes, is_soft, reference = LOSSES[case]
    logits, labels, soft = logits_and_labels()
    target = soft if is_soft else labels
    ours = losses.make_loss(loss_config(**changes))
    theirs = reference(torch.from_numpy(logits), torch.from_numpy(target))
    got = ours(jnp.asarray(logits), jnp.asarray(target)).mean()
    # Logits near 10 are rounded a few times in float32.
    assert float(got) == pytest.approx(float(theirs), rel=2e-6)


@pytest.mark.parametrize("rule", ["inverse_frequency", "effective_number"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("is_soft", [False, True])
def test_the_loss_with_class_weights_equals_torch(is_soft, smoothing, rule):
    logits, labels, soft = logits_and_labels()
    target = soft if is_soft else labels
    counts = keyed.generator("counts").integers(1, 200, logits.shape[1]).astype(float)
    weights = losses.class_weights(counts, rule, 0.99)
    criterion = nn.CrossEntropyLoss(
        weight=torch.from_numpy(weights).double(), label_smoothing=smoothing
    )
    theirs = criterion(
        torch.from_numpy(logits).double(),
        torch.from_numpy(target).double() if is_soft else torch.from_numpy(target),
    )
    each = losses.cross_entropy(
        jnp.asarray(logits), jnp.asarray(target), smoothing, weights
    )
    if not is_soft:
        each = each * losses.batch_factors(jnp.asarray(target), weights)
    # Logits near 10 are rounded a few times in float32.
    assert float(each.mean()) == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_equals_the_kl_divergence_of_torch(temperature):
    logits, _, _ = logits_and_labels()
    teacher = logits[::-1].copy()
    theirs = F.kl_div(
        F.log_softmax(torch.from_numpy(logits) / temperature, dim=1),
        F.log_softmax(torch.from_numpy(teacher) / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    got = losses.distillation(jnp.asarray(logits), jnp.asarray(teacher), temperature)
    # Logits near 10 are rounded a few times in float32.
    expected = temperature**2 * float(theirs)
    assert float(got.mean()) == pytest.approx(expected, rel=2e-6)


# Mixing with given random numbers.


def mix_batch(mix: Mix, own: float, cut: bool, y: int, x: int, size, smoothing=0.0):
    """Returns 8 images of one ghost batch and their labels, before and after mixing."""
    images = keyed.images(8, 30)[:, : size[0], : size[1]]
    labels = keyed.labels(8, 10)
    box = mix.box(jnp.float32(own), jnp.int32(y), jnp.int32(x), *size)
    if cut:
        own = 1 - (box[1] - box[0]) * (box[3] - box[2]) / (size[0] * size[1])
    drawn = jax.tree.map(
        lambda x: jnp.asarray(x)[None],
        {"lam": jnp.float32(own), "cut": jnp.asarray(cut), "box": box},
    )
    one_hot = losses.one_hot(jnp.asarray(labels), 10)
    image, label = mix.apply(jnp.asarray(images), one_hot, Drawn(**drawn))
    return images, labels, image, label * (1 - smoothing) + smoothing / 10


OWNS = [0.03, 0.31, 0.5, 0.77, 0.96, 1.0]
SIZES = [(30, 30), (29, 24)]
# A corner, a pixel near the middle and the last pixel.
CENTRES = [(0, 0), (14, 11), (28, 23)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("own", OWNS)
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("centre", CENTRES)
def test_mixing_equals_timm(own, cut, centre, size, monkeypatch):
    mix = Mix(mixup_alpha=1.0, cutmix_alpha=1.0, rule="timm")
    y, x = centre
    images, labels, image, label = mix_batch(mix, own, cut, y, x, size, 0.1)
    theirs = timm.data.mixup.Mixup(
        mixup_alpha=1.0, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10
    )
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (own, cut))
    draws = iter((y, x))
    monkeypatch.setattr(np.random, "randint", lambda *_, **__: next(draws))
    expected, targets = theirs(networks.nchw(images), torch.from_numpy(labels))
    expected = expected.numpy().transpose(0, 2, 3, 1)
    # Numbers below 5 are rounded three times in float32.
    np.testing.assert_allclose(image, expected, atol=2e-6)
    np.testing.assert_allclose(label, targets, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("own", OWNS)
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("centre", CENTRES)
def test_mixing_equals_torchvision(own, cut, centre, size, monkeypatch):
    mix = Mix(mixup_alpha=1.0, cutmix_alpha=1.0, rule="torchvision")
    y, x = centre
    images, labels, image, label = mix_batch(mix, own, cut, y, x, size)
    theirs = (v2.CutMix if cut else v2.MixUp)(alpha=1.0, num_classes=10)

    class Fixed:
        def sample(self, shape):
            return torch.tensor(own)

    theirs._dist = Fixed()
    draws = iter((x, y))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([next(draws)]))
    expected, targets = theirs(networks.nchw(images), torch.from_numpy(labels))
    expected = expected.numpy().transpose(0, 2, 3, 1)
    # Numbers below 5 are rounded three times in float32.
    np.testing.assert_allclose(image, expected, atol=2e-6)
    np.testing.assert_allclose(label, targets, atol=2e-6)


# EMA.


def linear_networks(count: int) -> list[nn.Module]:
    """Returns networks of a linear layer and batch norm, each with other values."""
    made = []
    for number in range(count):
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                rng = keyed.generator(name, number)
                random = rng.standard_normal(tuple(value.shape), np.float32)
                value.copy_(torch.from_numpy(random))
        made.append(network)
    return made


def floats(network: nn.Module) -> dict[str, np.ndarray]:
    """Returns copies of the floating-point values of a `state_dict`."""
    return {
        name: value.numpy().copy()
        for name, value in network.state_dict().items()
        if value.is_floating_point()
    }


def ema_of(networks_by_step, **options) -> dict[str, np.ndarray]:
    """Returns this project's EMA of networks; the first one is its start."""
    average = floats(networks_by_step[0])
    for number, network in enumerate(networks_by_step[1:]):
        average = update_ema(
            average, floats(network), step=jnp.int32(number), **options
        )
    return average


def assert_same_ema(ema: dict[str, np.ndarray], reference: nn.Module) -> None:
    """Compares an EMA with the values of torch's network."""
    for name, expected in floats(reference).items():
        # Thirty averages of numbers below 4 are each rounded a few times.
        np.testing.assert_allclose(ema[name], expected, atol=1e-5, err_msg=name)


def test_an_ema_without_warm_up_equals_model_ema_v2_of_timm():
    start, *by_step = linear_networks(31)
    theirs = timm.utils.ModelEmaV2(start, decay=0.9)
    for network in by_step:
        theirs.update(network)
    ours = ema_of([start, *by_step], decay=0.9, warmup="none")
    assert_same_ema(ours, theirs.module)


def test_an_ema_with_warm_up_equals_model_ema_v3_of_timm():
    start, *by_step = linear_networks(31)
    theirs = timm.utils.ModelEmaV3(start, decay=0.8, use_warmup=True)
    for number, network in enumerate(by_step, 1):
        # timm's training script counts updates from 1.
        theirs.update(network, step=number)
    ours = ema_of([start, *by_step], decay=0.8, warmup="timm")
    assert_same_ema(ours, theirs.module)


@pytest.mark.parametrize("warmup", [0, 7])
def test_an_ema_every_few_steps_equals_torchvision(warmup):
    # torchvision's script copies the weights until the learning rate has warmed up.
    start, *by_step = linear_networks(31)
    decay = rescaled_ema_decay(0.99, batch_size=64, every=3, epochs=10)
    # alpha = (1 - 0.99) * 64 * 3 / 10
    assert decay == pytest.approx(1 - 0.192)
    theirs = torch.optim.swa_utils.AveragedModel(
        start,
        avg_fn=lambda average, new, _: decay * average + (1 - decay) * new,
        use_buffers=True,
    )
    for number, network in enumerate(by_step):
        if number % 3 == 0:
            theirs.update_parameters(network)
            if number < warmup:
                theirs.n_averaged.fill_(0)
    ours = ema_of(
        [start, *by_step], decay=decay, every=3, warmup="copy", copy_until=warmup
    )
    assert_same_ema(ours, theirs.module)


# Schedules, in epochs of 7 steps.

EPOCHS, STEPS_AN_EPOCH = 12, 7


def our_rates(**changes) -> list[float]:
    """Returns this project's learning rate of each step; keywords change `optim`."""
    config = configure(per_epoch=True, learning_rate=0.4, **changes)
    schedule = make_schedule(
        config, total_steps=EPOCHS * STEPS_AN_EPOCH, train_size=8 * STEPS_AN_EPOCH
    )
    return [float(schedule(number)) for number in range(EPOCHS * STEPS_AN_EPOCH)]


def torch_rates(make, advance) -> list[float]:
    """Returns torch's rate of each step; `advance` is called once per epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = make(optimizer)
    rates = []
    for epoch in range(EPOCHS):
        rates += [optimizer.param_groups[0]["lr"]] * STEPS_AN_EPOCH
        optimizer.step()
        advance(scheduler, epoch + 1)
    return rates


def assert_same_rates(rates: list[float], expected: list[float]) -> None:
    """Compares learning rates, of which there must be at least three."""
    assert len(set(expected)) > 2
    # Numbers below 1 are rounded a few times in float32.
    np.testing.assert_allclose(rates, expected, atol=1e-6 * math.pi)


def test_warm_up_and_cosine_by_epochs_equal_torchvision():
    def make(optimizer):
        return torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=3),
                torch.optim.lr_scheduler.CosineAnnealingLR(
                    optimizer, EPOCHS - 3, eta_min=0.01
                ),
            ],
            milestones=[3],
        )

    ours = our_rates(
        warmup=ConfigDict({"epochs": 3}), warmup_from=0.004, end_learning_rate=0.01
    )
    assert_same_rates(ours, torch_rates(make, lambda s, _: s.step()))


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("length", [EPOCHS, 8])
def test_warm_up_and_cosine_by_epochs_equal_timm(prefix, length):
    def make(optimizer):
        return timm.scheduler.CosineLRScheduler(
            optimizer,
            t_initial=length - 3 if prefix else length,
            lr_min=0.02,
            warmup_t=3,
            warmup_lr_init=0.001,
            warmup_prefix=prefix,
        )

    ours = our_rates(
        warmup=ConfigDict({"epochs": 3}),
        warmup_from=0.001,
        warmup_prefix=prefix,
        end_learning_rate=0.02,
        schedule_length=ConfigDict({"epochs": length}),
    )
    assert_same_rates(ours, torch_rates(make, lambda s, epoch: s.step(epoch)))


def test_a_step_schedule_by_epochs_equals_torch():
    def make(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.1)

    ours = our_rates(schedule="step", decay_at=({"epochs": 4}, {"epochs": 8}))
    assert_same_rates(ours, torch_rates(make, lambda s, _: s.step()))


def test_a_polynomial_schedule_by_epochs_equals_torch():
    def make(optimizer):
        return torch.optim.lr_scheduler.PolynomialLR(optimizer, EPOCHS, power=2.0)

    ours = our_rates(schedule="polynomial", power=2.0)
    assert_same_rates(ours, torch_rates(make, lambda s, _: s.step()))
