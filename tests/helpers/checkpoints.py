"""A small training state and its checkpoints, and the metrics of a step."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_jax.parallel import sharding
from resnet_jax.persistence.checkpoints import Checkpoints, Progress
from resnet_jax.training.step import TrainState

# The metrics that `metric_writers.Writer.train` prints and writes.
TRAIN_METRICS = {
    "loss": 1.0,
    "top1": 0.5,
    "epoch": 0.1,
    "images_per_second": 10.0,
    "data_wait": 0.01,
    "learning_rate": 0.1,
}


def mesh_of(devices: int) -> Mesh:
    """Returns a mesh of the first devices."""
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def random_state(seed: int, devices: int = 1) -> TrainState:
    """Returns a state with the step `seed` and random values, which is replicated."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "conv": {"kernel": jax.random.normal(keys[0], (3, 3, 4, 8))},
        "head": {"bias": jax.random.normal(keys[1], (8,))},
    }
    state = TrainState(
        step=jnp.int32(seed),
        params=params,
        batch_stats={"norm": {"mean": jax.random.normal(keys[2], (8,))}},
        opt_state=(jax.tree.map(lambda x: 2 * x, params), ()),
        ema=None,
    )
    return jax.device_put(state, sharding.replicated(mesh_of(devices)))


def shapes_of(state: TrainState, devices: int = 1) -> TrainState:
    """Returns the shapes and dtypes of a state, replicated over the first devices."""
    replicated = sharding.replicated(mesh_of(devices))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), state
    )


def open_for_writing(path, **options) -> Checkpoints:
    """Opens checkpoints of which the last two and the best one are kept."""
    return Checkpoints(
        path, ConfigDict({"keep_last": 2, "keep_best": 1, **options}), {}
    )


def progress_at(step: int, top1: float | None = None) -> Progress:
    """Returns the progress at a step, with an evaluation if it has an accuracy."""
    evaluation = None if top1 is None else {"top1": top1, "step": step}
    return Progress(step=step, examples=8 * step, evaluation=evaluation)


def assert_same_bits(tree, expected) -> None:
    """Checks that two trees have the same arrays, bit for bit."""
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
