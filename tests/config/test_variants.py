"""The small variant of a config for a dry run."""

from resnet_jax.config.variants import for_dry_run
from tests.helpers.golden_configs import CONFIGS, load


def test_a_dry_run_is_small_whatever_the_config():
    for path in CONFIGS:
        small = for_dry_run(load(path.stem), devices=8)
        assert small.total.to_dict() == {"steps": 2}
        assert small.batch_size == 16 * small.optim.microbatches
        assert small.data.source.startswith("fake")
        assert small.data.image_size <= 64
