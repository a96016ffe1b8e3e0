"""What follows from a config on these devices, before anything is computed."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_jax.compiler import compile_step
from resnet_jax.config.durations import in_steps, to_steps
from resnet_jax.data.augment import TRAIN_CROPS
from resnet_jax.data.cache import MODES as CACHES
from resnet_jax.data.cache import cached
from resnet_jax.data.evalsets import EvaluationSet
from resnet_jax.data.loader import (
    Batches,
    Examples,
    ResizeSchedule,
    eval_batches,
    train_batches,
)
from resnet_jax.data.sources import NamedSource
from resnet_jax.errors import UserError, check_known
from resnet_jax.kernels import platforms
from resnet_jax.models import create_model, get_spec
from resnet_jax.models.cost import cost_of_image, count, init_shapes
from resnet_jax.models.resnet import ResNet
from resnet_jax.parallel import process_memory, sharding
from resnet_jax.persistence.storage import Path
from resnet_jax.training import losses, mixup, optim, schedules, step
from resnet_jax.training.datasets import (
    eval_augment,
    make_resize,
    open_examples,
    train_augment,
)
from resnet_jax.training.step import TrainState

# How many images of each one are evaluated.
VIEWS = {"one": 1, "flip": 2, "ten_crop": 10}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _traced(method: Callable) -> Callable:
    """A method of `Setup` that traces what its devices are to run."""

    @functools.wraps(method)
    def traced(self: "Setup", *args, **kwargs):
        platform = sharding.platform_of(self.mesh)
        with process_memory.gc_paused(), platforms.known(platform):
            return method(self, *args, **kwargs)

    return traced


@dataclasses.dataclass
class Setup:
    """What follows from a config on these devices, before anything is computed.

    Attributes:
      config: of the run.
      mesh: all devices.
      train, test: the examples of the two splits.
      sets: more evaluation sets, by name.
      model: the network.
      total_steps: length of the run.
      schedule: learning rate by step.
      optimizer: of optax.
      init: gives the state before the first step; JAX traces one function once.
      eval_batch_size: images a batch of the evaluation.
      every: steps between two evaluations, checkpoints and log lines.
      resize: progressive resizing, if there is any.
    """

    config: ConfigDict
    mesh: Mesh
    train: Examples
    test: Examples
    sets: dict[str, EvaluationSet]
    model: nn.Module
    total_steps: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    init: Callable[[], TrainState]
    eval_batch_size: int
    every: dict[str, float]
    resize: ResizeSchedule | None = None

    @_traced
    def state_like(self) -> TrainState:
        """Shapes, types and shardings of the train state."""
        return self._placed(jax.eval_shape(self.init))

    def shardings(self) -> TrainState:
        """How the train state lies on the devices."""
        return jax.tree.map(lambda x: x.sharding, self.state_like())

    def _placed(self, state: TrainState) -> TrainState:
        """Shapes of a state with the shardings of `config.sharding.params`."""

        def cut(shapes):
            kind = sharding.PARAMS[self.config.sharding.params]
            return _with_sharding(shapes, functools.partial(kind, self.mesh))

        ema = state.ema
        if ema:
            of_stats = self._replicated(ema["batch_stats"])
            ema = {"params": cut(ema["params"]), "batch_stats": of_stats}
        return TrainState(
            step=self._replicated(state.step),
            params=cut(state.params),
            batch_stats=self._replicated(state.batch_stats),
            opt_state=cut(state.opt_state),
            ema=ema,
        )

    def whole(self, params: step.Tree) -> step.Tree:
        """Parameters to compute with, all of each on every device."""
        return sharding.all_gather_params(
            params, self.mesh, self.config.sharding.params
        )

    @_traced
    def init_state(self) -> TrainState:
        """The state before the first step, on the devices."""
        init = jax.jit(self.init, out_shardings=self.shardings())
        # Optimising what runs once took most of the start on CPUs.
        on_cpu = sharding.platform_of(self.mesh) == "cpu"
        options = {"xla_backend_optimization_level": 0} if on_cpu else None
        return init.lower().compile(compiler_options=options)()

    def state_from(self, variables: dict) -> TrainState:
        """The state before the first step with given variables, on the devices."""
        ema, like = bool(self.config.ema_decay), vars(self.state_like())
        # Each device gets its part only: there may be no room for more.
        placed = sharding.place(variables, {key: like[key] for key in variables})
        return jax.jit(
            lambda variables: step.state_from(variables, self.optimizer, ema=ema),
            out_shardings=self.shardings(),
        )(placed)

    def batch_like(
        self, batch_size: int, *keys: str, examples: Examples | None = None
    ) -> dict:
        """Shapes, types and sharding of a batch, of `train` or others, on devices."""
        examples = examples or self.train
        image = (*examples.augment.shape, examples.channels)
        all_keys = {
            "image": ((batch_size, *image), jnp.uint8),
            "label": ((batch_size, *examples.label_shape), jnp.int32),
            "mask": ((batch_size,), jnp.bool_),
        }
        placed = sharding.batch_sharding(self.mesh)
        return {
            key: jax.ShapeDtypeStruct(*all_keys[key], sharding=placed) for key in keys
        }

    def compile_train_step(self, teacher: dict | None = None) -> Callable:
        """The compiled `train_step(state, batch)`; the state is donated.

        `teacher` are the variables of `config.distill.teacher`, on the devices.
        """
        compiled = self.compile(self.lower_train_step(teacher))
        return functools.partial(compiled, teacher=teacher) if teacher else compiled

    def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Compiles a step with the options of the config; raises UserError for them."""
        kind = self.mesh.devices.flat[0].device_kind
        return compile_step(lowered, kind, self.config.compiler_options)

    @_traced
    def lower_train_step(self, teacher: dict | None = None) -> jax.stages.Lowered:
        """`train_step(state, batch)`, or `(state, batch, teacher=)`, to be compiled.

        `teacher` are the variables of `config.distill.teacher`, or their shapes.
        """
        config = self.config
        warmup = to_steps(
            config.optim.warmup,
            config.batch_size,
            len(self.train.source),
            "optim.warmup",
        )
        placed = sharding.replicated(self.mesh)
        options = step.StepOptions(
            mean=config.data.mean,
            std=config.data.std,
            loss=losses.make_loss(config),
            mix=mixup.Mix.of(config.mix),
            teacher=self.teacher() if teacher else None,
            microbatches=config.optim.microbatches,
            sam_rho=config.optim.sam_rho,
            sam_every=config.optim.sam_every,
            ema_decay=config.ema_decay,
            ema_every=config.ema_every,
            ema_warmup=config.ema_warmup,
            ema_copy_until=warmup,
            seed=config.seed,
            replicate=lambda tree: jax.lax.with_sharding_constraint(tree, placed),
            whole=self.whole,
        )
        train_step = step.make_train_step(self.model, self.optimizer, options)
        out = self.shardings(), placed
        jitted = jax.jit(train_step, donate_argnums=0, out_shardings=out)
        batch = self.batch_like(config.batch_size, "image", "label")
        if not teacher:
            return jitted.lower(self.state_like(), batch)
        # An argument, since constants would be compiled into the program.
        return jitted.lower(self.state_like(), batch, teacher=teacher)

    def teacher(self) -> step.Teacher | None:
        """The network of `config.distill.teacher`, if there is one."""
        distill = self.config.distill
        if not distill.teacher:
            return None
        return step.Teacher(
            model=create_model(
                distill.teacher,
                dtype=self.model.dtype,
                **dict(distill.overrides),
                num_classes=self.model.spec.num_classes,
                in_channels=self.model.spec.in_channels,
            ),
            weight=distill.weight,
            temperature=distill.temperature,
        )

    def teacher_like(self) -> dict | None:
        """Shapes, types and shardings of the teacher's variables, if there is one."""
        teacher = self.teacher()
        if not teacher:
            return None
        shapes = init_shapes(teacher.model, self.config.data.image_size)
        return self._replicated(shapes)

    def _replicated(self, shapes):
        return _with_sharding(shapes, lambda shape: sharding.replicated(self.mesh))

    @_traced
    def compile_statistics_step(self) -> Callable:
        """The compiled `statistics_step(variables, batch)`."""
        config, data = self.config, self.config.data
        statistics_step = step.make_statistics_step(
            self.model, data.mean, data.std, config.seed, self.whole
        )
        jitted = jax.jit(statistics_step, out_shardings=sharding.replicated(self.mesh))
        batch = self.batch_like(config.batch_size, "image", "label")
        like = self.state_like()
        variables = {"params": like.params, "batch_stats": like.batch_stats}
        return self.compile(jitted.lower(variables, batch))

    def compile_eval_step(self) -> Callable:
        """The compiled `eval_step(variables, batch, allowed)`."""
        return self.compile(self.lower_eval_step())

    @_traced
    def lower_eval_step(self) -> jax.stages.Lowered:
        """`eval_step(variables, batch, allowed)`, to be compiled."""
        data = self.config.data
        flip = self.config.evaluate.views != "one"
        eval_step = step.make_eval_step(
            self.model, data.mean, data.std, flip, self.whole
        )
        placed = sharding.replicated(self.mesh), sharding.batch_sharding(self.mesh)
        keys = "image", "label", "mask"
        batch = self.batch_like(self.eval_batch_size, *keys, examples=self.test)
        variables = self.state_like().evaluated()
        allowed = jax.ShapeDtypeStruct(
            (self.model.spec.num_classes,), jnp.bool_, sharding=placed[0]
        )
        jitted = jax.jit(eval_step, out_shardings=placed)
        return jitted.lower(variables, batch, allowed)

    def compile_eval_steps(self) -> dict[tuple, Callable]:
        """Those of the test split and of all sets, by the shape of an image's label."""
        shapes = {self.test.label_shape: self}
        for opened in self.sets.values():
            for examples in opened.parts.values():
                shapes.setdefault(examples.label_shape, self.on(examples))
        return {shape: setup.compile_eval_step() for shape, setup in shapes.items()}

    def on(self, examples: Examples) -> "Setup":
        """This setup with other examples to evaluate."""
        return dataclasses.replace(self, test=examples)

    def train_size(self, step: int) -> int:
        """`data.image_size`, or what the schedule makes of it for a step from 0 on."""
        return self.resize(step) if self.resize else self.config.data.image_size

    def at(self, size: int) -> "Setup":
        """This setup with training images of another size."""
        return dataclasses.replace(self, train=self.train.at(size))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        return self.train.source.classes

    def due(self, what: str, step: int) -> bool:
        """Whether to `evaluate`, write a `checkpoint` or `log` after a step."""
        every = self.every[what]
        # The first step at or behind each multiple, which need not be whole.
        passed = step // every > (step - 1) // every
        return step > 0 and (step == self.total_steps or passed)

    def to_devices(self, batch: dict) -> dict:
        """What the train step needs of a batch, on the devices."""
        needed = {key: batch[key] for key in ("image", "label")}
        return sharding.to_devices(needed, self.mesh, self.config.batch_size)

    @property
    def plateau(self) -> schedules.Plateau | None:
        """What lowers the rate after evaluations, if anything does."""
        of_plateau = self.config.optim.schedule == "plateau"
        return schedules.Plateau(self.config.optim) if of_plateau else None

    @functools.cached_property
    def _held(self) -> NamedSource:
        """The training split, in memory where `data.cache` wants it.

        Not in `set_up`: an evaluation alone would decode what it never reads.
        """
        data = self.config.data
        return cached(self.train.source, data.channels, data.cache)

    def train_batches(self, first_step: int, last_step: int | None = None) -> Batches:
        """Batches from a step to another, or to the end of the run."""
        config = self.config
        return train_batches(
            dataclasses.replace(self.train, source=self._held),
            seed=config.seed,
            batch_size=config.batch_size,
            steps=range(first_step, last_step or self.total_steps),
            rows=sharding.local_rows(self.mesh, config.batch_size),
            num_workers=config.data.num_workers,
            num_threads=config.data.num_threads,
            resize=self.resize,
        )

    def eval_batches(self) -> Batches:
        """Batches that hold the test split once."""
        return eval_batches(
            self.test,
            batch_size=self.eval_batch_size,
            rows=sharding.local_rows(self.mesh, self.eval_batch_size),
            num_workers=self.config.data.num_workers,
            num_threads=self.config.data.num_threads,
        )

    def eval_to_devices(self, batch: dict) -> dict:
        """What the evaluation step needs of a batch, on the devices."""
        needed = {key: batch[key] for key in ("image", "label", "mask")}
        return sharding.to_devices(needed, self.mesh, self.eval_batch_size)


