"""Every damage of a workdir ends in success with a warning, or in one sentence.

A finished run and a killed one are damaged in every file and directory, and then
resumed, evaluated, loaded and plotted. No result may be wrong, and commands that read
change nothing that they did not write.
"""

import os
import pathlib
import shutil
import stat

import numpy as np
import pytest
from ml_collections import ConfigDict

from resnet_jax.errors import UserError
from resnet_jax.reports.curves import draw
from resnet_jax.training.evaluation import evaluate_workdir
from resnet_jax.training.loop import train
from resnet_jax.weights.trained import load
from tests.helpers import tiny

NOBODY = 65534
KINDS = ("finished", "killed")


def replace_by_directory(path: pathlib.Path) -> None:
    remove(path)
    path.mkdir()


def replace_by_file(path: pathlib.Path) -> None:
    remove(path)
    path.write_bytes(b"x")


def replace_by_dangling_link(path: pathlib.Path) -> None:
    remove(path)
    path.symlink_to("nowhere")


def remove(path: pathlib.Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: pathlib.Path) -> None:
    """Leaves zeros in the second half, as a power cut does."""
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2] + bytes(size - size // 2))


def forbid(path: pathlib.Path) -> None:
    path.chmod(0)


def write(content: bytes):
    """Returns a damage that replaces the content of a file."""
    return lambda path: path.write_bytes(content)


OF_FILES = {
    "cut": cut,
    "zeros": zero,
    "empty": write(b""),
    "bytes": write(bytes(range(256)) * 3),
    "{}": write(b"{}"),
    "[]": write(b"[]"),
    "null": write(b"null"),
    "text": write(b'"x"'),
    "removed": remove,
    "directory": replace_by_directory,
    "link": replace_by_dangling_link,
    "forbidden": forbid,
}
OF_DIRECTORIES = {
    "removed": remove,
    "emptied": replace_by_directory,
    "file": replace_by_file,
    "link": replace_by_dangling_link,
    "forbidden": forbid,
}


def config() -> ConfigDict:
    """Returns the config of six steps, of which the last two checkpoints are kept."""
    return tiny.config(
        {
            "total": ConfigDict({"steps": 6}),
            "checkpoint.every": ConfigDict({"steps": 1}),
            "checkpoint.keep_last": 2,
            "evaluate.every": ConfigDict({"steps": 3}),
            "log_every": ConfigDict({"steps": 1}),
            "data.num_workers": 0,
        }
    )


def resume(workdir: pathlib.Path) -> tuple:
    result = train(config(), workdir)
    return result["step"], result["top1"], result["loss"]


def evaluate(workdir: pathlib.Path) -> tuple:
    result = evaluate_workdir(workdir)
    return result["step"], result["top1"], result["loss"]


def predict(workdir: pathlib.Path) -> tuple:
    model = load(workdir)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    shape = images[..., : model.card.spec["in_channels"]]
    return int(model.card.origin.split()[-1]), model.logits(shape).tobytes()


def report(workdir: pathlib.Path) -> None:
    draw(workdir)


COMMANDS = {f.__name__: f for f in (resume, evaluate, predict, report)}
# The files that a command writes, by the name of the command.
WRITTEN = {"evaluate": "eval_", "report": "report.png", "predict": "-"}


@pytest.fixture(scope="module")
def runs_to_damage(tmp_path_factory) -> dict:
    """Returns two workdirs by kind, and the right results of each command."""
    root = tmp_path_factory.mktemp("runs")

    def keep_as_killed(evaluation: dict) -> None:
        if evaluation["step"] == 3:
            shutil.copytree(root / "finished", root / "killed")

    train(config(), root / "finished", callback=keep_as_killed)
    right: dict = {"resume": set(), "evaluate": set(), "predict": set()}
    for kind in KINDS:
        right["resume"].add(resume(copy_of(root / kind, root / "copy")))
        steps = [path.name for path in (root / kind / "checkpoints").glob("?")]
        for step in steps:
            copy = copy_of(root / kind, root / "copy")
            for other in {*steps} - {step}:
                shutil.rmtree(copy / "checkpoints" / other)
            for name in ("evaluate", "predict"):
                right[name].add(COMMANDS[name](copy))
    assert len(right["resume"]) == 1
    shutil.rmtree(root / "copy")
    return {"root": root, "right": right}


def copy_of(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Copies a workdir to a path, in place of an older copy."""
    if target.exists():
        shutil.rmtree(target)
    return shutil.copytree(source, target, symlinks=True)


def contents(workdir: pathlib.Path) -> dict[pathlib.Path, bytes | int]:
    """Returns the content of each file below a workdir, and the kind of the others."""
    found: dict[pathlib.Path, bytes | int] = {}
    for path in workdir.rglob("*"):
        mode = path.lstat().st_mode
        found[path] = path.read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode)
    return found


def check(
    workdir: pathlib.Path, damage, path, command: str, right: dict, capfd
) -> None:
    """Damages a path of a workdir, runs a command, and checks how it ends."""
    damage(workdir / path)
    before = contents(workdir)
    as_nobody = damage is forbid and os.geteuid() == 0
    if as_nobody:
        # Permissions do not bind root.
        for owned in [workdir, *workdir.rglob("*")]:
            os.chown(owned, NOBODY, NOBODY, follow_symlinks=False)
        os.seteuid(NOBODY)
    try:
        result = COMMANDS[command](workdir)
        assert result is None or result in right[command], result
    except UserError as error:
        assert "\n" not in str(error)
        assert str(error).endswith(".")
    finally:
        if as_nobody:
            os.seteuid(0)
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err
    if command != "resume":
        after = contents(workdir)
        changed = [
            str(path.relative_to(workdir))
            for path in before.keys() | after.keys()
            if before.get(path) != after.get(path)
        ]
        assert all(path.startswith(WRITTEN[command]) for path in changed), changed


def paths_below(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the paths of a workdir's files and directories, but not of its lock."""
    paths = [path.relative_to(workdir) for path in sorted(workdir.rglob("*"))]
    return [path for path in paths if path.name != "running.json"]


# A damage for each way in which a file of a workdir is read, with the commands that
# read it.
SOME = (
    ("config.json", "cut", ("resume",)),
    ("result.json", "cut", ("report",)),
    ("metrics.jsonl", "zeros", ("report", "resume")),
    ("metrics.jsonl", "forbidden", ("report", "resume")),
    ("predictions.npz", "bytes", ("report",)),
    ("tensorboard", "file", ("resume",)),
    ("checkpoints/6/run/metadata", "{}", ("predict", "evaluate", "resume")),
    ("checkpoints/6/metrics/metrics", "[]", ("predict", "resume")),
    ("checkpoints/6/_CHECKPOINT_METADATA", "[]", ("resume",)),
    ("checkpoints/6", "emptied", ("evaluate", "resume")),
    ("checkpoints", "file", ("predict", "resume")),
)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "damage", "commands"), SOME)
def test_a_damaged_workdir_is_used_or_reported(
    runs_to_damage, tmp_path, capfd, path, damage, commands
):
    root, right = runs_to_damage["root"], runs_to_damage["right"]
    open_to_all(tmp_path)
    for command in commands:
        workdir = copy_of(root / "finished", tmp_path / "run")
        check(workdir, damages_of(workdir / path)[damage], path, command, right, capfd)


