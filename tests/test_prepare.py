"""What stands between a user and a prepared data set is told in one sentence."""

import pytest

from resnet_jax.errors import UserError
from resnet_jax.prepare import main, prepare, way_out


def test_an_unknown_data_set_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="fashion_mnist"):
        prepare("fashion_mnits", data_dir=str(tmp_path))


def test_what_is_no_tfds_name_is_told_how_to_write_it():
    with pytest.raises(UserError, match="Write tfds:NAME"):
        main(["prepare", "folder:pictures"])


def test_a_data_set_that_must_be_fetched_by_hand_says_which_files(tmp_path):
    with pytest.raises(UserError, match=r"ILSVRC2012_img_train\.tar.*--manual_dir"):
        prepare("imagenet2012", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (ModuleNotFoundError("No module named 'tensorflow'"), "requirements-prepare"),
        (ConnectionError("no route to host"), "--manual_dir=DIRECTORY"),
        (FileNotFoundError("train.tar is missing"), "--manual_dir=DIRECTORY"),
        (ValueError("a checksum is wrong"), "a checksum is wrong"),
    ],
)
def test_whatever_stops_a_builder_is_told_with_the_way_out(cause, told):
    error = RuntimeError("tfds failed")
    error.__cause__ = cause
    assert told in way_out(error)
