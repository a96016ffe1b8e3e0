"""Effects of signals on small programs."""

import os
import signal
import sys
import threading
import time

import pytest

from resnet_jax.parallel import signals
from resnet_jax.persistence.preemption import PreemptedError, Preemption
from tests.helpers import runs

# The body of the program prints a line when it is ready for the next signal.
LISTENS = """
import sys, threading, time
from resnet_jax.parallel import signals
signals.listen()
signals.at_end.append(lambda: print("cleaned up", flush=True))
{}
"""


def start(body: str):
    """Starts a program that listens to signals, and then runs the body."""
    return runs.start_python("-c", LISTENS.format(body))


def send_at_lines(process, numbers: dict[str, signal.Signals]) -> tuple[int, str]:
    """Sends each signal when its line is printed; returns exit code and output."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if number := numbers.get(line.strip()):
            process.send_signal(number)
    return runs.finish(process)[0], "".join(lines)


@pytest.mark.parametrize("number", signals.STOPS)
def test_a_signal_ends_a_process_whose_main_thread_is_blocked(number):
    waits = "lock = threading.Lock(); lock.acquire(); print('ready', flush=True)"
    process = start(f"{waits}; lock.acquire(timeout=60)")
    code, output = send_at_lines(process, {"ready": number})
    assert code == 128 + number
    assert output == f"ready\nstopped by {number.name}\ncleaned up\n"


def test_a_signal_ends_a_process_whose_output_nobody_reads():
    # The main thread waits for a reader, and holds the lock that a flush needs.
    process = start("print('ready', flush=True)\nwhile True: print('x' * 1000)")
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


def test_a_signal_is_noted_while_deferred_and_ends_the_process_afterwards():
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


def test_a_second_ctrl_c_ends_a_process_that_hangs_at_its_end():
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
    # A second signal right after the first counts as the same Ctrl-C.
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


def test_child_processes_started_while_signals_are_blocked_ignore_them():
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
child.communicate(b"continue\\n", 60)
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


def test_ctrl_c_while_worker_processes_start_is_handled_by_the_parent():
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
    # A shell also reports the signal itself as 130.
    assert code in (-signal.SIGINT, 130)
    assert "importing" in output and "Traceback" not in output


def test_importing_the_library_does_not_change_the_handler_of_ctrl_c(tmp_path):
    (tmp_path / "program").mkdir()
    (tmp_path / "program/__init__.py").write_text("import resnet_jax")
    (tmp_path / "program/__main__.py").write_text(
        "import signal; print(signal.getsignal(signal.SIGINT).__name__)"
    )
    path = f"{tmp_path}:{runs.ROOT}"
    for arguments in ("-m program", "-m program resnet_jax.main", "-um program -m"):
        code, output = runs.run_python(*arguments.split(), PYTHONPATH=path)
        assert (code, output) == (0, "default_int_handler\n")


def handlers():
    """Returns the handlers of the signals that stop a run."""
    return [signal.getsignal(number) for number in signals.STOPS]


def wait_for_stop(preemption: Preemption) -> PreemptedError:
    """Polls until a signal was noted; returns the error that is raised."""
    with pytest.raises(PreemptedError) as raised:
        for _ in range(1000):
            preemption.check()
            time.sleep(0.01)
    return raised.value


@pytest.mark.parametrize("number", signals.STOPS)
def test_a_program_that_uses_the_library_gets_an_error_and_keeps_its_handlers(
    number, tmp_path
):
    before = handlers()
    with Preemption(tmp_path) as preemption:
        preemption.check()
        os.kill(os.getpid(), number)
        assert wait_for_stop(preemption).exit_code == 128 + number
        preemption.hold()
        with pytest.raises(PreemptedError):
            preemption.release()
    assert handlers() == before
    assert threading.current_thread() is threading.main_thread()


def test_training_in_another_thread_does_not_change_the_handlers(tmp_path):
    before, during = handlers(), []

    def train():
        with Preemption(tmp_path) as preemption:
            preemption.check()
            preemption.hold()
            during.append(handlers())
            preemption.release()

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert during == [before]


@pytest.mark.skipif(
    sys.platform != "linux", reason="threads are counted in this way only on Linux"
)
def test_a_run_without_a_signal_leaves_no_thread_behind(tmp_path):
    count = threading.active_count()
    for _ in range(3):
        with Preemption(tmp_path) as preemption:
            preemption.check()
    # If a thread stayed, this would end in the timeout of tests.
    while threading.active_count() > count:
        time.sleep(0.01)
