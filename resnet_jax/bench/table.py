"""What a benchmark is, the one form of its rows, and how they are printed."""

import argparse
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
# Threads that wait for each other lose many times what other work takes of the cores.
BUSY = 0.1
HEAD = "| measured | here | peer | the peer's | here / peer |\n|---|---|---|---|---|"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A table of `python -m resnet_jax.bench`.

    Attributes:
      add_arguments: adds those of its own to a parser.
      rows: measures; yields a row (see `row`) as soon as it is known.
      packages: whose versions matter.
      peers: those of peers, which another interpreter may have (`--torch`).
    """

    add_arguments: Callable[[Parser], None]
    rows: Callable[[argparse.Namespace], Iterator[dict]]
    packages: Sequence[str]
    peers: Sequence[str] = ()


def row(
    name: str,
    unit: str,
    values: Sequence[float],
    peer: str = "",
    peers: Sequence[float] = (),
    left_out: str = "",
) -> dict:
    """A measurement beside that of a peer.

    Args:
      name: what was measured.
      unit: of the values, such as `images/s`.
      values: one a repeat.
      peer: what it is held against; '': nothing.
      peers: the peer's values.
      left_out: why the peer has none.

    Returns:
      `name`, `unit`, `value` (the median), `spread` (least and most), `peer`,
      `peer_value`, `peer_spread`, `ratio` (value / peer_value), `repeats`, `left_out`.
    """
    value = statistics.median(values)
    peer_value = statistics.median(peers) if peers else None
    return {
        "name": name,
        "unit": unit,
        "value": value,
        "spread": [min(values), max(values)],
        "peer": peer,
        "peer_value": peer_value,
        "peer_spread": [min(peers), max(peers)] if peers else None,
        "ratio": value / peer_value if peer_value else None,
        "repeats": len(values),
        "left_out": left_out,
    }


def as_markdown(row: dict) -> str:
    """A row as a line of the table under `HEAD`."""
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
    """Prints tables as they grow, and keeps them in a file as JSON.

    Args:
      path: of the file; None: none.
    """

    def __init__(self, path: pathlib.Path | None):
        self.path = path
        self.tables: list[dict] = []
        self._write()

    def add(self, command: str, where: dict, rows: Iterable[dict]) -> None:
        """A table: the command that makes it, `machine`'s answer, and its rows."""
        table = {"command": command, **where, "rows": []}
        self.tables.append(table)
        for found in rows:
            # Not before, since what there is not is told while the first is measured.
            if not table["rows"]:
                output.answer(f"`{command}`\n\n{describe(where)}\n\n{HEAD}")
            table["rows"].append(found)
            output.answer(as_markdown(found))
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
    peers: Sequence[str] = (),
    peers_python: str = sys.executable,
) -> dict:
    """The machine and the versions that a table depends on.

    Args:
      packages: The packages whose versions matter.
      peers: The packages of the peers.
      peers_python: The interpreter that peers run in.
    """
    # Imported here: the Python of a peer, which imports this file, may lack it.
    import psutil

    cpuinfo = pathlib.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    here = ("python", *packages)
    same = peers_python == sys.executable
    versions = _versions(here + tuple(peers) if same else here)
    where = {
        "cpu": found[1] if found else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
        "busy": psutil.cpu_percent(interval=0.5) / 100,
        "versions": versions,
    }
    if peers and not same:
        where["peers_versions"] = _versions_of(peers_python, peers)
    return where


def describe(where: dict) -> str:
    """`machine`'s answer, in a sentence that also says what the table's numbers are."""
    text = f"{where['cpu']}, {where['cores']} cores, {where['memory'] / 2**30:.0f} GiB"
    text += f", load {where['load']:.1f} at the start; {_listed(where['versions'])}"
    if "peers_versions" in where:
        text += f"; peers in {_listed(where['peers_versions']) or 'no Python'}"
    text += ". Medians, and the least and most of the repeats."
    if where["busy"] > BUSY:
        text += (
            f" Other work took {where['busy']:.0%} of the cores at the start: rates are"
            " not to be trusted, nor what they are against each other."
        )
    return text


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            known = name == "python"
            found[name] = (
                platform.python_version() if known else importlib.metadata.version(name)
            )
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _versions_of(python: str, names: Sequence[str]) -> dict[str, str]:
    """Those of another interpreter; none if it does not run."""
    code = f"from {__name__} import _versions as v; import json; print(json.dumps(v("
    code += f"{('python', *names)!r})))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError:
        return {}
    return json.loads(done.stdout) if done.returncode == 0 else {}


# Arguments of several benchmarks.


def add_torch(parser: Parser) -> None:
    """Adds `--torch`."""
    parser.add_argument(
        "--torch",
        default=sys.executable,
        help="The Python interpreter that has torch. The default is the one that runs"
        " this command.",
    )
