"""Precise batch norm: statistics of the final parameters (He et al. 2015).

Running statistics lag behind parameters that still change; the authors' released
networks have averages "computed using a sufficiently large training batch after
training". The name is that of Wu & Johnson 2021 (arXiv:2105.07576), section 3.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from resnet_jax.parallel import sharding
from resnet_jax.training.experiment import Experiment
from resnet_jax.training.programs import compile_statistics_step
from resnet_jax.training.step import TrainState, Tree


def precise_batch_norm(
    experiment: Experiment, state: TrainState, *, after_batch: Callable[[], None]
) -> TrainState:
    """Returns the state with batch statistics over `config.precise_bn` batches.

    The batches are those that would follow the last step, augmented as in training. If
    there are EMA parameters, they get statistics of their own.

    Args:
      experiment: The experiment.
      state: The state after the last step.
      after_batch: A function that is called after each batch. It may raise to stop.
    """
    # The run may end early.
    first = int(state.step)
    statistics_step = compile_statistics_step(experiment, first - 1)
    params = {"batch_stats": state.params}
    if state.ema:
        params["ema"] = state.ema["params"]
    statistics: dict[str, list[Tree]] = {name: [] for name in params}
    last = first + experiment.config.precise_bn
    with experiment.train_batches(first, last) as batches:
        for batch in batches:
            device_batch = experiment.to_devices(batch)
            for name, batch_stats in statistics.items():
                variables = {"params": params[name], "batch_stats": state.batch_stats}
                new_stats = statistics_step(variables, device_batch)
                batch_stats.append(jax.device_get(new_stats))
            after_batch()
    pooled = {
        name: jax.device_put(pool(batch_stats), sharding.replicated(experiment.mesh))
        for name, batch_stats in statistics.items()
    }
    # Statistics that were frozen in the last step stay.
    frozen = experiment.frozen(first - 1)
    before = {"batch_stats": state.batch_stats}
    if state.ema:
        before["ema"] = state.ema["batch_stats"]
    pooled = {
        name: frozen.merge(frozen.trained(batch_stats), before[name])
        for name, batch_stats in pooled.items()
    }
    ema = {**state.ema, "batch_stats": pooled["ema"]} if state.ema else state.ema
    return dataclasses.replace(state, batch_stats=pooled["batch_stats"], ema=ema)


def pool(batches: Sequence[Tree]) -> Tree:
    """Pools the statistics of batches of equal size.

    For means m_k and variances v_k, the pooled mean is m = E[m_k], and the pooled
    variance is E[v_k + m_k^2] - m^2. The sums are float64, in which the difference of
    the squares does not cancel.

    Args:
      batches: The `batch_stats` of each batch, with arrays `mean` and `var`.

    Returns:
      Statistics of the same structure, in float32.
    """
    flat = [flatten_dict(batch) for batch in batches]
    pooled = {}
    for path in flat[0]:
        if path[-1] != "mean":
            continue
        var_path = (*path[:-1], "var")
        means = np.stack([batch[path] for batch in flat]).astype(np.float64)
        variances = np.stack([batch[var_path] for batch in flat])
        mean = means.mean(axis=0)
        var = (variances + np.square(means)).mean(axis=0) - np.square(mean)
        pooled[path], pooled[var_path] = np.float32(mean), np.float32(var)
    return unflatten_dict(pooled)
