"""A run resumes only with the settings and data of its start, or says what differs."""

import contextlib
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from resnet_jax import config
from resnet_jax.config.saved import as_json, as_text, from_saved
from resnet_jax.config.variants import for_evaluation
from resnet_jax.data.derived_sources import Combined, Subset, with_classes
from resnet_jax.data.sources import open_source
from resnet_jax.errors import UserError
from resnet_jax.persistence.array_checksums import fingerprint, old_fingerprint
from resnet_jax.persistence.checkpoints import Checkpoints
from resnet_jax.training import programs, schedules
from resnet_jax.training.evaluation import evaluate_workdir
from resnet_jax.training.initialization import (
    first_state,
    initial_weights,
    teacher_weights,
)
from resnet_jax.training.loop import train
from resnet_jax.training.resume import Resume, describe_data, run_checkpoints
from resnet_jax.weights import native
from resnet_jax.weights.card import default_card
from tests.helpers import keyed, small_networks, tiny

CLASSES = ("ant", "bee", "cat", "dog")


def make_folder(root: pathlib.Path, classes=CLASSES, images: int = 6) -> pathlib.Path:
    """Writes grey PNGs of 8 x 8 pixels, with one brightness per class."""
    for split, number in (("train", images), ("val", 3)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = np.full((8, 8), 60 * label + i, np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def config_for(root: pathlib.Path | str = "images", changes=None) -> ConfigDict:
    """Returns a config of four steps of eight images, saved at every second step."""
    run = {
        "data.source": f"folder:{root}",
        "data.eval_split": "val",
        "batch_size": 8,
        "model.bn_group_size": 8,
        "checkpoint.every": ConfigDict({"steps": 2}),
        "evaluate.every": ConfigDict({"steps": 2}),
    }
    return tiny.config(run | (changes or {}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """A directory with a folder of `images` and the workdir of a `run` on it."""
    root = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(root):
        make_folder(root / "images")
        train(config_for(), root / "run")
    return root


@pytest.fixture
def copies(finished, tmp_path, monkeypatch) -> tuple[pathlib.Path, pathlib.Path]:
    """A folder of images and the workdir of a run that has ended, to be changed."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "images", tmp_path / "run"


def files_of(workdir: pathlib.Path) -> dict[str, bytes]:
    return {str(x): x.read_bytes() for x in workdir.rglob("*") if x.is_file()}


def remove_an_image(images):
    (images / "train" / "bee" / "3.png").unlink()


def remove_an_evaluated_image(images):
    (images / "val" / "dog" / "1.png").unlink()


def add_images(images):
    for i in range(6, 20):
        shutil.copy(images / "train/ant/0.png", images / f"train/ant/{i}.png")


def rename_an_image(images):
    # The new name comes first, so the number of every image changes.
    (images / "train" / "ant" / "5.png").rename(images / "train" / "ant" / "0a.png")


def rename_an_image_of_each_split(images):
    for split in ("train", "val"):
        first = images / split / "ant" / "0.png"
        first.rename(first.with_name("9.png"))


def rename_a_class(images):
    # The new name comes last, so the labels of the other classes change too.
    for split in ("train", "val"):
        (images / split / "bee").rename(images / split / "zebra")


def add_a_class(images):
    for split in ("train", "val"):
        shutil.copytree(images / split / "bee", images / split / "cow")


def move_an_image_to_another_class(images):
    shutil.move(images / "train/ant/5.png", images / "train/bee/6.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_an_image, "the training split had 24 images and has 23"),
        (remove_an_evaluated_image, "the eval split had 12 images and has 11"),
        (add_images, "the training split had 24 images and has 38"),
        (rename_an_image, "labels, order or mix weights of the training split have"),
        (rename_an_image_of_each_split, "mix weights of the eval split have"),
        (rename_a_class, "the classes have changed ('bee' is missing, 'zebra' is new)"),
        (add_a_class, "(5 classes instead of 4: 'cow' is new)"),
        (move_an_image_to_another_class, "the training split have changed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_run_whose_images_have_changed_is_rejected_and_left_alone(
    copies, change, message
):
    images, workdir = copies
    change(images)
    before = files_of(workdir)
    with pytest.raises(UserError) as error:
        train(config_for(), workdir)
    assert f"{workdir} holds a run at step 4 with other data: " in str(error.value)
    assert message in str(error.value)
    assert files_of(workdir) == before


def test_another_eval_split_is_named_in_a_warning(copies, capsys):
    _, workdir = copies
    split = {"data.eval_split": "train", "total": ConfigDict({"steps": 4})}
    train(config_for(changes=split), workdir)
    warning = "warning: the evaluations up to step 4 are of another split, and the best"
    assert warning in capsys.readouterr().out


def test_images_that_moved_and_were_encoded_again_count_as_the_same(copies, tmp_path):
    images, workdir = copies
    moved = tmp_path / "elsewhere"
    shutil.move(images, moved)
    first = next(moved.rglob("*.png"))
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(first)
    changes = {"total": ConfigDict({"steps": 4}), "data.cache": "ram"}
    changes |= {"data.on_bad_image": "skip", "data.num_threads": 1}
    assert train(config_for(moved, changes), workdir)["step"] == 4


def test_a_digest_depends_on_order_labels_and_shares_but_not_on_paths(tmp_path):
    first, second = (
        open_source(f"folder:{make_folder(tmp_path / name)}", "train")
        for name in ("first", "second")
    )
    assert first.digest() == second.digest()
    backwards = np.arange(len(first))[::-1]
    digests = {
        first.digest(),
        open_source(f"folder:{tmp_path / 'first'}", "val").digest(),
        Subset(first, backwards, "backwards").digest(),
        with_classes(first, ("zoo", *CLASSES)).digest(),
        Combined((first, second), (1.0, 1.0)).digest(),
        Combined((first, second), (3.0, 1.0)).digest(),
        open_source("digits", "train").digest(),
        open_source("digits", "train[:50%]").digest(),
        open_source("fake:10:64", "train").digest(),
        open_source("fake:10:65", "train").digest(),
    }
    assert len(digests) == 10


# The record beside the arrays.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"step": 4', '"step": 3'),
        ('"examples": 32', '"examples": 31'),
        ('"momentum": 0.9', '"momentum": 0.8'),
        ('"ant"', '"and"'),
        ('"checksum"', '"sum"'),
    ],
)
def test_an_edited_record_is_moved_aside(copies, caplog, old, new):
    _, workdir = copies
    whole = train(config_for(), workdir)
    path = workdir / "checkpoints/4/run/metadata"
    text = path.read_text()
    if old not in text:
        old, new = old.replace(": ", ":"), new.replace(": ", ":")
    assert old in text
    path.write_text(text.replace(old, new))
    again = train(config_for(), workdir)
    assert "does not match its checksum" in caplog.text
    assert (workdir / "damaged" / "4").is_dir()
    assert (again["loss"], again["top1"]) == (whole["loss"], whole["top1"])


def test_a_run_without_an_intact_record_is_rejected_and_left_alone(copies):
    _, workdir = copies
    for path in (workdir / "checkpoints").glob("*/run/metadata"):
        path.write_bytes(b"")
    before = files_of(workdir)
    with pytest.raises(UserError, match="No older one is intact"):
        train(config_for("images", {"seed": 5}), workdir)
    assert files_of(workdir) == before


@pytest.mark.slow
def test_metrics_that_are_not_as_they_were_saved_are_made_again(copies, capsys):
    _, workdir = copies
    path = workdir / "checkpoints/4/metrics/metrics"
    saved = json.loads(path.read_text())
    for number, text in enumerate(("{", "[]", '{"top1": 2.0}'), 1):
        path.write_text(text)
        # An evaluation does not need them, and changes nothing.
        evaluate_workdir(workdir)
        assert path.read_text() == text
        capsys.readouterr()
        train(config_for(), workdir)
        assert f"metrics.damaged-{number}" in capsys.readouterr().err
        assert json.loads(path.read_text()) == saved
    # Files that a run writes while it is evaluated are left alone.
    writing = workdir / "checkpoints/6.orbax-checkpoint-tmp/metrics/metrics"
    writing.parent.mkdir(parents=True)
    writing.write_text("{")
    evaluate_workdir(workdir)
    assert writing.exists()
    shutil.rmtree(workdir / "checkpoints/4")
    (workdir / "checkpoints/2/metrics/metrics").write_text("{}")
    assert train(config_for(), workdir)["step"] == 4


def test_a_run_resumes_without_the_copy_of_its_config(copies):
    _, workdir = copies
    (workdir / "config.json").unlink()
    assert train(config_for(), workdir)["step"] == 4
    assert (workdir / "config.json").exists()


def test_a_fingerprint_changes_with_any_number_of_flipped_signs():
    x = jax.random.normal(jax.random.key(0), (6, 4))
    kept = fingerprint({"k": x})
    assert fingerprint({"k": -x}) != kept
    found = {kept["k"]}
    rng = np.random.default_rng(0)
    for flipped in (2, 4, 10, 24):
        signs = np.ones(24, np.float32)
        signs[rng.permutation(24)[:flipped]] = -1
        found.add(fingerprint({"k": x * signs.reshape(6, 4)})["k"])
    # The highest bits of another type are flipped two at a time.
    whole = np.arange(8, dtype=np.int32)
    found.add(fingerprint({"k": jax.numpy.asarray(whole)})["k"])
    whole[[1, 5]] ^= np.int32(-(2**31))
    found.add(fingerprint({"k": jax.numpy.asarray(whole)})["k"])
    assert len(found) == 7


def as_older(workdir: pathlib.Path) -> None:
    """Rewrites all checkpoints as version 0.1 wrote them."""
    for path in (workdir / "checkpoints").glob("*/run/metadata"):
        record = json.loads(path.read_text())
        for key in ("data", "init", "teacher", "code", "checksum", "ghost_batch_size"):
            del record[key]
        experiment = tiny.set_up(from_saved(record["config"]))
        with Checkpoints(workdir / "checkpoints") as saved:
            state = saved.restore(int(path.parts[-3]), programs.state_like(experiment))
        record["fingerprint"] = old_fingerprint(state)
        path.write_text(json.dumps(record))


@pytest.mark.slow
def test_a_checkpoint_of_the_version_before_resumes_with_one_warning(
    copies, capsys, caplog
):
    images, workdir = copies
    as_older(workdir)
    evaluate_workdir(workdir)
    assert caplog.text.count("cannot be compared") == 1
    shutil.rmtree(workdir / "checkpoints" / "4")
    capsys.readouterr()
    again = train(config_for(), workdir)
    said = capsys.readouterr().out
    assert len(re.findall("warning: .* cannot be compared", said)) == 1
    assert again["step"] == 4
    # Only the name of the initial weights is known.
    with pytest.raises(UserError, match=r"init_from: '' -> 'elsewhere'"):
        train(config_for("images", {"init_from": "elsewhere"}), workdir)
    # The checkpoints written since then record the images.
    remove_an_image(images)
    with pytest.raises(UserError, match="had 24 images and has 23"):
        train(config_for(), workdir)


@pytest.mark.slow
def test_arrays_and_paths_of_images_are_compared_with_an_old_checkpoint_too(
    copies, tmp_path, caplog
):
    images, workdir = copies
    as_older(workdir)
    shutil.copytree(images, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"another config \(data\.source: "):
        train(config_for(tmp_path / "elsewhere"), workdir)
    with pytest.raises(UserError, match=r"another config \(init_from: "):
        train(config_for("images", {"init_from": "elsewhere"}), workdir)
    add_a_class(images)
    with pytest.raises(UserError, match=r"another network \(num_classes: 4 -> 5\)"):
        train(config_for(), workdir)
    shutil.rmtree(images)
    make_folder(images)
    path = workdir / "checkpoints/4/run/metadata"
    record = json.loads(path.read_text())
    record["fingerprint"]["params/head/bias"] ^= 1
    path.write_text(json.dumps(record))
    train(config_for(), workdir)
    assert "the values of params/head/bias do not match their" in caplog.text


@pytest.mark.parametrize(("recorded", "warnings"), [(None, 0), (8, 0), (4, 1)])
def test_a_record_may_hold_null_for_a_global_ghost_batch(
    finished, recorded, warnings, monkeypatch
):
    monkeypatch.chdir(finished)
    run = config_for(changes={"model.bn_group_size": "global"})
    experiment = tiny.set_up(run)
    with run_checkpoints(experiment, finished / "run") as saved:
        record = saved.newest_record() | {
            "config": json.loads(as_json(run)),
            "ghost_batch_size": recorded,
        }
    data = describe_data(experiment.train.source, experiment.eval.source)
    notes = Resume(finished / "run", record, experiment, data, None).check(False)
    assert len(notes) == warnings
    assert all("8 images share batch-norm statistics" in note for note in notes)


# Settings that may change, and those that may not.


@pytest.mark.slow
def test_a_workdir_without_a_step_takes_another_config(tmp_path):
    make_folder(tmp_path / "images")
    (tmp_path / "images/train/ant/0.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="on_bad_image=skip"):
        train(config_for(tmp_path / "images"), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").exists()
    # The flag of the message helps, and other settings may change too.
    changes = {"data.on_bad_image": "skip", "seed": 5, "batch_size": 16}
    result = train(config_for(tmp_path / "images", changes), tmp_path / "run")
    assert result["bad_train_images"] == 1


def longer(**optim) -> dict:
    """Changes for six steps instead of four."""
    changes = {f"optim.{key}": value for key, value in optim.items()}
    return {"total": ConfigDict({"steps": 6})} | changes


STEP = {"schedule": "step", "decay_at": ({"steps": 2},)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"schedule": "constant"}, {"schedule": "constant"}),
        (STEP, STEP),
        # A decay after the old end changes no rate of the steps before it.
        (STEP, STEP | {"decay_at": ({"steps": 2}, {"steps": 5})}),
        (
            {"schedule_length": ConfigDict({"steps": 3}), "end_learning_rate": 0.01},
            {"schedule_length": ConfigDict({"steps": 3}), "end_learning_rate": 0.01},
        ),
    ],
    ids=["constant", "step", "one more decay", "cosine of its own length"],
)
def test_a_run_can_be_extended_where_the_finished_steps_keep_their_rates(
    tmp_path, before, after
):
    make_folder(tmp_path / "images")
    optim = {f"optim.{key}": value for key, value in before.items()}
    train(config_for(tmp_path / "images", optim), tmp_path / "run")
    extended = train(config_for(tmp_path / "images", longer(**after)), tmp_path / "run")
    whole = train(config_for(tmp_path / "images", longer(**after)), tmp_path / "whole")
    assert extended["step"] == whole["step"] == 6
    assert (extended["loss"], extended["top1"]) == (whole["loss"], whole["top1"])


@pytest.mark.slow
def test_a_run_with_a_cosine_schedule_is_extended_on_request_only(copies, capsys):
    _, workdir = copies
    for length in ({}, {"steps": 6}):
        run = config_for("images", longer(schedule_length=ConfigDict(length)))
        with pytest.raises(UserError, match=r"4 steps, now 6.*--extend resumes it"):
            train(run, workdir)
    with pytest.raises(UserError, match=r"config\.total=.*, which is 3"):
        train(config_for("images", {"total": ConfigDict({"steps": 3})}), workdir)
    capsys.readouterr()
    assert train(run, workdir, extend=True)["step"] == 6
    assert "From now on the learning rate is that of the longer" in (
        capsys.readouterr().out
    )
    # It is the run's length from then on.
    assert train(run, workdir)["step"] == 6
    for other in ({"momentum": 0.5}, {"schedule": "constant"}):
        with pytest.raises(UserError, match="another config"):
            train(config_for("images", longer(**other)), workdir, extend=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.warmup": ConfigDict({"percent": 50})}, "rates of its constant"),
        (
            {
                "optim.schedule": "plateau",
                "evaluate.every": ConfigDict({"percent": 50}),
            },
            "rates of its plateau",
        ),
        (
            {
                "data.resize_schedule": ConfigDict(
                    {"first": 8, "last": 16}
                    | {"start": {"percent": 0}, "end": {"percent": 50}}
                )
            },
            "sizes of its images",
        ),
    ],
    ids=["warm-up", "plateau", "sizes"],
)
def test_a_run_whose_past_was_a_percentage_of_it_is_extended_on_request_only(
    tmp_path, changes, message
):
    make_folder(tmp_path / "images")
    changes = {"optim.schedule": "constant", "data.image_size": 16} | changes
    train(config_for(tmp_path / "images", changes), tmp_path / "run")
    more = config_for(tmp_path / "images", changes | longer())
    with pytest.raises(UserError, match=rf"4 steps, now 6.*{message}.*--extend resum"):
        train(more, tmp_path / "run")
    assert train(more, tmp_path / "run", extend=True)["step"] == 6
    # What does not reach back is of no account.
    often = {
        "evaluate.every": ConfigDict({"percent": 50}),
        "optim.schedule": "constant",
    }
    train(config_for(tmp_path / "images", often), tmp_path / "other")
    more = config_for(tmp_path / "images", often | longer())
    assert train(more, tmp_path / "other")["step"] == 6


@pytest.mark.slow
def test_a_run_that_thaws_after_a_percentage_of_it_is_not_extended(tmp_path):
    make_folder(tmp_path / "images")
    freeze = {
        "optim.freeze": "all_but_head",
        "optim.freeze_until": ConfigDict({"percent": 50}),
    }
    train(config_for(tmp_path / "images", freeze), tmp_path / "run")
    more = config_for(tmp_path / "images", freeze | longer())
    with pytest.raises(UserError, match=r"freeze_until was step 2 and is step 3"):
        train(more, tmp_path / "run", extend=True)


@pytest.mark.slow
def test_settings_that_a_plateau_depends_on_may_not_change(tmp_path):
    make_folder(tmp_path / "images")
    plateau = {"optim.schedule": "plateau"}
    train(config_for(tmp_path / "images", plateau), tmp_path / "run")
    remove_an_evaluated_image(tmp_path / "images")
    for changes, message in (
        (
            {"evaluate.every": ConfigDict({"steps": 1})},
            r"evaluate\.every\.steps: 2 -> 1",
        ),
        ({"data.eval_split": "train"}, r"data\.eval_split: 'val' -> 'train'"),
        ({"optim.schedule": "constant"}, r"optim\.schedule: 'plateau' -> 'constant'"),
        ({"data.eval_source": f"folder:{tmp_path / 'images'}"}, "12 images and has 11"),
    ):
        with pytest.raises(UserError, match=message):
            train(config_for(tmp_path / "images", plateau | changes), tmp_path / "run")


@pytest.mark.parametrize("ends", [(30, 60, 80), (80,)])
def test_the_flag_that_a_message_gives_leaves_out_the_late_decay(ends):
    run = tiny.config({"total": ConfigDict({"steps": 70}), "optim.schedule": "step"})
    run.optim.decay_at = tuple({"steps": end} for end in ends)
    with pytest.raises(UserError) as error:
        schedules.make_schedule(run, total_steps=70, train_size=64)
    (flag,) = re.findall(r"leave it out with (\S+=(?:\".*?\"|\w+))", str(error.value))
    config.override(run, [flag.replace('"', "")])
    schedules.make_schedule(run, total_steps=70, train_size=64)


# Evaluation.


def test_an_evaluation_needs_only_the_workdir_and_the_evaluated_images(copies, capsys):
    images, workdir = copies
    shutil.rmtree(images / "train")
    result = evaluate_workdir(workdir, "last")
    trained = json.loads((workdir / "result.json").read_text())
    assert (result["loss"], result["top1"]) == (trained["loss"], trained["top1"])
    assert result["changed"] == []
    overrides = ["--config.evaluate.views=flip", "--config.evaluate.batch_size=4"]
    changed = evaluate_workdir(workdir, "last", overrides)["changed"]
    assert changed == [
        "evaluate.batch_size: 0 -> 4",
        "evaluate.views: 'one' -> 'flip'",
    ]
    assert "different from training: evaluate.views: " in capsys.readouterr().out


def test_an_evaluation_ignores_settings_that_only_training_uses(tmp_path):
    make_folder(tmp_path / "images")
    sizes = {"first": 8, "last": 16, "start": {"steps": 1}, "end": {"steps": 2}}
    changes = {
        "total": ConfigDict({"epochs": 1}),
        "optim.warmup": ConfigDict({"steps": 2}),
        "data.image_size": 16,
        "data.resize_schedule": ConfigDict(sizes),
        "distill.teacher": "cifar_resnet20",
        "distill.teacher_init": "nowhere",
    }
    run = config_for(tmp_path / "images", changes)
    assert tiny.set_up(run).total_steps == 3
    # The warm-up is longer than an epoch of such batches.
    run.evaluate.batch_size = 128
    run.data.image_size = 32
    experiment = tiny.set_up(for_evaluation(run, devices=8))
    assert experiment.eval_batch_size == 128
    assert experiment.eval.augment.size == 32


def test_an_evaluation_of_a_damaged_checkpoint_says_how_to_use_another(
    copies, tmp_path
):
    _, workdir = copies
    (workdir / "checkpoints/4/run/metadata").write_bytes(b"")
    with pytest.raises(UserError) as error:
        evaluate_workdir(workdir, "last")
    (path,) = re.findall(r"move (\S+) away to use another", str(error.value))
    shutil.move(path, tmp_path / "away")
    assert evaluate_workdir(workdir, "last")["step"] == 2


def test_what_is_in_the_way_of_an_evaluation_is_set_aside(copies, capfd):
    _, workdir = copies
    (workdir / "eval_val.json").mkdir()
    assert evaluate_workdir(workdir)["step"] == 4
    assert "renamed to eval_val.json.damaged-1" in "".join(capfd.readouterr())
    assert json.loads((workdir / "eval_val.json").read_text())["step"] == 4


def test_an_evaluation_says_that_its_split_has_changed_since_training(copies):
    images, workdir = copies
    remove_an_evaluated_image(images)
    result = evaluate_workdir(workdir, "last")
    assert result["changed"] == ["the eval split had 12 images and has 11"]
    assert result["n_seen"] == 11


def test_an_evaluation_numbers_classes_as_the_network_does(copies, tmp_path):
    images, workdir = copies
    whole = evaluate_workdir(workdir, "last")
    # With other classes, all predictions would be wrong.
    other = make_folder(tmp_path / "other", classes=("elk", "fox", "gnu", "hen"))
    flag = f"--config.data.source=folder:{other}"
    with pytest.raises(UserError, match="'elk', which is not one of the 4 classes"):
        evaluate_workdir(workdir, "last", [flag])
    # With fewer classes, each image keeps its label.
    right = {}
    for name in CLASSES:
        for split in ("train", "val"):
            shutil.copytree(images / split / name, tmp_path / name / split / name)
        flag = f"--config.data.source=folder:{tmp_path / name}"
        result = evaluate_workdir(workdir, "last", [flag])
        assert result["n_seen"] == 3
        right[name] = 3 * result["top1"]
    assert sum(right.values()) == pytest.approx(12 * whole["top1"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "model.overrides.widths=(8, 8)",
            r"another network \(model\.overrides\.widths",
        ),
        ("model.name=cifar_resnet32", r"another network \(model\.name"),
        ("ema_decay=0.9", "the run has no EMA"),
        ("optim.nam=adam", r"optim\.name"),
    ],
)
def test_an_evaluation_of_another_network_is_rejected(finished, flag, message):
    with pytest.raises(UserError, match=message):
        evaluate_workdir(finished / "run", "last", [f"--config.{flag}"])


def test_an_evaluation_with_another_optimiser_has_the_same_result(copies):
    _, workdir = copies
    before = evaluate_workdir(workdir, "last")
    result = evaluate_workdir(workdir, "last", ["--config.optim.name=lamb"])
    assert result["loss"] == before["loss"]
    assert result["changed"] == ["optim.name: 'sgd' -> 'lamb'"]


def test_a_config_that_was_saved_takes_overrides_of_any_type():
    for name in ("quickstart", "r50"):
        run = config.load(f"configs/{name}.py")
        again = from_saved(json.loads(as_json(run)))
        assert as_text(again) == as_text(run)
    config.override(again, ["--config.model.bn_group_size=global"])
    config.override(again, ["--config.total.steps=5"])
    assert again.total.to_dict() == {"steps": 5}


# Initial weights.


def weights_for(path: pathlib.Path, experiment, **card) -> dict:
    """Writes keyed weights of the experiment's network with a card; returns them."""
    variables = keyed.variables(experiment.model.spec, seed=7)
    fields = {"mean": (0.5,), "std": (0.5,)} | card
    known = card_for(experiment, **fields)
    native.write(path, variables, known)
    return variables


def card_for(experiment, **fields):
    """Returns the card of weights with this project's names of parameters."""
    fields = {"scheme": native.NATIVE.name} | fields
    return default_card(experiment.config.model.name, experiment.model.spec, **fields)


def test_weights_that_expect_another_input_are_named_with_the_flags(tmp_path, caplog):
    make_folder(tmp_path / "images")
    run = config_for(tmp_path / "images")
    experiment = tiny.set_up(run)
    facts = {"mean": (0.3,), "interpolation": "bicubic", "classes": CLASSES}
    weights_for(tmp_path / "w", experiment, **facts)
    run.init_from = str(tmp_path / "w")
    first_state(experiment, initial_weights(experiment))
    flags = re.findall(r'(--config\.[\w.]+)=(?:"(.*?)"|(\w+))', caplog.text)
    assert [flag for flag, *_ in flags] == [
        "--config.data.mean",
        "--config.data.interpolation",
    ]
    config.override(run, [f"{flag}={text or word}" for flag, text, word in flags])
    caplog.clear()
    experiment = tiny.set_up(run)
    first_state(experiment, initial_weights(experiment))
    assert caplog.text == ""


def test_weights_for_bgr_see_the_same_image(tmp_path):
    experiment = tiny.setup(
        {"data.channels": 3, "data.mean": (0.5,) * 3, "data.std": (1.0,) * 3}
    )
    means = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "classes": ()}
    variables = weights_for(tmp_path / "w", experiment, bgr=True, **means)
    experiment.config.init_from = str(tmp_path / "w")
    params = first_state(experiment, initial_weights(experiment)).params
    kernel = variables["params"]["stem_conv1"]["kernel"]
    np.testing.assert_array_equal(params["stem_conv1"]["kernel"], kernel[:, :, ::-1])


def test_a_head_is_kept_reordered_or_randomly_initialised_by_class_names(
    tmp_path, caplog
):
    make_folder(tmp_path / "images")
    run = config_for(tmp_path / "images")
    experiment = tiny.set_up(run)
    fresh = jax.device_get(programs.init_state(experiment).params["head"])

    def backwards(head):
        return {name: x[..., ::-1] for name, x in head.items()}

    for classes, said, expected in (
        (CLASSES, "", lambda head: head),
        (CLASSES[::-1], "is reordered", backwards),
        (("elk", "fox", "gnu", "hen"), "'ant' is not among them", lambda head: fresh),
        ((), "", lambda head: head),
    ):
        caplog.clear()
        path = tmp_path / "_".join(classes or ["unknown"])
        variables = weights_for(path, experiment, classes=classes)
        run.init_from = str(path)
        state = first_state(experiment, initial_weights(experiment))
        small_networks.assert_equal(
            jax.device_get(state.params["head"]), expected(variables["params"]["head"])
        )
        assert said in caplog.text and bool(said) == bool(caplog.text)


def test_a_teacher_of_classes_with_other_names_is_rejected(tmp_path):
    make_folder(tmp_path / "images")
    run = config_for(tmp_path / "images")
    weights_for(tmp_path / "w", tiny.set_up(run), classes=("elk", "fox", "gnu", "hen"))
    run.distill.teacher = run.model.name
    run.distill.teacher_init = str(tmp_path / "w")
    with run.unlocked():
        run.distill.overrides = dict(tiny.NETWORK)
    with pytest.raises(UserError, match="'ant' is not among them"):
        teacher_weights(tiny.set_up(run))


@pytest.mark.slow
def test_a_run_resumes_with_the_initial_weights_that_it_had(tmp_path):
    make_folder(tmp_path / "images")
    experiment = tiny.set_up(config_for(tmp_path / "images"))
    facts = {"classes": CLASSES}
    weights_for(tmp_path / "w", experiment, **facts)

    def resume(path):
        run = config_for(tmp_path / "images", {"init_from": str(path or "")})
        return train(run, tmp_path / "run")

    resume(tmp_path / "w")
    shutil.copytree(tmp_path / "w", tmp_path / "moved")
    resume(tmp_path / "moved")
    other = keyed.variables(experiment.model.spec, seed=8)
    card = card_for(experiment, mean=(0.5,), std=(0.5,), **facts)
    native.write(tmp_path / "other", other, card)
    for path, message in (
        (tmp_path / "other", r"other is not .*w \(other values\)"),
        (None, r"other initial weights \(init_from: .*w' -> ''\)"),
        (tmp_path / "nowhere", "nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            resume(path)
    shutil.rmtree(tmp_path / "w")
    weights_for(tmp_path / "w", experiment, classes=CLASSES[::-1])
    with pytest.raises(UserError, match=r"has changed \(classes: .*Restore them"):
        resume(tmp_path / "w")


@pytest.mark.slow
def test_a_run_stops_when_its_teacher_has_changed(tmp_path):
    make_folder(tmp_path / "images")
    experiment = tiny.set_up(config_for(tmp_path / "images"))
    weights_for(tmp_path / "w", experiment, classes=CLASSES)
    changes = {
        "distill.teacher": experiment.config.model.name,
        "distill.teacher_init": str(tmp_path / "w"),
    }

    def resume(steps: int):
        length = {"total": ConfigDict({"steps": steps}), "optim.schedule": "constant"}
        run = config_for(tmp_path / "images", changes | length)
        with run.unlocked():
            run.distill.overrides = dict(tiny.NETWORK)
        return train(run, tmp_path / "run")

    resume(2)
    shutil.move(tmp_path / "w", tmp_path / "moved")
    changes["distill.teacher_init"] = str(tmp_path / "moved")
    resume(4)
    changes["distill.teacher_init"] = "drawn"
    with pytest.raises(UserError, match=r"another teacher: .*moved -> drawn"):
        resume(6)
    changes["distill.teacher_init"] = str(tmp_path / "moved")
    card = card_for(experiment, mean=(0.5,), std=(0.5,), classes=CLASSES)
    native.write(
        tmp_path / "moved", keyed.variables(experiment.model.spec, seed=8), card
    )
    with pytest.raises(UserError, match=r"another teacher: .*moved has changed \("):
        resume(6)
