"""The checksum of the source code: edited code is another version."""

import shutil

from resnet_jax.persistence import code_digest


def test_an_edited_file_is_another_version(monkeypatch, tmp_path):
    package = tmp_path / "resnet_jax"
    file = package / "a" / "b.py"
    file.parent.mkdir(parents=True)
    monkeypatch.setattr(code_digest, "PACKAGE", package)
    file.write_text("x = 1")
    first = code_digest.digest()
    aside = code_digest.digest(lambda name: name == "resnet_jax/a/b.py")
    file.write_text("x = 2")
    assert code_digest.digest() != first
    assert code_digest.digest(lambda name: name == "resnet_jax/a/b.py") == aside


def test_an_installed_package_with_its_recipes_is_the_same_version(
    monkeypatch, tmp_path
):
    here = code_digest.digest()
    installed = tmp_path / "resnet_jax"
    shutil.copytree(code_digest.PACKAGE, installed)
    (installed / "configs").mkdir(exist_ok=True)
    (installed / "configs" / "r50.py").write_text("x = 1")
    monkeypatch.setattr(code_digest, "PACKAGE", installed)
    monkeypatch.setattr(code_digest, "RECIPES", installed / "configs")
    assert code_digest.digest() == here
