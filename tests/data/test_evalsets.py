"""Evaluation sets are counted as their papers say."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from resnet_jax.data.augment import Augment
from resnet_jax.data.evalsets import (
    ALEXNET_ERRORS,
    SETS,
    EvaluationSet,
    open_set,
    summarize,
)
from resnet_jax.data.loader import Examples
from resnet_jax.data.tfds_source import TfdsSource
from resnet_jax.errors import UserError
from resnet_jax.persistence.metric_writers import read_metrics
from resnet_jax.training import programs
from resnet_jax.training.evaluation import evaluate_sets, evaluate_workdir
from resnet_jax.training.loop import train
from tests.helpers import tiny
from tests.helpers.pictures import encode, noise, write_folder
from tests.helpers.tfds_datasets import prepare

# Labels of images, some of which have none or several.
REAL = [[3], [], [500, 3, 999], [7, 8], [], [0, 1, 2, 3, 4, 5, 6, 7, 8]] * 4
A_FEW = [3, 50, 999, 50, 3, 700, 3, 50, 50, 3, 999]
LABELS = [(37 * k) % 1000 for k in range(21)]
FOG = [f"fog_{k}" for k in range(1, 6)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("tfds")
    imagenet = {"train": LABELS, "validation": LABELS[:5], "test": [-1, -1]}
    prepare(directory, "imagenet2012", imagenet)
    prepare(directory, "imagenet_v2/matched-frequency", {"test": LABELS})
    prepare(directory, "imagenet_v2/topimages", {"test": LABELS[:7]})
    for name in ("imagenet_a", "imagenet_r"):
        prepare(directory, name, {"test": A_FEW})
    prepare(directory, "imagenet_sketch", {"test": LABELS[::-1]})
    prepare(directory, "imagenet2012_real", {"validation": REAL})
    for config in FOG:
        name = f"imagenet2012_corrupted/{config}"
        prepare(directory, name, {"validation": LABELS[:9]}, size=16)
        labels = {"test": [k % 10 for k in range(11)]}
        prepare(directory, f"cifar10_corrupted/{config}", labels)
    # In this data set, tfds numbers the classes in another order.
    prepare(directory, "imagenet_resized/8x8", {"validation": LABELS, "train": [0]})
    return str(directory)


def config(data_dir: str, sets=(), **changes):
    """Returns the config of a small network for ImageNet's 1000 classes."""
    return tiny.config(
        {
            "data.source": "tfds:imagenet2012",
            "data.data_dir": data_dir,
            "data.channels": 3,
            "data.mean": (0.5, 0.5, 0.5),
            "data.std": (0.25, 0.25, 0.25),
            "data.image_size": 16,
            "data.crop_fraction": 0.5,
            "evaluate.sets": tuple(sets),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def setup(data_dir):
    others = ("imagenet_v2/topimages", "imagenet2012_corrupted/fog")
    names = [name for name in SETS if "corrupted" not in name]
    resized = "tfds:imagenet_resized/8x8@validation"
    return tiny.set_up(config(data_dir, (*names, *others, resized)))


@pytest.fixture(scope="module")
def results(setup) -> dict[str, dict]:
    state, steps = tiny.state(setup), programs.compile_eval_steps(setup)
    return evaluate_sets(setup, steps, state, after_batch=lambda: None)


@pytest.fixture(scope="module")
def logits_of(setup):
    """A function that returns the float64 logits of a set, config by config."""
    state = tiny.state(setup)
    apply = jax.jit(setup.model.apply)

    def logits(name: str) -> list[np.ndarray]:
        rows = []
        for part in setup.sets[name].parts.values():
            images = part.eval(range(len(part.source)))["image"]
            pixels = (images / np.float32(255) - 0.5) / np.float32(0.25)
            rows.append(apply(state.evaluated(), pixels.astype(np.float32)))
        return np.asarray(rows, np.float64)

    return logits


def expected(logits: np.ndarray, labels: list[list[int]]) -> dict:
    """Returns the figures of rows of logits, given the right labels of each row."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    rows = [k for k, right in enumerate(labels) if right]
    return {
        "top1": np.mean([order[k, 0] in labels[k] for k in rows]),
        "top5": np.mean([bool({*order[k, :5]} & {*labels[k]}) for k in rows]),
        "loss": np.mean([-log_p[k, labels[k]].max() for k in rows]),
        "n_seen": len(rows),
        "bad_images": 0,
    }


def assert_result(result: dict, wanted: dict) -> None:
    assert result.keys() == wanted.keys()
    for key in wanted:
        # Sums of float32 logits near 10 in another order.
        assert result[key] == pytest.approx(wanted[key], rel=1e-5), key


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("imagenet_v2", LABELS),
        ("imagenet_v2/topimages", LABELS[:7]),
        ("imagenet_sketch", LABELS[::-1]),
    ],
)
def test_a_set_of_all_classes_is_evaluated_like_the_eval_split(
    name, labels, results, logits_of
):
    (logits,) = logits_of(name)
    assert_result(results[name], expected(logits, [[label] for label in labels]))


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_only_classes_of_the_set_can_be_predicted(name, setup, results, logits_of):
    (logits,) = logits_of(name)
    labels = [[label] for label in A_FEW]
    others = sorted(set(range(1000)) - set(A_FEW))
    allowed = logits.copy()
    allowed[:, others] = -np.inf
    wanted = expected(allowed, labels)
    assert_result(results[name], wanted)
    # The restriction makes a difference here.
    assert wanted["top5"] > expected(logits, labels)["top5"]
    assert setup.sets[name].labels == {3, 50, 700, 999}


def test_any_of_several_labels_is_right_and_images_without_labels_do_not_count(
    results, logits_of
):
    (logits,) = logits_of("imagenet2012_real")
    result = results["imagenet2012_real"]
    assert_result(result, expected(logits, REAL))
    # 8 of the 24 images have no label.
    assert result["n_seen"] == 16


def test_the_result_of_a_corruption_is_the_mean_over_its_severities(results, logits_of):
    name = "imagenet2012_corrupted/fog"
    labels = [[label] for label in LABELS[:9]]
    parts = [expected(logits, labels) for logits in logits_of(name)]
    means = {key: np.mean([part[key] for part in parts]) for key in parts[0]}
    result = results[name]
    assert result.pop("top1_of") == {"fog": pytest.approx(means["top1"])}
    assert_result(result, means | {"n_seen": 45})


def test_corrupted_images_are_not_cropped_again(setup, data_dir):
    part = setup.sets["imagenet2012_corrupted/fog"].parts["fog_2"]
    raw = TfdsSource("imagenet2012_corrupted/fog_2", "validation", data_dir)
    for index in range(len(raw)):
        seed = sum(map(ord, raw.dataset)) + index
        assert raw[index][0] == encode(noise(seed, 16, 16), "PNG")
        pixels = np.asarray(noise(seed, 16, 16))
        assert (part.eval([index])["image"][0] == pixels).all()


def test_labels_in_another_order_are_matched_by_class_name(
    setup, results, logits_of, data_dir
):
    # imagenet_resized numbers the classes in another order.
    name = "tfds:imagenet_resized/8x8@validation"
    raw = TfdsSource("imagenet_resized/8x8", "validation", data_dir)
    number = {wnid: label for label, wnid in enumerate(setup.classes)}
    labels = [[number[raw.classes[raw[index][1]]]] for index in range(len(raw))]
    assert labels != [[label] for label in LABELS]
    (logits,) = logits_of(name)
    assert_result(results[name], expected(logits, labels))


def test_a_network_may_have_the_labels_of_imagenet_resized(data_dir):
    # The labels of the evaluation set are then renumbered.
    source = {"data.source": "tfds:imagenet_resized/8x8"}
    resized = tiny.set_up(config(data_dir, ["imagenet_v2"], **source))
    (part,) = resized.sets["imagenet_v2"].parts.values()
    raw = TfdsSource("imagenet_v2/matched-frequency", "test", data_dir)
    for index in range(len(raw)):
        name = raw.classes[raw[index][1]]
        assert resized.classes[part.eval([index])["label"][0]] == name


@pytest.mark.slow
def test_workers_return_several_labels_per_image(setup):
    config = setup.config.copy_and_resolve_references()
    config.data.num_workers = 2
    real = setup.sets["imagenet2012_real"].parts[""]
    with dataclasses.replace(setup, config=config).eval_batches(real) as batches:
        labels = np.concatenate([batch["label"] for batch in batches])
    assert labels.dtype == np.int32
    kept = [[label for label in row if label >= 0] for row in labels[: len(REAL)]]
    assert kept == REAL


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer")
CIFAR10 += ("dog", "frog", "horse", "ship", "truck")


def make_examples(source) -> Examples:
    augment = Augment(size=8)
    return Examples(source=source, augment=augment, channels=3, skip_bad=False)


def open_for(name: str, classes, data_dir: str) -> EvaluationSet:
    return open_set(
        name,
        classes,
        data_dir=data_dir,
        make_examples=lambda source, cropped, most_labels: make_examples(source),
    )


def test_the_classes_of_cifar10_corrupted_are_those_of_cifar10(data_dir):
    opened = open_for("cifar10_corrupted/fog_3", CIFAR10[::-1], data_dir)
    (source,) = (part.source for part in opened.parts.values())
    labels = [source[index][1] for index in range(11)]
    assert labels == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 9]


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        ("imagenet_a", CIFAR10, "Class 0 of tfds:imagenet_a/test is 'n01440764'"),
        ("cifar10_corrupted/fog", CIFAR10[:9], "Class 9 of .* is 'truck'"),
        ("imagenet_a", CIFAR10, "the 10 classes of the network .*Known: airplane"),
        ("imagenet_c", CIFAR10, "no evaluation set 'imagenet_c'. Did you mean imag"),
        ("tfds:imagenet_a", CIFAR10, "written SOURCE@SPLIT"),
        ("digits@tets", CIFAR10, "no split 'tets'. Did you mean test"),
        ("imagenet_v2/matched", CIFAR10, "imagenet_v2/matched: .*not found"),
    ],
)
def test_a_set_that_cannot_be_evaluated_is_reported(name, classes, message, data_dir):
    with pytest.raises(UserError, match=message) as raised:
        open_for(name, classes, data_dir)
    assert "\n" not in str(raised.value)


def test_a_set_that_is_not_prepared_is_reported_with_the_command(data_dir):
    with pytest.raises(UserError) as raised:
        open_for("imagenet2012_corrupted", CIFAR10, data_dir)
    command = (
        "python -m resnet_jax.prepare tfds:imagenet2012_corrupted/gaussian_noise_1"
    )
    assert f"`{command} --data_dir={data_dir}`" in str(raised.value)


def test_a_folder_can_be_an_evaluation_set(tmp_path, data_dir):
    files = {"val/cat/1.png": encode(noise(0, 8, 8), "PNG")}
    opened = open_for(f"{write_folder(tmp_path, files)}@val", ("ant", "cat"), data_dir)
    (source,) = (part.source for part in opened.parts.values())
    assert source[0][1] == 1


# The table of sets, compared with tfds and the papers.


@pytest.mark.parametrize("name", SETS)
def test_tfds_has_the_configs_of_a_set(name):
    builder = tfds.builder_cls(name)
    known = [config.name for config in builder.BUILDER_CONFIGS]
    assert set(SETS[name].configs) <= set(known)
    assert bool(SETS[name].configs) == bool(known)


@pytest.mark.parametrize("name", ["imagenet2012_corrupted", "cifar10_corrupted"])
def test_the_corruptions_are_the_benchmark_of_tfds_in_5_severities(name):
    import importlib

    module = importlib.import_module(tfds.builder_cls(name).__module__)
    assert SETS[name].configs == tuple(
        f"{corruption}_{severity}"
        for corruption in module.BENCHMARK_CORRUPTIONS
        for severity in range(1, 6)
    )


def corrupted_results(top1_of) -> dict[str, dict]:
    return {
        config: {"top1": top1_of(config), "top5": 1.0, "loss": 0.0}
        | {"n_seen": 50_000, "bad_images": 0}
        for config in SETS["imagenet2012_corrupted"].configs
    }


def test_the_mce_of_alexnet_is_1_and_of_half_its_errors_a_half():
    opened = EvaluationSet({}, False, ALEXNET_ERRORS)
    for fraction in (1.0, 0.5):
        result = summarize(
            opened,
            corrupted_results(lambda c, p=fraction: 1 - p * ALEXNET_ERRORS[c[:-2]]),
        )
        assert result["mce"] == pytest.approx(fraction, rel=1e-12)
        assert result["n_seen"] == 75 * 50_000
        errors = np.mean(list(ALEXNET_ERRORS.values()))
        assert result["top1"] == pytest.approx(1 - fraction * errors)


def test_there_is_no_mce_without_all_corruptions():
    some = corrupted_results(lambda config: 0.5)
    del some["fog_1"]
    opened = EvaluationSet({}, False, ALEXNET_ERRORS)
    # Four severities of fog are enough.
    assert "mce" in summarize(opened, some)
    fog_only = {config: some[config] for config in FOG[1:]}
    assert "mce" not in summarize(opened, fog_only)


# Invalid labels.


def test_a_label_out_of_range_is_named_with_its_example(data_dir):
    test = TfdsSource("imagenet2012", "test", data_dir)
    with pytest.raises(
        UserError,
        match=r"imagenet2012/test\[1\] has the label -1, but labels are 0 to 999",
    ):
        test[1]


def test_an_image_with_too_many_labels_is_named(data_dir):
    real = TfdsSource("imagenet2012_real", "validation", data_dir, most_labels=8)
    lengths = [len([x for x in real[index][1] if x >= 0]) for index in range(5)]
    assert lengths == [1, 0, 3, 2, 0]
    with pytest.raises(
        UserError, match=r"validation\[5\] has 9 labels, more than the 8"
    ):
        real[5]


def test_a_data_set_with_several_labels_per_image_cannot_be_trained_on(data_dir):
    with pytest.raises(UserError, match="does not map an image to a class"):
        TfdsSource("imagenet2012_real", "validation", data_dir)


# A run.


@pytest.mark.slow
def test_a_run_reports_each_set_on_a_line_and_in_its_files(tmp_path, data_dir, capsys):
    sets = ("imagenet_a", "imagenet2012_real", "imagenet2012_corrupted/fog")
    run = config(data_dir, sets, **{"total": {"steps": 1}})
    workdir = tmp_path / "run"
    result = train(run, workdir)
    seen = {"imagenet_a": 11, "imagenet2012_real": 16, sets[2]: 45}
    assert {name: result["sets"][name]["n_seen"] for name in sets} == seen
    assert json.loads((workdir / "result.json").read_text())["sets"] == result["sets"]
    # The result and the choice of the best step are still those of the eval split.
    assert (result["n_seen"], result["best"]["n_seen"]) == (5, 5)
    rows = {k: v for row in read_metrics(workdir) for k, v in row.items()}
    output = capsys.readouterr().out
    for name, n in seen.items():
        assert rows[f"eval/{name}/n_seen"] == n
        assert rows[f"eval/{name}/top1"] == result["sets"][name]["top1"]
        assert output.count(f"evaluated on {name}: top-1") == 1
        assert f"on {n} images" in output

    again = evaluate_workdir(workdir, "last")
    assert again["sets"] == result["sets"]
    saved = pathlib.Path(workdir / "eval_validation.json").read_text()
    assert json.loads(saved)["sets"] == result["sets"]
    assert "imagenet_a: top-1" in capsys.readouterr().out
