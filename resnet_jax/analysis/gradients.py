"""Measures the norm of the gradient at each depth of a network.

python -m resnet_jax.analysis.gradients --config=configs/quickstart.py \
    [--workdir=DIR] [--batches=4] --save=norms.png [--config.KEY=VALUE ...]

Plots the L2 norm of the loss's gradient with respect to each block's first convolution
and writes the numbers to norms.json beside the picture. The parameters are those of the
newest checkpoint of DIR, or the initial ones. He et al. 2015 (arXiv:1512.03385),
section 4.1, argue from such norms that vanishing gradients do not cause the degradation
of plain networks.
"""

import dataclasses
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
from resnet_jax.reports.figures import picture, picture_to_write
from resnet_jax.training import losses, programs
from resnet_jax.training.experiment import Experiment, set_up
from resnet_jax.training.initialization import first_state, initial_weights
from resnet_jax.training.resume import spec_change
from resnet_jax.training.step import TrainState, Tree


def first_convolutions(params: Mapping) -> dict[str, Tree]:
    """Returns the kernel of each block's first convolution, from the input on.

    Args:
      params: Parameters with a tree for each block, as `unstack_blocks` returns them.

    Returns:
      The kernels by the names of the blocks.

    Raises:
      UserError: The network has no blocks with such convolutions.
    """
    kernels = {}
    for name, tree in params.items():
        match = re.fullmatch(r"stage(\d+)_block(\d+)", name)
        if match and "conv1" in tree:
            stage_and_block = int(match[1]), int(match[2])
            kernels[stage_and_block] = name, tree["conv1"]["kernel"]
    if not kernels:
        raise UserError(
            "model.name is a network without blocks, so that there is no depth to plot"
            " gradients over; choose a residual or a plain network."
        )
    return dict(kernels[place] for place in sorted(kernels))


def block_names(spec: Spec) -> list[str]:
    """Returns the names of a network's blocks, from the input on.

    Raises:
      UserError: The network has no blocks with such convolutions.
    """
    return list(first_convolutions(init_shapes(build(spec), image_size=64)["params"]))


def _by_block(model: nn.Module, params: Tree) -> Tree:
    return unstack_blocks({"params": params}, model.spec)["params"]


def compile_norms(experiment: Experiment) -> Callable[..., Float[Array, "blocks"]]:
    """Compiles `norms(state, batch)`, which has a norm for each of `block_names`.

    The loss is the config's, over a complete batch, without mixup, class weights,
    distillation and weight decay. The norms are float32.

    Args:
      experiment: The experiment that the config describes.
    """
    config, model = experiment.config, experiment.model_of_whole_batch()
    loss_of = losses.make_loss(config)

    def norms(state: TrainState, batch: dict) -> Float[Array, "blocks"]:
        data = config.data
        image = normalize(batch["image"], data.mean, data.std, model.dtype)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def loss(params: Tree) -> jax.Array:
            logits, _ = model.apply(
                {
                    "params": programs.all_gather(experiment, params),
                    "batch_stats": state.batch_stats,
                },
                image,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            return loss_of(logits, batch["label"]).mean()

        grads = _by_block(model, jax.grad(loss)(state.params))
        kernels = first_convolutions(grads).values()
        return jnp.stack([jnp.linalg.norm(kernel.ravel()) for kernel in kernels])

    like = programs.state_like(experiment)
    batch = programs.train_batch_like(experiment)
    replicated = sharding.replicated(experiment.mesh)
    return jax.jit(norms, out_shardings=replicated).lower(like, batch).compile()


def measure(config: ConfigDict, workdir: Path | None = None, batches: int = 4) -> dict:
    """Measures the norms on the first batches of the training split.

    Args:
      config: The config of the run; the images are augmented as it says.
      workdir: The run whose newest checkpoint is measured; None for initial weights.
      batches: The number of batches.

    Returns:
      `model`, the network's name; `step`, the checkpoint's step or 0; and `norms`, by
      the names of the blocks, a list with a norm for each batch.

    Raises:
      UserError: The workdir has no checkpoint, or the network has no blocks.
    """
    if batches < 1:
        raise UserError(f"--batches={batches} must be at least 1.")
    experiment = set_up(config)
    if workdir:
        state = _newest_state(experiment, workdir)
    else:
        state = first_state(experiment, initial_weights(experiment))
    names, norms_of = block_names(experiment.model.spec), compile_norms(experiment)
    with experiment.train_batches(0, batches) as loaded:
        rows = [
            np.asarray(norms_of(state, experiment.to_devices(batch)))
            for batch in loaded
        ]
    return {
        "model": experiment.config.model.name,
        "step": int(state.step),
        "norms": dict(zip(names, np.array(rows).T.tolist(), strict=True)),
    }


def _newest_state(experiment: Experiment, workdir: Path) -> TrainState:
    """Returns a state with the parameters and statistics of the newest checkpoint."""
    with open_checkpoints(workdir) as saved:
        record, variables = saved.load("last")
        if change := spec_change(record["spec"], experiment.model.spec):
            raise UserError(
                f"{workdir} holds another network than the config ({change}); leave out"
                " --config and the overrides of model to measure the run's network."
            )
    variables = {key: variables[key] for key in ("params", "batch_stats")}
    state = programs.state_from(experiment, variables)
    return dataclasses.replace(state, step=jnp.int32(record["progress"]["step"]))


def plot(measured: dict, path: Path) -> Path:
    """Plots the mean norm over the batches, and the range, by block.

    Args:
      measured: The result of `measure`.
      path: The picture's file.

    Returns:
      The picture's file.
    """
    norms = np.array(list(measured["norms"].values()))
    depth = np.arange(1, len(norms) + 1)
    with picture(path, figsize=(8, 4.5)) as figure:
        axes = figure.subplots()
        axes.fill_between(depth, norms.min(axis=1), norms.max(axis=1), alpha=0.2)
        axes.semilogy(depth, norms.mean(axis=1), "o-", markersize=3)
        # By default, the labels of a logarithmic axis are typeset as mathematics.
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
        # A line marks where a stage begins.
        for place, name in zip(depth, measured["norms"], strict=True):
            if name.endswith("_block1"):
                axes.axvline(place, color="grey", linewidth=0.5)
        axes.set(
            xlabel="block, from the input on (lines where stages begin)",
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
        help="The directory of a run whose newest checkpoint is measured. Without it,"
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
        type=picture_to_write,
        required=True,
        help="The file to which the picture is written, such as norms.png. The numbers"
        " are written beside it, as norms.json.",
    )
    args = parser.parse(argv[1:])
    if args.config:
        config = load_config(args)
    elif args.workdir:
        with open_checkpoints(args.workdir) as saved:
            record, _ = saved.load("last")
        config = from_saved(record["config"])
        override(config, args.overrides)
    else:
        raise UserError("--config or --workdir is required.")
    measured = measure(config, args.workdir, args.batches)
    for name, values in measured["norms"].items():
        output.say(f"{name}: {np.mean(values):.4g}")
    write_json(args.save.with_suffix(".json"), measured)
    output.say(str(plot(measured, args.save)))


if __name__ == "__main__":
    output.command(main)
