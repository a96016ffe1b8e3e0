"""The Markdown pages are true: their commands, examples, tables, paths and links."""

import ast
import contextlib
import csv
import doctest
import importlib
import itertools
import json
import os
import pathlib
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl import flags
from ml_collections import ConfigDict

import resnet_jax
from resnet_jax import cli, main
from resnet_jax.config import RECIPES, load, override, recipes
from resnet_jax.config.saved import flatten
from resnet_jax.console.arguments import Parser, load_config
from resnet_jax.data.csv_source import read_rows
from resnet_jax.data.sources import KINDS, open_source
from resnet_jax.errors import UserError
from resnet_jax.models import ZOO, get_spec
from resnet_jax.training.experiment import set_up
from resnet_jax.weights import SCHEMES
from resnet_jax.weights.naming import to_foreign
from resnet_jax.weights.save import save
from tests.helpers import example_folder, keyed, pages, small_networks
from tests.helpers import words as english
from tests.helpers.golden_configs import CONFIGS
from tests.helpers.packaging_files import PROJECT
from tests.helpers.pictures import encode, noise
from tests.helpers.runs import ROOT
from tests.helpers.timm_config import CONFIG

PAGES = [pytest.param(page, id=page) for page in pages.PAGES]
# What CHANGELOG.md names is of its version, and may be gone.
CURRENT = [x for x in pages.PAGES if x != "CHANGELOG.md"]
# tests/test_contributing.py runs those of CONTRIBUTING.md.
COMMANDS = [
    (page, command)
    for page in pages.PAGES
    if page != "CONTRIBUTING.md"
    for command in pages.commands(page)
]
IN_SENTENCES = [
    (page, shlex.split(word))
    for page in CURRENT
    for word in pages.code_words(page)
    if re.match("(python -m|resnet-jax|make|pip install|pytest) ", word)
]
# The functions that modules run with a command line, where it is not `main`.
ENTRIES = {"resnet_jax.prepare": "run"}
LANGUAGES = {"csv", "bash", "text", "python", "pycon", "yaml", "diff", "mermaid"}


def parts(command: list[str]) -> tuple[str, list[str]]:
    """Returns the program that a command runs, and its arguments.

    The program is the name of a module if that is in the package. What starts
    processes, such as mpirun, is left out.
    """
    words = [*itertools.dropwhile(re.compile("[A-Z_0-9]+=").match, command)]
    if words[0] == "resnet-jax" and words[1] in cli.COMMANDS:
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
    return words[0], words[1:]


def parameters(commands: list, of_package: bool) -> list:
    """Returns the commands that run the package, or the others, for pytest."""
    return [
        pytest.param(page, program, arguments, id=f"{page}: {shlex.join(command)}")
        for page, command in commands
        for program, arguments in [parts(command)]
        if program.startswith("resnet_jax") == of_package
    ]


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> str:
    """Returns a weights directory of a small network."""
    card, variables = small_networks.card_and_variables("test_resnet")
    folder = tmp_path_factory.mktemp("weights") / "small"
    save(str(folder), variables, card)
    return str(folder)


class Parsed(Exception):
    """Ends a command as soon as its command line is parsed."""


@pytest.fixture
def config_of(monkeypatch, tmp_path):
    """Returns a function that parses a command line, and returns the config in it.

    It raises UserError as the command itself would. The command does not run.
    """
    parse = Parser.parse

    def stop(self, arguments):
        raise Parsed(parse(self, arguments))

    monkeypatch.setattr(Parser, "parse", stop)
    # Not everybody may write to /shared.
    monkeypatch.setattr(main, "check_folder_to_write", lambda _: None)
    # Files that commands of pages read, or write beside.
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "input.json").symlink_to(ROOT / "docs" / "measurements" / "input.json")
    monkeypatch.chdir(tmp_path)

    def config_of(module: str, arguments: list[str]) -> ConfigDict | None:
        if module == "resnet_jax.main":
            flags.FLAGS.unparse_flags()
            parsed = main.parse([module, *arguments])
            if parsed.config:
                return parsed.config
            # --mode=eval takes the config of a run.
            config = load("configs/quickstart.py")
            override(config, parsed.overrides)
            return config
        command = importlib.import_module(module)
        if hasattr(command, "__path__"):
            command = importlib.import_module(f"{module}.__main__")
        with pytest.raises(Parsed) as stopped:
            getattr(command, ENTRIES.get(module, "main"))([module, *arguments])
        args = stopped.value.args[0]
        return load_config(args) if getattr(args, "config", None) else None

    return config_of


