"""The lines about a run that its lead process prints before the first step."""

import textwrap

import jax
import numpy as np

from resnet_jax.console.output import one_line
from resnet_jax.data.derived_sources import known_labels
from resnet_jax.data.source_protocol import NamedSource
from resnet_jax.models.cost import cost_of_image, count
from resnet_jax.parallel import sharding
from resnet_jax.persistence.storage import Path
from resnet_jax.training.experiment import Experiment
from resnet_jax.training.programs import state_like

# The largest number of classes whose sizes are all printed.
MOST_CLASSES = 50
# The width of the lines, and that of the names of the facts at their beginning.
WIDTH, INDENT = 88, 12


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
        **_sizes_of_classes(train, experiment.eval.source),
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
    return "\n".join(f"{key + ':':<{INDENT}}{value}" for key, value in rows.items())


def _sizes_of_classes(train: NamedSource, eval: NamedSource) -> dict[str, str]:
    """Returns a row with the number of images of each class.

    Of many classes it has the smallest, the median and the largest one. There is no row
    if images would have to be read for it.

    Args:
      train: The training split.
      eval: The eval split, with the same classes.
    """
    known = [known_labels(source) for source in (train, eval)]
    labels = [array for array in known if array is not None]
    if len(labels) < len(known):
        return {}
    names = list(train.classes)
    sizes = [np.bincount(array, minlength=len(names)).tolist() for array in labels]
    texts = [
        f"{name} {' / '.join(f'{size:,}' for size in pair)}"
        for name, *pair in zip(names, *sizes, strict=True)
    ]
    if len(names) > MOST_CLASSES:
        order = sorted(range(len(names)), key=lambda label: (sizes[0][label], label))
        chosen = {
            "smallest": order[0],
            "median": order[len(order) // 2],
            "largest": order[-1],
        }
        texts = [f"{word} {texts[label]}" for word, label in chosen.items()]
    # A line is not broken inside the entry of a class.
    entries = ", ".join(text.replace(" ", "\0") for text in texts)
    lines = textwrap.wrap(
        f"training / eval images of each class: {entries}",
        WIDTH - INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
    lines = [line.replace("\0", " ") for line in lines]
    return {"classes": ("\n" + " " * INDENT).join(lines)}


def class_weights_line(experiment: Experiment) -> str:
    """Returns a line with the smallest and the largest weight of a class in the loss.

    Args:
      experiment: An experiment with `data.class_weights`.
    """
    classes, weights = experiment.classes, experiment.class_weights
    assert weights is not None
    ends = (int(choose(weights[: len(classes)])) for choose in (np.argmin, np.argmax))
    low, high = (f"{weights[i]:.4g} ({one_line(classes[i])})" for i in ends)
    return f"class weights ({experiment.config.data.class_weights}): {low} to {high}"
