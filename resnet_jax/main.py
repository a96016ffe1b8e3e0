"""The command: flags -> config -> train, evaluate or try out.

python -m resnet_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

import errno
import inspect
import logging
import pathlib
import shlex
import sys
import tempfile
import threading
import time

import absl.logging
from absl import flags
from ml_collections import config_flags

from resnet_jax.config import check_keys, file_of, for_dry_run, load, rewrite_durations
from resnet_jax.errors import UserError

_BEGAN = time.perf_counter()  # jax and what stands on it are imported later

# What a file system may refuse, and a user can mend.
REFUSALS = (
    "ENOSPC",
    "EDQUOT",
    "EFBIG",
    "EACCES",
    "EPERM",
    "EROFS",
    "ENOTDIR",
    "EEXIST",
)
MODES = ("train", "eval", "dry_run")

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where this one run keeps everything.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    MODES,
    "train: goes on where the workdir stands. eval: evaluates a checkpoint of the"
    " workdir. dry_run: two steps of the config on fake data at a small size.",
)
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", "best", ("best", "last"), "Which checkpoint --mode=eval takes."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where JAX cannot find it out."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator.")
_DISTRIBUTED = flags.DEFINE_boolean(
    "distributed", False, "Several processes; a TPU pod, Slurm or Open MPI tells which."
)


def parse(argv: list[str]) -> None:
    """Parses the flags; raises UserError for what they cannot be."""
    argv = rewrite_durations(argv)
    # The config flag looks for its overrides here.
    sys.argv = argv
    path = _config_path(argv)
    if path is not None:
        file_of(path)
    try:
        rest = flags.FLAGS(argv)[1:]
    except flags.Error as error:
        raise UserError(
            f"{str(error).splitlines()[0]} (--help lists the flags)"
        ) from None
    except (AttributeError, KeyError):
        if path is not None:
            check_keys(load(path), argv)
        raise
    if rest:
        raise UserError(f"What is {rest[0]!r}? Arguments are written --name=value.")
    if _CONFIG.value is None:
        raise UserError("Which config? Give --config=configs/quickstart.py, say.")
    if _WORKDIR.value is None and _MODE.value != "dry_run":
        raise UserError("Where to? Give --workdir=runs/NAME: one directory a run.")


def _config_path(argv: list[str]) -> str | None:
    for argument, following in zip(argv, [*argv[1:], None], strict=True):
        name, equals, path = argument.partition("=")
        if name in ("--config", "-config"):
            return path if equals else following
    return None


def connect() -> None:
    """Connects the processes of a run, if there are several; JAX's first call."""
    import jax

    if _COORDINATOR.value:
        jax.distributed.initialize(
            _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
        )
    elif _DISTRIBUTED.value:
        jax.distributed.initialize()


def run(command: str) -> None:
    """Does what the flags say."""
    # Imported here so that a wrong flag is told at once.
    import jax

    from resnet_jax import compile_cache, host
    from resnet_jax.evaluate import evaluate_workdir
    from resnet_jax.train import train
    from resnet_jax.writers import describe, say

    compile_cache.turn_on()
    if jax.default_backend() == "cpu":
        host.keep_freed_memory()
    config = _CONFIG.value
    if _MODE.value == "dry_run":
        with tempfile.TemporaryDirectory() as directory:
            small = for_dry_run(config, jax.device_count())
            workdir = pathlib.Path(directory) / "run"
            result = train(small, workdir, command, began=_BEGAN)
        say(f"dry run: 2 steps, then {result['n_seen']} images evaluated; all is well")
        return
    workdir = pathlib.Path(_WORKDIR.value)
    if _MODE.value == "eval":
        result = evaluate_workdir(config, workdir, _CHECKPOINT.value, command)
    else:
        result = train(config, workdir, command, began=_BEGAN)
    if jax.process_index() == 0:
        if _MODE.value == "train":
            say(f"report: {workdir / 'report.png'}")
        say(f"result: {describe(result)}  at step {result['step']}  from: {command}")


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, 1 for an error, 128 + the number of a signal."""
    own = ("--coordinator", "--num_processes", "--process_id")
    told = [argument for argument in argv[1:] if not argument.startswith(own)]
    command = "python -m resnet_jax.main " + shlex.join(told)
    quiet_libraries()
    if {"--help", "-h", "-help"} & set(argv):
        print(__doc__, flags.FLAGS.module_help(sys.modules[__name__]), sep="\n")
        return 0
    try:
        parse(argv)
        connect()
        from resnet_jax.preemption import PreemptedError

        try:
            run(command)
        except PreemptedError as stop:
            print(stop, file=sys.stderr)
            return stop.exit_code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if errno.errorcode.get(error.errno) not in REFUSALS:
            raise
        where = error.filename or _WORKDIR.value
        print(f"error: {where}: {error.strerror}.", file=sys.stderr)
        return 1
    return 0


def quiet_libraries() -> None:
    """Keeps from the user what this program tells in its own words."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Orbax logs the traceback of each of its threads when a disk is full.
    absl.logging.get_absl_logger().addFilter(
        lambda record: "orbax" not in record.pathname
    )

    # As does asyncio, of tasks that Orbax did not wait for.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # When a worker fails, Python's tracker frees what it shared, and need not say so.
    sys.warnoptions.append("ignore:resource_tracker")

    # Where a disk is full or a file broken, one failure is followed by many: threads
    # and exit handlers of TensorBoard's writer, which is dispensable, and callbacks of
    # TensorStore into loops that Orbax has closed.
    def noise(error, source=None) -> bool:
        return str(error) == "Event loop is closed" or inspect.iscoroutine(source)

    def one_line(failed) -> None:
        if not noise(failed.exc_value, getattr(failed, "object", None)):
            print(f"warning: {failed.exc_value}", file=sys.stderr)

    def uncaught(kind, error, traceback) -> None:
        if not noise(error):
            sys.__excepthook__(kind, error, traceback)

    threading.excepthook = sys.unraisablehook = one_line
    sys.excepthook = uncaught


if __name__ == "__main__":
    sys.exit(main(sys.argv))
