"""The command `evaluate`, and the figures of weights of any origin."""

import csv
import dataclasses
import json
import pathlib

import numpy as np
import pyarrow.parquet
import pytest

import resnet_jax
from resnet_jax import evaluate
from resnet_jax.errors import UserError
from resnet_jax.weights.save import save
from tests.helpers import runs, small_networks
from tests.helpers.pictures import encode, noise, write_folder
from tests.helpers.tfds_datasets import prepare

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")


def write_weights(path: pathlib.Path, name: str = "test_resnet", **fields) -> str:
    """Writes weights of a small network of six classes with their card."""
    card, variables = small_networks.card_and_variables(name)
    fields = {"classes": CLASSES, "image_size": 32} | fields
    save(str(path), variables, dataclasses.replace(card, **fields))
    return str(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    """Writes 13 pictures of four of the classes, in a split with a usual name."""
    files = {
        f"valid/{name}/{i}, {kind}.{kind}": encode(
            noise(10 * k + i, 40 + i, 36 + k), {"jpg": "JPEG", "png": "PNG"}[kind]
        )
        for k, name in enumerate(("fox", "bee", "cat", "ant"))
        for i, kind in enumerate(("jpg", "png", "jpg")[: 3 + (k == 0)])
    }
    files["valid/fox/last.png"] = encode(noise(99, 64, 30), "PNG")
    return write_folder(tmp_path_factory.mktemp("my photos"), files)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return write_weights(tmp_path_factory.mktemp("weights") / "w.safetensors")


def read_table(path: pathlib.Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def evaluated(*arguments, output: pathlib.Path) -> list[dict]:
    """Runs the command; returns the results that it wrote."""
    evaluate.main(["evaluate", *map(str, arguments), f"--output={output}"])
    return json.loads((output / "evaluation.json").read_text())["results"]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_figures_equal_those_of_single_predictions(
    weights, photos, tmp_path, batch_size, capsys
):
    (result,) = evaluated(
        weights, photos, f"--batch_size={batch_size}", output=tmp_path / "out"
    )
    rows = read_table(tmp_path / "out" / "predictions.csv")
    paths = sorted(pathlib.Path(photos.removeprefix("folder:")).glob("valid/*/*"))
    assert sorted(row["path"] for row in rows) == [str(path) for path in paths]
    model = resnet_jax.load(weights)
    right, losses = 0, []
    for row in rows:
        logits = model.logits(row["path"])[0].astype(np.float64)
        label = CLASSES.index(pathlib.Path(row["path"]).parent.name)
        assert row["label"] == CLASSES[label]
        (top,) = model.predict(row["path"], k=5)
        for place, prediction in enumerate(top, 1):
            assert row[f"top{place}_name"] == prediction.name
            # The batch changes the order of float32 sums.
            probability = float(row[f"top{place}_probability"])
            assert probability == pytest.approx(prediction.probability, rel=1e-4)
        right += logits.argmax() == label
        losses.append(np.log(np.exp(logits).sum()) - logits[label])
    assert result["n_seen"] == len(paths)
    assert result["top1"] == right / len(paths)
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert np.trace(result["confusion"]) == right
    assert result["classes"] == list(CLASSES)
    assert [row["images"] for row in result["per_class"]] == [3, 3, 3, 0, 0, 4]
    assert "95 % interval" in capsys.readouterr().out


def test_several_weights_stand_side_by_side_and_keep_their_own_tables(
    weights, photos, tmp_path, capsys
):
    other = write_weights(tmp_path / "o.safetensors", "seresnet18")
    first, second = evaluated(weights, other, photos, output=tmp_path / "out")
    table = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[0] for line in table[1:3]] == [weights, other]
    assert (first["network"], second["network"]) == ("test_resnet", "seresnet18")
    for number, result in enumerate((first, second), 1):
        assert result["predictions"] == f"predictions_{number}.csv"
        rows = read_table(tmp_path / "out" / result["predictions"])
        right = sum(row["label"] == row["top1_name"] for row in rows)
        assert right == round(result["top1"] * result["n_seen"])


def test_weights_that_cannot_be_evaluated_leave_the_results_of_the_others(
    weights, photos, tmp_path, capsys
):
    few = write_weights(tmp_path / "few.safetensors", classes=CLASSES[:2])
    with pytest.raises(UserError, match="2 of the 3 weights"):
        evaluated(
            *(weights, "missing.pth", few, photos, "--json"), output=tmp_path / "out"
        )
    text = capsys.readouterr()
    # Standard output is one JSON document nevertheless.
    (result,) = json.loads(text.out)["results"]
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert saved["results"] == [result]
    assert result["weights"] == weights
    assert "missing.pth" in text.err
    assert f"{few}: Class 2 of" in text.err
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["evaluation.json", "predictions_1.csv"]


def test_the_output_directory_holds_the_last_evaluation_alone(
    weights, photos, tmp_path
):
    folder = tmp_path / "out"
    evaluated(weights, weights, photos, "--predictions=parquet", output=folder)
    (folder / "predictions.txt").write_text("a user's own file")
    evaluated(weights, photos, output=folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files.keys() == {"evaluation.json", "predictions.csv", "predictions.txt"}
    # A failure changes nothing.
    with pytest.raises(UserError, match="not one of the 6 classes"):
        evaluated(weights, "digits", output=folder)
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["imagenet_v2", "imagenet_v2/topimages"])
def test_an_evaluation_set_of_one_config_has_figures_of_its_classes(name, tmp_path):
    config = name.partition("/")[2] or "matched-frequency"
    prepare(tmp_path, f"imagenet_v2/{config}", {"test": [3, 50, 3]})
    card, variables = small_networks.card_and_variables("test_resnet", num_classes=1000)
    save(str(tmp_path / "w.safetensors"), variables, card)
    flags = (f"--data_dir={tmp_path}", "--image_size=32")
    (result,) = evaluated(
        *(tmp_path / "w.safetensors", name, *flags), output=tmp_path / "out"
    )
    assert (result["split"], result["n_seen"]) == (name, 3)
    images = {row["name"]: row["images"] for row in result["per_class"]}
    assert (images[card.classes[3]], images[card.classes[50]]) == (2, 1)


def test_parquet_has_the_rows_of_csv(weights, photos, tmp_path):
    flags = ("--logits", "--topk=2")
    evaluated(weights, photos, *flags, output=tmp_path / "c")
    evaluated(
        *(weights, photos, *flags, "--predictions=parquet"), output=tmp_path / "p"
    )
    rows = read_table(tmp_path / "c" / "predictions.csv")
    others = pyarrow.parquet.read_table(tmp_path / "p" / "predictions.parquet")
    assert others.column_names == list(rows[0])
    assert others.column_names[-6:] == [f"logit_{i}" for i in range(6)]
    for row, other in zip(rows, others.to_pylist(), strict=True):
        for name, cell in other.items():
            # CSV has nine digits of a number, Parquet has 24 bits.
            number = isinstance(cell, float)
            assert cell == (pytest.approx(float(row[name])) if number else row[name])


def test_flags_change_the_input_and_the_views(weights, photos, tmp_path):
    (one,) = evaluated(weights, photos, output=tmp_path / "a")
    (flip,) = evaluated(weights, photos, "--views=flip", output=tmp_path / "b")
    (large,) = evaluated(
        *(weights, photos, "--image_size=48", "--crop_fraction=1"),
        output=tmp_path / "c",
    )
    assert (one["image_size"], large["image_size"]) == (32, 48)
    assert len({one["loss"], flip["loss"], large["loss"]}) == 3
    model = resnet_jax.load(weights)
    row = read_table(tmp_path / "b" / "predictions.csv")[0]
    (best,) = model.predict(row["path"], k=1, flip=True)
    assert row["top1_name"] == best[0].name
    assert float(row["top1_probability"]) == pytest.approx(
        best[0].probability, rel=1e-4
    )


def test_weights_for_bgr_images_get_them(photos, tmp_path):
    path = write_weights(
        tmp_path / "k.safetensors",
        "keras_resnet50",
        classes=CLASSES,
        image_size=32,
    )
    evaluated(path, photos, output=tmp_path / "out")
    row = read_table(tmp_path / "out" / "predictions.csv")[0]
    (best,) = resnet_jax.load(path).predict(row["path"], k=1)
    assert row["top1_name"] == best[0].name
    assert float(row["top1_probability"]) == pytest.approx(
        best[0].probability, rel=1e-3
    )


def test_five_classes_or_fewer_have_no_top5(tmp_path):
    card, variables = small_networks.card_and_variables("test_resnet", num_classes=3)
    card = dataclasses.replace(card, classes=("a", "b", "c"), image_size=32)
    save(str(tmp_path / "w.safetensors"), variables, card)
    files = {f"{name}/1.png": encode(noise(1, 32, 32), "PNG") for name in "abc"}
    source = write_folder(tmp_path / "p", files)
    (result,) = evaluated(tmp_path / "w.safetensors", source, output=tmp_path / "out")
    assert "top5" not in result
    assert "top3_name" in read_table(tmp_path / "out" / "predictions.csv")[0]


def test_classes_without_names_are_those_of_the_data_in_their_order(tmp_path, caplog):
    path = write_weights(tmp_path / "w.safetensors", classes=())
    files = {f"{name}/1.png": encode(noise(1, 32, 32), "PNG") for name in CLASSES}
    (result,) = evaluated(
        path, write_folder(tmp_path / "p", files), output=tmp_path / "out"
    )
    assert result["classes"] == list(CLASSES)
    assert "does not name its classes" in caplog.text
    del files["fox/1.png"]
    with pytest.raises(UserError, match="6 classes without names"):
        evaluate.main(["evaluate", path, write_folder(tmp_path / "q", files)])


def test_images_that_cannot_be_decoded_stop_it_or_are_named(weights, tmp_path, capsys):
    files = {"ant/1.png": encode(noise(1, 32, 32), "PNG"), "ant/2.png": b"nothing"}
    source = write_folder(tmp_path / "p", files)
    with pytest.raises(UserError, match=r"ant/2\.png.* --on_bad_image=skip"):
        evaluate.main(["evaluate", weights, source])
    (result,) = evaluated(
        weights, source, "--on_bad_image=skip", output=tmp_path / "out"
    )
    assert (result["n_seen"], len(result["bad_images"])) == (1, 1)
    assert "ant/2.png" in capsys.readouterr().err
    assert len(read_table(tmp_path / "out" / "predictions.csv")) == 1


def test_mode_eval_gives_the_figures_and_predictions_of_evaluate(tmp_path, caplog):
    workdir = tmp_path / "run"
    code, text = runs.run(
        workdir,
        *("--config=configs/quickstart.py", "--config.total.epochs=1"),
        "--config.optim.warmup.steps=0",
    )
    assert code == 0, text
    code, text = runs.run(workdir, "--mode=eval", "--checkpoint=last")
    assert code == 0, text
    mode = json.loads((workdir / "eval_test.json").read_text())
    (result,) = evaluated(workdir, "digits", output=tmp_path / "out")
    assert result["split"] == mode["split"]
    for key in ("top1", "top1_interval", "top5", "n_seen", "macro", "confusion"):
        assert result[key] == mode[key], key
    rows = read_table(workdir / "eval_test.csv")
    assert [row["top1_name"] for row in rows] == [
        row["top1_name"] for row in read_table(tmp_path / "out" / "predictions.csv")
    ]
    assert not caplog.records
    evaluate.main(["evaluate", str(workdir), "digits@train"])
    assert "was trained on" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pth", "digits"], "missing.pth"),
        (["{weights}", "digits"], "'0', which is not one of the 6 classes"),
        (["{weights}", "folder:nowhere"], "There is no folder"),
        (["{weights}", "imagenet_b"], "no data source 'imagenet_b'"),
        (["{weights}", "{photos}", "--split=vald"], "vald"),
        (["{weights}", "mix:{photos},{photos}"], "--split"),
        (["{weights}", "imagenet_a", "--split=val"], "no effect"),
        (["{weights}", "imagenet_a@val"], "no effect"),
        (["{weights}", "{photos}", "--crop_fraction=2"], "data.crop_fraction=2"),
        (["{weights}"], "DATA"),
        (["{weights}", "{photos}", "--output=gs://bucket/out"], "file system"),
    ],
)
def test_what_a_user_does_wrong_gets_one_sentence(
    arguments, message, weights, photos, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    texts = [text.format(weights=weights, photos=photos) for text in arguments]
    with pytest.raises(UserError) as error:
        evaluate.main(["evaluate", *texts])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_crop_fraction_of_0_is_refused_since_it_is_no_crop():
    with pytest.raises(UserError, match="'0' is not a number above 0"):
        evaluate.main(["evaluate", "w", "digits", "--crop_fraction=0"])
