"""The command `predict`, which prints text or JSON and draws a picture."""

import csv
import dataclasses
import io
import json
import os
import pathlib
import shlex
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


def run(
    *arguments: str, stdin: bytes = b"", rest: str = "", **options
) -> subprocess.CompletedProcess:
    """Runs the command with a list of paths on standard input.

    Args:
      *arguments: Arguments of the command.
      stdin: The content of its standard input.
      rest: The text after the command in the shell, such as a pipe.
      **options: Arguments of `subprocess.run`.
    """
    command = shlex.join([sys.executable, "-m", "resnet_jax.predict", *arguments])
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} {rest}"],
        input=stdin,
        cwd=runs.ROOT,
        capture_output=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        **options,
    )


def test_paths_come_from_a_list_of_find_and_bad_ones_are_named(
    weights, images, tmp_path
):
    odd = os.fsencode(tmp_path) + b"/a\nb \xff.png"
    pathlib.Path(os.fsdecode(odd)).write_bytes(pathlib.Path(images[0]).read_bytes())
    paths = [odd, os.fsencode(images[1]), os.fsencode(tmp_path / "gone[1].png")]
    done = run(weights, "-", "--json", "--topk=1", stdin=b"\0".join(paths))
    assert done.returncode == 1
    found = json.loads(done.stdout)["images"]
    assert [os.fsencode(image["file"]) for image in found] == paths[:2]
    assert [len(image["top"]) for image in found] == [1, 1]
    first, last = done.stderr.decode().splitlines()
    assert "gone[1].png: No such file" in first
    assert last.startswith("error: 1 of the given files")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["-"], b"\r\n\n", "error: Standard input names no images"),
        (["-"], b"\xff\xd8\xff\xe0 of a JPEG", "error: Standard input is an image"),
        (["gone*.png"], b"", "error: No image matches the pattern gone*.png."),
        (["-", "-"], b"", "error: Standard input (-) can be read only once"),
        (["a.png", "--csv", "--json"], b"", "error: --csv and --json exclude"),
        (["a.png", "--topk=0"], b"", "error: Argument --topk: '0' is not a whole"),
    ],
)
def test_a_command_without_images_ends_with_one_sentence(
    weights, arguments, stdin, message
):
    done = run(weights, *arguments, stdin=stdin)
    assert (done.returncode, done.stdout) == (1, b"")
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(message)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["--csv", "--json"])
def test_a_table_is_printed_as_results_come_and_its_reader_may_close_it(
    weights, images, form
):
    paths = "".join(f"{images[0]}\n" for _ in range(300)).encode()
    done = run(weights, "-", form, stdin=paths, rest="| head -n 2")
    assert done.returncode == 141
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr == b""


def many_kinds(folder: pathlib.Path) -> list[str]:
    """Writes images of many kinds, of which three are bad; returns all paths."""
    folder.mkdir()
    image = noise(0, 40, 30)
    deep = np.random.default_rng(0).integers(2**16, size=(30, 40), dtype=np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    contents = {
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG"),
        "cut.jpg": encode(image, "JPEG")[:400],
        "deep.png": encode(Image.fromarray(deep), "PNG"),
        "empty.jpg": b"",
        "grey.webp": encode(image.convert("L"), "WEBP"),
        "palette.gif": encode(image.convert("P"), "GIF"),
        "text.png": b"no image",
        "turned.jpg": encode(image, "JPEG", exif=turned),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in contents]


def test_a_table_has_a_row_for_each_good_image_in_the_order_of_the_images(
    tmp_path, capsys
):
    card, variables = small_networks.card_and_variables(
        "akamaster_resnet20", num_classes=5
    )
    names = ('a, "b"', "two\nlines", "h\u00e9", "=1+1", "e")
    weights = str(tmp_path / "w.safetensors")
    save(weights, variables, dataclasses.replace(card, classes=names))
    paths = many_kinds(tmp_path / "kinds")
    good = [path for path in paths if not path.endswith(("cut.jpg", "y.jpg", "t.png"))]
    folder = str(tmp_path / "kinds")
    with pytest.raises(UserError, match=r"^6 of the given .* images: 10\.$"):
        predict.main(["predict", weights, folder, folder, "--csv", "--logits"])
    printed = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(printed.out, newline="")))
    assert [row["path"] for row in rows] == 2 * good
    assert rows[:5] == rows[5:]
    for row in rows:
        logits = np.array([float(row[f"logit_{index}"]) for index in range(5)])
        order = np.argsort(-logits)
        for place, index in enumerate(order, 1):
            assert row[f"top{place}_name"] == names[index]
        probability = np.exp(logits).max() / np.exp(logits).sum()
        # The logits are float32, and the table has nine digits.
        assert float(row["top1_probability"]) == pytest.approx(probability, rel=1e-6)
    bad = [line.split(": ")[1] for line in printed.err.splitlines()]
    assert bad == 2 * sorted({*paths} - {*good})


def test_with_flip_an_image_and_its_mirror_image_have_equal_logits(
    weights, tmp_path, capsys
):
    image = noise(0, 32, 32)
    image.save(tmp_path / "a.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "b.png")

    def logits(*flags: str) -> np.ndarray:
        paths = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
        predict.main(["predict", weights, *paths, "--json", "--logits", *flags])
        images = json.loads(capsys.readouterr().out)["images"]
        return np.array([image["logits"] for image in images])

    single, mean = logits(), logits("--flip", "--batch_size=1")
    # Programs for two views and other batch sizes sum in another order.
    np.testing.assert_allclose(mean, [single.mean(axis=0)] * 2, rtol=1e-4, atol=1e-5)
    assert abs(single[0] - single[1]).max() > 1e-2


def test_a_picture_shows_the_first_images_of_many(weights, images, tmp_path, capsys):
    save = tmp_path / "shown.png"
    files = [images[0]] * (predict.MOST_SHOWN + 1)
    predict.main(["predict", weights, *files, f"--save={save}", "--topk=1"])
    printed = capsys.readouterr()
    assert printed.out.count("%") == len(files)
    assert printed.err == f"{save} shows the first 100 of 101 images.\n"
    assert save.stat().st_size


@pytest.mark.slow
def test_a_terminal_shows_a_progress_bar_and_a_file_does_not(weights, images, tmp_path):
    lines = f"printf '%s\\n' {shlex.join(images)}"
    command = f"{sys.executable} -m resnet_jax.predict {weights} - > {tmp_path / 'out'}"
    done = subprocess.run(
        ["script", "-qec", f"stty cols 80 rows 24; {lines} | {command}", "/dev/null"],
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0
    assert "images" in done.stdout
    assert list(lines_of_images((tmp_path / "out").read_text())) == images
    quiet = run(weights, "-", stdin="\n".join(images).encode())
    assert (quiet.returncode, quiet.stderr) == (0, b"")


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
