"""Hostile files of torch are refused in a sentence, without taking much memory."""

from tests.helpers import hostile_torch_files, hostile_weights


def test_hostile_files_are_refused_in_a_sentence_without_taking_much_memory(tmp_path):
    cases, module = hostile_torch_files.CASES, hostile_torch_files.__name__
    assert not hostile_weights.problems(cases, module, tmp_path)
