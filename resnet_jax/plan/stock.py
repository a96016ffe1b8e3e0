"""Compiles ResNet-50 of stock Linen for one TPU device, and prints libtpu's figures.

Stock Linen means Flax's own layers (`stock_linen.py`), without this package's kernels.
`python -m resnet_jax.plan.stock v3 v4` prints the figures of `calibration.STOCK`. It
needs libtpu but no TPU. Each chip takes minutes.
"""

import os

from resnet_jax.compiler.chips import CHIPS
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser
from resnet_jax.errors import check_known
from resnet_jax.plan.calibration import Stock
from resnet_jax.plan.compile_subprocess import FOR_TPU, compiler_versions


def figures(
    chip: str, *, model: str = "resnet50", image_size: int = 224, images: int = 128
) -> Stock:
    """Compiles the step of `plan/stock_linen.py` in bfloat16 for one device.

    The environment must be `compile_subprocess.FOR_TPU` before JAX is imported.

    Args:
      chip: Name of the chip, a key of `CHIPS`.
      model: Name of the network; see `stock_linen.make_network`.
      image_size: Height and width of the images in pixels.
      images: Number of images per step.
    """
    import jax

    from resnet_jax.parallel import sharding
    from resnet_jax.plan import compile_steps, stock_linen

    topology = chip + ":" + "x".join("221"[: CHIPS[chip].axes])
    devices = compile_steps.devices_of(topology)
    mesh = sharding.make_mesh(devices[:1])
    step, state, batch = stock_linen.train_step(model, image_size, images, "bfloat16")

    def on_one_device(tree):
        replicated = sharding.replicated(mesh)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), tree
        )

    batch = on_one_device(batch)
    lowered = step.lower(on_one_device(state), batch)
    step_figures = compile_steps.figures_of_step(lowered.compile, {}, batch, mesh)
    topology_facts = compile_steps.facts_of_topology(topology, devices)
    package_versions = compiler_versions()
    return Stock(
        images=images,
        devices=topology_facts["devices"] // topology_facts["chips"],
        flops=float(step_figures["flops"]),
        hbm_bytes=float(step_figures["hbm_bytes"]),
        cycles=float(step_figures["cycles"]),
        libtpu=package_versions["libtpu"],
        jax=package_versions["jax"],
    )


def main(argv: list[str]) -> None:
    """Runs the command; see the module's docstring."""
    parser = Parser("plan.stock", __doc__)
    parser.add_argument(
        "chips",
        nargs="+",
        metavar="CHIP",
        help="The chips to compile for, with spaces between them. Each is one of"
        f" {', '.join(CHIPS)}.",
    )
    args = parser.parse(argv[1:])
    for chip in args.chips:
        check_known(f"chip {chip!r}", chip, CHIPS)
    # libtpu reads these variables when JAX is imported.
    os.environ.update(FOR_TPU)
    for chip in args.chips:
        output.answer(f'"{chip}": {figures(chip)},')


if __name__ == "__main__":
    output.command(main)
