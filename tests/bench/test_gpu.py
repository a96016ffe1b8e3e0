"""The check for a machine with a GPU, on this CPU with the packages of that machine."""

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

# What is installed beside the GPU, with what these require.
BARE = ("jax", "flax", "optax", "orbax-checkpoint", "jaxtyping")
# Run at the start of a Python process, before any other import.
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
    """Returns an environment in which packages seem not to be installed."""
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    path = f"{tmp_path}:{runs.ROOT}"
    return {"PYTHONPATH": path, "HIDDEN": ",".join(packages)}


def beyond(distributions: tuple[str, ...]) -> list[str]:
    """Returns the installed packages that these distributions do not require."""
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
        # The checkout itself, where it is installed.
        and package != "resnet_jax"
    ]


def check(tmp_path: pathlib.Path, *flags: str, **environment: str):
    """Runs the check; returns the exit code, what was printed, and the JSON file."""
    path = tmp_path / "gpu.json"
    small = ("--batch_size=2", "--steps=6", "--torch=/bin/false", f"--json={path}")
    code, output = runs.run_python(
        *("-m", "resnet_jax.bench", "gpu", *small, *flags),
        # Compiled sooner; see conftest.py.
        XLA_FLAGS="--xla_backend_optimization_level=0",
        **environment,
    )
    return code, output, json.loads(path.read_text()) if path.exists() else None


@pytest.mark.slow
def test_the_check_runs_where_only_the_packages_of_a_bare_machine_are(tmp_path):
    hidden = beyond(BARE)
    assert {"ml_collections", "grain", "tensorflow_datasets", "PIL"} <= set(hidden)
    assert not {"jax", "numpy", "psutil", "resnet_jax"} & set(hidden)
    code, output, found = check(
        tmp_path,
        *("--networks=cifar_resnet20,plain20", "--model=resnet26", "--image_size=32"),
        **hide(tmp_path, *hidden),
    )
    assert code == 0, output
    assert "This was not run on a GPU: JAX computes on cpu," in output
    assert found["gpu"] is False
    assert found["device"]["platform"] == "cpu"
    assert found["versions"].keys() >= {"python", "jax", "jaxlib", "flax", "optax"}
    assert (found["image_size"], found["batch_size"], found["steps"]) == (32, 2, 6)

    compared = [(x["network"], x["dtype"], x["equal"]) for x in found["logits"]]
    assert compared == [
        (name, dtype, True)
        for name in ("cifar_resnet20", "plain20")
        for dtype in ("float32", "bfloat16")
    ]

    linen, torch = found["rows"][::2], found["rows"][1::2]
    assert [row["unit"] for row in linen] == ["images/s", "ms", "GiB", "s"]
    # Six steps are four rounds.
    assert [row["repeats"] for row in linen] == [4, 4, 1, 1]
    for row in linen:
        assert row["peer"] == "stock Linen"
        assert row["ratio"] == row["value"] / row["peer_value"] > 0
    for row in torch:
        assert row["peer"] == "torchvision, channels_last, AMP"
        assert row["left_out"] == "it ended with exit code 1"
    ((part),) = found["left_out"]
    assert part["part"].endswith("bfloat16: torchvision, channels_last, AMP")

    milliseconds = [kernel["ms_per_step"] for kernel in found["kernels"]]
    assert len(milliseconds) == 10
    assert milliseconds == sorted(milliseconds, reverse=True)
    assert 0 < sum(kernel["share"] for kernel in found["kernels"]) < 1
    assert found["kernels"][0]["name"] in output


@pytest.mark.slow
def test_a_wrong_logit_is_reported_and_the_other_parts_are_measured(tmp_path):
    golden = json.loads(gpu.GOLDEN.read_text())
    figures = golden["cifar_resnet20"]
    # Too little for the bound of bfloat16.
    figures[3] += 1e-3 * max(map(abs, figures))
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(golden))
    code, output, found = check(
        tmp_path,
        *(f"--golden={wrong}", "--networks=cifar_resnet20"),
        *("--model=cifar_resnet20", "--image_size=16"),
    )
    assert code == 1
    message = "error: The logits of cifar_resnet20 in float32 differ from the golden"
    assert message in output.splitlines()[-1]
    assert "DIFFERS: 1.0e-03 (0.0001)" in output
    assert [result["equal"] for result in found["logits"]] == [False, True]
    linen, _ = found["rows"][:2]
    assert linen["value"] > 0
    assert linen["left_out"] == "stock Linen has no cifar_resnet20 here"
    assert len(found["kernels"]) == 10


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
def test_logits_are_equal_within_the_bound_of_their_type(logits, dtype, equal, failure):
    result = gpu.compared("resnet18", dtype, {"logits": logits}, [1.0, -2.0])
    assert (result["equal"], result["failure"]) == (equal, failure)
    # Strict JSON has neither NaN nor infinity.
    json.dumps(result, allow_nan=False)


