"""The Markdown pages are true: their commands, examples, tables, paths and links."""

import ast
import contextlib
import doctest
import importlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

import resnet_jax
from resnet_jax import cli
from resnet_jax.config import RECIPES, load, override, recipes, values
from resnet_jax.config.saved import flatten
from resnet_jax.models import ZOO, get_spec
from resnet_jax.weights import SCHEMES
from resnet_jax.weights.naming import to_foreign
from tests.helpers import example_folder, keyed, pages
from tests.helpers import words as english
from tests.helpers.golden_configs import CONFIGS
from tests.helpers.packaging_files import PROJECT
from tests.helpers.pictures import encode, noise
from tests.helpers.runs import ROOT
from tests.helpers.timm_config import CONFIG

PAGES = [pytest.param(page, id=page) for page in pages.PAGES]
COMMANDS = [(page, command) for page in pages.PAGES for command in pages.commands(page)]
# Programs of others, whose arguments are not checked.
FOREIGN = {"resnet-jax", "git", "cd", "export", "docker", "pre-commit", "cffconvert"}
# The functions that modules run with a command line, where it is not `main`.
ENTRIES = {"resnet_jax.prepare": "run"}


def parts(command: list[str]) -> tuple[str, list[str]]:
    """Returns the module that a command runs, and its arguments.

    The module is '' if the command runs another program; the arguments are then the
    words of the command. What starts processes, such as mpirun, is left out.
    """
    words = [x for x in command if not re.fullmatch(r"[A-Z_0-9]+=.*", x)]
    if words[:1] == ["resnet-jax"]:
        if words[1] in ("--help", "--version"):
            return "", words
        module, first, _ = cli.COMMANDS[words[1]]
        return f"resnet_jax.{module}", [*first, *words[2:]]
    for index, word in enumerate(words):
        if word.endswith("launch/local.py"):
            return "resnet_jax.main", words[index + 2 :]
        if re.search(r"launch/(slurm\.sbatch|tpu_vm\.sh|gke/run\.py)$", word):
            separator = words.index("--") if "--" in words else index
            return "resnet_jax.main", words[separator + 1 :]
        if word == "-m" and words[index + 1].startswith("resnet_jax"):
            return words[index + 1], words[index + 2 :]
    return "", words


RUN = [(page, *parts(command)) for page, command in COMMANDS if parts(command)[0] != ""]


def label(value: object) -> str:
    """Returns the id of a parameter."""
    return " ".join(value) if isinstance(value, list) else str(value)


