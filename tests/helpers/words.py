"""Checks the English of docstrings, comments and parameter names.

`python -m tests.helpers.words resnet_jax/models` lists what breaks the rules there.
"""

import ast
import io
import pathlib
import re
import sys
import tokenize
from collections.abc import Iterator

# A docstring or an entry of its sections never begins with one of these.
FIRST_WORDS = {
    *("As", "Around", "At", "Behind", "By", "For", "From", "How", "If", "In", "Into"),
    *("Of", "On", "That", "Those", "To", "What", "Where", "Whether", "Which", "Who"),
    *("Whose", "With"),
}
# Nouns name parameters; these words say nothing of what they hold.
PARAMETERS = {"of", "where", "one", "other", "found", "told", "theirs", "them"}
# Wordings that readers stumble over, in docstrings and comments.
PHRASES = (
    r"\banew\b",
    r"\bmend(s|ed)?\b",
    r"\bgo(es|ing)? on from\b",
    r"\bpassed over\b",
    r"\bheld against\b",
    r"\bunwritten\b",
    r"\bkeep-momentum\b",
    r"\bcontenders?\b",
    r"\bis no [a-z]+[.,;]",
    r"^Else\b",
    r"\. Else\b",
    r"\bbehind (it|them|that|this|these|each|one)\b",
)
SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:", "Yields:")


def problems(path: pathlib.Path) -> Iterator[str]:
    """Yields a line for each place of a Python file that breaks a rule."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            arguments = node.args
            names = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
            for name in names:
                if name.arg in PARAMETERS:
                    yield f"{path}:{node.lineno}: the parameter {name.arg!r} is no noun"
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and (docstring := ast.get_docstring(node)):
            line = node.body[0].lineno
            for problem in problems_of_docstring(docstring):
                yield f"{path}:{line}: {problem}"
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            for problem in problems_of_sentences(token.string.lstrip("# ")):
                yield f"{path}:{token.start[0]}: {problem}"


def problems_of_docstring(docstring: str) -> Iterator[str]:
    """Yields what breaks a rule in a docstring in Google's style."""
    yield from problems_of_start(docstring)
    yield from problems_of_sentences(docstring)
    lines = docstring.splitlines()
    indentation = None
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if line in SECTIONS:
            section = line
            indentation = len(after) - len(after.lstrip())
        elif line and not line.startswith(" "):
            indentation = None
        elif indentation and len(line) - len(line.lstrip()) == indentation:
            name, colon, entry = line.strip().partition(": ")
            if section in ("Returns:", "Yields:") or not colon:
                continue
            yield from problems_of_start(entry, f"the entry of {name}")
            if entry[:1].islower():
                yield f"the entry of {name} begins with a small letter: {entry!r}"


def problems_of_start(text: str, what: str = "the docstring") -> Iterator[str]:
    """Yields a problem where a text begins with a word that it must not."""
    first = re.split(r"\W", text, maxsplit=1)[0]
    if first in FIRST_WORDS or first.capitalize() in FIRST_WORDS:
        yield f"{what} begins with {first!r}: {text.splitlines()[0]!r}"


def problems_of_sentences(text: str) -> Iterator[str]:
    """Yields the phrases of a text that are not the project's English."""
    for phrase in PHRASES:
        if match := re.search(phrase, text, re.MULTILINE):
            yield f"the wording {match[0]!r}"


def files(*folders: str) -> Iterator[pathlib.Path]:
    """Yields the Python files of folders, or the files themselves."""
    for folder in map(pathlib.Path, folders):
        yield from sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]


if __name__ == "__main__":
    lines = [line for path in files(*sys.argv[1:]) for line in problems(path)]
    print(*lines, sep="\n")
    sys.exit(f"{len(lines)} problems" if lines else 0)
