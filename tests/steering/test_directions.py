"""Directions are of length one and point from what lacks the concept to what has it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_msae.sites import capture, resolve_site
from hf_msae.steering import Direction, SteeringError, diff_mean, random_direction, steer_direction


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 6), st.sampled_from([torch.float32, torch.bfloat16]))
def test_diff_mean_leads_from_the_one_mean_to_the_other(seed, num_positive, num_negative, dtype):
    generator = torch.Generator().manual_seed(seed)
    positive = torch.randn(num_positive, 12, generator=generator).to(dtype)
    negative = torch.randn(num_negative, 12, generator=generator).to(dtype)
    way = positive.double().mean(0) - negative.double().mean(0)
    found = diff_mean("layers.1", positive, negative).vector.double()
    torch.testing.assert_close(found * way.norm(), way, rtol=1e-4, atol=1e-5)


def test_what_has_no_direction_is_refused():
    some = torch.ones(2, 4)
    for positive, negative in ((some[:0], some), (some, some[:0]), (some, some)):
        with pytest.raises(SteeringError):
            diff_mean("layers.1", positive, negative)
    for vector in (torch.zeros(4), torch.full((4,), float("nan")), torch.ones(2, 4)):
        with pytest.raises(SteeringError, match="one finite vector that is not zero"):
            Direction("layers.1", vector)


def test_random_directions_are_of_length_one_and_told_apart_by_their_seeds():
    vectors = torch.stack([random_direction("layers.1", 64, seed).vector for seed in (0, 0, 1, 2)])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    assert torch.equal(vectors[0], vectors[1])
    assert (vectors[1:] @ vectors[1:].T).fill_diagonal_(0).abs().max() < 0.6


def test_outliers_are_left_alone_where_a_limit_is_given(lm):
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    site = resolve_site(lm, "layers.0")
    norms = capture(lm, [site], input_ids=ids)[site][0].norm(dim=-1)
    limit = norms[1:].sort().values[2].item() * (1 + 1e-6)  # three tokens that count within, one beyond

    def shifted(norm_limit: float | None) -> torch.Tensor:
        seen = []
        with steer_direction(lm, Direction("layers.0", torch.ones(16)), 3.0, norm_limit=norm_limit), torch.no_grad():
            seen.append(lm(ids, output_hidden_states=True).hidden_states[1][0])
        return (seen[0] - lm(ids, output_hidden_states=True).hidden_states[1][0]).norm(dim=-1) > 0.1

    assert shifted(None).tolist() == [False, True, True, True, True]  # BOS never is
    expected = norms <= limit
    expected[0] = False
    assert expected.sum() == 3
    assert torch.equal(shifted(limit), expected)
