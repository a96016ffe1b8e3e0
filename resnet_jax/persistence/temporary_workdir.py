"""A workdir that is removed when its run has ended, for dry runs."""

import contextlib
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from resnet_jax.errors import UserError
from resnet_jax.parallel import processes
from resnet_jax.persistence import storage
from resnet_jax.persistence.storage import Path


@contextlib.contextmanager
def temporary_workdir(shared: str) -> Iterator[Path]:
    """Provides a path for a workdir, and removes what the run leaves there.

    A single process gets a private directory of the operating system. Several processes
    get one beside the path that they share. Both are also removed if the run is
    stopped.

    Args:
      shared: A path on storage that all processes share; empty if there is none.

    Raises:
      UserError: Several processes have no shared path, or a single one has no directory
        of the operating system.
    """
    if processes.count() > 1:
        with _shared_workdir(shared) as workdir:
            yield workdir
        return
    token = secrets.token_hex(8)
    try:
        parent = pathlib.Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise UserError(
            f"A dry run has no place for its files ({error.strerror}); set TMPDIR to a"
            " directory with some free space."
        ) from None
    directory = parent / f"resnet_jax_dry_run_{token}"

    def remove() -> None:
        # While the process is being ended, other threads may still write there.
        for _ in range(5):
            shutil.rmtree(directory, ignore_errors=True)

    processes.at_end.append(remove)
    directory.mkdir(mode=0o700)
    try:
        yield directory / "run"
    finally:
        remove()


@contextlib.contextmanager
def _shared_workdir(shared: str) -> Iterator[Path]:
    """Provides a workdir that all processes see."""
    if not shared:
        raise UserError(
            "A dry run of several processes needs a --workdir that all share; it leaves"
            " nothing there."
        )
    # The name is new, so that no other run's directory is removed.
    token = processes.run_on_lead("dry run", lambda: secrets.token_hex(4))
    beside = storage.absolute(storage.path_of(shared))
    workdir = storage.path_of(f"{beside}.dry_run.{token}")

    def remove() -> None:
        with contextlib.suppress(FileNotFoundError):
            epath.Path(workdir).rmtree()

    # It is also removed if the run is stopped, and only after the others have left.
    if processes.index() == 0:
        processes.at_end.append(remove)
    yield workdir
    processes.agree("end of the dry run", "")
    if processes.index() == 0:
        remove()
