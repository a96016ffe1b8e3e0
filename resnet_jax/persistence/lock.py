"""The lock of a workdir: a file with an owner and heartbeats."""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil

from resnet_jax.console import output
from resnet_jax.errors import UserError
from resnet_jax.parallel import processes
from resnet_jax.persistence import storage
from resnet_jax.persistence.storage import Path, is_remote

# HEARTBEAT: seconds between two heartbeats of a lock. DEAD_AFTER: seconds for which a
# lock is watched without a heartbeat until its run is taken to be dead. A file server
# answers in about a second, and a new machine takes longer than DEAD_AFTER to start.
HEARTBEAT, DEAD_AFTER = 5.0, 30.0
# Seconds after which the last of several runs that write one object at once is known.
SETTLE_TIME = 2.0
# Seconds that a run which ends waits for an object store to remove its lock.
RELEASE_TIMEOUT = 5.0

# The entries of a lock that say where its process id means something.
_PLACE = ("host", "boot", "pid_namespace")
# The tokens of the locks that this process holds.
_held: set[str] = set()


class _Seen(NamedTuple):
    """A lock as it was read.

    Attributes:
      path: The file.
      owner: The entries of the file; none if they cannot be read.
      token: The token of the owner, or one made from the file if it has none.
      modified: The time of the last heartbeat in seconds, by the clock of the file
        system; 0 in an object store.
      sign: A value that changes with each heartbeat.
    """

    path: Path
    owner: dict[str, Any]
    token: str
    modified: float
    sign: object

    def __str__(self) -> str:
        """Returns a description of the run that wrote the lock."""
        host, pid = self.owner.get("host"), self.owner.get("pid")
        if host is None or pid is None:
            return f"a run whose lock {self.path} cannot be read"
        there = _place_of_this_process()
        is_container = self.owner.get("boot") == there["boot"] is not None and (
            self.owner.get("pid_namespace") != there["pid_namespace"]
        )
        container = " of another container" if is_container else ""
        return f"a run on host {host}, pid {pid}{container}"


