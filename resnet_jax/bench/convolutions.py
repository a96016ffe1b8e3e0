"""Speed of every form of a network's convolutions on this CPU, side by side."""

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
from resnet_jax.kernels.conv import form_of
from resnet_jax.kernels.cpu.conv import FORMS, Geometry, apply, forms_of
from resnet_jax.models import create_model
from resnet_jax.models.cost import init_shapes, inner_jaxprs

# Image height, width and channels, kernel side, features, and where.
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
    """One row a convolution and direction: the chosen form against XLA's.

    All forms are printed to the terminal, with a star where another than the chosen one
    was faster.
    """
    check_types(args.dtype)
    for batch, dtype in itertools.product(args.batch_size, args.dtype):
        for shape in shapes_of(args.model, args.image_size):
            h, w, c, k, f, where = shape
            out = where.output(h, 0, k)
            pixels = batch * out * where.output(w, 1, k)
            gflop = 2e-9 * pixels * k * k * c * f
            for direction in FORMS:
                found = measure(shape, direction, batch, dtype, args.repeats)
                rates = {form: [gflop / x for x in found[form]] for form in found}
                median = {form: statistics.median(x) for form, x in rates.items()}
                chosen = form_of(direction, batch, out, c, k, where, dtype)
                star = " " if max(median, key=median.get) == chosen else "*"
                name = f"{k}x{k}/{where.stride} {c}->{f} {h} px {direction} {dtype}"
                told = [f"{form} {rate:.0f}" for form, rate in median.items()]
                output.note("  ".join((star, name, *told, chosen)))
                name += f": {chosen}"
                peer = "convolution"
                yield row(name, "GFLOP/s", rates[chosen], peer, rates[peer])


def shapes_of(name: str, image_size: int) -> collections.Counter[Shape]:
    """The convolutions without groups of a network of the zoo, and how many of each."""
    model = create_model(name)
    image = jnp.zeros((1, image_size, image_size, model.spec.in_channels))
    variables = init_shapes(model, image_size)
    found: collections.Counter[Shape] = collections.Counter()

    def collect(jaxpr) -> None:
        for equation in jaxpr.eqns:
            params = equation.params
            if equation.primitive.name == "conv_general_dilated":
                x, kernel = (variable.aval.shape for variable in equation.invars)
                if params["feature_group_count"] == 1:
                    where = Geometry(
                        params["window_strides"][0],
                        tuple(params["padding"]),
                        params["rhs_dilation"][0],
                    )
                    found[*x[1:], kernel[0], kernel[3], where] += 1
            for inner in inner_jaxprs(equation):
                collect(inner)

    collect(jax.make_jaxpr(model.apply)(variables, image).jaxpr)
    return found


def measure(
    shape: Shape, direction: str, batch_size: int, dtype: str, repeats: int
) -> dict[str, list[float]]:
    """Seconds that each form takes, in turn."""
    h, w, c, k, f, where = shape
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    x, kernel = draw(batch_size, h, w, c), draw(k, k, c, f)
    g = draw(batch_size, where.output(h, 0, k), where.output(w, 1, k), f)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    args = {"forward": (x, kernel), "input": (g, kernel), "kernel": (x, g)}[direction]
    calls = {}
    native = ["onednn"] * onednn.computes(dtype)
    for form in [*forms_of(direction, k, where), *native]:
        function = functools.partial(apply, direction, form, x=like, k=k, where=where)
        calls[form] = jax.jit(function).lower(*args).compile()
    seconds = {form: [] for form in calls}
    for repeat in range(repeats + 1):
        for form, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call(*args))
            if repeat:
                seconds[form].append(time.perf_counter() - started)
    return seconds


BENCHMARK = Benchmark(add_arguments, rows, table.JAX)
