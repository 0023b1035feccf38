"""Stitching on pairs of dictionaries whose novel latents are known, and against latents that are really inserted."""

from itertools import pairwise

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.evaluation.activations import TextActivations
from hf_msae.research.novelty import Novelty, measure_level_novelty, measure_novelty
from hf_msae.research.stitching import draw_stitching, measure_stitching, swap_groups
from hf_msae.sites import Site

WIDTH = 12


def made(x: torch.Tensor) -> TextActivations:
    return TextActivations(None, Site("made"), [], 0, 1, x, "made")


def basis_sae(coordinates: list[int], prefix_sizes=()) -> MatryoshkaSAE:
    """A latent for each of these coordinates, which reads it and writes it back."""
    count = len(coordinates)
    config = MatryoshkaSAEConfig(
        hidden_size=WIDTH, num_latents=count, prefix_sizes=list(prefix_sizes) or [count], k=min(2, count)
    )
    sae = MatryoshkaSAE(config)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(WIDTH)[coordinates])
        sae.W_enc.copy_(torch.eye(WIDTH)[coordinates])
    return sae.eval()


def random_sae(num_latents: int, seed: int, prefix_sizes=(), **changes) -> MatryoshkaSAE:
    torch.manual_seed(seed)
    config = MatryoshkaSAEConfig(
        hidden_size=WIDTH,
        num_latents=num_latents,
        prefix_sizes=list(prefix_sizes) or [num_latents],
        k=min(3, num_latents),
        **changes,
    )
    sae = MatryoshkaSAE(config)
    with torch.no_grad():
        sae.b_dec.normal_(std=0.3)
        sae.b_enc.normal_(std=0.1)
        sae.threshold.uniform_(0.2, 0.9)
    return sae.eval()


@pytest.fixture
def sparse() -> torch.Tensor:
    """Ten of twelve coordinates are on now and then, with values from 1 to 2."""
    generator = torch.Generator().manual_seed(0)
    on = torch.rand(3000, WIDTH, generator=generator) < 0.2
    on[:, 10:] = False
    return on * (1 + torch.rand(3000, WIDTH, generator=generator))


@pytest.fixture
def dense() -> torch.Tensor:
    return torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(5))


def variance(x: torch.Tensor) -> float:
    return (x.double() - x.double().mean(0)).pow(2).sum().item()


def test_planted_novel_latents_are_found_by_effect_and_by_cosine(sparse):
    small, large = basis_sae([0, 1, 2, 3, 4]), basis_sae([7, 1, 5, 0, 11, 3, 6, 2, 4, 9])
    found = measure_novelty(made(sparse), small, large)
    assert found.alive.tolist() == [True, True, True, True, False, True, True, True, True, True]
    assert found.novel.nonzero().flatten().tolist() == [0, 2, 6, 9]
    assert found.reconstruction.nonzero().flatten().tolist() == [1, 3, 5, 7, 8]
    squares = sparse.double().pow(2).sum(0) / variance(sparse)
    assert found.gain[0].item() == pytest.approx(squares[7].item(), rel=1e-5)
    # A second copy of what is there already overshoots by as much as the first explained.
    assert found.gain[1].item() == pytest.approx(-squares[1].item(), rel=1e-5)
    assert found.cosine.tolist() == pytest.approx([0, 1, 0, 1, 0, 1, 0, 1, 1, 0])
    assert (found.agreement(), found.auroc()) == (1, 1)
    assert found.novel_share == found.novel_share_by_cosine() == 4 / 9