def _with_sharding(shapes, sharding_of: Callable):
    """Shapes with the sharding of each, which is a function of `shape`."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x.shape)),
        shapes,
    )


def set_up(
    config: ConfigDict,
    mesh: Mesh | None = None,
    train: NamedSource | None = None,
    test: NamedSource | None = None,
) -> Setup:
    """Opens the data, makes network and optimiser; computes nothing.

    Args:
      config: see `resnet_jax/config/defaults.py`.
      mesh: of devices that need not be there; None: all of the run.
      train, test: Stand for the splits; see `open_examples`.

    Raises:
      UserError: something in the config cannot be.
    """
    mesh = mesh or sharding.make_mesh()
    _check_values(config, mesh)
    train, test, sets = open_examples(config, train, test)
    train_size = len(train.source)
    total_steps = to_steps(config.total, config.batch_size, train_size, "total")
    if total_steps < 1:
        raise UserError("The run has no steps; config.total must be more than zero.")
    schedule = schedules.make_schedule(
        config, total_steps=total_steps, train_size=train_size
    )
    model = _make_model(config, mesh, train.source)
    microbatch = config.batch_size // config.optim.microbatches
    mixup.check_group(config, model.bn_group_size or microbatch)
    if config.bn_recompute and getattr(model.spec, "norm", None) != "batch":
        raise UserError(
            f"bn_recompute={config.bn_recompute} needs a residual network with batch"
            f" norm, which model.name={config.model.name} is not; set it to 0."
        )
    optimizer = optim.make_optimizer(config, schedule)
    if model.scan_blocks and optim.looks_at_layers(config.optim):
        optimizer = optim.on_single_blocks(optimizer, model.spec)
    durations = {
        "evaluate": (config.evaluate.every, "evaluate.every"),
        "checkpoint": (config.checkpoint.every, "checkpoint.every"),
        "log": (config.log_every, "log_every"),
    }
    return Setup(
        config=config,
        mesh=mesh,
        train=train,
        test=test,
        sets=sets,
        model=model,
        total_steps=total_steps,
        schedule=schedule,
        optimizer=optimizer,
        init=functools.partial(
            step.init_state,
            model,
            optimizer,
            seed=config.seed,
            image_size=config.data.image_size,
            ema=bool(config.ema_decay),
        ),
        eval_batch_size=config.evaluate.batch_size or config.batch_size,
        every={
            what: max(in_steps(duration, config.batch_size, train_size, key), 1.0)
            for what, (duration, key) in durations.items()
        },
        resize=make_resize(config, train_size, total_steps),
    )


def _check_values(config: ConfigDict, mesh: Mesh) -> None:
    """What can be told before the data are opened, which may take long."""
    data = config.data
    for key, value, least in (
        ("batch_size", config.batch_size, 1),
        ("evaluate.batch_size", config.evaluate.batch_size, 0),
        ("seed", config.seed, 0),
        ("bn_recompute", config.bn_recompute, 0),
        ("data.image_size", data.image_size, 1),
        ("data.eval_size", data.eval_size, 0),
        ("data.pad", data.pad, 0),
        ("data.shots", data.shots, 0),
        ("data.num_workers", data.num_workers, -1),
        ("data.repeats", data.repeats, 1),
        ("data.num_threads", data.num_threads, 0),
        ("checkpoint.keep_last", config.checkpoint.keep_last, 1),
        ("optim.learning_rate", config.optim.learning_rate, 0),
    ):
        if value < least:
            raise UserError(f"{key}={value} must be at least {least}.")
    sharding.check_batch_size("batch_size", config.batch_size, mesh)
    if config.evaluate.batch_size:
        key = "evaluate.batch_size"
        sharding.check_batch_size(key, config.evaluate.batch_size, mesh)
    for key, value, known in (
        ("model.dtype", config.model.dtype, DTYPES),
        ("data.on_bad_image", data.on_bad_image, ("stop", "skip")),
        ("data.cache", data.cache, CACHES),
        ("data.train_crop", data.train_crop, TRAIN_CROPS),
        ("evaluate.views", config.evaluate.views, VIEWS),
        ("sharding.params", config.sharding.params, sharding.PARAMS),
    ):
        check_known(f"{key}={value!r}", value, known)
    if data.channels not in (1, 3):
        raise UserError(f"data.channels={data.channels} must be 1 (grey) or 3 (RGB).")
    if not len(data.mean) == len(data.std) == data.channels:
        raise UserError(
            f"data.mean {tuple(data.mean)} and data.std {tuple(data.std)} must have"
            f" data.channels={data.channels} entries each."
        )
    if data.lighting and data.channels != 3:
        raise UserError(
            f"data.lighting={data.lighting} is noise on colours; it must be 0 with"
            f" data.channels={data.channels}."
        )
    train_augment(config)
    eval_augment(config, data.crop_fraction)
    optim.check(config)
    losses.check(config)
    mixup.check(config)
    get_spec(config.model.name, **config.model.overrides)
    if config.distill.teacher:
        get_spec(config.distill.teacher, **config.distill.overrides)


def _make_model(config: ConfigDict, mesh: Mesh, source: NamedSource) -> nn.Module:
    """The network for the classes of a source."""
    on_tpu = sharding.platform_of(mesh) == "tpu"
    group_size = step.group_size_of(
        config.model.bn_group_size,
        batch_size=config.batch_size,
        microbatches=config.optim.microbatches,
        devices=mesh.size,
        tpu_slices=sharding.slice_count(mesh) if on_tpu else 1,
    )
    fields = {
        "num_classes": len(source.classes),
        "in_channels": config.data.channels,
        **config.model.overrides,
    }
    if fields["num_classes"] < len(source.classes):
        raise UserError(
            f"model.overrides.num_classes={fields['num_classes']} is too small:"
            f" {source.where} has {len(source.classes)} classes."
        )
    model = create_model(
        config.model.name,
        dtype=DTYPES[config.model.dtype],
        bn_group_size=group_size,
        scan_blocks=config.model.scan_blocks,
        **fields,
    )
    if isinstance(model, ResNet) and _leaves_unwritten(config, mesh):
        model = model.clone(unwritten=mesh)
    return model


def _leaves_unwritten(config: ConfigDict, mesh: Mesh) -> bool:
    """Whether the network is to have `ResNet.unwritten`."""
    chosen = config.model.unwritten
    if chosen not in ("chip", True, False):
        raise UserError(f"model.unwritten={chosen!r} is not True, False or 'chip'.")
    if chosen == "chip":
        on_tpu = sharding.platform_of(mesh) == "tpu"
        chosen = on_tpu and config.model.dtype == "bfloat16"
    return chosen


def summary(setup: Setup, workdir: Path) -> str:
    """What a user wants to check before a long run."""
    config, mesh, model = setup.config, setup.mesh, setup.model
    size = config.data.image_size
    group = model.bn_group_size or config.batch_size // config.optim.microbatches
    like = setup.state_like()
    macs = cost_of_image(model, size).macs
    device = mesh.devices.flat[0]
    epochs = setup.total_steps * config.batch_size / len(setup.train.source)
    slices = sharding.slice_count(mesh)
    rows = {
        "devices": f"{mesh.size} x {device.device_kind} ({device.platform}),"
        + (f" {slices} slices," if slices > 1 else "")
        + f" {jax.process_count()} process(es), parameters {config.sharding.params}",
        "model": f"{config.model.name}, {count(like.params):,} parameters,"
        f" {macs / 1e6:,.1f} M MACs at {size}x{size}, {config.model.dtype}",
        "train": f"{setup.train.source.where}, {len(setup.train.source):,} images,"
        f" {len(setup.train.source.classes)} classes",
        "eval": f"{setup.test.source.where}, {len(setup.test.source):,} images",
        **{
            f"eval {number}": f"{name}, {len(opened):,} images"
            for number, (name, opened) in enumerate(setup.sets.items(), start=2)
        },
        "batch": f"{config.batch_size} images, {config.batch_size // mesh.size} a"
        f" device, {config.optim.microbatches} microbatch(es)",
        "batch norm": f"groups of {group} images, {config.batch_size // group} a batch"
        if like.batch_stats
        else "none",
        "steps": f"{setup.total_steps:,} ({epochs:.2f} epochs)",
        "workdir": str(workdir),
    }
    if setup.resize:
        sides = setup.resize.sides(range(setup.total_steps))
        rows["sizes"] = ", ".join(map(str, sides)) + " px, in this order"
    return "\n".join(f"{key + ':':<12}{value}" for key, value in rows.items())
