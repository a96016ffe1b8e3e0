"""Tries options of the compiler for a chip, and prints the best."""

import math
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from resnet_jax.compiler import options as table
from resnet_jax.compiler.chips import chip_of
from resnet_jax.console import output
from resnet_jax.errors import UserError
from resnet_jax.plan.compile_subprocess import ask

# Less than this part fewer bytes, or than a third of it fewer cycles, is no reason.
WORTH = 0.005
# libtpu 0.0.52 takes each of these, and refuses names that it does not know; it
# documents none. Large steps change with the limit of what one operation keeps in the
# chip's own memory, and with how fast copies to it are expected to be, small ones with
# the cost model and the fusions of convolutions. Options for loops and products changed
# none.
CANDIDATES = (
    {"xla_tpu_scoped_vmem_limit_kib": 32768},
    {"xla_tpu_scoped_vmem_limit_kib": 49152},
    {"xla_tpu_scoped_vmem_limit_kib": 65536},
    {"xla_tpu_scoped_vmem_limit_kib": 81920},
    {"xla_tpu_scoped_vmem_limit_kib": 98304},
    {"xla_tpu_async_copy_bandwidth_scaling_factor": 0.5},
    {"xla_tpu_async_copy_bandwidth_scaling_factor": 0.25},
    {"xla_tpu_async_copy_bandwidth_scaling_factor": 0.18},
    {"xla_tpu_async_copy_bandwidth_scaling_factor": 0.125},
    {"xla_tpu_enable_experimental_fusion_cost_model": True},
    {"xla_jf_conv_input_fusion": False},
    {"xla_jf_conv_output_fusion": False},
)


def sweep(config: ConfigDict, topology: str, per_chip: int) -> Iterator[dict]:
    """Compiles the train step with each candidate, on top of those that helped before.

    Then come variants of the step, with what was best, which change the config, not the
    chip's options.

    Yields:
      `options`, `variant` (in words; '': none), and either `refused` (why) or of an
      image `cycles`, `bytes` and `hbm_bytes` (of these, in the main memory), and `temp`
      (bytes of a device); the plain compiler first.
    """

    def tried(options: dict, variant: str = "", images: int = per_chip, **changes):
        chosen = ConfigDict(config.to_dict())
        with chosen.ignore_type():
            chosen.compiler_options = options
            chosen.model.update(changes)
        row = {"options": options, "variant": variant}
        try:
            facts = ask(chosen, topology, per_chip=images, evaluation=False)
        except UserError as error:
            return row | {"refused": str(error)}
        train = facts["train"]
        if "cycles" not in train:
            return row | {"refused": "it does not fit"}
        here = facts["batch_size"] / facts["devices"]
        return row | {
            "cycles": train["cycles"] / here,
            "bytes": train["bytes"] / here,
            "hbm_bytes": train["hbm_bytes"] / here,
            "temp": train["memory"]["activations"],
        }

    rows = [tried({})]
    yield rows[0]
    if "refused" in rows[0]:
        return
    for candidate in CANDIDATES:
        rows.append(tried(best_of(rows)["options"] | candidate))
        yield rows[-1]
    options = best_of(rows)["options"]
    scanned = not config.model.scan_blocks
    yield tried(options, f"model.scan_blocks={scanned}", scan_blocks=scanned)
    yield tried(options, "model.unwritten=False", unwritten=False)
    for images in (per_chip // 2, per_chip * 2):
        yield tried(options, f"{images} images a chip", images)


def is_better(row: dict, other: dict) -> bool:
    """Whether a row is worth taking in place of another one, which was not refused.

    A percent of cycles is worth three of bytes, which count too: the estimate of cycles
    has copies between the memories for nothing.
    """
    if "refused" in row:
        return False
    cycles, size = (math.log(row[key] / other[key]) for key in ("cycles", "bytes"))
    return 3 * cycles + size < -WORTH


def best_of(rows: list[dict]) -> dict:
    """The best of the rows without a variant, of which the first is the plain one."""
    best, *others = rows
    for row in others:
        if not row["variant"] and is_better(row, best):
            best = row
    return best


def as_markdown(rows: list[dict]) -> str:
    """A table of the rows of `sweep`."""
    lines = [
        "| tried | kcycles | MB | main memory | temp | verdict |",
        "|---" * 6 + "|",
    ]
    best = best_of(rows)
    for number, row in enumerate(rows):
        names = [f"`{k}={v}`" for k, v in row["options"].items()] or ["no options"]
        name = ", ".join([*names, *([row["variant"]] if row["variant"] else [])])
        if "refused" in row:
            lines.append(f"| {name} | | | | | refused: {row['refused']} |")
            continue
        lines.append(
            f"| {name} | {row['cycles'] / 1e3:,.1f} | {row['bytes'] / 1e6:.0f} |"
            f" {row['hbm_bytes'] / 1e6:.0f} MB |"
            f" {row['temp'] / 1e9:.2f} GB | {_verdict(row, rows[:number], best)} |"
        )
    return "\n".join(lines)


def _verdict(row: dict, before: list[dict], best: dict) -> str:
    if row is best:
        return "kept"
    if row["variant"]:
        return f"{row['cycles'] / best['cycles'] - 1:+.1%} against what is kept"
    figures = ("cycles", "bytes", "temp")
    if any(all(row[key] == other.get(key) for key in figures) for other in before):
        return "the same program"
    plain = before[0] if before else row
    return f"{row['cycles'] / plain['cycles'] - 1:+.1%}"


def run(
    config: ConfigDict,
    topology: str,
    per_chip: int,
    say: Callable[[str], None] = output.answer,
) -> None:
    """Sweeps, and prints the table and the best options."""
    chip = chip_of(topology)
    if not chip:
        raise UserError("--sweep compares cycles, which only compilers for TPUs tell.")
    rows = []
    for row in sweep(config, topology, per_chip):
        rows.append(row)
        output.note(str(row))
    if "refused" in rows[0]:
        raise UserError(
            f"The step does not compile for {topology}: {rows[0]['refused']}"
        )
    say(as_markdown(rows))
    options = best_of(rows)["options"]
    say(
        f'Use them with --config.compiler_options="{options}", or make them the'
        f" default for {chip}: {table.__file__}"
    )
