"""The checksum of the source code: edited code is another version."""

import shutil

from resnet_jax import source


def test_an_edited_file_is_another_version(monkeypatch, tmp_path):
    package = tmp_path / "resnet_jax"
    file = package / "a" / "b.py"
    file.parent.mkdir(parents=True)
    monkeypatch.setattr(source, "PACKAGE", package)
    file.write_text("x = 1")
    first = source.digest()
    aside = source.digest(lambda name: name == "resnet_jax/a/b.py")
    file.write_text("x = 2")
    assert source.digest() != first
    assert source.digest(lambda name: name == "resnet_jax/a/b.py") == aside


def test_an_installed_package_with_its_recipes_is_the_same_version(
    monkeypatch, tmp_path
):
    here = source.digest()
    installed = tmp_path / "resnet_jax"
    shutil.copytree(source.PACKAGE, installed)
    (installed / "configs").mkdir(exist_ok=True)
    (installed / "configs" / "r50.py").write_text("x = 1")
    monkeypatch.setattr(source, "PACKAGE", installed)
    monkeypatch.setattr(source, "RECIPES", installed / "configs")
    assert source.digest() == here
