"""Trains a network, evaluates a run, or tries out a config.

python -m resnet_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from resnet_jax.console import output
from resnet_jax.parallel import process_memory, signals

if __name__ == "__main__":
    # These come before all other imports. A file must not get the number of a closed
    # standard stream, Ctrl-C may come at any time, and the heap is set up for threads
    # that start later.
    output.prepare()
    signals.listen()
    process_memory.use_one_heap()

import argparse
import dataclasses
import json
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from resnet_jax.config import load, override
from resnet_jax.config.overrides import HELP, take_overrides
from resnet_jax.config.saved import as_json, flatten
from resnet_jax.config.variants import for_dry_run
from resnet_jax.console.arguments import CONFIG, check_values, seconds, whole_number
from resnet_jax.console.quiet import quiet_libraries
from resnet_jax.errors import BadValueError, UserError, problem_of
from resnet_jax.paths import check_folder_to_write
from resnet_jax.persistence.storage import is_remote, path_of

_BEGAN = time.perf_counter()  # JAX and the libraries above it are imported later.

MODES = ("train", "eval", "dry_run")


class _Type(flags.ArgumentParser):
    """Lets absl parse a flag with a type of argparse, which all commands share.

    Args:
      parse: Parses a text; raises `argparse.ArgumentTypeError`.
    """

    def __init__(self, parse: Callable[[str], Any]):
        self._parse = parse

    def parse(self, argument: str) -> Any:
        """Returns the value of a flag; raises BadValueError if it is not allowed."""
        try:
            return self._parse(argument)
        except argparse.ArgumentTypeError as error:
            raise BadValueError(str(error)) from None


class _Serializer(flags.ArgumentSerializer):
    """Writes times with their unit, in the defaults that --help prints."""

    def serialize(self, value: int | float) -> str:
        """Returns the text of a value of `whole_number` or `seconds`."""
        return f"{value:g}s" if isinstance(value, float) else str(value)


def _define(name: str, parse: Callable[[str], Any], default: str | None, help: str):
    return flags.DEFINE(_Type(parse), name, default, help, serializer=_Serializer())


_CONFIG = flags.DEFINE_string(
    "config",
    None,
    f"{CONFIG} It is required, except with --mode=eval, which takes the run's own"
    " config from the workdir.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "The directory of this one run, local or in an object store (gs://, s3://), which"
    " holds everything that the run writes. It is required, except with"
    " --mode=dry_run.",
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    MODES,
    "The task of the command. train starts a run, or resumes the run of the workdir."
    " eval evaluates a checkpoint of the workdir with the run's own config;"
    " --config.KEY=VALUE changes a key of it. dry_run trains two steps with the config"
    " on fake data at a small size.",
)
_EXTEND = flags.DEFINE_boolean(
    "extend",
    False,
    "Resumes a run with a larger config.total although its learning rate schedule"
    " depends on the total. The finished steps keep the learning rates that they had.",
)
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint",
    "best",
    ("best", "last"),
    "The checkpoint that --mode=eval evaluates: the one with the best evaluation, or"
    " the last one.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "The address HOST:PORT of process 0, for a run of several processes that JAX cannot"
    " find by itself. It requires --num_processes and --process_id.",
)
_NUM_PROCESSES = _define(
    "num_processes",
    whole_number(1),
    None,
    "The number of processes of the run, the same for all. It requires --coordinator.",
)
_PROCESS_ID = _define(
    "process_id",
    whole_number(0),
    None,
    "The number of this process, from 0 to --num_processes - 1. It requires"
    " --coordinator.",
)
_DISTRIBUTED = flags.DEFINE_boolean(
    "distributed",
    False,
    "Connects the processes of a TPU pod, a Slurm job or Open MPI, which JAX finds by"
    " itself.",
)
_INITIALIZATION_TIMEOUT = _define(
    "initialization_timeout",
    seconds,
    "100s",
    "Time to wait for all processes to connect, such as 90s, 5m or 1h.",
)
_GRACE = _define(
    "grace",
    seconds,
    "25s",
    "Time between a signal (SIGTERM, Ctrl-C, SIGHUP) and the scheduler's SIGKILL, such"
    " as 25s. The run saves and exits with code 128 + the signal's number within it. 0"
    " disables the limit.",
)
_STALL_TIMEOUT = _define(
    "stall_timeout",
    seconds,
    "30m",
    "Time, such as 30m, after which the run exits with code 1 if no step, evaluation"
    " batch or compilation has ended. It prints where each thread is. 0 disables the"
    " limit.",
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The config and the workdir of a command line.

    Attributes:
      config: The config with the overrides; None if --mode=eval has no --config.
      overrides: The overrides, each `--config.KEY=VALUE`.
      workdir: The run's directory; empty if --mode=dry_run has no --workdir.
    """

    config: ConfigDict | None
    overrides: list[str]
    workdir: str


