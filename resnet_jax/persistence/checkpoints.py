"""Checkpoints: the complete state of a run in one Orbax step, verified when it is read.

A checkpoint holds the state, which is a tree of arrays, and a record in JSON: the
`Progress`, the config, the network's spec, versions, and what the run depends on
(`training/resume.py`). Orbax notices a truncated or missing file, but not a flipped
bit. So the record also holds a checksum of every array and one of itself, and both are
compared.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from resnet_jax.console import output
from resnet_jax.errors import UserError, problem_of_store
from resnet_jax.parallel import processes
from resnet_jax.persistence import orbax_s3, storage
from resnet_jax.persistence.array_checksums import changed_arrays, fingerprint, is_old
from resnet_jax.persistence.storage import Path

log = logging.getLogger(__name__)

Tree = Any
# The trees of a state that are needed to compute with the network.
VARIABLES = ("ema", "params", "batch_stats")
# The number of times that a checkpoint is chosen and read while its run replaces it,
# and the seconds between two of them. Removing a checkpoint takes less.
READING_TRIES, READ_AGAIN_AFTER = 10, 1.0
# Replicated arrays of at least this many bytes are written in parts, one per process.
# By default Orbax splits all of them, which takes longer than writing small ones.
SPLIT_BYTES = 2**20
ARRAYS = ocp.type_handlers.create_type_handler_registry(
    (
        jax.Array,
        ocp.type_handlers.ArrayHandler(
            min_slice_bytes_for_replica_parallel=SPLIT_BYTES
        ),
    ),
    (np.ndarray, ocp.type_handlers.NumpyHandler()),
)


@dataclasses.dataclass
class Progress:
    """The part of a run's state that is not an array.

    The names of the fields are keys of the record, and so part of the file format.

    Attributes:
      step: The number of parameter updates.
      examples: The number of training examples consumed, which is the position of the
        loader.
      evaluation: The result of the last evaluation with its `step`, or None.
      best: The result of the best evaluation whose loss is finite, or None.
      seconds: Time spent in training steps, in this and earlier processes.
      bad_images: Indices of the training images that were skipped because they could
        not be decoded.
      plateau: The state of `schedules.Plateau`, or None.
      stopping: The memory of `training/stopping.py`, or None before the first
        evaluation, and in checkpoints of versions without it.
      recomputed: True if the running statistics are those of precise batch norm
        (`config.precise_bn`).
    """

    step: int = 0
    examples: int = 0
    evaluation: dict | None = None
    best: dict | None = None
    seconds: float = 0.0
    bad_images: list[int] = dataclasses.field(default_factory=list)
    plateau: dict | None = None
    recomputed: bool = False
    stopping: dict | None = None


class Checkpoints:
    """The checkpoints of one run, opened for reading or writing; a context manager.

    Args:
      directory: The folder of the checkpoints.
      options: The config's section `checkpoint`: how many checkpoints to keep. The
        folder is created if it is missing. None opens the checkpoints for reading.
      about: Further entries of the record, beside progress and checksums: config,
        spec, versions, dependencies.
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
        self._is_reader = options is None
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=_preservation_policy(options) if options else None,
            # Without `best_fn` Orbax does not save the metrics, and forgets them when
            # the process ends.
            best_fn=lambda metrics: metrics["top1"],
            # By default Orbax's barriers are collectives of the devices, which are
            # slower.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes=set(range(jax.process_count()))
            ),
            async_options=ocp.options.AsyncOptions(barrier_sync_fn=_wait_at_barrier),
            create=False,
            **orbax_options(directory),
        )
        self._names = ocp.path.step.standard_name_format(
            **{
                {"temporary_path_class": "temporary_path_cls"}.get(key, key): option
                for key, option in orbax_options(directory).items()
            }
        )
        self._arrays = ocp.PyTreeCheckpointHandler(type_handler_registry=ARRAYS)
        if options and jax.process_index() == 0:
            with storage.explaining_errors(self.directory):
                storage.make_directory(self.directory)
                for step in self.steps_on_disk():
                    self._repair(self.directory / str(step))
        if jax.process_count() > 1:
            # This also connects the devices. Runs in which they connected in the first
            # step, which the processes reach at different times since each compiles it,
            # lost the connection.
            multihost_utils.sync_global_devices("checkpoints")
        if options:
            self._open()

    def _repair(self, checkpoint: Path) -> None:
        """Makes again the files that Orbax reads of all checkpoints when it opens them.

        It fails at a damaged one, and keeps no checkpoint as one of the best without
        its metrics, which the record holds too.
        """
        facts = checkpoint / "_CHECKPOINT_METADATA"
        try:
            storage.read_object(facts)
        except FileNotFoundError:
            pass
        except UserError as damage:
            storage.set_aside(facts, str(damage))
            storage.write_json(facts, {})
        metrics = checkpoint / "metrics" / "metrics"
        try:
            record = self.read(int(checkpoint.name))
        except DamagedError:
            # It is reported when the record is needed.
            expected = None
        else:
            expected = _fresh_evaluation(record["progress"])
        try:
            top1 = storage.read_object(metrics).get("top1")
            if not isinstance(top1, float) or (expected and top1 != expected["top1"]):
                raise UserError(f"{metrics} is not as it was saved.")
        except FileNotFoundError:
            if not expected:
                return
        except UserError as damage:
            storage.set_aside(metrics, str(damage))
        else:
            return
        if expected:
            storage.make_directory(metrics.parent)
            storage.write_json(metrics, expected)

    def _open(self) -> None:
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=self._options,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(type_handler_registry=ARRAYS),
                "run": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, state: Tree, progress: Progress) -> None:
        """Starts to save, and returns when the state has been copied.

        After that the state may be donated, while the save runs in the background.

        A checkpoint of the same step is replaced.

        Args:
          state: The tree of arrays.
          progress: The progress of the run. A checkpoint whose step has just been
            evaluated can be kept as one of the best.

        Raises:
          UserError: This save or the one before it failed.
        """
        self.wait()
        # Process 0 alone writes the record. The others take part in the checksums of
        # sharded arrays, which are sums over devices.
        local_state = state if jax.process_index() == 0 else _sharded_arrays(state)
        record = {
            "progress": dataclasses.asdict(progress),
            "fingerprint": fingerprint(local_state),
            **self.about,
        }
        # The record as it will be read: JSON has no tuples, keys that are not strings
        # or numbers that are not finite.
        record = json.loads(storage.to_json(record))
        record["checksum"] = _checksum_of_record(record)
        self._saving = progress.step
        with self._explaining_failure():
            if progress.step in self._manager.all_steps():
                self._manager.delete(progress.step)
            self._manager.save(
                progress.step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(_arrays_to_write(state)),
                    run=ocp.args.JsonSave(record),
                ),
                metrics=_fresh_evaluation(record["progress"]),
                force=True,
            )

    def wait(self) -> None:
        """Waits until the last save is finished.

        Raises:
          UserError: The save failed.
        """
        with (
            self._explaining_failure(),
            output.telling(f"Waiting for the checkpoint of step {self._saving}."),
        ):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def is_saving(self) -> bool:
        """Returns whether the last save is not finished yet."""
        return self._manager.is_saving_in_progress()

    def check(self) -> None:
        """Checks on a save that runs in the background.

        Raises:
          UserError: The save has failed.
        """
        with self._explaining_failure():
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _explaining_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            in_store = storage.is_remote(self.directory)
            steps = [
                step
                for step in self.steps()
                # Somebody may have removed the whole directory.
                if step != self._saving
                and (in_store or os.path.isdir(self.directory / str(step)))
            ]
            last, then = "there is no older one", "starts again"
            if steps:
                last = f"the newest intact one is that of step {steps[-1]}"
                then = "resumes from there"
            problem = in_store and problem_of_store(error)
            raise UserError(
                f"The checkpoint of step {self._saving} could not be written to"
                f" {self.directory} ({problem or _reason(error)}); {last}."
                " Fix this (on a full disk, free some space) and run the same command"
                f" again: it {then}."
            ) from error

    def steps(self) -> list[int]:
        """Returns the steps of the finished checkpoints, in ascending order."""
        return (
            self.steps_on_disk()
            if self._is_reader
            else sorted(self._manager.all_steps())
        )

    def steps_on_disk(self) -> list[int]:
        """Returns the steps of the checkpoints that any process has finished."""
        with storage.explaining_errors(self.directory):
            return sorted(found.step for found in self._names.find_all(self.directory))

    def best_step(self) -> int | None:
        """Returns the step with the highest top-1 accuracy, or None if there is none.

        Only checkpoints count that were evaluated at their step, with a finite loss.
        The last of equal ones is returned.
        """
        best, highest = None, -1.0
        for step in self.steps():
            try:
                evaluation = _fresh_evaluation(self.read(step)["progress"])
            except GoneError:
                continue
            except DamagedError as error:
                log.warning("%s It is skipped.", error)
                continue
            if evaluation and evaluation["top1"] >= highest:
                best, highest = step, evaluation["top1"]
        return best

    def newest_record(self) -> dict[str, Any] | None:
        """Returns the newest intact record, or None if there is none."""
        for step in reversed(self.steps()):
            with contextlib.suppress(DamagedError):
                return self.read(step)
        return None

    def read(self, step: int) -> dict[str, Any]:
        """Reads the record of a checkpoint.

        Args:
          step: The step of the checkpoint.

        Returns:
          The record: `progress`, `fingerprint` (a checksum of each array by name) and
          the entries of `about`.

        Raises:
          DamagedError: The record is not as it was saved.
          UserError: The object store refuses to send it.
        """
        path = self.directory / str(step) / "run" / "metadata"
        with self._explaining_damage(step):
            record = storage.read_object(path)
        try:
            saved = record.pop("checksum", None)
            intact = record["progress"]["step"] == step
            # Versions before 0.2 wrote no checksum of the record.
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

    def restore_latest(
        self, like: Tree | Callable[[int], Tree]
    ) -> tuple[Tree, Progress] | None:
        """Restores the newest intact checkpoint.

        Damaged checkpoints that are newer are moved to `damaged/` beside the folder of
        checkpoints, with a warning.

        Args:
          like: Shapes, dtypes and shardings of the state, or a function that returns
            them for the step of a checkpoint.

        Returns:
          The state and the progress, or None if there are no checkpoints.

        Raises:
          DamagedError: There are checkpoints, but none is intact.
        """
        damaged: dict[int, DamagedError] = {}
        for step in reversed(self.steps()):
            try:
                progress = Progress(**self.read(step)["progress"])
                restored = self.restore(step, like(step) if callable(like) else like)
            except DamagedError as error:
                damaged[step] = error
                continue
            for bad_step, damage in damaged.items():
                log.warning("%s It was moved to %s.", damage, self._set_aside(bad_step))
            return restored, progress
        if damaged:
            raise DamagedError(
                f"{next(iter(damaged.values()))} No older one is intact. Restore the"
                f" files from a copy, or move {self.directory} away to start again."
            )
        return None

    def restore(self, step: int, like: Any) -> Any:
        """Restores the arrays of one checkpoint.

        Args:
          step: The step of the checkpoint.
          like: Shapes, dtypes and shardings of the state, or a dictionary of some of
            its trees by name, such as `{"params": ...}`. The other trees are then not
            read.

        Returns:
          Arrays in the structure of `like`.

        Raises:
          DamagedError: The checkpoint is not as it was saved.
          UserError: The object store refuses to send it.
        """
        args = ocp.args.PyTreeRestore(
            like,
            restore_args=ocp.checkpoint_utils.construct_restore_args(like),
            partial_restore=isinstance(like, dict),
        )
        with self._explaining_damage(step), _without_late_errors():
            restored = self._arrays.restore(self._state_of(step), args=args)
        self._check_arrays(step, restored, self.read(step))
        return restored

    def load(self, checkpoint: str = "best") -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads a checkpoint of a run that may be replacing its checkpoints meanwhile.

        If the checkpoint is removed while it is read, another one is chosen. All
        processes of a run read the same checkpoint.

        Args:
          checkpoint: `best` or `last`. The last intact one counts as the best if none
            was evaluated.

        Returns:
          The record, and the trees `params`, `batch_stats` and maybe `ema` of NumPy
          arrays.

        Raises:
          DamagedError: The checkpoint is not as it was saved.
          UserError: The run has no checkpoint, or replaces it again and again.
        """
        failed: int | None = None
        for _ in range(READING_TRIES):
            step = int(
                processes.run_on_lead(
                    "checkpoint", lambda: str(self._choose(checkpoint))
                )
            )
            problem = ""
            try:
                record = self.read(step)
                with self._explaining_damage(step):
                    state = restore_as_numpy(self._state_of(step), VARIABLES)
                self._check_arrays(step, state, record)
            except DamagedError as error:
                problem = str(error)
            try:
                processes.agree("checkpoint read", problem)
                return record, state
            except UserError as error:
                # What fails twice is not about to be replaced.
                if step == failed:
                    raise DamagedError(
                        f"{error} Restore the files from a copy, or move"
                        f" {self.directory / str(step)} away to use another one."
                    ) from error
            failed = step
            time.sleep(READ_AGAIN_AFTER)
        raise UserError(
            f"The run in {self.directory.parent} replaces its checkpoints faster than"
            " they can be read. Read them when it has ended, or let it keep more of"
            " them (--config.checkpoint.keep_last=3)."
        )

    def _choose(self, checkpoint: str) -> int:
        for _ in range(READING_TRIES):
            best = self.best_step() if checkpoint == "best" else None
            if best is not None:
                return best
            if checkpoint == "best" and (record := self.newest_record()):
                return record["progress"]["step"]
            if steps := self.steps():
                return steps[-1]
            # A run removes a checkpoint before it saves the same step again.
            time.sleep(READ_AGAIN_AFTER)
        raise UserError(f"{self.directory.parent} holds no checkpoint yet.")

    def _state_of(self, step: int) -> Path:
        return self.directory / str(step) / "state"

    def _check_arrays(self, step: int, arrays: Any, record: Mapping[str, Any]) -> None:
        if changed := changed_arrays(arrays, record["fingerprint"]):
            raise DamagedError(
                f"The checkpoint of step {step} in {self.directory} was changed after"
                f" it was saved: the values of {changed[0]} do not match their"
                " checksum."
            )

    @contextlib.contextmanager
    def _explaining_damage(self, step: int) -> Iterator[None]:
        # Orbax and TensorStore raise exceptions of any type.
        try:
            yield
        except Exception as error:
            in_store = storage.is_remote(self.directory) and problem_of_store(error)
            if in_store:
                raise UserError(
                    f"The checkpoint of step {step} cannot be read from"
                    f" {self.directory}: {in_store}."
                ) from error
            kind = GoneError if self._is_gone(step) else DamagedError
            raise kind(
                f"The checkpoint of step {step} in {self.directory} cannot be read"
                f" ({_reason(error)})."
            ) from error

    def _is_gone(self, step: int) -> bool:
        """Tells whether a checkpoint that cannot be read is removed by its run."""
        if self._is_reader:
            deadline = time.monotonic() + READ_AGAIN_AFTER
            while step in self.steps_on_disk():
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.02)
        return self._is_reader

    def _set_aside(self, step: int) -> Path:
        aside = self.directory.parent / "damaged"
        target = aside / str(step)
        count = 1
        while target.exists():
            count += 1
            target = aside / f"{step}-{count}"
        if jax.process_index() == 0:
            with storage.explaining_errors(self.directory):
                storage.make_way(aside, pathlib.Path.is_dir)
                storage.move_tree(self.directory / str(step), target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set aside")
        self._manager.close()
        self._open()
        return target

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        if self._is_reader:
            return
        # `wait` or `check` has reported an error of a save.
        with contextlib.suppress(Exception):
            self._manager.close()


def can_be_best(evaluation: Mapping[str, Any] | None) -> bool:
    """Returns whether there is an evaluation, and its loss is finite.

    Args:
      evaluation: The result of an evaluation. A loss that is not finite may be None, as
        it is read from JSON.
    """
    if not evaluation:
        return False
    loss = evaluation.get("loss", 0.0)
    return loss is not None and math.isfinite(loss)


def _fresh_evaluation(progress: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the evaluation of a record's own step, if it can be the best one."""
    evaluation = progress["evaluation"]
    is_fresh = evaluation and evaluation["step"] == progress["step"]
    return evaluation if is_fresh and can_be_best(evaluation) else None


