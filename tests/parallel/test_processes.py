"""Processes compare facts before a run; an error is one sentence in each log."""

import socket

import pytest

from resnet_jax.errors import UserError
from resnet_jax.parallel import processes
from tests.helpers import pods, runs

# Two processes without a run. Each calls the functions below, and prints a result as
# "got" and an error as "raised"; then it does what the case says.
SCRIPT = """
import os, sys, time
from resnet_jax.parallel import processes
from resnet_jax.errors import UserError
case, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
processes.connect(f"localhost:{port}", 2, index, 60)

def call(function, *arguments):
    try:
        print("got", function(*arguments), flush=True)
    except UserError as error:
        print("raised", error, flush=True)

def refuse():
    raise UserError("The workdir belongs to another run.")

def fail():
    raise OSError(28, "No space left on device", "/work")

now = time.time
time.time = lambda: now() + 300 * index
facts = {"code": "a", "jax": "1", "seed": 0}
call(processes.check_same, "same", facts)
call(processes.check_same, "changed", facts | {"jax": str(index), "seed": index})
call(processes.check_same, "more", facts | ({"new": True} if index else {}))
call(processes.run_on_lead, "work", lambda: f"from {index}")
call(processes.run_on_lead, "work", refuse)
call(processes.run_on_lead, "work", fail)
call(processes.agree, "problems", f"problem of {index}")
processes.check_clocks()
if case == "stop" and index == 1:
    sys.exit(processes.give_up("The disk is full."))
if case == "stop":
    time.sleep(60)
if case == "bug" and index == 1:
    try:
        1 / 0
    except ZeroDivisionError as error:
        processes.give_up_after(error)
if case == "bug":
    time.sleep(60)
"""


def run_pair(case: str) -> list[tuple[int, str]]:
    """Runs the script in two processes; returns exit code and output of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return pods.finish(
        [runs.start_python("-c", SCRIPT, case, port, str(i)) for i in range(2)], 60
    )


def test_the_first_fact_that_differs_is_named_on_all_processes():
    ends = run_pair("fine")
    assert [code for code, _ in ends] == [0, 0], ends
    for _, output in ends:
        lines = [x for x in output.splitlines() if x.startswith(("got", "raised"))]
        same, changed, added, made, refused, failed, problem = lines
        assert same == "got None"
        start = "raised The processes of the run differ in jax: process 0"
        assert changed.startswith(start)
        assert " has '0', process 1 " in changed
        end = "'1'; make them equal, and run the same command on all."
        assert changed.endswith(end)
        assert "differ in new:" in added and "'nothing'" in added
        assert made == "got from 0"
        assert refused == "raised The workdir belongs to another run."
        assert failed == "raised /work: No space left on device."
        assert problem == "raised problem of 0"
    clocks = [output.count("300 s ahead of that of process 0") for _, output in ends]
    assert clocks == [0, 1]


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("stop", "The disk is full."),
        ("bug", "failed: ZeroDivisionError: division by zero"),
    ],
)
def test_the_error_of_one_process_is_printed_by_all_and_stops_them(case, text):
    ends = run_pair(case)
    assert [code for code, _ in ends] == [1, 1], ends
    for _, output in ends:
        (line,) = pods.errors(output)
        assert text in line
    assert f"stopped: {text}" in ends[0][1] or "process 1 (host" in ends[0][1]
    assert "Traceback" not in ends[0][1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("localhost:1", None, 0), "--num_processes=N"),
        (("localhost:1", 2, 2), "from 0 to N - 1"),
        (("localhost", 2, 1), "HOST:PORT"),
        ((None, None, None), "no TPU pod, Slurm or Open MPI"),
    ],
)
def test_a_wrong_address_or_number_is_reported_at_once(arguments, text, monkeypatch):
    # It would set a handler of SIGABRT in the process of the tests.
    monkeypatch.setattr(processes, "_set_last_words", lambda text: None)
    with pytest.raises(UserError, match=text):
        processes.connect(*arguments, 1.0)


def test_a_single_process_agrees_with_itself():
    processes.check_same("anything", {"a": 1})
    processes.check_clocks()
    processes.agree("anything", "")
    assert processes.run_on_lead("anything", lambda: "made") == "made"
    assert (processes.index(), processes.count()) == (0, 1)
    with pytest.raises(UserError, match="a problem"):
        processes.agree("anything", "a problem")
    assert processes.leave(143) == 143
