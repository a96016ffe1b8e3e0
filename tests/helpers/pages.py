"""Reads the Markdown pages, and writes the parts that commands generate.

`python -m tests.helpers.pages [PAGE ...]` runs the commands of the given pages, or of
all pages, and writes what they print into the pages. A generated part stands between
two comments, which Cog finds:

    <!-- [[[cog table("python -m resnet_jax.recipes 'r50*' --markdown") ]]] -->
    <!-- [[[end]]] -->
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import cogapp
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.helpers.runs import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path
    for pattern in ("*.md", "docs/*.md", "*/README.md", "resnet_jax/*/README.md")
    for path in sorted(ROOT.glob(pattern))
    if not path.relative_to(ROOT).parts[0].startswith(".")
}
# The parts that `shell` writes.
SHELL = re.compile(r"<!-- \[\[\[cog shell\(.*?\[\[\[end\]\]\] -->", re.DOTALL)
# A reader's CPU is one device; the process of the tests has eight.
ENVIRONMENT = {
    **{"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
    **{"COLUMNS": "88", "PYTHONPATH": str(ROOT)},
}


@dataclasses.dataclass(frozen=True)
class Fence:
    """A block of code.

    Attributes:
      language: The word after the opening fence, such as `bash`.
      text: The lines between the fences.
    """

    language: str
    text: str


@functools.cache
def parse(page: str) -> list[Token]:
    """Parses a page as GitHub does, without the commands that Cog runs for it."""
    markdown = SHELL.sub("", PAGES[page].read_text())
    return MarkdownIt("commonmark").enable("table").parse(markdown)


def fences(page: str, *languages: str) -> list[Fence]:
    """Returns the blocks of code of a page that are in some languages, in order."""
    found = [
        Fence(token.info.strip(), token.content)
        for token in parse(page)
        if token.type in ("fence", "code_block")
    ]
    return [x for x in found if x.language in languages] if languages else found


def commands(page: str) -> Iterator[list[str]]:
    """Yields the commands of a page's bash fences as lists of words."""
    for fence in fences(page, "bash"):
        lines = re.sub(r"\\\n\s*", "", fence.text).splitlines()
        yield from (words for line in lines if (words := shlex.split(line, True)))


def code_words(page: str) -> Iterator[str]:
    """Yields the texts in backticks."""
    for token in parse(page):
        for child in token.children or ():
            if child.type == "code_inline":
                yield child.content


def links(page: str) -> Iterator[str]:
    """Yields the targets of links and pictures."""
    for token in parse(page):
        for child in token.children or ():
            if target := child.attrGet("href") or child.attrGet("src"):
                yield str(target)


def anchors(page: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and the site make them."""
    tokens = parse(page)
    headings = [
        after.content
        for token, after in itertools.pairwise(tokens)
        if token.type == "heading_open"
    ]
    return {
        re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())
        for heading in headings
    }


def sentences(page: str) -> Iterator[str]:
    """Yields the sentences of paragraphs, lists, headings and cells of tables.

    Code in backticks counts as one word.
    """
    for token in parse(page):
        if token.type == "inline":
            parts = [
                "CODE" if child.type == "code_inline" else child.content or " "
                for child in token.children or ()
                if child.type != "html_inline"
            ]
            yield from re.split(r"(?<=[.!?])\s+", "".join(parts).strip())


def shell(command: str) -> None:
    """Writes a command and what it prints into the page that Cog reads."""
    _out(f"```bash\n{command}\n```\n\n```text\n{_run(command)}\n```")


def table(command: str) -> None:
    """Writes the Markdown that a command prints into the page that Cog reads."""
    _out(_run(command, stderr=subprocess.DEVNULL, check=True))


def _run(command: str, stderr: int = subprocess.STDOUT, check: bool = False) -> str:
    program, *rest = shlex.split(command)
    entry = ["-c", "from resnet_jax import cli; cli.main()"]
    first = {"python": [], "resnet-jax": entry}[program]
    words = [sys.executable, *first, *rest]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        check=check,
    )
    return done.stdout.strip()


def _out(text: str) -> None:
    # Cog gives this module to the code that it runs.
    import cog

    cog.outl(text)


def cog(page: str, *options: str) -> int:
    """Runs Cog on a page; returns its exit code, which is 0 for success.

    Args:
      page: The name of the page.
      *options: `-r` writes the page, and `--check` and `--diff` compare it.
    """
    prologue = "from tests.helpers.pages import shell, table"
    words = ["cog", "-p", prologue, *options, str(PAGES[page])]
    return cogapp.Cog().main(words)


if __name__ == "__main__":
    names = [os.path.relpath(pathlib.Path(x).resolve(), ROOT) for x in sys.argv[1:]]
    sys.exit(max(cog(page, "-r") for page in names or PAGES))
