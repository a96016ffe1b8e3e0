"""Hostile files of weights are refused in a sentence, without taking much memory."""

import json
import re
import subprocess
import sys

import pytest

from tests.helpers import hostile_weights


@pytest.mark.slow
# Some archives have two files of one name.
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_hostile_files_are_refused_in_a_sentence_without_taking_much_memory(tmp_path):
    hostile_weights.write_all(tmp_path)
    module = hostile_weights.__name__
    process = subprocess.run(
        [sys.executable, "-m", module, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    )
    results = [json.loads(line) for line in process.stdout.splitlines()]
    assert [name for name, *_ in results] == list(hostile_weights.CASES)
    assert len(results) >= 40
    wrong = []
    for name, kind, message, growth in results:
        case = hostile_weights.CASES[name]
        if (
            kind != "UserError"
            or not re.search(case.pattern, message)
            or f"/{name}/" not in message
            or "\n" in message
            or message[-1] not in ".?"
            or growth > hostile_weights.GROWTH
        ):
            wrong.append((name, kind, message, growth))
    assert not wrong