def test_the_curve_goes_from_one_to_the_other_as_planted(sparse):
    small, large = basis_sae([0, 1, 2, 3, 4]), basis_sae([7, 1, 5, 0, 11, 3, 6, 2, 4, 9])
    result = measure_stitching(made(sparse), small, large, steps=10)
    assert [point.step for point in result.curve] == ["small", *["insert"] * 4, *["swap"] * 5, "large"]
    assert sorted(result.groups) == [([0], [3]), ([1], [1]), ([2], [7]), ([3], [5]), ([4], [8])]
    fve = [point.fve for point in result.curve]
    l0 = [point.l0 for point in result.curve]
    assert all(low < high for low, high in pairwise(fve[:5]))
    assert all(low < high for low, high in pairwise(l0[:5]))
    # The largest gain comes first, and swapping twins changes nothing.
    assert all(fve[i + 1] - fve[i] >= fve[i + 2] - fve[i + 1] - 1e-9 for i in range(3))
    assert fve[5:] == pytest.approx([fve[4]] * 6, abs=1e-6)
    assert l0[5:] == pytest.approx([l0[4]] * 6, abs=1e-9)
    assert (result.curve[-1].inserted, result.curve[-1].removed) == (10, 5)
    assert result.tokens == 3000


def test_gains_are_those_of_latents_that_are_really_inserted(dense):
    small, large = random_sae(6, seed=1), random_sae(9, seed=2)
    found = measure_novelty(made(dense), small, large)

    def error(sae: MatryoshkaSAE) -> float:
        return (dense - sae.decode(sae.encode(dense))).double().pow(2).sum().item()

    for latent in range(9):
        both = random_sae(7, seed=3)
        state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
        row = {name: tensor[latent : latent + 1] for name, tensor in large.state_dict().items() if name != "b_dec"}
        row["b_enc"] = row["b_enc"] - row["W_enc"] @ (large.b_dec - small.b_dec)
        both.load_state_dict(state | {name: torch.cat([state[name], row[name]]) for name in row})
        expected = (error(small) - error(both)) / variance(dense)
        assert found.gain[latent].item() == pytest.approx(expected, abs=1e-6)
    assert found.novel.any()
    assert found.reconstruction.any()


@pytest.mark.parametrize("activation", ["batch_topk", "jumprelu", "relu"])
def test_the_curve_begins_and_ends_at_the_two_saes(dense, activation):
    small, large = random_sae(6, seed=1, activation=activation), random_sae(20, seed=2, activation=activation)
    result = measure_stitching(made(dense), small, large, cosine_cut=0.3, steps=3)
    for point, sae in ((result.curve[0], small), (result.curve[-1], large)):
        latents = sae.encode(dense)
        fve = 1 - (dense.double() - sae.decode(latents)).pow(2).sum().item() / variance(dense)
        assert point.fve == pytest.approx(fve, abs=1e-6)
        assert point.l0 == pytest.approx((latents > 0).sum().item() / 500)
    assert result.groups
    assert len({i for group, _ in result.groups for i in group}) == sum(len(group) for group, _ in result.groups)


def test_the_order_of_latents_does_not_matter(dense):
    small, large = random_sae(6, seed=1), random_sae(20, seed=2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(4))
    other = random_sae(20, seed=2)
    other.load_state_dict(
        {name: tensor if name == "b_dec" else tensor[order] for name, tensor in large.state_dict().items()}
    )
    one, two = (measure_stitching(made(dense), small, sae, cosine_cut=0.3) for sae in (large, other))
    torch.testing.assert_close(two.novelty.gain, one.novelty.gain[order])
    torch.testing.assert_close(two.novelty.cosine, one.novelty.cosine[order])
    assert [point.fve for point in two.curve] == pytest.approx([point.fve for point in one.curve], abs=1e-6)


def test_groups_are_connected_components():
    generator = torch.Generator().manual_seed(0)
    small, large = torch.randn(15, 4, generator=generator), torch.randn(25, 4, generator=generator)
    eligible = torch.rand(25, generator=generator) < 0.8
    cosines = torch.cosine_similarity(large[:, None], small[None], dim=2)
    edges = {(i, j) for j in range(25) for i in range(15) if eligible[j] and cosines[j, i] >= 0.8}
    expected, left = set(), set(edges)
    while left:
        old, new = ({node} for node in left.pop())
        while grown := {edge for edge in left if edge[0] in old or edge[1] in new}:
            old, new, left = old | {i for i, _ in grown}, new | {j for _, j in grown}, left - grown
        expected.add((tuple(sorted(old)), tuple(sorted(new))))
    groups = swap_groups(small, large, eligible, 0.8)
    assert {(tuple(old), tuple(new)) for old, new in groups} == expected
    assert len(expected) > 3
    assert max(len(old) + len(new) for old, new in expected) > 3
    best = [max(cosines[j, i].item() for i in old for j in new) for old, new in groups]
    assert best == sorted(best, reverse=True)


