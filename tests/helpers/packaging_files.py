"""Lists the files of the repository, and those that an installation needs."""

import pathlib
import subprocess
import tomllib

import pytest

from tests.helpers import runs

PROJECT = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())


def needed_to_install() -> set[str]:
    """Returns the files and folders at the project's root without which pip fails."""
    project, tool = PROJECT["project"], PROJECT["tool"]["setuptools"]
    return {
        "pyproject.toml",
        project["readme"],
        *project["license-files"],
        *tool["dynamic"]["dependencies"]["file"],
        project["name"],
        *tool["package-dir"].values(),
    }


def tracked() -> list[pathlib.Path]:
    """Returns the files of the repository."""
    if not (runs.ROOT / ".git").exists():
        pytest.skip("this is not a clone of the repository")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(
        command, cwd=runs.ROOT, capture_output=True, text=True, check=True
    )
    paths = [runs.ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]
