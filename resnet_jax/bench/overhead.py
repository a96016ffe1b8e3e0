"""Compares images/s of a complete run with its compiled step in a bare loop."""

import argparse
import contextlib
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

import jax

from resnet_jax.bench import table
from resnet_jax.bench.cases import name_of
from resnet_jax.bench.own_programs import fake_batch, short_config
from resnet_jax.bench.table import Benchmark, row
from resnet_jax.config import override
from resnet_jax.console.arguments import Parser, count
from resnet_jax.errors import UserError
from resnet_jax.persistence import metric_writers
from resnet_jax.training import programs
from resnet_jax.training.experiment import Experiment, set_up
from resnet_jax.training.initialization import teacher_variables, teacher_weights
from resnet_jax.training.loop import train


def add_arguments(parser: Parser) -> None:
    """Adds the arguments of `bench overhead`."""
    parser.add_config("The default is %(default)s.", default="configs/cifar10.py")
    parser.add_argument(
        "--model",
        default="",
        help="The network, by its name in the zoo. The default is the config's.",
    )
    parser.add_argument(
        "--image_size",
        type=count,
        default=32,
        help="The height and width of the images in pixels. The default is"
        " %(default)s.",
    )
    parser.add_argument(
        "--batch_size",
        type=count,
        default=128,
        help="The number of images per step. The default is %(default)s.",
    )
    parser.add_argument(
        "--steps",
        type=count,
        default=16,
        help="The number of steps of a run, at least two. The first quarter warms up"
        " and is not counted. The default is %(default)s.",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help="The dtype of the computation. The default is %(default)s.",
    )


def rows(args: argparse.Namespace) -> Iterator[dict]:
    """Yields images/s of a run and of its compiled step, which take turns.

    The first steps of both, in which threads and caches warm up, are not counted.
    """
    if args.steps < 2:
        raise UserError(
            f"--steps={args.steps} leaves no step to measure, since the first one warms"
            " up. Give two or more."
        )
    case = args.model, args.image_size, args.batch_size, args.dtype
    config = short_config(args.config, *case, steps=args.steps)
    override(config, args.overrides)
    setup = set_up(config)
    step_rates, program_rates = [], []
    for _ in range(args.repeats):
        step_rates.append(_bare_rate(setup))
        with tempfile.TemporaryDirectory() as directory:
            workdir = pathlib.Path(directory) / "run"
            with contextlib.redirect_stdout(sys.stderr):
                train(config, workdir)
            logged = metric_writers.read_metrics(workdir)
        key = "train/images_per_second"
        rates = [line[key] for line in logged if key in line]
        program_rates.append(statistics.harmonic_mean(rates[1:]))
    name = "whole program, " + name_of(config.model.name, *case[1:])
    yield row(name, "images/s", program_rates, "bare compiled step", step_rates)


def _bare_rate(setup: Experiment) -> float:
    train_step = programs.compile_train_step(
        setup, teacher_variables(setup, teacher_weights(setup))
    )
    state, batch = programs.init_state(setup), fake_batch(setup)
    warm = max(setup.total_steps // 4, 1)
    for i in range(setup.total_steps):
        if i == warm:
            jax.block_until_ready(state)
            started = time.perf_counter()
        state, _ = train_step(state, batch)
    jax.block_until_ready(state)
    images = (setup.total_steps - warm) * setup.config.batch_size
    return images / (time.perf_counter() - started)


BENCHMARK = Benchmark(add_arguments, rows, (*table.JAX, "optax", "orbax-checkpoint"))
