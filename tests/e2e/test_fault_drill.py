"""A run with many faults ends as a run without one."""

import secrets

import pytest

from tests import fault_drill


@pytest.mark.long
def test_a_run_with_twenty_faults_ends_with_the_same_bits(tmp_path):
    # The order differs each time. A failure prints the command that repeats it.
    done = fault_drill.drill(tmp_path, faults=20, seed=secrets.randbelow(10**6))
    assert len(done) == 20


@pytest.mark.long
def test_a_run_of_two_processes_with_three_faults_ends_with_the_same_bits(tmp_path):
    seed = secrets.randbelow(10**6)
    assert len(fault_drill.drill(tmp_path, faults=3, seed=seed, processes=2)) == 3
