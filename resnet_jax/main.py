"""Trains a network, evaluates a run, or tries a config out.

python -m resnet_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from resnet_jax.console import output
from resnet_jax.parallel import process_memory, signals

if __name__ == "__main__":
    # First of all: a closed descriptor must not become that of a file, and Ctrl-C may
    # come at any time. The heap is of this process alone, before there are threads.
    output.prepare()
    signals.listen()
    process_memory.use_one_heap()

import contextlib
import dataclasses
import errno
import inspect
import json
import logging
import pathlib
import secrets
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import absl.logging
from absl import flags
from ml_collections import ConfigDict

from resnet_jax.config import load, override
from resnet_jax.config.overrides import HELP, take_overrides
from resnet_jax.config.saved import as_json, flatten
from resnet_jax.config.variants import for_dry_run
from resnet_jax.console.arguments import CONFIG
from resnet_jax.errors import UserError, problem_of_memory, problem_of_store

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

_CONFIG = flags.DEFINE_string(
    "config",
    None,
    f"{CONFIG} --mode=eval needs none: it takes the run's own config from the workdir.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "The directory of this one run, local or in an object store (gs://, s3://), where"
    " it keeps everything. --mode=dry_run needs none.",
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    MODES,
    "What the command does. train starts a run, or resumes the one in the workdir."
    " eval evaluates a checkpoint of the workdir as it was trained, or as"
    " --config.KEY=VALUE say otherwise. dry_run runs two steps of the config on fake"
    " data at a small size.",
)
_EXTEND = flags.DEFINE_boolean(
    "extend",
    False,
    "Resumes a run with a larger config.total although its learning rate schedule"
    " depends on that: finished steps keep the rates that they had.",
)
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint",
    "best",
    ("best", "last"),
    "The checkpoint that --mode=eval evaluates: the one of the best evaluation, or the"
    " last one.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "The address HOST:PORT of process 0, for runs of several processes that JAX cannot"
    " find out by itself. It needs --num_processes and --process_id.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    None,
    "The number of processes of the run, the same for all. It needs --coordinator.",
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id",
    None,
    "The number of this process, from 0 to --num_processes - 1. It needs"
    " --coordinator.",
)
_DISTRIBUTED = flags.DEFINE_boolean(
    "distributed",
    False,
    "Connects the processes of a TPU pod, a Slurm job or Open MPI, which JAX finds by"
    " itself.",
)

_INITIALIZATION_TIMEOUT = flags.DEFINE_string(
    "initialization_timeout",
    "100s",
    "How long to wait for all processes to connect, such as 90s, 5m or 1h.",
)
_GRACE = flags.DEFINE_string(
    "grace",
    "25s",
    "Time between a signal (SIGTERM, Ctrl-C, SIGHUP) and the scheduler's SIGKILL. The"
    " run saves and exits with code 128 + the signal's number within it. 0 disables the"
    " limit.",
)
_STALL_TIMEOUT = flags.DEFINE_string(
    "stall_timeout",
    "30m",
    "Time without the end of a step, an evaluation batch or a compilation after which"
    " the run prints where each thread is and exits with code 1. 0 disables the limit.",
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The part of the command line that is about the config.

    Attributes:
      config: The config with the overrides; None where --mode=eval has no --config.
      overrides: The overrides, `--config.KEY=VALUE`.
    """

    config: ConfigDict | None
    overrides: list[str]


def parse(argv: list[str]) -> Arguments:
    """Parses the command line; raises UserError for a mistake in it."""
    try:
        # Overrides may also be in the file that absl's --flagfile names.
        argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
        argv, overrides = take_overrides(argv)
        rest = flags.FLAGS(argv)[1:]
    except flags.Error as error:
        raise UserError(
            f"{str(error).splitlines()[0]} (--help lists the flags; --config.KEY=VALUE"
            " sets a key of the config)"
        ) from None
    if rest:
        raise UserError(
            f"Unexpected argument {rest[0]!r}. Arguments are written --name=value."
        )
    if _CONFIG.value is None and _MODE.value != "eval":
        raise UserError(
            "--config is required, for example --config=configs/quickstart.py."
        )
    if _WORKDIR.value is None and _MODE.value != "dry_run":
        raise UserError(
            "--workdir is required, for example --workdir=runs/NAME: one directory a"
            " run."
        )
    if _CONFIG.value is None:
        return Arguments(None, overrides)
    config = load(_CONFIG.value)
    override(config, overrides)
    return Arguments(config, overrides)


