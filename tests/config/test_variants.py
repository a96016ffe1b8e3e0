"""Configs that are derived from a run's: for a dry run, and for an evaluation."""

from ml_collections import ConfigDict

from resnet_jax.config import values
from resnet_jax.config.variants import for_dry_run, for_evaluation
from tests.helpers.golden_configs import CONFIGS, load


def test_a_dry_run_is_small_whatever_the_config():
    for path in CONFIGS:
        small = for_dry_run(load(path.stem), devices=8)
        assert small.total.to_dict() == {"steps": 2}
        assert small.batch_size == 16 * small.optim.microbatches
        assert small.data.source.startswith("fake")
        assert small.data.image_size <= 64


def test_a_run_with_values_that_are_not_allowed_any_more_can_be_evaluated():
    config = load("r50")
    config.seed = 2**40
    config.optim.learning_rate = -1.0
    config.optim.warmup = ConfigDict({"epochs": float("nan")})
    values.check(for_evaluation(config, devices=8))
