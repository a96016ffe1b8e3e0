"""`python -m resnet_jax.analysis.gradients`: the gradient's size by depth."""

import json

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from resnet_jax.analysis import gradients
from resnet_jax.errors import UserError
from resnet_jax.models.inputs import normalize
from resnet_jax.models.scan import stack_blocks
from resnet_jax.training import losses, programs
from resnet_jax.training.loop import train
from tests.helpers import keyed, tiny

# With more than nine blocks, sorting by name would put the tenth before the second.
DEEP = {"model.overrides.stage_sizes": (11, 1)}


def loss_along(setup, state, batch, block: str):
    """Returns the loss as a function of a change to a block's first kernel."""
    config = setup.config
    loss_of = losses.make_loss(config)
    image = normalize(
        jnp.asarray(batch["image"]), config.data.mean, config.data.std, jnp.float32
    )

    @jax.jit
    def loss(change):
        params = jax.tree.map(jnp.asarray, state.params)
        moved = {"conv1": {"kernel": params[block]["conv1"]["kernel"] + change}}
        params = params | {block: params[block] | moved}
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, _ = setup.model.apply(
            variables, image, train=True, mutable=["batch_stats"]
        )
        return loss_of(logits, jnp.asarray(batch["label"])).mean()

    return loss


def test_a_norm_is_the_slope_of_the_loss():
    setup = tiny.setup(devices=1)
    state, batch = tiny.state(setup), tiny.batch(setup)
    norms = gradients.compile_norms(setup)(state, setup.to_devices(batch))
    state = tiny.state(setup)
    blocks = gradients.block_names(setup.model.spec)
    assert blocks == ["stage1_block1", "stage2_block1"]
    for block, norm in zip(blocks, norms.tolist(), strict=True):
        # Along random normal directions, slopes are normal, and their standard
        # deviation is the norm.
        shape = state.params[block]["conv1"]["kernel"].shape
        chosen = np.random.default_rng(0).standard_normal((400, *shape), np.float32)
        losses_at = loss_along(setup, state, batch, block)
        slopes = [
            float(losses_at(3e-3 * direction) - losses_at(-3e-3 * direction)) / 6e-3
            for direction in chosen
        ]
        # The standard deviation of 400 slopes is known to 1 / sqrt(800) = 3.5 %.
        assert norm == pytest.approx(np.std(slopes), rel=0.14)


@pytest.mark.slow
def test_blocks_are_ordered_by_depth_whether_scanned_or_not():
    expected = [*(f"stage1_block{i}" for i in range(1, 12)), "stage2_block1"]
    found = []
    for scan in (False, True):
        setup = tiny.setup(DEEP | {"model.scan_blocks": scan}, devices=1)
        spec = setup.model.spec
        assert gradients.block_names(spec) == expected
        variables = keyed.variables(spec)
        state = programs.state_from(
            setup, stack_blocks(variables, spec) if scan else variables
        )
        batch = setup.to_devices(tiny.batch(setup))
        found.append(gradients.compile_norms(setup)(state, batch))
    # The same float32 sums in another order, through eleven blocks.
    np.testing.assert_allclose(*found, rtol=1e-3)
    assert np.ptp(found[0]) > 0.1 * np.max(found[0])


@pytest.mark.slow
def test_the_command_plots_the_newest_checkpoint(tmp_path, capsys):
    config = tiny.config()
    train(config, tmp_path / "run")
    file = tmp_path / "tiny_config.py"
    file.write_text("from tests.helpers.tiny import config as get_config\n")
    # The value of an override may be the next argument.
    command = ["gradients", f"--config={file}", "--batches=2", "--config.data.pad", "3"]
    files = {}
    for name, more in (("end", [f"--workdir={tmp_path / 'run'}"]), ("start", [])):
        picture = tmp_path / f"{name}.png"
        gradients.main([*command, *more, f"--save={picture}"])
        files[name] = json.loads(picture.with_suffix(".json").read_text())
        # The picture is not empty.
        assert matplotlib.image.imread(picture).std() > 0.05
    assert "stage2_block1: " in capsys.readouterr().out
    assert [files[name]["step"] for name in ("start", "end")] == [0, 4]
    start, end = (np.array(list(files[name]["norms"].values())) for name in files)
    assert start.shape == end.shape == (2, 2)
    assert not np.isclose(start, end, rtol=1e-3).any()


def test_illegal_measurements_are_errors_that_say_why(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        gradients.measure(tiny.config(), tmp_path)
    with pytest.raises(UserError, match="without blocks"):
        gradients.first_convolutions({"stem_conv1": {}, "head": {}})
    with pytest.raises(UserError, match="--batches=0"):
        gradients.measure(tiny.config(), batches=0)
