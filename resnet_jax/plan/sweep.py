"""Tries options of the compiler for a chip, and keeps the best."""

import json
import pathlib
import sys
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from resnet_jax.errors import UserError
from resnet_jax.plan.ask import ask
from resnet_jax.plan.chips import chip_of

KEPT = pathlib.Path("configs", "compiler")
# Less than this part fewer cycles is no reason for an option.
WORTH = 0.002
# Of libtpu, which documents none of them; those that public TPU recipes set, and their
# opposites.
CANDIDATES = (
    {"xla_tpu_scoped_vmem_limit_kib": 32768},
    {"xla_tpu_scoped_vmem_limit_kib": 65536},
    {"xla_tpu_scoped_vmem_limit_kib": 98304},
    {"xla_tpu_rwb_fusion": False},
    {"xla_tpu_dot_dot_fusion": False},
    {"xla_tpu_enable_experimental_fusion_cost_model": True},
    {"xla_tpu_enable_multi_level_nested_loop_fusion": False},
    {"xla_tpu_nested_dot_fusion": True},
    {"xla_tpu_licm_size_inflation_ratio": 1},
    {"xla_tpu_enable_aggressive_loop_fusion_layout_opt": True},
    {"xla_jf_conv_input_fusion": False},
    {"xla_jf_conv_output_fusion": False},
)

FILE = '''"""Options of XLA's compiler for TPU {chip}, as this command found them:

{command}

README.md says what was tried.
"""

OPTIONS = {body}
'''


def sweep(config: ConfigDict, topology: str, per_chip: int) -> Iterator[dict]:
    """Compiles the train step with each candidate, then with those that help together.

    Of values of one option the best is taken.

    Yields:
      `options`, and either `refused` (why) or `cycles` and `bytes` of an image and
      `temp` (bytes of a device); the plain compiler first.
    """

    def tried(options: dict) -> dict:
        chosen = ConfigDict(config.to_dict())
        with chosen.ignore_type():
            chosen.compiler_options = options
        try:
            facts = ask(chosen, topology, per_chip=per_chip, evaluation=False)
        except UserError as error:
            return {"options": options, "refused": str(error)}
        train = facts["train"]
        if "cycles" not in train:
            return {"options": options, "refused": "it does not fit"}
        images = facts["batch_size"] / facts["devices"]
        return {
            "options": options,
            "cycles": train["cycles"] / images,
            "bytes": train["bytes"] / images,
            "temp": train["memory"]["activations"],
        }

    plain = tried({})
    yield plain
    if "refused" in plain:
        return
    helping: dict[str, dict] = {}
    for candidate in CANDIDATES:
        row = tried(candidate)
        yield row
        (name,) = candidate
        best = helping.get(name, plain)["cycles"]
        if row.get("cycles", best) < best * (1 - WORTH):
            helping[name] = row
    if len(helping) > 1:
        yield tried(
            {k: v for row in helping.values() for k, v in row["options"].items()}
        )


def best_of(rows: list[dict]) -> dict:
    """The row of fewest cycles; the plain compiler's unless it is worth it."""
    plain, *others = rows
    done = [row for row in others if "cycles" in row]
    best = min(done, key=lambda row: row["cycles"], default=plain)
    return best if best["cycles"] < plain["cycles"] * (1 - WORTH) else plain


def as_markdown(rows: list[dict]) -> str:
    """A table of the rows of `sweep`."""
    lines = ["| options | kcycles | MB | temp | verdict |", "|---|---|---|---|---|"]
    plain, best = rows[0], best_of(rows)
    for row in rows:
        name = ", ".join(f"`{k}={v}`" for k, v in row["options"].items()) or "none"
        if "refused" in row:
            lines.append(f"| {name} | | | | refused |")
            continue
        change = row["cycles"] / plain["cycles"] - 1
        verdict = "kept" if row is best else f"{change:+.1%}"
        lines.append(
            f"| {name} | {row['cycles'] / 1e3:,.1f} | {row['bytes'] / 1e6:.0f} |"
            f" {row['temp'] / 1e9:.2f} GB | {verdict} |"
        )
    return "\n".join(lines)


def keep(chip: str, options: dict, command: str) -> pathlib.Path:
    """Writes `configs/compiler/CHIP.py`, which training on the chip reads."""
    path = KEPT / f"{chip}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    items = "".join(f"    {json.dumps(k)}: {v!r},\n" for k, v in options.items())
    body = f"{{\n{items}}}" if options else "{}"
    path.write_text(FILE.format(chip=chip, command=command, body=body))
    return path


def run(
    config: ConfigDict,
    topology: str,
    per_chip: int,
    command: str,
    say: Callable[[str], None] = print,
) -> None:
    """Sweeps, prints the table, and keeps the best."""
    chip = chip_of(topology)
    if not chip:
        raise UserError("--sweep compares cycles, which only compilers for TPUs tell.")
    rows = []
    for row in sweep(config, topology, per_chip):
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    if "refused" in rows[0]:
        raise UserError(
            f"The step does not compile for {topology}: {rows[0]['refused']}"
        )
    say(as_markdown(rows))
    say(f"kept: {keep(chip, best_of(rows)['options'], command)}")
