"""README.md is true: its commands, paths, keys and examples exist and work."""

import importlib.util
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


def test_the_table_of_contents_of_an_image_is_the_order_of_the_files():
    names = re.search(r"An image goes.*?`losses\.py`", PAGES["README.md"], re.DOTALL)
    files = re.findall(r"`([\w/.]+\.py)`", names.group())
    assert len(files) == 8
    for name in files:
        path = name if name.startswith("resnet_jax/") else f"resnet_jax/{name}"
        assert (ROOT / path).exists(), name


@pytest.mark.long
def test_the_table_of_networks_is_what_the_command_prints():
    page = PAGES["README.md"]
    table = page.split("<!-- zoo -->\n\n")[1].split("\n\n<!-- end of zoo -->")[0]
    assert table == table_of_networks.as_markdown(table_of_networks.rows(ZOO))


def test_the_table_of_recipes_is_what_the_command_prints():
    text = (ROOT / "configs" / "README.md").read_text()
    assert recipes.as_markdown(recipes.table()) in text
