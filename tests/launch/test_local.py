"""launch/local.py with processes that stand in for those of a run."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import runs

LOCAL = runs.ROOT / "launch/local.py"
# Each process tells its id and its GPU; then it does what the run's flags say.
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
    """Starts the launcher where `resnet_jax.main` is the stand-in."""
    package = tmp_path / "resnet_jax"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "main.py").write_text(MAIN)
    environment = {**os.environ, "PYTHONPATH": str(LOCAL.parent)}
    patient = "import sys, local; local.PATIENCE = 1; sys.exit(local.main(sys.argv))"

    def start_launcher(*flags, before=()):
        return subprocess.Popen(
            [*before, sys.executable, "-c", patient, "2", *flags],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    return start_launcher


def ids_of(process):
    """Waits until both processes are up; returns their pids."""
    lines = sorted(process.stdout.readline() for _ in range(2))
    assert [line.split()[:2] for line in lines] == [["[0]", "up"], ["[1]", "up"]]
    assert [line.split()[3:] for line in lines] == [["2", "0"], ["2", "1"]]
    return [int(line.split()[2]) for line in lines]


def runs_on(pid):
    """Whether a process is there, and no zombie that nobody has waited for."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"


def test_the_first_exit_code_that_is_not_0_is_returned(start):
    process = start("--exit1=3")
    ids_of(process)
    assert runs.finish(process)[0] == 3


def test_lines_that_are_not_text_are_shown_with_escapes(start):
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


def test_processes_save_though_the_terminal_of_their_launcher_is_closed(start):
    process = start("--sleep0=60", "--sleep1=60")
    ids = ids_of(process)
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 129
    assert not any(map(runs_on, ids))


def test_what_runs_on_after_another_failed_is_killed(start):
    process = start("--exit0=7", "--sleep1=60")
    ids_of(process)
    code, output = runs.finish(process, 20)
    assert code == 7
    assert output == "[1] killed: it ran on after another had failed\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent")
def test_no_process_outlives_a_launcher_that_was_killed(start):
    process = start("--sleep0=60", "--sleep1=60")
    ids = ids_of(process)
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while any(map(runs_on, ids)):
        assert time.monotonic() < end
        time.sleep(0.05)
