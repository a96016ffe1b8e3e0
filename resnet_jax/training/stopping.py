"""Ends a run early: at a target, or when evaluations do not improve any more.

Each evaluation updates a small memory, which is a dictionary in the checkpoint. Whether
a run ends follows from the memory and `config.stop` alone, so that a run that was
killed ends at the same step, and all processes of a run end together.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from resnet_jax.config import durations
from resnet_jax.errors import UserError
from resnet_jax.persistence.checkpoints import can_be_best

# Whether more is better, of each figure that `stop.target` may name (`values.TARGETS`).
FIGURES = {"top1": True, "top5": True, "loss": False}


def check(config: ConfigDict) -> None:
    """Checks the section `stop` of a config.

    Raises:
      UserError: The rules could never end the run, or would do so too early.
    """
    patience, target = config.stop.patience, config.stop.target
    if not (patience or target):
        return
    _, interval = durations.parse(config.evaluate.every, "evaluate.every")
    if not interval:
        key = f"stop.patience={patience}" if patience else "stop.target"
        raise UserError(
            f"{key} ends a run after an evaluation, but"
            f" evaluate.every={dict(config.evaluate.every)} evaluates only at the end;"
            " set evaluate.every, such as to {'epochs': 1}, or leave stop out."
        )
    optim = config.optim
    if patience and optim.schedule == "plateau" and patience <= optim.patience:
        raise UserError(
            f"stop.patience={patience} would end the run before optim.schedule=plateau"
            f" lowers the learning rate, which takes optim.patience={optim.patience};"
            " set a larger stop.patience or a smaller optim.patience."
        )


def after(
    memory: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any],
    *,
    step: int,
    seconds: float,
    best: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the memory after one more evaluation.

    It is the same for each `config.stop`, which may change when a run resumes.

    Args:
      memory: The memory so far, or None: `best`, the highest top-1 of an evaluation
        with a finite loss; `bad`, the number of evaluations since then; and `last`, the
        figures of the last evaluation with its `step` and `seconds`.
      evaluation: The figures of the evaluation.
      step: The number of updates so far.
      seconds: The time spent in training steps.
      best: The best evaluation so far, where an older version recorded no memory.
    """
    if memory is None:
        memory = {"best": -1.0, "bad": 0}
        if best and can_be_best(best):
            memory["best"] = best["top1"]
    figures = {name: evaluation[name] for name in FIGURES}
    last = {"step": step, "seconds": seconds, **figures}
    if can_be_best(evaluation) and evaluation["top1"] > memory["best"]:
        return {"best": evaluation["top1"], "bad": 0, "last": last}
    return {"best": memory["best"], "bad": memory["bad"] + 1, "last": last}


def has_seen(memory: Mapping[str, Any] | None, step: int) -> bool:
    """Returns whether the last evaluation of a memory was made at a step."""
    return memory is not None and memory["last"]["step"] == step


def reason(stop: ConfigDict, step: int, memory: Mapping[str, Any] | None) -> str:
    """Returns why a run ends at a step: `target` or `patience`; '' if it does not.

    Args:
      stop: The section `stop` of the config.
      step: The number of updates so far. Only the evaluation at this step can end the
        run.
      memory: The result of `after`; None before the first evaluation.
    """
    if not memory or not has_seen(memory, step):
        return ""
    if stop.target and _is_reached(stop.target, memory["last"]):
        return "target"
    return "patience" if 0 < stop.patience < memory["bad"] else ""


def _is_reached(target: ConfigDict, figures: Mapping[str, Any]) -> bool:
    return can_be_best(figures) and all(
        figures[name] >= bound if FIGURES[name] else figures[name] <= bound
        for name, bound in target.items()
    )


def summary(
    stop: ConfigDict, step: int, memory: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Returns the entries of `result.json` on the end of a run.

    Args:
      stop: The section `stop` of the config.
      step: The last step.
      memory: The result of `after`.

    Returns:
      `ended_by`, which is `target`, `patience` or `total`; and `to_target`, the `steps`
      and the `seconds` of training until the target was reached, or None.
    """
    why = reason(stop, step, memory)
    to_target = None
    if memory and why == "target":
        to_target = {"steps": step, "seconds": memory["last"]["seconds"]}
    return {"ended_by": why or "total", "to_target": to_target}


def describe(stop: ConfigDict, step: int, memory: Mapping[str, Any] | None) -> str:
    """Returns a line that says why a run ends at a step; '' if it does not.

    Args:
      stop: The section `stop` of the config.
      step: The number of updates so far.
      memory: The result of `after`.
    """
    why = reason(stop, step, memory)
    if not memory or not why:
        return ""
    if why == "target":
        bounds = ", ".join(
            f"{name} {memory['last'][name]:.4f} is at"
            f" {'least' if FIGURES[name] else 'most'} {bound}"
            for name, bound in stop.target.items()
        )
        return f"step {step}: stop.target is reached, since {bounds}"
    return (
        f"step {step}: {memory['bad']} evaluations in a row without a new best top-1"
        f" are more than stop.patience={stop.patience}"
    )
