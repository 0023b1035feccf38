"""A grid of SAEs to train together: every combination of sites, dictionary sizes and k."""

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_msae.data import CachedActivations, vocabulary
from hf_msae.data.cache import TrainingData
from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.sites import resolve_site, site_width
from hf_msae.training.recipes import recipe_fields
from hf_msae.training.warm_start import read_initial_config, wider_prefix_sizes

# Of the width of a site. A k of 32 suits dictionaries of 4,096 latents and more; smaller ones get fewer.
DEFAULT_EXPANSION, DEFAULT_K, LATENTS_PER_K = 16, 32, 128


def make_saes(
    model: PreTrainedModel,
    sites: Sequence[str] = (),
    num_latents: Sequence[int] = (),
    k: Sequence[float] = (),
    *,
    prefix_sizes: Sequence[str | int | Fraction] = (),
    sites_out: Sequence[str] = (),
    token_lookup: bool = False,
    recipe: str | None = None,
    init_from: str | None = None,
    **options: Any,
) -> list[MatryoshkaSAE]:
    """An untrained SAE for every combination of sites, dictionary sizes and k, for [`SAETrainer`].

    Args:
        model: the language model, whose sites tell each SAE's width.
        sites: where in it, such as "layers.12". By default the layer in the middle, where features are richest.
        num_latents: sizes of the dictionary. By default 16 times the site's width.
        k: mean numbers of active latents per token. By default 32, and fewer for a dictionary below 4,096 latents.
        prefix_sizes: the nested sizes, as numbers of latents or as shares of the whole, such as "1/16".
        sites_out: makes transcoders: for each of the sites, where what they reconstruct is.
        token_lookup: makes tokenized SAEs, which add a learnt vector of the activation's own token.
        recipe: of `training.recipes.RECIPES`, what nesting is to be best at: "prefixes" (the default), "balanced",
            "tree" or "reconstruction". Fields that are given beside it count.
        init_from: an SAE, a folder or a Hub repo, whose form all have but for what is given here. Its weights are
            taken by the trainer (`SAETrainingArguments.init_from`).
        options: fields of `MatryoshkaSAEConfig`, the same for all.

    Returns:
        The SAEs, sites outermost and k innermost.

    Raises:
        SiteError: the model has no such site.
        InputError: there is no such recipe, a prefix size is no number, `init_from` names no site and none is given,
            or there is not one output site for each site.
    """
    options = recipe_fields(recipe) | options
    initial = None if init_from is None else read_initial_config(init_from)
    names = list(sites)
    if not names and initial is not None:
        if initial.site is None:
            raise InputError("The SAE given as init_from does not say where in the model it belongs; give the site.")
        names = [initial.site]
    names = names or [middle_layer(model)]
    if sites_out and len(sites_out) != len(names):
        raise InputError(
            f"Each site needs one site_out: there are {len(names)} of the one ({', '.join(names)}) and "
            f"{len(sites_out)} of the other ({', '.join(sites_out)})."
        )
    outputs: Sequence[str | None] = sites_out or [None] * len(names)
    saes = []
    for name, name_out in zip(names, outputs, strict=True):
        site = resolve_site(model, name)
        values = options | {"site": str(site)}
        if token_lookup:
            values["lookup_size"] = vocabulary(model)
        if name_out is not None:
            site_out = resolve_site(model, name_out)
            values |= {"site_out": str(site_out), "hidden_size_out": site_width(model, site_out)}
        ks: list[float | None] = list(k)
        if initial is None:
            values["hidden_size"] = site_width(model, site)
            counts, ks = num_latents or [DEFAULT_EXPANSION * values["hidden_size"]], ks or [None]
        else:
            counts, ks = num_latents or [initial.num_latents], ks or [initial.k]
        for count, active in itertools.product(counts, ks):
            sizes = parse_prefix_sizes(prefix_sizes, count)
            if initial is None:
                active = max(1, min(DEFAULT_K, count // LATENTS_PER_K)) if active is None else active
                config = MatryoshkaSAEConfig(**values, num_latents=count, prefix_sizes=sizes, k=active)
            else:
                config = _alike(initial, values, count, sizes or wider_prefix_sizes(initial, count), active)
            saes.append(MatryoshkaSAE(config))
    return saes


def _alike(
    initial: MatryoshkaSAEConfig, values: dict[str, Any], num_latents: int, prefix_sizes: list[int], k: float | None
) -> MatryoshkaSAEConfig:
    """A configuration as that of an SAE that exists, but for what is given."""
    if len(prefix_sizes) != initial.num_levels:
        values = {"level_weights": "uniform"} | values
    of_size = {"num_latents": num_latents, "k": k, "prefix_sizes": prefix_sizes}
    fresh = {"measured": None, "inference": "threshold"}
    return MatryoshkaSAEConfig(**initial.to_dict() | fresh | values | of_size)


def middle_layer(model: nn.Module) -> str:
    """The site of the layer in the middle, where features are richest."""
    layers = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    return f"layers.{(layers - 1) // 2}"


def sites_of(dataset: TrainingData) -> list[str]:
    """The sites of an activation cache; none of any other data."""
    return [str(site) for site in dataset.sites] if isinstance(dataset, CachedActivations) else []


def parse_prefix_sizes(values: Sequence[str | int | Fraction], num_latents: int) -> list[int]:
    """Sizes from numbers and shares of `num_latents`; empty where none are given."""
    sizes = []
    for value in values:
        try:
            number = Fraction(value.replace("_", "")) if isinstance(value, str) else Fraction(value)
        except (ValueError, ZeroDivisionError):
            raise InputError(
                f"prefix_sizes: {value!r} is neither a number of latents nor a share such as 1/16."
            ) from None
        # 1 is the whole dictionary: a prefix of a single latent is of no use to anyone.
        sizes.append(int(number * num_latents) if number <= 1 else int(number))
    return sizes
