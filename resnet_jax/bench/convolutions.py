"""Measures every lowering of a network's convolutions on this CPU, side by side."""

import argparse
import collections
import functools
import itertools
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.bench import table
from resnet_jax.bench.cases import TYPES, check_types
from resnet_jax.bench.table import Benchmark, row
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count, counts, words
from resnet_jax.kernels import onednn
from resnet_jax.kernels.cpu.conv import choose_lowering
from resnet_jax.kernels.cpu.lowerings import LOWERINGS, lower, possible_lowerings
from resnet_jax.kernels.geometry import Geometry
from resnet_jax.models import create_model
from resnet_jax.models.cost import init_shapes, inner_jaxprs

# Height, width and channels of the images, side of the kernel, features, and geometry.
Shape = tuple[int, int, int, int, int, Geometry]


def add_arguments(parser: Parser) -> None:
    """Adds the arguments of `bench convolutions`."""
    parser.add_argument(
        "--model",
        default="resnet50",
        help="The network whose convolutions are measured, by its name in the zoo. The"
        " default is %(default)s.",
    )
    parser.add_argument(
        "--image_size",
        type=count,
        default=224,
        help="The height and width of the network's images in pixels. The default is"
        " %(default)s.",
    )
    parser.add_argument(
        "--batch_size",
        type=counts,
        default=[32],
        help="The number of images. Several have commas between them. The default is"
        " 32.",
    )
    parser.add_argument(
        "--dtype",
        type=words,
        default=list(TYPES),
        help="The type of the computation. Several have commas between them. The"
        f" default is {','.join(TYPES)}.",
    )


def rows(args: argparse.Namespace) -> Iterator[dict]:
    """Yields a row per convolution and direction: the chosen lowering against XLA's.

    It prints the rates of all lowerings to the terminal, with a star where another than
    the chosen one was faster.
    """
    check_types(args.dtype)
    for batch, dtype in itertools.product(args.batch_size, args.dtype):
        for shape in shapes_of(args.model, args.image_size):
            h, w, c, k, f, geometry = shape
            out = geometry.output_length(h, 0, k)
            pixels = batch * out * geometry.output_length(w, 1, k)
            gflop = 2e-9 * pixels * k * k * c * f
            for direction in LOWERINGS:
                seconds = measure(shape, direction, batch, dtype, args.repeats)
                rates = {
                    lowering: [gflop / x for x in measured]
                    for lowering, measured in seconds.items()
                }
                median = {name: statistics.median(x) for name, x in rates.items()}
                chosen = choose_lowering(direction, batch, out, c, k, geometry, dtype)
                fastest = max(median, key=lambda lowering: median[lowering])
                star = " " if fastest == chosen else "*"
                name = f"{k}x{k}/{geometry.stride} {c}->{f} {h} px {direction} {dtype}"
                listed = [f"{lowering} {rate:.0f}" for lowering, rate in median.items()]
                output.note("  ".join((star, name, *listed, chosen)))
                name += f": {chosen}"
                peer = "convolution"
                yield row(name, "GFLOP/s", rates[chosen], peer, rates[peer])


def shapes_of(name: str, image_size: int) -> collections.Counter[Shape]:
    """Counts the convolutions without groups of a network of the zoo by their shape.

    Args:
      name: The name of the network.
      image_size: The height and width of the images in pixels.
    """
    model = create_model(name)
    image = jnp.zeros((1, image_size, image_size, model.spec.in_channels))
    variables = init_shapes(model, image_size)
    shapes: collections.Counter[Shape] = collections.Counter()

    def collect(jaxpr) -> None:
        for equation in jaxpr.eqns:
            params = equation.params
            if equation.primitive.name == "conv_general_dilated":
                x, kernel = (variable.aval.shape for variable in equation.invars)
                if params["feature_group_count"] == 1:
                    geometry = Geometry(
                        params["window_strides"][0],
                        tuple(params["padding"]),
                        params["rhs_dilation"][0],
                    )
                    shapes[*x[1:], kernel[0], kernel[3], geometry] += 1
            for inner in inner_jaxprs(equation):
                collect(inner)

    collect(jax.make_jaxpr(model.apply)(variables, image).jaxpr)
    return shapes


def measure(
    shape: Shape, direction: str, batch_size: int, dtype: str, repeats: int
) -> dict[str, list[float]]:
    """Measures the seconds that each lowering takes, in turn.

    Args:
      shape: The shape of the convolution.
      direction: `forward`, `input` or `kernel`.
      batch_size: The number of images.
      dtype: The dtype of images and kernel.
      repeats: The number of measurements per lowering, after one to warm up.

    Returns:
      The seconds of each measurement, by the name of the lowering.
    """
    h, w, c, k, f, geometry = shape
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    x, kernel = draw(batch_size, h, w, c), draw(k, k, c, f)
    g_shape = geometry.output_length(h, 0, k), geometry.output_length(w, 1, k), f
    g = draw(batch_size, *g_shape)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    args = {"forward": (x, kernel), "input": (g, kernel), "kernel": (x, g)}[direction]
    calls = {}
    native = ["onednn"] * onednn.computes(dtype)
    for lowering in [*possible_lowerings(direction, k, geometry), *native]:
        function = functools.partial(
            lower, direction, lowering, x=like, k=k, geometry=geometry
        )
        calls[lowering] = jax.jit(function).lower(*args).compile()
    seconds: dict[str, list[float]] = {lowering: [] for lowering in calls}
    for repeat in range(repeats + 1):
        for lowering, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call(*args))
            if repeat:
                seconds[lowering].append(time.perf_counter() - started)
    return seconds


BENCHMARK = Benchmark(add_arguments, rows, table.JAX)
