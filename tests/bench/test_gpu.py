"""Tests of `bench gpu` on this CPU, with the packages of a bare machine with a GPU."""

import importlib.metadata
import json
import pathlib
import sys
import time

import jax
import pytest
from packaging.requirements import Requirement

from resnet_jax.bench import __main__ as command
from resnet_jax.bench import gpu, gpu_worker, profiler_trace
from resnet_jax.errors import UserError
from resnet_jax.models import ZOO
from tests.helpers import runs

# The packages of a bare machine with a GPU; their requirements are installed, too.
BARE = ("jax", "flax", "optax", "orbax-checkpoint", "jaxtyping")
# The content of sitecustomize.py, which Python runs before any other import.
HIDING = """
import os
import sys
from importlib.machinery import PathFinder


class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in os.environ["HIDDEN"].split(","):
            return None
        return super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


def hide(tmp_path: pathlib.Path, *packages: str) -> dict[str, str]:
    """Returns environment variables that hide packages from Python's imports."""
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    path = f"{tmp_path}:{runs.ROOT}"
    return {"PYTHONPATH": path, "HIDDEN": ",".join(packages)}


def packages_outside(distributions: tuple[str, ...]) -> list[str]:
    """Returns the installed packages that none of the distributions requires."""
    required, pending = set(), list(distributions)
    while pending:
        name = pending.pop().lower().replace("_", "-")
        if name in required:
            continue
        required.add(name)
        try:
            lines = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or marker.evaluate({"extra": ""}):
                pending.append(requirement.name)
    return [
        package
        for package, owners in importlib.metadata.packages_distributions().items()
        if not required & {owner.lower().replace("_", "-") for owner in owners}
        # The project itself may be installed, too.
        and package != "resnet_jax"
    ]


def check(tmp_path: pathlib.Path, *flags: str, **environment: str):
    """Runs the check; returns its exit code, output, and the content of its JSON."""
    path = tmp_path / "gpu.json"
    small = ("--batch_size=2", "--steps=6", "--torch=/bin/false", f"--json={path}")
    code, output = runs.run_python(
        *("-m", "resnet_jax.bench", "gpu", *small, *flags),
        # As in conftest.py, programs compile faster and run slower.
        XLA_FLAGS="--xla_backend_optimization_level=0",
        **environment,
    )
    return code, output, json.loads(path.read_text()) if path.exists() else None


@pytest.mark.long
def test_the_check_runs_with_the_packages_of_a_bare_machine(tmp_path):
    hidden = packages_outside(BARE)
    assert {"ml_collections", "grain", "tensorflow_datasets", "PIL"} <= set(hidden)
    assert not {"jax", "numpy", "psutil", "resnet_jax"} & set(hidden)
    code, output, report = check(
        tmp_path,
        *("--networks=cifar_resnet20,plain20", "--model=resnet26", "--image_size=32"),
        **hide(tmp_path, *hidden),
    )
    assert code == 0, output
    assert "This was not run on a GPU: JAX computes on cpu." in output
    assert report["gpu"] is False
    assert report["device"]["platform"] == "cpu"
    assert report["versions"].keys() >= {"python", "jax", "jaxlib", "flax", "optax"}
    assert (report["image_size"], report["batch_size"], report["steps"]) == (32, 2, 6)

    compared = [(x["network"], x["dtype"], x["equal"]) for x in report["logits"]]
    assert compared == [
        (name, dtype, True)
        for name in ("cifar_resnet20", "plain20")
        for dtype in ("float32", "bfloat16")
    ]

    linen, torch = report["rows"][::2], report["rows"][1::2]
    assert [row["unit"] for row in linen] == ["images/s", "ms", "GiB", "s"]
    # Six steps are measured in four rounds.
    assert [row["repeats"] for row in linen] == [4, 4, 1, 1]
    for row in linen:
        assert row["peer"] == "stock Linen"
        assert row["ratio"] == row["value"] / row["peer_value"] > 0
    for row in torch:
        assert row["peer"] == "torchvision, channels_last, AMP"
        assert row["left_out"] == "it ended with exit code 1"
    ((part),) = report["left_out"]
    assert part["part"].endswith("bfloat16: torchvision, channels_last, AMP")

    milliseconds = [kernel["ms_per_step"] for kernel in report["kernels"]]
    assert len(milliseconds) == 10
    assert milliseconds == sorted(milliseconds, reverse=True)
    assert 0 < sum(kernel["share"] for kernel in report["kernels"]) < 1
    assert report["kernels"][0]["name"] in output


