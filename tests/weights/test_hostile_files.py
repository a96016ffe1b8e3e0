"""Hostile files of weights are refused in a sentence, without taking much memory.

tests/oracles/test_hostile_files.py has those that only torch reads.
"""

import pytest

from tests.helpers import hostile_weights


@pytest.mark.slow
# Some archives have two files of one name.
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_hostile_files_are_refused_in_a_sentence_without_taking_much_memory(tmp_path):
    cases = hostile_weights.CASES
    assert len(cases) >= 40
    assert not hostile_weights.problems(cases, hostile_weights.__name__, tmp_path)