def _help_of(module: str, word: str, capsys) -> str:
    name = importlib.import_module(module)
    if hasattr(name, "__path__"):
        name = importlib.import_module(f"{module}.__main__")
    words = [word] if module == "resnet_jax.bench" else []
    entry = getattr(name, ENTRIES.get(module, "main"))
    with contextlib.suppress(SystemExit):
        entry([module, *words, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize(("page", "module", "arguments"), RUN, ids=label)
def test_every_flag_that_a_page_gives_is_known(page, module, arguments, capsys):
    text = _help_of(module, "".join(arguments[:1]), capsys)
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("-") and not flag.startswith("--config."):
            name = flag.lstrip("-").removeprefix("no")
            assert re.search(rf"-(\[no\])?(no)?{name}(?![\w-])", text), flag


LAUNCHED = [
    (words[0], words[1 : words.index("--")])
    for _, command in COMMANDS
    if "--" in (words := [x for x in command if x not in ("python", "bash")])
]


@pytest.mark.parametrize(("script", "flags"), LAUNCHED, ids=label)
def test_every_flag_of_a_launcher_is_known(script, flags):
    text = (ROOT / script).read_text()
    for flag in flags:
        assert re.search(rf"{flag.partition('=')[0]}(?![\w-])", text), flag


@pytest.mark.parametrize(("page", "module", "arguments"), RUN, ids=label)
def test_every_config_that_a_page_gives_is_legal(page, module, arguments):
    (file,) = [x for x in arguments if x.startswith("--config=")] or ["--config="]
    file = file.removeprefix("--config=")
    own = file.partition(":")[0]
    if own and not (ROOT / own).exists():
        # A file of the reader's own, which the page shows.
        assert own in "".join(x.text for x in pages.fences(page)), own
        file = ""
    config = load(str(ROOT / file) if file else RECIPES / "quickstart.py")
    override(config, [x for x in arguments if x.startswith("--config.")])
    values.check(config)


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=label)
def test_every_other_program_that_a_page_runs_is_there(page, command):
    module, words = parts(command)
    if module or words[0] in FOREIGN or not words:
        return
    makefile = (ROOT / "Makefile").read_text()
    program, *arguments = words
    match program:
        case "make":
            for target in arguments:
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        case "pip":
            assert arguments[0] == "install"
            for word in arguments[1:]:
                for extra in re.findall(r"[\w-]+", word.partition("[")[2]):
                    assert extra in PROJECT["project"]["optional-dependencies"], extra
                if word.endswith(".txt"):
                    assert (ROOT / word).exists(), word
        case "pytest":
            for word in arguments:
                assert (
                    word[0] == "-"
                    or (ROOT / word.split("::")[0]).exists()
                    or (arguments[arguments.index(word) - 1] in ("-k", "-m"))
                ), word
        case "python" if arguments[0] == "-m":
            assert (ROOT / f"{arguments[1].replace('.', '/')}.py").exists(), words
        case "sky":
            assert any((ROOT / word).exists() for word in arguments), words
        case _:
            pytest.fail(f"{page}: no test knows the program {program}.")


def _changing(page: str) -> tuple:
    slow = "resnet_jax.zoo '" in pages.PAGES[page].read_text()
    return (pytest.mark.slow,) if slow else ()


@pytest.mark.parametrize(
    "page", [pytest.param(x, id=x, marks=_changing(x)) for x in pages.PAGES]
)
def test_generated_parts_are_what_their_commands_print(page, capsys):
    assert not pages.cog(page, "--check", "--diff"), (
        f"If this change is meant: python -m tests.helpers.pages {page}\n"
        + capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("docs/networks.md", ZOO),
        ("docs/recipes.md", [name for name, _, _ in recipes.variants()]),
    ],
)
def test_the_tables_of_a_page_list_everything_once(page, names):
    cells = re.findall(r"^\| ([\w.:]+) \|", pages.PAGES[page].read_text(), re.M)
    assert not {*names} - {*cells}
    assert all(cells.count(name) == 1 for name in names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the folder in which the Python examples of all pages run."""
    path = tmp_path_factory.mktemp("examples")
    example_folder.fill(path)
    return path


WITH_PYTHON = [x for x in pages.PAGES if pages.fences(x, "python", "pycon")]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_does_what_it_shows(page, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    names = {
        **{"resnet_jax": resnet_jax, "jax": jax, "np": np},
        **{"images": example_folder.IMAGES, "labels": example_folder.LABELS},
    }
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    with contextlib.chdir(tmp_path):
        for fence in pages.fences(page, "python", "pycon"):
            if fence.language == "python":
                exec(fence.text, names)
                continue
            test = parser.get_doctest(fence.text, names, page, page, 0)
            assert test.examples, fence.text
            assert not runner.run(test, clear_globs=False).failed
            names |= test.globs


MADE_BY_A_RUN = {
    *("checkpoints/", "config.json", "metrics.jsonl", "tensorboard/", "result.json"),
    *("report.png", "card.json", "running.json", "runs/"),
}
PATH = re.compile(r"[\w./-]+(?:\.py|\.md|\.sh|\.cc|\.toml|/)")


@pytest.mark.parametrize("page", [x for x in pages.PAGES if x != "CHANGELOG.md"])
def test_every_path_that_a_page_names_is_there(page):
    for name in pages.code_words(page):
        # Words in capitals are the reader's.
        is_example = name in MADE_BY_A_RUN or re.search("[A-Z]{4}", name)
        if PATH.fullmatch(name) and not (is_example and "README" not in name):
            beside = pages.PAGES[page].parent
            places = (ROOT, ROOT / "resnet_jax", ROOT / "launch", beside)
            assert any((place / name).exists() for place in places), name


@pytest.mark.parametrize("page", [x for x in pages.PAGES if x != "CHANGELOG.md"])
def test_every_key_that_a_page_names_is_in_the_config(page):
    known = flatten(load(RECIPES / "quickstart.py")).keys()
    sections = {key.partition(".")[0] for key in known if "." in key}
    for word in pages.code_words(page):
        key = re.match(r"(?:--config\.)?([a-z_]+(?:\.[a-z_0-9]+)+)(?![\w/(])", word)
        if key and key[1].partition(".")[0] in sections and not word.endswith(".py"):
            unit = r"\.(epochs|steps|examples)$|(?<=overrides)\.\w+$"
            name = re.sub(unit, "", key[1])
            assert name in known or any(x.startswith(f"{name}.") for x in known), word


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_command_in_a_recipe_is_true(path):
    for line in re.findall(r"^python -m .*(?:\\\n.*)*", path.read_text(), re.M):
        module, arguments = parts(shlex.split(line.replace("\\\n", " ")))
        if module == "resnet_jax.prepare":
            continue
        assert module == "resnet_jax.main"
        (file,) = [x for x in arguments if x.startswith("--config=")]
        config = load(ROOT / file.removeprefix("--config="))
        override(config, [x for x in arguments if x.startswith("--config.")])
        values.check(config)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_page_and_a_heading(page):
    for target in pages.links(page):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = (pages.PAGES[page].parent / path).resolve() if path else None
        file = file or pages.PAGES[page]
        assert file.exists(), target
        if anchor:
            name = str(file.relative_to(ROOT))
            assert anchor in pages.anchors(name), target


@pytest.mark.parametrize("page", PAGES)
def test_no_sentence_has_more_than_40_words(page):
    long = [x for x in pages.sentences(page) if len(x.split()) > 40]
    assert not long


@pytest.mark.parametrize("page", PAGES)
def test_the_sentences_of_a_page_follow_the_rules(page):
    text = "\n".join(pages.sentences(page))
    assert not list(english.problems_of_sentences(text))


def test_the_front_page_has_at_most_150_lines():
    assert len(pages.PAGES["README.md"].read_text().splitlines()) <= 150


def test_the_figures_of_the_front_page_are_those_of_the_code_and_the_tables():
    text = " ".join(pages.PAGES["README.md"].read_text().split())
    assert f"{len(ZOO)} networks" in text
    published = [result for _, result, _ in recipes.variants()]
    named = sum(1 for result in published if result)
    assert f"{len(published)} variants, {named} of them" in text
    file = ROOT / "docs" / "measurements" / "step_resnet50.json"
    (table,) = json.loads(file.read_text())
    assert f"{table['rows'][0]['ratio']:.1f} times as fast as with Flax's" in text
    versions = table["versions"]
    assert f"jax {versions['jax']} and torch {versions['torch']}" in text


def front_page(*words: str) -> list[str]:
    """Returns the command of README.md that has all these words."""
    (command,) = [x for x in pages.commands("README.md") if {*words} <= {*x}]
    return command


@pytest.fixture
def hub_cache(tmp_path):
    """Returns a cache of the hub with random weights of timm's ResNet-18."""
    repository = tmp_path / "hub" / "models--timm--resnet18.a1_in1k"
    snapshot = repository / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    spec = get_spec("resnet18")
    tensors = to_foreign(keyed.variables(spec), spec, SCHEMES["timm"])
    tensors = {name: np.array(x, order="C") for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, snapshot / "model.safetensors")
    config = CONFIG | {"architecture": "resnet18"}
    (snapshot / "config.json").write_text(json.dumps(config))
    return tmp_path / "hub"


@pytest.mark.slow
def test_the_front_page_trains_on_pictures_and_classifies_one(tmp_path, hub_cache):
    for split, amount in (("train", 16), ("val", 4)):
        for kind in ("cat", "dog"):
            folder = tmp_path / "PHOTOS" / split / kind
            folder.mkdir(parents=True)
            for index in range(amount):
                picture = encode(noise(index, 48, 40), "JPEG")
                (folder / f"{index}.jpg").write_bytes(picture)
    shutil.copy(folder / "0.jpg", tmp_path / "PICTURE.jpg")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub_cache)}

    def run(words: list[str]) -> str:
        command = [sys.executable, *words[1:]]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), **offline},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    small = ("--config.batch_size=32", "--config.data.image_size=64")
    printed = run([*front_page("--workdir=runs/mine"), *small])
    assert "on 8 images" in printed.splitlines()[-1]
    assert "the head for 2 is randomly initialised" in printed
    assert re.search(
        r"PICTURE\.jpg.*(cat|dog)", run(front_page("runs/mine")), re.DOTALL
    )


