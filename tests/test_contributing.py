"""The examples of CONTRIBUTING.md apply to this checkout, and what they add works."""

import itertools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import pages, words
from tests.helpers.packaging_files import tracked
from tests.helpers.runs import ROOT

# What the commands below a diff print, by the file that it changes.
PRINTED = {
    "resnet_jax/models/zoo.py": (r"^wrn22_10 +26\.80 .*Zagoruyko", r"\b1 passed"),
    "configs/pycls.py": (r"^pycls\.py:152 .* 79\.1$", "all is well"),
    "resnet_jax/weights/schemes/detectron2.py": (
        r"proposal_generator",
        r"^model_final\.pth: resnet50 -> detector\.safetensors \(names of timm\)",
    ),
    "resnet_jax/data/sources.py": (r"at step 10\b",),
    "resnet_jax/training/optim.py": ("all is well",),
}
# The file that the command of a naming scheme reads: names of detectron2, written by
# hand, for the tensors of timm's ResNet-50.
DETECTOR = r"""
import re
import numpy as np
from resnet_jax.models import get_spec
from resnet_jax.weights import SCHEMES
from resnet_jax.weights.naming import to_foreign
from tests.helpers import keyed

spec = get_spec("resnet50")
tensors = {"proposal_generator.anchors": np.zeros(3, np.float32)}
for name, value in to_foreign(keyed.variables(spec), spec, SCHEMES["timm"]).items():
    for pattern, new in (
        (r"^(conv1|bn1)", r"stem.\1"),
        (r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}"),
        (r"downsample\.0", "shortcut"),
        (r"downsample\.1", "shortcut.norm"),
        (r"bn(\d)", r"conv\1.norm"),
    ):
        name = re.sub(pattern, new, name)
    if not name.startswith("fc."):
        tensors[f"model.backbone.bottom_up.{name}"] = value
with open("model_final.pth", "wb") as file:
    np.savez(file, **tensors)
"""


def examples() -> list:
    """Returns each diff with the commands of the bash fence that follows it."""
    found = pages.fences("CONTRIBUTING.md", "diff", "bash")
    pairs = itertools.pairwise(found)
    return [
        pytest.param(diff.text, bash.text, id=file_of(diff.text))
        for diff, bash in pairs
        if (diff.language, bash.language) == ("diff", "bash")
    ]


def file_of(diff: str) -> str:
    """Returns the only file that a diff changes."""
    (file,) = re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)
    return file


EXAMPLES = examples()


def test_every_diff_has_commands_and_every_kind_has_a_diff():
    assert [file_of(x.text) for x in pages.fences("CONTRIBUTING.md", "diff")] == [
        example.id for example in EXAMPLES
    ]
    assert [example.id for example in EXAMPLES] == list(PRINTED)


@pytest.mark.parametrize(("diff", "bash"), EXAMPLES)
def test_an_addition_is_one_file_or_one_place_in_a_file(diff, bash):
    added = [
        [x[1:] for x in hunk.splitlines() if x.startswith("+")]
        for hunk in re.split(r"^@@ .*\n", diff, flags=re.MULTILINE)[1:]
    ]
    assert not re.search(r"^-(?!-- )", diff, re.MULTILINE)
    # A line that imports a name stands at the top of its file.
    others = [x for x in added if not all(line.startswith("from ") for line in x)]
    assert len(others) == 1


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Returns a copy of the files that git knows, with no repository around it."""
    for path in tracked():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    # Otherwise git would look for a repository above.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def apply(diff: str, checkout: pathlib.Path) -> pathlib.Path:
    """Applies a diff to a checkout; returns the file that it changes."""
    subprocess.run(
        ["git", "apply", "-"], cwd=checkout, input=diff, text=True, check=True
    )
    return checkout / file_of(diff)


def run(checkout: pathlib.Path, *arguments: str) -> str:
    """Runs Python in a checkout, as a user does; returns what it prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(checkout), "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize(("diff", "bash"), EXAMPLES)
def test_a_diff_applies_and_leaves_code_in_the_style_of_this_project(
    diff, bash, checkout
):
    file = apply(diff, checkout)
    for command in (["check"], ["format", "--check"]):
        run(checkout, "-m", "ruff", *command, str(file))
    assert not list(words.problems(file))


@pytest.mark.slow
@pytest.mark.parametrize(("diff", "bash"), EXAMPLES)
def test_an_example_does_what_its_commands_show(diff, bash, checkout):
    apply(diff, checkout)
    if "model_final.pth" in bash:
        run(checkout, "-c", DETECTOR)
    if "pneumoniamnist.npz" in bash:
        write_medmnist(checkout / "pneumoniamnist.npz")
    printed = ""
    for line in re.sub(r"\\\n\s*", "", bash).splitlines():
        program, *arguments = shlex.split(line)
        module = [] if program == "python" else ["-m", program]
        printed += run(checkout, *module, *arguments)
    for pattern in PRINTED[file_of(diff)]:
        assert re.search(pattern, printed, re.MULTILINE), printed


def write_medmnist(path: pathlib.Path) -> None:
    """Writes a small file in the layout of MedMNIST: 28x28 grey, two classes."""
    arrays = {}
    for split, size in (("train", 128), ("val", 20)):
        labels = np.arange(size, dtype=np.uint8)[:, None] % 2
        arrays[f"{split}_images"] = (
            np.zeros((size, 28, 28), np.uint8) + 200 * labels[:, None]
        )
        arrays[f"{split}_labels"] = labels
    np.savez(path, **arrays)
