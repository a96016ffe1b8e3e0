"""A killed run with a plateau schedule and precise batch norm resumes identically."""

import json
import signal

import pytest

from tests.helpers import runs

# With so few steps, evaluations soon stop to improve.
FLAGS = (
    *runs.SMALL,
    "--config.optim.schedule=plateau",
    "--config.optim.patience=0",
    "--config.optim.learning_rate=0.5",
    "--config.evaluate.every.steps=4",
    "--config.checkpoint.every.steps=8",
    "--config.precise_bn=2",
)


def rates(workdir) -> dict[int, float]:
    """Returns the logged learning rate of each step."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    key = "train/learning_rate"
    return {row["step"]: row[key] for row in rows if key in row}


@pytest.mark.long
def test_a_killed_run_on_a_plateau_ends_with_the_same_parameters(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    code, output = runs.run(undisturbed, *FLAGS)
    assert code == 0, output
    assert "precise batch norm over 2 batches" in output
    by_step = rates(undisturbed)
    # The rate was lowered at least once, and only directly after an evaluation.
    lowered = [s for s in range(6, 41) if by_step[s] < 0.5 * by_step[s - 1]]
    assert lowered
    assert all(step % 4 == 1 for step in lowered)
    for line in (f"step {lowered[0] + 5}/", "step 39/"):
        process = runs.start(killed, *FLAGS)
        code, output = runs.send_when(process, line, signal.SIGKILL)
        assert code == -signal.SIGKILL, output
    code, output = runs.run(killed, *FLAGS)
    assert code == 0, output
    runs.assert_same_end(killed, undisturbed)
    assert rates(killed) == by_step