def _seconds(text: str, flag: str) -> float:
    """Of 25, 25s, 5m or 1h."""
    scale = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        return float(text[:-1]) * scale if scale else float(text)
    except ValueError:
        raise UserError(f"--{flag}={text} is no time, such as 25s or 30m.") from None


def connect(arguments: Arguments) -> None:
    """Connects the processes of a run, if there are several; JAX's first call."""
    from resnet_jax.parallel import processes
    from resnet_jax.persistence import versions

    if not (_COORDINATOR.value or _DISTRIBUTED.value):
        return
    processes.connect(
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        _seconds(_INITIALIZATION_TIMEOUT.value, "initialization_timeout"),
    )
    names = ("mode", "checkpoint", "extend")
    told = {name: flags.FLAGS[name].value for name in names}
    told["config.*"] = arguments.overrides
    config = json.loads(as_json(arguments.config)) if arguments.config else {}
    processes.check_same(
        "start",
        {
            "the number of processes": processes.count(),
            "the code of resnet_jax": versions.code_checksum(),
            **{
                f"the version of {k}": v for k, v in versions.package_versions().items()
            },
            **{f"--{name}": value for name, value in told.items()},
            **{f"config.{key}": value for key, value in flatten(config).items()},
        },
    )
    from resnet_jax.parallel.sharding import find_devices

    own = [x for x in find_devices() if x.process_index == processes.index()]
    kinds = sorted({device.device_kind for device in own})
    devices = f"{len(own)} x {', '.join(kinds)}"
    processes.check_same("devices", {"their devices": devices})
    processes.check_clocks()


@contextlib.contextmanager
def _scratch() -> Iterator["Path"]:
    """A workdir for a dry run, which goes."""
    from etils import epath

    from resnet_jax.parallel import processes
    from resnet_jax.persistence import storage

    if processes.count() == 1:
        token = secrets.token_hex(8)
        directory = pathlib.Path(tempfile.gettempdir()) / f"resnet_jax_dry_run_{token}"

        def remove_directory() -> None:
            # While the process is ended, other threads may still write there.
            for _ in range(5):
                shutil.rmtree(directory, ignore_errors=True)

        processes.at_end.append(remove_directory)
        directory.mkdir(mode=0o700)
        try:
            yield directory / "run"
        finally:
            remove_directory()
        return
    if not _WORKDIR.value:
        raise UserError(
            "A dry run of several processes needs a --workdir that all share; it leaves"
            " nothing there."
        )
    # Of this run alone, so that none that goes at the same time is removed.
    token = processes.run_on_lead("dry run", lambda: secrets.token_hex(4))
    workdir = storage.path_of(f"{_WORKDIR.value.rstrip('/')}.dry_run.{token}")

    def remove() -> None:
        with contextlib.suppress(FileNotFoundError):
            epath.Path(workdir).rmtree()

    # Also when the run is stopped or ended, and only after the others have left.
    if processes.index() == 0:
        processes.at_end.append(remove)
    yield workdir
    processes.agree("end of the dry run", "")
    if processes.index() == 0:
        remove()


