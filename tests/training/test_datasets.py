"""The opening of the data of a config."""

import pytest

from resnet_jax.errors import UserError
from resnet_jax.training.datasets import open_examples
from tests.helpers import tiny


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_split": "x"}, "train_split='x' of data.source='fake:10:64': There"),
        ({"eval_split": "test[:0]"}, "eval_split='test.:0.' of data.source='fake:"),
        (
            {"eval_source": "digits", "eval_split": "val"},
            "eval_split='val' of data.eval_source='digits': There is no split 'val'",
        ),
        # The name of the split is part of the source.
        (
            {"source": "mix:digits@x", "train_split": "train"},
            "train_split='train' of data.source='mix:digits@x': There is no split 'x'",
        ),
    ],
)
def test_the_error_of_a_split_names_its_keys(changes, message):
    config = tiny.config({f"data.{key}": value for key, value in changes.items()})
    with pytest.raises(UserError, match=f"^data.{message}"):
        open_examples(config)
