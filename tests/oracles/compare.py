"""Compares networks with torch's on the same images, in evaluation and training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from torch import nn

from resnet_jax.models import ZOO, ResNetSpec, build, get_spec
from resnet_jax.models.scan import stack_blocks
from resnet_jax.weights import SCHEMES
from resnet_jax.weights.naming import to_foreign
from tests.helpers import keyed
from tests.oracles import networks

# Float32 rounds at 6e-8. The largest difference that was measured is 2e-5 of the
# largest logit (with norms over the few pixels of small images). Any difference of
# definition is far above this bound.
LOGITS_BOUND = 1e-4


def assert_logits_equal(name: str, variables, reference: nn.Module, sizes) -> None:
    """Compares logits with a reference's in evaluation mode, at every image size."""
    spec = ZOO[name].spec
    # Hundreds of blocks take long unless they are scanned.
    deep = isinstance(spec, ResNetSpec) and sum(spec.stage_sizes) > 100
    if deep:
        variables = stack_blocks(variables, spec)
    model = build(spec, scan_blocks=deep)
    for size in sizes:
        images = keyed.images(1, size)
        theirs = networks.logits(reference, images)
        # Without jit, equal layers share their compiled programs. Training uses jit.
        ours = np.asarray(model.apply(variables, jnp.asarray(images)))
        assert ours.shape == theirs.shape
        error = relative_error(ours, theirs)
        assert error <= LOGITS_BOUND, f"at {size} pixels: {error:.1e}"


def train_torch(reference: nn.Module, images, labels) -> dict[str, np.ndarray]:
    """Returns torch's gradients and new running statistics by `state_dict` names."""
    reference.train()
    loss = F.cross_entropy(
        reference(networks.nchw(images)), torch.from_numpy(np.asarray(labels))
    )
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in reference.named_parameters()}
    return {**networks.arrays(reference), **gradients}


def train_ours(name: str, spec, variables, images, labels) -> dict[str, np.ndarray]:
    """Returns the same of this project's network, computed in the images' type."""
    scheme = SCHEMES[ZOO[name].scheme]
    model = build(spec, dtype=images.dtype)

    def loss(params, images):
        logits, updated = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    gradients, updated = gradient(variables["params"], images)
    return to_foreign({"params": gradients, **updated}, spec, scheme)


def train_both(name: str, images, **fields):
    """Returns gradients and running statistics of both sides in training.

    Args:
      name: The name of the network.
      images: The images, in the type of the computation.
      **fields: Fields of the spec to replace; only `stage_sizes` is possible.

    Returns:
      Pairs (this project's, torch's) of each parameter's gradient by name, and such
      pairs of each running statistic.
    """
    spec = get_spec(name, **fields)
    variables = keyed.variables(spec)
    make = networks.build_shallow if fields else networks.build
    reference = make(name, variables, *([spec] if fields else []))
    reference = reference.to(torch.from_numpy(images).dtype)
    variables = jax.tree.map(lambda value: jnp.asarray(value, images.dtype), variables)
    labels = keyed.labels(len(images), spec.num_classes)
    ours = train_ours(name, spec, variables, images, labels)
    theirs = train_torch(reference, images, labels)
    gradients, statistics = {}, {}
    for tensor in ours:
        kind = statistics if ".running_" in tensor else gradients
        kind[tensor] = (ours[tensor], theirs[tensor])
    return gradients, statistics


def assert_training_equal_in_float64(name, size, batch=2, bound=1e-9, **fields) -> None:
    """Compares gradients and running statistics; needs the fixture `in_float64`."""
    images = keyed.images(batch, size).astype(np.float64)
    gradients, statistics = train_both(name, images, **fields)
    largest = max(np.abs(theirs).max() for _, theirs in gradients.values())
    assert next(iter(gradients.values()))[0].dtype == np.float64
    # Float64 rounds at 1e-16, and 1e-13 of each tensor's scale was measured, through
    # 152 layers and sums over 25,000 pixels. If the input of a single rectifier had the
    # other sign, some tensor would differ by more than 1e-6.
    for tensor, (ours, theirs) in {**gradients, **statistics}.items():
        # A bias before a norm has no gradient except for rounding.
        scale = max(np.abs(theirs).max(), 1e-4 * largest)
        error = np.abs(ours - theirs).max() / scale
        assert error <= bound, f"{tensor}: {error:.1e}"


def relative_error(values: np.ndarray, reference: np.ndarray) -> float:
    """Returns the largest difference, as a fraction of the largest reference value."""
    return float(np.abs(values - reference).max() / np.abs(reference).max())
