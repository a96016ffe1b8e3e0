"""The command `predict`, which prints text or JSON and draws a picture."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resnet_jax import predict
from resnet_jax.errors import UserError
from resnet_jax.models import build
from resnet_jax.weights.card import CIFAR10_CLASSES
from resnet_jax.weights.save import save
from tests.helpers import runs, small_networks
from tests.helpers.oversized import files_that_claim
from tests.helpers.pictures import encode, noise
from tests.helpers.real_data import real_data


@pytest.fixture
def weights(tmp_path) -> str:
    """Writes weights of a small network for CIFAR-10; returns the path."""
    card, variables = small_networks.card_and_variables(
        "akamaster_resnet20", num_classes=10
    )
    path = str(tmp_path / "w.safetensors")
    save(path, variables, card)
    return path


@pytest.fixture
def images(tmp_path) -> list[str]:
    """Writes a colour and a grey image of other sizes than the network's."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / "colour.png", tmp_path / "grey.jpg"]
    for path, shape in zip(paths, ((40, 50, 3), (32, 31)), strict=True):
        Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


def test_the_five_best_classes_of_each_image_are_printed(weights, images, capsys):
    predict.main(["predict", weights, *images])
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[6]] == images
    names = {line.split()[-1] for line in lines[1:6]}
    assert len(names) == 5
    assert names < set(CIFAR10_CLASSES)


def test_json_is_one_document_with_the_logits_of_the_network(weights, images, capsys):
    predict.main(["predict", weights, *images, "--json", "--logits"])
    document = json.loads(capsys.readouterr().out)
    assert document["network"] == "akamaster_resnet20"
    card, variables = small_networks.card_and_variables(
        "akamaster_resnet20", num_classes=10
    )
    pixels = card.crop(images)
    logits = build(card.make_spec()).apply(
        variables, card.normalize(jnp.asarray(pixels))
    )
    given = [image["logits"] for image in document["images"]]
    # The command computes the same sums in another order.
    np.testing.assert_allclose(given, logits, rtol=1e-4, atol=1e-5)
    for image in document["images"]:
        best = image["top"][0]
        assert best["index"] == int(np.argmax(image["logits"]))
        assert sum(row["probability"] for row in image["top"]) <= 1 + 1e-9


def test_a_picture_shows_the_predictions(weights, images, tmp_path):
    predict.main(["predict", weights, *images, f"--save={tmp_path / 'shown.png'}"])
    with Image.open(tmp_path / "shown.png") as picture:
        picture.load()
        assert picture.width > 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.png"], r"gone\.png: No such file"),
        ([__file__], "not an image in a known format"),
        (["{image}", "--save=picture.xyz"], r"picture\.xyz cannot be written"),
        (["{image}", "--model=resnet50"], "does not fit resnet50"),
        (["{image}", "--model=resnet5"], "Did you mean resnet50"),
    ],
)
def test_each_mistake_gets_one_line(weights, images, arguments, message):
    arguments = [argument.format(image=images[0]) for argument in arguments]
    with pytest.raises(UserError, match=message) as error:
        predict.main(["predict", weights, *arguments])
    assert "\n" not in str(error.value)


def lines_of_images(text: str) -> dict[str, list[str]]:
    """Returns the printed classes of each image, by the name of its file."""
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if not line.startswith("  ")]
    ends = [*starts[1:], len(lines)]
    return {lines[i]: lines[i + 1 : j] for i, j in zip(starts, ends, strict=True)}