def restore_as_numpy(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Restores some of the trees of an Orbax checkpoint as NumPy arrays.

    Args:
      path: The folder of the arrays.
      keys: The names of the trees, of which the checkpoint may lack some.
    """
    path = storage.absolute(path)
    # A checkpointer would warn of metadata that the checkpoints of runs do not have.
    handler = ocp.PyTreeCheckpointHandler()
    saved = handler.metadata(path).tree
    part = {key: saved[key] for key in keys if saved.get(key)}
    kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part)
    options = ocp.args.PyTreeRestore(
        item=part, restore_args=kinds, partial_restore=True
    )
    with _without_late_errors():
        return handler.restore(path, args=options)


@contextlib.contextmanager
def _without_late_errors() -> Iterator[None]:
    """Hides tracebacks of arrays that arrive after the reading of another one failed.

    Orbax then closes its event loop, to which TensorStore's threads hand the arrays.
    """
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if str(dropped.exc_value) != "Event loop is closed":
            before(dropped)

    sys.unraisablehook = hook
    yield
    # After a failure the hook stays, since the arrays arrive at any time.
    sys.unraisablehook = before


class _DurableRename(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Gives a local checkpoint its name when it is on disk, so it survives a power cut.

    Orbax has an option for the way of committing, but none that flushes the files.
    """

    async def finalize(self) -> None:
        """Flushes the files, renames the directory, and flushes its name."""
        await asyncio.to_thread(storage.sync_tree, pathlib.Path(self.get()))
        await super().finalize()
        # Orbax writes two small files right before it renames the directory.
        final = pathlib.Path(self.get_final())
        await asyncio.to_thread(storage.sync_tree, final)
        await asyncio.to_thread(storage.sync, final.parent)


def _preservation_policy(options: ConfigDict) -> policies.AnyPreservationPolicy:
    """Returns Orbax's policy to keep the last and the best checkpoints."""
    rules: list[Any] = [policies.LatestN(options.keep_last)]
    if options.keep_best:
        rules.append(
            policies.BestN(
                get_metric_fn=lambda metrics: metrics["top1"],
                n=options.keep_best,
                # By default every checkpoint without metrics would be kept.
                keep_checkpoints_without_metrics=False,
            )
        )
    return policies.AnyPreservationPolicy(rules)


def orbax_options(path: Path) -> dict[str, Any]:
    """Returns the options that Orbax needs to write at a path."""
    if storage.is_remote(path):
        in_s3 = str(path).startswith("s3://")
        return {"atomicity_options": orbax_s3.ATOMICITY} if in_s3 else {}
    return {"temporary_path_class": _DurableRename}


@contextlib.contextmanager
def open_checkpoints(workdir: Path) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a run for reading.

    Args:
      workdir: The directory of the run.

    Yields:
      The checkpoints, of which there is at least one.

    Raises:
      UserError: The folder holds no run, or a run without a checkpoint.
    """
    with storage.explaining_errors(workdir):
        exists = (workdir / "checkpoints").is_dir()
    if not exists:
        raise UserError(f"{workdir} holds no run (there is no {workdir}/checkpoints).")
    with Checkpoints(workdir / "checkpoints") as saved:
        if not saved.steps():
            raise UserError(f"{workdir} holds no checkpoint yet.")
        yield saved


def newest_step(workdir: Path) -> int | None:
    """Returns the step of the newest finished checkpoint in a local workdir, or None.

    Only file names are read, so it is quick.
    """
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=None)


class DamagedError(UserError):
    """A checkpoint that is not as it was saved."""


class GoneError(DamagedError):
    """A checkpoint that its run removed while it was read."""


def _reason(error: BaseException) -> str:
    """Returns the part of a storage error that helps a user, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
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
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _wait_at_barrier(*, key: str, timeout_ms: int) -> None:
    """Waits in a save for the other processes, unless the save failed on this one.

    If it failed, the others wait for this process until its error stops them.
    """
    failed = sys.exc_info()[0] is not None
    if processes.count() > 1 and not failed:
        processes.client().wait_at_barrier(key, timeout_ms)


def _sharded_arrays(tree: Tree) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if not leaf.is_fully_replicated]


def _arrays_to_write(tree: Tree) -> Tree:
    """Returns the arrays that this process writes; process 0 writes the small ones.

    Orbax writes nothing for None, and only process 0 writes NumPy arrays.
    """
    leaves, structure = jax.tree.flatten(tree)
    small = [
        i
        for i, x in enumerate(leaves)
        if x.is_fully_replicated and x.nbytes < SPLIT_BYTES
    ]
    values: list[np.ndarray | None] = [None] * len(small)
    if jax.process_index() == 0:
        # Getting an array itself would let it keep a view of memory that is donated
        # next, so this gets the data of one of its shards.
        values = jax.device_get([leaves[i].addressable_data(0) for i in small])
    for i, value in zip(small, values, strict=True):
        leaves[i] = value
    return jax.tree.unflatten(structure, leaves)
