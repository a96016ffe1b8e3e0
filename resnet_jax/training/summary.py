"""The lines about a run that its lead process prints before the first step."""

import jax

from resnet_jax.models.cost import cost_of_image, count
from resnet_jax.parallel import sharding
from resnet_jax.persistence.storage import Path
from resnet_jax.training.experiment import Experiment
from resnet_jax.training.programs import state_like


def summary(experiment: Experiment, workdir: Path) -> str:
    """Returns lines of facts that a user wants to check before a long run.

    Args:
      experiment: The experiment.
      workdir: The run's directory.
    """
    config, mesh, model = experiment.config, experiment.mesh, experiment.model
    size, batch_size = config.data.image_size, config.batch_size
    like = state_like(experiment)
    macs = cost_of_image(model, size).macs
    frozen, until = experiment.freeze, experiment.freeze_until
    device = mesh.devices.flat[0]
    train = experiment.train.source
    epochs = experiment.total_steps * batch_size / len(train)
    slices = sharding.slice_count(mesh)
    rows = {
        "devices": f"{mesh.size} x {device.device_kind} ({device.platform}),"
        + (f" {slices} slices," if slices > 1 else "")
        + f" {jax.process_count()} process(es), parameters {config.sharding.params}",
        "model": f"{config.model.name}, {count(like.params):,} parameters,"
        f" {macs / 1e6:,.1f} M MACs at {size}x{size}, {config.model.dtype}",
        "train": f"{train.title}, {len(train):,} images, {len(train.classes)} classes",
        "eval": f"{experiment.eval.source.title},"
        f" {len(experiment.eval.source):,} images",
        **{
            f"eval {number}": f"{name}, {len(examples):,} images"
            for number, (name, examples) in enumerate(experiment.sets.items(), start=2)
        },
        "batch": f"{batch_size} images, {batch_size // mesh.size} a device,"
        f" {config.optim.microbatches} microbatch(es)",
        "batch norm": f"ghost batches of {model.bn_group_size} images,"
        f" {batch_size // model.bn_group_size} a batch"
        if like.batch_stats
        else "none",
        **(
            {
                "frozen": f"{count(like.params) - count(frozen.trained(like.params)):,}"
                f" of {count(like.params):,} parameters"
                + (f" (until step {until:,})" if until else "")
            }
            if frozen.leaves
            else {}
        ),
        "steps": f"{experiment.total_steps:,} ({epochs:.2f} epochs)",
        "workdir": str(workdir),
    }
    if experiment.resize:
        sides = experiment.resize.sides(range(experiment.total_steps))
        rows["sizes"] = ", ".join(map(str, sides)) + " px, in this order"
    return "\n".join(f"{key + ':':<12}{value}" for key, value in rows.items())
