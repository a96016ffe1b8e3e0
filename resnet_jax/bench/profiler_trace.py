"""The costliest operations of a profiler trace, read without TensorBoard."""

import collections
import pathlib
from collections.abc import Callable, Iterable, Iterator

import jax

from resnet_jax.console import output


def profile(run: Callable[[], None], folder: str) -> None:
    """Writes a trace of a call, and prints the operations that take longest."""
    with jax.profiler.trace(folder):
        run()
    output.note(f"costliest operations of the trace in {folder}:")
    for name, seconds in costliest(pathlib.Path(folder)):
        output.note(f"{1e3 * seconds:10.3f} ms  {name}")


def costliest(trace: pathlib.Path, count: int = 10) -> list[tuple[str, float]]:
    """The operations of the newest trace in a folder that take longest, in seconds."""
    seconds: collections.Counter[str] = collections.Counter()
    for name, duration in events_of(trace):
        seconds[name] += duration
    return seconds.most_common(count)


def events_of(trace: pathlib.Path) -> Iterator[tuple[str, float]]:
    """Yields the operations of the newest trace in a folder; see `operations`."""
    files = sorted(trace.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return operations(jax.profiler.ProfileData.from_file(str(files[-1])).planes)


def operations(planes: Iterable) -> Iterator[tuple[str, float]]:
    """Yields the name and the seconds of each operation that a trace has.

    On GPUs these are the kernels and copies of each stream: what XLA's own threads do
    for an operation is recorded under the operation's name as well, and is not the time
    that it takes. Elsewhere they are the operations of the compiled program.

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
