"""Makes the programs of this library that are timed: step, inference and compiling.

The functions that `worker.IMPLEMENTATIONS` names take a network's name in the zoo, the
height and width of the images in pixels, the batch size, and the computation's dtype.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from resnet_jax.config import load
from resnet_jax.models import create_model, get_spec
from resnet_jax.models.cost import init_shapes
from resnet_jax.parallel import process_memory
from resnet_jax.parallel.sharding import local_rows
from resnet_jax.persistence import compile_cache
from resnet_jax.training import programs
from resnet_jax.training.experiment import Experiment, set_up
from resnet_jax.training.initialization import teacher_variables, teacher_weights


def short_config(
    config: str, model: str, size: int, batch: int, dtype: str, steps: int = 4
) -> ConfigDict:
    """Loads a config and changes it to a short run on fake data.

    Args:
      config: The config file, such as `configs/r50.py`.
      model: The network, by its name in the zoo; '' keeps the config's.
      size: The height and width of the images in pixels.
      batch: The number of images per step.
      dtype: The dtype of the computation.
      steps: The number of steps.
    """
    changed = load(config)
    if model not in ("", changed.model.name):
        # The overrides belong to the config's own network. Another network may not
        # have their fields.
        changed.model.name, changed.model.overrides = model, ConfigDict()
    changed.batch_size = batch
    changed.model.dtype = dtype
    changed.data.image_size = size
    # The data have as many classes as the networks of the baselines. The second split
    # is small, since only training is measured.
    classes = get_spec(changed.model.name, **changed.model.overrides).num_classes
    changed.data.source = f"fake:{classes}:{batch}"
    changed.data.train_split, changed.data.eval_split = "train", "validation"
    changed.total = ConfigDict({"steps": steps})
    changed.log_every = ConfigDict({"steps": max(steps // 4, 1)})
    changed.optim.warmup = ConfigDict({"steps": 0})
    changed.optim.schedule = "constant"
    for section in (changed.evaluate, changed.checkpoint):
        section.every = ConfigDict({"steps": steps})
    return changed


def fake_batch(setup: Experiment) -> dict[str, jax.Array]:
    """Returns a training batch of noise on the devices; each process makes its part."""
    rng = np.random.default_rng(0)
    size = setup.config.batch_size
    rows = len(local_rows(setup.mesh, size))
    like = programs.train_batch_like(setup)
    image = rng.integers(0, 256, (rows, *like["image"].shape[1:]), np.uint8)
    label = rng.integers(0, len(setup.train.source.classes), rows, np.int32)
    return setup.to_devices({"image": image, "label": label})


def step_config(model: str, size: int, batch: int, dtype: str) -> ConfigDict:
    """Returns the config whose train step is compared with those of the baselines."""
    name = "configs/r50.py" if size >= 96 else "configs/cifar10.py"
    config = short_config(name, model, size, batch, dtype)
    # The baselines normalize over the whole batch.
    config.model.bn_group_size = "global"
    return config


def step(model: str, size: int, batch: int, dtype: str) -> Callable[[], None]:
    """Returns a call of the train step that `main` runs for images of that size."""
    process_memory.keep_freed_memory()
    setup = set_up(step_config(model, size, batch, dtype))
    train_step = programs.compile_train_step(setup)
    state = programs.init_state(setup)
    device_batch = fake_batch(setup)

    def run() -> None:
        nonlocal state
        state, _ = train_step(state, device_batch)
        jax.block_until_ready(state)

    return run


def compile_step(model: str, size: int, batch: int, dtype: str) -> Callable[[], None]:
    """Returns a call that compiles the train step, from the config on."""
    return _compiling(step_config(model, size, batch, dtype))


def compile_scanned_step(
    model: str, size: int, batch: int, dtype: str
) -> Callable[[], None]:
    """Returns a call that compiles the train step with `model.scan_blocks`."""
    config = step_config(model, size, batch, dtype)
    config.model.scan_blocks = True
    return _compiling(config)


def _compiling(config: ConfigDict) -> Callable[[], None]:
    compile_cache.turn_on()

    def run() -> None:
        setup = set_up(config)
        programs.compile_train_step(
            setup, teacher_variables(setup, teacher_weights(setup))
        )

    return run


def inference(model: str, size: int, batch: int, dtype: str) -> Callable[[], jax.Array]:
    """Returns a call that computes the logits of float32 images."""
    process_memory.keep_freed_memory()
    network = create_model(model, dtype=jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.01, 0.02, x.shape), x.dtype),
        init_shapes(network, size),
    )
    shape = (batch, size, size, network.spec.in_channels)
    image = jnp.asarray(rng.standard_normal(shape, np.float32))
    compute_logits = jax.jit(network.apply).lower(variables, image).compile()
    return lambda: jax.block_until_ready(compute_logits(variables, image))