def test_levels_of_one_sae_are_stitched_like_two_saes(dense):
    sae = random_sae(20, seed=1, prefix_sizes=[4, 9, 20])
    levels = measure_level_novelty(made(dense), sae)
    assert [(level.inner, level.prefix) for level in levels] == [(4, 9), (9, 20)]
    for level in levels:
        apart = measure_novelty(made(dense), sae.truncate(level.inner), sae.truncate(level.prefix))
        torch.testing.assert_close(level.novelty.gain, apart.gain[level.inner :], atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(level.novelty.cosine, apart.cosine[level.inner :])
        assert torch.equal(level.novelty.alive, apart.alive[level.inner :])
        # What is in both is there twice after it is inserted.
        assert apart.cosine[: level.inner].tolist() == pytest.approx([1.0] * level.inner, abs=1e-5)
    assert measure_level_novelty(made(dense), random_sae(6, seed=1)) == []


def test_nested_levels_of_orthogonal_latents_are_all_novel(sparse):
    (level,) = measure_level_novelty(made(sparse), basis_sae([0, 1, 2, 3, 10], prefix_sizes=[2, 5]))
    assert (level.novelty.novel_share, int(level.novelty.alive.sum())) == (1.0, 2)


def test_auroc_counts_pairs():
    gain = torch.tensor([1.0, 1, -1, -1, 1, 1])
    cosine = torch.tensor([0.1, 0.5, 0.5, 0.9, 0.95, 0.0])
    found = Novelty(gain, cosine, torch.tensor([True, True, True, True, True, False]))
    # Novel 0.1, 0.5, 0.95 against 0.5, 0.9: below in 2 + 1.5 + 0 of 6 pairs.
    assert found.auroc() == pytest.approx(3.5 / 6)
    assert found.agreement(0.7) == pytest.approx(3 / 5)
    assert found.novel_share == pytest.approx(3 / 5)
    assert Novelty(gain[:2], cosine[:2], torch.tensor([True, True])).auroc() is None


def test_what_does_not_fit_is_refused_in_words(sparse):
    small, large = basis_sae([0]), basis_sae([0, 1])
    with pytest.raises(ValueError, match="the activations have 5 dimensions, the SAEs read 12 and 12"):
        measure_novelty(made(sparse[:, :5]), small, large)
    with pytest.raises(ValueError, match=r"cosine_cut=0, steps=12"):
        measure_stitching(made(sparse), small, large, cosine_cut=0)
    with pytest.raises(ValueError, match="steps at least 1"):
        measure_stitching(made(sparse), small, large, steps=0)


def test_the_plot_shows_the_curve_and_every_latent_that_fires(sparse):
    from matplotlib.figure import Figure

    result = measure_stitching(made(sparse), basis_sae([0, 1, 2]), basis_sae([5, 1, 0, 11, 2]), steps=2)
    figure = Figure()
    draw_stitching(result, figure)
    left, middle, right = figure.axes
    assert left.lines[0].get_ydata() == pytest.approx([point.fve for point in result.curve])
    assert middle.lines[0].get_ydata() == pytest.approx([point.l0 for point in result.curve])
    assert [line.get_label() for line in left.lines[1:]] == ["small", "insert", "swap", "large"]
    assert sum(len(line.get_xdata()) for line in left.lines[1:]) == len(result.curve)
    assert len(right.lines[0].get_xdata()) == 4
