"""Standard streams that fail, and texts that are unsafe for a terminal."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from resnet_jax.console import output
from tests.helpers import runs

# A program that writes to its streams in all ways; the tests let the streams fail.
PROGRAM = """
import logging, sys, warnings
from resnet_jax.console import output
from resnet_jax.errors import UserError

def main(argv):
    open(argv[1], "w").write("begun")
    for number in range(3):
        output.say(f"line {number}")
        output.warn(f"warning {number}")
        logging.getLogger("library").warning("logged")
        warnings.warn(f"python {number}")
        print("printed", flush=True)
        print("printed to stderr", file=sys.stderr, flush=True)
        sys.stdout.write("not flushed")
    kept = open(argv[1], "a")
    assert kept.fileno() > 2
    kept.write(", ended")
    return {"end": 0, "code": 7}.get(argv[2], None)

output.command(main)
"""
ANSWER = """
from resnet_jax.console import output

def main(argv):
    for number in range(1000):
        output.answer(f"line {number}")

output.command(main)
"""


def run(
    script: str, *arguments: str, redirect: str = "", **options
) -> subprocess.CompletedProcess:
    """Runs a script in a shell that redirects its streams."""
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-c", script]
    environment = {"PYTHONPATH": str(runs.ROOT), **options.pop("env", {})}
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        **options,
    )


@pytest.mark.parametrize(
    "redirect",
    [
        *(">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"),
        *(">/dev/full", "2>/dev/full", ">/dev/full 2>&1", ">&0 </dev/null"),
    ],
)
@pytest.mark.parametrize("python", [[], ["PYTHONUNBUFFERED"]])
def test_a_stream_that_fails_is_one_warning_and_does_not_end_the_program(
    tmp_path, redirect, python
):
    kept = tmp_path / "kept"
    environment = dict.fromkeys(python, "1")
    done = run(PROGRAM, str(kept), "code", redirect=redirect, env=environment)
    assert done.returncode == 7
    assert kept.read_text() == "begun, ended"
    both = done.stdout + done.stderr
    assert "Traceback" not in both and "Exception ignored" not in both
    out_works = not any(x in redirect.split() for x in (">&-", ">/dev/full", ">&0"))
    err_works = not any(x in redirect for x in ("2>&-", "2>/dev/full", "2>&1"))
    assert ("line 2\n" in done.stdout) == out_works
    assert ("warning: warning 2\n" in done.stderr) == err_works
    warnings = both.count("cannot be written")
    # A stream that the user closed is not a failure.
    failed = ("/dev/full" in redirect or ">&0" in redirect) and (out_works or err_works)
    assert warnings == failed, both


def test_child_processes_do_not_get_a_file_in_place_of_a_closed_stream(tmp_path):
    child = (
        "import os, sys; null = os.stat(os.devnull); open(sys.argv[1], 'w').write("
        "str([os.path.samestat(os.fstat(n), null) for n in range(3)]))"
    )
    script = (
        "import subprocess, sys\n"
        "from resnet_jax.console import output\noutput.prepare()\n"
        f"subprocess.run([sys.executable, '-c', {child!r}, sys.argv[1]], check=True)"
    )
    done = run(script, str(tmp_path / "seen"), redirect="<&- >&- 2>&-")
    assert done.returncode == 0
    assert (tmp_path / "seen").read_text() == "[True, True, True]"


# A line that never fits into the buffer of a pipe, and many lines that do.
@pytest.mark.parametrize("lines", ["'x' * 10**6", "*['x'] * 10**6"])
def test_output_that_nobody_reads_blocks_until_the_process_is_in_a_hurry(lines):
    script = (
        "import os, sys, threading\n"
        "from resnet_jax.console import output\noutput.prepare()\n"
        "threading.Timer(1, output.hurry).start()\n"
        f"for line in [{lines}]: output.say(line)\n"
        "output.note('the end')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.wait(60) == 0
    assert process.communicate()[1] == (
        "warning: Standard output cannot be written (Nobody reads it). Nothing more is"
        " printed there.\nthe end\n"
    )


def test_a_reader_that_closes_the_pipe_does_not_end_the_program(tmp_path):
    kept, script = tmp_path / "kept", tmp_path / "script.py"
    script.write_text(PROGRAM)
    command = f"{sys.executable} {script} {kept} end 2>errors | true; exit $PIPESTATUS"
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT)}
    for _ in range(3):
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment)
        assert done.returncode == 0
        assert kept.read_text() == "begun, ended"
    errors = (tmp_path / "errors").read_text()
    assert errors.count("cannot be written (Broken pipe)") == 1
    assert "Traceback" not in errors and "Exception ignored" not in errors


def test_a_terminal_that_is_closed_does_not_end_the_program(tmp_path):
    ours, theirs = os.openpty()
    closed = tmp_path / "closed"
    wait = f"import os, time\nwhile not os.path.exists('{closed}'): time.sleep(0.01)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", wait + PROGRAM, str(tmp_path / "kept"), "end"],
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    os.close(ours)
    closed.touch()
    assert process.wait(60) == 0
    assert (tmp_path / "kept").read_text() == "begun, ended"


def test_a_full_pipe_that_does_not_block_gets_all_lines():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen(
        [sys.executable, "-c", ANSWER.replace("1000", "20_000")],
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
        stdout=writer,
    )
    os.close(writer)
    with open(reader, "rb") as file:
        lines = file.read().splitlines()
    assert process.wait(60) == 0
    assert lines == [f"line {number}".encode() for number in range(20_000)]


def test_a_result_that_nobody_reads_ends_the_command_quietly():
    bash = f"{sys.executable} -c '{ANSWER}' | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", bash.replace("1000", "1000_000")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
    )
    assert (done.stdout, done.stderr) == ("line 0\n", "")
    # This is the exit code of tools that the signal ends.
    assert done.returncode == 128 + signal.SIGPIPE


def test_a_result_that_cannot_be_written_is_an_error():
    done = run(ANSWER, redirect=">/dev/full")
    assert done.returncode == 1
    assert done.stderr == (
        "error: Standard output cannot be written: No space left on device.\n"
    )


@pytest.mark.parametrize(
    ("body", "code", "errors"),
    [
        (
            "raise UserError('no \\x1b[31m such thing')",
            1,
            "error: no \\x1b[31m such thing\n",
        ),
        ("os.kill(os.getpid(), 2)", 130, ""),
        # Libraries such as JAX set callbacks of the garbage collector.
        (
            "gc.callbacks.append(lambda *_: os.kill(os.getpid(), 2))\n"
            "    gc.collect(); gc.callbacks.clear(); time.sleep(60)",
            130,
            "",
        ),
        ("raise SystemExit(3)", 3, ""),
        ("return 5", 5, ""),
        ("return None", 0, ""),
    ],
)
def test_a_command_ends_with_one_sentence_and_its_exit_code(body, code, errors):
    script = (
        "import gc, os, time\nfrom resnet_jax.console import output\n"
        "from resnet_jax.errors import UserError\n"
        f"def main(argv):\n    {body}\noutput.command(main)"
    )
    done = run(script)
    assert (done.returncode, done.stderr) == (code, errors)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_names_from_strangers_cannot_command_a_terminal_in_any_encoding(encoding):
    script = (
        "import logging, os\nfrom resnet_jax.console import output\noutput.prepare()\n"
        "name = 'h\\xe9\\u2603\\x1b[2J\\x9b\\r\\udcff\\u202e\\ud800\\x00'\n"
        "output.say(name); output.warn(name); logging.warning(name); print('\\udcff')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        env=os.environ
        | {"PYTHONPATH": str(runs.ROOT), "PYTHONIOENCODING": f"{encoding}:strict"},
    )
    assert done.returncode == 0
    for stream in (done.stdout, done.stderr):
        text = stream.decode(encoding)
        assert not set(text) & set("\x1b\x9b\r\x00\u202e\udcff\ud800")
        assert r"\x1b[2J\x9b\r\udcff\u202e\ud800\x00" in text
        assert ("\xe9" in text) == (encoding != "ascii")
        assert ("\u2603" in text) == (encoding == "utf-8")


def test_a_failed_stream_object_of_the_user_is_reported_and_not_replaced(
    monkeypatch, capsys
):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        for _ in range(3):
            output.say("line")
        monkeypatch.undo()
        errors = capsys.readouterr().err
        assert errors.count("Standard output cannot be written (No space left") == 1
        # The rest in the buffer could not be written either when the file is closed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    # A class of the user may only have the method `write`.
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=lambda text: None))
    output.say("line")
    assert "'flush'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", None)
    output.say("line")
    monkeypatch.undo()
    output.say("another stream")
    assert capsys.readouterr().out == "another stream\n"


def test_a_by_product_is_not_used_after_its_first_failure(capsys):
    calls = []

    def fail(thing):
        calls.append(thing)
        raise RuntimeError("it\nbroke")

    product = output.ByProduct("The picture", lambda: "thing")
    assert product
    for _ in range(3):
        product.use(fail)
    assert not product
    assert calls == ["thing"]
    assert capsys.readouterr().err == (
        "warning: The picture cannot be written (RuntimeError: it broke). The work"
        " continues.\n"
    )
    with pytest.raises(KeyboardInterrupt), output.dispensable("It"):
        raise KeyboardInterrupt


class SlowStream(io.StringIO):
    """A stream that lets other threads run after each write."""

    def write(self, text: str) -> int:
        written = super().write(text)
        time.sleep(0.002)
        return written


def test_lines_of_several_threads_are_not_mixed():
    def talk(name):
        for _ in range(20):
            output.say(name * 20)

    with contextlib.redirect_stdout(SlowStream()) as stream:
        threads = [threading.Thread(target=talk, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = stream.getvalue().splitlines()
    assert sorted(lines) == sorted(name * 20 for name in "abcd" for _ in range(20))


def test_a_wait_says_what_it_waits_for_only_if_it_is_long():
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        with output.telling("waiting for a quick one", after=3600.0):
            pass
        with output.telling("waiting for a slow one", after=0.01):
            while not stream.getvalue():
                time.sleep(0.01)
    assert stream.getvalue() == "waiting for a slow one\n"