def test_bad_files_are_named_and_the_others_are_classified(
    weights, images, tmp_path, capsys
):
    predict.main(["predict", weights, *images])
    expected = lines_of_images(capsys.readouterr().out)
    bad = {
        "empty.png": b"",
        "text.jpg": b"no image",
        "cut.png": pathlib.Path(images[0]).read_bytes()[:500],
        "huge.jpg": files_that_claim(30000)["JPEG"],
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    gone = str(tmp_path / "gone.png")
    paths = [str(tmp_path / name) for name in bad]
    files = [paths[0], images[0], *paths[1:], gone, images[1]]
    with pytest.raises(UserError, match=r"^5 of the given .* images: 2"):
        predict.main(["predict", weights, *files])
    printed = capsys.readouterr()
    assert lines_of_images(printed.out) == expected
    errors = printed.err.splitlines()
    assert len(errors) == 5
    for path, error in zip([*paths, gone], errors, strict=True):
        assert error.startswith(f"error: {path}")
    with pytest.raises(UserError, match="5 of the given"):
        predict.main(["predict", weights, *files, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert [image["file"] for image in document["images"]] == images


def test_paths_that_cannot_be_used_do_not_keep_others_from_being_classified(
    weights, images, tmp_path, capsys
):
    loop, through_file = tmp_path / "loop.png", f"{images[0]}/inside.png"
    loop.symlink_to(loop)
    too_long = str(tmp_path / ("x" * 300 + ".png"))
    bad = [str(loop), through_file, too_long, os.devnull, "ftp://host/a.png"]
    with pytest.raises(UserError, match=r"^5 of the given .* images: 2"):
        predict.main(["predict", weights, images[0], *bad, images[1]])
    printed = capsys.readouterr()
    assert list(lines_of_images(printed.out)) == images
    assert len(printed.err.splitlines()) == 5
    for path in bad:
        with pytest.raises(UserError, match=r"^(?!1 of the given)"):
            predict.main(["predict", weights, path])
        assert capsys.readouterr().err == ""


def test_names_with_line_breaks_take_one_line(tmp_path, images, capsys):
    card, variables = small_networks.card_and_variables(
        "akamaster_resnet20", num_classes=10
    )
    names = ("a\nb", "c\td", "e\rf", "g\u2028h", "\n", "i", "j", "k", "l", "m")
    weights = str(tmp_path / "names.safetensors")
    save(weights, variables, dataclasses.replace(card, classes=names))
    file, bad = (tmp_path / name for name in ("x\ny\tz.png", "bad\n.png"))
    file.write_bytes(pathlib.Path(images[0]).read_bytes())
    bad.write_bytes(b"no image")
    with pytest.raises(UserError, match="1 of the given"):
        predict.main(["predict", weights, str(file), str(bad)])
    printed = capsys.readouterr()
    lines = printed.out.split("\n")
    assert lines[0] == str(tmp_path / r"x\ny\tz.png")
    assert all("%" in line for line in lines[1:6])
    assert lines[6:] == [""]
    assert len(printed.err.splitlines()) == 1


def test_files_of_which_none_is_good_give_no_prediction(weights, tmp_path, capsys):
    (tmp_path / "empty.png").touch()
    arguments = [weights, str(tmp_path / "empty.png"), str(tmp_path / "gone.png")]
    save = tmp_path / "shown.png"
    with pytest.raises(UserError, match=r"2 of the given .* images: 0"):
        predict.main(["predict", *arguments, f"--save={save}"])
    assert capsys.readouterr().out == ""
    assert not save.exists()


def test_a_folder_stands_for_the_images_in_it_and_in_its_subfolders(
    weights, images, tmp_path, capsys
):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "notes.txt").write_text("no image")
    first, second = folder / "a.png", folder / "inner/b.jpg"
    for image, path in zip(images, (first, second), strict=True):
        path.write_bytes(pathlib.Path(image).read_bytes())
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="1 of the given"):
        predict.main(["predict", weights, str(folder), str(tmp_path / "nothing")])
    printed = capsys.readouterr()
    assert list(lines_of_images(printed.out)) == [str(first), str(second)]
    assert f"{folder}: 1 file is left out (.txt: 1)." in printed.err
    assert f"{tmp_path / 'nothing'} holds no images." in printed.err


def test_an_image_may_be_given_twice_and_come_from_a_pipe(
    weights, images, tmp_path, capsys
):
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    content = pathlib.Path(images[0]).read_bytes()
    writer = threading.Thread(target=pathlib.Path(pipe).write_bytes, args=(content,))
    writer.start()
    predict.main(["predict", weights, images[0], pipe, images[0]])
    writer.join()
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[6], lines[12]] == [images[0], pipe, images[0]]
    assert lines[1:6] == lines[7:12] == lines[13:18]


@pytest.mark.parametrize("pixels", ("1999", "2000"))
def test_the_limit_of_pixels_is_a_flag(weights, images, capsys, pixels):
    arguments = ["predict", weights, images[0], f"--max_pixels={pixels}"]
    if pixels == "2000":
        predict.main(arguments)
        return
    message = r"colour\.png claims 50x40 = 2,000 pixels, .* \(--max_pixels in predict"
    with pytest.raises(UserError, match=message):
        predict.main(arguments)


@pytest.mark.slow
def test_an_interrupted_command_has_printed_what_it_computed(weights, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(100):
        (folder / f"{number:03}.png").write_bytes(encode(noise(number, 9, 9), "PNG"))
    # The command waits for the pipe after these images.
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-m", "resnet_jax.predict", weights]
    with subprocess.Popen(
        [*command, str(folder), str(tmp_path / "pipe")],
        cwd=runs.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    ) as process:
        # At least two batches of 32 images are printed, and the third one as well if
        # the signal comes late. `communicate` would lose lines that are in the buffer.
        printed = [process.stdout.readline() for _ in range(6 * 64)]
        process.send_signal(signal.SIGINT)
        printed += process.stdout.readlines()
        errors = process.stderr.read()
    assert process.returncode == 130
    names = list(lines_of_images("".join(printed)))
    assert 64 <= len(names) <= 96
    assert names == [f"{folder}/{number:03}.png" for number in range(len(names))]
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_reader_may_close_the_output_early(weights, images):
    command = (
        f"{sys.executable} -m resnet_jax.predict {weights} {' '.join(images * 40)}"
    )
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} | head -n 1"],
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 141
    assert done.stdout == f"{images[0]}\n"
    assert done.stderr == ""


def test_a_network_without_a_head_is_rejected(tmp_path, images):
    card, variables = small_networks.card_and_variables("resnet50", num_classes=0)
    save(str(tmp_path / "w.npz"), variables, card)
    with pytest.raises(UserError, match="has no head"):
        predict.main(["predict", str(tmp_path / "w.npz"), images[0]])


def test_real_images_of_any_size_are_read(weights, capsys):
    directory = real_data("cifar10-samples")
    paths = [str(path) for path in sorted(directory.glob("*.png"))]
    predict.main(["predict", weights, *paths, "--json"])
    found = json.loads(capsys.readouterr().out)["images"]
    assert [image["file"] for image in found] == paths
