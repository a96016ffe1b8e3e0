"""Speed of training and of compiling."""

import argparse
import contextlib
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_jax import writers
from resnet_jax.config import load
from resnet_jax.setup import Setup, set_up
from resnet_jax.train import teacher_variables, train


def training_config(args: argparse.Namespace) -> ConfigDict:
    """A short run on fake data at the size of the arguments."""
    config = load(args.config)
    config.model.name = args.model or config.model.name
    config.batch_size = args.batch_size
    config.model.dtype = args.dtype
    config.data.image_size = args.image_size
    # Few images in the second split: only training is measured.
    config.data.source = f"fake:10:{args.batch_size}"
    config.data.train_split, config.data.eval_split = "train", "validation"
    config.total = ConfigDict({"steps": args.steps})
    config.log_every = ConfigDict({"steps": max(args.steps // 4, 1)})
    config.optim.warmup = ConfigDict({"steps": 0})
    config.optim.schedule = "constant"
    for section in (config.evaluate, config.checkpoint):
        section.every = ConfigDict({"steps": args.steps})
    return config


def overhead(config: ConfigDict, repeats: int) -> dict:
    """Images per second of a run and of its bare step, in turn; medians.

    The first steps of either, where threads and caches warm up, are not counted.
    """
    setup = set_up(config)
    rates: dict[str, list[float]] = {"run": [], "step": []}
    for _ in range(repeats):
        rates["step"].append(_bare_rate(setup))
        with tempfile.TemporaryDirectory() as directory:
            workdir = pathlib.Path(directory) / "run"
            with contextlib.redirect_stdout(sys.stderr):
                train(config, workdir)
            rows = writers.read_metrics(workdir)
        logged = [
            row["train/images_per_second"]
            for row in rows
            if "train/images_per_second" in row
        ]
        rates["run"].append(statistics.harmonic_mean(logged[1:]))
    run, step = (statistics.median(rates[key]) for key in ("run", "step"))
    return {
        "name": f"overhead {config.model.name} {config.data.image_size} px"
        f" batch {config.batch_size}",
        "value": run,
        "unit": "images/s",
        "peer": "bare compiled step",
        "peer_value": step,
        "ratio": run / step,
        "spread": {key: [min(values), max(values)] for key, values in rates.items()},
    }


def _bare_rate(setup: Setup) -> float:
    config = setup.config
    train_step = setup.compile_train_step(teacher_variables(setup))
    state = setup.init_state()
    rng = np.random.default_rng(0)
    like = setup.batch_like(config.batch_size, "image", "label")
    batch = setup.to_devices(
        {
            "image": rng.integers(0, 256, like["image"].shape, np.uint8),
            "label": rng.integers(0, 10, like["label"].shape, np.int32),
        }
    )
    warm = setup.total_steps // 4
    for i in range(setup.total_steps):
        if i == warm:
            jax.block_until_ready(state)
            started = time.perf_counter()
        state, _ = train_step(state, batch)
    jax.block_until_ready(state)
    images = (setup.total_steps - warm) * config.batch_size
    return images / (time.perf_counter() - started)


def compile_time(config: ConfigDict, repeats: int) -> dict:
    """Seconds from a network's definition to its compiled train step; medians."""
    seconds: dict[str, list[float]] = {"scanned": [], "unrolled": []}
    for _ in range(repeats):
        for layout, values in seconds.items():
            config.model.scan_blocks = layout == "scanned"
            jax.clear_caches()
            started = time.perf_counter()
            setup = set_up(config)
            setup.compile_train_step(teacher_variables(setup))
            values.append(time.perf_counter() - started)
            print(f"{layout}: {values[-1]:.1f} s", file=sys.stderr, flush=True)
    scanned, unrolled = map(statistics.median, seconds.values())
    return {
        "name": f"compile {config.model.name} {config.data.image_size} px"
        f" batch {config.batch_size}",
        "value": scanned,
        "unit": "s",
        "peer": "unrolled",
        "peer_value": unrolled,
        "ratio": scanned / unrolled,
        "spread": {key: [min(values), max(values)] for key, values in seconds.items()},
    }
