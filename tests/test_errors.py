"""The hierarchy of exceptions, and their use in the package."""

import ast
import errno
import importlib
import inspect
import os
import pathlib
import pkgutil
import types
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

import resnet_jax
from resnet_jax import errors
from resnet_jax.errors import BadValueError, ResNetJaxError, UserError
from resnet_jax.models import build, create_model, get_spec
from resnet_jax.persistence.preemption import PreemptedError

PACKAGE = pathlib.Path(resnet_jax.__file__).parent
# This module imports frameworks that are not installed with the tests.
PEERS = ("resnet_jax.bench.torch_baseline",)
# Files that may raise Python's own exceptions, and why no caller needs to handle them.
INTERNAL = {
    "data/image_ops.py": "policies.py has checked the names of operations",
    "data/shards.py": "pack.py turns it into a sentence about the shard",
    "data/tfds_source.py": "builder_of turns it into a sentence about the directory",
    "plan/hlo.py": "compile_steps.py turns it into a sentence about the compiler",
    "weights/files.py": "stored.py turns it into a sentence about the file",
    "weights/keras_files.py": "stored.py turns it into a sentence about the file",
    "weights/stored.py": "its explaining_damage turns it into such a sentence",
}
BUILT_IN = ("Exception", "ValueError", "TypeError", "RuntimeError", "KeyError")


def modules() -> Iterator[types.ModuleType]:
    """Imports each module of the package."""
    for module in pkgutil.walk_packages(resnet_jax.__path__, "resnet_jax."):
        name = module.name
        if name not in PEERS and not name.startswith("resnet_jax.configs"):
            yield importlib.import_module(name)


def test_every_exception_of_the_package_has_one_base_class():
    own = {
        value
        for module in modules()
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, BaseException)
        and value.__module__.startswith("resnet_jax.")
    }
    assert {"UserError", "DamagedError", "LeftOutError", "WorkerDiedError"} <= {
        kind.__name__ for kind in own
    }
    for kind in own:
        assert issubclass(kind, ResNetJaxError)
        # The docstring of errors.py lists all of them.
        assert kind.__name__ in errors.__doc__


def test_errors_that_callers_handle_are_not_exceptions_of_python():
    files = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and getattr(node.exc.func, "id", "") in BUILT_IN
    }
    assert files == INTERNAL.keys()


def test_a_stopped_run_is_not_a_user_error():
    assert not issubclass(PreemptedError, UserError)


@pytest.mark.parametrize(
    "change",
    [
        {"widths": (8, 16)},
        {"block": ("basic",)},
        {"block_dropout": 0.1},
        {"output_stride": 3},
    ],
)
def test_a_wrong_spec_is_a_bad_value_error_with_one_sentence(change):
    with pytest.raises(BadValueError, match=r"^resnet18: .*[^.]\.$") as caught:
        get_spec("resnet18", **change)
    # Callers may catch either class.
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)


def test_images_with_wrong_channels_are_a_bad_value_error():
    with pytest.raises(
        BadValueError, match=r"takes images of 3 channels, and these have 1\."
    ):
        create_model("cifar_resnet20").init(
            jax.random.key(0), jnp.zeros((1, 32, 32, 1))
        )
    falling = get_spec("resnet18", widths=(64, 32, 16, 8), shortcut="pad")
    with pytest.raises(BadValueError, match="pad shortcut cannot go from 64 to 32"):
        build(falling).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


class DefaultCredentialsError(Exception):
    """Stands in for the exception of google.auth."""


class ClientError(Exception):
    """Stands in for the exception of botocore."""


@pytest.mark.parametrize(
    "cause",
    [
        DefaultCredentialsError("Your default credentials were not found."),
        ClientError("An error occurred (AccessDenied) when calling PutObject"),
        ValueError("PERMISSION_DENIED: storage.objects.create [gs://bucket/run]"),
    ],
    ids=["google", "amazon", "tensorstore"],
)
def test_an_object_store_that_rejects_a_request_is_one_sentence(cause):
    error = RuntimeError("while saving")
    error.__cause__ = cause
    problem = errors.problem_of(error, "gs://bucket/run")
    assert problem.startswith("gs://bucket/run cannot be used: ")
    assert str(cause) in problem and "\n" not in problem
    assert errors.problem_of(error, "runs/mine") == ""


def test_a_full_disk_is_a_sentence_with_the_file_and_other_errors_are_not():
    full = OSError(errno.ENOSPC, "No space left on device", "runs/mine/config.json")
    assert errors.problem_of(full, "runs/mine") == (
        "runs/mine/config.json: No space left on device. Free some space, or choose"
        " another place."
    )
    for number in (errno.EDQUOT, errno.EISDIR, errno.ELOOP, errno.ESTALE, errno.EIO):
        error = OSError(number, os.strerror(number), "runs/mine/metrics.jsonl")
        problem = errors.problem_of(error, "runs/mine")
        assert problem.startswith(f"runs/mine/metrics.jsonl: {os.strerror(number)}. ")
    assert errors.problem_of(OSError(errno.EINTR, "Interrupted"), "runs/mine") == ""
    assert errors.problem_of(ZeroDivisionError(), "runs/mine") == ""