def parse(argv: list[str]) -> Arguments:
    """Parses a command line and loads its config.

    Args:
      argv: The command line, beginning with the name of the program.

    Raises:
      UserError: An argument is unknown, missing or not allowed.
    """
    try:
        # Overrides may also be in the file that absl's --flagfile names.
        argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
        argv, overrides = take_overrides(argv)
        valued = [name for name in flags.FLAGS if not flags.FLAGS[name].boolean]
        check_values(argv[1:], [f"--{name}" for name in valued])
        positional = flags.FLAGS(argv)[1:]
    except flags.Error as error:
        problem = str(error).splitlines()[0].removeprefix("ERROR:: ")
        raise UserError(
            f"{problem} (--help lists the flags; --config.KEY=VALUE sets a key of the"
            " config)"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"The file that --flagfile names is not a text: {error}."
        ) from None
    if positional:
        raise UserError(
            f"Unexpected argument {positional[0]!r}. Arguments are written"
            " --name=value."
        )
    if _CONFIG.value is None and _MODE.value != "eval":
        raise UserError(
            "--config is required, for example --config=configs/quickstart.py."
        )
    if _WORKDIR.value is None and _MODE.value != "dry_run":
        raise UserError(
            "--workdir is required, for example --workdir=runs/NAME. Each run has a"
            " directory of its own."
        )
    _check_combination()
    workdir = ""
    if _WORKDIR.value is not None:
        path = path_of(_WORKDIR.value)
        if _MODE.value == "train" and not is_remote(path):
            check_folder_to_write(pathlib.Path(path))
        workdir = os.fspath(path)
    config = None
    if _CONFIG.value is not None:
        config = load(_CONFIG.value)
        override(config, overrides)
    return Arguments(config, overrides, workdir)


def _check_combination() -> None:
    """Warns of flags that have no effect beside the others.

    Raises UserError if they make single runs of what should be one of many processes.
    """
    given = {name for name in flags.FLAGS if flags.FLAGS[name].present}
    several = bool({"coordinator", "distributed"} & given)
    for name in ("num_processes", "process_id"):
        if name in given and not several:
            raise UserError(
                f"--{name} needs --coordinator=HOST:PORT, without which this process"
                " would be a run of its own. Give that, or leave both out."
            )
    needs = {
        "distributed": ("no --coordinator", "coordinator" not in given),
        "initialization_timeout": ("--coordinator or --distributed", several),
        "extend": ("--mode=train", _MODE.value == "train"),
        "checkpoint": ("--mode=eval", _MODE.value == "eval"),
    }
    for name, (need, is_met) in needs.items():
        if name in given and not is_met:
            output.warn(f"--{name} has an effect only with {need}.")


def connect(arguments: Arguments) -> None:
    """Connects the processes of the run if there are several, before any use of JAX.

    Raises UserError if they cannot connect, or were not started in the same way.
    """
    if not (_COORDINATOR.value or _DISTRIBUTED.value):
        return
    from resnet_jax.parallel import processes
    from resnet_jax.persistence import startup_check

    processes.connect(
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        _INITIALIZATION_TIMEOUT.value,
    )
    config = json.loads(as_json(arguments.config)) if arguments.config else {}
    startup_check.check_processes(
        {
            "--mode": _MODE.value,
            "--checkpoint": _CHECKPOINT.value,
            "--extend": _EXTEND.value,
            # An evaluation may have overrides alone.
            **{f"config.{key}": value for key, value in flatten(config).items()},
            "--config.*": arguments.overrides,
        }
    )


