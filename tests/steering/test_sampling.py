"""Sampling with a seed of its own: the right distribution, the same in a batch, untouched by anybody else."""

from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hf_msae.steering import seeded_sampling

pytestmark = pytest.mark.slow

IDS = torch.zeros((1, 3), dtype=torch.long)


def draw(scores: torch.Tensor, seed: int, steps: int, **options) -> torch.Tensor:
    """Tokens (steps, batch) that greedy search takes."""
    processors: Any = seeded_sampling(seed, **options)
    return torch.stack([processors(IDS.expand(len(scores), 3), scores.clone()).argmax(-1) for _ in range(steps)])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"temperature": 2.0, "top_p": 0.7}])
def test_tokens_are_drawn_from_the_distribution(options):
    scores = torch.tensor([[1.0, 0.0, -1.0, 2.0, 0.5]])
    expected = TemperatureLogitsWarper(options.get("temperature", 1.0))(IDS, scores)
    if "top_k" in options:
        expected = TopKLogitsWarper(options["top_k"])(IDS, expected)
    if "top_p" in options:
        expected = TopPLogitsWarper(options["top_p"])(IDS, expected)
    expected = expected.softmax(-1)[0]
    tokens = draw(scores, seed=0, steps=4000, **options)[:, 0]
    found = torch.bincount(tokens, minlength=5) / 4000
    # Four standard deviations of a share of 4,000 draws.
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt()).all()
    assert (found[expected == 0] == 0).all()


def test_a_row_of_a_batch_draws_what_it_draws_alone():
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = draw(scores, seed=5, steps=20)
    for row in range(3):
        assert torch.equal(draw(scores[row : row + 1], seed=5 + row, steps=20)[:, 0], together[:, row])
    assert not torch.equal(together[:, 0], together[:, 1])


def test_the_global_generator_neither_matters_nor_moves():
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    expected = draw(scores, seed=1, steps=9)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(draw(scores, seed=1, steps=9), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draw(scores, seed=2, steps=9), expected)


def test_temperature_zero_is_greedy():
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(scores, seed=1, steps=3, temperature=0)[:, 0], scores.argmax().expand(3))


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="strictly positive float"):
        seeded_sampling(0, temperature=-1.0)