def test_a_network_that_fails_is_not_equal():
    result = gpu.compared("resnet18", "float32", {"error": "XlaError: no"}, [1.0])
    assert (result["equal"], result["failure"]) == (False, "XlaError: no")


def test_the_networks_of_the_check_are_of_all_kinds_of_the_zoo():
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
            # A network of three stages and one of four have the same kind of block.
            values = {kind for blocks in values for kind in blocks}
            values -= {kind for spec in checked for kind in getattr(spec, "blocks", ())}
        assert not values, field


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--golden=/no/logits.json", "run the command in a checkout of the project"),
        ("--networks=resnet5O", "There is no golden logits of --networks=resnet5O."),
        ("--dtype=half", "There is no --dtype=half."),
        ("--json=/no/such/folder/x.json", "--json=/no/such/folder/x.json: No such"),
    ],
)
def test_mistakes_get_a_sentence_before_anything_is_measured(flag, message, capsys):
    with pytest.raises(UserError) as error:
        command.main(["bench", "gpu", flag])
    assert message in str(error.value)
    assert not capsys.readouterr().out


def test_missing_packages_are_named_with_the_way_to_install_them(tmp_path):
    code, output, found = check(tmp_path, **hide(tmp_path, "jaxtyping", "optax"))
    assert (code, found) == (1, None)
    assert output.splitlines() == [
        "error: The check needs packages that are not installed; run: pip install"
        " optax jaxtyping"
    ]


@pytest.mark.slow
def test_a_process_that_takes_too_long_is_ended():
    part = gpu.Part(sys.executable, "logits", "resnet_jax")
    # JAX alone takes longer to import.
    with pytest.raises(gpu.TooLateError, match="did not end within the 0 s"):
        part.within(0.01, "device")
    assert part.process.wait() < 0
    part.close()


@pytest.mark.slow
def test_without_time_all_parts_are_left_out_by_name(tmp_path):
    args = command.make_parser("gpu").parse(
        ["--networks=plain20,highway19", f"--json={tmp_path / 'gpu.json'}"]
    )
    late = gpu.Check(
        args=args,
        golden=json.loads(gpu.GOLDEN.read_text()),
        ends=time.monotonic(),
        environment={},
        report={"left_out": [], "device": {"platform": "cpu"}},
    )
    gpu.compare_logits(late, late.left())
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
def test_a_step_that_fails_is_a_failure_and_one_that_a_peer_lacks_is_not(tmp_path):
    args = command.make_parser("gpu").parse(
        ["--model=resnet5O", "--torch=/no/python", f"--json={tmp_path / 'x'}"]
    )
    check = gpu.Check(
        args=args,
        golden={},
        ends=time.monotonic() + 900,
        environment={},
        report={"left_out": [], "device": {"platform": "cpu"}},
    )
    (failure,) = gpu.compare_steps(check, image_size=32, batch_size=2, steps=1)
    step = "train step of resnet5O, 32 px, batch 2, bfloat16"
    message = "There is no network 'resnet5O'. Did you mean"
    assert failure.startswith(f"The {step} failed: {message}")
    found = {x["part"]: x["reason"] for x in check.report["left_out"]}
    assert found.pop(f"{step}: resnet_jax").startswith(message)
    assert found == {
        f"{step}: stock Linen": "stock Linen has no resnet5O here",
        f"{step}: torchvision, channels_last, AMP": (
            "/no/python: No such file or directory"
        ),
    }


# The kernels of a trace.

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
def test_the_operations_of_a_gpu_are_its_kernels(text, kernels):
    profile = jax.profiler.ProfileData.from_serialized_xspace(
        jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)
    )
    found = gpu_worker.costliest(
        list(profiler_trace.operations(profile.planes)), steps=2
    )
    total = sum(kernels.values())
    assert [kernel["name"] for kernel in found] == list(kernels)
    for kernel in found:
        seconds = kernels[kernel["name"]]
        assert kernel["ms_per_step"] == pytest.approx(500 * seconds)
        assert kernel["share"] == pytest.approx(seconds / total)
    assert found[0]["calls_per_step"] == (1 if len(kernels) == 2 else 0.5)
