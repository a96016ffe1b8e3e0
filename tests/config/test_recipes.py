"""The table of recipes lists those that match patterns."""

import pytest

from resnet_jax.config import recipes
from resnet_jax.errors import UserError


def test_patterns_list_each_recipe_once_in_their_order():
    rows = recipes.table(["rsb.py:a3", "r18*", "rsb*"])
    names = [row[0] for row in rows]
    assert names == ["rsb.py:a3", "r18.py", "rsb.py:a1", "rsb.py:a2"]
    assert rows[0][1:] == (
        *("resnet50", "imagenet2012, 160/224 px", "100 epochs", "2,048", "78.1", ""),
    )


def test_without_patterns_all_recipes_are_listed():
    assert len(recipes.table()) == len(list(recipes.variants()))


def test_a_result_that_was_reached_is_in_the_last_column():
    ((*_, published, reached),) = recipes.table(["quickstart.py"])
    assert (published, reached) == ("", "99.44")


def test_a_pattern_without_recipes_is_an_error_that_names_it():
    with pytest.raises(UserError, match=r"No recipe matches 'r51\*'\. Known: "):
        recipes.table(["r50*", "r51*"])
