"""How large the gradient is at each depth of a network.

python -m resnet_jax.analysis.gradients --config=configs/quickstart.py \
    [--workdir=DIR] [--batches=4] --save=norms.png [--config.KEY=VALUE ...]

Draws the L2 norm of the loss's gradient with respect to each block's first convolution,
and writes the numbers beside it, as norms.json. Of the newest checkpoint of DIR, or
without it of the initial weights. He et al. 2015 (arXiv:1512.03385), section 4.1, argue
from such norms that the plain networks' trouble is not that gradients vanish.
"""

import re
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.ticker import LogFormatter
from ml_collections import ConfigDict

from resnet_jax.config import override
from resnet_jax.config.saved import from_saved
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count, load_config
from resnet_jax.errors import UserError
from resnet_jax.models import build
from resnet_jax.models.cost import init_shapes
from resnet_jax.models.inputs import normalize
from resnet_jax.models.scan import unstack_blocks
from resnet_jax.models.zoo import Spec
from resnet_jax.parallel import sharding
from resnet_jax.persistence import storage
from resnet_jax.persistence.checkpoints import open_checkpoints
from resnet_jax.persistence.storage import Path, write_json
from resnet_jax.reports.figures import picture
from resnet_jax.training import losses
from resnet_jax.training.experiment import Setup, set_up
from resnet_jax.training.initialization import first_state, initial_weights
from resnet_jax.training.resume import spec_change
from resnet_jax.training.step import TrainState, Tree


def first_convolutions(params: Mapping) -> dict[str, Tree]:
    """The kernel of each block's first convolution, by the block's name, in order.

    `params` has a tree for each block, as `unstack_blocks` gives it.

    Raises UserError if the network has no such blocks.
    """
    found = {}
    for name, tree in params.items():
        match = re.fullmatch(r"stage(\d+)_block(\d+)", name)
        if match and "conv1" in tree:
            place = int(match[1]), int(match[2])
            found[place] = name, tree["conv1"]["kernel"]
    if not found:
        raise UserError(
            "model.name is a network without blocks, whose gradients have no depth to"
            " be drawn over; take a residual or a plain one."
        )
    return dict(found[place] for place in sorted(found))


def block_names(spec: Spec) -> list[str]:
    """The blocks of a network from the input on; raises as `first_convolutions`."""
    return list(first_convolutions(init_shapes(build(spec), image_size=64)["params"]))


def _by_block(model: nn.Module, params: Tree) -> Tree:
    if not model.scan_blocks:
        return params
    return unstack_blocks({"params": params}, model.spec)["params"]


