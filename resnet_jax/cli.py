"""The console script `resnet-jax`, whose commands run modules of the package.

`resnet-jax plan ...` is the same as `python -m resnet_jax.plan ...`.
"""

import runpy
import signal
import sys

from resnet_jax import __version__

# Each command's module, the arguments that are put before the user's, and a sentence
# for `--help`. Modules are imported only when they run, so that `--help` is fast.
COMMANDS = {
    "train": ("main", [], "Trains a network, or resumes the run of a workdir."),
    "eval": ("main", ["--mode=eval"], "Evaluates a checkpoint of a run."),
    "evaluate": ("evaluate", [], "Evaluates weights of any origin on any images."),
    "predict": ("predict", [], "Predicts the classes of images."),
    "convert": ("convert", [], "Converts weights between frameworks' formats."),
    "prepare": ("prepare", [], "Prepares data sets as ArrayRecord, and verifies them."),
    "zoo": ("zoo", [], "Lists the networks with their parameters and MACs."),
    "recipes": ("recipes", [], "Lists the recipes with their published results."),
    "keys": ("keys", [], "Lists the keys of a config with their meanings."),
    "report": ("report", [], "Plots the curves and sample predictions of a run."),
    "plan": (
        "plan",
        [],
        "Estimates memory and speed before a TPU is rented.",
    ),
    "bench": ("bench", [], "Measures speed, start-up time and memory."),
    "gradients": ("analysis.gradients", [], "Plots gradient norms by depth."),
    "degradation": ("analysis.degradation", [], "Compares deep with shallow networks."),
}


def main() -> None:
    """Runs the command that the command line names, and exits with its code."""
    # Until the command handles Ctrl-C, the signal ends the process without a traceback,
    # as in `resnet_jax/__init__.py`.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Imported only now, since Ctrl-C may come during an import.
    from resnet_jax.console import output

    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        output.command(_answer)
    module, first_arguments, _ = COMMANDS[name]
    sys.argv[1:] = first_arguments + arguments
    runpy.run_module(f"resnet_jax.{module}", run_name="__main__", alter_sys=True)


def _answer(argv: list[str]) -> None:
    """Prints the commands or the version; raises UserError for other commands."""
    from resnet_jax.console import output
    from resnet_jax.errors import check_known

    name = "".join(argv[1:2])
    if name == "--version":
        output.answer(f"resnet_jax {__version__}")
        return
    if name not in ("", "--help", "-h"):
        check_known(f"command {name!r}", name, COMMANDS)
    lines = [f"  {name:<12} {text}" for name, (_, _, text) in COMMANDS.items()]
    output.answer(
        "usage: resnet-jax COMMAND [ARGUMENTS]\n\n"
        + "\n".join(lines)
        + "\n\nresnet-jax COMMAND --help describes a command, and resnet-jax --version"
        " prints the\nversion."
    )