def damages_of(path: pathlib.Path) -> dict:
    """Returns the damages of a file or a directory by name."""
    return OF_DIRECTORIES if path.is_dir() else OF_FILES


def open_to_all(folder: pathlib.Path) -> None:
    """Lets other users enter a folder of pytest."""
    for parent in [folder, *folder.parents][:3]:
        parent.chmod(0o755)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_damaged_path_of_a_workdir_is_used_or_reported(
    runs_to_damage, tmp_path, capfd, kind
):
    root, right = runs_to_damage["root"], runs_to_damage["right"]
    open_to_all(tmp_path)
    newest = max(path.name for path in (root / kind / "checkpoints").glob("?"))
    cases = [
        (path, name, damage, command)
        for path in paths_below(root / kind)
        for name, damage in damages_of(root / kind / path).items()
        for command in COMMANDS
        # An older checkpoint is read as the newest one is, but not by the report, and
        # TensorStore reads all of its files alike.
        if path.parts[:1] != ("checkpoints",)
        or (
            command != "report"
            and path.parts[1:2] in ((), (newest,))
            and ("state" not in path.parts or name in ("cut", "zeros", "removed"))
        )
    ]
    failures = []
    for path, name, damage, command in cases:
        workdir = copy_of(root / kind, tmp_path / "run")
        try:
            check(workdir, damage, path, command, right, capfd)
        except Exception as error:
            failures.append(f"{path} {name} {command}: {error!r}")
    assert not failures, "\n".join(failures)