@pytest.mark.slow
def test_a_wrong_logit_fails_the_check_after_all_parts_are_measured(tmp_path):
    golden = json.loads(gpu.GOLDEN.read_text())
    figures = golden["cifar_resnet20"]
    # The change exceeds the bound of float32, but not that of bfloat16.
    figures[3] += 1e-3 * max(map(abs, figures))
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(golden))
    code, output, report = check(
        tmp_path,
        *(f"--golden={wrong}", "--networks=cifar_resnet20"),
        *("--model=cifar_resnet20", "--image_size=16"),
    )
    assert code == 1
    message = "error: The logits of cifar_resnet20 in float32 differ from the golden"
    assert message in output.splitlines()[-1]
    assert "DIFFERS: 1.0e-03 (0.0001)" in output
    assert [result["equal"] for result in report["logits"]] == [False, True]
    linen, _ = report["rows"][:2]
    assert linen["value"] > 0
    assert linen["left_out"] == "stock Linen has no cifar_resnet20 here"
    assert len(report["kernels"]) == 10


@pytest.mark.parametrize(
    ("logits", "dtype", "equal", "failure"),
    [
        ([1.0, -2.0001], "float32", True, ""),
        ([1.0, -2.0003], "float32", False, ""),
        ([1.0, -2.05], "bfloat16", True, ""),
        ([1.2, -2.0], "bfloat16", False, ""),
        ([1.0, float("nan")], "bfloat16", False, "they are not finite"),
        ([float("inf"), -2.0], "float32", False, "they are not finite"),
        ([1.0], "float32", False, "there are 1 figures, not 2"),
    ],
)
def test_logits_are_equal_within_their_dtypes_bound(logits, dtype, equal, failure):
    result = gpu.compare_with_golden("resnet18", dtype, {"logits": logits}, [1.0, -2.0])
    assert (result["equal"], result["failure"]) == (equal, failure)
    # Strict JSON can hold neither NaN nor infinity.
    json.dumps(result, allow_nan=False)


def test_a_network_that_fails_is_not_equal():
    answer = {"error": "XlaError: no"}
    result = gpu.compare_with_golden("resnet18", "float32", answer, [1.0])
    assert (result["equal"], result["failure"]) == (False, "XlaError: no")


def test_the_networks_of_the_check_have_every_option_of_the_zoo():
    checked = [ZOO[name].spec for name in gpu.NETWORKS]
    specs = [entry.spec for entry in ZOO.values()]
    assert set(map(type, checked)) == set(map(type, specs))
    for field in (
        *("blocks", "stem_pool", "stride_at", "stride_in", "shortcut", "shortcut_pool"),
        *("spatial", "attention", "anti_alias", "norm", "weight_standardization"),
    ):
        values = {getattr(spec, field) for spec in specs if hasattr(spec, field)}
        values -= {getattr(spec, field) for spec in checked if hasattr(spec, field)}
        if field == "blocks":
            # Tuples for three and for four stages differ, though the blocks are equal.
            values = {kind for blocks in values for kind in blocks}
            values -= {kind for spec in checked for kind in getattr(spec, "blocks", ())}
        assert not values, field


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--golden=/no/logits.json", "Run the command in a checkout of the project"),
        ("--networks=resnet5O", "There is no golden logits of --networks=resnet5O."),
        ("--dtype=half", "There is no --dtype=half."),
        ("--json=/no/such/folder/x.json", "there is no directory /no/such/folder"),
    ],
)
def test_mistakes_are_reported_before_anything_is_measured(flag, message, capsys):
    with pytest.raises(UserError) as error:
        command.main(["bench", "gpu", flag])
    assert message in str(error.value)
    assert not capsys.readouterr().out


def test_the_error_for_missing_packages_tells_how_to_install_them(tmp_path):
    code, output, report = check(tmp_path, **hide(tmp_path, "jaxtyping", "optax"))
    assert (code, report) == (1, None)
    assert output.splitlines() == [
        "error: The check needs packages that are not installed. Run: pip install"
        " optax jaxtyping"
    ]


@pytest.mark.slow
def test_a_process_that_takes_too_long_is_killed():
    worker = gpu.GPUWorker(sys.executable, "logits", "resnet_jax")
    # Importing JAX alone takes longer.
    with pytest.raises(gpu.TooLateError, match="did not end within the 0 s"):
        worker.ask_within(0.01, "device")
    assert worker.process.wait() < 0
    worker.close()


