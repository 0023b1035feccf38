"""The dense operations against their definitions: selection, nested decoding, gradients, calibrated thresholds."""

import math
from itertools import pairwise

import pytest
import torch
from hf_msae.modeling.dense_ops import (
    JumpReLU,
    activation_histogram,
    count_above,
    decode,
    decode_dead,
    decode_levels,
    histogram_threshold,
    pre_activations,
    select_above,
    select_batch_topk,
    select_topk,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

properties = settings(max_examples=25, deadline=None, derandomize=True)
shapes = st.tuples(st.integers(1, 8), st.integers(1, 40))
seeds = st.integers(0, 10_000)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def distinct(shape: tuple[int, int], seed: int, positive_share: float = 0.5) -> Tensor:
    """Numbers of which no two are equal and none is zero, about `positive_share` of them positive."""
    n = shape[0] * shape[1]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).view(shape).float()
    return order + 0.5 - round(n * (1 - positive_share))


def strongest(pre: Tensor, count: int) -> Tensor:
    """The definition: sort all numbers, keep the first `count`, and of those the positive."""
    kept = sorted(pre.flatten().tolist(), reverse=True)[:count]
    smallest = max(min(kept, default=math.inf), 0)
    return torch.where((pre >= smallest) & (pre > 0), pre, 0.0)


# Encoding and selection


@given(shape=shapes, hidden_size=st.integers(1, 12), seed=seeds)
@properties
def test_pre_activations_are_the_affine_map(shape: tuple[int, int], hidden_size: int, seed: int) -> None:
    tokens, latents = shape
    x, W_enc = random(tokens, hidden_size, seed=seed), random(latents, hidden_size, seed=seed + 1)
    b_enc, b_dec = random(latents, seed=seed + 2), random(hidden_size, seed=seed + 3)
    centred = torch.einsum("bd,fd->bf", x - b_dec, W_enc) + b_enc
    torch.testing.assert_close(pre_activations(x, W_enc, b_enc, b_dec), centred, rtol=1e-5, atol=1e-5)
    plain = torch.einsum("bd,fd->bf", x, W_enc) + b_enc
    torch.testing.assert_close(pre_activations(x, W_enc, b_enc, None), plain, rtol=1e-5, atol=1e-5)


@given(shape=shapes, k=st.floats(0.05, 45), share=st.floats(0, 1), seed=seeds)
@properties
def test_batch_topk_keeps_the_largest_of_the_batch(shape: tuple[int, int], k: float, share: float, seed: int) -> None:
    pre = distinct(shape, seed, share)
    count = min(max(1, round(k * shape[0])), pre.numel())
    latents = select_batch_topk(pre, k)
    assert torch.equal(latents, strongest(pre, count))
    assert int((latents != 0).sum()) == min(count, int((pre > 0).sum()))
    chosen = torch.relu(pre).flatten().topk(count).indices
    reference = torch.zeros(pre.numel()).index_copy(0, chosen, torch.relu(pre).flatten()[chosen]).view(shape)
    assert torch.equal(latents, reference)


@given(shape=shapes, k=st.integers(1, 45), share=st.floats(0, 1), seed=seeds)
@properties
def test_topk_keeps_the_largest_of_each_token(shape: tuple[int, int], k: int, share: float, seed: int) -> None:
    pre = distinct(shape, seed, share)
    expected = torch.stack([strongest(token, k) for token in pre])
    assert torch.equal(select_topk(pre, k), expected)