def test_the_front_page_requests_a_tpu():
    script, *flags = front_page("launch/tpu_vm.sh")
    done = subprocess.run(
        [ROOT / script, "--dry_run", *flags], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--accelerator-type=v4-32" in done.stdout + done.stderr


def files_of_an_image() -> list[str]:
    """Returns the files that an image goes through, below resnet_jax/, in order."""
    drawings = pages.fences("docs/architecture.md", "mermaid")
    (text,) = [x.text for x in drawings if "data/sources.py" in x.text]
    return re.findall(r"\w+/[\w/]+\.py", text)


def imports_of(path: pathlib.Path) -> set[pathlib.Path]:
    """Returns the modules of the package that a module imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{x.name}" for x in node.names)}
    paths = {ROOT / f"{name.replace('.', '/')}.py" for name in names}
    return {path for path in paths if path.exists()}


def test_an_image_goes_through_at_most_fifteen_files_once_each():
    files = files_of_an_image()
    assert 10 <= len(files) <= 15
    assert len(set(files)) == len(files)


def test_the_loop_imports_every_file_that_an_image_goes_through():
    found, new = set(), {ROOT / "resnet_jax/training/loop.py"}
    while new:
        found |= new
        new = set().union(*map(imports_of, new)) - found
    missing = {ROOT / "resnet_jax" / name for name in files_of_an_image()} - found
    assert not missing
