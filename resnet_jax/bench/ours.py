"""What this library does in the benchmarks: its step, its inference, its compiling."""

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
    """A short run of a config on fake data; `model` may be empty: the config's."""
    found = load(config)
    if model not in ("", found.model.name):
        # What the config overrides is of its own network; another may not have it.
        found.model.name, found.model.overrides = model, ConfigDict()
    found.batch_size = batch
    found.model.dtype = dtype
    found.data.image_size = size
    # As many classes as the peers' networks have. Few images in the second split:
    # only training is measured.
    classes = get_spec(found.model.name, **found.model.overrides).num_classes
    found.data.source = f"fake:{classes}:{batch}"
    found.data.train_split, found.data.eval_split = "train", "validation"
    found.total = ConfigDict({"steps": steps})
    found.log_every = ConfigDict({"steps": max(steps // 4, 1)})
    found.optim.warmup = ConfigDict({"steps": 0})
    found.optim.schedule = "constant"
    for section in (found.evaluate, found.checkpoint):
        section.every = ConfigDict({"steps": steps})
    return found


def fake_batch(setup: Experiment) -> dict:
    """A batch of noise, on the devices; of several processes, each gives its part."""
    rng = np.random.default_rng(0)
    size = setup.config.batch_size
    rows = len(local_rows(setup.mesh, size))
    like = programs.train_batch_like(setup)
    image = rng.integers(0, 256, (rows, *like["image"].shape[1:]), np.uint8)
    label = rng.integers(0, len(setup.train.source.classes), rows, np.int32)
    return setup.to_devices({"image": image, "label": label})


def _step_config(model: str, size: int, batch: int, dtype: str) -> ConfigDict:
    name = "configs/r50.py" if size >= 96 else "configs/cifar10.py"
    config = short_config(name, model, size, batch, dtype)
    # As the peers have it.
    config.model.bn_group_size = "global"
    return config


def step(model: str, size: int, batch: int, dtype: str) -> Callable[[], None]:
    """The train step that `main` runs, of a config for images of that size."""
    process_memory.keep_freed_memory()
    setup = set_up(_step_config(model, size, batch, dtype))
    train_step = programs.compile_train_step(setup)
    state = programs.init_state(setup)
    placed = fake_batch(setup)

    def run() -> None:
        nonlocal state
        state, _ = train_step(state, placed)
        jax.block_until_ready(state)

    return run


def compile_step(model: str, size: int, batch: int, dtype: str) -> Callable[[], None]:
    """From the config to the compiled train step, once."""
    return _compiling(_step_config(model, size, batch, dtype))


def compile_scanned_step(
    model: str, size: int, batch: int, dtype: str
) -> Callable[[], None]:
    """The same with scanned blocks."""
    config = _step_config(model, size, batch, dtype)
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


def inference(model: str, size: int, batch: int, dtype: str) -> Callable[[], None]:
    """Logits of float32 images."""
    process_memory.keep_freed_memory()
    network = create_model(model, dtype=jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.01, 0.02, x.shape), x.dtype),
        init_shapes(network, size),
    )
    shape = (batch, size, size, network.spec.in_channels)
    image = jnp.asarray(rng.standard_normal(shape, np.float32))
    logits_of = jax.jit(network.apply).lower(variables, image).compile()
    return lambda: jax.block_until_ready(logits_of(variables, image))
