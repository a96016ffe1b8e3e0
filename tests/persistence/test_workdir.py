"""One run at a time holds a workdir; a dead run does not keep the next one out."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

import psutil
import pytest

from resnet_jax.errors import UserError
from resnet_jax.parallel import processes
from resnet_jax.persistence.lock import Lock, token_of
from resnet_jax.persistence.workdir import claimed

HOST = socket.gethostname()
# About a tenth of a second for a second of the real ones.
QUICK = {"heartbeat": 0.1, "dead_after": 1.0}


# Holds the workdirs that are its arguments, one after the other, or says why it cannot.
HOLDER = """
import pathlib, sys
from resnet_jax.errors import UserError
from resnet_jax.persistence.lock import Lock

for name in sys.argv[1:]:
    print("ready", flush=True)
    input()
    try:
        with Lock(pathlib.Path(name), heartbeat=0.2) as lock:
            print("held", lock.token, flush=True)
            input()
        print("released", flush=True)
    except UserError as error:
        print(error, flush=True)
"""


def write_lock(folder: pathlib.Path, age: float = 0.0, **changes) -> pathlib.Path:
    """Writes a lock of this process on another host, with changes.

    Args:
      folder: The workdir.
      age: Seconds since the last heartbeat.
      **changes: Other entries of the owner.
    """
    path = folder / "running.json"
    with tempfile.TemporaryDirectory() as other, Lock(pathlib.Path(other)):
        owner = json.loads(pathlib.Path(other, path.name).read_text())
    owner |= {"host": "elsewhere", "token": "another"}
    path.write_text(json.dumps(owner | changes))
    os.utime(path, (time.time() - age,) * 2)
    return path


class Holder:
    """A process that holds workdirs; it ends with the context.

    Args:
      *folders: The workdirs that it tries to hold, one after the other.
      prefix: A command that runs the process, such as `unshare`.
    """

    def __init__(self, *folders: pathlib.Path, prefix: tuple[str, ...] = ()):
        command = (*prefix, sys.executable, "-c", HOLDER, *map(str, folders))
        self.process = subprocess.Popen(
            command, stdin=-1, stdout=-1, stderr=-2, text=True
        )

    def __enter__(self) -> "Holder":
        return self

    def __exit__(self, *_) -> None:
        for child in psutil.Process(self.process.pid).children():
            child.kill()
        self.process.kill()
        self.process.communicate()

    def read(self) -> str:
        """Returns its next line."""
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        """Lets it take the next workdir, or release the one that it holds."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def take(self) -> str:
        """Lets it take the next workdir; returns what it says of it."""
        assert self.read() == "ready"
        self.go()
        return self.read()


def namespaces(*options: str) -> tuple[str, ...]:
    """Returns a command that runs another one in new namespaces, or skips the test."""
    command = ("unshare", *([] if os.geteuid() == 0 else ["-Ur"]), *options)
    if not shutil.which("unshare") or subprocess.run([*command, "true"]).returncode:
        pytest.skip("this system does not allow new namespaces")
    return command


