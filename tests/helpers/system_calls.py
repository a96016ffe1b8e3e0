"""Traces the system calls of a program with strace."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import runs

_SYNC = re.compile(r"f(?:data)?sync\(\d+<([^>]*)>")
# A call during which another thread makes one is printed in two lines.
_RENAME = re.compile(r'rename\w*\(.*"([^"]*)"(?:, \w+)?(?:\)\s+= 0| <unfinished)')


def syncs_and_renames(program: str, folder: pathlib.Path) -> list[tuple[str, str]]:
    """Returns how a program flushes and renames files in a folder, in order.

    The test is skipped where strace is missing or not permitted.

    Args:
      program: The program's text in Python.
      folder: The folder.

    Returns:
      Pairs of `sync` or `rename` and a path below the folder, which is that of a file
      or directory that is flushed to the disk, or a new name.
    """
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    trace = folder.with_name("trace")
    done = subprocess.run(
        [
            *("strace", "-f", "-y", "-s", "4096", "-o", str(trace)),
            *("-e", "trace=fsync,fdatasync,rename,renameat,renameat2"),
            *(sys.executable, "-c", program),
        ],
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
    )
    if "ptrace" in done.stderr:
        pytest.skip("strace is not permitted here")
    assert done.returncode == 0, done.stderr
    calls, place = [], f"{folder}/"
    for line in trace.read_text().splitlines():
        for name, pattern in (("sync", _SYNC), ("rename", _RENAME)):
            match = pattern.search(line)
            if match and f"{match[1]}/".startswith(place):
                calls.append((name, f"{match[1]}/".removeprefix(place).rstrip("/")))
    return calls
