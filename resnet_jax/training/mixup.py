"""Mixup and CutMix of the images of a batch, inside the train step.

Only images of the same ghost batch are mixed, as they were on one GPU in the papers'
own runs, and each ghost batch draws its own random numbers, as each GPU did. So images
are mixed on the device that holds them, and neither the number of devices nor the
number of microbatches changes which images are mixed.
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from resnet_jax.errors import UserError, check_known

RULES = ("timm", "torchvision")


@flax.struct.dataclass
class Drawn:
    """The random numbers that are drawn for each ghost batch.

    Attributes:
      lam: The weight (lambda) of an image's own label; the rest is its partner's. For
        CutMix it is the fraction of the pixels that are kept. float32 [ghost_batches].
      cut: True for CutMix, false for mixup. bool [ghost_batches].
      box: The corners y1, y2, x1, x2 of the pixels that CutMix takes from the partner;
        y2 and x2 are exclusive. int32 [ghost_batches, 4].
    """

    lam: Any
    cut: Any
    box: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """Options of mixup and CutMix, `config.mix`.

    Attributes:
      mixup_alpha: The alpha of mixup's Beta(alpha, alpha) (Zhang et al. 2017,
        arXiv:1710.09412); 0 turns mixup off.
      cutmix_alpha: The alpha of CutMix's (Yun et al. 2019, arXiv:1905.04899); 0 turns
        CutMix off.
      probability: The probability that a ghost batch is mixed at all.
      switch_probability: The probability of CutMix where both are on.
      rule: `timm`: partners are the images in reverse order; `torchvision`: the partner
        is the previous image. The two round CutMix's boxes differently, too.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    probability: float = 1.0
    switch_probability: float = 0.5
    rule: str = "timm"

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Mix | None":
        """Returns the options of a `config.mix`, or None if both methods are off."""
        mix = cls(**config)
        return mix if mix.mixup_alpha or mix.cutmix_alpha else None

    def draw(
        self, key: jax.Array, ghost_batches: int, height: int, width: int
    ) -> Drawn:
        """Draws the random numbers for ghost batches of images.

        Args:
          key: The random key of the step.
          ghost_batches: The number of ghost batches in the batch.
          height: The images' height in pixels.
          width: The images' width in pixels.
        """

        def draw_for_ghost_batch(key: jax.Array) -> Drawn:
            keys = jax.random.split(key, 5)
            if self.mixup_alpha and self.cutmix_alpha:
                cutmix_probability = self.switch_probability
            else:
                cutmix_probability = float(self.cutmix_alpha > 0)
            cut = jax.random.bernoulli(keys[0], cutmix_probability)
            alpha = jnp.where(cut, self.cutmix_alpha, self.mixup_alpha)
            lam = jax.random.beta(keys[1], alpha, alpha)
            lam = jnp.where(jax.random.bernoulli(keys[2], self.probability), lam, 1.0)
            y = jax.random.randint(keys[3], (), 0, height)
            x = jax.random.randint(keys[4], (), 0, width)
            box = self.box(lam, y, x, height, width)
            area = (box[1] - box[0]) * (box[3] - box[2])
            # A box that the border clips is smaller than lambda says.
            lam = jnp.where(cut, 1 - area / (height * width), lam)
            return Drawn(lam=lam, cut=cut, box=box)

        return jax.vmap(draw_for_ghost_batch)(jax.random.split(key, ghost_batches))

    def box(
        self,
        lam: Float[Array, ""],
        y: Int[Array, ""],
        x: Int[Array, ""],
        height: int,
        width: int,
    ) -> Int[Array, "4"]:
        """Returns CutMix's box y1, y2, x1, x2, clipped at the images' border.

        Args:
          lam: The fraction of the pixels outside of the box before clipping.
          y: The row of the box's centre.
          x: The column of the box's centre.
          height: The images' height in pixels.
          width: The images' width in pixels.
        """

        def side(centre: jax.Array, length: int) -> list[jax.Array]:
            fraction = jnp.sqrt(1 - lam)
            if self.rule == "timm":
                full = (length * fraction).astype(jnp.int32)
                ends = centre - full // 2, centre + (full + 1) // 2
            else:
                half = (0.5 * fraction * length).astype(jnp.int32)
                ends = centre - half, centre + half
            return [jnp.clip(end, 0, length) for end in ends]

        return jnp.stack(side(y, height) + side(x, width))

    def apply(
        self,
        image: Float[Array, "b h w c"],
        labels: Float[Array, "b classes"],
        drawn: Drawn,
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
        """Mixes images and their labels.

        Args:
          image: Normalised images.
          labels: The weight of every class in each image.
          drawn: The random numbers; the ghost batches are consecutive parts of the
            batch, of equal size.
        """
        ghost_batches = len(drawn.lam)

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(ghost_batches, -1, *x.shape[1:])

        def join(x: jax.Array) -> jax.Array:
            return x.reshape(-1, *x.shape[2:])

        image, labels = split(image), split(labels)
        lam = drawn.lam[:, None, None]
        y1, y2, x1, x2 = (end[:, None, None] for end in drawn.box.T)
        rows = jnp.arange(image.shape[2])[None, :, None]
        columns = jnp.arange(image.shape[3])[None, None, :]
        inside = (y1 <= rows) & (rows < y2) & (x1 <= columns) & (columns < x2)
        # The partner's weight in each pixel: [ghost_batches, h, w].
        weight = jnp.where(drawn.cut[:, None, None], inside, 1 - lam)
        weight = weight[:, None, :, :, None]
        image = image * (1 - weight) + self._partners(image) * weight
        labels = labels * lam + self._partners(labels) * (1 - lam)
        return join(image), join(labels)

    def _partners(self, x: jax.Array) -> jax.Array:
        return x[:, ::-1] if self.rule == "timm" else jnp.roll(x, 1, axis=1)


def check(config: ConfigDict) -> None:
    """Checks the rule of `config.mix`.

    Raises:
      UserError: The rule is unknown.
    """
    check_known(f"mix.rule={config.mix.rule!r}", config.mix.rule, RULES)


def check_ghost_batch(config: ConfigDict, size: int) -> None:
    """Checks that ghost batches hold more than one image, if images are mixed.

    Args:
      config: The run's config.
      size: The ghost batch size in images.

    Raises:
      UserError: Images are to be mixed, but each ghost batch holds a single one.
    """
    if Mix.from_config(config.mix) and size == 1:
        raise UserError(
            "mix.mixup_alpha and mix.cutmix_alpha mix the images of a ghost batch, and"
            f" model.bn_group_size={config.model.bn_group_size} puts a single image in"
            " each; set a larger model.bn_group_size."
        )