@contextlib.contextmanager
def sleeping_process():
    """Starts a process that waits until the context ends."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
    yield process
    process.kill()
    process.communicate()


def test_a_lock_exists_while_it_is_held_and_no_file_is_left(tmp_path):
    with Lock(tmp_path) as held:
        assert token_of(tmp_path) == held.token
        assert held.release in processes.at_end
    assert list(tmp_path.iterdir()) == []
    assert held.release not in processes.at_end


def test_the_error_of_a_second_run_names_host_and_process_of_the_first(tmp_path):
    with Holder(tmp_path) as other:
        held = other.take()
        with pytest.raises(UserError, match=f"host {HOST}, pid {other.process.pid};"):
            Lock(tmp_path).__enter__()
        assert held == f"held {token_of(tmp_path)}"


def test_a_killed_run_on_this_host_does_not_delay_the_next_one(tmp_path):
    with Holder(tmp_path) as other:
        other.take()
        other.process.kill()
        # It is killed, but its parent has not yet asked for its exit code.
        while psutil.Process(other.process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        # If this waited for the run, it would end in the timeout of tests.
        with Lock(tmp_path, dead_after=3600.0):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_has_the_id_of_a_dead_run_does_not_hold_its_workdir(tmp_path):
    with sleeping_process() as other:
        write_lock(tmp_path, host=HOST, pid=other.pid)
        with Lock(tmp_path, dead_after=3600.0):
            pass
    # The first process of a container has the id of that of the container before it.
    write_lock(tmp_path, host=HOST)
    with Lock(tmp_path, dead_after=3600.0):
        pass


def test_a_run_on_another_host_keeps_the_workdir_while_it_lives(tmp_path):
    path = write_lock(tmp_path)
    done = threading.Event()

    def beat():
        while not done.wait(QUICK["heartbeat"]):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="host elsewhere, pid"):
            Lock(tmp_path, **QUICK).__enter__()
    finally:
        done.set()
        thread.join()


def test_a_silent_run_on_another_host_is_dead_after_some_seconds(tmp_path):
    path = write_lock(tmp_path)
    last = path.stat().st_mtime
    with Lock(tmp_path, **QUICK):
        assert path.stat().st_mtime > last + QUICK["dead_after"]


def test_seconds_for_which_a_run_has_been_silent_are_not_waited_for_again(tmp_path):
    write_lock(tmp_path, age=3599.5)
    # If this waited for an hour, it would end in the timeout of tests.
    with Lock(tmp_path, heartbeat=0.1, dead_after=3600.0):
        pass


def test_a_lock_that_was_cut_off_counts_as_one_of_an_unknown_host(tmp_path):
    path = write_lock(tmp_path)
    path.write_text("")
    with Lock(tmp_path, **QUICK) as held:
        assert token_of(tmp_path) == held.token


def test_a_run_whose_workdir_was_taken_over_stops(tmp_path):
    messages, called = [], threading.Event()

    def stop(message: str) -> None:
        messages.append(message)
        called.set()

    with Lock(tmp_path, **QUICK, on_takeover=stop):
        write_lock(tmp_path)
        assert called.wait(60)
    assert "taken over by a run on host elsewhere" in messages[0]
    assert token_of(tmp_path) == "another"


def test_a_run_of_this_process_keeps_its_workdir(tmp_path):
    with (
        Lock(tmp_path) as first,
        pytest.raises(UserError, match=f"host {HOST}, pid {os.getpid()};"),
    ):
        Lock(tmp_path).__enter__()
    assert first.token != token_of(tmp_path) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no namespaces")
@pytest.mark.parametrize(
    "options",
    [
        ("--pid", "--fork", "--mount-proc"),
        # Here /proc shows the processes of another namespace.
        ("--pid", "--fork"),
    ],
)
def test_a_run_in_another_container_with_this_host_name_keeps_its_workdir(
    tmp_path, options
):
    with Holder(tmp_path, prefix=namespaces(*options)) as other:
        held = other.take()
        with pytest.raises(UserError, match=r"host \S+, pid 1 of another container;"):
            Lock(tmp_path).__enter__()
        assert held == f"held {token_of(tmp_path)}"


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no namespaces")
def test_a_run_is_seen_from_another_container_with_its_host_name(tmp_path):
    prefix = namespaces("--pid", "--fork", "--mount-proc")
    with (
        Lock(tmp_path, heartbeat=0.2) as held,
        Holder(tmp_path, prefix=prefix) as other,
    ):
        line = other.take()
        assert f"in use by a run on host {HOST}, pid {os.getpid()} of an" in line
        assert token_of(tmp_path) == held.token


@pytest.mark.parametrize(
    "changes",
    [
        # A container that was started again, a machine with the same name, and a
        # version that did not write where its process id means something.
        {"host": HOST, "pid_namespace": "pid:[1]"},
        {"host": HOST, "boot": "another"},
    ],
)
def test_a_silent_run_that_cannot_be_looked_up_is_dead_after_some_seconds(
    tmp_path, changes, capsys
):
    path = write_lock(tmp_path, **changes)
    last = path.stat().st_mtime
    with Lock(tmp_path, **QUICK):
        assert path.stat().st_mtime > last + 0.9 * QUICK["dead_after"]
    assert "waiting up to 1 s to see whether that" in capsys.readouterr().err


def test_a_lock_of_an_older_version_is_judged_by_its_process_and_heartbeats(tmp_path):
    with sleeping_process() as other:
        owner = {
            "host": HOST,
            "pid": other.pid,
            "started": psutil.Process(other.pid).create_time(),
            "token": "0123456789abcdef",
        }
        path = tmp_path / "running.json"
        path.write_text(json.dumps(owner))
        with pytest.raises(UserError, match=f"host {HOST}, pid {other.pid}"):
            Lock(tmp_path, dead_after=3600.0).__enter__()
    # The process may be in another container, but there are no heartbeats either.
    with Lock(tmp_path, **QUICK) as held:
        assert token_of(tmp_path) == held.token


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
def test_the_clock_of_a_file_server_does_not_decide_whether_a_run_lives(
    tmp_path, ahead
):
    path = write_lock(tmp_path, age=-ahead)
    with Lock(tmp_path, **QUICK) as held:
        assert token_of(tmp_path) == held.token
    # A clock that was set makes a heartbeat look old, or to come.
    path = write_lock(tmp_path, age=-ahead)
    done = threading.Event()

    def beat() -> None:
        beats = 0
        while not done.wait(QUICK["heartbeat"]):
            beats += 1
            os.utime(path, (time.time() + ahead + beats,) * 2)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="host elsewhere, pid"):
            Lock(tmp_path, **QUICK).__enter__()
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"token": "../x"}', "\xff"])
def test_a_damaged_lock_is_taken_over_after_some_seconds(tmp_path, content):
    path = tmp_path / "running.json"
    path.write_bytes(content.encode("latin-1"))
    with Lock(tmp_path, heartbeat=0.1, dead_after=0.3) as held:
        assert token_of(tmp_path) == held.token
    assert list(tmp_path.iterdir()) == []


def leave_a_dead_lock(folder: pathlib.Path) -> pathlib.Path:
    """Leaves the lock of a process that does not run any more."""
    folder.mkdir(exist_ok=True)
    with Holder(folder) as other:
        other.take()
    return folder / "running.json"


@pytest.mark.parametrize("target", ["nowhere", "running.json", "lock"])
def test_a_link_in_place_of_a_lock_is_an_error(tmp_path, target):
    (tmp_path / "lock").write_text("{}")
    (tmp_path / "running.json").symlink_to(tmp_path / target)
    with (
        pytest.raises(UserError, match=r"running\.json: .*Move away what is at"),
        claimed(tmp_path),
    ):
        pass


def test_a_named_pipe_in_place_of_a_lock_does_not_keep_runs_waiting(tmp_path):
    os.mkfifo(tmp_path / "running.json")
    with Lock(tmp_path, heartbeat=0.1, dead_after=0.5) as lock:
        assert token_of(tmp_path) == lock.token


def test_a_run_that_was_killed_while_it_took_over_a_workdir_keeps_nobody_out(tmp_path):
    path = leave_a_dead_lock(tmp_path)
    successor = leave_a_dead_lock(tmp_path / "elsewhere")
    successor.rename(tmp_path / f"running.{token_of(tmp_path)}.json")
    (tmp_path / "elsewhere").rmdir()
    with Lock(tmp_path, dead_after=3600.0) as held:
        assert token_of(tmp_path) == held.token
        assert list(tmp_path.iterdir()) == [path]
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_taking_over_a_dead_lock_keeps_others_out(tmp_path):
    leave_a_dead_lock(tmp_path)
    (tmp_path / "other").mkdir()
    with Holder(tmp_path / "other") as other:
        other.take()
        # It has created its lock, and comes to rename it.
        (tmp_path / "other" / "running.json").rename(
            tmp_path / f"running.{token_of(tmp_path)}.json"
        )
        with pytest.raises(UserError, match=f"pid {other.process.pid};"):
            Lock(tmp_path).__enter__()


def test_a_run_that_judged_a_lock_long_ago_does_not_remove_a_newer_one(tmp_path):
    before = leave_a_dead_lock(tmp_path).read_text()
    old = token_of(tmp_path)
    with Lock(tmp_path) as held:
        # This is what a slow process leaves if it dies where it would see the new lock.
        (tmp_path / f"running.{old}.json").write_text(before)
        with pytest.raises(UserError, match=f"pid {os.getpid()};"):
            Lock(tmp_path).__enter__()
        assert token_of(tmp_path) == held.token


def start_together(base: pathlib.Path, rounds: int, starts: int) -> None:
    """Asserts that of several starts at a dead lock one holds it, in each round."""
    folders = [base / str(i) for i in range(rounds)]
    with Holder(*folders) as dead:
        locks = []
        for folder in folders:
            folder.mkdir()
            assert dead.take().startswith("held ")
            locks.append((folder / "running.json").read_text())
            dead.go()
            assert dead.read() == "released"
    for folder, lock in zip(folders, locks, strict=True):
        (folder / "running.json").write_text(lock)
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(Holder(*folders)) for _ in range(starts)]
        for folder in folders:
            assert {other.read() for other in others} == {"ready"}
            for other in others:
                other.go()
            lines = [other.read() for other in others]
            (holder,) = (i for i, line in enumerate(lines) if line.startswith("held "))
            assert lines[holder] == f"held {token_of(folder)}"
            assert sum("in use by a run on" in line for line in lines) == starts - 1
            others[holder].go()
            assert others[holder].read() == "released"
            assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("rounds", "starts"), [(60, 2), (6, 5)])
def test_one_of_several_runs_that_start_at_a_dead_lock_holds_it(
    tmp_path, rounds, starts
):
    start_together(tmp_path, rounds, starts)


@pytest.mark.long
@pytest.mark.parametrize(("rounds", "starts"), [(400, 2), (100, 5)])
def test_one_run_holds_a_dead_lock_in_each_of_many_rounds(tmp_path, rounds, starts):
    start_together(tmp_path, rounds, starts)


def lost_lock(folder: pathlib.Path, change) -> str:
    """Returns what a run is told when its workdir is changed while it holds it."""
    folder.mkdir()
    messages, called = [], threading.Event()

    def stop(message: str) -> None:
        messages.append(message)
        called.set()

    with Lock(folder, **QUICK, on_loss=stop) as held:
        (folder / "config.json").write_text("{}")
        held.check()
        change()
        with pytest.raises(UserError) as raised:
            held.check()
        assert called.wait(60)
    assert messages == [str(raised.value)]
    return messages[0]


def test_a_run_notices_that_its_workdir_is_gone(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"

    def empty() -> None:
        for path in folder.iterdir():
            path.unlink()

    def replace() -> None:
        folder.rename(other)
        shutil.copytree(other, folder, ignore=lambda *_: ["running.json"])

    changes = {
        "removed": lambda: shutil.rmtree(folder),
        "renamed": lambda: folder.rename(other),
        "emptied": empty,
        "replaced by another folder": replace,
        "replaced by a file": lambda: (folder.rename(other), folder.touch()),
        "in a folder that was renamed": lambda: (
            tmp_path.rename(tmp_path.with_name("elsewhere")),
        ),
    }
    for name, change in changes.items():
        message = lost_lock(folder, change)
        assert "was removed, moved or replaced while this run used it" in message, name
        if name != "emptied" and not name.startswith("replaced"):
            assert not folder.exists(), name
        for path in (folder, other):
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
    shutil.rmtree(tmp_path.with_name("elsewhere"))


@pytest.mark.parametrize("more", [False, True])
def test_what_a_save_wrote_after_the_workdir_was_renamed_is_removed(tmp_path, more):
    folder = tmp_path / "run"
    folder.mkdir()
    with Lock(folder, on_loss=lambda _: None):
        folder.rename(tmp_path / "elsewhere")
        shard = folder / "checkpoints" / "5.orbax-checkpoint-tmp" / "state" / "d" / "0"
        shard.parent.mkdir(parents=True)
        shard.touch()
        if more:
            # A folder that somebody else made is left alone.
            (folder / "notes").touch()
    assert folder.exists() == more
    assert (tmp_path / "elsewhere").exists()


def test_a_lock_that_was_removed_alone_is_written_again(tmp_path):
    with Lock(tmp_path, **QUICK) as held:
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "running.json").unlink()
        held.check()
        while token_of(tmp_path) != held.token:
            time.sleep(0.01)
        with pytest.raises(UserError, match="in use"):
            Lock(tmp_path).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_workdir_that_cannot_be_written_or_read_is_not_taken_for_removed(tmp_path):
    """Signs of a removed workdir come from no other error of a file system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    messages = []
    try:
        with Lock(folder, **QUICK, on_loss=messages.append) as held:
            with contextlib.suppress(OSError):
                (folder / "filler").write_bytes(bytes(2**17))
            last = (folder / "running.json").stat().st_mtime_ns
            while (folder / "running.json").stat().st_mtime_ns == last:
                time.sleep(0.01)
            held.check()
            remount = ["mount", "-o", "remount,ro", str(folder)]
            subprocess.run(remount, check=True)
            time.sleep(5 * QUICK["heartbeat"])
            held.check()
            subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    assert messages == []


