"""The command line of `python -m resnet_jax.plan`."""

import itertools
import json
import math
import signal
import sys
from collections.abc import Callable

from ml_collections import ConfigDict

from resnet_jax import plan
from resnet_jax.compiler.chips import LOCAL, chip_of
from resnet_jax.config import values
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, counts, load_config, positive_number
from resnet_jax.errors import UserError, check_known
from resnet_jax.paths import local
from resnet_jax.plan import sweep
from resnet_jax.plan.compile_subprocess import compile_config
from resnet_jax.plan.estimate import estimate
from resnet_jax.plan.largest_batch import largest, unit_of
from resnet_jax.plan.table import amount, as_text


def prices(text: str) -> list[float]:
    """Parses prices above 0, such as `1.2,3.2`."""
    return [positive_number(part) for part in text.split(",")]


def input_rate(text: str) -> float:
    """Parses a rate in images/s/core, such as `619`, or reads it from a file.

    Args:
      text: A number, or a file that `bench input --json=FILE` has written, whose first
        row in this unit is taken.

    Raises:
      UserError: The text is neither.
    """
    try:
        rate = float(text)
    except ValueError:
        try:
            tables = json.loads(local(text).read_text())
            rows = [row for table in tables for row in table["rows"]]
            values = (row["value"] for row in rows if row["unit"] == "images/s/core")
            rate = float(next(values))
        except (OSError, ValueError, TypeError, LookupError, StopIteration):
            rate = 0.0
    # At a smaller rate, a float could not hold the number of cores.
    if not 1e-3 <= rate < math.inf:
        raise UserError(
            f"--input_rate={text} is neither a number above 0 nor a file that python -m"
            " resnet_jax.bench input --json=FILE has written."
        )
    return rate


def make_parser() -> Parser:
    """Makes the parser of the command line."""
    parser = Parser("plan", plan.__doc__)
    parser.add_config(required=True)
    parser.add_argument(
        "--topology",
        default=LOCAL,
        help="The devices to plan for: CHIP:SHAPE, such as v5e:2x4, N*CHIP:SHAPE for N"
        " slices, or local for the devices of this machine. Give several with commas"
        " between them. The default is local.",
    )
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--batch_size",
        type=counts,
        default=[0],
        help="The number of images per step over all devices. Give several with commas"
        " between them. The default is the config's batch_size.",
    )
    sizes.add_argument(
        "--per_chip",
        type=counts,
        default=[0],
        help="The number of images per step and chip, in place of --batch_size. Give"
        " several with commas between them. The default is the config's batch_size"
        " divided by the number of chips.",
    )
    parser.add_argument(
        "--sharding",
        help="The placement of parameters: replicated, fsdp, or both with a comma"
        " between them. The default is the config's sharding.params.",
    )
    parser.add_argument(
        "--largest",
        action="store_true",
        help="Searches for the largest batch that fits into a chip's memory, which"
        " compiles several times. It is off by default.",
    )
    parser.add_argument(
        "--input_rate",
        type=input_rate,
        default=0.0,
        help="The rate of the input pipeline in images per second and CPU core, or the"
        " file that `bench input --json=FILE` has written. By default the number of"
        " cores that a host needs is not printed.",
    )
    parser.add_argument(
        "--price",
        type=prices,
        default=[0.0],
        help="The price of a chip-hour in your currency: one price for all topologies,"
        " or one for each with commas between them. By default no cost is printed.",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="Tries compiler options for one --topology and one --per_chip, and prints"
        " the best ones in place of a plan. It is off by default.",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="Compiles even if the figures are in the user's cache. It is off by"
        " default.",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="Prints a JSON array of plans in place of the table. It is off by"
        " default.",
    )
    return parser


