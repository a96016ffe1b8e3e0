"""Edited source is other source."""

import pytest

from resnet_jax import source


@pytest.mark.parametrize("name", ["resnet_jax/a/b.py", "configs/compiler/v5e.py"])
def test_an_edited_file_is_another_version(name, monkeypatch, tmp_path):
    here = source.digest()
    assert here == source.digest()
    monkeypatch.setattr(source, "ROOT", tmp_path)
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    file.write_text("x = 1")
    first = source.digest()
    aside = source.digest(lambda file: file == name)
    file.write_text("x = 2")
    assert len({here, first, source.digest()}) == 3
    assert source.digest(lambda file: file == name) == aside