def run(arguments: Arguments, command: str) -> None:
    """Trains, evaluates or tries out, as the flags say."""
    # Imported here, so that a wrong flag is reported at once.
    import jax

    from resnet_jax.console.output import say
    from resnet_jax.parallel.sharding import find_devices
    from resnet_jax.persistence import compile_cache
    from resnet_jax.persistence.metric_writers import describe
    from resnet_jax.persistence.storage import path_of
    from resnet_jax.training.evaluation import evaluate_workdir
    from resnet_jax.training.loop import train

    compile_cache.turn_on()
    if find_devices()[0].platform == "cpu":
        process_memory.keep_freed_memory()
    config = arguments.config
    limits = {
        "grace": _seconds(_GRACE.value, "grace"),
        "stall_timeout": _seconds(_STALL_TIMEOUT.value, "stall_timeout"),
    }
    if _MODE.value == "dry_run":
        small = for_dry_run(config, jax.device_count())
        with _scratch() as workdir:
            result = train(small, workdir, command=command, began=_BEGAN, **limits)
        seen = result["n_seen"]
        if jax.process_index() == 0:
            say(f"dry run: 2 steps, then {seen} images evaluated; all is well")
        return
    workdir = path_of(_WORKDIR.value)
    if _MODE.value == "eval":
        result = evaluate_workdir(
            workdir,
            _CHECKPOINT.value,
            arguments.overrides,
            command,
            named_config=config,
            **limits,
        )
    else:
        extend = _EXTEND.value
        result = train(
            config,
            workdir,
            command=command,
            extend=extend,
            began=_BEGAN,
            **limits,
        )
    if jax.process_index() == 0:
        if result.get("report"):
            say(f"report: {result['report']}")
        say(f"result: {describe(result)}  at step {result['step']}  from: {command}")


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, 1 for an error, 128 + the number of a signal."""
    with signals.listening():
        code = _main(argv)
        signals.wait_if_ending()
        return code


def _main(argv: list[str]) -> int:
    own = ("--coordinator", "--num_processes", "--process_id")
    told = [argument for argument in argv[1:] if not argument.startswith(own)]
    command = "python -m resnet_jax.main " + shlex.join(told)
    quiet_libraries()
    if {"--help", "-h", "-help"} & set(argv):
        own = flags.FLAGS.module_help(sys.modules[__name__])
        # The first line names the module.
        own = own.strip().partition("\n")[2]
        output.answer(f"{__doc__}\nFlags:\n{own}\n\n{HELP}")
        return 0
    try:
        arguments = parse(argv)
    except UserError as error:
        output.fail(str(error))
        return 1
    # Imports jax, so that a wrong flag is told before.
    from resnet_jax.parallel import processes
    from resnet_jax.persistence.preemption import PreemptedError

    try:
        connect(arguments)
        run(arguments, command)
    except PreemptedError as stop:
        output.note(str(stop))
        return processes.leave(stop.exit_code)
    except UserError as error:
        return processes.give_up(str(error))
    except Exception as error:
        if problem := _problem_of(error):
            return processes.give_up(problem)
        return processes.give_up_after(error)
    return 0


def _problem_of(error: Exception) -> str:
    """What a user can mend, of errors that libraries raise; empty for others."""
    workdir = _WORKDIR.value or ""
    if "://" in workdir and (why := problem_of_store(error)):
        return f"{workdir} cannot be used: {why}."
    if isinstance(error, OSError) and errno.errorcode.get(error.errno) in REFUSALS:
        return f"{error.filename or workdir}: {error.strerror}."
    return problem_of_memory(error)


def quiet_libraries() -> None:
    """Keeps from the user what this program tells in its own words."""
    # Orbax logs the traceback of each of its threads when a disk is full.
    absl.logging.get_absl_logger().addFilter(
        lambda record: "orbax" not in record.pathname
    )

    # gcsfs, each time that it may not ask what kind of bucket it has.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
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
            text = str(failed.exc_value or "") or failed.exc_type.__name__
            output.warn(text)

    def uncaught(kind, error, traceback) -> None:
        if not noise(error):
            sys.__excepthook__(kind, error, traceback)

    threading.excepthook = sys.unraisablehook = one_line
    sys.excepthook = uncaught


if __name__ == "__main__":
    output.command(main)