def compile_norms(setup: Setup) -> Callable[..., Float[Array, "blocks"]]:
    """The compiled `norms(state, batch)`: float32, one for each of `block_names`.

    The loss is that of a train step, over a whole batch, without mixing, a teacher and
    weight decay.
    """
    config, model = setup.config, setup.model
    loss_of = losses.make_loss(config)

    def norms(state: TrainState, batch: dict) -> Float[Array, "blocks"]:
        data = config.data
        image = normalize(batch["image"], data.mean, data.std, model.dtype)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def loss(params: Tree) -> jax.Array:
            logits, _ = model.apply(
                {"params": setup.whole(params), "batch_stats": state.batch_stats},
                image,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            return loss_of(logits, batch["label"]).mean()

        grads = _by_block(model, jax.grad(loss)(state.params))
        kernels = first_convolutions(grads).values()
        return jnp.stack([jnp.linalg.norm(kernel.ravel()) for kernel in kernels])

    like = setup.state_like()
    batch = setup.batch_like(setup.config.batch_size, "image", "label")
    placed = sharding.replicated(setup.mesh)
    return jax.jit(norms, out_shardings=placed).lower(like, batch).compile()


def measure(config: ConfigDict, workdir: Path | None = None, batches: int = 4) -> dict:
    """Norms on the first batches of the training split.

    Args:
      config: The config of the run; its augmentation counts.
      workdir: The run whose newest checkpoint is taken; None takes initial weights.
      batches: The number of batches.

    Returns:
      `model`, `step`, and `norms`: of each block's name, a list of one norm a batch.

    Raises:
      UserError: there is no checkpoint, or the network has no blocks.
    """
    if batches < 1:
        raise UserError(f"--batches={batches} must be at least 1.")
    setup = set_up(config)
    if workdir:
        state = _newest_state(setup, workdir)
    else:
        state = first_state(setup, initial_weights(setup))
    names, norms_of = block_names(setup.model.spec), compile_norms(setup)
    with setup.train_batches(0, batches) as made:
        found = [np.asarray(norms_of(state, setup.to_devices(batch))) for batch in made]
    return {
        "model": config.model.name,
        "step": int(state.step),
        "norms": dict(zip(names, np.array(found).T.tolist(), strict=True)),
    }


def _newest_state(setup: Setup, workdir: Path) -> TrainState:
    """Returns the newest checkpoint's parameters and statistics as a state."""
    like = setup.state_like()
    with open_checkpoints(workdir) as saved:
        step = saved.steps()[-1]
        if change := spec_change(saved.read(step)["spec"], setup.model.spec):
            raise UserError(f"{workdir} holds another network ({change}).")
        arrays = {"params": like.params, "batch_stats": like.batch_stats}
        restored = saved.restore(step, arrays)
    state = setup.state_from(jax.device_get(restored))
    return state.replace(step=jnp.int32(step))


def draw(measured: dict, path: Path) -> Path:
    """Draws the mean over the batches, and their range, by block."""
    norms = np.array(list(measured["norms"].values()))
    depth = np.arange(1, len(norms) + 1)
    with picture(path, figsize=(8, 4.5)) as figure:
        axes = figure.subplots()
        axes.fill_between(depth, norms.min(axis=1), norms.max(axis=1), alpha=0.2)
        axes.semilogy(depth, norms.mean(axis=1), "o-", markersize=3)
        # The default formatters of a logarithmic axis write mathematics.
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
        # A line marks where a stage begins.
        for place, name in zip(depth, measured["norms"], strict=True):
            if name.endswith("_block1"):
                axes.axvline(place, color="grey", linewidth=0.5)
        axes.set(
            xlabel="block, from the input on (a line where a stage begins)",
            ylabel="|gradient| of its first convolution",
            title=f"{measured['model']} at step {measured['step']},"
            f" {norms.shape[1]} batches",
        )
        axes.grid(alpha=0.3)
    return path


def main(argv: list[str]) -> None:
    """Runs the command; see the module's docstring."""
    parser = Parser("analysis.gradients", __doc__)
    parser.add_config("The default is the config of --workdir.")
    parser.add_argument(
        "--workdir",
        type=storage.path_of,
        help="The directory of a run, whose newest checkpoint is measured. Without it,"
        " the initial weights are measured.",
    )
    parser.add_argument(
        "--batches",
        type=count,
        default=4,
        help="The number of batches over which gradients are measured. The default is"
        " %(default)s.",
    )
    parser.add_argument(
        "--save",
        type=storage.path_of,
        required=True,
        help="The picture that is written, such as norms.png. The numbers are written"
        " beside it, as norms.json.",
    )
    args = parser.parse(argv[1:])
    if args.config:
        config = load_config(args)
    elif args.workdir:
        with open_checkpoints(args.workdir) as saved:
            config = from_saved(saved.read(saved.steps()[-1])["config"])
        override(config, args.overrides)
    else:
        raise UserError("--config or --workdir is required.")
    measured = measure(config, args.workdir, args.batches)
    for name, values in measured["norms"].items():
        output.say(f"{name}: {np.mean(values):.4g}")
    write_json(args.save.with_suffix(".json"), measured)
    output.say(str(draw(measured, args.save)))


if __name__ == "__main__":
    output.command(main)
