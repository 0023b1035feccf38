"""The configuration refuses nonsense in words, fills in its defaults, and survives the way to disk."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from hf_msae import MatryoshkaSAEConfig

# What transformers raises where a check of a configuration fails, and what a constructor raises by itself.
REFUSAL = (StrictDataclassError, ValueError)
SMALL: dict[str, Any] = {"hidden_size": 8, "num_latents": 16, "prefix_sizes": [4, 8, 16], "k": 2}

REFUSED = {
    "unsorted prefixes": ({"prefix_sizes": [8, 4, 16]}, r"strictly increasing, got \[8, 4, 16\].*not increments"),
    "increments for sizes": ({"prefix_sizes": [4, 4, 8, 16]}, r"strictly increasing, got \[4, 4, 8, 16\]"),
    "prefix of nothing": ({"prefix_sizes": [0, 16]}, r"must be positive .* got \[0, 16\]"),
    "prefixes end early": ({"prefix_sizes": [4, 8]}, r"num_latents=16, got \[4, 8\]. Append 16 or set num_latents=8"),
    "prefixes end late": ({"prefix_sizes": [4, 32]}, r"num_latents=16, got \[4, 32\]"),
    "prefixes as text": ({"prefix_sizes": "4,8,16"}, r"prefix_sizes.*got str"),
    "prefixes as fractions": ({"prefix_sizes": [4.5, 16]}, r"prefix_sizes.*4\.5"),
    "no prefixes": ({"prefix_sizes": None}, r"prefix_sizes.*got NoneType"),
    "k of zero": ({"k": 0}, r"k must be above 0 and at most num_latents=16, got 0"),
    "negative k": ({"k": -3}, r"got -3"),
    "k above num_latents": ({"k": 17}, r"at most num_latents=16, got 17"),
    "k is not a number": ({"k": math.nan}, r"k must be above 0 .* got nan"),
    "k as text": ({"k": "2"}, r"'k'.*got str"),
    "k as truth": ({"k": True}, r"'k'.*got bool"),
    "fractional k of topk": ({"activation": "topk", "k": 2.5}, r"k must be whole; got 2\.5"),
    "unknown activation": ({"activation": "gelu"}, r"one of batch_topk, topk, jumprelu, relu, got 'gelu'"),
    "unknown prefix sampling": ({"prefix_sampling": "zipf"}, r"prefix_sampling .* fixed, pareto, got 'zipf'"),
    "unknown key": ({"lerning_rate": 1}, r"unknown key\(s\) lerning_rate. Known keys: .*activation.*num_latents"),
    "unknown keys": ({"zeta": 1, "alpha": 2}, r"unknown key\(s\) alpha, zeta\."),
    "unknown level weights": ({"level_weights": "loud"}, r"one of uniform, size or a list of numbers, got 'loud'"),
    "too few level weights": ({"level_weights": [1, 2]}, r"must be 3 numbers, one per prefix of \[4, 8, 16\]"),
    "no level weights": ({"level_weights": []}, r"must be 3 numbers"),
    "negative level weight": ({"level_weights": [1, -1, 2]}, r"none negative.*got \[1, -1, 2\]"),
    "no weight at all": ({"level_weights": [0, 0, 0]}, r"not all zero; got \[0, 0, 0\]"),
    "weight is not a number": ({"level_weights": [1.0, math.nan, 1.0]}, r"all finite.*nan"),
    "infinite weight": ({"level_weights": [1.0, math.inf, 1.0]}, r"all finite.*inf"),
    "negative balance": ({"balance": -0.5}, r"balance must be finite and not negative, got -0\.5"),
    "balance and weights": ({"balance": 0.5, "level_weights": "size"}, r"balance=0\.5 or level_weights='size', not"),
    "pareto and weights": ({"prefix_sampling": "pareto", "level_weights": "size"}, r"takes only uniform weights"),
    "pareto and balance": ({"prefix_sampling": "pareto", "balance": 0.5}, r"takes only uniform weights"),
    "pareto exponent of zero": ({"pareto_alpha": 0}, r"pareto_alpha must be in \(0, 1\], got 0"),
    "pareto exponent above one": ({"pareto_alpha": 1.5}, r"\(0, 1\], got 1\.5"),
    "no sampled prefixes": ({"num_sampled_prefixes": 0}, r"num_sampled_prefixes must be at least 1, got 0"),
    "no aux latents": ({"num_aux_latents": 0}, r"num_aux_latents must be at least 1, got 0"),
    "negative aux weight": ({"aux_loss_weight": -1.0}, r"aux_loss_weight must be finite and not negative, got -1\.0"),
    "aux weight not a number": ({"aux_loss_weight": math.nan}, r"aux_loss_weight must be finite.*nan"),
    "negative sparsity weight": ({"sparsity_weight": -1}, r"sparsity_weight must be finite and not negative, got -1"),
    "power of zero": ({"activation": "relu", "p_end": 0}, r"p_end must be in \(0, 1\], got 0; 1 is the L1 penalty"),
    "power above one": ({"activation": "relu", "p_end": 1.5}, r"p_end must be in \(0, 1\], got 1\.5"),
    "power of no penalty": (
        {"p_end": 0.2},
        r"p_end=0\.2 is the exponent of relu's penalty, and 'batch_topk'",
    ),
    "aligned transcoder": ({"aligned": True, "hidden_size_out": 8}, r"aligned=True keeps .* a transcoder's have none"),
    "bandwidth of zero": ({"jumprelu_bandwidth": 0.0}, r"jumprelu_bandwidth must be finite and above 0, got 0\.0"),
    "hidden_size of zero": ({"hidden_size": 0}, r"hidden_size must be at least 1, got 0"),
    "hidden_size as text": ({"hidden_size": "8"}, r"'hidden_size'.*got str"),
    "hidden_size as fraction": ({"hidden_size": 8.0}, r"'hidden_size'.*got float"),
    "alias as text": ({"d_in": "8"}, r"'hidden_size'.*got str"),
    "flag as text": ({"detach_prefixes": "no"}, r"'detach_prefixes'.*got str"),
    "site as number": ({"site": 3}, r"'site'.*got int"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_nonsense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(REFUSAL, match=f"(?s){message}"):
        MatryoshkaSAEConfig(**{**SMALL, **change})


def test_a_dictionary_of_no_latents_is_refused() -> None:
    with pytest.raises(REFUSAL, match="num_latents must be at least 1, got 0"):
        MatryoshkaSAEConfig(num_latents=0)


def test_nonsense_set_later_is_refused_at_save(tmp_path: Path) -> None:
    config = MatryoshkaSAEConfig(**SMALL)
    config.k = 99
    with pytest.raises(REFUSAL, match="at most num_latents=16, got 99"):
        config.save_pretrained(tmp_path)


def test_defaults() -> None:
    config = MatryoshkaSAEConfig()
    assert (config.hidden_size, config.num_latents, config.k) == (768, 16384, 32)
    assert config.prefix_sizes == [1024, 2048, 4096, 8192, 16384]
    assert config.normalized_level_weights == [0.2] * 5
    assert (config.activation, config.apply_b_dec_to_input) == ("batch_topk", True)
    assert config.aux_loss_weight == 1 / 32
    assert config.num_levels == 5


@given(num_latents=st.integers(1, 300))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_default_prefixes_suit_every_dictionary(num_latents: int) -> None:
    config = MatryoshkaSAEConfig(num_latents=num_latents, k=1)
    expected = sorted({max(1, num_latents // divisor) for divisor in (16, 8, 4, 2, 1)})
    assert config.prefix_sizes == expected


def test_aliases_work_both_ways() -> None:
    aliases: dict[str, Any] = {"d_in": 8, "d_sae": 16}
    config = MatryoshkaSAEConfig(**aliases, k=2)
    assert (config.hidden_size, config.num_latents) == (8, 16)
    assert (config.d_in, config.d_sae) == (8, 16)
    assert config.prefix_sizes == [1, 2, 4, 8, 16]
    assert not {"d_in", "d_sae"} & config.to_dict().keys()


level_sizes = st.lists(st.integers(1, 500), min_size=1, max_size=6, unique=True).map(sorted)


@given(sizes=level_sizes, data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_level_weights_sum_to_one_and_keep_their_ratios(sizes: list[int], data: st.DataObject) -> None:
    def weights_of(**change: Any) -> list[float]:
        config = MatryoshkaSAEConfig(num_latents=sizes[-1], prefix_sizes=sizes, k=1, **change)
        return config.normalized_level_weights

    groups = [float(high - low) for low, high in zip([0, *sizes], sizes, strict=False)]
    custom = data.draw(st.lists(st.floats(0.01, 100), min_size=len(sizes), max_size=len(sizes)))
    balance = data.draw(st.floats(0, 2))
    powers = [balance ** (len(sizes) - 1 - level) for level in range(len(sizes))]
    cases: list[tuple[list[float], list[float]]] = [
        (weights_of(), [1.0] * len(sizes)),
        (weights_of(level_weights="size"), groups),
        (weights_of(level_weights=custom), custom),
        (weights_of(balance=balance), powers),
    ]
    for weights, proportions in cases:
        assert sum(weights) == pytest.approx(1)
        assert weights == pytest.approx([p / sum(proportions) for p in proportions])


def test_balance_weighs_the_whole_dictionary_most() -> None:
    weights = MatryoshkaSAEConfig(**SMALL, balance=0.5).normalized_level_weights
    assert weights == pytest.approx([0.25 / 1.75, 0.5 / 1.75, 1 / 1.75])
    assert MatryoshkaSAEConfig(**SMALL, balance=0).normalized_level_weights == [0, 0, 1]


RICH: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"level_weights": (1, 2.5, 0)},
    "balance": {"balance": 0.75, "log_loss": True, "detach_prefixes": True},
    "pareto": {"prefix_sampling": "pareto", "pareto_alpha": 1, "num_sampled_prefixes": 3},
    "topk": {"activation": "topk", "k": 3.0, "num_aux_latents": 5},
    "provenance": {
        "base_model": "org/lm",
        "base_model_revision": "0123abcd",
        "site": "model.layers.12:output",
        "prepend_bos": False,
        "context_length": 128,
        "measured": {"tokens": 1000, "l0": [1.0, 1.5, 2.0], "fve": [0.5, 0.6, 0.7]},
    },
}


@pytest.mark.parametrize("change", RICH.values(), ids=RICH.keys())
def test_save_and_load_give_an_equal_configuration(change: dict[str, Any], tmp_path: Path) -> None:
    config = MatryoshkaSAEConfig(**{**SMALL, "prefix_sizes": (4, 8, 16), **change})
    config.save_pretrained(tmp_path)
    for loaded in (MatryoshkaSAEConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is MatryoshkaSAEConfig
        assert loaded.to_diff_dict() == config.to_diff_dict()
        assert loaded.normalized_level_weights == config.normalized_level_weights
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "matryoshka_sae"
    assert stored["prefix_sizes"] == [4, 8, 16]


def test_truncated_keeps_inner_levels_and_measured_l0() -> None:
    measured = {"tokens": 1000, "l0": [0.8, 1.4, 2.1], "fve": [0.5, 0.6, 0.7]}
    config = MatryoshkaSAEConfig(**SMALL, level_weights=[1, 2, 3], measured=measured, site="layers.3")
    inner = config.truncated(8)
    assert (inner.num_latents, inner.prefix_sizes, inner.level_weights) == (8, [4, 8], [1, 2])
    assert inner.k == 1.4
    assert inner.measured == {"tokens": 1000, "l0": [0.8, 1.4], "fve": [0.5, 0.6]}
    assert (inner.site, inner.hidden_size) == ("layers.3", 8)
    assert config.prefix_sizes == [4, 8, 16]
    assert config.measured == measured


def test_truncated_between_levels() -> None:
    inner = MatryoshkaSAEConfig(**{**SMALL, "k": 10}, measured={"l0": [4.0, 6.0, 10.0]}).truncated(6)
    assert (inner.num_latents, inner.prefix_sizes, inner.k) == (6, [4, 6], 6)
    assert inner.measured == {"l0": [4.0]}


def test_truncated_to_the_whole_is_the_same_configuration() -> None:
    config = MatryoshkaSAEConfig(**SMALL, measured={"tokens": 5, "l0": [1.0, 1.5, 2.1]})
    assert config.truncated(16).to_dict() == config.to_dict()


def test_truncated_topk_keeps_a_whole_k() -> None:
    config = MatryoshkaSAEConfig(**SMALL, activation="topk", measured={"l0": [0.2, 1.7, 2.0]})
    assert config.truncated(8).k == 2
    assert config.truncated(4).k == 1


def test_truncated_below_the_levels_that_were_trained_falls_back_to_uniform_weights() -> None:
    config = MatryoshkaSAEConfig(**SMALL, level_weights=[0, 0, 1])
    assert config.truncated(8).normalized_level_weights == [0.5, 0.5]


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_truncated_twice_is_truncated_once(seed: int) -> None:
    config = MatryoshkaSAEConfig(**SMALL, level_weights=[3, 2, 1], measured={"l0": [0.5, 1.0, 2.0]})
    small, large = sorted(random.Random(seed).sample(range(1, 17), 2))
    twice, once = config.truncated(large).truncated(small).to_dict(), config.truncated(small).to_dict()
    # k may come from either truncation, because a size between the levels has no measured L0 of its own.
    assert {**twice, "k": 0} == {**once, "k": 0}


@pytest.mark.parametrize("prefix", [0, -1, 17])
def test_truncated_refuses_other_sizes(prefix: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to num_latents=16, got {prefix}"):
        MatryoshkaSAEConfig(**SMALL).truncated(prefix)


def test_keys_that_transformers_adds_are_accepted() -> None:
    config = MatryoshkaSAEConfig(**SMALL, dtype="bfloat16", architectures=["MatryoshkaSAE"])
    assert config.dtype == torch.bfloat16
    assert MatryoshkaSAEConfig(**config.to_dict()).dtype == torch.bfloat16
