"""Lists the files that an installation from the project's source code needs."""

import tomllib

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
