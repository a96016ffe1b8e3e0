"""Overrides, evaluations of a workdir and dry runs do what README says of them."""

import re

import pytest

from resnet_jax.models import list_models
from tests.helpers import runs
from tests.helpers.golden_configs import CONFIGS

# This runs in a process of its own, since absl keeps the flags that it has parsed.
PARSE = """
from absl import flags
from resnet_jax import main
from resnet_jax.config.saved import as_text, flatten
from tests.helpers.golden_configs import CONFIGS, load

for path in CONFIGS:
    wanted = load(path.stem)
    overrides = [f"--config.{k}={v}" for k, v in flatten(wanted).items()]
    overrides += ["--config.model.bn_group_size=global", "--config.total.examples=1e6"]
    wanted.model.bn_group_size = "global"
    wanted.total = {"examples": 1e6}
    argv = ["main", f"--config=configs/{path.name}", "--workdir=x", *overrides]
    assert as_text(main.parse(argv).config) == as_text(wanted)
    flags.FLAGS.unparse_flags()
    print("parsed", path.stem)
"""


@pytest.mark.slow
def test_every_key_can_be_set_on_the_command_line():
    """Sets each key to its own value, and two keys to values of another type."""
    code, output = runs.run_python("-c", PARSE)
    assert code == 0, output
    parsed = re.findall("^parsed (.*)", output, re.MULTILINE)
    assert parsed == [path.stem for path in CONFIGS], output


@pytest.mark.slow
def test_eval_mode_evaluates_any_split_and_either_checkpoint(tmp_path):
    workdir = tmp_path / "run"
    assert runs.run(workdir, *runs.SMALL)[0] == 0
    overrides = ("--config.data.eval_split=train", "--config.evaluate.batch_size=50")
    for flags, size in (
        ((), 360),
        # The config may be named again; the run's own is used where they differ.
        ((*runs.SMALL[:2], "--config.ema_decay=0.9", "--checkpoint=last"), 360),
        (overrides, 1437),
    ):
        code, output = runs.run(workdir, "--mode=eval", *flags)
        assert code == 0, output
        assert f"on {size:,} images" in output
        changed = re.findall(
            r"^different from training: ([\w.]+): ", output, re.MULTILINE
        )
        assert (
            changed
            == ["data.eval_split", "evaluate.batch_size"][: 2 * (flags == overrides)]
        )
        named = any(flag.startswith("--config=") for flag in flags)
        assert ("--config differs from the run's own config" in output) == named
    last = runs.read_json(workdir / "eval_test.json")
    assert last["top1"] == runs.result(workdir)["top1"]
    assert last["loss"] == runs.result(workdir)["loss"]


@pytest.mark.slow
def test_a_dry_run_needs_no_data_and_leaves_nothing(tmp_path):
    name = "--config=configs/r18.py"
    code, output = runs.run(tmp_path / "none", name, "--mode=dry_run")
    assert code == 0, output
    assert "dry run: 2 steps" in output
    assert not (tmp_path / "none").exists()


# All recipes, and the variants that differ in kind from the default one.
# Without weights, a linear probe is an error.
DRY_RUNS = [path.stem for path in CONFIGS if path.stem != "linear_probe"] + [
    *("bag_of_tricks:distill", "composer:hot", "he2015_cifar:1202", "rsb:a3"),
]
PARTS = 8  # the number of processes, each of which has five minutes
DRY_RUN = """
import pathlib, sys, tempfile
from resnet_jax.config.variants import for_dry_run
from resnet_jax.models import get_spec
from resnet_jax.training.completion import complete
from resnet_jax.training.loop import train
from tests.helpers.golden_configs import load

for name in sys.argv[1:]:
    config = for_dry_run(complete(load(name)), 1)
    # Its network is cut down, since networks have tests of their own.
    spec, overrides = get_spec(config.model.name), config.model.overrides
    overrides.stage_sizes, overrides.widths = (1, 1), tuple(spec.widths[:2])
    if not isinstance(spec.block, str):
        overrides.block = tuple(spec.block[:2])
    with tempfile.TemporaryDirectory() as directory:
        result = train(config, pathlib.Path(directory) / "run")
    assert result["n_seen"] == config.batch_size + 1
    print("ended:", name, flush=True)
"""


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_a_dry_run_of_every_recipe_ends(part):
    names = DRY_RUNS[part::PARTS]
    code, output = runs.run_python(
        *("-c", DRY_RUN, *names), XLA_FLAGS="--xla_backend_optimization_level=0"
    )
    assert code == 0, output
    assert re.findall("^ended: (.*)", output, re.MULTILINE) == names


def test_every_network_has_golden_figures_of_its_reference():
    golden = runs.read_json(runs.ROOT / "tests" / "golden" / "logits.json")
    assert set(list_models()) == golden.keys()
