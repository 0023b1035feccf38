"""Recipes are names of settings that may be given one by one."""

from typing import get_args

import pytest
from hf_msae.modeling.dense_ops import InnerShares

from hf_msae import MatryoshkaSAEConfig
from hf_msae.cli.train import GridArguments
from hf_msae.errors import InputError
from hf_msae.training.grid import make_saes
from hf_msae.training.recipes import RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sets_its_fields_and_what_is_given_beside_it_counts(recipe, lm):
    (sae,) = make_saes(lm, ["layers.0"], [64], [4], recipe=recipe)
    assert {name: getattr(sae.config, name) for name in RECIPES[recipe]} == RECIPES[recipe]
    (sae,) = make_saes(lm, ["layers.0"], [64], [4], recipe=recipe, inner_decoder_share=0.7)
    assert sae.inner_shares == InnerShares(0.7, RECIPES[recipe]["inner_activation_share"])


def test_the_first_recipe_is_the_default(lm):
    (sae,), (plain,) = (make_saes(lm, ["layers.0"], [64], [4], recipe=name) for name in ("prefixes", None))
    assert sae.config.to_dict() == plain.config.to_dict()
    assert {name: getattr(MatryoshkaSAEConfig(), name) for name in RECIPES["prefixes"]} == RECIPES["prefixes"]


def test_the_command_line_knows_all_recipes_and_others_are_refused(lm):
    (kinds, _) = get_args(GridArguments.__annotations__["recipe"])
    assert list(get_args(kinds)) == list(RECIPES)
    assert GridArguments(recipe="tree").grid()["recipe"] == "tree"
    with pytest.raises(InputError, match="recipe must be one of prefixes, balanced, tree, reconstruction, got 'best'"):
        make_saes(lm, ["layers.0"], [64], [4], recipe="best")


def test_a_run_may_go_on_from_an_sae_with_another_recipe(lm, tmp_path):
    (sae,) = make_saes(lm, ["layers.0"], [64], [4])
    sae.save_pretrained(tmp_path)
    (again,) = make_saes(lm, init_from=str(tmp_path), recipe="reconstruction")
    assert again.inner_shares == InnerShares(0.0, 0.0)