@pytest.mark.parametrize("names", [["metrics.jsonl"], ["result.json", "tensorboard"]])
def test_files_that_a_new_run_would_replace_are_named_with_a_way_out(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    with (
        pytest.raises(UserError, match=f"holds {' and '.join(names)}, which") as raised,
        claimed(tmp_path),
    ):
        pass
    assert "neither a config.json nor a checkpoint" in str(raised.value)
    for name in names:
        (tmp_path / name).unlink()
    with claimed(tmp_path):
        pass


def test_a_workdir_without_a_config_but_with_a_checkpoint_is_used(tmp_path):
    record = tmp_path / "checkpoints" / "5" / "run" / "metadata"
    record.parent.mkdir(parents=True)
    record.touch()
    (tmp_path / "metrics.jsonl").touch()
    with claimed(tmp_path) as check:
        check()


def test_an_error_in_a_workdir_that_is_gone_says_that_it_is_gone(tmp_path):
    folder = tmp_path / "run"
    with (
        pytest.raises(UserError, match="was removed, moved or replaced"),
        claimed(folder, on_loss=lambda _: None),
    ):
        shutil.rmtree(folder)
        (folder / "report").write_text("")
    # A save may fail before all other files are removed.
    removal = threading.Timer(0.5, shutil.rmtree, [folder])
    with (
        pytest.raises(UserError, match="was removed, moved or replaced"),
        claimed(folder, on_loss=lambda _: None),
    ):
        (folder / "config.json").write_text("{}")
        removal.start()
        try:
            (folder / "checkpoints" / "1").mkdir()
        except FileNotFoundError as error:
            raise UserError("The checkpoint could not be written.") from error
    removal.join()
    # Another error stays as it is.
    with pytest.raises(FileNotFoundError), claimed(folder):
        (folder / "missing").read_text()
