"""The files of the project that an installation from its source code needs."""

import tomllib

from tests.helpers import runs

PROJECT = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())


def needed_to_install() -> set[str]:
    """Returns the names, at the root of the project, without which pip fails."""
    project, tool = PROJECT["project"], PROJECT["tool"]["setuptools"]
    return {
        "pyproject.toml",
        project["readme"],
        *project["license-files"],
        *tool["dynamic"]["dependencies"]["file"],
        project["name"],
        *tool["package-dir"].values(),
    }
