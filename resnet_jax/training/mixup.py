"""Mixup and CutMix, inside the train step.

Images are mixed among the examples that share batch-norm statistics, which are what one
GPU held in the papers' own runs. Each of these groups draws its own numbers, as each
GPU did. So a group is mixed where it lies, and neither the number of devices nor that
of microbatches changes what is mixed with what.
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
    """What was drawn for each group of examples: arrays, or what stands for them.

    Attributes:
      own: how much of an image's label stays: for CutMix the part of its pixels;
        float32 [groups].
      cut: whether the group is cut, not blended; bool [groups].
      box: y1, y2, x1, x2 of what the partner gives, in pixels; ends are exclusive;
        int32 [groups, 4].
    """

    own: Any
    cut: Any
    box: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """How images are mixed.

    Attributes:
      mixup_alpha: of mixup's Beta(alpha, alpha) (Zhang et al. 2017, arXiv:1710.09412);
        0: no mixup.
      cutmix_alpha: of CutMix's (Yun et al. 2019, arXiv:1905.04899); 0: no CutMix.
      probability: of mixing at all.
      switch_probability: of CutMix, where there are both.
      rule: `timm`: an image's partner has its place counted from the group's end;
        `torchvision`: it is the image before it. They round boxes differently too.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    probability: float = 1.0
    switch_probability: float = 0.5
    rule: str = "timm"

    @classmethod
    def of(cls, config: ConfigDict) -> "Mix | None":
        """What `config.mix` says; None: nothing is mixed."""
        mix = cls(**config)
        return mix if mix.mixup_alpha or mix.cutmix_alpha else None

    def draw(self, key: jax.Array, groups: int, height: int, width: int) -> Drawn:
        """Draws for so many groups of images of so many pixels."""

        def one(key: jax.Array) -> Drawn:
            keys = jax.random.split(key, 5)
            both = self.mixup_alpha and self.cutmix_alpha
            cutting = self.switch_probability if both else float(self.cutmix_alpha > 0)
            cut = jax.random.bernoulli(keys[0], cutting)
            alpha = jnp.where(cut, self.cutmix_alpha, self.mixup_alpha)
            own = jax.random.beta(keys[1], alpha, alpha)
            own = jnp.where(jax.random.bernoulli(keys[2], self.probability), own, 1.0)
            y = jax.random.randint(keys[3], (), 0, height)
            x = jax.random.randint(keys[4], (), 0, width)
            box = self.box(own, y, x, height, width)
            area = (box[1] - box[0]) * (box[3] - box[2])
            # A box at the border is smaller than what was drawn.
            own = jnp.where(cut, 1 - area / (height * width), own)
            return Drawn(own=own, cut=cut, box=box)

        return jax.vmap(one)(jax.random.split(key, groups))

    def box(
        self,
        own: Float[Array, ""],
        y: Int[Array, ""],
        x: Int[Array, ""],
        height: int,
        width: int,
    ) -> Int[Array, "4"]:
        """The box of CutMix around a centre, as it is drawn before clipping."""

        def side(centre: jax.Array, length: int) -> list[jax.Array]:
            part = jnp.sqrt(1 - own)
            if self.rule == "timm":
                cut = (length * part).astype(jnp.int32)
                ends = centre - cut // 2, centre + (cut + 1) // 2
            else:
                half = (0.5 * part * length).astype(jnp.int32)
                ends = centre - half, centre + half
            return [jnp.clip(end, 0, length) for end in ends]

        return jnp.stack(side(y, height) + side(x, width))

    def apply(
        self,
        image: Float[Array, "b h w c"],
        labels: Float[Array, "b classes"],
        drawn: Drawn,
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
        """Mixes normalised images and their labels.

        `drawn` is of as many groups of consecutive examples as make the batch.
        """
        groups = len(drawn.own)
        image, labels = (x.reshape(groups, -1, *x.shape[1:]) for x in (image, labels))
        own = drawn.own[:, None, None]
        y1, y2, x1, x2 = (end[:, None, None] for end in drawn.box.T)
        rows = jnp.arange(image.shape[2])[None, :, None]
        columns = jnp.arange(image.shape[3])[None, None, :]
        inside = (y1 <= rows) & (rows < y2) & (x1 <= columns) & (columns < x2)
        # What the partner gives of each pixel: [groups, h, w].
        given = jnp.where(drawn.cut[:, None, None], inside, 1 - own)
        given = given[:, None, :, :, None]
        image = image * (1 - given) + self._partners(image) * given
        labels = labels * own + self._partners(labels) * (1 - own)
        return tuple(x.reshape(-1, *x.shape[2:]) for x in (image, labels))

    def _partners(self, x: jax.Array) -> jax.Array:
        return x[:, ::-1] if self.rule == "timm" else jnp.roll(x, 1, axis=1)


def check(config: ConfigDict) -> None:
    """Raises UserError for what `config.mix` cannot be."""
    mix = config.mix
    check_known(f"mix.rule={mix.rule!r}", mix.rule, RULES)
    for key in ("mixup_alpha", "cutmix_alpha"):
        if mix[key] < 0:
            raise UserError(f"mix.{key}={mix[key]} must be at least 0.")
    for key in ("probability", "switch_probability"):
        if not 0 <= mix[key] <= 1:
            raise UserError(f"mix.{key}={mix[key]} must be from 0 to 1.")


def check_group(config: ConfigDict, size: int) -> None:
    """Raises UserError unless groups of a size have images to mix."""
    if Mix.of(config.mix) and size == 1:
        raise UserError(
            "mix.mixup_alpha and mix.cutmix_alpha mix the images of a batch-norm group,"
            f" and model.bn_group_size={config.model.bn_group_size} puts a single one"
            " in each; enlarge it."
        )
