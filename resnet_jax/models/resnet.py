"""The residual network: stem, stages and head, built from a spec."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resnet_jax.errors import BadValueError
from resnet_jax.models import layers, norms
from resnet_jax.models.blocks import BLOCKS
from resnet_jax.models.spec import BlockPlan, ResNetSpec, plan_blocks


class ResNet(nn.Module):
    """A residual network (He et al. 2015, arXiv:1512.03385).

    Attributes:
      spec: The network as data.
      dtype: The type of the computation. Parameters and statistics are float32.
      bn_group_size: The ghost batch size: the number of examples that share batch-norm
        statistics in training. None: the whole batch.
      scan_blocks: Merges consecutive blocks of equal shape into one `scan`, which
        compiles as fast as one block. Their parameters are stacked; `models/scan.py`
        converts between both layouts.
    """

    spec: ResNetSpec
    dtype: DTypeLike = jnp.float32
    bn_group_size: int | None = None
    scan_blocks: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        *,
        train: bool = False,
        features: bool = False,
    ) -> Float[Array, "b f"] | dict[str, Float[Array, "b _ _ _"]]:
        """Returns float32 logits of normalised images.

        In training the collection `batch_stats` must be mutable, and networks with
        dropout or drop path need the rng `dropout`.

        Args:
          x: The images, large enough that no layer's output is empty.
          train: Turns on dropout, drop path and batch norm by the batch's statistics.
          features: Returns a dictionary of feature maps instead: the outputs of the
            stages (four of them are `C2` to `C5`), and as `C1` the stem's last output
            at half the image's side or more.

        Raises:
          BadValueError: The images have another number of channels than the network,
            or sides that its strides do not divide and its shortcuts need divided.

        Examples:
          >>> import jax
          >>> model = resnet_jax.create_model("resnet18")
          >>> images = jax.ShapeDtypeStruct((2, 224, 224, 3), "float32")
          >>> key = jax.random.key(0)
          >>> maps, _ = jax.eval_shape(
          ...     lambda x: model.init_with_output(key, x, features=True), images
          ... )
          >>> maps["C5"].shape
          (2, 7, 7, 512)
        """
        spec = self.spec
        if x.shape[-1] != spec.in_channels:
            raise BadValueError(
                f"The network takes images of {spec.in_channels} channels, and these"
                f" have {x.shape[-1]}. Convert them, or replace in_channels of the"
                " network's spec."
            )
        conv = self.conv()
        x, outputs = self.stem(x, train=train, features=features)
        for i, stage in enumerate(plan_blocks(spec), 1):
            x = self.stage(x, i, stage, train=train)
            outputs[f"C{i + 1}"] = x
        if spec.final_width:
            bias = "final" in spec.biased
            x = conv(spec.final_width, 1, bias=bias, name="final_conv")(x)
            outputs[f"C{i + 1}"] = x
        if features:
            return outputs
        if spec.preact:
            x = self.norm()(name="final_norm")(x, train=train)

        if spec.head_pool:
            if spec.head_pool > min(x.shape[1:3]):
                raise BadValueError(
                    f"head_pool={spec.head_pool} does not fit into the features of"
                    f" {x.shape[1]}x{x.shape[2]} pixels; use a smaller one, or larger"
                    " images."
                )
            window = (spec.head_pool, spec.head_pool)
            x = nn.avg_pool(x, window, window)
            x = x.reshape(x.shape[0], -1)
        else:
            x = layers.global_average_pool(x)
        if spec.dropout:
            x = layers.Dropout(name="dropout")(x, spec.dropout, train=train)
        if not spec.num_classes:
            return x.astype(jnp.float32)
        init = self.head_init()
        head = layers.Head(
            spec.num_classes, init, self.dtype, spec.head_bias, name="head"
        )
        return head(x)

    def stem(
        self, x: Float[Array, "b h w c"], *, train: bool, features: bool
    ) -> tuple[Float[Array, "b h2 w2 f"], dict[str, Float[Array, "b _ _ _"]]]:
        """Applies the stem: its convolutions, norms and pooling.

        Args:
          x: The images.
          train: Turns on batch norm by the batch's statistics.
          features: True to return the feature map `C1`.

        Returns:
          The stem's output, and a dictionary that holds `C1` if `features` is true.
        """
        spec, conv, norm = self.spec, self.conv(), self.norm()
        pool = functools.partial(layers.max_pool, stride=2, border=spec.stem_pool)
        # The last norm can pool before it normalises, but then `C1` is not computed.
        norm_pools = (
            (spec.norm, spec.activation, spec.anti_alias) == ("batch", "relu", None)
            and spec.stem_pool in ("max", "max_valid")
            and not (spec.preact or features)
        )
        stride, outputs = 1, {}
        for k, (kernel, step, width) in enumerate(spec.stem, 1):
            stride *= step
            bias = "stem" in spec.biased
            x = conv(width, kernel, step, bias=bias, name=f"stem_conv{k}")(x)
            last = k == len(spec.stem)
            if stride <= 2 and features and spec.preact:
                outputs["C1"] = x
            # A pre-activation network's blocks start with the norm and activation.
            if not (last and spec.preact):
                options = {"pool": pool} if last and norm_pools else {}
                x = norm(name=f"stem_norm{k}", **options)(x, train=train)
            if stride <= 2 and features and not spec.preact:
                outputs["C1"] = x

        if spec.stem_pool == "conv":
            step = 1 if spec.anti_alias else 2
            x = conv(x.shape[-1], 3, step, name="stem_pool_conv")(x)
            if spec.anti_alias:
                x = layers.anti_alias(x, spec.anti_alias, 2)
            x = norm(name="stem_pool_norm")(x, train=train)
        elif spec.stem_pool != "none" and not norm_pools:
            if spec.anti_alias == "blur":
                x = layers.max_pool(x, 1, spec.stem_pool)
            blur = spec.anti_alias
            x = layers.anti_alias(x, blur, 2) if blur else pool(x)
        return x, outputs

    def stage(
        self,
        x: Float[Array, "b h w c"],
        number: int,
        plans: tuple[BlockPlan, ...],
        *,
        train: bool,
    ) -> Float[Array, "b h2 w2 f"]:
        """Applies the blocks of one stage; `scan_blocks` scans over runs of equal ones.

        Args:
          x: The input.
          number: The number of the stage, from 1.
          plans: The blocks of the stage.
          train: Turns on dropout, drop path and batch norm by the batch's statistics.
        """

        def apply(
            block: nn.Module, x: jax.Array, numbers: dict[str, Any]
        ) -> tuple[jax.Array, None]:
            return block(x, **numbers, train=train), None

        first = 1
        for run in runs_of(plans) if self.scan_blocks else [[plan] for plan in plans]:
            name = f"stage{number}_block{first}"
            if len(run) == 1:
                plan = run[0]
                block = self.block(plan, name)
                x, _ = apply(block, x, plan.numbers())
            else:
                block = self.block(run[0].shape(), f"{name}to{first + len(run) - 1}")
                numbers = [plan.numbers() for plan in run]
                scan = nn.scan(
                    apply,
                    variable_axes={"params": 0, "batch_stats": 0},
                    split_rngs={"params": True, "dropout": True},
                    length=len(run),
                )
                stacked = {
                    key: jnp.asarray(
                        [block_numbers[key] for block_numbers in numbers], jnp.float32
                    )
                    for key in numbers[0]
                }
                x, _ = scan(block, x, stacked)
            first += len(run)
        return x

    def block(self, plan: BlockPlan, name: str) -> nn.Module:
        """Returns the module of a block.

        Args:
          plan: The shape of the block.
          name: The name of its variables.
        """
        return BLOCKS[plan.kind](self.spec, plan, self.conv(), self.norm(), name=name)

    def conv(self) -> Callable[..., nn.Module]:
        """Returns the function that makes this network's convolutions."""
        spec = self.spec
        in_kernel = spec.scaled_at == "convolution"
        return functools.partial(
            layers.Conv,
            same_padding=spec.same_padding,
            standardization=spec.weight_standardization,
            epsilon=spec.standardization_epsilon,
            gain=layers.ACTIVATION_GAINS[spec.activation] if in_kernel else 1.0,
            kernel_init=layers.CONV_INITS[spec.conv_init],
            dtype=self.dtype,
        )

    def norm(self) -> Callable[..., nn.Module]:
        """Returns the function that makes norms, each with the activation after it."""
        spec = self.spec
        activation: Callable = layers.ACTIVATIONS[spec.activation]
        if spec.norm == "none":
            if spec.scaled_at == "activation":
                activation = layers.scaled_activation(spec.activation)
            norm: Callable[..., nn.Module] = norms.NoNorm
        elif spec.norm == "batch":
            norm = functools.partial(
                norms.BatchNorm,
                group_size=self.bn_group_size,
                epsilon=spec.norm_epsilon,
                momentum=spec.norm_momentum,
                unbiased=spec.norm_unbiased,
            )
        elif spec.norm == "filter_response":
            norm = functools.partial(
                norms.FilterResponseNorm, epsilon=spec.norm_epsilon
            )
        else:
            kind = {"group": norms.GroupNorm, "evonorm_s0": norms.EvoNormS0}[spec.norm]
            norm = functools.partial(
                kind, groups=spec.norm_groups, epsilon=spec.norm_epsilon
            )
        return functools.partial(
            norms.with_activation, norm, activation, dtype=self.dtype
        )

    def head_init(self) -> nn.initializers.Initializer:
        """Returns the initialiser of the head's kernel."""
        if self.spec.head_init_std is not None:
            return nn.initializers.normal(self.spec.head_init_std)
        if self.spec.conv_init == "glorot_uniform":
            return nn.initializers.glorot_uniform()
        return layers.torch_linear_init


def runs_of(plans: tuple[BlockPlan, ...]) -> list[list[BlockPlan]]:
    """Splits a stage into runs of consecutive blocks of equal shape."""
    runs = itertools.groupby(plans, key=BlockPlan.shape)
    return [list(run) for _, run in runs]
