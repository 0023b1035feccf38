"""Schedules, functions of the step."""

import math
from itertools import pairwise

import pytest
import torch
from hf_msae.modeling import MatryoshkaSAEConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_msae.training import SAETrainingArguments
from hf_msae.training.schedules import (
    annealed_k,
    annealed_p,
    counts_divergence,
    learning_rate_factor,
    next_p,
    sample_prefix_sizes,
)


def arguments(**changes) -> SAETrainingArguments:
    return SAETrainingArguments(**{"warmup_steps": 10, "decay_steps": 20, **changes})


def test_learning_rate_rises_stays_and_falls_to_zero():
    factors = [learning_rate_factor(step, 100, arguments()) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:80] == [1.0] * 71
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(1 / 20)
    assert learning_rate_factor(100, 100, arguments()) == 0


def test_cosine_decay_meets_linear_at_its_ends_and_middle():
    linear = [learning_rate_factor(step, 100, arguments()) for step in (80, 90, 100)]
    cosine = [learning_rate_factor(step, 100, arguments(lr_scheduler_type="cosine")) for step in (80, 90, 100)]
    assert cosine == pytest.approx(linear)
    assert learning_rate_factor(85, 100, arguments(lr_scheduler_type="cosine")) > 0.75


def test_constant_never_decays():
    assert learning_rate_factor(99, 100, arguments(lr_scheduler_type="constant")) == 1


def test_steps_may_be_shares():
    shares = arguments(warmup_steps=0.1, decay_steps=0.2)
    assert [learning_rate_factor(s, 100, shares) for s in range(100)] == pytest.approx(
        [learning_rate_factor(s, 100, arguments()) for s in range(100)]
    )


def test_k_anneals_linearly_from_its_start_to_k():
    config = MatryoshkaSAEConfig(hidden_size=8, num_latents=64, k=4)
    args = arguments(k_anneal_steps=10, k_initial=14)
    values = [annealed_k(step, 100, config, args) for step in range(12)]
    assert values[0] == 14
    assert values[5] == 9
    assert values[10:] == [4, 4]
    assert annealed_k(0, 100, config, arguments()) == 4


def test_p_anneals_in_equal_steps_from_1_to_its_end_and_what_comes_is_known_before():
    config = MatryoshkaSAEConfig(hidden_size=8, num_latents=64, k=4, activation="relu", p_end=0.2)
    args = arguments(p_anneal_start=0.2, n_sparsity_updates=4, sparsity_queue_length=3)
    values = [annealed_p(step, 100, config, args) for step in range(120)]
    assert values[:20] == [1.0] * 20
    assert values[20:80:20] == pytest.approx([0.8, 0.6, 0.4])
    assert values[80:] == [0.2] * 40  # also where the run is made longer
    assert [step for step in range(1, 120) if values[step] != values[step - 1]] == [20, 40, 60, 80]
    measured = {step: p for step in range(120) if (p := next_p(step, 100, config, args)) is not None}
    assert measured == {at - back: values[at] for at in (20, 40, 60, 80) for back in (1, 2, 3)}
    l1 = MatryoshkaSAEConfig(hidden_size=8, num_latents=64, k=4, activation="relu")
    assert {annealed_p(step, 100, l1, args) for step in range(120)} == {1.0}
    assert {next_p(step, 100, l1, args) for step in range(120)} == {None}


@given(
    max_steps=st.integers(1, 60),
    start=st.one_of(st.integers(0, 70), st.floats(0, 0.99)),
    updates=st.integers(1, 90),
    queue=st.integers(1, 9),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_p_falls_to_its_end_whatever_the_schedule(max_steps, start, updates, queue):
    config = MatryoshkaSAEConfig(hidden_size=8, num_latents=64, k=4, activation="relu", p_end=0.3)
    args = arguments(p_anneal_start=start, n_sparsity_updates=updates, sparsity_queue_length=queue)
    values = [annealed_p(step, max_steps, config, args) for step in range(max_steps)]
    assert all(1 >= one >= other >= 0.3 for one, other in pairwise(values))
    first = math.ceil(start * max_steps if start < 1 else start)
    assert set(values[:first]) <= {1.0}
    if updates <= max_steps - first:
        assert values[-1] == 0.3
    for step in range(max_steps - 1):
        if values[step] != values[step + 1]:
            assert next_p(step, max_steps, config, args) == values[step + 1]


def test_predictions_count_at_the_end_of_the_run_as_it_is_now():
    def first(kl_from, *extensions):
        return next(
            (step for step in range(300) if counts_divergence(step, 100, arguments(**kl_from), extensions)), None
        )

    assert first({}) is None
    assert first({"kl_from": 0.9}) == 90
    assert first({"kl_from": 20}) == 20
    assert first({"kl_from": 0}) == 0
    assert first({"kl_from": 0.9}, (80, 200)) == 180
    assert first({"kl_from": 20}, (80, 200)) == 20


def test_pareto_prefixes_are_distinct_increasing_and_end_with_the_dictionary():
    config = MatryoshkaSAEConfig(hidden_size=8, num_latents=64, k=4, num_sampled_prefixes=5)
    for step in range(50):
        sizes = sample_prefix_sizes(step, config, seed=0)
        assert len(sizes) == 5
        assert sizes == sorted(set(sizes))
        assert sizes[0] >= 1
        assert sizes[-1] == 64
        assert sizes == sample_prefix_sizes(step, config, seed=0)
    assert sample_prefix_sizes(0, config, seed=0) != sample_prefix_sizes(0, config, seed=1)


def test_pareto_draws_follow_the_law():
    """With one free size drawn, P(l) = (l/L)^α - ((l-1)/L)^α exactly."""
    config = MatryoshkaSAEConfig(hidden_size=8, num_latents=20, k=4, num_sampled_prefixes=2, pareto_alpha=0.5)
    draws = torch.tensor([sample_prefix_sizes(step, config, seed=3)[0] for step in range(4000)])
    for size in (1, 2, 10, 19):
        expected = (size / 19) ** 0.5 - ((size - 1) / 19) ** 0.5
        assert (draws == size).double().mean() == pytest.approx(expected, abs=4 * (expected / 4000) ** 0.5)
    # The notes' own value for 20 latents: the first has probability 0.229.
    assert pytest.approx(0.229, abs=5e-4) == (1 / 19) ** 0.5
