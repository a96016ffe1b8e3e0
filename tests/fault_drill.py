"""Disturbs a training run with faults of all kinds, in random order.

python -m tests.fault_drill --faults=200 --processes=2 --seed=7

The final checkpoint must equal that of an undisturbed run, bit for bit. In a run of
several processes a signal strikes one of them. A run of one process has worker
processes in some of its starts; then a signal may also strike all of them. A full and a
read-only file system are mounted, which takes root; without it these two faults are
left out.
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

from resnet_jax.persistence.metric_writers import read_metrics
from tests.helpers import runs

# A checkpoint is saved at every other step, so that most faults strike near or in a
# save.
FLAGS = (
    *runs.SMALL,
    # Images that are cached in memory would need no workers.
    "--config.data.cache=none",
    # With images of 8 pixels, the run would often end before a fault strikes.
    "--config.data.image_size=24",
    "--config.checkpoint.every.steps=2",
    "--config.checkpoint.keep_last=3",
    "--config.evaluate.every.steps=25",
)
# The traceback of a worker process whose parent is killed while it starts the worker.
WORKER_TRACEBACK = re.compile(
    r"Traceback [^\n]*\n(?:  [^\n]*\n)+EOFError: Ran out of input\n"
)
# The time limit, in seconds, for all processes of a run to end after a signal.
TIMEOUT = 60


class Drill:
    """Faults of one run.

    The method of a fault disturbs the run or damages a checkpoint, and checks how the
    run ends. It returns a description, or '' if it came too late to do so.

    Attributes:
      done: The descriptions of the faults so far.

    Args:
      workdir: The workdir of the run. It lies in `disk`, if there is one.
      images: The folder of images on which the run trains.
      faults: The number of faults, which determines the length of the run.
      processes: The number of processes of the run.
      seed: The seed of the random choices.
      disk: A small file system that can be filled and made read-only; None if it could
        not be mounted.
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
        # The steps of the checkpoints that were not damaged.
        self._intact: set[int] = set()

    def run(self) -> None:
        """Causes all faults, and then lets the run end."""
        ends = [self.kill, self.terminate, self.close_the_output]
        if self._processes == 1:
            ends.append(self.signal_all)
        if self._disk:
            ends += [self.fill_the_disk, self.make_it_read_only]
        ends += [self.rename_the_workdir, self.remove_the_workdir, self.start_several]
        damages = [
            self.corrupt,
            self.remove_a_shard,
            self.edit_the_record,
            self.empty_the_record,
        ]
        while len(self.done) < self._faults:
            others = [self.damage_a_by_product, self.change_the_data]
            fault = self._random.choice([*ends, *damages, *others])
            # A run does not resume without an intact checkpoint.
            if fault in damages and len(self._intact) < 2:
                continue
            if fault == self.change_the_data and not self._intact:
                continue
            description = fault()
            if description:
                self.done.append(f"{fault.__name__}: {description}")
                print(f"{len(self.done):4} {self.done[-1]}", flush=True)
            else:
                print(f"     {fault.__name__}: the run ended before", flush=True)
        code, output = runs.finish(self._start())
        assert code == 0, output

    def start(self, workdir: pathlib.Path, redirect: str = "") -> subprocess.Popen:
        """Starts the run, or an equal one in another workdir."""
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
            # Newer checkpoints were written by this start of the run.
            assert int(restored[1]) in self._intact, output
        self._intact = set(names)

    def _steps(self) -> list[int]:
        if not (self._workdir / "checkpoints").exists():
            return []
        return runs.checkpoint_steps(self._workdir)

    def _strike(
        self, number: signal.Signals, *expected: int, all_at_once: bool = False
    ) -> str:
        """Sends a signal a moment after one of the first lines of the run's log.

        Args:
          number: The signal.
          *expected: The exit codes that the run may have, besides 0.
          all_at_once: True sends it to the process group, not to a single process.
        """
        process, lines = self._start_and_read()
        all_of_run = []
        # The run may have ended meanwhile.
        with contextlib.suppress(psutil.NoSuchProcess):
            # The descendants are processes of the run, and helpers that end with them.
            all_of_run = psutil.Process(process.pid).children(recursive=True)
            if all_at_once:
                os.killpg(process.pid, number)
            else:
                self._choose_process(process).send_signal(number)
        began = time.monotonic()
        code, rest = runs.finish(process)
        output = "".join(lines) + rest
        if number == signal.SIGKILL:
            # A worker that Python was just starting prints a traceback.
            output = WORKER_TRACEBACK.sub("", output)
        assert code in (*expected, 0), output
        assert time.monotonic() - began < TIMEOUT, output
        assert not psutil.wait_procs(all_of_run, timeout=TIMEOUT)[1], output
        self._ended(output)
        # With exit code 0 the signal came too late.
        return "" if code == 0 else f"after {lines[-1].split('  ')[0].strip()!r}"

    def _choose_process(self, started: subprocess.Popen) -> psutil.Process:
        """Returns the process, or any one of several but their launcher."""
        launcher = psutil.Process(started.pid)
        processes = sorted(launcher.children(), key=lambda child: child.pid)
        if self._processes == 1 or not processes:
            return launcher
        return self._random.choice(processes)

    def _start_and_read(self) -> tuple[subprocess.Popen, list[str]]:
        """Starts the run, and reads lines until a moment after one of the first."""
        process, lines = self._start(), []
        left = self._random.randint(1, 5)
        for line in process.stdout:
            lines.append(line)
            # Of several processes the first one writes the log, with a prefix.
            message = line.removeprefix("[0] ")
            left -= message.startswith(("step ", "compiling"))
            if left == 0:
                break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(self._random.choice((0.0, 0.01, 0.05, 0.2)))
        return process, lines

    def kill(self) -> str:
        """Sends SIGKILL, which a process cannot handle."""
        return self._strike(signal.SIGKILL, *self._killed)

    @property
    def _killed(self) -> tuple[int, ...]:
        """The exit codes of a run after one of its processes was killed."""
        # If there are several processes, the others report it and end with an error.
        if self._processes > 1:
            return (1, 128 + signal.SIGKILL)
        return (-signal.SIGKILL,)

    def terminate(self) -> str:
        """Sends SIGTERM, as a scheduler does."""
        return self._strike(signal.SIGTERM, 128 + signal.SIGTERM)

    def close_the_output(self) -> str:
        """Closes the output of a run or the pipe's other end, and ends the run later.

        The rows of metrics.jsonl show when the run has trained for some more steps.
        """
        before = self._metrics_file()
        redirect = self._random.choice(("", ">&-", "2>&-", ">&- 2>&-"))
        process = self._start(redirect)
        # If a stream is closed, only few lines come, so reading some would block until
        # the run ends.
        for _ in range(0 if redirect else self._random.randint(0, 12)):
            process.stdout.readline()
        process.stdout.close()
        # A starting run replaces the file.
        self._wait(process, lambda: self._metrics_file() != before)
        step, more = self._logged(), self._random.randint(1, 3)
        self._wait(process, lambda: self._logged() >= step + more)
        step = self._logged()
        number = self._random.choice((signal.SIGTERM, signal.SIGKILL))
        with contextlib.suppress(psutil.NoSuchProcess):
            self._choose_process(process).send_signal(number)
        code = process.wait(TIMEOUT)
        if number == signal.SIGTERM:
            assert code in (128 + number, 0), (redirect, code)
            assert max(self._steps()) >= step, (redirect, step, self._steps())
        else:
            assert code in (*self._killed, 0), (redirect, code)
        self._ended("")
        return (
            "" if code == 0 else f"{redirect or 'the pipe'}, ended {more} steps later"
        )

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
        """Signals all processes, workers too, as a terminal, systemd and Slurm do."""
        number = self._random.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        description = self._strike(number, 128 + number, all_at_once=True)
        return description and f"{number.name} {description}"

    def fill_the_disk(self) -> str:
        """Starts the run with less space on the disk than a checkpoint needs."""
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
        return "exit code 1 and an error message"

    def make_it_read_only(self) -> str:
        """Starts the run on a read-only file system."""
        remount(self._disk, "ro")
        try:
            code, output = runs.finish(self._start())
        finally:
            remount(self._disk, "rw")
        assert code == 1 and "Read-only file system" in output, output
        self._ended(output)
        return "exit code 1 and an error message"

    def rename_the_workdir(self) -> str:
        """Renames the workdir under the run, and renames it back after the run."""
        aside = self._workdir.with_name("aside")
        process, lines = self._start_and_read()
        self._workdir.rename(aside)
        code, output = runs.finish(process, TIMEOUT)
        is_new = self._workdir.exists()
        if is_new:
            shutil.rmtree(self._workdir)
        aside.rename(self._workdir)
        return self._lost(code, "".join(lines) + output, is_new)

    def remove_the_workdir(self) -> str:
        """Removes the workdir under the run; sometimes there is a copy of it."""
        copy = self._workdir.with_name("copy")
        has_copy = self._intact and self._random.random() < 0.7
        if has_copy:
            shutil.copytree(self._workdir, copy)
        process, lines = self._start_and_read()
        if process.poll() is None:
            # A file that the run writes meanwhile may keep a folder from being removed.
            while subprocess.run(["rm", "-rf", str(self._workdir)]).returncode:
                pass
        code, output = runs.finish(process, TIMEOUT)
        is_new = code != 0 and self._workdir.exists()
        if has_copy:
            shutil.rmtree(self._workdir, ignore_errors=True)
            copy.rename(self._workdir)
        return self._lost(code, "".join(lines) + output, is_new)

    def _lost(self, code: int, output: str, is_new: bool) -> str:
        """Checks the end of a run whose workdir was removed or renamed.

        Args:
          code: Its exit code.
          output: Its output.
          is_new: True if there was a new workdir when the run had ended.
        """
        if code == 0:
            self._ended(output)
            return ""
        assert code == 1, output
        assert "was removed, moved or replaced while this run used it" in output, output
        assert not is_new, output
        self._ended(output)
        return "exit code 1 and an error message"

    def start_several(self) -> str:
        """Starts the run several times at once at the lock of a killed run."""
        if not self.kill():
            return ""
        number = self._random.choice((2, 3, 5)) if self._processes == 1 else 2
        starts = [self._start() for _ in range(number)]
        running = starts
        while len(running) > 1:
            time.sleep(0.05)
            running = [start for start in starts if start.poll() is None]
        for start in running:
            start.send_signal(signal.SIGTERM)
        ends = [runs.finish(start, TIMEOUT) for start in starts]
        refused = [output for code, output in ends if code == 1]
        for output in refused:
            assert "is in use by a run on host" in output, output
        rest = [(code, output) for code, output in ends if code != 1]
        assert rest, refused
        for code, output in rest:
            assert code in (0, 128 + signal.SIGTERM), output
            self._ended(output)
        # A start that was late took the workdir after the first had left it.
        return f"{len(refused)} of {number} starts were refused" if refused else ""

    def damage_a_by_product(self) -> str:
        """Empties, cuts off or garbles a file that a run can make again."""
        names = ("config.json", "metrics.jsonl", "result.json")
        files = [path for name in names if (path := self._workdir / name).exists()]
        # Without a checkpoint, only the config shows that the folder is a workdir.
        if not files or not self._intact:
            return ""
        file = self._random.choice(files)
        content = file.read_bytes()
        middle = self._random.randrange(len(content) + 1)
        how, new = self._random.choice(
            (
                ("emptied", b""),
                ("cut off", content[:middle]),
                ("not UTF-8", content[:middle] + b"\xff\xfe" + content[middle:]),
                ("not a mapping", b"[]\n"),
            )
        )
        file.write_bytes(new)
        return f"{file.name}, {how}"

    def empty_the_record(self) -> str:
        """Replaces the record of the newest checkpoint by an empty one."""
        return self._damage(lambda file: file.write_text("{}"), record=True)

    def _data_files(self) -> list[pathlib.Path]:
        state = self._workdir / "checkpoints" / str(max(self._steps())) / "state"
        files = [file for file in state.rglob("*") if file.is_file()]
        # Files outside of d/ hold metadata, some of which other files hold as well.
        return sorted(file for file in files if "/d/" in str(file))

    def _damage(
        self, damage: Callable[[pathlib.Path], None], record: bool = False
    ) -> str:
        """Damages the largest file of the newest checkpoint, or its record."""
        step = max(self._steps())
        if step not in self._intact:
            return ""
        file = max(self._data_files(), key=lambda file: file.stat().st_size)
        if record:
            file = self._workdir / "checkpoints" / str(step) / "run" / "metadata"
        damage(file)
        self._intact.remove(step)
        return f"the checkpoint of step {step}"

    def corrupt(self) -> str:
        """Flips one bit of the newest checkpoint."""

        def flip(file: pathlib.Path) -> None:
            content = bytearray(file.read_bytes())
            content[self._random.randrange(len(content))] ^= 1
            file.write_bytes(content)

        return self._damage(flip)

    def edit_the_record(self) -> str:
        """Changes a digit of the recorded step or number of examples."""
        key = self._random.choice(("step", "examples"))

        def edit(file: pathlib.Path) -> None:
            text = file.read_text()
            # The first match is in the progress of the run.
            match = re.search(rf'"{key}": ?(\d+)', text)
            place = self._random.randrange(*match.span(1))
            digit = self._random.choice([x for x in "123456789" if x != text[place]])
            file.write_text(text[:place] + digit + text[place + 1 :])

        return self._damage(edit, record=True)

    def change_the_data(self) -> str:
        """Starts the run once with an image or class removed, added or renamed."""
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
        # A class that is in one split only is reported by another error.
        assert code == 1, output
        assert "with other data: " in output or "labels would differ" in output, output
        self._ended(output)
        return "exit code 1 and an error message"

    def remove_a_shard(self) -> str:
        """Removes the largest file of the newest checkpoint."""
        return self._damage(pathlib.Path.unlink)


