"""Cosines of dictionaries that are written down."""

import math

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.evaluation.geometry import ROWS_AT_ONCE, measure_agreement, measure_geometry


def with_rows(rows: torch.Tensor, prefix_sizes: list[int], encoder: torch.Tensor | None = None) -> MatryoshkaSAE:
    config = MatryoshkaSAEConfig(hidden_size=rows.shape[1], num_latents=len(rows), prefix_sizes=prefix_sizes, k=1)
    sae = MatryoshkaSAE(config).eval()
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows if encoder is None else encoder)
    return sae


def test_orthogonal_rows_have_no_neighbours():
    first, second = measure_geometry(with_rows(torch.eye(6), [2, 6], encoder=-3 * torch.eye(6)), torch.ones(6))
    assert (first.prefix, second.prefix, second.alive) == (2, 6, 6)
    assert second.decoder_nearest == second.decoder_pairs == second.encoder_nearest == 0
    assert second.encoder_decoder == pytest.approx(-1)
    assert first.parent_nearest is None
    assert second.parent_nearest == 0
    assert second.parent_same == 0


def test_a_level_that_repeats_the_one_before_is_found():
    tilted = torch.tensor([math.cos(1.0), math.sin(1.0), 0.0])
    rows = torch.stack([torch.eye(3)[0], torch.eye(3)[2], 5 * torch.eye(3)[0], tilted])
    level = measure_geometry(with_rows(rows, [2, 4]), torch.ones(4))[-1]
    assert level.parent_nearest == pytest.approx((1 + math.cos(1.0)) / 2, abs=1e-6)
    assert level.parent_same == 0.5
    pairs = [0, 1, math.cos(1.0), 0, 0, math.cos(1.0)]
    assert level.decoder_pairs == pytest.approx(sum(pairs) / 6, abs=1e-6)
    assert level.decoder_nearest == pytest.approx((1 + 0 + 1 + math.cos(1.0)) / 4, abs=1e-6)


def test_dead_latents_are_left_out():
    rows = torch.cat([torch.eye(4), torch.eye(4)])
    alive = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    level = measure_geometry(with_rows(rows, [8]), alive)[0]
    assert level.alive == 4
    assert level.decoder_nearest == 0


def test_more_rows_than_are_compared_at_once():
    number = ROWS_AT_ONCE + 300
    rows = torch.nn.functional.normalize(torch.randn(number, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    level = measure_geometry(with_rows(rows, [10, number]), torch.ones(number))[-1]
    cosines = (rows @ rows.T).abs().fill_diagonal_(0)
    assert level.decoder_nearest == pytest.approx(cosines.max(1).values.mean().item(), abs=1e-5)
    assert level.decoder_pairs == pytest.approx(cosines.double().sum().item() / (number * (number - 1)), abs=1e-6)
    nearest_parent = (rows[10:] @ rows[:10].T).max(1).values
    assert level.parent_nearest == pytest.approx(nearest_parent.mean().item(), abs=1e-5)


def test_agreement_is_one_with_itself_in_another_order_and_half_with_half():
    rows = torch.eye(8)
    alive = torch.ones(8)
    one, shuffled = with_rows(rows, [4, 8]), with_rows(rows[[1, 0, 3, 2, 7, 6, 5, 4]], [4, 8])
    for found in measure_agreement(("a", one, alive), ("b", shuffled, alive)):
        assert (found.one_to_two, found.two_to_one, found.shared) == (1, 1, 1)
    half = with_rows(torch.cat([rows[:4], -rows[4:]]), [4, 8])
    inner, outer = measure_agreement(("a", one, alive), ("b", half, alive))
    assert inner.shared == 1
    assert outer.shared == 0.5
    assert outer.one_to_two == 0.5
