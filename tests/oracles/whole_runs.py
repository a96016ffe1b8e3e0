"""Compares whole runs of this project with a plain torch loop of the same recipe.

python -m tests.oracles.whole_runs --json=FILE [--networks=resnet20,plain20] \
    [--data=signs] [--seeds=3]

FILE gets a line per run, and runs that it has are not run again. The table that is
printed at the end has the mean and standard deviation of top-1 on each side, and the
probability of so large a difference of the means if there were none (Welch's t-test).
The images are unpacked from $RESNET_JAX_DATA, or from ../shared/data beside the
repository.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.stats
import timm
import torch
from ml_collections import ConfigDict
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from resnet_jax import config as config_lib
from resnet_jax.config.defaults import IMAGENET_MEAN, IMAGENET_STD
from resnet_jax.training.loop import train
from tests.oracles.networks import Cifar

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("RESNET_JAX_DATA") or ROOT.parent / "shared" / "data")

SIZE = 32
# The two sides share only these numbers.
RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
# The widths of the slim ResNet-18.
WIDTHS = (32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set of images in folders, and the length of training on it.

    Attributes:
      archive: The name of the ZIP file and of its folder.
      eval_split: The name of the split to evaluate.
      batch_size: The number of images per training step.
      epochs: The number of epochs of training.
      scale: The smallest and largest fraction of an image's area in a random crop.
    """

    archive: str
    eval_split: str
    batch_size: int
    epochs: int
    scale: tuple[float, float]


DATA = {
    "signs": Data("sign-digits", "test", 64, 15, (0.5, 1.0)),
    "tiny": Data("tiny-imagenet-20", "val", 128, 2, (0.25, 1.0)),
}
RECIPES = {
    "resnet20": "he2015_cifar.py:20",
    "plain20": "he2015_cifar.py:plain20",
    "resnet18": "signs.py",
}


def make_config(network: str, data: Data, folder: Path, seed: int) -> ConfigDict:
    """Returns the config of the recipe that `run_torch` implements, too."""
    config = config_lib.load(str(ROOT / "configs" / RECIPES[network]))
    with config.ignore_type():
        config.model.bn_group_size = "global"
    if network == "resnet18":
        # timm's stem keeps this width whatever the widths of the stages are.
        config.model.overrides.stem = ((7, 2, 64),)
    config.seed, config.batch_size = seed, data.batch_size
    config.total = ConfigDict({"epochs": data.epochs})
    config.log_every = ConfigDict({"epochs": 1})

    config.data.source = f"folder:{folder}"
    config.data.eval_split = data.eval_split
    config.data.image_size = SIZE
    config.data.mean, config.data.std = IMAGENET_MEAN, IMAGENET_STD
    config.data.train_crop, config.data.scale = "random_resized", data.scale
    config.data.flip = True
    config.data.decode = "exact"
    config.data.crop_fraction = 1.0
    config.data.cache = "ram"
    config.data.num_workers = 0

    config.optim.learning_rate, config.optim.learning_rate_batch = RATE, 0
    config.optim.schedule, config.optim.decay_at = "cosine", ()
    config.optim.warmup = ConfigDict({"epochs": 0})
    config.optim.momentum, config.optim.nesterov = MOMENTUM, False
    config.optim.weight_decay = WEIGHT_DECAY
    for section in (config.evaluate, config.checkpoint):
        section.every = ConfigDict({"epochs": data.epochs})
    return config


def run_ours(network: str, data: Data, folder: Path, seed: int) -> dict:
    """Trains with this project; returns a row of FILE."""
    config = make_config(network, data, folder, seed)
    with (
        tempfile.TemporaryDirectory() as directory,
        contextlib.redirect_stdout(sys.stderr),
    ):
        result = train(config, Path(directory) / "run")
    return {key: result[key] for key in ("top1", "loss", "n_seen", "params")}


def make_torch(network: str, classes: int) -> nn.Module:
    """Returns the network with its library's initial weights, or the paper's."""
    if network == "resnet18":
        return timm.models.ResNet(
            timm.models.resnet.BasicBlock,
            layers=(2, 2, 2, 2),
            channels=WIDTHS,
            num_classes=classes,
        )
    shortcut = "none" if network == "plain20" else "pad"
    module = Cifar((3, 3, 3), shortcut, pad="end")
    module.fc = nn.Linear(64, classes)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    return module