@pytest.mark.slow
def test_without_time_every_part_is_left_out_by_name(tmp_path):
    args = command.make_parser("gpu").parse(
        ["--networks=plain20,highway19", f"--json={tmp_path / 'gpu.json'}"]
    )
    late = gpu.Check(
        args=args,
        golden=json.loads(gpu.GOLDEN.read_text()),
        deadline=time.monotonic(),
        environment={},
        report={"left_out": [], "device": {"platform": "cpu"}},
    )
    gpu.compare_logits(late, late.seconds_left())
    assert gpu.compare_steps(late, image_size=32, batch_size=2, steps=1) == []
    assert gpu.report_logits(late) == []
    parts = [left_out["part"] for left_out in late.report["left_out"]]
    assert len(parts) == 7
    assert {f"logits of {name} in bfloat16" for name in args.networks} <= set(parts)
    assert [part.rpartition(": ")[2] for part in parts[:3]] == list(gpu_worker.MAKERS)
    assert {left_out["reason"] for left_out in late.report["left_out"]} == {
        "no time was left"
    }
    assert late.report["rows"] == late.report["logits"] == []


@pytest.mark.slow
def test_a_failing_step_is_a_failure_unless_it_is_a_baselines(tmp_path):
    args = command.make_parser("gpu").parse(
        ["--model=resnet5O", "--torch=/no/python", f"--json={tmp_path / 'x'}"]
    )
    check = gpu.Check(
        args=args,
        golden={},
        deadline=time.monotonic() + 900,
        environment={},
        report={"left_out": [], "device": {"platform": "cpu"}},
    )
    (failure,) = gpu.compare_steps(check, image_size=32, batch_size=2, steps=1)
    step = "train step of resnet5O, 32 px, batch 2, bfloat16"
    message = "There is no network 'resnet5O'. Did you mean"
    assert failure.startswith(f"The {step} failed: {message}")
    reasons = {x["part"]: x["reason"] for x in check.report["left_out"]}
    assert reasons.pop(f"{step}: resnet_jax").startswith(message)
    assert reasons == {
        f"{step}: stock Linen": "stock Linen has no resnet5O here",
        f"{step}: torchvision, channels_last, AMP": (
            "/no/python: No such file or directory"
        ),
    }


# Tests of the kernels in a trace.

TRACE = """
planes {
  name: "/host:CPU"
  lines {
    name: "launches"
    events {
      metadata_id: 1
      duration_ps: 9000000
      stats { metadata_id: 1 str_value: "conv.1" }
    }
  }
  event_metadata { key: 1 value { id: 1 name: "Thunk" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
}
"""
GPU_PLANE = """
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #13(Compute)"
    events { metadata_id: 1 duration_ps: 4000000 }
    events { metadata_id: 2 duration_ps: 1000000 }
    events { metadata_id: 1 duration_ps: 2000000 }
  }
  lines { name: "XLA Modules" events { metadata_id: 3 duration_ps: 8000000 } }
  event_metadata { key: 1 value { id: 1 name: "sm90_xmma_fprop" } }
  event_metadata { key: 2 value { id: 2 name: "loop_add_fusion" } }
  event_metadata { key: 3 value { id: 3 name: "jit_train_step" } }
}
"""


@pytest.mark.parametrize(
    ("text", "kernels"),
    [
        (TRACE, {"conv.1": 9e-6}),
        (TRACE + GPU_PLANE, {"sm90_xmma_fprop": 6e-6, "loop_add_fusion": 1e-6}),
    ],
)
def test_only_kernels_count_as_operations_in_the_trace_of_a_gpu(text, kernels):
    profile = jax.profiler.ProfileData.from_serialized_xspace(
        jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)
    )
    events = list(profiler_trace.operations(profile.planes))
    costliest = gpu_worker.costliest(events, steps=2)
    total = sum(kernels.values())
    assert [kernel["name"] for kernel in costliest] == list(kernels)
    for kernel in costliest:
        seconds = kernels[kernel["name"]]
        assert kernel["ms_per_step"] == pytest.approx(500 * seconds)
        assert kernel["share"] == pytest.approx(seconds / total)
    assert costliest[0]["calls_per_step"] == (1 if len(kernels) == 2 else 0.5)
