"""Makes a run so small that its train step compiles in a second or two."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from resnet_jax.config import load
from resnet_jax.training import programs
from resnet_jax.training.experiment import Experiment, set_up
from resnet_jax.training.step import TrainState
from tests.helpers import keyed

# The network has two blocks, the second one with a projection shortcut, and six norms.
NETWORK = {
    "stage_sizes": (1, 1),
    "widths": (8, 16),
    "stem": ((3, 1, 8),),
    "shortcut": "projection",
}
# With these changes parameters are sharded, and the kernels are large enough for it.
IN_PARTS = {
    "sharding.params": "fsdp",
    "model.overrides.widths": (64, 64),
    "model.overrides.stem": ((3, 1, 64),),
}


def config(changes: Mapping | None = None) -> ConfigDict:
    """Returns the config of a run of four steps of 16 images on fake data.

    Args:
      changes: Values to change, by dotted key such as `optim.learning_rate`.
    """
    config = load("configs/quickstart.py")
    config.batch_size = 16
    config.total = ConfigDict({"steps": 4})
    config.model.overrides = ConfigDict(NETWORK)
    config.model.bn_group_size = 2
    config.data.source = "fake:10:64"
    config.data.eval_split = "validation"
    config.optim.warmup = ConfigDict({"steps": 0})
    config.update_from_flattened_dict(changes or {})
    return config


def mesh_of(devices: int) -> Mesh:
    """Returns the mesh that a machine with that number of devices would have."""
    return jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:devices],
    )


def setup(changes: Mapping | None = None, devices: int = 8) -> Experiment:
    """Sets up a run of `config` on the first devices."""
    return dataclasses.replace(set_up(config(changes)), mesh=mesh_of(devices))


def state(setup: Experiment, step: int = 0) -> TrainState:
    """Draws a training state in which no value is the initial one.

    numpy draws the values, since compiling the initializers would take longer than
    compiling the step. The state is placed on the setup's devices.
    """
    variables = keyed.variables(setup.model.spec)
    state = TrainState(
        step=np.int32(step),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=setup.optimizer.init(setup.freeze.trained(variables["params"])),
        ema=keyed.variables(setup.model.spec, seed=1)
        if setup.config.ema_decay
        else None,
    )
    return jax.device_put(state, programs.state_shardings(setup))


def batch(setup: Experiment, seed: int = 0) -> dict[str, np.ndarray]:
    """Draws a training batch, as numpy arrays."""
    like = programs.train_batch_like(setup)
    rng = keyed.generator("batch", seed)
    return {
        "image": rng.integers(256, size=like["image"].shape, dtype=np.uint8),
        "label": rng.integers(10, size=like["label"].shape, dtype=np.int32),
    }


def difference(tree, expected) -> float:
    """Returns the largest difference in a leaf, relative to its largest value."""

    def of_leaf(got, want) -> float:
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        return np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)

    return max(jax.tree.leaves(jax.tree.map(of_leaf, tree, expected)))