def run_torch(network: str, data: Data, folder: Path, seed: int) -> dict:
    """Trains with torch and torchvision alone; returns a row of FILE."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    as_input = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    train_transform = [
        v2.RandomResizedCrop(SIZE, data.scale),
        v2.RandomHorizontalFlip(),
    ]
    test_transform = [v2.Resize(SIZE), v2.CenterCrop(SIZE)]
    seen = ImageFolder(folder / "train", v2.Compose(train_transform + as_input))
    unseen = ImageFolder(
        folder / data.eval_split, v2.Compose(test_transform + as_input)
    )

    # Batches may span two epochs, so every batch is full.
    steps = round(data.epochs * len(seen) / data.batch_size)
    orders = [torch.randperm(len(seen)) for _ in range(data.epochs + 1)]
    batches = torch.cat(orders)[: steps * data.batch_size].view(steps, -1)
    module = make_torch(network, len(seen.classes))
    optimizer = torch.optim.SGD(
        module.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    module.train()
    for images, labels in DataLoader(seen, batch_sampler=batches.tolist()):
        loss = nn.functional.cross_entropy(module(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()

    module.eval()
    right, total = 0, 0.0
    with torch.no_grad():
        for images, labels in DataLoader(unseen, batch_size=data.batch_size):
            logits = module(images)
            right += (logits.argmax(dim=1) == labels).sum().item()
            total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    return {
        "top1": right / len(unseen),
        "loss": total / len(unseen),
        "n_seen": len(unseen),
        "params": sum(parameter.numel() for parameter in module.parameters()),
    }


SIDES = {"resnet_jax": run_ours, "torch": run_torch}
# The fields that identify a row of FILE.
KEYS = ("network", "data", "epochs", "seed", "side")


def table(rows: list[dict]) -> str:
    """Formats a Markdown table with a row for each network and data set."""
    lines = [
        "| network | data | epochs | runs | resnet_jax | torch | difference | p |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    kinds = {(row["network"], row["data"], row["epochs"]): None for row in rows}
    for kind in kinds:
        top1 = {
            side: [
                100 * row["top1"]
                for row in rows
                if (row["network"], row["data"], row["epochs"]) == kind
                and row["side"] == side
            ]
            for side in SIDES
        }
        if min(map(len, top1.values())) < 2:
            continue
        ours, theirs = top1.values()
        p = scipy.stats.ttest_ind(ours, theirs, equal_var=False).pvalue
        runs = f"{len(ours)} + {len(theirs)}"
        cells = [*map(str, kind), runs]
        cells += [
            f"{np.mean(side):.2f} ± {np.std(side, ddof=1):.2f}"
            for side in (ours, theirs)
        ]
        cells += [f"{np.mean(ours) - np.mean(theirs):+.2f}", f"{p:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.oracles.whole_runs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--networks",
        default=",".join(RECIPES),
        help="The networks to train. The default is all of them: %(default)s.",
    )
    parser.add_argument(
        "--data",
        default=",".join(DATA),
        help="The data sets to train on. The default is all of them: %(default)s.",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="The number of runs per network, data set and side. The default is 3.",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        help="The number of epochs. The default is the data set's own.",
    )
    parser.add_argument(
        "--json",
        type=Path,
        required=True,
        help="The file that gets a line per run.",
    )
    args = parser.parse_args()
    rows = []
    if args.json.exists():
        rows = [json.loads(line) for line in args.json.read_text().splitlines()]
    done = {tuple(row[key] for key in KEYS) for row in rows}

    with tempfile.TemporaryDirectory() as directory:
        for name in args.data.split(","):
            shutil.unpack_archive(SHARED / f"{DATA[name].archive}.zip", directory)
        runs = itertools.product(
            *(args.data.split(","), args.networks.split(","), range(args.seeds), SIDES)
        )
        for name, network, seed, side in runs:
            data = DATA[name]
            data = dataclasses.replace(data, epochs=args.epochs or data.epochs)
            key = (network, name, data.epochs, seed, side)
            if key in done:
                continue
            started = time.perf_counter()
            row = dict(zip(KEYS, key, strict=True))
            row |= SIDES[side](network, data, Path(directory) / data.archive, seed)
            row["seconds"] = round(time.perf_counter() - started, 1)
            rows.append(row)
            print(json.dumps(row), flush=True)
            with args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
