"""Every command: its --help, its messages for mistakes, and that nothing imports it."""

import ast
import importlib
import pathlib
import re

import pytest

import resnet_jax
from resnet_jax.bench.__main__ import WHATS
from resnet_jax.console.arguments import Parser, count
from resnet_jax.errors import UserError

PACKAGE = pathlib.Path(resnet_jax.__file__).parent
# This module starts any command, so it may import them all.
CONSOLE = "resnet_jax.cli"
QUICK = "--config=configs/quickstart.py"


def name_of(path: pathlib.Path) -> str:
    """Returns the name of a module by its file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    name_of(path): path
    for path in PACKAGE.rglob("*.py")
    if "configs" not in path.relative_to(PACKAGE).parts
}
# A command is a module that calls `output.command(main)` at its end.
COMMANDS = [
    name for name, path in FILES.items() if "\n    output.command(" in path.read_text()
]
# These two do not use `Parser`: absl parses the flags of main.
OTHERS = (CONSOLE, "resnet_jax.main")
LINES = [(name,) for name in COMMANDS if name not in OTHERS]
LINES += [("resnet_jax.bench.__main__", what) for what in WHATS]


def entry_of(name: str):
    """Returns the function that a command calls with the command line."""
    module = importlib.import_module(name)
    return getattr(module, "run", None) if "prepare" in name else module.main


def help_of(line: tuple[str, ...], capsys, monkeypatch) -> str:
    """Returns what a command prints for --help, each flag on one line."""
    name, *words = line
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit) as done:
        entry_of(name)([name, *words, "--help"])
    assert done.value.code in (0, None)
    return capsys.readouterr().out


def test_commands_are_recognised():
    assert {
        "resnet_jax.main",
        "resnet_jax.plan.__main__",
        "resnet_jax.bench.__main__",
        "resnet_jax.prepare",
        "resnet_jax.zoo",
        "resnet_jax.analysis.gradients",
    } <= set(COMMANDS)


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_help_has_a_sentence_for_every_flag(line, capsys, monkeypatch):
    text = help_of(line, capsys, monkeypatch)
    sections = text.partition("\npositional arguments:\n")[2]
    sections = sections or text.partition("\noptions:\n")[2]
    # The sentence of a long flag starts on the next line.
    sections = re.sub(r"\n {10,}", "  ", sections)
    flags = re.findall(r"^  (\S.*?)(?:  +(.*))?$", sections, re.MULTILINE)
    assert "--help" in sections
    for flag, sentence in flags:
        assert re.fullmatch(r"[A-Z].*\.", sentence), (flag, sentence)
    takes_config = "\n  --config CONFIG" in sections
    assert takes_config == ("--config.KEY=VALUE sets a key" in text)
    if takes_config:
        (command,) = re.findall(r"All keys are\s+explained by python -m (\S+)", text)
        assert command in COMMANDS


def test_help_of_main_has_a_sentence_for_every_flag(capsys):
    from resnet_jax import main

    assert main.main(["main", "--help"]) == 0
    text = capsys.readouterr().out
    flags = re.split(r"\n {2}--", text.partition("\nFlags:\n")[2])
    assert len(flags) > 10
    for flag in flags[1:]:
        name, _, rest = flag.partition("\n\n")[0].partition(": ")
        sentence = " ".join(rest.partition("\n    (")[0].split())
        sentence = re.sub(r"^<[^>]*>: ", "", sentence)
        assert re.fullmatch(r"[A-Z].*\.", sentence), (name, sentence)
    assert "--config.KEY=VALUE sets a key" in text


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_the_message_for_an_unknown_flag_names_the_nearest(line):
    name, *words = line
    with pytest.raises(UserError, match=r"no flag --hlep\.|are required"):
        entry_of(name)([name, *words, "--hlep=1"])


# Each flag and argument that is a path, of each command that uses `Parser`.
PATHS = [
    ("resnet_jax.predict", "{}", "x.png"),
    ("resnet_jax.predict", "w", "x.png", "--save={}"),
    ("resnet_jax.convert", "{}", "x.safetensors"),
    ("resnet_jax.convert", "w", "{}"),
    ("resnet_jax.report", "{}"),
    ("resnet_jax.prepare", "folder:{}"),
    ("resnet_jax.prepare", "tfds:{}"),
    ("resnet_jax.prepare", "convert", "{}"),
    ("resnet_jax.prepare", "verify", "{}"),
    ("resnet_jax.prepare", "verify", "folder:{}"),
    ("resnet_jax.prepare", "imagenet2012", "--data_dir={}"),
    ("resnet_jax.prepare", "imagenet2012", "--manual_dir={}"),
    ("resnet_jax.prepare", "imagenet2012", "--out={}"),
    ("resnet_jax.plan.__main__", "--config={}"),
    ("resnet_jax.plan.__main__", QUICK, "--input_rate={}"),
    ("resnet_jax.analysis.gradients", "--workdir={}", "--save=x.png"),
    ("resnet_jax.analysis.gradients", QUICK, "--save={}"),
    ("resnet_jax.analysis.degradation", "--runs={}", "--save=x.png"),
    ("resnet_jax.analysis.degradation", "--runs=w", "--save={}"),
    ("resnet_jax.bench.__main__", "schedule", QUICK, "--save={}"),
    ("resnet_jax.bench.__main__", "augment", QUICK, "--save={}"),
    ("resnet_jax.bench.__main__", "augment", QUICK, "--save=x.png", "--images={}"),
    ("resnet_jax.bench.__main__", "input", "--images={}"),
    ("resnet_jax.bench.__main__", "step", "--json={}"),
    ("resnet_jax.bench.__main__", "step", "--profile={}"),
    ("resnet_jax.bench.__main__", "gpu", "--json={}"),
    ("resnet_jax.bench.__main__", "gpu", "--golden={}"),
]


@pytest.mark.parametrize("line", PATHS, ids=" ".join)
def test_an_impossible_path_is_one_sentence_and_leaves_nothing(
    line, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    for text, message in {
        "": r"is empty|source 'folder:'|source 'tfds:'",
        "n" * 300: "File name too long",
        "file/x": "Not a directory",
        "loop": "symbolic links",
        "~no_such_user/x": "home directory ~no_such_user is not known",
        "ftp://host/x": "ftp://",
    }.items():
        name, *words = (word.replace("{}", text) for word in line)
        with pytest.raises(UserError, match=message) as error:
            entry_of(name)([name, *words])
        assert len(str(error.value)) < 400
    assert sorted(tmp_path.rglob("*")) == before


def test_prepare_refuses_a_directory_that_it_would_ignore():
    with pytest.raises(UserError, match="takes no DIRECTORY, but 'b' was given"):
        entry_of("resnet_jax.prepare")(["prepare", "folder:a", "b"])


def test_a_run_option_of_prepare_that_has_no_effect_is_a_warning(capsys, tmp_path):
    line = ["prepare", "verify", f"folder:{tmp_path}/x", "--max_side=9", "--quality=8"]
    with pytest.raises(UserError, match="There is no folder"):
        entry_of("resnet_jax.prepare")(line)
    assert capsys.readouterr().err.splitlines() == [
        "warning: --max_side has no effect with verify.",
        "warning: --quality has no effect with verify.",
    ]


def test_an_override_and_its_value_may_be_two_arguments():
    parser = Parser("x", "")
    parser.add_config(required=True)
    parser.add_argument("--steps", type=count, default=1)
    line = [
        "--config",
        "c.py",
        "--config.seed",
        "3",
        "--steps=2",
        "--noconfig.data.flip",
    ]
    args = parser.parse(line)
    assert (args.config, args.steps) == ("c.py", 2)
    assert args.overrides == ["--config.seed=3", "--config.data.flip=false"]
    assert parser.parse(["--config=c.py"]).overrides == []


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "optim.learning_rate=-1",
            r"^optim\.learning_rate=-1\.0 must be at least 0\.$",
        ),
        ("data.flip=maybe", r"data\.flip=maybe is neither true nor false"),
        ("seed=9223372036854775808", r"^seed=9223372036854775808 must be from 0 to"),
        ("total.epochs=nan", r"total\.epochs=nan is not a number"),
    ],
)
@pytest.mark.parametrize(
    "line",
    [
        ("resnet_jax.plan.__main__", "--topology=v5e:2x4"),
        ("resnet_jax.analysis.gradients", "--save=norms.png"),
        ("resnet_jax.bench.__main__", "augment", "--save=images.png"),
        ("resnet_jax.bench.__main__", "schedule", "--save=rates.png"),
        *(("resnet_jax.bench.__main__", what) for what in ("overhead", "scale")),
    ],
    ids=" ".join,
)
def test_every_command_with_a_config_refuses_the_same_values(line, flag, message):
    name, *words = line
    config = "--config=configs/quickstart.py"
    with pytest.raises(UserError, match=message):
        entry_of(name)([name, *words, config, f"--config.{flag}"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--setps=2", r"no flag --setps\. Did you mean --steps"),
        ("--config.seed=2", r"no flag --config\.seed\."),
        ("--step=2", r"no flag --step\. Did you mean --steps"),
        ("word", r"Unexpected argument 'word'\. Flags are written --name=value\."),
        ("--steps=0", r"^Argument --steps: '0' is not a whole number above 0 \(python"),
    ],
)
def test_each_mistake_gets_one_sentence(line, message):
    parser = Parser("x", "")
    parser.add_argument("--steps", type=count)
    with pytest.raises(UserError, match=message):
        parser.parse([line])


def imports_of(name: str) -> set[str]:
    """Returns all names that a module imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_nothing_imports_a_command():
    found = {
        (name, command)
        for name in FILES
        for command in imports_of(name).intersection(COMMANDS)
        if name != CONSOLE
    }
    assert not found
