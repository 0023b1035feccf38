"""The highest scores of each latent, whatever the order and the batches in which they come."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_msae.interpret.contexts import (
    NO_TOKEN,
    Contexts,
    ContextStore,
    as_uniform,
    best_of_each,
    place_hashes,
    window_hashes,
)


def contexts_of(numbers: torch.Tensor) -> Contexts:
    """A context whose every entry is the number that it stands for."""
    return Contexts(numbers[:, None].repeat(1, 3).int(), numbers[:, None].repeat(1, 3).float(), numbers % 3)


# Ties are hashes: whole numbers that no float holds.
LARGE = 2**60


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=60),
    st.integers(1, 5),
    st.integers(1, 20),
    st.randoms(),
)
def test_the_store_is_a_brute_force_top_k_in_any_order(offers, size, batch, chooser):
    """Scores repeat often, so that ties matter."""
    numbered = [(latent, float(score), number) for number, (latent, score) in enumerate(offers)]
    expected = {
        latent: sorted(((score, number) for other, score, number in numbered if other == latent), reverse=True)[:size]
        for latent in range(5)
    }
    chooser.shuffle(numbered)
    store = ContextStore(5, size, 3)
    for start in range(0, len(numbered), batch):
        latents, scores, numbers = map(torch.tensor, zip(*numbered[start : start + batch], strict=True))
        places = store.may_enter(latents, scores)
        chosen = numbers[places]
        ties = LARGE + chosen
        store.offer(latents[places], scores[places], ties, lambda rows, chosen=chosen: contexts_of(chosen[rows]))
    for latent, rows in expected.items():
        found = store.of(latent)
        # As documented: memory of the store follows from them.
        assert [part.dtype for part in found] == [torch.int32, torch.float32, torch.int64]
        assert found.token_ids[:, 0].tolist() == [number for _, number in rows]
        assert found.activations[:, 2].tolist() == [number for _, number in rows]
        assert found.position.tolist() == [number % 3 for _, number in rows]
        assert store.scores[latent, : len(rows)].tolist() == [score for score, _ in rows]


def test_best_of_each_ranks_within_groups():
    groups, scores = torch.tensor([1, 0, 1, 1, 0]), torch.tensor([5.0, 1.0, 7.0, 5.0, 2.0])
    places, ranks = best_of_each(groups, scores, torch.tensor([0, 0, 0, 9, 0]), 2)
    assert places.tolist() == [4, 1, 2, 3]
    assert ranks.tolist() == [0, 1, 0, 1]
    empty = torch.empty(0, dtype=torch.int64)
    assert [len(part) for part in best_of_each(empty, torch.empty(0), empty, 2)] == [0, 0]


def test_hashes_depend_on_the_tokens_and_not_on_the_padding():
    ids = torch.tensor([[5, 6, 7, NO_TOKEN], [6, 5, 7, NO_TOKEN], [5, 6, 7, 8]])
    assert len(window_hashes(ids).unique()) == 3
    assert window_hashes(ids[:2, :3]).tolist() == window_hashes(ids[:2]).tolist()


def test_hashes_are_uniform_and_independent_between_latents():
    windows = window_hashes(torch.arange(20_000).view(-1, 2))
    positions = torch.arange(10_000) % 7
    first = as_uniform(place_hashes(windows, positions, torch.full_like(windows, 3)))
    second = as_uniform(place_hashes(windows, positions, torch.full_like(windows, 4)))
    # 10,000 draws: the share in each tenth is within 4 standard deviations of 0.1, the correlation of 0.
    assert (torch.histc(first, 10, 0, 1) / 10_000 - 0.1).abs().max() < 4 * 0.003
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 0.04
    assert 0 <= first.min() < first.max() < 1
