"""The lock of a workdir, which lets one run at a time use it."""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from resnet_jax.errors import UserError
from resnet_jax.parallel import processes
from resnet_jax.persistence import storage
from resnet_jax.persistence.storage import Path, is_remote

# HEARTBEAT: seconds between two heartbeats of a lock. DEAD_AFTER: seconds without a
# heartbeat after which a run is taken to be dead. A file server answers in about a
# second, and a new machine takes longer than DEAD_AFTER to start.
HEARTBEAT, DEAD_AFTER = 5.0, 30.0
# Seconds after which NFS shows a new file on all hosts, since it caches names.
VISIBLE_WITHIN = 60.0
# Seconds after which the last of several runs that write one object at once is known.
SETTLE_TIME = 2.0
# Seconds that a run which ends waits for an object store to remove its lock.
RELEASE_TIMEOUT = 5.0


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Holds the workdir for this run for as long as the context is open.

    The lead process creates the workdir and its lock; the other processes check that
    they see the lock, so that all share the storage.

    Args:
      workdir: The run's directory, which need not exist.

    Raises:
      UserError: Another run holds the workdir, it belongs to another program, or the
        processes do not share it.
    """
    with contextlib.ExitStack() as stack:

        def claim() -> str:
            with storage.explaining_errors(workdir):
                _check(workdir)
                storage.make_directory(workdir)
                lock = stack.enter_context(Lock(workdir))
            return lock.token

        token = processes.run_on_lead("workdir", claim)
        processes.agree("shared workdir", _problem_of_sharing(workdir, token))
        yield


def _problem_of_sharing(workdir: Path, token: str) -> str:
    """Returns why this process does not see the lead process's lock, or ''."""
    deadline = time.monotonic() + VISIBLE_WITHIN
    try:
        with storage.explaining_errors(workdir):
            while token_of(workdir) != token:
                if time.monotonic() > deadline:
                    return (
                        f"{processes.describe()} does not see in"
                        f" {storage.absolute(workdir)} what process 0 wrote there:"
                        " --workdir must be on storage that all processes share."
                    )
                time.sleep(0.5)
    except UserError as error:
        return f"{processes.describe()}: {error}"
    return ""


def _check(workdir: Path) -> None:
    """Raises UserError if a workdir belongs to another program."""
    if (workdir / "config.json").exists():
        return
    if any((workdir / "checkpoints").glob("*/run/metadata")):
        return
    for name in ("metrics.jsonl", "result.json", "report.png", "tensorboard"):
        if (workdir / name).exists():
            raise UserError(
                f"{workdir} already holds a {name} but no config.json, so it belongs to"
                " another program; choose another --workdir."
            )


