"""Records in each checkpoint what a run depends on, and compares it on resuming.

It compares the config, the classes, the file names, order, labels and number of the
images of both splits, the initial weights and the teacher's weights. Paths, times and
pixels are not compared, so data may move, and no image is opened.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from resnet_jax.config.durations import to_steps
from resnet_jax.config.old_keys import changed_removed
from resnet_jax.config.saved import (
    FOR_PLATEAU,
    MAY_CHANGE,
    NAMES,
    SETS_RATES,
    as_json,
    differences,
    from_saved,
)
from resnet_jax.data.source_protocol import NamedSource
from resnet_jax.errors import UserError
from resnet_jax.models.zoo import Spec
from resnet_jax.persistence import versions
from resnet_jax.persistence.array_checksums import fingerprint
from resnet_jax.persistence.checkpoints import Checkpoints
from resnet_jax.persistence.storage import Path
from resnet_jax.training.experiment import Experiment
from resnet_jax.training.freezing import frozen_until
from resnet_jax.training.initialization import Weights, initial_weights
from resnet_jax.training.schedules import make_schedule

# Recorded in place of weights where an older version started the run without them.
UNKNOWN = "unknown"
SPLITS = {"train": "training", "eval": "eval"}
# Fields of a card that change what the weights compute from an image.
FUNCTION_FIELDS = (
    *("network", "spec", "image_size", "mean", "std"),
    *("interpolation", "crop_fraction", "bgr", "classes"),
)


def run_checkpoints(experiment: Experiment, workdir: Path) -> Checkpoints:
    """Opens the checkpoints of a run for writing, as a context manager.

    Each checkpoint records the config, the network, versions and the ghost batch size.

    Args:
      experiment: The experiment of this command.
      workdir: The run's directory.
    """
    about = {
        "config": json.loads(as_json(experiment.config)),
        "spec": dataclasses.asdict(experiment.model.spec),
        "versions": versions.package_versions(),
        "code": versions.code_checksum(),
        "ghost_batch_size": experiment.model.bn_group_size,
    }
    return Checkpoints(workdir / "checkpoints", experiment.config.checkpoint, about)


def describe_data(train: NamedSource, eval: NamedSource) -> dict[str, Any]:
    """Returns the names of the classes, and the size and checksum of both splits.

    Args:
      train: The training split.
      eval: The eval split.

    Returns:
      `classes`, a list of names; and for each of `train` and `eval` the number of
      `images` and a `digest` of their names, order and labels.
    """
    splits = {"train": train, "eval": eval}
    return {"classes": list(train.classes)} | {
        name: {"images": len(split), "digest": split.digest()}
        for name, split in splits.items()
    }


def describe_weights(origin: str, weights: Weights | None) -> dict[str, Any] | None:
    """Describes weights for the record of a checkpoint.

    Args:
      origin: The place of the weights, as the config names it.
      weights: The weights, or None.

    Returns:
      `where`, the origin; `card`, the fields of the card; and `fingerprint`, a checksum
      of each array by name. None if there are no weights.
    """
    if not weights:
        return None
    card, variables = weights
    fields = json.loads(card.to_json())
    return {"where": origin, "card": fields, "fingerprint": fingerprint(variables)}


def data_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], splits: Sequence[str]
) -> list[str]:
    """Returns how two results of `describe_data` differ, a phrase per difference.

    Args:
      old: The data that a checkpoint recorded.
      new: The data of this command.
      splits: The splits that are compared, of `train` and `eval`.
    """
    classes = class_changes(old["classes"], new["classes"])
    changes = []
    for split in splits:
        before, after = old[split], new[split]
        name = f"the {SPLITS[split]} split"
        if before["images"] != after["images"]:
            changes.append(
                f"{name} had {before['images']:,} images and has {after['images']:,}"
            )
        elif before["digest"] != after["digest"] and not classes:
            changes.append(
                "file names (or images that were handed to train), labels, order or"
                f" mix weights of {name} have changed"
            )
    return classes + changes


def class_changes(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """Returns how two lists of class names differ.

    Args:
      old: The names that a checkpoint recorded, in the order of the labels.
      new: The names of this command.

    Returns:
      A list of one phrase, or an empty list if the names are equal.
    """
    missing = [name for name in old if name not in set(new)]
    added = [name for name in new if name not in set(old)]
    if missing or added:
        phrases = [
            f"{names[0]!r} and {len(names) - 1} more are {state}"
            if names[1:]
            else f"{names[0]!r} is {state}"
            for names, state in ((missing, "missing"), (added, "new"))
            if names
        ]
        counts = f"{len(new)} classes instead of {len(old)}: "
        counts = counts if len(old) != len(new) else ""
        return [f"the classes have changed ({counts}{', '.join(phrases)})"]
    for label, (before, after) in enumerate(zip(old, new, strict=True)):
        if before != after:
            return [f"class {label} was {before!r} and is {after!r}"]
    return []


def weights_change(
    old: Mapping[str, Any], new: Mapping[str, Any], values: bool = True
) -> str:
    """Returns how two results of `describe_weights` differ, or ''.

    Args:
      old: The weights that a checkpoint recorded.
      new: The weights of this command.
      values: Compares the arrays too, not only the cards.
    """
    changes = [
        f"{field}: {_short(old['card'].get(field))} -> {_short(new['card'].get(field))}"
        for field in FUNCTION_FIELDS
        if old["card"].get(field) != new["card"].get(field)
    ]
    if values and old["fingerprint"] != new["fingerprint"]:
        changes.append("other values")
    if not changes:
        return ""
    before, after = old["where"], new["where"]
    verdict = "has changed" if after == before else f"is not {before}"
    return f"{after} {verdict} ({changes[0]})"


def spec_change(old: Mapping[str, Any], new: Spec) -> str:
    """Returns the first field in which a saved spec differs from a new one, or ''.

    Fields that only one of them has belong to another version, and are ignored.

    Args:
      old: The fields of the spec that a checkpoint recorded.
      new: The spec of this command.
    """
    fields = json.loads(json.dumps(dataclasses.asdict(new)))
    for field in [field for field in old if field in fields]:
        if old[field] != fields[field]:
            return f"{field}: {_short(old[field])} -> {_short(fields[field])}"
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


@dataclasses.dataclass(frozen=True)
class Resume:
    """A run that is about to resume, and the record of its newest checkpoint.

    Attributes:
      workdir: The run's directory.
      record: The record of the newest checkpoint; see `Checkpoints.read`.
      experiment: The experiment of this command.
      data: The result of `describe_data` for the experiment.
      teacher: The result of `describe_weights` for its teacher.
    """

    workdir: Path
    record: Mapping[str, Any]
    experiment: Experiment
    data: Mapping[str, Any]
    teacher: Mapping[str, Any] | None

    @property
    def step(self) -> int:
        """The step that the run has reached."""
        return self.record["progress"]["step"]

    @property
    def _is_old(self) -> bool:
        """Tells whether the checkpoint is from before 0.2, which recorded less."""
        return "data" not in self.record

    @property
    def _unrecorded(self) -> tuple[str, ...]:
        """The keys whose data or weights were not recorded, only the keys' values."""
        if self._is_old:
            return NAMES
        return ("init_from",) if self.record["init"] == UNKNOWN else ()

    def check(self, extend: bool) -> list[str]:
        """Compares the record with what the command asks for.

        Args:
          extend: Allows a longer run to change the learning rates from now on.

        Returns:
          Notes for the user, a sentence each.

        Raises:
          UserError: The run depends on something that has changed.
        """
        self._check_config()
        if not self._is_old:
            self._check_data()
            self._check_initial_weights()
            self._check_teacher()
        self._check_spec()
        return [
            *self._unknown(),
            *self._evaluation(),
            *self._check_length(extend),
            *self._devices(),
            *self._versions(),
        ]

    def _other_evaluation(self) -> bool:
        """Tells whether the command names another eval split than the record."""
        old, new = self.record["config"]["data"], self.experiment.config.data
        return any(old[key] != new[key] for key in ("eval_split", "eval_source"))

    def _error(self, changed: str, way_out: str) -> UserError:
        return UserError(
            f"{self.workdir} holds a run at step {self.step:,} with {changed}."
            f" {way_out}"
        )

    def _check_config(self) -> None:
        def may_differ(key: str) -> bool:
            if self.experiment.plateau and key.startswith(FOR_PLATEAU):
                return False
            # Data and weights that were not recorded are compared by their names.
            if key in self._unrecorded:
                return False
            # A decay after the end of a run, for instance, has no effect. Changes that
            # have one need --extend; see `_check_length`.
            if key.startswith(SETS_RATES):
                is_longer = self.experiment.total_steps > self._old_length
                return self._same_rates or (is_longer and key != "optim.schedule")
            return key.startswith((*MAY_CHANGE, *NAMES, "total."))

        saved = self.record["config"]
        changed = changed_removed(saved)
        changed += differences(saved, self.experiment.config, may_differ)
        if changed:
            raise self._error(
                f"another config ({'; '.join(changed[:3])}"
                f"{' ...' if len(changed) > 3 else ''})",
                "Choose another --workdir, or the old settings to resume that run.",
            )

    def _check_data(self) -> None:
        splits = list(SPLITS)
        # Another eval split changes no parameter, unless a plateau looks at it.
        if self._other_evaluation() and not self.experiment.plateau:
            splits.remove("eval")
        if changed := data_changes(self.record["data"], self.data, splits):
            raise self._error(
                f"other data: {'; '.join(changed)}",
                "Restore the data to resume it, or choose another --workdir.",
            )

    def _check_initial_weights(self) -> None:
        old, new_origin = self.record["init"], self.experiment.config.init_from
        if old == UNKNOWN or not (old or new_origin):
            return
        old_origin = old["where"] if old else ""
        moved = new_origin != old_origin
        way_out = "Leave init_from as it was" if moved else "Restore them"
        way_out += " to resume it, or choose another --workdir."
        if not old_origin or not new_origin:
            raise self._error(
                f"other initial weights (init_from: {old_origin!r} -> {new_origin!r})",
                way_out,
            )
        try:
            new = describe_weights(new_origin, initial_weights(self.experiment))
        except UserError:
            # The run does not need them any more.
            if moved:
                raise
            return
        # A workdir that is still named by `init_from` may hold a later step now, so
        # only the cards of unmoved weights are compared.
        if new and (change := weights_change(old, new, values=moved)):
            raise self._error(f"other initial weights: {change}", way_out)

    def _check_teacher(self) -> None:
        old, new = self.record["teacher"], self.teacher
        if old == UNKNOWN or self.experiment.has_ended(self.record["progress"]):
            return
        change = ""
        if old and new:
            change = weights_change(old, new)
        elif old or new:
            # The config's word for random initialisation.
            before, after = (x["where"] if x else "drawn" for x in (old, new))
            change = f"distill.teacher_init: {before} -> {after}"
        if change:
            raise self._error(
                f"another teacher: {change}",
                "Restore the teacher to resume it, or choose another --workdir.",
            )

    def _check_spec(self) -> None:
        if change := spec_change(self.record["spec"], self.experiment.model.spec):
            raise self._error(
                f"another network ({change})",
                "Restore the data or the version that it was started with, or choose"
                " another --workdir.",
            )

    def _unknown(self) -> list[str]:
        if not self._is_old:
            return []
        return [
            "warning: this run was started by a version that did not record the class"
            " names, the images and the initial weights, so whether they are the same"
            " now cannot be compared; its next checkpoints record them."
        ]

    @functools.cached_property
    def _old_config(self) -> ConfigDict:
        return from_saved(self.record["config"])

    @functools.cached_property
    def _train_size(self) -> int:
        return self.record.get("data", self.data)["train"]["images"]

    @functools.cached_property
    def _old_length(self) -> int:
        """The number of steps that the run had by its recorded config."""
        config = self._old_config
        return to_steps(config.total, config.batch_size, self._train_size, "total")

    def _rates(
        self, steps: Int[Array, "n"]
    ) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
        """Returns the learning rates of steps by the old config and by the new one."""
        old = make_schedule(
            self._old_config, total_steps=self._old_length, train_size=self._train_size
        )
        # A constant schedule gives one number for all steps.
        before, after = (
            jnp.broadcast_to(jnp.asarray(schedule(steps)), steps.shape)
            for schedule in (old, self.experiment.schedule)
        )
        return before, after

    @functools.cached_property
    def _same_rates(self) -> bool:
        """Tells whether both configs give common steps the same rates."""
        kinds = {self._old_config.optim.schedule, self.experiment.config.optim.schedule}
        if "plateau" in kinds:
            # Evaluations decide, which may come after percentages of the run.
            is_longer = self._old_length != self.experiment.total_steps
            by_percent = "percent" in self.experiment.config.evaluate.every
            if len(kinds) > 1 or (is_longer and by_percent):
                return False
        steps = jnp.arange(min(self._old_length, self.experiment.total_steps))
        before, after = self._rates(steps)
        return np.array_equal(before, after)

    @property
    def _same_sizes(self) -> bool:
        """Tells whether images grow at the same steps in a run of either length."""
        resize = self.experiment.config.data.resize_schedule
        times = (resize.get(key, {}) for key in ("start", "end"))
        return not any("percent" in time for time in times)

    def _check_length(self, extend: bool) -> list[str]:
        """Compares the number of steps, on which a schedule may depend."""
        config, old, new = (
            self.experiment.config,
            self._old_length,
            self.experiment.total_steps,
        )
        if new < self.step:
            raise self._error(
                f"more steps than config.total={dict(config.total)}, which is {new:,}",
                "Choose a total of at least as many, evaluate the run with --mode=eval,"
                " or choose another --workdir.",
            )
        if new == old:
            return []
        self._check_thaw()
        note = f"The run has {new:,} steps instead of {old:,}."
        if self._same_rates and self._same_sizes:
            return [note]
        schedule = config.optim.schedule
        what = f"all rates of its {schedule} schedule"
        if self._same_rates:
            what = "the sizes of its images (data.resize_schedule)"
        before, after = self._rates(jnp.array([self.step]))
        rate = f"at step {self.step:,} it is {after[0]:.4g} instead of {before[0]:.4g}"
        if new < old or not extend:
            way_out = "Choose the old total, or another --workdir."
            if new > old:
                way_out = (
                    "--extend resumes it nevertheless, with the rates of the longer"
                    f" schedule from now on ({rate}); or choose another --workdir."
                )
            raise self._error(
                f"another length ({old:,} steps, now {new:,}), on which {what} depend",
                way_out,
            )
        return [
            f"{note} From now on the learning rate is that of the longer {schedule}"
            f" schedule ({rate}), so the result is not that of a run which had this"
            " length from the start."
        ]

    def _check_thaw(self) -> None:
        """Compares the finished steps that were frozen, by a percentage of the run."""
        before = frozen_until(self._old_config, self._train_size, self._old_length)
        now = self.experiment.freeze_until
        finished = [x if x and x < self.step else None for x in (before, now)]
        if self.experiment.freeze.leaves and finished[0] != finished[1]:
            raise self._error(
                "another thaw (optim.freeze_until was step"
                f" {before or self._old_length} and is step"
                f" {now or self.experiment.total_steps})",
                "Choose the old total, or another --workdir.",
            )

    def _evaluation(self) -> list[str]:
        """Names another eval split, with which results are hard to compare."""
        if self._is_old or not data_changes(self.record["data"], self.data, ["eval"]):
            return []
        return [
            f"warning: the evaluations up to step {self.step:,} are of another split,"
            " and the best result is the best of both."
        ]

    def _devices(self) -> list[str]:
        """Names another ghost batch size, which `bn_group_size=device` can cause."""
        new = self.experiment.model.bn_group_size
        # Older records hold null for `bn_group_size=global`, which does not depend on
        # the devices, or nothing at all.
        old = self.record.get("ghost_batch_size") or new
        if old == new:
            return []
        return [
            f"warning: with model.bn_group_size=device, {new} images share batch-norm"
            f" statistics on these devices, and {old} did before."
        ]

    def _versions(self) -> list[str]:
        """Names the packages and the code that changed since the newest checkpoint."""
        old, new = self.record.get("versions", {}), versions.package_versions()
        changed = [
            f"{name} {old[name]} -> {new[name]}"
            for name in new
            if old.get(name, new[name]) != new[name]
        ]
        code = versions.code_checksum()
        if self.record.get("code", code) != code:
            changed.append("the source code of resnet_jax")
        if not changed:
            return []
        return [
            "warning: other versions than those of the newest checkpoint"
            f" ({', '.join(changed)}) may round in another way."
        ]
