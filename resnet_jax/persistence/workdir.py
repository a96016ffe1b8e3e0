"""The workdir of a run, which one run at a time uses."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from resnet_jax.console import output
from resnet_jax.errors import UserError
from resnet_jax.parallel import processes
from resnet_jax.persistence import storage
from resnet_jax.persistence.lock import Lock, token_of
from resnet_jax.persistence.storage import Path

# Seconds after which NFS shows a new file on all hosts, since it caches names.
VISIBLE_WITHIN = 60.0
# Seconds that a run which misses a file waits to see whether its workdir is removed.
REMOVED_WITHIN = 2.0


@contextlib.contextmanager
def claimed(
    workdir: Path, on_loss: Callable[[str], Any] = processes.end_all
) -> Iterator[Callable[[], None]]:
    """Holds the workdir for this run for as long as the context is open.

    The lead process creates the workdir and its lock; the other processes check that
    they see the lock, so that all share the storage.

    Args:
      workdir: The run's directory, which need not exist.
      on_loss: Called by another thread with a message when the workdir was removed or
        moved.

    Yields:
      A function to be called before the run writes to the workdir. In the lead process
      it raises UserError if the workdir was removed or moved, or another run has it.

    Raises:
      UserError: Another run holds the workdir, it belongs to another program, or the
        processes do not share it; or it was removed or moved inside the context.
    """
    with contextlib.ExitStack() as stack:
        locks: list[Lock] = []

        def claim() -> str:
            with storage.explaining_errors(workdir):
                _check(workdir)
                storage.make_directory(workdir)
                locks.append(stack.enter_context(Lock(workdir, on_loss=on_loss)))
            return locks[0].token

        def check() -> None:
            for lock in locks:
                lock.check()

        token = processes.run_on_lead("workdir", claim)
        processes.agree("shared workdir", _problem_of_sharing(workdir, token))
        try:
            yield check
        except (UserError, OSError) as error:
            # What failed may have failed because the workdir is gone, or is just being
            # removed.
            check()
            deadline = time.monotonic() + REMOVED_WITHIN
            while _lacks_a_file(error) and time.monotonic() < deadline:
                time.sleep(0.1)
                check()
            raise


def _lacks_a_file(error: BaseException | None) -> bool:
    """Returns whether an error or one of its causes is that a file is missing."""
    while error and not isinstance(error, FileNotFoundError):
        error = error.__cause__ or error.__context__
    return error is not None


def _problem_of_sharing(workdir: Path, token: str) -> str:
    """Returns why this process does not see the lead process's lock, or ''."""
    deadline = time.monotonic() + VISIBLE_WITHIN
    folder = storage.absolute(workdir)
    waiting = (
        f"{processes.describe()} waits up to {VISIBLE_WITHIN:.0f} s to see in {folder}"
        " what process 0 wrote there."
    )
    try:
        with storage.explaining_errors(workdir), output.telling(waiting):
            while token_of(workdir) != token:
                if time.monotonic() > deadline:
                    return (
                        f"{processes.describe()} does not see in {folder} what process"
                        " 0 wrote there: --workdir must be on storage that all"
                        " processes share."
                    )
                time.sleep(0.5)
    except UserError as error:
        return f"{processes.describe()}: {error}"
    return ""


def _check(workdir: Path) -> None:
    """Raises UserError if a new run would replace files that it did not write."""
    if (workdir / "config.json").exists():
        return
    if any((workdir / "checkpoints").glob("*/run/metadata")):
        return
    names = ("metrics.jsonl", "result.json", "report.png", "tensorboard")
    present = [name for name in names if (workdir / name).exists()]
    if present:
        listed = " and ".join(filter(None, (", ".join(present[:-1]), present[-1])))
        raise UserError(
            f"{workdir} holds {listed}, which a new run would replace, but neither a"
            " config.json nor a checkpoint from which a run could resume. Choose"
            f" another --workdir, or first move or remove {listed}."
        )