class Lock:
    """Holds a workdir by a file with an owner and heartbeats, while it is entered.

    The file, `running.json`, names the host and the process. A run that ends by itself
    removes it, and a killed run of this host is recognised by its process id: neither
    delays the next run. A killed run of another host is recognised after `dead_after`
    seconds without a heartbeat. Only times of the file system are compared, since the
    clocks of hosts may differ.

    In an object store a heartbeat is a new content of the object. A run of another
    host is always watched for `dead_after` seconds there. An object cannot be created
    on the condition that it does not exist: of several runs that start at once, the
    last one to write wins.

    filelock does not serve here: its locks are not seen on another host at NFS or
    gcsfuse (`flock`), or stay behind when a run is killed (`SoftFileLock`), and it
    knows no object stores.

    Args:
      workdir: The workdir, which exists.
      host: The name of this host.
      heartbeat: The time between two heartbeats, in seconds.
      dead_after: The time without a heartbeat after which a run on another host is
        taken to be dead, in seconds.
      settle_time: The time after which the last of several runs that write one object
        at once is known, in seconds.
      on_takeover: Called with a message when another run has taken the lock.

    Raises:
      UserError: Another run holds the workdir.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        host: str | None = None,
        heartbeat: float = HEARTBEAT,
        dead_after: float = DEAD_AFTER,
        settle_time: float = SETTLE_TIME,
        on_takeover: Callable[[str], Any] = processes.end_all,
    ):
        self._path = workdir / "running.json"
        self._host = host or socket.gethostname()
        self._heartbeat, self._dead_after = heartbeat, dead_after
        self._settle_time, self._on_takeover = settle_time, on_takeover
        self.token = secrets.token_hex(8)
        self._owner = {
            "host": self._host,
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "token": self.token,
        }
        self._beats = 0
        self._writing = threading.Lock()
        self._done = threading.Event()

    def __enter__(self) -> "Lock":
        # Registered before the lock is taken, since a signal may end the process right
        # after that. Releasing leaves the lock of another run alone.
        processes.at_end.append(self.release)
        while not self._try_to_take():
            self._remove_dead()
        threading.Thread(target=self._keep_alive, daemon=True).start()
        return self

    def _try_to_take(self) -> bool:
        """Takes the workdir unless a lock exists; returns whether it did."""
        if is_remote(self._path):
            if self._path.exists():
                return False
            self._path.write_text(json.dumps(self._owner))
            time.sleep(self._settle_time)
            return token_of(self._path.parent) == self.token
        try:
            # "x" creates the file only if there is none. A hard link would do as well,
            # but gcsfuse has none.
            with self._path.open("x") as file:
                file.write(json.dumps(self._owner) + "\n")
        except FileExistsError:
            return False
        return True

    def _remove_dead(self) -> None:
        """Removes the lock of a dead run as soon as it is known to be dead.

        Raises:
          UserError: The run is alive.
        """
        first, began = None, time.monotonic()
        while True:
            modified = 0.0
            try:
                # The file is opened before its time is read: then NFS asks the server.
                owner = _read(self._path)
                if not is_remote(self._path):
                    modified = self._path.stat().st_mtime
            except FileNotFoundError:
                return
            sign_of_life = owner if is_remote(self._path) else modified
            first = first or sign_of_life
            same_host = owner.get("host") == self._host
            if _is_running(owner) if same_host else sign_of_life != first:
                raise UserError(
                    f"{self._path.parent} is in use by a run on host"
                    f" {owner.get('host')}, pid {owner.get('pid')}; stop that one, or"
                    " choose another --workdir."
                )
            if is_remote(self._path):
                silent = time.monotonic() - began
            else:
                silent = self._now() - modified
            if same_host or silent > self._dead_after:
                self._path.unlink(missing_ok=True)
                return
            time.sleep(min(1.0, self._heartbeat))

    def _now(self) -> float:
        """Returns the time by the clock of the workdir's file system."""
        probe = self._path.with_name(f"running.{self.token}")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _keep_alive(self) -> None:
        while not self._done.wait(self._heartbeat):
            try:
                with self._writing:
                    owner = self._beat()
            except Exception:
                # Storage that fails is reported by those who need what they write.
                continue
            if owner.get("token") != self.token and not self._done.is_set():
                self._on_takeover(
                    f"{self._path.parent} was taken over by a run on host"
                    f" {owner.get('host')}, pid {owner.get('pid')}; this run stops."
                )

    def _beat(self) -> dict[str, Any]:
        """Writes a heartbeat; returns the owner of the lock."""
        if not is_remote(self._path):
            # Setting the time needs no space, so that it works on a full disk.
            os.utime(self._path)
            return _read(self._path)
        owner = _read(self._path)
        if owner.get("token") == self.token and not self._done.is_set():
            self._beats += 1
            self._path.write_text(json.dumps(self._owner | {"beats": self._beats}))
        return owner

    def release(self) -> None:
        """Removes the lock, so that another run can use the workdir."""
        self._done.set()
        if not is_remote(self._path):
            self._remove()
            return
        # A store that does not answer must not keep the process from ending.
        removal = threading.Thread(target=self._remove, daemon=True)
        removal.start()
        removal.join(RELEASE_TIMEOUT)

    def _remove(self) -> None:
        # Where the lock cannot be removed, the next run sees that this one is dead.
        with contextlib.suppress(Exception), self._writing:
            if _read(self._path).get("token") == self.token:
                self._path.unlink()

    def __exit__(self, *_) -> None:
        self.release()
        processes.at_end.remove(self.release)


def token_of(workdir: Path) -> str:
    """Returns the token of the run that holds a workdir, or '' if none does."""
    try:
        return _read(workdir / "running.json").get("token", "")
    except FileNotFoundError:
        return ""
    except OSError:
        if is_remote(workdir):
            raise
        return ""


def _read(path: Path) -> dict[str, Any]:
    """Returns the owner in a lock; it is empty while the lock is being written."""
    try:
        return json.loads(storage.read(path))
    except ValueError:
        return {}


def _is_running(owner: dict[str, Any]) -> bool:
    """Returns whether the process of this host that wrote a lock still runs."""
    try:
        process = psutil.Process(owner["pid"])
        # psutil adds ticks since the boot to the clock, so a clock that is set moves
        # the start of a process.
        same = abs(process.create_time() - owner["started"]) < 2
        dead = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
        return False
    return same and not dead and owner["pid"] != os.getpid()
