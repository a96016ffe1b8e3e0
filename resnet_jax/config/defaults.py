"""Defaults of every config: ResNet-50 on ImageNet, SGD, one line a key.

A recipe starts from `get_config()` and says how it differs. Every key can be set on
the command line: `--config.optim.learning_rate=0.2`, `--config.total.epochs=30`.
A duration is written `{'epochs': 90}`, `{'steps': 500}` or `{'examples': 1e6}`.
"""

import ml_collections
from ml_collections import ConfigDict

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def literal(value) -> ml_collections.FieldReference:
    """A config value whose overrides may have another type, such as 32 or 'global'."""
    return ml_collections.FieldReference(value, field_type=object)


def get_config() -> ConfigDict:
    """Returns the defaults, locked: to set a key that there is not is an error."""
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 256  # images a step, over all devices
    config.total = ConfigDict({"epochs": 90})
    config.log_every = ConfigDict({"steps": 50})

    config.model = ConfigDict()
    config.model.name = "resnet50"
    config.model.overrides = ConfigDict()  # fields of ResNetSpec to replace
    config.model.dtype = "float32"  # of the computation: float32 or bfloat16
    # Equal blocks are compiled once: for deep networks, which else compile for long.
    config.model.scan_blocks = False
    # Examples that share batch-norm statistics, or 'global', or 'device'.
    config.model.bn_group_size = literal(32)

    # Whether bottlenecks' last convolutions leave no output behind, which saves reads
    # and writes of memory (kernels/tpu/norm.py), or 'chip': in bfloat16 on TPUs. They
    # leave it where devices do not hold whole batch-norm groups.
    config.model.unwritten = literal("chip")

    config.sharding = ConfigDict()
    # Or fsdp: each device keeps a part of parameters, optimiser and average only, and
    # gets the others when it needs them: for networks that else do not fit.
    config.sharding.params = "replicated"

    # Options of XLA's compiler for the steps, or 'chip': those of resnet_jax/compiler/.
    config.compiler_options = literal("chip")

    # Weights to start from: a file, a workdir or timm:NAME.TAG; empty: drawn.
    config.init_from = ""

    config.data = ConfigDict()
    config.data.source = "tfds:imagenet2012"  # or mix:3*tfds:NAME,1*folder:PATH, ...
    config.data.eval_source = ""  # empty: as data.source
    config.data.data_dir = ""  # where tfds keeps its data sets; empty: its default
    config.data.train_split = "train"  # or a part of it: train[:10%]
    config.data.eval_split = "validation"
    config.data.shots = 0  # training images of each class, drawn by the seed; 0: all
    config.data.image_size = 224
    # Progressive resizing: {"first": 160, "last": 192, "start": {"epochs": 65}, "end":
    # {"epochs": 76}, "multiple": 32}; empty: none.
    config.data.resize_schedule = ConfigDict()
    config.data.channels = 3
    config.data.mean = IMAGENET_MEAN
    config.data.std = IMAGENET_STD
    config.data.train_crop = "random_resized"  # or pad, center, short_side
    config.data.scale = (0.08, 1.0)  # random_resized: part of the area
    config.data.ratio = (3 / 4, 4 / 3)  # random_resized: width / height
    config.data.pad = 4  # pad: pixels on each side
    config.data.pad_mode = "zero"  # pad: or reflect
    config.data.short_side = (256, 480)  # short_side: least and most, in pixels
    config.data.flip = True
    # timm's rand-m7-mstd0.5-inc1 or original; torchvision's torchvision_rand_n2_m9,
    # trivial_wide, auto_imagenet, auto_cifar10 or augmix.
    config.data.policy = ""
    # Brightness, contrast, saturation, hue.
    config.data.color_jitter = (0.0, 0.0, 0.0, 0.0)
    config.data.lighting = 0.0  # standard deviation of PCA noise; 0: none
    config.data.erase = 0.0  # probability of random erasing
    config.data.erase_mode = "constant"  # the mean colour; or pixel: noise
    config.data.erase_count = 1  # most rectangles
    config.data.colout = 0.0  # part of the rows and columns that are dropped
    config.data.repeats = 1  # times that an image comes in a row, augmented anew
    config.data.eval_size = 0  # 0: as data.image_size
    config.data.crop_fraction = 0.875  # evaluation: 224 of 256
    # Or bicubic, both as Pillow; tf_bilinear, tf_bicubic: as tf.image.resize, or with
    # _antialias behind.
    config.data.interpolation = "bilinear"
    config.data.decode = "fast"  # or exact: random crops as Pillow makes them
    # Decoded into memory: images of at most 64 px if there is room, any (ram), or none.
    config.data.cache = "small"
    config.data.num_workers = -1  # processes that decode; 0: none; -1: by the cores
    config.data.num_threads = 0  # of each process; 0: by the cores
    config.data.on_bad_image = "stop"  # or skip, which counts them

    config.optim = ConfigDict()
    config.optim.name = "sgd"  # or lars, lamb, adam, adamw, keras_adam, rmsprop_tf
    config.optim.learning_rate = 0.1  # for a batch of learning_rate_batch
    config.optim.learning_rate_batch = 256  # scaled linearly; 0: not scaled
    # Or step, constant, polynomial, triangular, plateau.
    config.optim.schedule = "cosine"
    config.optim.schedule_length = ConfigDict()  # a duration; empty: the run
    config.optim.end_learning_rate = 0.0  # cosine, polynomial, triangular
    config.optim.power = 2.0  # polynomial
    config.optim.decay_at = ()  # step: durations from the start
    config.optim.decay_factor = 0.1  # step, plateau
    config.optim.patience = 10  # plateau: evaluations without a better one
    config.optim.per_epoch = False  # the rate is constant within an epoch
    config.optim.warmup = ConfigDict({"epochs": 5})
    config.optim.warmup_from = 0.0  # learning rate at step 0
    # The schedule begins behind the warm-up; False: at step 0, as in timm.
    config.optim.warmup_prefix = True
    config.optim.momentum = 0.9  # sgd, lars, rmsprop_tf
    config.optim.nesterov = True  # sgd, lars
    # The rate is outside of the momentum (torch) or inside (caffe); empty: outside for
    # sgd, inside for others.
    config.optim.momentum_form = ""
    config.optim.betas = (0.9, 0.999)  # adam and its like, lamb: of the two moments
    config.optim.rms_decay = 0.9  # rmsprop_tf: of the squares
    config.optim.eps = 0.0  # in the divisor; 0: 1e-8, or the optimiser's own
    config.optim.trust_coefficient = 0.001  # lars
    config.optim.weight_decay = 1e-4
    # Or decoupled (scaled by the rate), schedule (by the rate / its peak).
    config.optim.decay = "coupled"
    config.optim.weight_decay_exclude = "none"  # or norm, norm+bias, ndim<=1
    config.optim.layer_decay = 1.0  # of the rate, from each layer to the one before
    config.optim.clip_norm = 0.0  # of the gradient; 0: not clipped (lamb: at 1)
    config.optim.agc = 0.0  # adaptive clipping, as part of a unit's norm; 0: none
    config.optim.sam_rho = 0.0  # sharpness-aware minimisation; 0: none
    config.optim.sam_every = 1  # steps
    config.optim.microbatches = 1  # parts of a batch whose gradients are added
    config.loss = "cross_entropy"  # or binary_cross_entropy
    config.label_smoothing = 0.0
    config.bce_target_threshold = 0.0  # targets above it are 1, others 0; 0: as is
    config.bce_sum_classes = False  # the sum over the classes, not their mean

    config.mix = ConfigDict()
    config.mix.mixup_alpha = 0.0  # 0: no mixup
    config.mix.cutmix_alpha = 0.0  # 0: no CutMix
    config.mix.probability = 1.0  # of mixing a batch-norm group
    config.mix.switch_probability = 0.5  # of CutMix where there are both
    config.mix.rule = "timm"  # or torchvision

    config.distill = ConfigDict()
    config.distill.teacher = ""  # of the zoo; empty: none
    config.distill.overrides = ConfigDict()  # as model.overrides, of the teacher
    config.distill.teacher_init = ""  # its weights, as init_from; drawn: none, to try
    config.distill.weight = 0.5  # of its part of the loss
    config.distill.temperature = 1.0

    config.ema_decay = 0.0  # of parameters and running statistics; 0: none
    config.ema_every = 1  # steps
    # How the average forgets its start: tf, timm, copy (until warmed up), none.
    config.ema_warmup = "tf"
    # Training batches that the final statistics of batch norm are computed anew from.
    config.bn_recompute = 0

    config.evaluate = ConfigDict()
    config.evaluate.every = ConfigDict({"epochs": 1})
    config.evaluate.batch_size = 0  # 0: as in training
    config.evaluate.views = "one"  # of each image; or flip: both; ten_crop
    config.evaluate.sets = ()  # more to evaluate: imagenet_a, imagenet2012_real, ...
    config.checkpoint = ConfigDict()
    config.checkpoint.every = ConfigDict({"epochs": 1})
    config.checkpoint.keep_last = 2
    config.checkpoint.keep_best = 1
    config.lock()
    # These are empty here; a recipe may fill them entry by entry.
    for value in (
        *(config.model.overrides, config.distill.overrides),
        *(config.data.resize_schedule, config.optim.schedule_length),
    ):
        value.unlock()
    return config
