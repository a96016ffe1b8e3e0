"""The checksum of the source code: edited code is another version."""

import shutil

from resnet_jax.persistence import versions
from resnet_jax.persistence.versions import code_checksum


def test_an_edited_file_is_another_version(tmp_path):
    package = tmp_path / "resnet_jax"
    file = package / "a" / "b.py"
    file.parent.mkdir(parents=True)

    def is_excluded(name: str) -> bool:
        return name == "resnet_jax/a/b.py"

    file.write_text("x = 1")
    before = code_checksum(package=package)
    without = code_checksum(is_excluded, package)
    file.write_text("x = 2")
    assert code_checksum(package=package) != before
    assert code_checksum(is_excluded, package) == without


def test_an_installed_package_with_its_recipes_is_the_same_version(tmp_path):
    installed = tmp_path / "resnet_jax"
    shutil.copytree(versions.PACKAGE, installed)
    (installed / "configs").mkdir(exist_ok=True)
    (installed / "configs" / "r50.py").write_text("x = 1")
    assert code_checksum(package=installed) == code_checksum()
