"""The pictures of recovery: what stands where in them."""

import io
from itertools import pairwise

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.research.heatmaps import NUM_SHOWN, _borders, _sorted_samples, depth_first, draw_heatmaps
from hf_msae.research.toys import TOYS, FeatureWorld

pytestmark = pytest.mark.slow


def build(world: FeatureWorld, rows: torch.Tensor) -> MatryoshkaSAE:
    config = MatryoshkaSAEConfig(
        hidden_size=world.hidden_size, num_latents=len(rows), prefix_sizes=[len(rows)], k=1, activation="relu"
    )
    sae = MatryoshkaSAE(config).eval()
    with torch.no_grad():
        sae.W_enc.copy_(rows)
        sae.W_dec.copy_(rows)
    return sae


def pixels(png: bytes) -> torch.Tensor:
    """(height, width, 3), from 0 to 1."""
    from matplotlib.image import imread

    return torch.from_numpy(imread(io.BytesIO(png), format="png")[..., :3].copy())


@pytest.mark.parametrize("name", TOYS)
def test_a_parent_stands_before_its_children_and_trees_stay_together(name):
    forest = TOYS[name](0).world.forest
    order = depth_first(forest)
    assert sorted(order) == list(range(forest.num_features))
    for before, after in pairwise(order):
        # The next row is a child of this one, a sibling of it or of one of its ancestors, or a new root.
        ancestors = forest._lineage(before)
        assert int(forest.parents[after]) in [*ancestors, -1]


def test_borders_stand_around_trees_with_children():
    forest = TOYS["tree"](0).world.forest
    assert _borders(forest, depth_first(forest)) == [3.5, 7.5, 11.5]
    assert _borders(TOYS["hedging"](0).world.forest, [0, 1, 2, 3]) == []


def test_only_samples_with_features_are_shown_and_those_of_a_feature_together():
    features = TOYS["tree"](0).world.sample(2_000, torch.Generator().manual_seed(0)).features
    shown = _sorted_samples(features)
    assert len(shown) == NUM_SHOWN
    fires = features[shown] > 0
    assert fires.any(1).all()
    assert fires[:, 0].int().diff().clamp_min(0).sum() == 0  # those of the first feature come first


def test_a_latent_order_that_differs_from_the_truth_draws_the_same_cells():
    """A perfect SAE's pictures are the truth's, however its latents are numbered; a mixing one's are not."""
    world = TOYS["hedging"](0).world
    rows = world.directions.float()
    mixed = rows.clone()
    mixed[0] = (rows[0] + rows[1]) / 2**0.5
    straight, turned, other = (
        pixels(draw_heatmaps(world, {"SAE": build(world, weights)})) for weights in (rows, rows[[2, 0, 3, 1]], mixed)
    )
    assert straight.shape == turned.shape == other.shape
    # Only the labels beside the cells, the latents' numbers, are other ones.
    assert ((straight - turned).abs().amax(-1) > 0.1).double().mean() < 0.001
    assert ((straight - other).abs().amax(-1) > 0.1).double().mean() > 0.02
