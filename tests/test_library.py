"""The library that `import resnet_jax` gives: its names, types and examples."""

import contextlib
import doctest
import importlib
import json
import subprocess

import jax
import numpy as np
import pytest

import resnet_jax
from tests.helpers import example_folder, public_names
from tests.helpers.runs import run_python

FUNCTIONS = ("create_model", "list_models", "load", "train")
# The docstrings of these modules have examples.
EXAMPLES = (
    *("resnet_jax", "resnet_jax.config", "resnet_jax.data.source_protocol"),
    "resnet_jax.data.sources",
    *("resnet_jax.errors", "resnet_jax.kernels.platforms", "resnet_jax.models"),
    *("resnet_jax.models.spec", "resnet_jax.models.resnet", "resnet_jax.models.scan"),
    *("resnet_jax.models.cost", "resnet_jax.models.inputs", "resnet_jax.models.zoo"),
    *("resnet_jax.training.loop", "resnet_jax.weights.card"),
    *("resnet_jax.weights.naming", "resnet_jax.weights.trained"),
)


def ask(program: str) -> object:
    """Runs a program in a process of its own; returns the JSON that it prints last."""
    code, printed = run_python("-c", program, stderr=subprocess.DEVNULL)
    assert code == 0, printed
    return json.loads(printed.splitlines()[-1])


def test_the_import_of_the_package_imports_no_library():
    imported = ask(
        "import sys; import resnet_jax; dir(resnet_jax);"
        " import json; print(json.dumps(sorted(sys.modules)))"
    )
    assert not {"jax", "flax", "numpy", "orbax", "PIL"} & set(imported)


@pytest.mark.slow
def test_no_module_of_the_package_hides_a_public_function():
    kinds = ask(f"""
import contextlib, importlib, json, pkgutil, resnet_jax
for module in pkgutil.walk_packages(resnet_jax.__path__, "resnet_jax."):
    # Some modules need a library that is not a requirement.
    if not module.name.endswith("__main__"):
        with contextlib.suppress(ImportError):
            importlib.import_module(module.name)
print(json.dumps([type(getattr(resnet_jax, x)).__name__ for x in {FUNCTIONS}]))
""")
    assert kinds == ["function"] * len(FUNCTIONS)


def test_all_public_names_are_there_and_others_are_not():
    for module in map(importlib.import_module, public_names.MODULES):
        for name in public_names.names_of(module):
            assert getattr(module, name) is not None
        with pytest.raises(AttributeError, match=r"no attribute 'wings'"):
            _ = module.wings
    assert set(FUNCTIONS) <= set(dir(resnet_jax))


def test_the_public_names_and_signatures_are_those_on_record():
    text = public_names.list_names()
    assert text == public_names.GOLDEN.read_text(), (
        "If this change is meant: python -m tests.helpers.public_names"
    )


@pytest.mark.slow
def test_a_program_of_a_user_has_the_types_that_it_expects(tmp_path):
    flags = ("--strict", "--follow-imports=silent", f"--cache-dir={tmp_path}")
    code, printed = run_python("-m", "mypy", *flags, "tests/typed_user.py")
    assert code == 0, printed


@pytest.mark.slow
def test_the_examples_of_docstrings_give_what_they_show(tmp_path):
    example_folder.fill(tmp_path)
    names = {"resnet_jax": resnet_jax, "jax": jax, "np": np}
    with contextlib.chdir(tmp_path):
        for module in map(importlib.import_module, EXAMPLES):
            assert not doctest.testmod(module, extraglobs=names).failed, module


def test_every_public_function_and_method_of_the_library_has_an_example():
    for name in FUNCTIONS:
        assert ">>>" in getattr(resnet_jax, name).__doc__, name
    for name in ("predict", "logits", "features"):
        assert ">>>" in getattr(resnet_jax.weights.TrainedModel, name).__doc__, name
    assert ">>>" in resnet_jax.weights.Card.preprocess.__doc__
    assert ">>>" in resnet_jax.kernels.plain_operations.__doc__
