"""The table of config keys that `python -m resnet_jax.keys` prints.

The meanings are the comments of `resnet_jax/config/defaults.py`, whose `get_config`
says how they are written. The ranges are those of `resnet_jax/config/values.py`.
"""

import ast
import functools
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterable, Sequence
from typing import Any

from ml_collections import ConfigDict

from resnet_jax.config import defaults, values
from resnet_jax.errors import matching

COLUMNS = ("key", "type", "default", "meaning", "only with")
# Types that the default does not show.
TYPES = {
    **dict.fromkeys(values.DURATIONS, "duration"),
    **dict.fromkeys(
        ("total", *values.OPTIONAL_DURATIONS), "duration or empty dictionary"
    ),
    "optim.decay_at": "tuple of durations",
    "evaluate.sets": "tuple of texts",
    "stop.target": "dictionary of numbers",
    "model.bn_group_size": "text or whole number",
    "model.fused_norm": "True, False or text",
    "compiler_options": "dictionary or text",
}
# The first type of which a default is an instance is its own.
TYPES_OF_DEFAULTS = (
    (bool, "True or False"),
    (int, "whole number"),
    (float, "number"),
    (str, "text"),
    (ConfigDict, "dictionary"),
)
# The width of a terminal.
WIDTH = 88


@functools.cache
def comments() -> dict[str, str]:
    """Returns the comment of each key of the defaults, as one line, in their order.

    It is the comment above the statement that sets the key, or at the end of its line.
    """
    source = inspect.getsource(defaults)
    texts, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            texts[line] = token.string.removeprefix("#").strip()
            if token.line.strip() == token.string:
                alone.add(line)
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = range(first, (node.end_lineno or first) + 1)
            key = ast.unparse(node.targets[0]).removeprefix("config.")
            found[key] = " ".join(texts[line] for line in lines if line in texts)
    return found


def type_of(key: str) -> str:
    """Returns the type of a key's values with their range, as a phrase."""
    default = values.default_values()[key]
    allowed = values.RANGES.get(key)
    limits = "" if allowed in (None, values.ANY) else f"{allowed}"
    if isinstance(default, tuple) and default:
        length = f"{allowed.length} " if allowed and allowed.length else ""
        kind = f"tuple of {length}{_type_of_default(default[0])}s"
        return f"{kind}, each {limits}" if limits else kind
    kind = TYPES.get(key) or _type_of_default(default)
    return f"{kind}, {limits}" if limits else kind


def _type_of_default(default: Any) -> str:
    return next(name for kind, name in TYPES_OF_DEFAULTS if isinstance(default, kind))


def default_of(key: str) -> str:
    """Returns the default of a key as one writes it after `--config.KEY=`."""
    default = values.default_values()[key]
    if isinstance(default, ConfigDict):
        default = default.to_dict()
    text = str(default)
    return text if re.fullmatch(r"[-+.:/\w]+", text) else f'"{text}"'


def meaning_of(key: str) -> tuple[str, str]:
    """Returns the meaning of a key, and the names with which it has an effect.

    Examples:
      >>> meaning_of("optim.nesterov")
      ('Uses Nesterov momentum.', 'sgd or lars')
    """
    comment = comments()[key]
    name = r"[a-z_.\d]+"
    match = re.match(rf"({name}(?:(?:, | or | and ){name})*): ", comment)
    names, meaning = (match[1], comment[match.end() :]) if match else ("", comment)
    return f"{meaning[:1].upper()}{meaning[1:].removesuffix('.')}.", names


def row(key: str) -> tuple[str, ...]:
    """Returns the row of a key, a cell for each of `COLUMNS`."""
    return (key, type_of(key), default_of(key), *meaning_of(key))


def table(patterns: Iterable[str] = ("*",)) -> list[tuple[str, ...]]:
    """Returns the rows of the keys that match patterns, in their order.

    Args:
      patterns: Keys with wildcards, such as `optim.*`.

    Raises:
      UserError: A pattern matches no key; the message names the nearest keys.
    """
    known = [key for key in comments() if key in values.default_values()]
    return [row(key) for key in matching("key", patterns, known)]


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows in Markdown, as in docs/config.md."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for key, kind, default, meaning, names in rows:
        names = re.sub(r"\b(?!(?:or|and)\b)[\w.]+", r"`\g<0>`", names)
        lines.append((f"`{key}`", kind, f"`{default}`", meaning, names))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows for a terminal, which is too narrow for a table of sentences."""
    paragraphs = []
    for key, kind, default, meaning, names in rows:
        sentences = f"{meaning} Only with {names}." if names else meaning
        lines = textwrap.wrap(sentences, WIDTH - 4, break_on_hyphens=False)
        indented = textwrap.indent("\n".join(lines), "    ")
        paragraphs.append(f"{key}={default}  ({kind})\n{indented}")
    return "\n".join(paragraphs)
