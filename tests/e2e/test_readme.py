"""README.md is true: its commands, paths, keys and examples exist and work."""

import ast
import importlib.util
import pathlib
import re

import pytest

from resnet_jax.config import recipes
from resnet_jax.config.saved import flatten
from resnet_jax.models import ZOO
from resnet_jax.models import table as table_of_networks
from tests.helpers.golden_configs import CONFIGS, load
from tests.helpers.runs import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "launch" / "README.md", *CONFIGS)
}


@pytest.mark.parametrize("page", PAGES)
def test_every_module_that_a_page_runs_is_there(page):
    for module in re.findall(r"python -m ([\w.]+)", PAGES[page]):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("page", PAGES)
def test_every_key_that_a_page_sets_is_in_the_config(page):
    known = flatten(load("quickstart")).keys()
    bases = {key.rpartition(".")[0] for key in known}
    for key in re.findall(r"--config\.([\w.]*\w)", PAGES[page]):
        is_duration = key.endswith((".epochs", ".steps", ".examples"))
        assert key in known or (is_duration and key.rpartition(".")[0] in bases), key


def test_every_path_that_the_readme_names_is_there():
    made_by_a_run = {
        "checkpoints/",
        "config.json",
        "metrics.jsonl",
        "tensorboard/",
        "result.json",
        "report.png",
    }
    for name in re.findall(r"`([\w./-]+(?:\.py|\.md|\.txt|/))`", PAGES["README.md"]):
        if name not in made_by_a_run:
            inside = ROOT / "resnet_jax" / name
            assert (ROOT / name).exists() or inside.exists(), name


def test_every_make_target_that_the_readme_names_is_there():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z-]+)", PAGES["README.md"].split("## A")[0]):
        if target not in ("a", "and"):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def files_of_an_image() -> list[str]:
    """Returns the files that an image goes through, below resnet_jax/, in order."""
    paragraph = re.search(r"An image goes through.*?\.\n\n", PAGES["README.md"], re.S)
    return re.findall(r"`([\w/.]+\.py)`", paragraph[0])


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


@pytest.mark.long
def test_the_table_of_networks_is_what_the_command_prints():
    page = PAGES["README.md"]
    table = page.split("<!-- zoo -->\n\n")[1].split("\n\n<!-- end of zoo -->")[0]
    assert table == table_of_networks.as_markdown(table_of_networks.rows(ZOO))


def test_the_table_of_recipes_is_what_the_command_prints():
    text = (ROOT / "configs" / "README.md").read_text()
    assert recipes.as_markdown(recipes.table()) in text
