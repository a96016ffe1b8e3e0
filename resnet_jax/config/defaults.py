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
# The number of pixels beyond which Pillow rejects an image by default.
MAX_PIXELS = 178_956_970


def literal(value: Any) -> ml_collections.FieldReference:
    """Returns a config value that values of any type may replace, as 32 or 'global'."""
    return ml_collections.FieldReference(value, field_type=object)


def get_config() -> ConfigDict:
    """Returns the defaults, locked, so that setting an unknown key is an error.

    The comment of a key says what it does, and lists the other values that it may have.
    `resnet_jax/config/values.py` has the range of each number.
    """
    config = old_keys.Config()
    config.seed = 0  # seed of all random numbers of the run, less than 2**32
    config.batch_size = 256  # images per step, over all devices
    config.total = ConfigDict({"epochs": 90})  # duration: length of the run
    # Duration between two log lines; 0: only at the end.
    config.log_every = ConfigDict({"steps": 50})

    config.model = old_keys.Model()
    config.model.name = "resnet50"  # a name from `python -m resnet_jax.zoo`
    # Fields of the network's spec to replace, such as {"drop_path": 0.1}; see
    # resnet_jax/models/spec.py.
    config.model.overrides = ConfigDict()
    config.model.dtype = "float32"  # type of the computation; or bfloat16
    # Compiles equal blocks only once, which shortens the compilation of deep networks.
    config.model.scan_blocks = False
    # Ghost batch size: the number of examples that share batch-norm statistics; or
    # 'global' (all examples of a microbatch), or 'device' (those of a microbatch that
    # one device holds).
    config.model.bn_group_size = literal(32)
    # Fuses the last convolution of bottlenecks with its batch norm, which saves reads
    # and writes of memory, where devices hold complete ghost batches: True, False, or
    # 'chip' (True in bfloat16 on TPUs, otherwise False).
    config.model.fused_norm = literal("chip")

    config.sharding = ConfigDict()
    # replicated: every device holds all parameters. Or fsdp, for networks that do not
    # fit otherwise: parameters, the optimiser's state and the EMA are sharded over the
    # devices, and parameters are all-gathered before they are used.
    config.sharding.params = "replicated"

    # Options of XLA's compiler for the steps: a dictionary; or 'chip', the options that
    # resnet_jax/compiler/options.py has for the chip.
    config.compiler_options = literal("chip")

    # Initial weights: a file, a workdir or timm:NAME.TAG; empty: randomly initialised.
    config.init_from = ""

    config.data = ConfigDict()
    # tfds:NAME, tfds:DIRECTORY, folder:PATH, digits or fake; or several sources by
    # weight, such as mix:3*tfds:NAME,1*folder:PATH; see resnet_jax/data/sources.py.
    config.data.source = "tfds:imagenet2012"
    config.data.eval_source = ""  # source of the eval split; empty: data.source
    config.data.data_dir = ""  # directory of tfds's data sets; empty: tfds's default
    config.data.train_split = "train"  # or a part of it: train[:10%]
    config.data.eval_split = "validation"
    config.data.shots = 0  # training images per class, chosen by the seed; 0: all
    config.data.image_size = 224  # height and width of training images, in pixels
    # Progressive resizing from `first` to `last` pixels between two durations from the
    # start of the run, with sizes that are multiples of `multiple`: {"first": 160,
    # "last": 192, "start": {"epochs": 65}, "end": {"epochs": 76}, "multiple": 32};
    # empty: one size.
    config.data.resize_schedule = ConfigDict()
    config.data.channels = 3  # 3 (RGB) or 1 (grey)
    config.data.mean = IMAGENET_MEAN  # mean of each channel, for pixels from 0 to 1
    config.data.std = IMAGENET_STD  # standard deviation of each channel
    # random_resized, pad, center or short_side, see resnet_jax/data/augment.py. A
    # comment below that begins with one of them describes a key that only it reads.
    config.data.train_crop = "random_resized"
    # random_resized: smallest and largest fraction of the image's area.
    config.data.scale = (0.08, 1.0)
    # random_resized: smallest and largest width / height.
    config.data.ratio = (3 / 4, 4 / 3)
    config.data.pad = 4  # pad: pixels on each side
    config.data.pad_mode = "zero"  # pad: fills with zeros; or reflect
    # short_side: smallest and largest length of the image's shorter side, in pixels.
    config.data.short_side = (256, 480)
    config.data.flip = True  # mirrors half of the training images
    # Policy of random operations: timm's rand-m7-mstd0.5-inc1 or original;
    # torchvision's torchvision_rand_n2_m9, trivial_wide, auto_imagenet, auto_cifar10 or
    # augmix; empty: none. resnet_jax/data/policies.py describes the names.
    config.data.policy = ""
    # Strengths of random brightness, contrast, saturation and hue; 0: unchanged.
    config.data.color_jitter = (0.0, 0.0, 0.0, 0.0)
    config.data.lighting = 0.0  # standard deviation of PCA noise; 0: none
    config.data.erase = 0.0  # probability that an image has random rectangles erased
    config.data.erase_mode = "constant"  # fills with the mean colour; or pixel: noise
    config.data.erase_count = 1  # largest number of rectangles
    config.data.colout = 0.0  # fraction of the rows and columns that are dropped
    # Repeated augmentation: the number of times in a row that an image comes, each time
    # augmented differently.
    config.data.repeats = 1
    config.data.eval_size = 0  # image size of evaluations; 0: data.image_size
    # Evaluation: side of the central crop / shorter side of the resized image; 0.875
    # crops 224 of 256 pixels.
    config.data.crop_fraction = 0.875
    # bilinear or bicubic, as in Pillow; or tf_bilinear, tf_bicubic,
    # tf_bilinear_antialias or tf_bicubic_antialias, as in tf.image.resize.
    config.data.interpolation = "bilinear"
    # fast: OpenCV resizes random crops; or exact: Pillow does.
    config.data.decode = "fast"
    # small: keeps decoded images of at most 64 px in memory if there is room; or ram:
    # images of any size; or none.
    config.data.cache = "small"
    # Worker processes that decode images; 0: threads of the main process alone; -1:
    # chosen by the number of cores.
    config.data.num_workers = -1
    config.data.num_threads = 0  # threads of each process; 0: chosen by the cores
    # stop: an image that cannot be decoded ends the run; or skip: it is skipped and
    # counted.
    config.data.on_bad_image = "stop"
    # An image file that claims more pixels cannot be decoded.
    config.data.max_pixels = MAX_PIXELS

    config.optim = old_keys.Optim()
    config.optim.name = "sgd"  # or lars, lamb, adam, adamw, keras_adam, rmsprop_tf
    config.optim.learning_rate = 0.1  # for a batch of learning_rate_batch images
    # The rate is multiplied by batch_size / learning_rate_batch; 0: it is not scaled.
    config.optim.learning_rate_batch = 256
    # cosine, step, constant, polynomial, triangular or plateau. A comment below that
    # begins with some of them describes a key that only they read.
    config.optim.schedule = "cosine"
    config.optim.schedule_length = ConfigDict()  # a duration; empty: the whole run
    config.optim.end_learning_rate = 0.0  # cosine, polynomial, triangular: at the end
    config.optim.power = 2.0  # polynomial: the exponent
    config.optim.decay_at = ()  # step: durations from the start of the run
    config.optim.decay_factor = 0.1  # step, plateau: factor of the rate at each decay
    # plateau: the rate decays after more than this many evaluations without a new best.
    config.optim.patience = 10
    config.optim.per_epoch = False  # keeps the rate constant within an epoch
    config.optim.warmup = ConfigDict({"epochs": 5})  # duration of the linear warm-up
    config.optim.warmup_from = 0.0  # learning rate at step 0, if there is a warm-up
    # The schedule begins after the warm-up; False: at step 0, as in timm.
    config.optim.warmup_prefix = True
    config.optim.momentum = 0.9  # decay rate of sgd, lars and rmsprop_tf
    config.optim.nesterov = True  # Nesterov momentum of sgd and lars
    # Applies the learning rate after the momentum (torch) or before it (caffe); empty:
    # torch for sgd, caffe for others.
    config.optim.momentum_form = ""
    # Decay rates of both moments of lamb, adam, adamw and keras_adam.
    config.optim.betas = (0.9, 0.999)
    config.optim.eps = 0.0  # added to the divisor; 0: the optimiser's own default
    config.optim.weight_decay = 1e-4  # coefficient; 0: none
    # coupled: L2 regularisation; or decoupled: scaled by the learning rate; or
    # schedule: scaled by the learning rate / its peak.
    config.optim.decay = "coupled"
    # Parameters without weight decay: none, norm (scale and bias of norms), norm+bias
    # (these and all biases), or ndim<=1 (all vectors and scalars).
    config.optim.weight_decay_exclude = "none"
    # Learning rate of a layer / that of the next layer; 1: all layers have one rate.
    config.optim.layer_decay = 1.0
    # Gradients are clipped to this L2 norm; 0: not clipped (lamb: clipped to 1).
    config.optim.clip_norm = 0.0
    # Adaptive gradient clipping: largest norm of a unit's gradient / norm of the unit's
    # weights; 0: none.
    config.optim.agc = 0.0
    config.optim.sam_rho = 0.0  # radius of sharpness-aware minimisation; 0: none
    config.optim.sam_every = 1  # steps from one sharpness-aware step to the next
    config.optim.microbatches = 1  # parts of a batch whose gradients are accumulated
    config.loss = "cross_entropy"  # or binary_cross_entropy
    config.label_smoothing = 0.0  # weight that is spread evenly over all classes
    # binary_cross_entropy: targets above it become 1, others 0; 0: targets are kept.
    config.bce_target_threshold = 0.0
    # binary_cross_entropy: sums over the classes instead of taking their mean.
    config.bce_sum_classes = False

    config.mix = ConfigDict()  # mixup and CutMix of images of the same ghost batch
    config.mix.mixup_alpha = 0.0  # alpha of mixup's Beta(alpha, alpha); 0: no mixup
    config.mix.cutmix_alpha = 0.0  # alpha of CutMix's Beta(alpha, alpha); 0: no CutMix
    config.mix.probability = 1.0  # probability that a ghost batch is mixed
    config.mix.switch_probability = 0.5  # probability of CutMix where both are on
    # timm: an image's partner is the one at its place in the reversed ghost batch; or
    # torchvision: the image before it.
    config.mix.rule = "timm"

    config.distill = ConfigDict()
    config.distill.teacher = ""  # a name from the zoo; empty: no distillation
    config.distill.overrides = ConfigDict()  # as model.overrides, for the teacher
    # The teacher's weights, as init_from; 'drawn': randomly initialised, for trials.
    config.distill.teacher_init = ""
    config.distill.weight = 0.5  # weight of distillation in the loss, from 0 to 1
    config.distill.temperature = 1.0  # temperature of both softmaxes

    # Decay rate of the EMA of parameters and running statistics; 0: no EMA.
    config.ema_decay = 0.0
    config.ema_every = 1  # steps between two updates of the EMA
    # How the EMA forgets its initial values: tf or timm (the decay rate grows as in
    # TensorFlow or timm), copy (the EMA is a copy of the parameters during the learning
    # rate's warm-up), or none.
    config.ema_warmup = "tf"
    # Precise batch norm: training batches over which the final statistics are
    # computed; 0: running statistics.
    config.precise_bn = 0

    config.evaluate = ConfigDict()
    # Duration between evaluations; 0: only at the end.
    config.evaluate.every = ConfigDict({"epochs": 1})
    config.evaluate.batch_size = 0  # images over all devices; 0: batch_size
    config.evaluate.views = "one"  # views of each image; or flip (two), ten_crop
    # Further sets to evaluate, such as ("imagenet_a", "imagenet2012_real"); see
    # resnet_jax/data/evalsets.py.
    config.evaluate.sets = ()
    config.checkpoint = ConfigDict()
    # Duration between checkpoints; 0: only at evaluations and at the end.
    config.checkpoint.every = ConfigDict({"epochs": 1})
    config.checkpoint.keep_last = 2  # number of the newest checkpoints to keep
    # Number of those with the highest top-1 to keep; 0: none.
    config.checkpoint.keep_best = 1
    config.lock()
    # A recipe may add entries to these, which are empty here.
    for value in (
        *(config.model.overrides, config.distill.overrides),
        *(config.data.resize_schedule, config.optim.schedule_length),
    ):
        value.unlock()
    return config
