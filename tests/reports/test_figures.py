"""Pictures of runs and predictions, with names that matplotlib could misread."""

import json
import os
import warnings

import matplotlib
import numpy as np
import pytest

from resnet_jax.analysis import degradation
from resnet_jax.errors import UserError
from resnet_jax.reports import curves
from resnet_jax.reports.figures import picture, picture_to_write, shorten
from resnet_jax.reports.predictions import draw_predictions
from resnet_jax.reports.samples import SamplePredictions, save_samples
from resnet_jax.weights.card import Prediction

NAMES = (
    *("a$b_$", "$", r"\frac{$x$}", r"\$x", "$x$", "_hidden", "%d {x}", "&#"),
    *("\x1b[31mred", "nul\x00", "two\nlines", "\udcff", "\ud800"),
    *("\N{GRINNING FACE}", "\u732b", "\u202eeman", "n" * 500, "", " "),
)


@pytest.fixture(autouse=True)
def no_warnings():
    """Turns warnings into errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Python may close at any time the sockets that earlier tests left open.
        warnings.simplefilter("ignore", ResourceWarning)
        yield


def pixels_of(path) -> np.ndarray:
    """Reads a picture."""
    return matplotlib.image.imread(path)


@pytest.mark.parametrize("mathematics", [{}, {"text.usetex": True}])
def test_a_run_with_any_names_of_classes_is_plotted(tmp_path, mathematics):
    rows = [{"step": 1, "train/loss": 1.0, "train/top1": 0.5}]
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    for start in range(0, len(NAMES), 8):
        samples = SamplePredictions()
        for number in range(16):
            label = (start + number) % len(NAMES)
            samples.rows.append(
                {"image": np.zeros((8, 8, 3), np.uint8), "label": label}
                | {"predicted": label if number % 2 else (label + 1) % len(NAMES)}
                | {"probability": 0.5, "right": bool(number % 2)}
            )
        save_samples(tmp_path, samples, NAMES)
        with matplotlib.rc_context(mathematics):
            assert pixels_of(curves.draw(tmp_path)).shape == (800, 1300, 4)


def test_a_prediction_of_a_class_that_the_data_lack_is_plotted(tmp_path):
    row = {"step": 1, "train/loss": 1.0, "train/top1": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    seen = {"image": np.zeros((8, 8, 3), np.uint8), "label": 0, "probability": 0.5}
    samples = SamplePredictions(rows=[seen | {"predicted": 7, "right": False}])
    save_samples(tmp_path, samples, ("cat", "dog"))
    assert curves.draw(tmp_path).exists()


def test_predictions_and_runs_of_any_name_are_plotted(tmp_path):
    predictions = [
        [Prediction(0, name, 0.5), Prediction(1, name, 0.0)] for name in NAMES
    ]
    pixels = np.zeros((len(NAMES), 8, 8, 3), np.uint8)
    draw_predictions(tmp_path / "a$b_$.png", pixels, predictions)
    assert pixels_of(tmp_path / "a$b_$.png").any()
    workdirs = []
    for name in ("a$b_$", "_run", "\x1b[31m", os.fsdecode(b"\xff"), "n" * 200):
        workdirs.append(tmp_path / name)
        workdirs[-1].mkdir()
        row = {"step": 1, "train/top1": 0.5, "eval/top1": 0.5}
        (workdirs[-1] / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert degradation.plot(workdirs, tmp_path / "errors.png").exists()


def test_no_text_is_parsed_as_mathematics_whatever_the_settings(tmp_path):
    drawn = []
    for settings in (
        {},
        {"text.parse_math": True, "axes.formatter.use_mathtext": True},
    ):
        with (
            matplotlib.rc_context(settings),
            picture(tmp_path / "x.svg", figsize=(4, 4)) as figure,
        ):
            axes = figure.subplots()
            axes.set(title="$x^2$", xlim=(0, 1e9))
            drawn.append([text.get_parse_math() for text in figure.findobj(has_text)])
    assert len(drawn[0]) > 5
    assert not any(drawn[0] + drawn[1])


def has_text(artist) -> bool:
    """Returns whether an artist of matplotlib is a text."""
    return hasattr(artist, "get_parse_math")


def test_a_picture_that_cannot_be_written_leaves_no_file(tmp_path):
    (tmp_path / "taken.png").mkdir()
    for name in ("taken.png", "nowhere/x.png"):
        with (
            pytest.raises(UserError, match=f"{name} cannot be written: "),
            picture(tmp_path / name, figsize=(1, 1)),
        ):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


def test_curves_are_plotted_without_damaged_sample_predictions(tmp_path, capsys):
    row = {"step": 1, "train/loss": 1.0, "train/top1": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "predictions.npz").write_bytes(b"PK damaged")
    assert curves.draw(tmp_path).exists()
    assert "predictions.npz cannot be read (" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b'{"mo', b"\xff", b"[]", b"{}", b'"x"'])
def test_curves_are_plotted_without_a_damaged_result(tmp_path, capsys, content):
    row = {"step": 1, "train/loss": 1.0, "train/top1": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "result.json").write_bytes(content)
    assert curves.draw(tmp_path).exists()
    (warning,) = capsys.readouterr().err.splitlines()
    assert "result.json cannot be read (" in warning
    assert (tmp_path / "result.json").read_bytes() == content


@pytest.mark.parametrize("loss", ["null", "NaN", "Infinity", "-Infinity"])
def test_a_run_whose_loss_is_not_finite_is_plotted(tmp_path, capsys, loss):
    rows = f'{{"step": 1, "eval/loss": 1.0}}\n{{"step": 2, "eval/loss": {loss}}}\n'
    (tmp_path / "metrics.jsonl").write_text(rows)
    figures = f'"top1": 0.5, "top5": 1.0, "loss": {loss}, "n_seen": 8'
    (tmp_path / "result.json").write_text(f'{{"model": "resnet18", {figures}}}')
    assert curves.draw(tmp_path).exists()
    assert not capsys.readouterr().err


def test_what_is_in_the_way_of_the_report_is_set_aside(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval/loss": 1.0}\n')
    (tmp_path / "report.png").mkdir()
    assert curves.draw(tmp_path).is_file()
    assert "renamed to report.png.damaged-1" in capsys.readouterr().err


def test_long_names_are_shortened_and_others_are_kept():
    assert shorten("tabby, tabby cat") == "tabby, tabby cat"
    assert shorten("two\nlines") == "two lines"
    assert len(shorten("\x1b" * 500)) == 30


@pytest.mark.parametrize("name", ["x.docx", "x.json"])
def test_a_picture_of_an_unknown_format_is_refused_before_it_is_drawn(name, tmp_path):
    with pytest.raises(UserError, match=r"no picture has the suffix .*Known: .*png"):
        picture_to_write(f"{tmp_path}/{name}")
    assert picture_to_write(f"{tmp_path}/x.PNG") == tmp_path / "x.PNG"
    assert picture_to_write(f"{tmp_path}/x") == tmp_path / "x"
