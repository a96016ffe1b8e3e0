"""What signals do, shown by small programs that get them."""

import os
import signal
import sys
import threading
import time

import pytest

from resnet_jax.parallel import signals
from resnet_jax.persistence.preemption import PreemptedError, Preemption
from tests.helpers import runs

# Each part prints a line when it is ready for the next signal.
LISTENS = """
import sys, threading, time
from resnet_jax.parallel import signals
signals.listen()
signals.at_end.append(lambda: print("cleaned up", flush=True))
{}
"""


def start(body: str):
    return runs.start_python("-c", LISTENS.format(body))


def send_at_lines(process, numbers: dict[str, signal.Signals]) -> tuple[int, str]:
    """Sends each signal when its line comes; returns the exit code and the output."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if number := numbers.get(line.strip()):
            process.send_signal(number)
    return runs.finish(process)[0], "".join(lines)


@pytest.mark.parametrize("number", signals.STOPS)
def test_a_signal_ends_the_process_while_its_main_thread_waits_for_ever(number):
    waits = "lock = threading.Lock(); lock.acquire(); print('ready', flush=True)"
    process = start(f"{waits}; lock.acquire(timeout=60)")
    code, output = send_at_lines(process, {"ready": number})
    assert code == 128 + number
    assert output == f"ready\nstopped by {number.name}\ncleaned up\n"


def test_a_signal_ends_the_process_whose_output_nobody_reads():
    # The main thread waits for the reader, and holds what a flush would take.
    process = start("print('ready', flush=True)\nwhile True: print('x' * 1000)")
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


def test_a_deferred_signal_is_noted_and_ends_the_process_after_that_again():
    process = start("""
noted = threading.Event()
signals.defer_to(lambda number: (print("noted", number, flush=True), noted.set()))
print("deferring", flush=True)
noted.wait()
signals.defer_to(None)
print("done", flush=True)
time.sleep(60)
""")
    code, output = send_at_lines(
        process, {"deferring": signal.SIGHUP, "done": signal.SIGTERM}
    )
    assert code == 143
    assert output.splitlines() == [
        *("deferring", "noted 1", "done", "stopped by SIGTERM", "cleaned up")
    ]


def test_a_second_ctrl_c_ends_a_process_whose_end_hangs():
    process = start("""
def hang():
    print("hanging", flush=True)
    time.sleep(signals.SAME_PRESS + 0.5)
    print("still hanging", flush=True)
    time.sleep(60)
signals.at_end.append(hang)
print("ready", flush=True)
time.sleep(60)
""")
    # Right after the first one, it is the same press of two keys.
    code, output = send_at_lines(
        process,
        {
            "ready": signal.SIGINT,
            "hanging": signal.SIGINT,
            "still hanging": signal.SIGINT,
        },
    )
    assert code == 130
    assert output.endswith("still hanging\n")


def test_children_that_are_started_while_signals_are_blocked_never_get_them():
    process = runs.start_python(
        "-c",
        """
import signal, subprocess, sys
from resnet_jax.parallel import signals
with signals.blocked():
    child = subprocess.Popen([sys.executable, "-c", "print('up'); input()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
for number in signals.STOPS:
    child.send_signal(number)
child.communicate(b"go on\\n", 60)
print("its exit code:", child.returncode)
print("blocked here:", len(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
""",
    )
    assert runs.finish(process) == (0, "its exit code: 0\nblocked here: 0\n")


POOL = """
import sys
from resnet_jax.data import workers
try:
    for _ in workers.map_unordered(str.upper, ["a"] * 10**5, workers=3, total=10**5):
        pass
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_while_a_pool_starts_is_left_to_the_parent():
    process = runs.start_python("-c", POOL, own_group=True)
    while not runs.workers_of(process):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    code, output = runs.finish(process, 60)
    assert code == 130, output
    assert "Traceback" not in output


@pytest.mark.parametrize("command", ["predict", "convert", "prepare", "report", "zoo"])
def test_ctrl_c_while_a_command_imports_its_libraries_prints_no_traceback(
    command, tmp_path
):
    for name in ("jax", "numpy", "flax"):
        slow = "import time; print('importing', flush=True); time.sleep(60)"
        (tmp_path / f"{name}.py").write_text(slow)
    process = runs.start_python(
        *("-m", f"resnet_jax.{command}", "resnet18"),
        PYTHONPATH=f"{tmp_path}:{runs.ROOT}",
    )
    code, output = runs.send_when(process, "importing", signal.SIGINT)
    # A shell calls the signal itself 130, too.
    assert code in (-signal.SIGINT, 130)
    assert "importing" in output and "Traceback" not in output


def test_ctrl_c_stays_what_it_was_in_a_program_that_uses_the_library(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/__init__.py").write_text("import resnet_jax")
    (tmp_path / "theirs/__main__.py").write_text(
        "import signal; print(signal.getsignal(signal.SIGINT).__name__)"
    )
    path = f"{tmp_path}:{runs.ROOT}"
    for arguments in ("-m theirs", "-m theirs resnet_jax.main", "-um theirs -m"):
        code, output = runs.run_python(*arguments.split(), PYTHONPATH=path)
        assert (code, output) == (0, "default_int_handler\n")


def handlers():
    return [signal.getsignal(number) for number in signals.STOPS]


def noted(preemption: Preemption) -> PreemptedError:
    """Waits until a signal was noted; returns what is raised then."""
    with pytest.raises(PreemptedError) as raised:
        for _ in range(1000):
            preemption.check()
            time.sleep(0.01)
    return raised.value


@pytest.mark.parametrize("number", signals.STOPS)
def test_a_program_that_calls_the_library_gets_an_error_and_its_handlers_back(
    number, tmp_path
):
    before = handlers()
    with Preemption(tmp_path) as preemption:
        preemption.check()
        os.kill(os.getpid(), number)
        assert noted(preemption).exit_code == 128 + number
        preemption.hold()
        with pytest.raises(PreemptedError):
            preemption.release()
    assert handlers() == before
    assert threading.current_thread() is threading.main_thread()


def test_a_thread_that_trains_leaves_signals_to_the_main_thread(tmp_path):
    before, seen = handlers(), []

    def train():
        with Preemption(tmp_path) as preemption:
            preemption.check()
            preemption.hold()
            seen.append(handlers())
            preemption.release()

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts threads so")
def test_a_run_without_a_signal_leaves_no_thread(tmp_path):
    count = threading.active_count()
    for _ in range(3):
        with Preemption(tmp_path) as preemption:
            preemption.check()
    deadline = time.monotonic() + 10
    while threading.active_count() > count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
