"""Checkpoints: the whole truth of a run in one Orbax step, checked when it is read.

A checkpoint holds a tree of arrays, the state, and a record in JSON: the `Progress`,
the config, the network's spec, versions, and what the run depends on
(`training/resume.py`). Orbax notices a truncated or missing file, but not a flipped
bit. So the record holds a fingerprint of every array and a checksum of itself, and both
are compared.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import platform
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from resnet_jax.errors import UserError, problem_of_store
from resnet_jax.parallel import processes
from resnet_jax.persistence import orbax_s3, storage
from resnet_jax.persistence.fingerprint import changed_arrays, fingerprint, is_old
from resnet_jax.persistence.storage import Path

log = logging.getLogger(__name__)

Tree = Any
policies = ocp.checkpoint_managers
# Of an array that all processes have, each writes a part from this many bytes on. By
# default all are cut, however small, which takes longer than to write them.
CUT = 2**20
ARRAYS = ocp.type_handlers.create_type_handler_registry(
    (
        jax.Array,
        ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=CUT),
    ),
    (np.ndarray, ocp.type_handlers.NumpyHandler()),
)


@dataclasses.dataclass
class Progress:
    """What a run has done so far, besides its arrays.

    Attributes:
      step: updates made.
      examples: training examples consumed: the loader's position.
      evaluation: result of the last evaluation with its `step`, or None.
      best: result of the best evaluation, or None.
      seconds: time spent in training steps, in this and earlier processes.
      bad_images: indices of the training images that were passed over.
      plateau: what `schedules.Plateau` remembers, or None.
      recomputed: whether the batch-norm statistics are those of `bn_recompute`.
    """

    step: int = 0
    examples: int = 0
    evaluation: dict | None = None
    best: dict | None = None
    seconds: float = 0.0
    bad_images: list[int] = dataclasses.field(default_factory=list)
    plateau: dict | None = None
    recomputed: bool = False


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      directory: The folder that holds them.
      options: `config.checkpoint`, with which the folder is created if it is missing;
        None is for reading alone.
      about: What the record says besides progress and fingerprint: config, spec,
        versions, dependencies.
    """

    def __init__(
        self,
        directory: Path,
        options: ConfigDict | None = None,
        about: dict[str, Any] | None = None,
    ):
        self.directory = storage.absolute(directory)
        self.about = about or {}
        self._saving: int | None = None
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=_kept(options) if options else None,
            # Without it Orbax forgets the metrics when the process ends.
            best_fn=lambda metrics: metrics["top1"],
            # Else Orbax's barriers are collectives of the devices, which take longer.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes=set(range(jax.process_count()))
            ),
            async_options=ocp.options.AsyncOptions(barrier_sync_fn=_meet),
            create=False,
            **orbax_options(directory),
        )
        if options and jax.process_index() == 0:
            storage.make_directory(self.directory)
        if jax.process_count() > 1:
            # The devices connect by it, too: where they first did so in a step, after
            # each process had compiled in its own time, runs lost each other.
            multihost_utils.sync_global_devices("checkpoints")
        self._open()

    def _open(self) -> None:
        # Orbax reads all metrics at once, fails at one that was cut off, and keeps the
        # best by them; what they say stands in the checkpoint's progress too.
        for file in self.directory.glob("*/metrics/metrics"):
            # Others are being written, maybe by a run that is evaluated meanwhile.
            is_finished = file.parents[1].name.isdigit()
            if is_finished and not _are_as_saved(file):
                log.warning("Leaving out %s, which is not as it was saved.", file)
                file.unlink(missing_ok=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=self._options,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(type_handler_registry=ARRAYS),
                "run": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, state: Tree, progress: Progress) -> None:
        """Starts to save; returns when the state is copied and may be donated.

        A checkpoint of the same step is replaced. Raises UserError if this or the save
        before it failed.
        """
        self.wait()
        # Process 0 writes it; others are needed for arrays that are in parts.
        known = state if jax.process_index() == 0 else _in_parts(state)
        record = {
            "progress": dataclasses.asdict(progress),
            "fingerprint": fingerprint(known),
            **self.about,
        }
        record["checksum"] = _checksum_of_record(record)
        evaluation = progress.evaluation
        fresh = evaluation is not None and evaluation["step"] == progress.step
        self._saving = progress.step
        with self._telling_failure():
            if progress.step in self._manager.all_steps():
                self._manager.delete(progress.step)
            self._manager.save(
                progress.step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(_written_here(state)),
                    run=ocp.args.JsonSave(record),
                ),
                metrics=evaluation if fresh else None,
                force=True,
            )

    def wait(self) -> None:
        """Returns when everything is on disk; raises UserError if it could not be."""
        with self._telling_failure():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def is_saving(self) -> bool:
        """Whether the last save is not yet on disk."""
        return self._manager.is_saving_in_progress()

    def check(self) -> None:
        """Raises UserError if a save in the background has failed."""
        with self._telling_failure():
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _telling_failure(self):
        try:
            yield
        except Exception as error:
            steps = [step for step in self.steps() if step != self._saving]
            last = f"that of step {steps[-1]} is whole" if steps else "it was the first"
            in_store = storage.is_remote(self.directory) and problem_of_store(error)
            raise UserError(
                f"The checkpoint of step {self._saving} could not be written to"
                f" {self.directory} ({in_store or _reason(error)}); {last}."
                f" {'Mend that' if in_store else 'Make room, or mend what is named'},"
                " and run the same command again: it goes on from there."
            ) from error

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, in ascending order."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Returns the step of the highest top-1, the last of equal ones, or None."""
        best, highest = None, -1.0
        for step in self.steps():
            try:
                evaluation = self.read(step)["progress"]["evaluation"]
            except DamagedError as error:
                log.warning("%s It is left out.", error)
                continue
            fresh = evaluation and evaluation["step"] == step
            if fresh and evaluation["top1"] >= highest:
                best, highest = step, evaluation["top1"]
        return best

    def newest_record(self) -> dict[str, Any] | None:
        """Returns the newest record that is intact; None if there is none."""
        for step in reversed(self.steps()):
            with contextlib.suppress(DamagedError):
                return self.read(step)
        return None

    def read(self, step: int) -> dict[str, Any]:
        """Returns the record of a checkpoint.

        Raises:
          DamagedError: The record is not as it was saved.
          UserError: The object store does not give it.
        """
        args = ocp.args.Composite(run=ocp.args.JsonRestore())
        record = self._read(step, args).run
        try:
            saved = record.pop("checksum", None)
            intact = record["progress"]["step"] == step
            # Versions before 0.2 wrote none.
            if saved is not None or not is_old(record["fingerprint"]):
                intact &= saved == _checksum_of_record(record)
            Progress(**record["progress"])
        except (KeyError, TypeError, AttributeError):
            intact = False
        if not intact:
            raise DamagedError(
                f"The checkpoint of step {step} in {self.directory} was changed after"
                " it was saved: its record (run/metadata) does not match its checksum"
                " or its step."
            )
        return record

    def restore_latest(self, like: Tree) -> tuple[Tree, Progress] | None:
        """Restores the newest checkpoint that is intact; None if there is none at all.

        Newer ones that are damaged are moved to `damaged/`, and a warning says so.

        Args:
          like: Shapes, dtypes and shardings of the state.

        Raises:
          DamagedError: There are checkpoints, but none is intact.
        """
        damaged: dict[int, DamagedError] = {}
        for step in reversed(self.steps()):
            try:
                progress = Progress(**self.read(step)["progress"])
                restored = self.restore(step, like)
            except DamagedError as error:
                damaged[step] = error
                continue
            for bad_step, error in damaged.items():
                log.warning("%s It was moved to %s.", error, self._set_aside(bad_step))
            return restored, progress
        if damaged:
            raise DamagedError(
                f"{next(iter(damaged.values()))} No older one is intact; restore it"
                f" from a copy, or move {self.directory} away to start again."
            )
        return None

    def restore(self, step: int, like: Any) -> Any:
        """Restores the arrays of one checkpoint.

        Args:
          step: The step of the checkpoint.
          like: Shapes, dtypes and shardings of the state, or of some of its trees by
            name, such as `{"params": ...}`: the others are then not read.

        Raises:
          DamagedError: The checkpoint is not as it was saved.
          UserError: The object store does not give it.
        """
        args = ocp.args.PyTreeRestore(
            like,
            restore_args=ocp.checkpoint_utils.construct_restore_args(like),
            partial_restore=isinstance(like, dict),
        )
        restored = self._read(step, ocp.args.Composite(state=args)).state
        if changed := changed_arrays(restored, self.read(step)["fingerprint"]):
            raise DamagedError(
                f"The checkpoint of step {step} in {self.directory} holds other values"
                f" than were saved, in {changed[0]}."
            )
        return restored

    def _read(self, step: int, args: ocp.args.Composite) -> ocp.args.Composite:
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:
            in_store = storage.is_remote(self.directory) and problem_of_store(error)
            if in_store:
                raise UserError(
                    f"The checkpoint of step {step} cannot be read from"
                    f" {self.directory}: {in_store}."
                ) from error
            raise DamagedError(
                f"The checkpoint of step {step} in {self.directory} cannot be read"
                f" ({_reason(error)})."
            ) from error

    def _set_aside(self, step: int) -> Path:
        aside = self.directory.parent / "damaged"
        target = aside / str(step)
        count = 1
        while target.exists():
            count += 1
            target = aside / f"{step}-{count}"
        if jax.process_index() == 0:
            storage.move_tree(self.directory / str(step), target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set aside")
        self._manager.close()
        self._open()
        return target

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        # What went wrong was told by `wait` or `check`.
        with contextlib.suppress(Exception):
            self._manager.close()


def _are_as_saved(metrics: Path) -> bool:
    """Tells whether the metrics of a checkpoint are those of its record."""
    wrong = (ValueError, KeyError, TypeError, FileNotFoundError)
    try:
        top1 = json.loads(metrics.read_text())["top1"]
    except wrong:
        return False
    try:
        record = json.loads((metrics.parents[1] / "run" / "metadata").read_text())
        return top1 == record["progress"]["evaluation"]["top1"]
    except wrong:
        return isinstance(top1, float)  # who reads the record tells what is wrong


def _kept(options: ConfigDict) -> policies.AnyPreservationPolicy:
    """Which checkpoints `config.checkpoint` keeps: the last ones and the best ones."""
    kept = [policies.LatestN(options.keep_last)]
    if options.keep_best:
        kept.append(
            policies.BestN(
                get_metric_fn=lambda metrics: metrics["top1"],
                n=options.keep_best,
                # By default every checkpoint without metrics would stay.
                keep_checkpoints_without_metrics=False,
            )
        )
    return policies.AnyPreservationPolicy(kept)


def orbax_options(path: Path) -> dict[str, Any]:
    """What Orbax must be told to write at a path."""
    in_s3 = str(path).startswith("s3://")
    return {"atomicity_options": orbax_s3.ATOMICITY} if in_s3 else {}


@contextlib.contextmanager
def open_checkpoints(workdir: Path) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a run for reading.

    Raises UserError if there is no run, or it has no checkpoint yet.
    """
    with storage.telling(workdir):
        there = (workdir / "checkpoints").is_dir()
    if not there:
        raise UserError(f"{workdir} holds no run (there is no {workdir}/checkpoints).")
    with Checkpoints(workdir / "checkpoints") as saved:
        if not saved.steps():
            raise UserError(f"{workdir} holds no checkpoint yet.")
        yield saved


@contextlib.contextmanager
def telling_way_out(checkpoint: Path) -> Iterator[None]:
    """Adds to a `DamagedError` what can be done where a checkpoint is only read."""
    try:
        yield
    except DamagedError as error:
        raise DamagedError(
            f"{error} Restore it from a copy, or move {checkpoint} away to use another"
            " one."
        ) from error


def newest_step(workdir: Path) -> int | None:
    """Step of the newest finished checkpoint of a local workdir, by names of files."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=None)


class DamagedError(UserError):
    """A checkpoint that is not as it was saved."""


def _reason(error: Exception) -> str:
    """The part of a storage error that tells a user something, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    for sign in (
        "No space left on device",
        "File too large",
        "Permission denied",
        "Read-only file system",
        "Disk quota exceeded",
    ):
        if sign in text:
            return sign
    return text[:200]


def _checksum_of_record(record: Mapping[str, Any]) -> str:
    # As it will be read: JSON has no tuples, and its keys are strings.
    record = json.loads(json.dumps(record))
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _meet(*, key: str, timeout_ms: int) -> None:
    """Waits in a save for the other processes, unless the save failed on this one.

    They wait for it elsewhere then, until its error stops them.
    """
    failed = sys.exc_info()[0] is not None
    if processes.count() > 1 and not failed:
        processes.client().wait_at_barrier(key, timeout_ms)


def _in_parts(tree: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if not leaf.is_fully_replicated]


def _written_here(tree: Any) -> Any:
    """A tree with what this process has to write; small arrays are left to process 0.

    Orbax takes None for nothing, and NumPy's arrays for what process 0 writes.
    """
    leaves, structure = jax.tree.flatten(tree)
    small = [
        i for i, x in enumerate(leaves) if x.is_fully_replicated and x.nbytes < CUT
    ]
    values = [None] * len(small)
    if jax.process_index() == 0:
        # Not of the arrays themselves: they would keep a view of what is donated next.
        values = jax.device_get([leaves[i].addressable_data(0) for i in small])
    for i, value in zip(small, values, strict=True):
        leaves[i] = value
    return structure.unflatten(leaves)


def find_versions() -> dict[str, str]:
    """Returns the versions of the packages that a result depends on, by name."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = {name: importlib.metadata.version(name) for name in (*names, "pillow")}
    return {"python": platform.python_version(), **found}