def test_batch_topk_lets_tokens_share_the_budget() -> None:
    pre = torch.tensor([[5.0, 4.0, 3.0], [1.0, 2.0, -6.0]])
    assert torch.equal(select_batch_topk(pre, 1.5), torch.tensor([[5.0, 4.0, 3.0], [0.0, 0.0, 0.0]]))
    assert torch.equal(select_topk(pre, 1), torch.tensor([[5.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))


@pytest.mark.parametrize("select", [select_batch_topk, select_topk])
def test_gradient_reaches_what_was_selected_and_nothing_else(select) -> None:
    pre = distinct((5, 12), seed=3, positive_share=0.3).requires_grad_()
    weights = random(5, 12, seed=4)
    latents = select(pre, 4)
    (gradient,) = torch.autograd.grad((latents * weights).sum(), pre)
    assert torch.equal(gradient, torch.where(latents > 0, weights, 0.0))
    assert 0 < int((gradient != 0).sum()) < 5 * 12


@given(shape=shapes, seed=seeds)
@properties
def test_select_above_keeps_what_exceeds_its_latents_threshold(shape: tuple[int, int], seed: int) -> None:
    pre, threshold = random(*shape, seed=seed), random(shape[1], seed=seed + 1).relu()
    # Equal is not above.
    pre[0] = threshold
    latents = select_above(pre, threshold)
    for token, row in zip(pre.tolist(), latents.tolist(), strict=True):
        assert row == [value if value > limit else 0.0 for value, limit in zip(token, threshold.tolist(), strict=True)]


def test_select_above_compares_bfloat16_with_the_float32_threshold() -> None:
    pre = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    threshold = torch.tensor([1.0 - 2**-20, 1.0 + 2**-20])
    latents = select_above(pre, threshold)
    assert latents.dtype == torch.bfloat16
    assert latents.tolist() == [[1.0, 0.0]]


# Decoding

nested = st.lists(st.integers(1, 24), min_size=1, max_size=5, unique=True).map(sorted)


def sae_tensors(sizes: list[int], tokens: int, hidden_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latent activations with zeros, decoder rows, decoder bias."""
    latents = random(tokens, sizes[-1], seed=seed, dtype=torch.float64).relu()
    W_dec = random(sizes[-1], hidden_size, seed=seed + 1, dtype=torch.float64)
    return latents, W_dec, random(hidden_size, seed=seed + 2, dtype=torch.float64)


@given(sizes=nested, tokens=st.integers(1, 6), hidden_size=st.integers(1, 9), detach=st.booleans(), seed=seeds)
@properties
def test_a_level_is_the_decoding_of_its_prefix(
    sizes: list[int], tokens: int, hidden_size: int, detach: bool, seed: int
) -> None:
    latents, W_dec, b_dec = sae_tensors(sizes, tokens, hidden_size, seed)
    levels = list(decode_levels(latents, W_dec, b_dec, sizes, detach))
    assert len(levels) == len(sizes)
    for size, level in zip(sizes, levels, strict=True):
        prefix = latents.clone()
        prefix[:, size:] = 0
        expected = torch.einsum("bf,fd->bd", prefix, W_dec) + b_dec
        torch.testing.assert_close(level, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(decode(prefix, W_dec, b_dec), expected, rtol=1e-12, atol=1e-12)


def gradients_of_level(level: int, detach: bool) -> tuple[Tensor, ...]:
    """Gradients of one level's squared error with respect to latent activations, decoder rows and bias."""
    sizes = [4, 10, 16]
    latents, W_dec, b_dec = tensors = sae_tensors(sizes, 5, 6, seed=0)
    for tensor in tensors:
        tensor.requires_grad_()
    x = random(5, 6, seed=9, dtype=torch.float64)
    reconstruction = list(decode_levels(latents, W_dec, b_dec, sizes, detach))[level]
    return torch.autograd.grad((x - reconstruction).pow(2).sum(), tensors, materialize_grads=True)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_detached_level_trains_only_its_own_group(level: int) -> None:
    low, high = list(pairwise([0, 4, 10, 16]))[level]
    whole = gradients_of_level(level, detach=False)
    latents, W_dec, b_dec = gradients_of_level(level, detach=True)
    torch.testing.assert_close(latents[:, low:high], whole[0][:, low:high])
    torch.testing.assert_close(W_dec[low:high], whole[1][low:high])
    assert W_dec[low:high].abs().min() > 0
    latents[:, low:high], W_dec[low:high] = 0, 0
    assert latents.abs().max() == 0
    assert W_dec.abs().max() == 0
    # The bias belongs to the innermost level, as if it were a latent that is always active.
    assert (b_dec.abs().max() > 0) == (level == 0)
    assert whole[2].abs().max() > 0


def test_without_detaching_a_level_trains_all_inner_groups() -> None:
    latents, W_dec, _ = gradients_of_level(1, detach=False)
    assert W_dec[:10].abs().min() > 0
    assert W_dec[10:].abs().max() == 0
    assert latents[:, 10:].abs().max() == 0


# Gradients

SELECTIONS = {
    "batch_topk": lambda pre: select_batch_topk(pre, 2.5),
    "topk": lambda pre: select_topk(pre, 3),
    "relu": torch.relu,
}


@pytest.mark.parametrize("activation", SELECTIONS)
def test_gradients_of_the_nested_loss_are_its_derivatives(activation: str) -> None:
    tokens, hidden_size, sizes, weights = 4, 5, [3, 6, 12], [0.2, 0.3, 0.5]
    parameters = [
        random(12, hidden_size, seed=20, dtype=torch.float64),
        random(12, seed=21, dtype=torch.float64),
        random(12, hidden_size, seed=22, dtype=torch.float64),
        random(hidden_size, seed=23, dtype=torch.float64),
        random(tokens, hidden_size, seed=24, dtype=torch.float64),
    ]
    for parameter in parameters:
        parameter.requires_grad_()

    def loss(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor) -> Tensor:
        latents = SELECTIONS[activation](pre_activations(x, W_enc, b_enc, b_dec))
        levels = decode_levels(latents, W_dec, b_dec, sizes)
        errors = [(x - level).pow(2).sum(-1).mean() for level in levels]
        return (torch.stack(errors) * torch.tensor(weights, dtype=torch.float64)).sum()

    # The selection is constant within gradcheck's steps of 1e-6 only if no two candidates are that close.
    W_enc, b_enc, _, b_dec, x = parameters
    values = pre_activations(x, W_enc, b_enc, b_dec).detach().flatten().sort().values
    assert values.diff().min() > 1e-4
    assert values.abs().min() > 1e-4
    assert torch.autograd.gradcheck(loss, parameters, eps=1e-6, atol=1e-6)


def test_jumprelu_forward_and_gradients_follow_the_formula() -> None:
    pre = random(6, 9, seed=30, dtype=torch.float64).requires_grad_()
    threshold = random(9, seed=31, dtype=torch.float64).abs().requires_grad_()
    width = 0.8
    grad_latents, grad_active = (random(6, 9, seed=seed, dtype=torch.float64) for seed in (32, 33))
    latents, active = JumpReLU.apply(pre, threshold, torch.tensor(width, dtype=torch.float64))
    got_pre, got_threshold = torch.autograd.grad((latents, active), (pre, threshold), (grad_latents, grad_active))

    expected_threshold = [0.0] * 9
    inside = 0
    for b in range(6):
        for f in range(9):
            z, theta = pre[b, f].item(), threshold[f].item()
            assert latents[b, f].item() == (z if z > theta else 0.0)
            assert active[b, f].item() == float(z > theta)
            assert got_pre[b, f].item() == (grad_latents[b, f].item() if z > theta else 0.0)
            kernel = 1 / width if abs(z - theta) < width / 2 else 0.0
            inside += kernel > 0
            expected_threshold[f] -= kernel * (theta * grad_latents[b, f].item() + grad_active[b, f].item())
    assert 5 < inside < 49
    assert got_threshold.tolist() == pytest.approx(expected_threshold, rel=1e-12)


def test_the_expected_l0_falls_with_the_threshold_as_the_jumprelu_gradient_says() -> None:
    """Over many tokens the straight-through gradient of L0 estimates minus the density at the threshold."""
    pre = random(200_000, 1, seed=40, dtype=torch.float64)
    threshold = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    _, active = JumpReLU.apply(pre, threshold, torch.tensor(0.1, dtype=torch.float64))
    (slope,) = torch.autograd.grad(active.mean(), threshold)
    density = math.exp(-(0.7**2) / 2) / math.sqrt(2 * math.pi)
    assert slope.item() == pytest.approx(-density, rel=0.03)


# The auxiliary loss


@given(tokens=st.integers(1, 6), k=st.integers(1, 9), num_dead=st.integers(1, 8), seed=seeds)
@properties
def test_decode_dead_is_the_error_of_the_strongest_dead_latents(tokens: int, k: int, num_dead: int, seed: int) -> None:
    hidden_size, num_latents = 5, 8
    pre = distinct((tokens, num_latents), seed).double()
    W_dec = random(num_latents, hidden_size, seed=seed + 1, dtype=torch.float64)
    residual = random(tokens, hidden_size, seed=seed + 2, dtype=torch.float64)
    order = torch.randperm(num_latents, generator=torch.Generator().manual_seed(seed)).tolist()
    dead = torch.zeros(num_latents, dtype=torch.bool)
    dead[order[:num_dead]] = True
    error = 0.0
    for b in range(tokens):
        candidates = sorted(order[:num_dead], key=(-pre[b]).tolist().__getitem__)[:k]
        approximation = sum(max(pre[b, f].item(), 0.0) * W_dec[f] for f in candidates)
        error += (residual[b] - approximation).pow(2).sum().item()
    assert decode_dead(residual, pre[:, dead], W_dec[dead], k).item() == pytest.approx(error / tokens, rel=1e-12)


def test_decode_dead_trains_dead_latents_only_and_never_the_residual() -> None:
    pre, W_dec, residual = (random(*shape, seed=s) for s, shape in enumerate([(6, 10), (10, 4), (6, 4)]))
    dead = torch.zeros(10, dtype=torch.bool)
    dead[[1, 4, 5, 8]] = True
    for tensor in (pre, W_dec, residual):
        tensor.requires_grad_()
    error = decode_dead(residual, pre[:, dead], W_dec[dead], 2)
    of_pre, of_decoder, of_residual = torch.autograd.grad(error, (pre, W_dec, residual), allow_unused=True)
    assert of_residual is None
    assert of_decoder[~dead].abs().max() == 0
    assert of_decoder[dead].abs().amax(-1).min() > 0
    assert of_pre[:, ~dead].abs().max() == 0
    assert int((of_pre != 0).sum(-1).max()) == 2


def test_gradients_of_the_auxiliary_loss_are_its_derivatives() -> None:
    residual = random(4, 5, seed=50, dtype=torch.float64)
    pre = random(4, 7, seed=51, dtype=torch.float64).requires_grad_()
    W_dec = random(7, 5, seed=52, dtype=torch.float64).requires_grad_()
    dead = torch.tensor([True, False, True, True, False, True, True])
    assert pre.detach().flatten().sort().values.diff().min() > 1e-4
    assert pre.detach().abs().min() > 1e-4
    assert torch.autograd.gradcheck(lambda p, w: decode_dead(residual, p[:, dead], w[dead], 3), (pre, W_dec))


# Thresholds from histograms


@given(exponent=st.integers(-6, 6), share=st.floats(0.005, 0.4), seed=st.integers(0, 50))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_threshold_keeps_the_wanted_number_at_every_scale(exponent: int, share: float, seed: int) -> None:
    values = random(200_000, seed=seed) * 10.0**exponent
    values[::7] = 0
    count = round(share * values.numel())
    histogram = activation_histogram(values)
    threshold = histogram_threshold(histogram, count)
    assert threshold.dtype == torch.float32
    kept = int((values > threshold).sum())
    assert kept == pytest.approx(count, rel=1e-3, abs=1)
    exact = values.sort(descending=True).values[count - 1]
    assert threshold.item() == pytest.approx(exact.item(), rel=1e-3)
    assert int(count_above(histogram, threshold)) == kept


@given(exponent=st.integers(-3, 3), share=st.floats(0.01, 0.3), seed=st.integers(0, 50))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_threshold_is_as_near_as_bfloat16_allows_and_says_what_it_keeps(
    exponent: int, share: float, seed: int
) -> None:
    values = (random(50_000, seed=seed) * 10.0**exponent).bfloat16()
    histogram, count = activation_histogram(values), round(share * values.numel())
    threshold = histogram_threshold(histogram, count)
    kept = int((values > threshold).sum())
    assert int(count_above(histogram, threshold)) == kept
    # In bfloat16 many values coincide: no other threshold between two of them may be nearer.
    each, counts = values.unique(return_counts=True)
    possible = counts.flip(0).cumsum(0)[: int((each > 0).sum())]  # how many are at least each of them
    assert abs(kept - count) == int((possible - count).abs().min())


def test_histogram_counts_positive_values_only() -> None:
    values = torch.tensor([[-1.0, 0.0, -0.0, 1e-30], [3.0, 3.0, 1e30, -torch.inf]])
    histogram = activation_histogram(values)
    assert int(histogram.sum()) == 4
    assert int(histogram.max()) == 2


def test_histograms_of_parts_add_up() -> None:
    values = random(10_000, seed=60)
    parts = activation_histogram(values[:3000]) + activation_histogram(values[3000:])
    assert torch.equal(parts, activation_histogram(values))


@pytest.mark.parametrize("values", [torch.zeros(100), -torch.ones(100), torch.empty(0)])
def test_threshold_of_nothing_positive_is_zero(values: Tensor) -> None:
    histogram = activation_histogram(values)
    threshold = histogram_threshold(histogram, 10)
    assert threshold.item() == 0
    assert int(count_above(histogram, threshold)) == 0


def test_threshold_is_zero_where_more_is_wanted_than_there_is() -> None:
    values = random(1000, seed=61)
    histogram = activation_histogram(values)
    threshold = histogram_threshold(histogram, 900)
    assert threshold.item() == 0
    assert int(count_above(histogram, threshold)) == int((values > 0).sum())


def test_threshold_for_no_latent_at_all_lies_above_the_largest_value() -> None:
    values = random(1000, seed=62)
    threshold = histogram_threshold(activation_histogram(values), 0)
    assert values.max() <= threshold < values.max() * 1.001
