"""Breaks a run in every way that a machine has, in random order.

python -m tests.fault_drill --faults=200 --processes=2 --seed=7

The end must be that of a run that nothing happened to, bit for bit. Of several
processes, a signal strikes any one; of a run of one, also all that it has started,
which are worker processes in some starts. A full and a read-only file system take root,
to mount one; without it these two are left out.
"""

import argparse
import contextlib
import os
import pathlib
import random
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil
from PIL import Image
from sklearn.datasets import load_digits

from resnet_jax.persistence.metric_writers import read_metrics
from tests.helpers import runs

# A checkpoint every other step: most faults strike near one or in one.
FLAGS = (
    *runs.SMALL,
    # In memory, images would need no workers.
    "--config.data.cache=none",
    # At 8 pixels a run would be at its end before it is struck.
    "--config.data.image_size=24",
    "--config.checkpoint.every.steps=2",
    "--config.checkpoint.keep_last=3",
    "--config.evaluate.every.steps=25",
)
# What Python prints of a process whose parent is killed while it starts it.
UNBORN = re.compile(r"Traceback [^\n]*\n(?:  [^\n]*\n)+EOFError: Ran out of input\n")
# Seconds in which the processes of a run end when one was killed.
NOTICED = 60


class Drill:
    """Faults of one run.

    Args:
      workdir: of the run; its parent is `disk` if that is a file system of its own.
      images: The folder of images that it trains on.
      faults: how many there will be, which makes the length of the run.
      processes: of the run.
      seed: of their order.
      disk: a small file system that can be filled and made read-only, if there is one.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        images: pathlib.Path,
        faults: int,
        processes: int,
        seed: int,
        disk: pathlib.Path | None,
    ):
        self.done: list[str] = []
        self._images = images
        self._flags = (
            *FLAGS,
            f"--config.total.steps={20 + 3 * faults}",
            f"--config.data.source=folder:{images}",
        )
        self._processes = processes
        self._workdir, self._faults, self._disk = workdir, faults, disk
        self._random = random.Random(seed)
        # Checkpoints that nothing was done to.
        self._whole: set[int] = set()

    def run(self) -> None:
        """Lets all faults happen, then the run end."""
        ends = [self.kill, self.terminate, self.close_the_output]
        if self._processes == 1:
            ends.append(self.signal_all)
        if self._disk:
            ends += [self.fill_the_disk, self.make_it_read_only]
        harms = [self.corrupt, self.remove_a_shard, self.edit_the_record]
        while len(self.done) < self._faults:
            fault = self._random.choice([*ends, *harms, self.change_the_data])
            # Without an intact checkpoint, a run says so and does not resume.
            if fault in harms and len(self._whole) < 2:
                continue
            if fault == self.change_the_data and not self._whole:
                continue
            happened = fault()
            if happened:
                self.done.append(f"{fault.__name__}: {happened}")
                print(f"{len(self.done):4} {self.done[-1]}", flush=True)
            else:
                print(f"     {fault.__name__}: it did not strike", flush=True)
        code, output = runs.finish(self._start())
        assert code == 0, output

    def start(self, workdir: pathlib.Path, redirect: str = "") -> subprocess.Popen:
        """Starts the run, or one like it in another workdir."""
        flags = [f"--workdir={workdir}", *self._flags]
        if self._processes > 1:
            launcher = ("launch/local.py", str(self._processes))
            return runs.start_python(*launcher, *flags, redirect=redirect)
        flags.append(f"--config.data.num_workers={self._random.choice((0, 0, 2))}")
        main = ("-m", "resnet_jax.main")
        return runs.start_python(*main, *flags, redirect=redirect, own_group=True)

    def _start(self, redirect: str = "") -> subprocess.Popen:
        return self.start(self._workdir, redirect)

    def _ended(self, output: str) -> None:
        assert "Traceback" not in output, output
        restored = re.search(r"resuming from the checkpoint of step (\d+)", output)
        names = self._steps()
        if restored:
            # What is older was written before, what is newer by this run.
            assert int(restored[1]) in self._whole, output
        self._whole = set(names)

    def _steps(self) -> list[int]:
        if not (self._workdir / "checkpoints").exists():
            return []
        return runs.checkpoint_steps(self._workdir)

    def _strike(
        self, number: signal.Signals, *expected: int, all_at_once: bool = False
    ) -> str:
        """Sends a signal some lines behind the start, and a moment behind the line."""
        process, lines = self._start(), []
        left = self._random.randint(1, 5)
        for line in process.stdout:
            lines.append(line)
            # Of several processes, the first one tells, behind its number.
            said = line.removeprefix("[0] ")
            left -= said.startswith(("step ", "compiling"))
            if left == 0:
                break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self._random.choice((0.0, 0.01, 0.05, 0.2)))
        all_of_run = []
        # It may have ended meanwhile.
        with contextlib.suppress(psutil.NoSuchProcess):
            # Processes, and helpers of theirs that end with them.
            all_of_run = psutil.Process(process.pid).children(recursive=True)
            if all_at_once:
                os.killpg(process.pid, number)
            else:
                self._struck(process).send_signal(number)
        began = time.monotonic()
        code, rest = runs.finish(process)
        output = "".join(lines) + rest
        if number == signal.SIGKILL:
            # Of a worker that Python was starting just then.
            output = UNBORN.sub("", output)
        assert code in (*expected, 0), output
        assert time.monotonic() - began < NOTICED, output
        assert not psutil.wait_procs(all_of_run, timeout=NOTICED)[1], output
        self._ended(output)
        # The run was at its end, or in its exit.
        return "" if code == 0 else f"behind {lines[-1].split('  ')[0].strip()!r}"

    def _struck(self, started: subprocess.Popen) -> psutil.Process:
        """The process, or of several any one but their launcher."""
        launcher = psutil.Process(started.pid)
        processes = sorted(launcher.children(), key=lambda child: child.pid)
        if self._processes == 1 or not processes:
            return launcher
        return self._random.choice(processes)

    def kill(self) -> str:
        """With a signal that nothing can be done about."""
        return self._strike(signal.SIGKILL, *self._killed)

    @property
    def _killed(self) -> tuple[int, ...]:
        """The exit codes of a run of which a process was killed."""
        # Of several processes the others say so, and end with an error.
        if self._processes > 1:
            return (1, 128 + signal.SIGKILL)
        return (-signal.SIGKILL,)

    def terminate(self) -> str:
        """As a scheduler does."""
        return self._strike(signal.SIGTERM, 128 + signal.SIGTERM)

    def close_the_output(self) -> str:
        """Lets the reader go away or closes the streams, and ends the run later.

        The rows of metrics.jsonl show when the run has trained for some more steps.
        """
        before = self._metrics_file()
        redirect = self._random.choice(("", ">&-", "2>&-", ">&- 2>&-"))
        process = self._start(redirect)
        # With a closed stream, few lines come, and waiting for more would take the run.
        for _ in range(0 if redirect else self._random.randint(0, 12)):
            process.stdout.readline()
        process.stdout.close()
        # The start of a run replaces the file.
        self._wait(process, lambda: self._metrics_file() != before)
        step, more = self._logged(), self._random.randint(1, 3)
        self._wait(process, lambda: self._logged() >= step + more)
        step = self._logged()
        number = self._random.choice((signal.SIGTERM, signal.SIGKILL))
        with contextlib.suppress(psutil.NoSuchProcess):
            self._struck(process).send_signal(number)
        code = process.wait(NOTICED)
        if number == signal.SIGTERM:
            assert code in (128 + number, 0), (redirect, code)
            assert max(self._steps()) >= step, (redirect, step, self._steps())
        else:
            assert code in (*self._killed, 0), (redirect, code)
        self._ended("")
        return "" if code == 0 else f"{redirect or 'a pipe'}, {more} steps before"

    def _logged(self) -> int:
        """Returns the last step in metrics.jsonl."""
        return max((row["step"] for row in read_metrics(self._workdir)), default=0)

    def _metrics_file(self) -> int | None:
        path = self._workdir / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else None

    def _wait(self, process: subprocess.Popen, done: Callable[[], bool]) -> None:
        while process.poll() is None and not done():
            time.sleep(0.01)

    def signal_all(self) -> str:
        """As `timeout`, systemd and Slurm do, and a terminal: the workers as well."""
        number = self._random.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        happened = self._strike(number, 128 + number, all_at_once=True)
        return happened and f"{number.name} {happened}"

    def fill_the_disk(self) -> str:
        """Leaves less room than a checkpoint needs."""
        filler = self._disk / "filler"
        room = shutil.disk_usage(self._disk).free - self._random.randint(0, 100_000)
        with filler.open("wb") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, room)
        try:
            code, output = runs.finish(self._start())
        finally:
            filler.unlink()
        if code == 0:
            self._ended(output)
            return ""
        assert code == 1 and "No space left on device" in output, output
        self._ended(output)
        return "1 and a sentence"

    def make_it_read_only(self) -> str:
        """Before a start."""
        remount(self._disk, "ro")
        try:
            code, output = runs.finish(self._start())
        finally:
            remount(self._disk, "rw")
        assert code == 1 and "Read-only file system" in output, output
        self._ended(output)
        return "1 and a sentence"

    def _data_files(self) -> list[pathlib.Path]:
        state = self._workdir / "checkpoints" / str(max(self._steps())) / "state"
        files = [file for file in state.rglob("*") if file.is_file()]
        # Metadata beside the arrays may be derived from others.
        return sorted(file for file in files if "/d/" in str(file))

    def _harm(self, harm: Callable[[pathlib.Path], None], record: bool = False) -> str:
        """Harms the largest file of the newest checkpoint, or its record."""
        step = max(self._steps())
        if step not in self._whole:
            return ""
        file = max(self._data_files(), key=lambda file: file.stat().st_size)
        if record:
            file = self._workdir / "checkpoints" / str(step) / "run" / "metadata"
        harm(file)
        self._whole.remove(step)
        return f"the checkpoint of step {step}"

    def corrupt(self) -> str:
        """Changes one bit of the newest checkpoint."""

        def flip(file: pathlib.Path) -> None:
            content = bytearray(file.read_bytes())
            content[self._random.randrange(len(content))] ^= 1
            file.write_bytes(content)

        return self._harm(flip)

    def edit_the_record(self) -> str:
        """Changes a digit of the step or of the number of examples."""
        key = self._random.choice(("step", "examples"))

        def edit(file: pathlib.Path) -> None:
            text = file.read_text()
            # The first one is that of the progress.
            found = re.search(rf'"{key}": ?(\d+)', text)
            place = self._random.randrange(*found.span(1))
            digit = self._random.choice([x for x in "123456789" if x != text[place]])
            file.write_text(text[:place] + digit + text[place + 1 :])

        return self._harm(edit, record=True)

    def change_the_data(self) -> str:
        """Removes, renames or adds an image, or renames a class, for one start."""
        images = sorted(self._images.rglob("*.png"))
        image = self._random.choice(images)
        aside = self._images.with_name("aside")
        shutil.copytree(self._images, aside)
        change = self._random.choice(
            (
                image.unlink,
                lambda: image.rename(image.with_name("renamed.png")),
                lambda: shutil.copy(image, image.with_name("added.png")),
                lambda: image.parent.rename(image.parent.with_name("renamed")),
            )
        )
        change()
        try:
            code, output = runs.finish(self._start())
        finally:
            shutil.rmtree(self._images)
            aside.rename(self._images)
        # A class in one split alone is an error of its own.
        assert code == 1, output
        assert "with other data: " in output or "labels would differ" in output, output
        self._ended(output)
        return "1 and a sentence"

    def remove_a_shard(self) -> str:
        """Of the newest checkpoint."""
        return self._harm(pathlib.Path.unlink)


def remount(disk: pathlib.Path, options: str) -> None:
    """Mounts a file system in another way."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def write_images(folder: pathlib.Path) -> pathlib.Path:
    """Writes the first of scikit-learn's digits as PNG files of two splits."""
    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if i == 500:
            return folder
        path = folder / ("train" if i % 5 else "test") / str(label) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(path)


@contextlib.contextmanager
def small_disk(directory: pathlib.Path) -> Iterator[pathlib.Path | None]:
    """A file system in memory; None where none can be mounted."""
    disk = directory / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def drill(
    directory: pathlib.Path, faults: int, seed: int, processes: int = 1
) -> list[str]:
    """A run with faults, and one without; returns what happened.

    Raises AssertionError if a fault is not told, or the two end differently.
    """
    flags = f"--faults={faults} --processes={processes} --seed={seed}"
    print(f"python -m tests.fault_drill {flags}", flush=True)
    with small_disk(directory) as disk:
        if disk is None:
            print("no full and no read-only disk: to mount one takes root")
        workdir = (disk or directory) / "broken"
        images = write_images(directory / "images")
        broken = Drill(workdir, images, faults, processes, seed, disk)
        broken.run()
        code, output = runs.finish(broken.start(directory / "undisturbed"))
        assert code == 0, output
        runs.assert_same_end(workdir, directory / "undisturbed")
    return broken.done


def main() -> None:
    # Under nohup or in the background, the runs would ignore what is sent to them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        done = drill(pathlib.Path(directory), **vars(options))
    print(f"{len(done)} faults, and the same end as without, bit for bit")


if __name__ == "__main__":
    main()