def remount(disk: pathlib.Path, options: str) -> None:
    """Mounts a file system again with other options, such as `ro`."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def write_images(folder: pathlib.Path) -> pathlib.Path:
    """Writes 500 of scikit-learn's digits as PNG files, in two splits."""
    # Importing scikit-learn takes a second, and collecting the tests does not need it.
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if i == 500:
            return folder
        path = folder / ("train" if i % 5 else "test") / str(label) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(path)


@contextlib.contextmanager
def small_disk(directory: pathlib.Path) -> Iterator[pathlib.Path | None]:
    """Mounts a file system in memory; yields None if that is not possible."""
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
    """Makes a run with faults and one without, and compares them.

    Args:
      directory: A directory for both runs.
      faults: The number of faults.
      seed: The seed of the random choices.
      processes: The number of processes of the run with faults.

    Returns:
      The descriptions of the faults.

    Raises:
      AssertionError: A fault was not reported, or the two runs end differently.
    """
    flags = f"--faults={faults} --processes={processes} --seed={seed}"
    print(f"python -m tests.fault_drill {flags}", flush=True)
    with small_disk(directory) as disk:
        if disk is None:
            print(
                "The disk is neither full nor read-only in this drill: that takes root."
            )
        workdir = (disk or directory) / "broken"
        images = write_images(directory / "images")
        broken = Drill(workdir, images, faults, processes, seed, disk)
        broken.run()
        code, output = runs.finish(broken.start(directory / "undisturbed"))
        assert code == 0, output
        runs.assert_same_end(workdir, directory / "undisturbed")
    return broken.done


def main() -> None:
    """Runs the drill that the flags describe."""
    # Under nohup or in the background, the runs would inherit ignored signals.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--faults",
        type=int,
        default=20,
        help="The number of faults. The default is %(default)s.",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="The number of processes of the run. The default is %(default)s.",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=secrets.randbelow(10**6),
        help="The seed of the random choices. By default it is random.",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        done = drill(pathlib.Path(directory), **vars(options))
    print(f"{len(done)} faults; the run ended as without them, bit for bit")


if __name__ == "__main__":
    main()
