"""Trains from top to bottom: set up, restore, compile, step, log, evaluate, save."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from resnet_jax.config import load
from resnet_jax.console import output
from resnet_jax.data.csv_source import split_table
from resnet_jax.data.loader import Examples, WorkerDiedError, bad_indices
from resnet_jax.data.source_protocol import NamedSource, Source, checksum
from resnet_jax.data.splits import HELD_OUT
from resnet_jax.data.user_data import Arrays, config_of_given, open_given
from resnet_jax.errors import UserError
from resnet_jax.models.cost import count
from resnet_jax.parallel import processes, sharding
from resnet_jax.persistence import storage, versions
from resnet_jax.persistence.checkpoints import Progress, can_be_best
from resnet_jax.persistence.metric_writers import Writer
from resnet_jax.persistence.preemption import (
    GRACE,
    STALL_TIMEOUT,
    PreemptedError,
    Preemption,
)
from resnet_jax.persistence.storage import path_of
from resnet_jax.persistence.workdir import claimed
from resnet_jax.reports import curves
from resnet_jax.reports.samples import SamplePredictions, save_samples
from resnet_jax.training import completion, programs, stopping
from resnet_jax.training.evaluation import Evaluation, evaluate, evaluate_sets
from resnet_jax.training.experiment import Experiment, set_up
from resnet_jax.training.initialization import (
    first_state,
    initial_weights,
    teacher_variables,
    teacher_weights,
)
from resnet_jax.training.meter import StartupTimer, ThroughputMeter
from resnet_jax.training.optim import set_rate_factor
from resnet_jax.training.precise_bn import precise_batch_norm
from resnet_jax.training.resume import (
    UNKNOWN,
    Resume,
    describe_data,
    describe_weights,
    run_checkpoints,
)
from resnet_jax.training.summary import class_weights_line, summary


def train(
    config: ConfigDict | str | os.PathLike,
    workdir: str | os.PathLike,
    *,
    data: Source | Arrays | None = None,
    eval_data: Source | Arrays | None = None,
    callback: Callable[[dict], None] | None = None,
    extend: bool = False,
    command: str = "",
    began: float | None = None,
    grace: float = GRACE,
    stall_timeout: float = STALL_TIMEOUT,
) -> dict:
    """Trains a network, from the newest checkpoint of a workdir if it has one.

    Args:
      config: The run's config (`resnet_jax/config/defaults.py`), or the file of one,
        such as `configs/r50.py`.
      workdir: The directory of this one run: a path, or `gs://...` or `s3://...`. It
        holds everything that the run writes. The same call resumes the run, and returns
        the result of a finished one.
      data: The training images in place of `config.data.source`: `(images, labels)`,
        with images uint8[n, h, w, c] or uint8[n, h, w] (or a list of paths, of bytes
        of image files, of pixels or of Pillow's images) and labels int[n] or names; or
        a `resnet_jax.data.Source`. The config's augmentation, `data.channels`,
        `data.mean` and `data.std` apply to them. All processes of a run need the same.
        A run resumes only with the same ones; of a source, the classes, the number of
        images and a sample of the labels are compared.
      eval_data: The images to evaluate on, with classes of the same names; None
        evaluates on the fraction `config.data.eval_fraction` of `data`, which is chosen
        by `config.seed` and held out of training.
      callback: A function that takes the result of each evaluation (`step`, `top1`,
        `top5`, `loss`, `n_seen`, `sets`). All processes call it. An exception that it
        raises ends the run; the same call resumes it after that evaluation.
      extend: Allows a run to resume with a larger `config.total` although its learning
        rates depend on that. They are then those of the longer schedule.
      command: The command that repeats the run, for the result.
      began: The time of `time.perf_counter` when the command was given.
      grace: The time in seconds within which the run saves and ends after a signal.
      stall_timeout: The time in seconds without the end of a step after which the run
        ends.

    Returns:
      The content of `result.json`, and under `report` the path of the picture of the
      run, or None if it could not be plotted.

    Raises:
      UserError: The config, the data or the disk has a problem; the message says what
        to do.
      PreemptedError: A signal asked the run to stop; everything is saved.

    Examples:
      >>> from resnet_jax.config import load, override
      >>> config = load("configs/quickstart.py")
      >>> override(config, ["--config.total.epochs=1", "--config.optim.warmup.steps=0"])
      >>> result = train(config, "runs/digits")  # doctest: +SKIP
      >>> import numpy as np
      >>> images = np.random.default_rng(0).integers(0, 256, (640, 8, 8), np.uint8)
      >>> labels = images.mean(axis=(1, 2)) > 127
      >>> result = train(config, "runs/mine", data=(images, labels))  # doctest: +SKIP
    """
    if isinstance(config, str | os.PathLike):
        config = load(config)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"config is {type(config).__name__}. Give a ConfigDict, such as what"
            " resnet_jax.config.load returns, or the path of a config file."
        )
    if not isinstance(workdir, str | os.PathLike):
        raise UserError(
            f"workdir is {type(workdir).__name__}. Give the path of a directory."
        )
    if callback is not None and not callable(callback):
        raise UserError(
            f"callback is {type(callback).__name__}. Give one function that takes the"
            " result of an evaluation."
        )
    if data is None and eval_data is not None:
        raise UserError("eval_data also needs data, the images to train on.")
    workdir = path_of(workdir)
    startup = StartupTimer(time.perf_counter() if began is None else began)
    startup.done("imports")
    with (
        Preemption(workdir, grace, stall_timeout) as preemption,
        contextlib.ExitStack() as stack,
    ):
        # Set up.
        config = completion.complete(config, workdir)
        splits: dict[str, NamedSource] = {}
        if data is not None:
            splits = open_given(data, eval_data, config)
            config = config_of_given(config)
        experiment = set_up(config, train=splits.get("train"), eval=splits.get("test"))
        config, last = experiment.config, experiment.total_steps
        is_lead = jax.process_index() == 0
        say = output.say if is_lead else lambda text: None
        # Before anything is written, so that two runs never write to one workdir.
        check_workdir = stack.enter_context(claimed(workdir, preemption.fail))
        say(summary(experiment, workdir))
        if len(experiment.classes) == 1:
            say(
                f"warning: {experiment.train.source.title} has only the class"
                f" {experiment.classes[0]!r}, so every prediction is right and nothing"
                " is learnt. Give images of at least two classes."
            )
        saved = stack.enter_context(run_checkpoints(experiment, workdir))
        data_record = describe_data(experiment.train.source, experiment.eval.source)
        processes.check_same("data", {"their images": checksum(data_record)[:12]})
        record = saved.newest_record()
        # A finished run learns no more, so its teacher may be gone.
        has_ended = record is not None and experiment.has_ended(record["progress"])
        teacher_read = None if has_ended else teacher_weights(experiment)
        teacher_record = describe_weights(config.distill.teacher_init, teacher_read)
        if record:
            # Before the state is restored, since its arrays may not fit.
            resume = Resume(workdir, record, experiment, data_record, teacher_record)
            for note in resume.check(extend):
                say(note)
            teacher_record = teacher_record or record.get("teacher", UNKNOWN)
        startup.done("data")

        # Restore.
        restored = saved.restore_latest(
            lambda step: programs.state_like(experiment, step - 1)
        )
        if restored:
            state, progress = restored
            say(f"resuming from the checkpoint of step {progress.step}")
            weights_record = (record or {}).get("init", UNKNOWN)
        else:
            weights = initial_weights(experiment)
            state, progress = first_state(experiment, weights), Progress()
            if weights:
                say(f"starting from the weights of {config.init_from}")
            weights_record = describe_weights(config.init_from, weights)
        saved.about |= {
            "data": data_record,
            "init": weights_record,
            "teacher": teacher_record,
        }
        # The step of precise batch norm is not the last one of an extended run.
        progress.recomputed &= experiment.has_ended(vars(progress))
        on_disk = progress.step if restored else None
        if is_lead:
            check_workdir()
            with storage.explaining_errors(workdir):
                storage.write_by_product(workdir / "config.json", config.to_dict())
                if config.data.eval_split == HELD_OUT:
                    table = split_table(experiment.train.source, experiment.eval.source)
                    storage.write_by_product(workdir / "split.csv", table)
        writer = stack.enter_context(
            Writer(workdir, step=progress.step, total_steps=last, active=is_lead)
        )
        meter = ThroughputMeter(experiment, progress, writer)
        startup.done("state")

        try:
            # Compile, while the first batches are made.
            preemption.check()
            say("compiling")
            if not experiment.has_ended(vars(progress)):
                batches = stack.enter_context(experiment.train_batches(progress.step))
                if config.data.class_weights:
                    say(class_weights_line(experiment))
                teacher = teacher_variables(
                    experiment, teacher_read or teacher_weights(experiment)
                )
                size = experiment.image_size(progress.step)
                frozen = experiment.frozen(progress.step)
                train_step = programs.compile_train_step(
                    experiment, teacher, size, progress.step
                )
                preemption.check()
            eval_steps = programs.compile_eval_steps(experiment)
            preemption.check()
            startup.done("compiling")

            first = progress.step
            bad_eval_images: set[int] = set()
            meter.restart()
            while True:
                # Evaluate and save the state of this step. A restart begins here too,
                # and makes up for what the process before it did not reach.
                now = progress.step
                is_end = experiment.has_ended(vars(progress))
                done = progress.evaluation and progress.evaluation["step"] == now
                to_evaluate = not done and (
                    is_end or experiment.is_due("evaluate", now)
                )
                to_save = experiment.is_due("checkpoint", now) and on_disk != now
                if to_evaluate or to_save:
                    # First, since it raises where a loss is not finite: such a state
                    # is neither evaluated nor saved. It also logs the learning rate,
                    # which the evaluation may lower.
                    meter.flush()
                if is_end and config.precise_bn and not progress.recomputed:
                    say(f"precise batch norm over {config.precise_bn} batches")
                    state = precise_batch_norm(
                        experiment, state, after_batch=preemption.check
                    )
                    progress.recomputed = True
                if to_evaluate:
                    samples = SamplePredictions()
                    result = evaluate(
                        experiment,
                        experiment.eval,
                        eval_steps,
                        state,
                        after_batch=preemption.check,
                        samples=samples,
                    )
                    sets = evaluate_sets(
                        experiment, eval_steps, state, after_batch=preemption.check
                    )
                    for index in sorted(set(result.bad_images) - bad_eval_images):
                        bad_eval_images.add(index)
                        if is_lead:
                            so_far = f"{len(bad_eval_images)} so far in evaluation"
                            _warn_of_bad_image(experiment.eval, index, so_far)
                    figures = result.scalars()
                    is_finite = can_be_best(figures)
                    is_first = not stopping.has_seen(progress.stopping, now)
                    if not is_finite:
                        say(
                            f"warning: The loss on {experiment.eval.source.title} is"
                            f" not finite at step {now}, which is therefore not the"
                            " best one. If this stays so, start another run with a"
                            " smaller optim.learning_rate or model.dtype=float32."
                        )
                    if is_first:
                        progress.stopping = stopping.after(
                            progress.stopping,
                            figures,
                            step=now,
                            seconds=progress.seconds,
                            best=progress.best,
                        )
                    if experiment.plateau and is_first:
                        progress.plateau = experiment.plateau.after(
                            progress.plateau, result.top1 if is_finite else -math.inf
                        )
                        # Before the save, which must hold the rate of the next step.
                        opt_state = set_rate_factor(
                            state.opt_state, progress.plateau["factor"]
                        )
                        state = dataclasses.replace(state, opt_state=opt_state)
                    is_end = experiment.has_ended(vars(progress))
                    if is_end and config.precise_bn and not progress.recomputed:
                        # This evaluation ends the run early. The final one, of precise
                        # statistics, takes its place.
                        _log_evaluation(now, result, sets, writer)
                        continue
                    evaluation = _record_evaluation(progress, result, sets, writer)
                if to_evaluate or to_save:
                    # There is something to save now, so a signal must wait for it.
                    preemption.hold()
                    check_workdir()
                    # Rows first: a resumed run does not write those of this step again.
                    writer.flush()
                    saved.save(state, progress)
                    on_disk = now
                    if to_evaluate and is_lead:
                        save_samples(workdir, samples, tuple(experiment.classes))
                if to_evaluate and callback:
                    # After the save, since the callback may raise.
                    callback(dict(evaluation))
                if to_evaluate or to_save:
                    meter.restart()
                if is_end:
                    if why := stopping.describe(config.stop, now, progress.stopping):
                        say(why)
                    break

                # Another size (progressive resizing) is another program, and so is the
                # step of a thaw.
                old, now_frozen = size, experiment.frozen(progress.step)
                size = experiment.image_size(progress.step)
                if size != old or now_frozen != frozen:
                    meter.flush()
                    thaws = "" if now_frozen == frozen else ", with all parameters"
                    say(f"compiling for {size} px{thaws}")
                    frozen = now_frozen
                    train_step = programs.compile_train_step(
                        experiment, teacher, size, progress.step
                    )
                    preemption.check()
                    meter.restart()

                # Step. The state is donated, so it is replaced at once; progress
                # follows before anything can raise and save the two.
                with meter.waiting():
                    batch = next(batches)
                _record_bad_images(progress, batch, experiment)
                if progress.step == experiment.freeze_until:
                    # As late as this, since a checkpoint of this step, even one that a
                    # signal asks for, is that of the frozen steps.
                    state = programs.thaw(experiment, state)
                state, metrics = train_step(state, experiment.to_devices(batch))
                progress.step += 1
                progress.examples += config.batch_size
                meter.add(metrics)
                if progress.step == first + 1:
                    jax.block_until_ready(metrics)
                    preemption.hold()
                    startup.done("step")
                    say(str(startup))

                # Log.
                writer.tick(progress.step)
                if experiment.is_due("log", progress.step):
                    meter.flush()
                    saved.check()
                # Last, so that the step that it may interrupt is complete.
                preemption.check()
            saved.wait()
            check_workdir()
            preemption.release()
        except (PreemptedError, WorkerDiedError) as error:
            stop = (
                error
                if isinstance(error, PreemptedError)
                else preemption.requested_stop()
            )
            if stop is None:
                raise
            if processes.count() > 1 and stop is not error:
                # The others stop at a step that this process cannot reach.
                processes.end_all(
                    f"{processes.describe()} was {stop}. {error}", stop.exit_code
                )
            # The state goes to disk before rows are written, since time is short. A
            # loss that is not finite raises here, before it is saved.
            meter.settle()
            # Step 0 is not saved, since the config is enough to make it again.
            if progress.step and on_disk != progress.step:
                check_workdir()
                saved.save(state, progress)
            saved.wait()
            meter.flush()
            writer.flush()
            if progress.step:
                say(f"saved step {progress.step}; the same command resumes the run")
            raise stop from None

    content = {
        **(progress.evaluation or {}),
        "model": config.model.name,
        "params": count(state.params),
        "best": progress.best,
        **stopping.summary(config.stop, progress.step, progress.stopping),
        "bad_train_images": len(sharding.union(set(progress.bad_images))),
        "seconds": progress.seconds,
        "images_per_second": progress.examples / max(progress.seconds, 1e-9),
        "command": command,
        "versions": versions.package_versions(),
    }
    report = None
    if is_lead:
        with output.dispensable(str(workdir / "result.json")):
            storage.write_by_product(workdir / "result.json", content)
        with output.dispensable(str(workdir / "report.png")):
            report = str(curves.draw(workdir, content))
    return {**content, "report": report}


def _log_evaluation(
    step: int, result: Evaluation, sets: dict[str, dict], writer: Writer
) -> None:
    """Logs the results of an evaluation on the eval split and on the extra sets."""
    values = result.scalars() | {"bad_images": len(result.bad_images)}
    writer.evaluation(step, values)
    for name, set_values in sets.items():
        writer.evaluation(step, set_values, name)


def _record_evaluation(
    progress: Progress, result: Evaluation, sets: dict[str, dict], writer: Writer
) -> dict:
    """Logs the results of an evaluation and keeps them in the progress.

    Args:
      progress: The run's progress, whose `evaluation` and, if its loss is finite,
        `best` are set.
      result: The result on the eval split.
      sets: The results on the extra evaluation sets, by name.
      writer: The writer of the rows that are logged.

    Returns:
      The evaluation, as `train` passes it to its callback.
    """
    _log_evaluation(progress.step, result, sets, writer)
    values = result.scalars()
    progress.evaluation = {
        **values,
        "bad_eval_images": len(result.bad_images),
        "sets": sets,
        "step": progress.step,
    }
    # An older version could take an evaluation for the best whose loss is not finite.
    best = progress.best if can_be_best(progress.best) else None
    is_best = not best or values["top1"] >= best["top1"]
    progress.best = (
        progress.evaluation if is_best and can_be_best(progress.evaluation) else best
    )
    return progress.evaluation


def _record_bad_images(progress: Progress, batch: dict, experiment: Experiment) -> None:
    """Keeps the images that could not be decoded, and warns of each once."""
    for index in sorted(bad_indices(batch) - set(progress.bad_images)):
        progress.bad_images.append(index)
        _warn_of_bad_image(
            experiment.train, index, f"{len(progress.bad_images)} so far"
        )


def _warn_of_bad_image(examples: Examples, index: int, so_far: str) -> None:
    """Warns of an image that cannot be decoded, with the number of those so far."""
    output.say(
        f"warning: skipped {output.one_line(examples.source.name(index))}, which"
        f" cannot be decoded ({so_far})"
    )
