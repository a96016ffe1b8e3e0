"""One run at a time in a workdir; a dead one does not keep the next one out."""

import contextlib
import json
import os
import pathlib
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


@pytest.fixture
def quick(monkeypatch):
    """A tenth of a second for one of a second, about."""
    monkeypatch.setattr(workdir, "BEAT", 0.1)
    monkeypatch.setattr(workdir, "DEAD", 1.0)


def write(workdir: pathlib.Path, age: float = 0.0, **changes) -> pathlib.Path:
    """A lock of this process on another host, or as `changes` say."""
    owner = {
        "host": "elsewhere",
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "token": "theirs",
    }
    path = workdir / "running.json"
    path.write_text(json.dumps(owner | changes))
    os.utime(path, (time.time() - age,) * 2)
    return path


def here() -> str:
    return workdir.socket.gethostname()


@contextlib.contextmanager
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
    yield process
    process.kill()
    process.communicate()


def test_a_lock_is_there_while_it_is_held_and_nothing_stays(tmp_path):
    with Lock(tmp_path) as held:
        assert workdir.token_of(tmp_path) == held.token
        assert held.release in processes.at_end
    assert list(tmp_path.iterdir()) == []
    assert held.release not in processes.at_end


def test_a_second_run_is_told_the_host_and_process_of_the_first(tmp_path):
    with sleeper() as other:
        started = psutil.Process(other.pid).create_time()
        path = write(tmp_path, host=here(), pid=other.pid, started=started)
        with pytest.raises(UserError, match=f"host {here()}, pid {other.pid};"):
            Lock(tmp_path).__enter__()
        assert json.loads(path.read_text())["token"] == "theirs"


def test_a_killed_run_on_this_host_does_not_delay_the_next_one(tmp_path):
    with sleeper() as other:
        started = psutil.Process(other.pid).create_time()
        other.kill()
        # Killed, but its parent has not yet asked how it ended.
        while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        write(tmp_path, host=here(), pid=other.pid, started=started)
        before = time.monotonic()
        with Lock(tmp_path):
            assert time.monotonic() - before < workdir.BEAT


def test_another_process_that_got_the_number_of_a_dead_one_is_not_taken_for_it(
    tmp_path,
):
    with sleeper() as other:
        write(tmp_path, host=here(), pid=other.pid, started=time.time() - 9999)
        with Lock(tmp_path):
            pass
    # A container's first process has the number of the one before it.
    write(tmp_path, host=here())
    with Lock(tmp_path):
        pass


def test_a_run_on_another_host_keeps_the_workdir_while_it_lives(tmp_path, quick):
    path = write(tmp_path)
    done = threading.Event()

    def beat():
        while not done.wait(workdir.BEAT):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="host elsewhere, pid"):
            Lock(tmp_path).__enter__()
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(("age", "waited"), [(0.0, 1.0), (0.6, 0.4), (60.0, 0.0)])
def test_a_dead_run_on_another_host_is_waited_for_no_longer_than_it_may_be_silent(
    tmp_path, quick, age, waited
):
    write(tmp_path, age=age)
    before = time.monotonic()
    with Lock(tmp_path):
        took = time.monotonic() - before
    # Looked at ten times a second, beside other work.
    assert waited - 0.05 <= took < waited + 0.5


def test_a_lock_that_was_cut_off_is_one_of_an_unknown_host(tmp_path, quick):
    path = write(tmp_path)
    path.write_text("")
    with Lock(tmp_path) as held:
        assert workdir.token_of(tmp_path) == held.token


def test_a_run_whose_workdir_was_taken_over_stops(tmp_path, quick, monkeypatch):
    said = []
    monkeypatch.setattr(processes, "end_all", lambda text: said.append(text))
    with Lock(tmp_path):
        write(tmp_path)
        deadline = time.monotonic() + 5
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "taken over by a run on host elsewhere" in said[0]
    assert workdir.token_of(tmp_path) == "theirs"
