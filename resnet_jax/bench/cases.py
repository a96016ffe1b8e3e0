"""Selects the cases to measure: a network, an image size, a batch size and a dtype.

The interpreter of a baseline may have no JAX, so this file imports it only when needed.
"""

import argparse
import itertools
from collections.abc import Iterable, Iterator

from resnet_jax.console.arguments import Parser, count, counts, words
from resnet_jax.errors import check_known

# The name of a network in the zoo, the image size in pixels, the batch size, and the
# dtype of the computation.
Case = tuple[str, int, int, str]

# The networks and batch sizes that docs/performance.md shows.
DEFAULT_CASES: dict[str, tuple[tuple[str, list[int]], ...]] = {
    "step": (("resnet50", [32]), ("cifar_resnet20", [128])),
    "inference": (("resnet50", [1, 32]),),
    "compile": (("resnet50", [32]),),
}
TYPES = ("float32", "bfloat16")


def add_case(parser: Parser) -> None:
    """Adds the arguments that choose a network and the shape of its input."""
    parser.add_argument(
        "--model",
        help="The network, by its name in the zoo. The default is resnet50, and also"
        " cifar_resnet20 for the train step.",
    )
    parser.add_argument(
        "--image_size",
        type=count,
        help="The height and width of the images in pixels. The default is the"
        " network's own.",
    )
    parser.add_argument(
        "--batch_size",
        type=counts,
        help="The number of images, or several numbers separated by commas. The default"
        " is 32 with --model, and otherwise that of docs/performance.md.",
    )
    parser.add_argument(
        "--dtype",
        type=words,
        default=list(TYPES),
        help="The dtype of the computation, or several separated by commas. The default"
        f" is {','.join(TYPES)}.",
    )


def cases_of(task: str, args: argparse.Namespace) -> Iterator[Case]:
    """Yields the cases that the arguments of `add_case` select.

    Args:
      task: A key of `DEFAULT_CASES`.
      args: The parsed arguments.

    Raises:
      UserError: There is no such network or dtype.
    """
    from resnet_jax.models import get_spec
    from resnet_jax.models.zoo import ZOO

    check_types(args.dtype)
    networks = ((args.model, [32]),) if args.model else DEFAULT_CASES[task]
    for model, batch_sizes in networks:
        get_spec(model)
        size = args.image_size or ZOO[model].image_size
        batches = args.batch_size or batch_sizes
        for batch, dtype in itertools.product(batches, args.dtype):
            yield model, size, batch, dtype


def check_types(dtypes: Iterable[str]) -> None:
    """Checks the dtypes of a command line.

    Raises:
      UserError: A dtype is not in `TYPES`.
    """
    for dtype in dtypes:
        check_known(f"--dtype={dtype}", dtype, TYPES)


def name_of(model: str, size: int, batch: int, dtype: str) -> str:
    """Returns a case in words, such as `resnet50, 224 px, batch 32, float32`."""
    return f"{model}, {size} px, batch {batch}, {dtype}"