def run(arguments: Arguments, command: str) -> None:
    """Trains, evaluates or does a dry run, and prints the result.

    Args:
      arguments: The result of `parse`.
      command: The command line, which is recorded with the result.
    """
    # Imported here, so that a wrong flag is reported at once.
    import jax

    from resnet_jax.console.output import say
    from resnet_jax.parallel.sharding import find_devices
    from resnet_jax.persistence import compile_cache
    from resnet_jax.persistence.metric_writers import describe
    from resnet_jax.persistence.temporary_workdir import temporary_workdir
    from resnet_jax.training.completion import complete
    from resnet_jax.training.evaluation import evaluate_workdir
    from resnet_jax.training.loop import train

    compile_cache.turn_on()
    if find_devices()[0].platform == "cpu":
        process_memory.keep_freed_memory()
    grace, stall_timeout = _GRACE.value, _STALL_TIMEOUT.value
    config = arguments.config
    if _MODE.value == "dry_run":
        with temporary_workdir(arguments.workdir) as workdir:
            result = train(
                for_dry_run(complete(config), jax.device_count()),
                workdir,
                command=command,
                began=_BEGAN,
                grace=grace,
                stall_timeout=stall_timeout,
            )
        if jax.process_index() == 0:
            images = result["n_seen"]
            say(f"dry run: 2 steps, then {images} images evaluated; all is well")
        return
    workdir = path_of(arguments.workdir)
    if _MODE.value == "eval":
        result = evaluate_workdir(
            workdir,
            _CHECKPOINT.value,
            arguments.overrides,
            command,
            named_config=config,
            grace=grace,
            stall_timeout=stall_timeout,
        )
    else:
        result = train(
            config,
            workdir,
            extend=_EXTEND.value,
            command=command,
            began=_BEGAN,
            grace=grace,
            stall_timeout=stall_timeout,
        )
    if jax.process_index() == 0:
        if result.get("report"):
            say(f"report: {result['report']}")
        end = f"at step {result['step']}"
        if to_target := result.get("to_target"):
            end += f" (target reached, {to_target['seconds']:.1f} s of training)"
        elif result.get("ended_by") == "patience":
            end += " (no new best for too long)"
        say(f"result: {describe(result)}  {end}  from: {command}")


def main(argv: list[str]) -> int:
    """Runs the command.

    Args:
      argv: The command line, beginning with the name of the program.

    Returns:
      The exit code: 0, 1 for an error, or 128 + the number of a signal.
    """
    with signals.listening():
        code = _main(argv)
        signals.wait_if_ending()
        return code


def _main(argv: list[str]) -> int:
    quiet_libraries()
    if {"--help", "-h", "-help"} & set(argv):
        # The first line of absl's text names the module.
        text = flags.FLAGS.module_help(sys.modules[__name__]).strip().partition("\n")[2]
        output.answer(f"{__doc__}\nFlags:\n{text}\n\n{HELP}")
        return 0
    try:
        arguments = parse(argv)
    except UserError as error:
        output.fail(str(error))
        return 1
    # These import jax, so they come after the check of the flags.
    from resnet_jax.parallel import processes
    from resnet_jax.persistence.preemption import PreemptedError

    # The recorded command is the same for all processes of a run.
    process_flags = ("--coordinator", "--num_processes", "--process_id")
    recorded = [x for x in argv[1:] if not x.startswith(process_flags)]
    try:
        connect(arguments)
        run(arguments, "python -m resnet_jax.main " + shlex.join(recorded))
    except PreemptedError as stop:
        output.note(str(stop))
        return processes.leave(stop.exit_code)
    except UserError as error:
        return processes.give_up(str(error))
    except Exception as error:
        if problem := problem_of(error, arguments.workdir):
            return processes.give_up(problem)
        return processes.give_up_after(error)
    return 0


if __name__ == "__main__":
    output.command(main)
