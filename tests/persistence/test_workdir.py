"""One run at a time holds a workdir; a dead run does not keep the next one out."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from resnet_jax.errors import UserError
from resnet_jax.parallel import processes
from resnet_jax.persistence import workdir
from resnet_jax.persistence.workdir import Lock

HOST = socket.gethostname()
# About a tenth of a second for a second of the real ones.
QUICK = {"heartbeat": 0.1, "dead_after": 1.0}


def write_lock(folder: pathlib.Path, age: float = 0.0, **changes) -> pathlib.Path:
    """Writes a lock of this process on another host, with changes.

    Args:
      folder: The workdir.
      age: Seconds since the last heartbeat.
      **changes: Other entries of the owner.
    """
    owner = {
        "host": "elsewhere",
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "token": "another",
    }
    path = folder / "running.json"
    path.write_text(json.dumps(owner | changes))
    os.utime(path, (time.time() - age,) * 2)
    return path


@contextlib.contextmanager
def sleeping_process():
    """Starts a process that waits until the context ends."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
    yield process
    process.kill()
    process.communicate()


def test_a_lock_exists_while_it_is_held_and_no_file_is_left(tmp_path):
    with Lock(tmp_path) as held:
        assert workdir.token_of(tmp_path) == held.token
        assert held.release in processes.at_end
    assert list(tmp_path.iterdir()) == []
    assert held.release not in processes.at_end


def test_the_error_of_a_second_run_names_host_and_process_of_the_first(tmp_path):
    with sleeping_process() as other:
        started = psutil.Process(other.pid).create_time()
        path = write_lock(tmp_path, host=HOST, pid=other.pid, started=started)
        with pytest.raises(UserError, match=f"host {HOST}, pid {other.pid};"):
            Lock(tmp_path).__enter__()
        assert json.loads(path.read_text())["token"] == "another"


def test_a_killed_run_on_this_host_does_not_delay_the_next_one(tmp_path):
    with sleeping_process() as other:
        started = psutil.Process(other.pid).create_time()
        other.kill()
        # It is killed, but its parent has not yet asked for its exit code.
        while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        write_lock(tmp_path, host=HOST, pid=other.pid, started=started)
        # If this waited for the run, it would end in the timeout of tests.
        with Lock(tmp_path, dead_after=3600.0):
            pass


def test_a_process_that_has_the_id_of_a_dead_run_does_not_hold_its_workdir(tmp_path):
    with sleeping_process() as other:
        write_lock(tmp_path, host=HOST, pid=other.pid, started=time.time() - 9999)
        with Lock(tmp_path):
            pass
    # The first process of a container has the id of that of the container before it.
    write_lock(tmp_path, host=HOST)
    with Lock(tmp_path):
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
        assert workdir.token_of(tmp_path) == held.token


def test_a_run_whose_workdir_was_taken_over_stops(tmp_path):
    messages, called = [], threading.Event()

    def stop(message: str) -> None:
        messages.append(message)
        called.set()

    with Lock(tmp_path, **QUICK, on_takeover=stop):
        write_lock(tmp_path)
        assert called.wait(60)
    assert "taken over by a run on host elsewhere" in messages[0]
    assert workdir.token_of(tmp_path) == "another"
