"""launch/local.py with a program that takes the place of `resnet_jax.main`."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import runs

LOCAL = runs.ROOT / "launch/local.py"
# Each process prints its number and its GPU, and then does what its flags say.
MAIN = """
import os, signal, sys, time
flags = dict(flag[2:].split("=", 1) for flag in sys.argv[1:])
i = flags["process_id"]
def stop(number, frame):
    print("saved", flush=True)
    sys.exit(128 + number)
if "bytes" in flags:
    os.write(1, bytes.fromhex(flags["bytes"]))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, stop)
print("up", os.getpid(), flags["num_processes"], os.environ["JAX_LOCAL_DEVICE_IDS"])
time.sleep(float(flags.get("sleep" + i, 0)))
sys.exit(int(flags.get("exit" + i, 0)))
"""


@pytest.fixture
def start(tmp_path):
    """Returns a function that starts the launcher with `MAIN` as `resnet_jax.main`."""
    package = tmp_path / "resnet_jax"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "main.py").write_text(MAIN)
    environment = {**os.environ, "PYTHONPATH": str(LOCAL.parent)}
    program = "import sys, local; sys.exit(local.main(sys.argv, patience=1))"

    def start_launcher(*flags, before=()):
        return subprocess.Popen(
            [*before, sys.executable, "-c", program, "2", *flags],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    return start_launcher


def ids_of(process):
    """Waits until both processes run, and returns their process ids."""
    lines = sorted(process.stdout.readline() for _ in range(2))
    assert [line.split()[:2] for line in lines] == [["[0]", "up"], ["[1]", "up"]]
    assert [line.split()[3:] for line in lines] == [["2", "0"], ["2", "1"]]
    return [int(line.split()[2]) for line in lines]


def is_running(pid):
    """Returns whether a process exists and is not a zombie."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def test_the_first_exit_code_that_is_not_0_is_returned(start):
    process = start("--exit1=3")
    ids_of(process)
    assert runs.finish(process)[0] == 3


def test_bytes_that_are_not_text_are_printed_as_escapes(start):
    code, output = runs.finish(start("--bytes=68e90a"), 20)
    assert code == 0
    lines = output.splitlines()
    for i in ("0", "1"):
        assert [x.split()[1] for x in lines if x[1] == i] == [r"h\xe9", "up"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_every_process_gets_the_signal(start, number):
    process = start("--sleep0=60", "--sleep1=60")
    ids_of(process)
    process.send_signal(number)
    code, output = runs.finish(process, 20)
    assert code == 128 + number
    assert sorted(output.splitlines()) == ["[0] saved", "[1] saved"]


def test_a_launcher_that_ignores_a_signal_lets_its_processes_ignore_it(start):
    ignoring = ("sh", "-c", 'trap \'\' HUP INT; exec "$0" "$@"')
    process = start("--sleep0=60", "--sleep1=60", before=ignoring)
    ids = ids_of(process)
    for number in (signal.SIGHUP, signal.SIGINT):
        for pid in (process.pid, *ids):
            os.kill(pid, number)
    process.send_signal(signal.SIGTERM)
    assert runs.finish(process, 20)[0] == 143


def test_processes_save_when_the_terminal_of_their_launcher_is_closed(start):
    process = start("--sleep0=60", "--sleep1=60")
    ids = ids_of(process)
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 129
    assert not any(map(is_running, ids))


def test_a_process_that_still_runs_after_another_failed_is_killed(start):
    process = start("--exit0=7", "--sleep1=60")
    ids_of(process)
    code, output = runs.finish(process, 20)
    assert code == 7
    assert output == "[1] killed: it still ran 1 s after another failed\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")
def test_no_process_outlives_a_launcher_that_was_killed(start):
    process = start("--sleep0=60", "--sleep1=60")
    ids = ids_of(process)
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while any(map(is_running, ids)):
        assert time.monotonic() < end
        time.sleep(0.05)
