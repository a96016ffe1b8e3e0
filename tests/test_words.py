"""The English of the whole checkout, as far as a program can check it."""

import pytest

from tests.helpers import words
from tests.helpers.runs import ROOT

FILES = [
    path
    for folder in ("resnet_jax", "configs", "launch", "tests")
    for path in words.files(str(ROOT / folder))
]


def test_docstrings_comments_and_parameters_follow_the_rules():
    assert [problem for path in FILES for problem in words.problems(path)] == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Of this process.", "begins with 'Of'"),
        ("Whether it is so.", "begins with 'Whether'"),
        ("Reads.\n\nArgs:\n  x: of the run.", "the entry of x begins with 'of'"),
        ("Reads.\n\nArgs:\n  x: an array.", "the entry of x begins with a small"),
        ("Reads.\n\nThe run goes on from there.", "the wording 'goes on from'"),
    ],
)
def test_a_docstring_that_breaks_a_rule_is_found(text, problem):
    assert problem in "\n".join(words.problems_of_docstring(text))


def test_a_parameter_that_is_no_noun_is_found(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("def read(where):\n    return where\n")
    assert "the parameter 'where'" in "\n".join(words.problems(path))
