"""Defines benchmarks, the rows that they yield, and how tables are printed."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from resnet_jax.console import output
from resnet_jax.console.arguments import Parser
from resnet_jax.errors import UserError

JAX = ("jax", "jaxlib", "flax", "onednn-devel-cpu-gomp")
TORCH = ("torch", "torchvision")
# If other work takes at least this share of the cores, a table carries a warning.
# Threads that wait for each other are slowed down by many times that share.
BUSY = 0.1
HEAD = (
    "| measurement | value | baseline | baseline's value | ratio |\n"
    "|---|---|---|---|---|"
)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A command of `python -m resnet_jax.bench` that prints a table.

    Attributes:
      add_arguments: Adds the arguments of this benchmark to a parser.
      rows: Measures, and yields each row (see `row`) as soon as it is known.
      packages: The packages whose versions are printed with the table.
      baselines: The packages of the baselines, which may be installed in another
        interpreter (`--torch`).
    """

    add_arguments: Callable[[Parser], None]
    rows: Callable[[argparse.Namespace], Iterator[dict]]
    packages: Sequence[str]
    baselines: Sequence[str] = ()


def row(
    name: str,
    unit: str,
    values: Sequence[float],
    baseline: str = "",
    baseline_values: Sequence[float] = (),
    left_out: str = "",
) -> dict:
    """Makes a row of a table: a measurement, and that of a baseline.

    Args:
      name: The thing that was measured.
      unit: The unit of the values, such as `images/s`.
      values: The measured values, one for each repeat.
      baseline: The name of the baseline; '' if the row has none.
      baseline_values: The values of the baseline, one for each repeat.
      left_out: The reason why the baseline has no values; '' if it has some.

    Returns:
      A dictionary of `name`, `unit`, `value` (the median), `spread` (minimum and
      maximum), `peer` (the baseline), `peer_value`, `peer_spread`, `ratio` (value /
      peer_value), `repeats` and `left_out`.
    """
    value = statistics.median(values)
    peer_value = statistics.median(baseline_values) if baseline_values else None
    peer_spread = None
    if baseline_values:
        peer_spread = [min(baseline_values), max(baseline_values)]
    return {
        "name": name,
        "unit": unit,
        "value": value,
        "spread": [min(values), max(values)],
        "peer": baseline,
        "peer_value": peer_value,
        "peer_spread": peer_spread,
        "ratio": value / peer_value if peer_value else None,
        "repeats": len(values),
        "left_out": left_out,
    }


def as_markdown(row: dict) -> str:
    """Formats a row as a line of the Markdown table under `HEAD`."""
    cells = [row["name"], f"{_amount(row['value'], row['spread'])} {row['unit']}"]
    cells += [row["peer"] or "", "", ""]
    if row["left_out"]:
        cells[3] = f"left out: {row['left_out']}"
    elif row["peer_value"] is not None:
        cells[3] = _amount(row["peer_value"], row["peer_spread"])
        cells[4] = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _amount(value: float, spread: Sequence[float]) -> str:
    least, most = map(_number, spread)
    return f"{_number(value)} ({least} to {most})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Report:
    """Prints tables row by row, and also writes them to a JSON file.

    Args:
      path: The path of the JSON file; None writes no file.
    """

    def __init__(self, path: pathlib.Path | None):
        self.path = path
        self.tables: list[dict] = []

    def add(self, command: str, machine: dict, rows: Iterable[dict]) -> None:
        """Prints a table while its rows are measured.

        Args:
          command: The command that makes the table.
          machine: The result of `machine`.
          rows: The rows of the table; see `row`.
        """
        finished: list[dict] = []
        self.tables.append({"command": command, **machine, "rows": finished})
        for new in rows:
            # The head waits for the first row: mistakes in the arguments are reported
            # while that is measured, and then nothing is printed before the error.
            if not finished:
                output.answer(f"`{command}`\n\n{describe(machine)}\n\n{HEAD}")
            finished.append(new)
            output.answer(as_markdown(new))
            self._write()
        output.answer("")

    def _write(self) -> None:
        if self.path:
            try:
                self.path.write_text(json.dumps(self.tables, indent=1) + "\n")
            except OSError as error:
                raise UserError(f"--json={self.path}: {error.strerror}.") from None


def machine(
    packages: Sequence[str],
    baselines: Sequence[str] = (),
    baselines_python: str = sys.executable,
) -> dict:
    """Returns the machine and the versions on which the numbers of a table depend.

    Args:
      packages: The packages whose versions are recorded.
      baselines: The packages of the baselines.
      baselines_python: The Python interpreter that runs the baselines.

    Returns:
      A dictionary of `cpu`, `cores`, `memory` (bytes), `load` (of the last minute),
      `busy` (the share of the cores that other work takes), `versions`, and
      `peers_versions` if the baselines run in another interpreter.
    """
    # The interpreter of a baseline also imports this file, and may lack psutil.
    import psutil

    cpuinfo = pathlib.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    own = ("python", *packages)
    same = baselines_python == sys.executable
    facts = {
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
        "busy": psutil.cpu_percent(interval=0.5) / 100,
        "versions": _versions((*own, *baselines) if same else own),
    }
    if baselines and not same:
        facts["peers_versions"] = _versions_of(baselines_python, baselines)
    return facts


def describe(machine: dict) -> str:
    """Describes the result of `machine` and the numbers of a table in sentences."""
    text = f"{machine['cpu']}, {machine['cores']} cores,"
    text += f" {machine['memory'] / 2**30:.0f} GiB, load {machine['load']:.1f} at the"
    text += f" start; {_listed(machine['versions'])}"
    if "peers_versions" in machine:
        versions = _listed(machine["peers_versions"])
        text += f"; baselines in {versions or 'an interpreter that does not run'}"
    text += ". Medians, with the minimum and maximum of the repeats."
    if machine["busy"] > BUSY:
        text += (
            f" Other work took {machine['busy']:.0%} of the cores at the start: neither"
            " the values nor their ratios are reliable."
        )
    return text


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _versions(names: Sequence[str]) -> dict[str, str]:
    versions = {}
    for name in names:
        if name == "python":
            versions[name] = platform.python_version()
        else:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
    return versions


def _versions_of(python: str, names: Sequence[str]) -> dict[str, str]:
    """Returns the versions in another interpreter; none if it does not run."""
    code = f"from {__name__} import _versions as v; import json; print(json.dumps(v("
    code += f"{('python', *names)!r})))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError:
        return {}
    return json.loads(done.stdout) if done.returncode == 0 else {}


# Arguments that several benchmarks share.


def add_torch(parser: Parser) -> None:
    """Adds `--torch`."""
    parser.add_argument(
        "--torch",
        default=sys.executable,
        help="The Python interpreter that has torch. The default is the one that runs"
        " this command.",
    )
