"""The defaults of every config: ResNet-50 on ImageNet with SGD.

A recipe starts from `get_config()` and states how it differs. Every key can be set on
the command line: `--config.optim.learning_rate=0.2`, `--config.total.epochs=30`. A
duration is written `{'epochs': 90}`, `{'steps': 500}`, `{'examples': 1e6}` or, as a
percentage of the run, `{'percent': 5}`.
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

    The comment above a key, or at the end of its line, is its meaning: what it does, in
    which unit, and the other values that it may have. `python -m resnet_jax.keys` and
    `docs/config.md` print all of them, with the types and the ranges of
    `resnet_jax/config/values.py`.

    A comment that begins with names and a colon describes a key that has an effect only
    with these. The names are those of optimisers, schedules, crops or losses, the word
    evaluation, or other keys, which are neither 0 nor empty then.
    """
    config = old_keys.Config()
    config.seed = 0  # seed of all random numbers of the run
    config.batch_size = 256  # images per step, over all devices
    # Length of the run; empty: chosen by the number of training images, 20 epochs with
    # `init_from` and 100 without, but at least 300 or 1,000 steps, and at most 20,000.
    config.total = ConfigDict({"epochs": 90})
    # Interval between two log lines; 0: one line at the end.
    config.log_every = ConfigDict({"steps": 50})

    config.model = old_keys.Model()
    # Name of the network, which `python -m resnet_jax.zoo` lists; empty: the network of
    # the weights of `init_from`, with the fields of its spec, or resnet18.
    config.model.name = "resnet50"
    # Fields of the network's spec to replace, such as `{'drop_path': 0.1}`; see
    # `resnet_jax/models/spec.py`.
    config.model.overrides = ConfigDict()
    # Type of the computation: float32 or bfloat16. Parameters stay in float32.
    config.model.dtype = "float32"
    # Compiles equal blocks only once, which shortens the compilation of deep networks.
    config.model.scan_blocks = False
    # Ghost batch size: the number of examples that share batch-norm statistics. Other
    # values are global (all examples of a microbatch) and device (those of a microbatch
    # that one device holds).
    config.model.bn_group_size = literal(32)
    # Fuses the last convolution of bottlenecks with its batch norm, where devices hold
    # complete ghost batches, which saves reads and writes of memory. The value chip
    # means True in bfloat16 on TPUs, and otherwise False.
    config.model.fused_norm = literal("chip")

    config.sharding = ConfigDict()
    # Placement of the parameters: replicated, or fsdp for networks that do not fit
    # otherwise. With fsdp, parameters, the optimiser's state and the EMA are sharded
    # over the devices, and parameters are all-gathered before they are used.
    config.sharding.params = "replicated"

    # Options of XLA's compiler for the steps: a dictionary; or chip, the options that
    # `resnet_jax/compiler/options.py` has for the chip.
    config.compiler_options = literal("chip")

    # Initial weights: a file, a workdir or `timm:NAME.TAG`; empty: randomly
    # initialised.
    config.init_from = ""

    config.data = ConfigDict()
    # Data set: `tfds:NAME`, `tfds:DIRECTORY`, `folder:PATH`, `csv:FILE`, digits or
    # fake; or several ones by weight, such as `mix:3*tfds:NAME,1*folder:PATH`.
    config.data.source = "tfds:imagenet2012"
    # Data set of the eval split, written as `data.source`; empty: the same data set.
    config.data.eval_source = ""
    config.data.data_dir = ""  # directory of tfds's data sets; empty: tfds's default
    # Split to train on, or a part of one, such as `train[:10%]`; train also finds a
    # split named training.
    config.data.train_split = "train"
    # Split to evaluate on, or a part of one; empty: the first of val, valid,
    # validation, eval, test and testing that the data have, or held_out if they have
    # none; held_out: images that are held out of the training split.
    config.data.eval_split = "validation"
    # Fraction of the images of each class that is held out for evaluation, chosen by
    # the seed, if `data.eval_split` is held_out.
    config.data.eval_fraction = 0.2
    # Draws each class equally often in training, however many images it has.
    config.data.balance = False
    # Number of training images of each class, chosen by the seed; 0: all of them.
    config.data.shots = 0
    # cross_entropy: weights of the classes in the training loss, by their numbers of
    # training images: inverse_frequency, or effective_number (Cui et al. 2019); empty:
    # all classes weigh the same. Evaluations are never weighted.
    config.data.class_weights = ""
    # data.class_weights: beta of effective_number, from 0 (equal weights) up to 1 (the
    # inverse frequency).
    config.data.class_weights_beta = 0.9999
    # Height and width of training images, in pixels; 0: those of the weights of
    # `init_from`, or at most 128.
    config.data.image_size = 224
    # Progressive resizing from first to last pixels, between two durations from the
    # start of the run, in sizes that are multiples of multiple: `{'first': 160, 'last':
    # 192, 'start': {'epochs': 65}, 'end': {'epochs': 76}, 'multiple': 32}`; empty: all
    # images have `data.image_size`.
    config.data.resize_schedule = ConfigDict()
    # Number of channels: 3 (RGB) or 1 (grey); 0: that of the weights of `init_from`, or
    # 3.
    config.data.channels = 3
    # Mean of each channel, for pixels from 0 to 1, which is subtracted from images;
    # empty: that of the weights of `init_from`, or the network's usual one.
    config.data.mean = IMAGENET_MEAN
    # Standard deviation of each channel, by which images are divided; empty: as for
    # `data.mean`.
    config.data.std = IMAGENET_STD
    # Crop of training images: random_resized (a random box, resized), pad (a random
    # crop of the padded image), short_side (a random crop of the image at a random
    # size) or center (the central crop of evaluations).
    config.data.train_crop = "random_resized"
    # random_resized: smallest and largest fraction of the image that the box covers.
    config.data.scale = (0.08, 1.0)
    # random_resized: smallest and largest width / height of the box.
    config.data.ratio = (3 / 4, 4 / 3)
    config.data.pad = 4  # pad: number of pixels that are added on each side
    # pad: the added pixels: zero (black) or reflect (the reflected image).
    config.data.pad_mode = "zero"
    # short_side: smallest and largest length of the image's shorter side, in pixels.
    config.data.short_side = (256, 480)
    config.data.flip = True  # mirrors half of the training images
    # Policy of random operations: timm's `rand-m7-mstd0.5-inc1` or original;
    # torchvision's torchvision_rand_n2_m9, trivial_wide, auto_imagenet, auto_cifar10 or
    # augmix; empty: none. `resnet_jax/data/policies.py` describes the names.
    config.data.policy = ""
    # Strengths of random brightness, contrast, saturation and hue (at most 0.5); 0:
    # unchanged.
    config.data.color_jitter = (0.0, 0.0, 0.0, 0.0)
    # Standard deviation of PCA noise, which adds ImageNet's principal colours to an
    # image with random weights; 0: none.
    config.data.lighting = 0.0
    config.data.erase = 0.0  # probability that an image has random rectangles erased
    # data.erase: content of rectangles: constant (the mean colour) or pixel (noise).
    config.data.erase_mode = "constant"
    config.data.erase_count = 1  # data.erase: largest number of rectangles per image
    # Fraction of the rows and columns that are dropped (ColOut), which makes images
    # smaller; 0: none.
    config.data.colout = 0.0
    # Repeated augmentation: the number of times in a row that an image comes, each time
    # augmented differently.
    config.data.repeats = 1
    # Height and width of evaluated images, in pixels; 0: `data.image_size`.
    config.data.eval_size = 0
    # center or evaluation: side of the central crop / shorter side of the resized
    # image; 0.875 crops 224 of 256 pixels; 0: as for `data.mean`.
    config.data.crop_fraction = 0.875
    # Interpolation of resized images: bilinear or bicubic, as in Pillow; or
    # tf_bilinear, tf_bicubic, tf_bilinear_antialias or tf_bicubic_antialias, as in
    # `tf.image.resize`; empty: as for `data.mean`.
    config.data.interpolation = "bilinear"
    # random_resized: library that resizes crops: fast (OpenCV) or exact (Pillow, as in
    # torchvision).
    config.data.decode = "fast"
    # Decoded images that are kept in memory: small (those of at most 64 px, if there is
    # room), ram (images of any size) or none.
    config.data.cache = "small"
    # Number of worker processes that decode images; 0: threads of the main process
    # alone; -1: chosen by the number of cores.
    config.data.num_workers = -1
    # Number of threads of each process that decodes; 0: chosen by the number of cores.
    config.data.num_threads = 0
    # Action for an image that cannot be decoded: stop (the run ends) or skip (the image
    # is skipped and counted).
    config.data.on_bad_image = "stop"
    # Largest number of pixels of an image; a file that claims more cannot be decoded.
    config.data.max_pixels = MAX_PIXELS

    config.optim = old_keys.Optim()
    # Parameters that are not trained, as their batch-norm statistics: all_but_head,
    # up_to_stem, `up_to_stage2`, or patterns of names such as `stem*,stage1_*`; empty:
    # none.
    config.optim.freeze = ""
    # optim.freeze: time from the start of the run until which they are frozen; empty:
    # the whole run.
    config.optim.freeze_until = ConfigDict()
    # Optimiser: sgd, lars, lamb, adam, adamw, keras_adam or rmsprop_tf.
    config.optim.name = "sgd"
    # Peak of the learning rate, for a batch of `optim.learning_rate_batch` images.
    config.optim.learning_rate = 0.1
    # Number of images of the batch that `optim.learning_rate` is for: the peak is
    # multiplied by `batch_size` / this number; 0: it is not scaled.
    config.optim.learning_rate_batch = 256
    # Peak of the learning rate of the head, scaled and scheduled as
    # `optim.learning_rate`; 0: the head has the same rate as the rest.
    config.optim.head_learning_rate = 0.0
    # Schedule of the learning rate after the warm-up: cosine, polynomial or triangular
    # (linear), which fall until the end; step (falls at `optim.decay_at`); constant;
    # or plateau (falls when evaluations do not improve).
    config.optim.schedule = "cosine"
    # cosine, polynomial or triangular: time from the start of the run at which the
    # learning rate reaches its end; empty: the end of the run.
    config.optim.schedule_length = ConfigDict()
    # cosine, polynomial or triangular: learning rate at the end, which is not scaled by
    # the batch size.
    config.optim.end_learning_rate = 0.0
    # polynomial: exponent of the remaining fraction of the time.
    config.optim.power = 2.0
    # step: times of the decays, from the start of the run, such as `({'epochs': 30},
    # {'epochs': 60})`.
    config.optim.decay_at = ()
    # step or plateau: factor by which each decay multiplies the learning rate.
    config.optim.decay_factor = 0.1
    # plateau: number of evaluations in a row without a new best top-1 that are
    # tolerated; after one more the rate decays.
    config.optim.patience = 10
    # Changes the learning rate once per epoch, to its value at the epoch's first step.
    config.optim.per_epoch = False
    # Duration of the warm-up, in which the learning rate rises linearly to its peak.
    config.optim.warmup = ConfigDict({"epochs": 5})
    # optim.warmup: learning rate at step 0, which is not scaled by the batch size.
    config.optim.warmup_from = 0.0
    # cosine, polynomial or triangular: lets the learning rate fall from the end of the
    # warm-up on; False: from step 0 on, and the warm-up replaces the beginning, as in
    # timm.
    config.optim.warmup_prefix = True
    # sgd, lars or rmsprop_tf: decay rate of the momentum; 0: no momentum.
    config.optim.momentum = 0.9
    config.optim.nesterov = True  # sgd or lars: uses Nesterov momentum
    # sgd, lars or rmsprop_tf: order of momentum and learning rate: torch (the rate is
    # applied after the momentum) or caffe (before it); empty: torch for sgd, caffe for
    # the others.
    config.optim.momentum_form = ""
    # lamb, adam, adamw or keras_adam: decay rates of the first and second moments.
    config.optim.betas = (0.9, 0.999)
    # lars, lamb, adam, adamw, keras_adam or rmsprop_tf: number that is added to the
    # divisor; 0: the optimiser's own default.
    config.optim.eps = 0.0
    config.optim.weight_decay = 1e-4  # coefficient of weight decay; 0: none
    # sgd, adam, adamw, keras_adam or rmsprop_tf: kind of weight decay: coupled (L2
    # regularisation; not for adamw), decoupled (scaled by the learning rate) or
    # schedule (scaled by the learning rate / its peak). With lars and lamb it is always
    # coupled.
    config.optim.decay = "coupled"
    # Parameters without weight decay: none, norm (scale and bias of norms), norm+bias
    # (these and all biases), or `ndim<=1` (all vectors and scalars).
    config.optim.weight_decay_exclude = "none"
    # Learning rate of a layer / that of the next layer; 1: all layers have one rate.
    config.optim.layer_decay = 1.0
    # Largest L2 norm of the gradient, which is clipped to it; 0: not clipped (lamb:
    # clipped to 1).
    config.optim.clip_norm = 0.0
    # Adaptive gradient clipping: largest norm of a unit's gradient / norm of the unit's
    # weights, except in the head; 0: not clipped.
    config.optim.agc = 0.0
    config.optim.sam_rho = 0.0  # radius of sharpness-aware minimisation; 0: none
    # optim.sam_rho: number of steps from one sharpness-aware step to the next.
    config.optim.sam_every = 1
    # Number of equal parts of a batch whose gradients are accumulated.
    config.optim.microbatches = 1
    # Loss function: cross_entropy or binary_cross_entropy.
    config.loss = "cross_entropy"
    # Label smoothing: the weight that is spread evenly over all classes; 0: none.
    config.label_smoothing = 0.0
    # binary_cross_entropy: targets above it become 1, others 0; 0: targets are kept.
    config.bce_target_threshold = 0.0
    # binary_cross_entropy: sums over the classes instead of taking their mean.
    config.bce_sum_classes = False

    config.mix = ConfigDict()
    # Alpha of mixup's Beta(alpha, alpha), which mixes images of the same ghost batch;
    # 0: no mixup.
    config.mix.mixup_alpha = 0.0
    # Alpha of CutMix's Beta(alpha, alpha), which pastes boxes from images of the same
    # ghost batch; 0: no CutMix.
    config.mix.cutmix_alpha = 0.0
    # mix.mixup_alpha or mix.cutmix_alpha: probability that a ghost batch is mixed.
    config.mix.probability = 1.0
    # mix.mixup_alpha and mix.cutmix_alpha: probability of CutMix, otherwise mixup.
    config.mix.switch_probability = 0.5
    # mix.mixup_alpha or mix.cutmix_alpha: partner of an image: timm (the image at its
    # place in the reversed ghost batch) or torchvision (the image before it).
    config.mix.rule = "timm"

    config.distill = ConfigDict()
    # Name of the network that the student learns from, which `python -m resnet_jax.zoo`
    # lists; empty: no distillation.
    config.distill.teacher = ""
    # distill.teacher: fields of the teacher's spec to replace, as in `model.overrides`.
    config.distill.overrides = ConfigDict()
    # distill.teacher: the teacher's weights, written as `init_from`; drawn: randomly
    # initialised, for trials.
    config.distill.teacher_init = ""
    # distill.teacher: weight of distillation in the loss; the labels have the rest.
    config.distill.weight = 0.5
    config.distill.temperature = 1.0  # distill.teacher: temperature of both softmaxes

    # Decay rate of the EMA of parameters and running statistics; 0: no EMA.
    config.ema_decay = 0.0
    config.ema_every = 1  # ema_decay: number of steps between two updates of the EMA
    # ema_decay: way in which the EMA forgets its initial values: tf or timm (the decay
    # rate grows as in TensorFlow or timm), copy (the EMA is a copy of the parameters
    # during the learning rate's warm-up), or none.
    config.ema_warmup = "tf"
    # Precise batch norm: the number of training batches over which the final statistics
    # are computed; 0: running statistics.
    config.precise_bn = 0

    config.evaluate = ConfigDict()
    # Interval between two evaluations; 0: one evaluation at the end.
    config.evaluate.every = ConfigDict({"epochs": 1})
    # Images per evaluation batch, over all devices; 0: `batch_size`.
    config.evaluate.batch_size = 0
    # Views of each image, whose logits are averaged: one, flip (two) or ten_crop (ten).
    config.evaluate.views = "one"
    # Further sets to evaluate, such as `('imagenet_a', 'imagenet2012_real')`; see
    # `resnet_jax/data/evalsets.py`.
    config.evaluate.sets = ()
    config.stop = ConfigDict()
    # Number of evaluations in a row without a new best top-1 that are tolerated; after
    # one more the run ends; 0: the run never ends for this reason.
    config.stop.patience = 0
    # Figures of an evaluation after which the run ends: top1 and top5 (at least these
    # fractions) and loss (at most this), such as `{'top1': 0.95}`, all of which must be
    # reached; empty: none.
    config.stop.target = ConfigDict()
    config.checkpoint = ConfigDict()
    # Interval between two checkpoints; 0: only at evaluations and at the end.
    config.checkpoint.every = ConfigDict({"epochs": 1})
    config.checkpoint.keep_last = 2  # number of the newest checkpoints to keep
    # Number of the checkpoints with the highest top-1 to keep besides; 0: none.
    config.checkpoint.keep_best = 1
    config.lock()
    # A recipe may add entries to these, which are empty here.
    for value in (
        *(config.model.overrides, config.distill.overrides),
        *(config.data.resize_schedule, config.optim.schedule_length),
        *(config.optim.freeze_until, config.stop.target),
    ):
        value.unlock()
    return config
