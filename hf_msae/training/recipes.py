"""Named settings of the loss: what nesting is to be best at (measured in docs/clean-parents.md)."""

from typing import Any

from hf_msae.errors import InputError

# How much of inner levels' gradients reaches decoder and activations after `inner_share_start`.
RECIPES: dict[str, dict[str, Any]] = {
    # The paper's loss: every prefix reconstructs as well as it can alone, and most of the concept tree is found.
    "prefixes": {"inner_decoder_share": 1.0, "inner_activation_share": 1.0},
    # Nearly that, with half of what nesting costs won back, and dictionaries that agree more from seed to seed.
    "balanced": {"inner_decoder_share": 0.1, "inner_activation_share": 0.1},
    # Edges between levels that are the most often right, and fewer of them.
    "tree": {"inner_decoder_share": 0.0, "inner_activation_share": 1.0},
    # What a plain SAE reconstructs, with levels that only the beginning of the run has ordered.
    "reconstruction": {"inner_decoder_share": 0.0, "inner_activation_share": 0.0},
}


def recipe_fields(name: str | None) -> dict[str, Any]:
    """The fields of `MatryoshkaSAEConfig` that a recipe sets.

    Args:
        name: Of `RECIPES`; None for no recipe.

    Returns:
        Values by field; empty without a recipe.

    Raises:
        InputError: There is no such recipe.
    """
    if name is None:
        return {}
    if name not in RECIPES:
        raise InputError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r:.40}.")
    return dict(RECIPES[name])