class Lock:
    """Holds a workdir by a file with an owner and heartbeats, while it is entered.

    The file, `running.json`, names the process, and the host, boot and PID namespace in
    which its id means something. A run that ends by itself removes the file, and a
    killed run of the same place is recognised by its process id: neither delays the
    next run. Any other lock is watched: a heartbeat means that its run lives, and no
    heartbeat for `dead_after` seconds that it is dead, whatever the clocks say.

    A dead lock is taken over by creating its successor, `running.TOKEN.json`, whose
    name contains the token of the dead lock, so that only one run can create it. That
    run then renames the file to `running.json`. No run ever removes a lock that it did
    not write, so one that judged a lock long ago does no harm: it sees that its file
    does not succeed to `running.json` any more. If the successor dies before the
    rename, its own lock is judged and succeeded to in the same way.

    In an object store a heartbeat is a new content of the object. Stores that do not
    know how to create an object only if it does not exist keep the last of several
    that are written at once, so the lock is read again after `settle_time`.

    filelock does not serve here: its locks are not seen on another host at NFS or
    gcsfuse (`flock`), or stay behind when a run is killed (`SoftFileLock`), and it
    knows no object stores.

    Args:
      workdir: The workdir, which exists.
      host: The name of this host.
      heartbeat: The time between two heartbeats, in seconds.
      dead_after: The time without a heartbeat after which a run whose process id means
        nothing here is taken to be dead, in seconds.
      settle_time: The time after which the last of several runs that write one object
        at once is known, in seconds.
      on_takeover: Called with a message when another run has taken the lock.
      on_loss: Called with a message when the workdir was removed or moved.

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
        on_loss: Callable[[str], Any] = processes.end_all,
    ):
        self._path = workdir / "running.json"
        self._heartbeat, self._dead_after = heartbeat, dead_after
        self._settle_time = settle_time
        self._on_takeover, self._on_loss = on_takeover, on_loss
        self.token = secrets.token_hex(8)
        self._owner = {
            **_place_of_this_process(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "ticks": _start_ticks(os.getpid()),
            "token": self.token,
        }
        if host:
            self._owner["host"] = host
        self._beats = 0
        self._folder: tuple[int, int] | None = None
        self._writing = threading.Lock()
        self._done = threading.Event()

    def __enter__(self) -> "Lock":
        # Registered before the lock is taken, since a signal may end the process right
        # after that. Releasing leaves the lock of another run alone.
        processes.at_end.append(self.release)
        _held.add(self.token)
        try:
            while not self._try_to_take():
                pass
        except BaseException:
            self._forget()
            raise
        self._folder = self._identity_of_folder()
        threading.Thread(target=self._keep_alive, daemon=True).start()
        return self

    def _try_to_take(self) -> bool:
        """Takes the workdir if no living run holds it; returns whether it did.

        Raises:
          UserError: Another run holds the workdir.
        """
        target = self._path
        if chain := self._chain():
            waiting = (
                f"{self._path.parent} is locked by {chain[-1]}; waiting up to"
                f" {self._dead_after:.0f} s to see whether that one still runs."
            )
            with output.telling(waiting, min(2.0, self._dead_after / 2)):
                is_dead = self._is_dead(chain[-1])
            if not is_dead:
                return False
            target = self._successor(chain[-1].token)
        if not self._create(target):
            return False
        # The lock that was judged may have been replaced since.
        tokens = [seen.token for seen in self._chain()]
        if self.token not in tokens:
            target.unlink(missing_ok=True)
        if self.token not in tokens[-1:]:
            return False
        if target == self._path:
            return True
        if is_remote(target):
            self._path.write_text(json.dumps(self._owner))
        else:
            try:
                os.replace(target, self._path)
            except FileNotFoundError:
                return False
        # These are left by runs that were killed while they took the workdir.
        for path in self._path.parent.glob("running.*.*"):
            if path != self._successor(self.token):
                with contextlib.suppress(OSError):
                    path.unlink()
        return True

    def _chain(self) -> list[_Seen]:
        """Returns the lock of the workdir, its successor, and so on."""
        chain: list[_Seen] = []
        path = self._path
        while seen := _look(path):
            chain.append(seen)
            path = self._successor(seen.token)
        return chain

    def _successor(self, token: str) -> Path:
        """Returns the path of the lock that takes over from the one with a token."""
        return self._path.with_name(f"running.{token}.json")

    def _create(self, path: Path) -> bool:
        """Writes this run's lock unless the file exists; returns whether it did."""
        content = json.dumps(self._owner) + "\n"
        if is_remote(path):
            import fsspec

            files, name = fsspec.core.url_to_fs(os.fspath(path))
            try:
                files.pipe_file(name, content.encode(), mode="create")
            except Exception:
                # Each client has an error of its own for an object that exists.
                if not path.exists():
                    raise
            time.sleep(self._settle_time)
            seen = _look(path)
            return seen is not None and seen.token == self.token
        try:
            # "x" creates the file only if there is none. A hard link would do as well,
            # but gcsfuse has none.
            with path.open("x") as file:
                try:
                    file.write(content)
                    file.flush()
                except OSError:
                    path.unlink()
                    raise
        except FileExistsError:
            return False
        return True

    def _is_dead(self, lock: _Seen) -> bool:
        """Returns whether the run of a lock is dead, once that is known.

        It returns False if the workdir has another lock meanwhile.

        Raises:
          UserError: The run is alive.
        """
        interval = min(1.0, self._heartbeat)
        # Looks are counted and not seconds, since this process may be suspended, maybe
        # together with the other one.
        looks = math.ceil(self._dead_after / interval)
        # The time of the last heartbeat may be misleading, if a clock was set. So it
        # counts only for a run that misses the next one, too.
        few = math.ceil(2 * self._heartbeat / interval) + 1
        now = lock
        for look in range(looks + 1):
            if look:
                time.sleep(interval)
                chain = self._chain()
                if not chain or chain[-1].token != lock.token:
                    return False
                now = chain[-1]
            alive = self._is_alive(lock.owner)
            if alive or now.sign != lock.sign:
                raise UserError(
                    f"{self._path.parent} is in use by {lock}; stop that one, or choose"
                    " another --workdir."
                )
            if alive is False or (look >= few and self._is_old(lock)):
                return True
        return True

    def _is_old(self, lock: _Seen) -> bool:
        """Returns whether a file had no heartbeat by the clock of its file system."""
        if is_remote(lock.path):
            return False
        probe = self._path.with_name(f"running.{self.token}.now")
        probe.touch()
        try:
            return probe.stat().st_mtime - lock.modified > self._dead_after
        finally:
            probe.unlink(missing_ok=True)

    def _is_alive(self, owner: dict[str, Any]) -> bool | None:
        """Returns whether the run of a lock lives; None if only heartbeats can tell."""
        if all(owner.get(key) == self._owner[key] for key in _PLACE):
            return _is_running(owner)
        # Older versions wrote only the host. A process that is found is the run, and
        # one that is not found may be in another container.
        if "boot" not in owner and owner.get("host") == self._owner["host"]:
            return _is_running(owner) or None
        return None

    def check(self) -> None:
        """Checks that the workdir is still there and locked by this run.

        Raises:
          UserError: It was removed or moved, or another run has it.
        """
        try:
            seen = _look(self._path)
            is_lost = seen is None and not self._is_only_the_lock_missing()
        except Exception:
            # Storage that fails is reported by those who need what they write.
            return
        if is_lost:
            raise UserError(self._loss)
        if seen is not None and seen.token != self.token:
            raise UserError(self._takeover(seen))

    def _takeover(self, lock: _Seen) -> str:
        return f"{self._path.parent} was taken over by {lock}; this run stops."

    @property
    def _loss(self) -> str:
        return (
            f"{self._path.parent} was removed, moved or replaced while this run used"
            " it, so the run stops and writes nothing more there. The same command"
            " resumes if the folder is moved back, and starts again otherwise."
        )

    def _identity_of_folder(self) -> tuple[int, int] | None:
        """Returns what tells the folder from others of its name; None in a store."""
        if is_remote(self._path):
            return None
        status = self._path.parent.stat()
        return status.st_dev, status.st_ino

    def _is_only_the_lock_missing(self) -> bool:
        """Returns whether the folder is there as it was, except for the lock."""
        try:
            same = self._identity_of_folder() == self._folder
        except (FileNotFoundError, NotADirectoryError):
            return False
        return same and (self._path.parent / "config.json").exists()

    def _keep_alive(self) -> None:
        # A look costs little on a file system, and a request in an object store.
        looks_per_beat = 1 if is_remote(self._path) else math.ceil(self._heartbeat)
        look, missing = 0, 0
        while not self._done.wait(self._heartbeat / looks_per_beat):
            look += 1
            try:
                with self._writing:
                    if self._done.is_set():
                        return
                    seen = _look(self._path)
                    if seen is None and self._is_only_the_lock_missing():
                        # It may be the first file of all to be removed, so the others
                        # get some time.
                        missing += 1
                        if missing > 2 * looks_per_beat:
                            self._create(self._path)
                        continue
                    if seen and seen.token == self.token:
                        missing = 0
                        if look % looks_per_beat == 0:
                            self._beat()
                        continue
            except Exception:
                # Storage that fails is reported by those who need what they write.
                continue
            if seen:
                self._on_takeover(self._takeover(seen))
            else:
                self._on_loss(self._loss)
            return

    def _beat(self) -> None:
        """Writes a heartbeat."""
        if is_remote(self._path):
            self._beats += 1
            self._path.write_text(json.dumps(self._owner | {"beats": self._beats}))
        else:
            # Setting the time needs no space, so that it works on a full disk.
            os.utime(self._path)

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
            chain = self._chain()
            # A run that takes over already needs the lock before its own.
            if chain and chain[-1].token == self.token:
                chain[-1].path.unlink()
            if not chain and self._folder:
                self._remove_remains()

    def _remove_remains(self) -> None:
        """Removes what a save that was under way wrote after the workdir was gone.

        TensorStore creates the folders of the files that it writes, so there may be a
        new folder with nothing but one unfinished checkpoint.
        """
        folder = self._path.parent
        is_new = self._identity_of_folder() != self._folder
        if is_new and [path.name for path in folder.iterdir()] == ["checkpoints"]:
            (checkpoint,) = (folder / "checkpoints").iterdir()
            if checkpoint.name.split(".")[0].isdigit():
                shutil.rmtree(folder)

    def _forget(self) -> None:
        self.release()
        _held.discard(self.token)
        processes.at_end.remove(self.release)

    def __exit__(self, *_) -> None:
        self._forget()


