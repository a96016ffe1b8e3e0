"""The defaults of every config: ResNet-50 on ImageNet with SGD.

A recipe starts from `get_config()` and states how it differs. Every key can be set on
the command line: `--config.optim.learning_rate=0.2`, `--config.total.epochs=30`. A
duration is written `{'epochs': 90}`, `{'steps': 500}` or `{'examples': 1e6}`.
"""

from typing import Any

import ml_collections
from ml_collections import ConfigDict

from resnet_jax.config import old_keys

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def literal(value: Any) -> ml_collections.FieldReference:
    """Returns a config value that values of any type may replace, as 32 or 'global'."""
    return ml_collections.FieldReference(value, field_type=object)


def get_config() -> ConfigDict:
    """Returns the defaults, locked, so that setting an unknown key is an error.

    A comment says what each key does, and lists the other values that it may have.
    """
    config = old_keys.Config()
    config.seed = 0  # of all random numbers of the run
    config.batch_size = 256  # images per step, over all devices
    config.total = ConfigDict({"epochs": 90})  # length of the run
    config.log_every = ConfigDict({"steps": 50})  # time between two log lines

    config.model = old_keys.Model()
    config.model.name = "resnet50"  # a name from `python -m resnet_jax.zoo`
    config.model.overrides = ConfigDict()  # fields of ResNetSpec to replace
    config.model.dtype = "float32"  # type of the computation; or bfloat16
    # Compiles equal blocks only once: for deep networks, which compile long otherwise.
    config.model.scan_blocks = False
    # Ghost batch size: the number of examples that share batch-norm statistics; or
    # 'global' (a microbatch), or 'device' (the examples of one device).
    config.model.bn_group_size = literal(32)
    # Fuses the last convolutions of bottlenecks with their batch norm, which saves
    # reads and writes of memory, where devices hold complete ghost batches: True,
    # False, or 'chip' (in bfloat16 on TPUs).
    config.model.fused_norm = literal("chip")

    config.sharding = ConfigDict()
    # Every device holds all parameters; or fsdp: each device holds a part of the
    # parameters, the optimiser's state and the EMA, and gathers the rest when it needs
    # them, for networks that do not fit otherwise.
    config.sharding.params = "replicated"

    # Options of XLA's compiler for the steps, a dictionary; or 'chip': those of
    # resnet_jax/compiler/ for the chip.
    config.compiler_options = literal("chip")

    # Initial weights: a file, a workdir or timm:NAME.TAG; empty: randomly initialised.
    config.init_from = ""

    config.data = ConfigDict()
    config.data.source = "tfds:imagenet2012"  # or mix:3*tfds:NAME,1*folder:PATH, ...
    config.data.eval_source = ""  # source of the eval split; empty: data.source
    config.data.data_dir = ""  # where tfds keeps its data sets; empty: its default
    config.data.train_split = "train"  # or a part of it: train[:10%]
    config.data.eval_split = "validation"
    config.data.shots = 0  # training images per class, chosen by the seed; 0: all
    config.data.image_size = 224  # height and width of training images, in pixels
    # Progressive resizing: {"first": 160, "last": 192, "start": {"epochs": 65}, "end":
    # {"epochs": 76}, "multiple": 32}; empty: none.
    config.data.resize_schedule = ConfigDict()
    config.data.channels = 3  # or 1: grey
    config.data.mean = IMAGENET_MEAN  # of each channel, for pixels from 0 to 1
    config.data.std = IMAGENET_STD
    config.data.train_crop = "random_resized"  # or pad, center, short_side
    config.data.scale = (0.08, 1.0)  # random_resized: fraction of the area
    config.data.ratio = (3 / 4, 4 / 3)  # random_resized: width / height
    config.data.pad = 4  # pad: pixels on each side
    config.data.pad_mode = "zero"  # pad: or reflect
    config.data.short_side = (256, 480)  # short_side: smallest and largest, in pixels
    config.data.flip = True  # mirrors half of the training images
    # timm's rand-m7-mstd0.5-inc1 or original; torchvision's torchvision_rand_n2_m9,
    # trivial_wide, auto_imagenet, auto_cifar10 or augmix; empty: none.
    config.data.policy = ""
    # Strengths of brightness, contrast, saturation and hue.
    config.data.color_jitter = (0.0, 0.0, 0.0, 0.0)
    config.data.lighting = 0.0  # standard deviation of PCA noise; 0: none
    config.data.erase = 0.0  # probability of random erasing
    config.data.erase_mode = "constant"  # fills with the mean colour; or pixel: noise
    config.data.erase_count = 1  # largest number of rectangles
    config.data.colout = 0.0  # fraction of the rows and columns that are dropped
    # Repeated augmentation: how often an image comes in a row, augmented differently.
    config.data.repeats = 1
    config.data.eval_size = 0  # image size of evaluations; 0: data.image_size
    config.data.crop_fraction = 0.875  # evaluation: central crop of 224 of 256
    # Or bicubic, both as in Pillow; tf_bilinear, tf_bicubic: as in tf.image.resize,
    # also with the ending _antialias.
    config.data.interpolation = "bilinear"
    config.data.decode = "fast"  # or exact: random crops as Pillow makes them
    # Keeps decoded images of at most 64 px in memory if there is room; or ram: images
    # of any size; none.
    config.data.cache = "small"
    config.data.num_workers = -1  # processes that decode; 0: none; -1: by the cores
    config.data.num_threads = 0  # threads of each process; 0: by the cores
    config.data.on_bad_image = "stop"  # or skip, which counts them

    config.optim = old_keys.Optim()
    config.optim.name = "sgd"  # or lars, lamb, adam, adamw, keras_adam, rmsprop_tf
    config.optim.learning_rate = 0.1  # for a batch of learning_rate_batch images
    config.optim.learning_rate_batch = 256  # scales the rate linearly; 0: not scaled
    # Or step, constant, polynomial, triangular, plateau.
    config.optim.schedule = "cosine"
    config.optim.schedule_length = ConfigDict()  # a duration; empty: the whole run
    config.optim.end_learning_rate = 0.0  # cosine, polynomial, triangular
    config.optim.power = 2.0  # polynomial: the exponent
    config.optim.decay_at = ()  # step: durations from the start of the run
    config.optim.decay_factor = 0.1  # step, plateau
    config.optim.patience = 10  # plateau: evaluations without a new best
    config.optim.per_epoch = False  # keeps the rate constant within an epoch
    config.optim.warmup = ConfigDict({"epochs": 5})
    config.optim.warmup_from = 0.0  # learning rate at step 0
    # The schedule begins after the warm-up; False: at step 0, as in timm.
    config.optim.warmup_prefix = True
    config.optim.momentum = 0.9  # sgd, lars, rmsprop_tf
    config.optim.nesterov = True  # sgd, lars
    # Applies the learning rate after the momentum (torch) or before it (caffe); empty:
    # torch for sgd, caffe for others.
    config.optim.momentum_form = ""
    config.optim.betas = (0.9, 0.999)  # adam and its variants, lamb: both decay rates
    config.optim.eps = 0.0  # added to the divisor; 0: the optimiser's own default
    config.optim.weight_decay = 1e-4
    # L2 regularisation; or decoupled (scaled by the rate), or schedule (scaled by the
    # rate / its peak).
    config.optim.decay = "coupled"
    # Parameters without weight decay; or norm, norm+bias, ndim<=1.
    config.optim.weight_decay_exclude = "none"
    config.optim.layer_decay = 1.0  # ratio of the rates of a layer and the next one
    config.optim.clip_norm = 0.0  # largest norm of the gradient; 0: any (lamb: 1)
    # Adaptive clipping: largest norm of a unit's gradient / the unit's norm; 0: none.
    config.optim.agc = 0.0
    config.optim.sam_rho = 0.0  # radius of sharpness-aware minimisation; 0: none
    config.optim.sam_every = 1  # steps from one sharpness-aware step to the next
    config.optim.microbatches = 1  # parts of a batch whose gradients are accumulated
    config.loss = "cross_entropy"  # or binary_cross_entropy
    config.label_smoothing = 0.0
    # Binary cross entropy: targets above it become 1, others 0; 0: as they are.
    config.bce_target_threshold = 0.0
    config.bce_sum_classes = False  # sums over the classes instead of their mean

    config.mix = ConfigDict()  # mixing of images
    config.mix.mixup_alpha = 0.0  # 0: no mixup
    config.mix.cutmix_alpha = 0.0  # 0: no CutMix
    config.mix.probability = 1.0  # probability that a ghost batch is mixed
    config.mix.switch_probability = 0.5  # probability of CutMix where both are on
    config.mix.rule = "timm"  # how partners are chosen; or torchvision

    config.distill = ConfigDict()
    config.distill.teacher = ""  # a name from the zoo; empty: no distillation
    config.distill.overrides = ConfigDict()  # as model.overrides, for the teacher
    # The teacher's weights, as init_from; 'drawn': randomly initialised, for trials.
    config.distill.teacher_init = ""
    config.distill.weight = 0.5  # weight of distillation in the loss
    config.distill.temperature = 1.0

    # Decay rate of the EMA of parameters and running statistics; 0: no EMA.
    config.ema_decay = 0.0
    config.ema_every = 1  # steps between two updates of the EMA
    # How the EMA forgets its initial values: tf, timm, copy (during the warm-up), none.
    config.ema_warmup = "tf"
    # Precise batch norm: training batches over which the final statistics are
    # computed; 0: running statistics.
    config.precise_bn = 0

    config.evaluate = ConfigDict()
    config.evaluate.every = ConfigDict({"epochs": 1})
    config.evaluate.batch_size = 0  # 0: as in training
    config.evaluate.views = "one"  # views of each image; or flip (two), ten_crop
    config.evaluate.sets = ()  # more to evaluate: imagenet_a, imagenet2012_real, ...
    config.checkpoint = ConfigDict()
    config.checkpoint.every = ConfigDict({"epochs": 1})
    config.checkpoint.keep_last = 2
    config.checkpoint.keep_best = 1
    config.lock()
    # A recipe may add entries to these, which are empty here.
    for value in (
        *(config.model.overrides, config.distill.overrides),
        *(config.data.resize_schedule, config.optim.schedule_length),
    ):
        value.unlock()
    return config
