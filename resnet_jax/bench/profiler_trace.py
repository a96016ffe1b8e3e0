"""Reads the costliest operations from a profiler trace, without TensorBoard."""

import collections
import pathlib
from collections.abc import Callable, Iterable, Iterator

import jax

from resnet_jax.console import output


def profile(run: Callable[[], object], folder: str) -> None:
    """Writes a trace of one call to a folder, and prints the costliest operations."""
    with jax.profiler.trace(folder):
        run()
    output.note(f"costliest operations of the trace in {folder}:")
    for name, seconds in costliest(pathlib.Path(folder)):
        output.note(f"{1e3 * seconds:10.3f} ms  {name}")


def costliest(trace: pathlib.Path, count: int = 10) -> list[tuple[str, float]]:
    """Returns the operations that take longest in the newest trace of a folder.

    Args:
      trace: The folder.
      count: The number of operations.

    Returns:
      The name and the seconds of each operation, summed over its calls, the longest
      first.
    """
    seconds: dict[str, float] = collections.defaultdict(float)
    for name, duration in read_operations(trace):
        seconds[name] += duration
    return sorted(seconds.items(), key=lambda item: -item[1])[:count]


def read_operations(trace: pathlib.Path) -> Iterator[tuple[str, float]]:
    """Yields the operations of the newest trace in a folder; see `operations`."""
    files = sorted(trace.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return operations(jax.profiler.ProfileData.from_file(str(files[-1])).planes)


def operations(planes: Iterable) -> Iterator[tuple[str, float]]:
    """Yields the name and the seconds of each call of an operation in a trace.

    On GPUs the operations are the kernels and copies of each stream. The host's threads
    also record events under the name of an operation; these are left out, since they
    are not the time that the operation takes. On other platforms the operations are
    those of the compiled program.

    Args:
      planes: The planes of `jax.profiler.ProfileData`.
    """
    planes = list(planes)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in gpus or planes:
        for line in plane.lines:
            if gpus and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                name = event.name if gpus else dict(event.stats).get("hlo_op")
                if name:
                    yield name, event.duration_ns / 1e9
