"""Packing resumes after kills and full disks, and damaged shards can be repaired."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from resnet_jax.data.prepare import pack
from resnet_jax.data.sources import open_source
from resnet_jax.errors import BadImageError, UserError
from resnet_jax.prepare import main
from tests.helpers import runs
from tests.helpers.breakages import flip_byte, truncate
from tests.helpers.pictures import encode, noise, write_folder

# Each test packs in a process of its own, which takes seconds.
pytestmark = pytest.mark.slow


IMAGES = 60
# Packs a folder into shards of a few images, as `python -m resnet_jax.prepare` does.
PACK = """
import functools, sys, time
from resnet_jax import prepare
from resnet_jax.console import output
from resnet_jax.data.prepare import pack

def read_slowly(file, read=pack._read):
    time.sleep(0.02)
    return read(file)

if __name__ == "__main__":
    if "slow" in sys.argv:
        sys.argv.remove("slow")
        pack._read = read_slowly
    output.command(functools.partial(prepare.run, shard_bytes=20_000))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    files = {
        f"{split}/{name}/{index}.jpg": encode(noise(index, 60, 40), "JPEG")
        for split in ("train", "val")
        for name in ("cat", "dog")
        for index in range(IMAGES // 4)
    }
    return write_folder(tmp_path_factory.mktemp("pictures"), files)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> dict[str, bytes]:
    """The files that an uninterrupted packing writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(source, f"--out={out}")[0] == 0
    files = contents(out)
    assert sum("array_record" in name for name in files) >= 6
    return files


def start(*arguments: str) -> subprocess.Popen:
    return runs.start_python("-c", PACK, *arguments)


def run(*arguments: str) -> tuple[int, str]:
    return runs.finish(start(*arguments, "--num_workers=1"), timeout=60)


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    """Returns the content of every file but the one with the command."""
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if path.name != "prepared.json"
    }


def shards(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(directory.glob("*array_record*"))


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_packing_resumes_and_ends_with_the_same_bytes(source, whole, tmp_path):
    out = tmp_path / "out"
    work = tmp_path / "out.incomplete"
    killed = start(source, f"--out={out}", "--num_workers=1", "slow")
    wait_for(lambda: len(shards(work)) >= 2)
    killed.kill()
    killed.communicate()
    # Nothing looks prepared.
    assert not out.exists()
    with pytest.raises(UserError, match="no prepared data set"):
        open_source(f"tfds:{out}", "train")
    before = {path.name: path.stat() for path in shards(work)}
    assert 2 <= len(before) < sum("array_record" in name for name in whole)

    code, output = run(source, f"--out={out}")
    assert code == 0, output
    assert contents(out) == whole
    # The finished shards were not written again.
    for path in shards(out):
        if path.name in before:
            assert path.stat().st_mtime_ns == before[path.name].st_mtime_ns
    assert not work.exists()


def test_the_number_of_workers_changes_no_byte(source, whole, tmp_path):
    code, output = runs.finish(
        start(source, f"--out={tmp_path / 'out'}", "--num_workers=2")
    )
    assert code == 0, output
    assert contents(tmp_path / "out") == whole


def children(pid: int) -> list[int]:
    path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    if not path.exists():
        pytest.skip("the system does not list the children of a process")
    return [int(child) for child in path.read_text().split()]


def is_alive(pid: int) -> bool:
    status = pathlib.Path(f"/proc/{pid}/status")
    # A process that has ended is a zombie until its new parent collects it.
    return status.exists() and "State:\tZ" not in status.read_text()


def test_workers_end_when_their_parent_is_killed(source, tmp_path):
    killed = start(source, f"--out={tmp_path / 'out'}", "--num_workers=2")
    wait_for(lambda: len(children(killed.pid)) >= 2)
    workers = children(killed.pid)
    killed.kill()
    killed.communicate()
    wait_for(lambda: not any(map(is_alive, workers)), seconds=10)


def test_ctrl_c_prints_how_to_resume(source, tmp_path):
    process = start(source, f"--out={tmp_path / 'out'}", "--num_workers=1", "slow")
    wait_for(lambda: shards(tmp_path / "out.incomplete"))
    process.send_signal(signal.SIGINT)
    code, output = runs.finish(process, timeout=60)
    assert code == 130
    assert output.splitlines()[-1] == "Interrupted; the same command resumes the work."
    assert "Traceback" not in output


def test_two_packings_do_not_write_the_same_directory(source, tmp_path):
    out = f"--out={tmp_path / 'out'}"
    first = start(source, out, "--num_workers=1", "slow")
    wait_for(lambda: shards(tmp_path / "out.incomplete"))
    # Stopped, so that it does not end before the second packing begins.
    first.send_signal(signal.SIGSTOP)
    code, output = run(source, out)
    first.send_signal(signal.SIGCONT)
    assert code == 1
    assert "Another process is writing" in output.splitlines()[-1]
    code, output = runs.finish(first)
    assert code == 0, output


FULL = """
import resource
limit = {limit}
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
"""


def test_a_full_disk_is_reported_and_packing_resumes_later(tmp_path):
    # The images of the second split are larger than the limit of the files' size.
    files = {"a/cat/1.jpg": encode(noise(0, 40, 40), "JPEG")}
    files |= {"b/cat/1.jpg": encode(noise(1, 600, 600), "JPEG", quality=100)}
    # Folders with the same two folders in them are splits.
    files |= {f"{x}/dog/1.jpg": files["a/cat/1.jpg"] for x in "ab"}
    source = write_folder(tmp_path / "in", files)
    out = tmp_path / "out"
    arguments = (source, f"--out={out}", "--num_workers=1")
    script = FULL.format(limit=300_000) + PACK
    code, output = runs.run_python("-c", script, *arguments)
    assert code == 1
    last = output.splitlines()[-1]
    assert re.match(
        r"error: .*/in-b\.array_record-.* cannot be written \(.*File too", last
    )
    assert "run the same command again: it continues" in last
    assert "Traceback" not in output
    assert not out.exists()
    finished = shards(tmp_path / "out.incomplete")
    assert [path.name[:4] for path in finished] == ["in-a"]
    # The unfinished shard is removed.
    assert not list(tmp_path.glob("out.incomplete/unfinished/*array_record*"))
    before = finished[0].stat().st_mtime_ns

    code, output = run(*arguments[:2])
    assert code == 0, output
    assert shards(out)[0].stat().st_mtime_ns == before
    assert open_source(f"tfds:{out}", "b")[0][0] == files["b/cat/1.jpg"]


def test_a_disk_that_is_too_small_is_reported_before_it_is_full(
    source, tmp_path, monkeypatch
):
    usage = pack.shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"GB are to be written .* make room"):
        main(["prepare", source, f"--out={tmp_path / 'out'}"])
    assert not list(tmp_path.rglob("*array_record*"))


def repaired(message: str, out: pathlib.Path) -> str:
    """Runs the command of a message in a shell and returns its output."""
    command = re.search("`(.*)`", message).group(1)
    assert command.startswith("rm ")
    environment = os.environ | {"PYTHONPATH": str(runs.ROOT)}
    command = command.replace("python -m", f"{sys.executable} -m")
    ran = subprocess.run(
        command,
        shell=True,
        env=environment,
        cwd=out.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("damage", [truncate, pathlib.Path.unlink])
def test_a_truncated_or_missing_shard_is_named_with_the_command_that_repairs_it(
    source, tmp_path, damage
):
    main(["prepare", source, f"--out={tmp_path / 'out'}", "--num_workers=1"])
    # A name that has to be quoted in a shell.
    out = tmp_path / "my out"
    (tmp_path / "out").rename(out)
    before = contents(out)
    shard = shards(out)[1]
    damage(shard)
    # The error is raised on opening, not when a run reads the shard.
    with pytest.raises(UserError, match="is damaged") as raised:
        open_source(f"tfds:{out}", "val")
    assert str(shard) in str(raised.value)
    # The other split is not affected.
    assert len(open_source(f"tfds:{out}", "train")) == IMAGES // 2
    repaired(str(raised.value), out)
    assert contents(out) == before


def test_a_flipped_bit_names_the_image_the_shard_and_the_command(source, tmp_path):
    out = tmp_path / "out"
    main(["prepare", source, f"--out={out}", "--num_workers=1"])
    before = contents(out)
    shard = shards(out)[0]
    flip_byte(shard)
    damaged = open_source(f"tfds:{out}", "train")
    good, errors = 0, []
    for index in range(len(damaged)):
        try:
            damaged[index]
            good += 1
        except BadImageError as error:
            errors.append(str(error))
    assert (good, len(errors)) == (IMAGES // 2 - 1, 1)
    assert errors[0].startswith(f"tfds:{out}/train[")
    assert f"{shard} is damaged: Corrupted" in errors[0]
    repaired(errors[0], out)
    assert contents(out) == before
