"""The files of the package, its requirements, and the commands that install it."""

import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import yaml
from packaging.requirements import Requirement

from resnet_jax import __version__
from tests.helpers import runs
from tests.helpers.packaging_files import PROJECT, needed_to_install, tracked

CONSTRAINTS = sorted((runs.ROOT / "tests/constraints").glob("*.txt"))
EXTRAS = PROJECT["project"]["optional-dependencies"]


def canonical(name: str) -> str:
    """Returns the normal form of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(lines: list[str]) -> list[Requirement]:
    """Parses lines of requirements, and resolves the project's own extras."""
    found = []
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if canonical(requirement.name) == "resnet-jax":
            for extra in sorted(requirement.extras):
                found += requirements(EXTRAS[extra])
        elif not requirement.marker or requirement.marker.evaluate():
            found.append(requirement)
    return found


def texts() -> list[tuple[str, str]]:
    """Returns the name and the text of each file, with white space as one space."""
    return [
        (str(path.relative_to(runs.ROOT)), " ".join(path.read_text().split()))
        for path in tracked()
        if path.suffix not in (".xz", ".png")
    ]


# The package index has another project of this name, which these commands install.
INSTALLS_A_STRANGER = re.compile(
    r"\b(?:install|add|pipx|uvx)\s(?:[^`|&;()\n]{0,60}?[\s'\"])?resnet[-_.]jax(?![-_./\w])",
    re.IGNORECASE,
)


def test_no_command_installs_the_other_project_of_this_name():
    name = "resnet-jax"
    for line in (
        f"pip install {name}",
        f"pip install -q '{name}[gpu]'",
        f"uv pip install --python=x -U {name.replace('-', '_')}[tpu]",
        f"uv add {name}",
    ):
        assert INSTALLS_A_STRANGER.search(line), line
    for line in (f"pip install -e '.[cloud]' in {name}/", f"pip install x/{name}.whl"):
        assert not INSTALLS_A_STRANGER.search(line), line
    wrong = {
        file: found[0]
        for file, text in texts()
        if (found := INSTALLS_A_STRANGER.search(text))
    }
    assert not wrong


def test_every_requirements_file_that_a_text_names_exists():
    wrong = {
        (file, name)
        for file, text in texts()
        for name in re.findall(r"\brequirements[-\w]*\.txt", text)
        # The changelog also names files that were removed.
        if file != "CHANGELOG.md" and not (runs.ROOT / name).exists()
    }
    assert not wrong


def test_the_citation_and_the_changelog_name_this_version():
    citation = yaml.safe_load((runs.ROOT / "CITATION.cff").read_text())
    project = PROJECT["project"]
    assert citation["title"] == project["name"]
    assert citation["authors"] == project["authors"]
    assert citation["license"] == project["license"]
    assert citation["version"] == __version__
    changelog = (runs.ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## \[?(\d[\w.]*)\]? - (\S+)$", changelog, re.MULTILINE)
    assert newest.groups() == (__version__, str(citation["date-released"]))


def test_the_page_on_architecture_draws_the_layers_that_make_lint_checks():
    page = (runs.ROOT / "docs" / "architecture.md").read_text()
    drawing = page.partition("## Layers")[2].split("```")[1]
    contract = PROJECT["tool"]["importlinter"]["contracts"][0]
    layers = re.findall(r"\w+", " ".join(contract["layers"]))
    drawn = dict.fromkeys(re.findall(r"\w+", drawing))
    assert [name for name in drawn if name in layers] == layers


def test_pyproject_lists_every_folder_of_code():
    package = runs.ROOT / "resnet_jax"
    folders = {path.parent for path in package.rglob("*.py")}
    names = {".".join(path.relative_to(runs.ROOT).parts) for path in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == {
        *names,
        "resnet_jax.configs",
    }


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_the_constraints_pin_every_requirement_of_tests_and_docs(path):
    lines = [line for line in path.read_text().splitlines() if line[0] != "#"]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)
    needed = (runs.ROOT / "requirements.txt").read_text().splitlines()
    for requirement in requirements([*needed, *EXTRAS["oracles"], *EXTRAS["docs"]]):
        version = pins.get(canonical(requirement.name), "0")
        assert requirement.specifier.contains(version), requirement


def test_plan_accepts_the_libtpu_of_jax():
    (requirement,) = map(Requirement, EXTRAS["plan"])
    assert requirement.name == "libtpu"
    assert not requirement.specifier


BUILD = """
import sys
from setuptools import build_meta
getattr(build_meta, f"build_{sys.argv[1]}")(sys.argv[2])
"""


def build(kind: str, source: pathlib.Path, place: pathlib.Path) -> pathlib.Path:
    """Builds a wheel or an sdist without a network; returns the file."""
    place.mkdir()
    command = [sys.executable, "-c", BUILD, kind, str(place)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = place.iterdir()
    return built


def contents(wheel: pathlib.Path) -> dict[str, bytes]:
    """Returns the contents of a wheel's files by their names."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_the_wheel_has_all_code_and_data_and_the_sdist_builds_the_same_wheel(tmp_path):
    pytest.importorskip("setuptools", minversion="77.0.3")
    source = tmp_path / "source"
    source.mkdir()
    for name in needed_to_install():
        path = runs.ROOT / name
        if path.is_dir():
            hidden = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / name, ignore=hidden)
        else:
            shutil.copy(path, source)
    sdist = build("sdist", source, tmp_path / "sdist")
    found = contents(build("wheel", source, tmp_path / "wheel"))
    expected = set()
    for path in tracked():
        parts = path.relative_to(runs.ROOT).parts
        # The wheel has no READMEs, which are for readers of the repository.
        if path.suffix != ".md" and parts[0] in ("resnet_jax", "configs"):
            parts = ("resnet_jax", *parts) if parts[0] == "configs" else parts
            expected.add("/".join(parts))
    (information,) = {name.partition("/")[0] for name in found if ".dist-info/" in name}
    assert {name for name in found if not name.startswith(information)} == expected
    metadata = found[f"{information}/METADATA"].decode()
    wanted = (runs.ROOT / "requirements.txt").read_text().splitlines()
    listed = [Requirement(x) for x in re.findall(r"Requires-Dist: (.*)", metadata)]
    assert {str(Requirement(x)) for x in wanted if x[0] != "#"} <= set(map(str, listed))
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = contents(build("wheel", unpacked, tmp_path / "again"))
    assert again == found