def check(config: ConfigDict, weights: str) -> None:
    """Raises UserError if the keys of a config contradict each other.

    `weights` stand for those whose card a config asks for.
    """
    if config.init_from:
        config.init_from = weights
    for source in (config.data.source, config.data.eval_source):
        assert source.partition(":")[0] in {"", *KINDS}, source
    config.evaluate.sets = ()
    # An empty one is chosen by the data, which are not there.
    config.data.eval_split = config.data.eval_split or "validation"
    train, eval = (open_source("fake:1000:1000000", x) for x in ("train", "validation"))
    set_up(config, train=train, eval=eval)


@pytest.mark.parametrize(
    ("page", "module", "arguments"), parameters(COMMANDS, of_package=True)
)
def test_every_command_that_a_page_gives_is_legal(
    page, module, arguments, config_of, weights, capsys
):
    for own in re.findall(r"--config=(\w+\.py)", " ".join(arguments)):
        examples = [x.text for x in pages.fences(page, "python")]
        (text,) = [x for x in examples if "def get_config" in x]
        pathlib.Path(own).write_text(text)
    if config := config_of(module, arguments):
        check(config, weights)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("page", "module", "arguments"), parameters(IN_SENTENCES, of_package=True)
)
def test_every_command_in_a_sentence_lacks_at_most_required_arguments(
    page, module, arguments, config_of
):
    try:
        config_of(module, [x for x in arguments if x != "--help"])
    except UserError as error:
        assert "required" in str(error)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=" ".join(words))
        for _, command in COMMANDS
        if "--" in (words := [x for x in command if x not in ("python", "bash")])
    ],
)
def test_every_launcher_accepts_the_flags_that_a_page_gives(words):
    script, *arguments = words
    for flag in itertools.takewhile(lambda x: x != "--", arguments):
        # launch/tpu_vm.sh passes those on that it does not know.
        name = flag.partition("=")[0]
        assert re.search(rf"{name}(?![\w-])", (ROOT / script).read_text()), flag
    python = [sys.executable] if script.endswith(".py") else []
    done = subprocess.run(
        [*python, script, "--dry_run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def files_in(words: list[str]) -> str:
    """Returns the texts of the files that words name; a word may be PATH::TEST."""
    paths = [ROOT / word.partition("::")[0] for word in words]
    return "\n".join(path.read_text() for path in paths if path.is_file())


@pytest.mark.parametrize(
    ("page", "program", "arguments"),
    parameters([*COMMANDS, *IN_SENTENCES], of_package=False),
)
def test_every_other_program_that_a_page_runs_is_there(page, program, arguments):
    match program:
        case "git" | "cd" | "export":
            pass
        case "resnet-jax":
            assert arguments[0] in ("--help", "--version")
        case "make":
            for target in arguments:
                assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target
        case "pip":
            assert arguments[0] == "install"
            for word in arguments[1:]:
                for extra in re.findall(r"[\w-]+", word.partition("[")[2]):
                    assert extra in PROJECT["project"]["optional-dependencies"], extra
                assert not word.endswith(".txt") or (ROOT / word).exists(), word
        case "pytest":
            for before, word in itertools.pairwise(["", *arguments]):
                if before in ("-k", "-m"):
                    assert word in files_in(arguments), word
                else:
                    assert word[0] == "-" or files_in([word]), word
        case "python" if arguments[0] == "-m":
            text = (ROOT / f"{arguments[1].replace('.', '/')}.py").read_text()
            for flag in re.findall(r"--\w+", " ".join(arguments)):
                assert f'"{flag}"' in text, flag
        case "docker":
            for file in re.findall(r"-f (\S+)", " ".join(arguments)):
                assert (ROOT / file).exists(), file
        case "sky":
            for name in re.findall(r"(\w+)=", " ".join(arguments)):
                assert f"\n  {name}: " in files_in(arguments), name
        case _:
            pytest.fail(f"{page}: no test knows the program {program}.")


def test_the_table_of_a_page_is_one_that_a_run_reads(tmp_path):
    (fence,) = (fence for page in pages.PAGES for fence in pages.fences(page, "csv"))
    (tmp_path / "table.csv").write_text(fence.text)
    rows = read_rows(tmp_path / "table.csv")
    assert [row.label for row in rows] == ["cat", "dog", "cat"]
    assert [row.split for row in rows] == ["train", "train", "val"]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_code_is_in_a_language_that_a_test_reads(page):
    for fence in pages.fences(page):
        assert fence.language in LANGUAGES, fence.text
        assert not fence.text.startswith("$ "), "A reader copies the prompt."


def test_output_is_generated_or_compared_by_another_test():
    generated = re.compile(r"\[\[\[cog.*?\[\[\[end\]\]\]", re.DOTALL)
    typed = [
        page
        for page, path in pages.PAGES.items()
        for text in re.findall(
            "```text\n(.*?)```", generated.sub("", path.read_text()), re.DOTALL
        )
        # Drawings of folders are text, too.
        if "\N{BOX DRAWINGS LIGHT HORIZONTAL}" not in text
    ]
    # tests/e2e/test_first_run.py compares these two.
    assert typed == ["README.md", "docs/getting_started.md"]


@pytest.mark.parametrize(
    "page",
    [
        # Counting the MACs of 202 networks takes half a minute.
        pytest.param(x, marks=[pytest.mark.slow] * (x == "docs/networks.md"))
        for x in pages.PAGES
        if "[[[cog" in pages.PAGES[x].read_text()
    ],
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
SOURCES = "\n".join(
    path.read_text()
    for pattern in ("resnet_jax/**/*.py", "launch/**/*.*")
    for path in sorted(ROOT.glob(pattern))
)
PATH = re.compile(r"[\w./-]+(\.(py|md|sh|cc|toml)|/)|[\w.-]+/[\w./-]+\.[a-z]\w*")


@pytest.mark.parametrize("page", CURRENT)
def test_every_path_that_a_page_names_is_there(page):
    drawings = "".join(x.text for x in pages.fences(page, "mermaid"))
    drawn = re.findall(r"[\w/]+\.py", drawings.replace("/<br/>", "/"))
    for name in [*pages.code_words(page), *drawn]:
        # Words in capitals are the reader's.
        is_example = name in MADE_BY_A_RUN or re.search("[A-Z]{4}", name)
        if PATH.fullmatch(name) and not (is_example and "README" not in name):
            beside = pages.PAGES[page].parent
            places = (ROOT, ROOT / "resnet_jax", ROOT / "launch", beside)
            assert any((place / name).exists() for place in places), name


@pytest.mark.parametrize("page", CURRENT)
def test_every_key_that_a_page_names_is_in_the_config(page):
    known = flatten(load(RECIPES / "quickstart.py")).keys()
    sections = {key.partition(".")[0] for key in known if "." in key}
    for word in pages.code_words(page):
        key = re.match(r"(?:--config\.)?([a-z_]+(?:\.[a-z_0-9]+)+)(?![\w/(])", word)
        if key and key[1].partition(".")[0] in sections and not word.endswith(".py"):
            unit = r"\.(epochs|steps|examples|percent)$|(?<=overrides)\.\w+$"
            name = re.sub(unit, "", key[1])
            assert name in known or any(x.startswith(f"{name}.") for x in known), word


@pytest.mark.parametrize("page", CURRENT)
def test_every_value_that_a_sentence_gives_is_legal(page):
    for word in pages.code_words(page):
        if re.match(r"--config\.[a-z_.0-9]+=.|--noconfig\.", word):
            override(load(RECIPES / "quickstart.py"), shlex.split(word))


@pytest.mark.parametrize("page", CURRENT)
def test_every_flag_that_a_sentence_names_is_there(page):
    for word in pages.code_words(page):
        if flag := re.match(r"--(?!config\.|noconfig\.|xla_)([\w-]+)", word):
            assert re.search(rf"(--|\"){flag[1]}(?![\w-])", SOURCES), word


@pytest.mark.parametrize("page", CURRENT)
def test_every_name_of_the_package_that_a_page_gives_is_there(page):
    text = pages.PAGES[page].read_text()
    for name in re.findall(r"(?:^::: |`)(resnet_jax[\w.]+)", text, re.M):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_command_in_a_recipe_is_legal(path, config_of, weights):
    for line in re.findall(r"^python -m .*(?:(?<=\\)\n.*)*", path.read_text(), re.M):
        module, arguments = parts(shlex.split(line.replace("\\\n", " ")))
        if config := config_of(module, arguments):
            check(config, weights)


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
    # What looks like a link to a name that the page does not define.
    assert not [x for x in pages.sentences(page) if "][" in x]


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
    assert f"Of {len(published)} variants, {named} cite a published result" in text
    file = ROOT / "docs" / "measurements" / "step_resnet50.json"
    (table,) = json.loads(file.read_text())
    assert f"{table['rows'][0]['ratio']:.1f} times as fast as with Flax's" in text
    versions = table["versions"]
    assert f"jax {versions['jax']} and torch {versions['torch']}" in text


def test_the_front_page_gives_the_accuracy_of_the_first_run():
    ((*_, reached),) = recipes.table(["quickstart.py"])
    text = pages.PAGES["README.md"].read_text()
    assert f"top-1 {reached} %" in text
    assert f"| {reached} % |" in text


@pytest.fixture
def hub_cache(tmp_path):
    """Returns a cache of the hub with random weights of timm's ResNet-50."""
    repository = tmp_path / "hub" / "models--timm--resnet50.a1_in1k"
    snapshot = repository / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    spec = get_spec("resnet50")
    tensors = to_foreign(keyed.variables(spec), spec, SCHEMES["timm"])
    tensors = {name: np.array(x, order="C") for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, snapshot / "model.safetensors")
    config = CONFIG | {"architecture": "resnet50"}
    (snapshot / "config.json").write_text(json.dumps(config))
    return tmp_path / "hub"


@pytest.mark.slow
def test_the_front_page_trains_evaluates_and_classifies_pictures(tmp_path, hub_cache):
    for name, amount in (("PHOTOS", 20), ("NEW", 1)):
        for kind in ("cat", "dog"):
            folder = tmp_path / name / kind
            folder.mkdir(parents=True)
            for index in range(amount):
                picture = encode(noise(index, 48, 40), "JPEG")
                (folder / f"{index}.jpg").write_bytes(picture)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub_cache)}
    # Programs are optimized, unlike those of the tests.
    environment = pages.ENVIRONMENT | offline | {"XLA_FLAGS": ""}

    def run(words: list[str]) -> str:
        command = [sys.executable, *words[1:]]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    small = ("data.image_size=64", "total.steps=4")
    train, evaluate, predict = (
        words for words in pages.commands("README.md") if "runs/mine" in str(words)
    )
    printed = run([*train, *(f"--config.{change}" for change in small)])
    assert "held out" in printed
    assert "on 8 images" in printed.splitlines()[-1]
    assert "the head for 2 is randomly initialised" in printed
    assert "95 % interval" in run(evaluate)
    result = json.loads((tmp_path / "runs" / "mine" / "result.json").read_text())
    document = json.loads((tmp_path / "figures" / "evaluation.json").read_text())
    assert document["results"][0]["n_seen"] == result["n_seen"] == 8
    assert document["results"][0]["top1"] == result["best"]["top1"]
    rows = list(csv.DictReader(run(predict).splitlines()))
    assert [row["path"] for row in rows] == ["NEW/cat/0.jpg", "NEW/dog/0.jpg"]
    assert {row["top1_name"] for row in rows} <= {"cat", "dog"}


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