def token_of(workdir: Path) -> str:
    """Returns the token of the run that holds a workdir, or '' if none does."""
    try:
        seen = _look(workdir / "running.json")
    except OSError:
        if is_remote(workdir):
            raise
        return ""
    return seen.token if seen else ""


def _look(path: Path) -> _Seen | None:
    """Reads a lock; returns None if there is none."""
    modified = 0
    try:
        if is_remote(path):
            content = storage.read(path)
        else:
            # A link is an error, since no file could be created in its place where it
            # leads nowhere. A named pipe is read as an empty file, without waiting.
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(file, "rb") as lock:
                content = lock.read()
                # An open file's time comes from the server at NFS.
                modified = os.fstat(file).st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        owner = json.loads(content)
    except ValueError:
        # The lock is just being written, or was cut off.
        owner = {}
    owner = owner if isinstance(owner, dict) else {}
    token = owner.get("token")
    if not isinstance(token, str) or not token.isalnum():
        # A file that was cut off later is another lock.
        token = hashlib.sha256(content + str(modified).encode()).hexdigest()[:16]
    sign = content if is_remote(path) else modified
    return _Seen(path, owner, token, modified / 1e9, sign)


def _place_of_this_process() -> dict[str, Any]:
    """Returns where the id of this process means something.

    Two hosts may have one name, and so may two containers of a host. Where there is no
    /proc, as on macOS, there are no PID namespaces either.
    """
    place: dict[str, Any] = {"host": socket.gethostname()} | dict.fromkeys(_PLACE[1:])
    proc = pathlib.Path("/proc")
    with contextlib.suppress(OSError):
        place["boot"] = (proc / "sys/kernel/random/boot_id").read_text().strip()
        place["pid_namespace"] = os.readlink(proc / "self/ns/pid")
        if os.readlink(proc / "self") != str(os.getpid()):
            # /proc shows another namespace, so that no process can be looked up.
            place["pid_namespace"] += f" without its /proc {secrets.token_hex(8)}"
    return place


def _start_ticks(pid: int) -> int | None:
    """Returns when a process started, in ticks since the boot; None without /proc.

    Other times of the start are relative to a clock, and change when it is set.
    """
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name of the program, in parentheses, may contain anything.
    return int(text.rpartition(")")[2].split()[19])


def _is_running(owner: dict[str, Any]) -> bool | None:
    """Returns whether the process that wrote a lock still runs.

    Args:
      owner: The entries of a lock of this host, boot and PID namespace.

    Returns:
      None if that cannot be known.
    """
    pid = owner.get("pid")
    if type(pid) is not int or pid <= 0:
        return None
    if pid == os.getpid():
        return owner.get("token") in _held
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # It is a process of another user.
        pass
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return False
        if owner.get("ticks") is not None:
            return _start_ticks(pid) == owner["ticks"]
        # psutil adds ticks since the boot to the clock on some systems.
        return abs(process.create_time() - owner["started"]) < 2
    except (psutil.Error, KeyError, TypeError):
        # /proc may hide the processes of other users.
        return None
