"""Tries compiler options for a chip, one after the other, and prints the best ones."""

import math
from collections.abc import Callable, Iterator, Sequence

from ml_collections import ConfigDict

from resnet_jax.compiler import options as options_by_chip
from resnet_jax.compiler.chips import chip_of
from resnet_jax.console import output
from resnet_jax.errors import UserError
from resnet_jax.plan.compile_subprocess import compile_config

# An option is kept only if it saves at least this fraction of the bytes, or a third of
# it of the cycles.
WORTH = 0.005
# libtpu 0.0.52 accepts each of these options, and rejects names that it does not know;
# it documents none of them. Large steps change with the limit of the chip's own memory
# that one operation may use, and with the expected speed of copies to it. Small steps
# change with the cost model and the fusions of convolutions. Options for loops and
# matrix products changed no step.
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


def sweep(
    config: ConfigDict,
    topology: str,
    per_chip: int,
    candidates: Sequence[dict] = CANDIDATES,
    compile_config: Callable[..., dict] = compile_config,
) -> Iterator[dict]:
    """Compiles the train step with each candidate, added to the best options so far.

    Variants of the step with the best options follow the candidates. They change the
    config and not the chip's options.

    Args:
      config: The run's configuration, whose compiler options are replaced.
      topology: The devices to compile for, such as `v5e:2x4`.
      per_chip: Images per step and chip.
      candidates: The options to try.
      compile_config: Compiles; see `compile_subprocess.compile_config`.

    Yields:
      A row per compilation, of which the first has no options. It holds `options`,
      `variant` (in words, or ""), and either `refused` (the reason why it does not
      compile) or per image `cycles`, `bytes` and `hbm_bytes` (those in HBM), and `temp`
      (bytes of a device for intermediate results).
    """

    def row_of(options: dict, variant: str = "", images: int = per_chip, **changes):
        """Compiles one variant; `changes` are keys of `config.model`."""
        chosen = ConfigDict(config.to_dict())
        with chosen.ignore_type():
            chosen.compiler_options = options
            chosen.model.update(changes)
        row = {"options": options, "variant": variant}
        try:
            facts = compile_config(chosen, topology, per_chip=images, evaluation=False)
        except UserError as error:
            return row | {"refused": str(error)}
        train = facts["train"]
        if "cycles" not in train:
            return row | {"refused": "it does not fit into the memory"}
        images_per_device = facts["batch_size"] / facts["devices"]
        return row | {
            "cycles": train["cycles"] / images_per_device,
            "bytes": train["bytes"] / images_per_device,
            "hbm_bytes": train["hbm_bytes"] / images_per_device,
            "temp": train["memory"]["activations"],
        }

    rows = [row_of({})]
    yield rows[0]
    if "refused" in rows[0]:
        return
    for candidate in candidates:
        rows.append(row_of(best_of(rows)["options"] | candidate))
        yield rows[-1]
    options = best_of(rows)["options"]
    scanned = not config.model.scan_blocks
    yield row_of(options, f"model.scan_blocks={scanned}", scan_blocks=scanned)
    yield row_of(options, "model.fused_norm=False", fused_norm=False)
    for images in (per_chip // 2, per_chip * 2):
        yield row_of(options, f"{images} images a chip", images)


def is_better(row: dict, best: dict) -> bool:
    """Returns whether a row is better than the best one so far.

    One percent of the cycles counts as much as three percent of the bytes. Bytes count
    because the estimate of cycles ignores copies between memories.

    Args:
      row: A row of `sweep`.
      best: A row of `sweep` that was not refused.
    """
    if "refused" in row:
        return False
    cycles, size = (math.log(row[key] / best[key]) for key in ("cycles", "bytes"))
    return 3 * cycles + size < -WORTH


def best_of(rows: list[dict]) -> dict:
    """Returns the best of the rows without a variant; the first has no options."""
    best, *other_rows = rows
    for row in other_rows:
        if not row["variant"] and is_better(row, best):
            best = row
    return best


def as_markdown(rows: list[dict]) -> str:
    """Returns the rows of `sweep` as a table in Markdown."""
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


def _verdict(row: dict, earlier_rows: list[dict], best: dict) -> str:
    """Returns the last cell of a row: its change in cycles, or "kept"."""
    if row is best:
        return "kept"
    if row["variant"]:
        return f"{row['cycles'] / best['cycles'] - 1:+.1%} against what is kept"
    figures = ("cycles", "bytes", "temp")
    if any(
        all(row[key] == earlier.get(key) for key in figures) for earlier in earlier_rows
    ):
        return "the same program"
    plain = earlier_rows[0] if earlier_rows else row
    return f"{row['cycles'] / plain['cycles'] - 1:+.1%}"


def run(
    config: ConfigDict,
    topology: str,
    per_chip: int,
    say: Callable[[str], None] = output.answer,
    sweep: Callable[..., Iterator[dict]] = sweep,
) -> None:
    """Tries all options, and prints the table and the best ones.

    Args:
      config: The run's configuration.
      topology: The TPU devices to compile for, such as `v5e:2x4`.
      per_chip: Images per step and chip.
      say: Prints a text.
      sweep: Yields the rows; see the function `sweep`.

    Raises:
      UserError: The topology is not a TPU, or the step does not compile without
        options.
    """
    chip = chip_of(topology)
    if not chip:
        raise UserError(
            "--sweep compares cycles, which only compilers for TPUs estimate. Give a"
            " TPU, such as --topology=v5e:2x4."
        )
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
        f" default for {chip}: {options_by_chip.__file__}"
    )
