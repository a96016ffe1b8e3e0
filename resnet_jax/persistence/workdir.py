"""A workdir is one run's, and one run at a time holds it."""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator

import psutil

from resnet_jax.errors import UserError
from resnet_jax.parallel import processes
from resnet_jax.persistence import storage
from resnet_jax.persistence.storage import Path, is_remote

# Seconds between two signs of life, and after which a run without one is dead. A file
# server answers in a second or so; a new machine takes longer than that to start.
BEAT, DEAD = 5.0, 30.0
# Seconds after which NFS shows a new file on all hosts: its cache keeps names so long.
VISIBLE_WITHIN = 60.0
# Seconds after which the last of several runs that wrote one object at once has done.
SETTLED = 2.0
# Seconds in which an object store must take a lock back from a run that ends.
GIVEN_BACK = 5.0


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Holds the workdir for this run.

    Process 0 does; the other processes must see what it wrote there.

    Raises UserError if another run holds it, or it is another program's.
    """
    with contextlib.ExitStack() as held:

        def claim() -> str:
            with storage.telling(workdir):
                _check(workdir)
                storage.make_directory(workdir)
                lock = held.enter_context(Lock(workdir))
            return lock.token

        token = processes.first_does("workdir", claim)
        processes.agree("shared workdir", _not_shared(workdir, token))
        yield


def _not_shared(workdir: Path, token: str) -> str:
    """Why this process does not see the lock of process 0; empty if it does."""
    deadline = time.monotonic() + VISIBLE_WITHIN
    try:
        with storage.telling(workdir):
            while token_of(workdir) != token:
                if time.monotonic() > deadline:
                    where = storage.absolute(workdir)
                    return (
                        f"{processes.me()} does not see in {where} what process 0 wrote"
                        " there: --workdir must be on storage that all processes share."
                    )
                time.sleep(0.5)
    except UserError as error:
        return f"{processes.me()}: {error}"
    return ""


def _check(workdir: Path) -> None:
    """Raises UserError if a workdir is another program's."""
    if (workdir / "config.json").exists():
        return
    if any((workdir / "checkpoints").glob("*/run/metadata")):
        return
    for name in ("metrics.jsonl", "result.json", "report.png", "tensorboard"):
        if (workdir / name).exists():
            raise UserError(
                f"{workdir} already holds a {name} but no config.json, so it is not"
                " this program's; choose another --workdir."
            )


class Lock:
    """Holds a workdir while it is entered: a file that says who, and a sign of life.

    A run that ends by itself takes the file away, and one killed on this host is seen
    to be dead: neither delays the next one. Of a run killed on another host less than
    `DEAD` seconds ago, the rest of them is waited for. By times of the file system
    only, since the clocks of hosts differ.

    In an object store the sign of life is another content; of a run on another host,
    `DEAD` seconds without one are always waited for. Nothing there is made only if it
    is not there yet: of several runs that begin at once, the last to write has it.

    Args:
      workdir: to be held; it exists.

    Raises:
      UserError: another run holds it.
    """

    def __init__(self, workdir: Path):
        self._path = workdir / "running.json"
        self.token = secrets.token_hex(8)
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "token": self.token,
        }
        self._beats = 0
        self._writing = threading.Lock()
        self._done = threading.Event()

    def __enter__(self) -> "Lock":
        # Before it is taken, since a signal may end the process right after; what is
        # another run's stays.
        processes.at_end.append(self.release)
        while not self._taken():
            self._remove_dead()
        threading.Thread(target=self._live, daemon=True).start()
        return self

    def _taken(self) -> bool:
        """Takes the workdir if there is no lock; returns whether it did."""
        if is_remote(self._path):
            if self._path.exists():
                return False
            self._path.write_text(json.dumps(self._me))
            time.sleep(SETTLED)
            return token_of(self._path.parent) == self.token
        try:
            # Only if there is none; and not by a link, which gcsfuse has not.
            with self._path.open("x") as file:
                file.write(json.dumps(self._me) + "\n")
        except FileExistsError:
            return False
        return True

    def _remove_dead(self) -> None:
        """Removes the lock of a dead run, as soon as that is known."""
        first, began = None, time.monotonic()
        while True:
            try:
                # Opened before its time is asked for: then NFS asks the server.
                other = _read(self._path)
                seen = other if is_remote(self._path) else self._path.stat().st_mtime
            except FileNotFoundError:
                return
            first = first or seen
            here = other.get("host") == socket.gethostname()
            if _is_running(other) if here else seen != first:
                raise UserError(
                    f"{self._path.parent} is in use by a run on host"
                    f" {other.get('host')}, pid {other.get('pid')}; stop that one, or"
                    " choose another --workdir."
                )
            if is_remote(self._path):
                silent = time.monotonic() - began
            else:
                silent = self._now() - seen
            if here or silent > DEAD:
                self._path.unlink(missing_ok=True)
                return
            time.sleep(min(1.0, BEAT))

    def _now(self) -> float:
        """The time by the clock of the workdir's file system."""
        probe = self._path.with_name(f"running.{self.token}")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _live(self) -> None:
        while not self._done.wait(BEAT):
            try:
                with self._writing:
                    owner = self._beat()
            except Exception:
                continue  # storage that fails is told where it matters
            if owner.get("token") != self.token and not self._done.is_set():
                processes.end_all(
                    f"{self._path.parent} was taken over by a run on host"
                    f" {owner.get('host')}, pid {owner.get('pid')}; this one stops."
                )

    def _beat(self) -> dict:
        """Gives a sign of life; returns whose lock it is."""
        if not is_remote(self._path):
            # No space is needed for it, where a disk is full.
            os.utime(self._path)
            return _read(self._path)
        owner = _read(self._path)
        if owner.get("token") == self.token and not self._done.is_set():
            self._beats += 1
            self._path.write_text(json.dumps(self._me | {"beats": self._beats}))
        return owner

    def release(self) -> None:
        """Gives the workdir back."""
        self._done.set()
        if not is_remote(self._path):
            self._remove()
            return
        # A store that does not answer must not keep the process.
        removal = threading.Thread(target=self._remove, daemon=True)
        removal.start()
        removal.join(GIVEN_BACK)

    def _remove(self) -> None:
        # On a read-only file system, the next run sees that this one is dead.
        with contextlib.suppress(Exception), self._writing:
            if _read(self._path).get("token") == self.token:
                self._path.unlink()

    def __exit__(self, *_) -> None:
        self.release()
        processes.at_end.remove(self.release)


def token_of(workdir: Path) -> str:
    """Of the run that holds a workdir; empty if there is none."""
    try:
        return _read(workdir / "running.json").get("token", "")
    except FileNotFoundError:
        return ""
    except OSError:
        if is_remote(workdir):
            raise
        return ""


def _read(path: Path) -> dict:
    """What a lock says; nothing while it is being written."""
    try:
        return json.loads(storage.read(path))
    except ValueError:
        return {}


def _is_running(owner: dict) -> bool:
    """Whether the process of this host that wrote a lock still runs."""
    try:
        process = psutil.Process(owner["pid"])
        # Clocks that are set move what psutil makes of ticks since the boot.
        same = abs(process.create_time() - owner["started"]) < 2
        dead = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
        return False
    return same and not dead and owner["pid"] != os.getpid()
