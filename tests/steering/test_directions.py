"""Directions are of length one and point from what lacks the concept to what has it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_msae.steering import Direction, SteeringError, diff_mean, random_direction


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
