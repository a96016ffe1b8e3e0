"""The console script `resnet-jax`, which does the same as `python -m resnet_jax.X`."""

import importlib.util
import signal

import pytest

from resnet_jax import __version__, cli
from tests.helpers import runs

# pip writes a script with this text for an entry point.
SCRIPT = "import sys; from resnet_jax.cli import main; sys.exit(main())"


def run(*arguments: str, **options) -> tuple[int, str]:
    """Runs `resnet-jax` to its end; returns its exit code and its output."""
    return runs.run_python("-c", SCRIPT, *arguments, **options)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_is_a_module_and_has_a_sentence(command):
    module, _, sentence = cli.COMMANDS[command]
    assert importlib.util.find_spec(f"resnet_jax.{module}")
    assert sentence.endswith(".")
    code, output = run("--help")
    assert code == 0
    assert f"\n  {command:<12} {sentence}\n" in output


def test_without_arguments_the_commands_are_listed():
    assert run() == run("--help") == run("-h")


def test_the_list_of_commands_imports_no_library():
    code, output = runs.run_python("-X", "importtime", "-c", SCRIPT, "--help")
    assert code == 0
    imported = {line.rpartition("|")[2].strip() for line in output.splitlines()}
    assert "resnet_jax.cli" in imported
    assert not imported & {"jax", "numpy", "absl", "ml_collections", "tqdm"}


def test_the_version_of_the_package_is_printed():
    assert run("--version") == (0, f"resnet_jax {__version__}\n")


def test_the_message_for_an_unknown_command_names_the_nearest():
    code, output = run("trian", "--config=configs/r50.py")
    message = "error: There is no command 'trian'. Did you mean train?\n"
    assert (code, output) == (1, message)


@pytest.mark.parametrize(
    "arguments",
    [
        "recipes r50.py",
        "recipes --markdwn",
        "keys seed",
        "main --help",
        "main --workdir=x",
        "main --config=configs/r5.py --workdir=x",
    ],
)
def test_a_command_has_the_output_and_exit_code_of_its_module(arguments):
    module, *rest = arguments.split()
    command = {"main": "train"}.get(module, module)
    expected = runs.run_python("-m", f"resnet_jax.{module}", *rest)
    assert run(command, *rest) == expected


def test_eval_is_main_in_the_mode_eval():
    expected = runs.run_python("-m", "resnet_jax.main", "--mode=eval", "--chekpoint=x")
    assert run("eval", "--chekpoint=x") == expected


@pytest.mark.parametrize("redirect", ["| true", ">&-", ">/dev/full"])
def test_the_list_of_commands_handles_a_broken_output_as_other_commands_do(redirect):
    def end(*command):
        if redirect.startswith("|"):
            process = runs.start_python(*command)
            process.stdout.close()
            return process.wait(60)
        return runs.run_python(*command, redirect=redirect)

    recipes = end("-m", "resnet_jax.recipes")
    assert end("-c", SCRIPT) == recipes
    assert end("-c", SCRIPT, "recipes") == recipes


@pytest.mark.parametrize("command", ["predict", "prepare", "zoo"])
def test_ctrl_c_while_a_command_imports_its_libraries_prints_no_traceback(
    command, tmp_path
):
    for name in ("jax", "numpy", "flax"):
        slow = "import time; print('importing', flush=True); time.sleep(60)"
        (tmp_path / f"{name}.py").write_text(slow)
    process = runs.start_python(
        *("-c", SCRIPT, command, "resnet18"),
        PYTHONPATH=f"{tmp_path}:{runs.ROOT}",
    )
    code, output = runs.send_when(process, "importing", signal.SIGINT)
    assert code in (-signal.SIGINT, 130)
    assert "importing" in output and "Traceback" not in output


@pytest.mark.long
def test_a_run_records_the_same_command_and_saves_on_ctrl_c(tmp_path):
    flags = (f"--workdir={tmp_path}", *runs.SMALL)
    process = runs.start_python("-c", SCRIPT, "train", *flags)
    code, output = runs.send_when(process, "step 10/", signal.SIGINT)
    assert code == 130, output
    code, output = run("train", *flags)
    assert code == 0, output
    assert "the checkpoint of step 1" in output
    recorded = runs.result(tmp_path)["command"]
    assert recorded.startswith(
        f"python -m resnet_jax.main --workdir={tmp_path} --config="
    )
