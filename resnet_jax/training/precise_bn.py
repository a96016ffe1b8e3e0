"""Batch-norm statistics computed anew for the final parameters (He et al. 2015).

Running statistics lag behind parameters that still change; the authors' released
networks have averages "computed using a sufficiently large training batch after
training".
"""

from collections.abc import Callable

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from resnet_jax.parallel import sharding
from resnet_jax.training.experiment import Setup
from resnet_jax.training.step import TrainState, Tree


def recompute_statistics(
    setup: Setup, state: TrainState, *, after_batch: Callable[[], None]
) -> TrainState:
    """The state with statistics over `config.bn_recompute` batches.

    The batches are those that would follow the last step, augmented as in training. If
    there are averaged parameters, they get statistics of their own.

    Args:
      setup: of the run.
      state: at its end.
      after_batch: called after each batch; may raise to stop.
    """
    statistics_step = setup.compile_statistics_step()
    params = {"batch_stats": state.params, "ema": (state.ema or {}).get("params")}
    batches_of: dict[str, list[Tree]] = {key: [] for key, x in params.items() if x}
    first = setup.total_steps
    with setup.train_batches(first, first + setup.config.bn_recompute) as batches:
        for batch in batches:
            placed = setup.to_devices(batch)
            for key, found in batches_of.items():
                variables = {"params": params[key], "batch_stats": state.batch_stats}
                found.append(jax.device_get(statistics_step(variables, placed)))
            after_batch()
    placed = sharding.replicated(setup.mesh)
    new = {
        key: jax.device_put(pool(found), placed) for key, found in batches_of.items()
    }
    ema = {**state.ema, "batch_stats": new["ema"]} if state.ema else state.ema
    return state.replace(batch_stats=new["batch_stats"], ema=ema)


def pool(batches: list[Tree]) -> Tree:
    """Mean and variance over batches of equal size: m = E[m_k], E[v_k + m_k^2] - m^2.

    Summed in float64, where the difference of the squares does not cancel.
    """
    flat = [flatten_dict(batch) for batch in batches]
    pooled = {}
    for path in flat[0]:
        if path[-1] != "mean":
            continue
        of_var = (*path[:-1], "var")
        means = np.stack([batch[path] for batch in flat]).astype(np.float64)
        variances = np.stack([batch[of_var] for batch in flat])
        mean = means.mean(axis=0)
        var = (variances + np.square(means)).mean(axis=0) - np.square(mean)
        pooled[path], pooled[of_var] = np.float32(mean), np.float32(var)
    return unflatten_dict(pooled)
