"""Configs that are derived from a run's config, for an evaluation and a dry run."""

from ml_collections import ConfigDict

from resnet_jax.config import defaults, values
from resnet_jax.config.sizes import eval_batch_size


def for_evaluation(config: ConfigDict, devices: int) -> ConfigDict:
    """Returns a config that evaluates the same on any number of devices.

    Keys that only training reads get values that suit every network and batch size.

    Args:
      config: The config of the run, which is not changed.
      devices: The number of devices that evaluate.
    """
    config = ConfigDict(config.to_dict())
    with config.ignore_type():
        batch_size = eval_batch_size(config)
        # The seed chooses the images that are held out. An older version allowed seeds
        # that this one does not.
        if not values.RANGES["seed"].holds(config.seed, values.MOST_WHOLE):
            config.seed = 0
        config.batch_size = -(-batch_size // devices) * devices
        config.evaluate.batch_size = 0
        config.model.bn_group_size = "global"
        # A duration in epochs is another number of steps at that batch size.
        config.total = ConfigDict({"steps": 1})
        config.data.resize_schedule = ConfigDict()
        config.data.class_weights = ""
        for section in ("optim", "mix", "distill", "stop"):
            config[section] = defaults.get_config()[section]
        config.optim.warmup = ConfigDict({"steps": 0})
    return config


def for_dry_run(config: ConfigDict, devices: int) -> ConfigDict:
    """Returns a config that does everything for two steps, on small fake images.

    Args:
      config: The config of the run, which is not changed.
      devices: The number of devices.
    """
    config = ConfigDict(config.to_dict())
    with config.ignore_type():
        # Two examples per device and microbatch, which are one ghost batch.
        config.batch_size = 2 * devices * config.optim.microbatches
        config.evaluate.batch_size = 2 * devices
        config.model.bn_group_size = "device"
        # The batch size does not divide the number of images, so that the last batch of
        # an evaluation is padded.
        config.data.source = f"fake:10:{config.batch_size + 1}"
        config.data.train_split, config.data.eval_split = "train", "validation"
        config.data.eval_source, config.data.shots = "", 0
        config.evaluate.sets = ()
        config.data.image_size = min(config.data.image_size or 64, 64)
        config.data.eval_size = min(config.data.eval_size, 64)
        if config.data.resize_schedule:
            # One step at each of two sizes.
            size = config.data.image_size
            times = {"start": {"steps": 0}, "end": {"steps": 1}}
            sizes = {"first": max(size // 2, 1), "last": size}
            config.data.resize_schedule = ConfigDict(times | sizes)
        config.init_from = ""
        config.precise_bn = min(config.precise_bn, 1)
        config.total = ConfigDict({"steps": 2})
        if config.optim.warmup and max(config.optim.warmup.values()):
            config.optim.warmup = ConfigDict({"steps": 1})
        config.optim.decay_at = tuple({"steps": 1} for _ in config.optim.decay_at[:1])
        config.optim.schedule_length = ConfigDict()
        if config.optim.freeze_until and max(config.optim.freeze_until.values()):
            # One frozen step, and one after the thaw.
            config.optim.freeze_until = ConfigDict({"steps": 1})
        if config.distill.teacher:
            config.distill.teacher_init = "drawn"
        for section in (config.evaluate, config.checkpoint):
            section.every = ConfigDict({"steps": 2})
        config.log_every = ConfigDict({"steps": 1})
    return config