def main(argv: list[str]) -> None:
    """Runs the command, which the package's docstring describes."""
    parser = make_parser()
    args = parser.parse(argv[1:])
    config = load_config(args)
    if values.empty_keys(config):
        # It imports jax, which a plan whose figures are kept does not need.
        from resnet_jax.training.completion import complete

        # Figures are kept by the values, since the weights may be replaced.
        config = complete(config)
    topologies = args.topology.split(",")
    for topology in topologies:
        chip_of(topology)
    shardings = (args.sharding or config.sharding.params).split(",")
    if args.sharding:
        # It imports jax, too.
        from resnet_jax.parallel.sharding import PARAMS

        for name in shardings:
            check_known(f"sharding.params={name!r}", name, PARAMS)
    if len(args.price) not in (1, len(topologies)):
        raise UserError(
            f"--price has {len(args.price)} prices for {len(topologies)} topologies."
            " Give one for all, or one for each, with commas between them."
        )
    if args.sweep:
        if len(topologies) > 1 or len(args.per_chip) > 1 or not args.per_chip[0]:
            raise UserError("--sweep takes one --topology and one --per_chip.")
        unused = ("sharding", "largest", "input_rate", "price", "fresh", "json")
        parser.warn_of_unused(args, unused, "--sweep")
        sweep.run(config, topologies[0], args.per_chip[0])
        return
    priced = itertools.zip_longest(topologies, args.price, fillvalue=args.price[0])
    plans: list[tuple[dict, dict]] = []
    failure = None
    for (topology, price), batch_size, per_chip, sharding in itertools.product(
        priced, args.batch_size, args.per_chip, shardings
    ):
        chosen = ConfigDict(config.to_dict())
        chosen.batch_size = batch_size or config.batch_size
        chosen.sharding.params = sharding
        try:
            facts = compile_config(
                chosen, topology, per_chip=per_chip, fresh=args.fresh
            )
            estimates = estimate(facts, input_rate=args.input_rate, price=price)
            if args.largest:
                estimates["largest"] = search(chosen, facts)
        except UserError as error:
            if not plans:
                raise
            # The plans so far may have taken long, so they are printed first.
            failure = error
            break
        plans.append((facts, estimates))
    if args.json:
        rows = [
            {"compiled": facts, "predicted": estimates} for facts, estimates in plans
        ]
        output.answer(json.dumps(rows, indent=1, allow_nan=False))
    else:
        output.answer(as_text(plans))
    if failure:
        raise failure


def search(
    config: ConfigDict,
    facts: dict,
    compile_config: Callable[..., dict] = compile_config,
) -> tuple[int, int]:
    """Searches for the largest batch that fits into a chip's memory.

    Args:
      config: The run's configuration.
      facts: The compiler's figures for `config.batch_size`, the first try.
      compile_config: Compiles; see `compile_subprocess.compile_config`.

    Returns:
      Two numbers of images per chip: the largest that fits, and the smallest that does
      not; see `largest_batch.largest`.
    """
    start = facts["batch_size"] // facts["chips"]
    # The number of steps stays, as a large batch would make the recipe too short.
    config = ConfigDict(config.to_dict())
    config.total = ConfigDict({"steps": facts["steps"]})
    config.optim.warmup = ConfigDict({"steps": 0})

    def memory_of(per_chip: int) -> tuple[int, int]:
        figures = facts
        if per_chip != start:
            topology = facts["topology"]
            figures = compile_config(
                config, topology, per_chip=per_chip, evaluation=False
            )
        estimates = estimate({k: v for k, v in figures.items() if k != "eval"})
        need, limit = estimates["memory"], estimates["limit"]
        if not estimates["fits"] and not need:
            # The compiler does not report how much memory the step needs.
            need = 2 * limit
        output.note(f"{per_chip} images per chip: {amount(need)} of {amount(limit)}")
        return need, limit

    ghost_batch = config.model.bn_group_size
    unit = unit_of(
        ghost_batch if isinstance(ghost_batch, int) else 1,
        facts["devices"],
        facts["chips"],
        config.optim.microbatches,
    )
    return largest(memory_of, start, unit)


if __name__ == "__main__":
    # An exit with an exception also ends the compiler's process.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    output.command(main)
