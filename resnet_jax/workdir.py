"""A workdir is one run's, and one run at a time holds it."""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator

import psutil
from ml_collections import ConfigDict

from resnet_jax import processes, writers
from resnet_jax.config import differences
from resnet_jax.errors import UserError

# Seconds between two signs of life, and after which a run without one is dead. A file
# server answers in a second or so; a new machine takes longer than that to start.
BEAT, DEAD = 5.0, 30.0
# Seconds after which NFS shows a new file on all hosts: its cache keeps names so long.
VISIBLE_WITHIN = 60.0


@contextlib.contextmanager
def claimed(workdir: pathlib.Path, config: ConfigDict) -> Iterator[None]:
    """Holds the workdir for this run, or raises UserError if it is another one's.

    Process 0 does; the other processes must see what it wrote there.
    """
    with contextlib.ExitStack() as held:

        def claim() -> str:
            _check(workdir, config)
            workdir.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(Lock(workdir))
            if not (workdir / "config.json").exists():
                writers.write_json(workdir / "config.json", config.to_dict())
            return lock.token

        token = processes.first_does("workdir", claim)
        deadline = time.monotonic() + VISIBLE_WITHIN
        while not (seen := token_of(workdir) == token) and time.monotonic() < deadline:
            time.sleep(0.5)
        processes.agree(
            "shared workdir",
            ""
            if seen
            else f"{processes.me()} does not see in {workdir.absolute()} what process 0"
            " wrote there: --workdir must be on storage that all processes share.",
        )
        yield


def _check(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Raises UserError if a workdir is another run's, or another program's."""
    ours = ("checkpoints", "metrics.jsonl", "result.json", "report.png", "tensorboard")
    found = [name for name in ours if (workdir / name).exists()]
    saved = workdir / "config.json"
    if saved.exists():
        changed = differences(json.loads(saved.read_text()), config)
        if changed:
            raise UserError(
                f"{workdir} holds a run with another config ({'; '.join(changed[:3])}"
                f"{' ...' if len(changed) > 3 else ''}); choose another --workdir, or"
                " the old settings to go on with that run."
            )
    elif found:
        raise UserError(
            f"{workdir} already holds a {found[0]} but no config.json, so it is not"
            " this program's; choose another --workdir."
        )


class Lock:
    """Holds a workdir while it is entered: a file that says who, and a sign of life.

    A run that ends by itself takes the file away, and one killed on this host is seen
    to be dead: neither delays the next one. Of a run killed on another host less than
    `DEAD` seconds ago, the rest of them is waited for. By times of the file system
    only, since the clocks of hosts differ.

    Args:
      workdir: to be held; it exists.

    Raises:
      UserError: another run holds it.
    """

    def __init__(self, workdir: pathlib.Path):
        self._path = workdir / "running.json"
        self.token = secrets.token_hex(8)
        self._done = threading.Event()

    def __enter__(self) -> "Lock":
        me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "token": self.token,
        }
        while True:
            try:
                # Only if there is none; and not by a link, which gcsfuse has not.
                with self._path.open("x") as file:
                    file.write(json.dumps(me) + "\n")
                break
            except FileExistsError:
                self._remove_dead()
        processes.at_end.append(self.release)
        threading.Thread(target=self._live, daemon=True).start()
        return self

    def _remove_dead(self) -> None:
        """Removes the lock of a dead run, as soon as that is known."""
        first = None
        while True:
            try:
                # Opened before its time is asked for: then NFS asks the server.
                other = _read(self._path)
                seen = self._path.stat().st_mtime
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
            if here or self._now() - seen > DEAD:
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
                # No space is needed for it, where a disk is full.
                os.utime(self._path)
                owner = _read(self._path)
            except OSError:
                continue  # a file system that fails is told where it matters
            if owner.get("token") != self.token and not self._done.is_set():
                processes.end_all(
                    f"{self._path.parent} was taken over by a run on host"
                    f" {owner.get('host')}, pid {owner.get('pid')}; this one stops."
                )

    def release(self) -> None:
        """Gives the workdir back."""
        self._done.set()
        # On a read-only file system, the next run sees that this one is dead.
        with contextlib.suppress(OSError):
            if _read(self._path).get("token") == self.token:
                self._path.unlink()

    def __exit__(self, *_) -> None:
        self.release()
        processes.at_end.remove(self.release)


def token_of(workdir: pathlib.Path) -> str:
    """Of the run that holds a workdir; empty if there is none."""
    try:
        return _read(workdir / "running.json").get("token", "")
    except OSError:
        return ""


def _read(path: pathlib.Path) -> dict:
    """What a lock says; nothing while it is being written."""
    try:
        return json.loads(path.read_text())
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
