"""Pictures of SAEs beside the features they were to find: activations, decoder × truth, encoder × truth.

Latents stand in the order of the features they are matched with, a parent before its children, so that a perfect SAE
draws the truth's own pictures. Absorption is then a gap in a parent's row of activations where a child fires, a blue
cell right of the parent's own in the encoder, and a red one left of the child's in the decoder; hedging is red right
of the parent's own cell in both.
"""

import io
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_msae.modeling import MatryoshkaSAE
from hf_msae.research.recovery import assign, truth_cosines
from hf_msae.research.toys import FeatureWorld, Forest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Samples drawn in the activation pictures, and features up to which cells carry their numbers.
NUM_SHOWN = 120
NUMBERS_UP_TO = 6


def depth_first(forest: Forest) -> list[int]:
    """Rows of the features, each followed by its descendants.

    Args:
        forest: of the features.
    """

    def descend(row: int) -> list[int]:
        return [row, *(below for child in forest.children(row) for below in descend(child))]

    return [row for row, parent in enumerate(forest.parents.tolist()) if parent < 0 for row in descend(row)]


@torch.no_grad()
def draw_heatmaps(world: FeatureWorld, saes: Mapping[str, MatryoshkaSAE], seed: int = 0) -> bytes:
    """A PNG with a row of three pictures for the truth and for each SAE.

    Only samples in which a feature fires are shown, sorted by which do.

    Args:
        world: that the SAEs were trained on.
        saes: by name, in evaluation mode.
        seed: of the samples drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    order = depth_first(world.forest)
    samples = world.sample(20 * NUM_SHOWN, torch.Generator().manual_seed(seed))
    shown = _sorted_samples(samples.features[:, order])
    directions = world.directions[order]
    names = [world.forest.names[row] for row in order]
    side = max(1.9, 0.16 * len(names))
    figure = Figure(figsize=(5 + 2.3 * side, (len(saes) + 1) * (side + 0.15) + 1.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves the user's pyplot alone
    axes = figure.subplots(len(saes) + 1, 3, squeeze=False, width_ratios=[1.35 * side, side, side])
    own = truth_cosines(directions, directions)
    top = samples.features.max().item()
    images = _draw_row(axes[0], "truth", samples.features[shown][:, order].T, own, own, names, top)
    for row, (name, sae) in zip(axes[1:], saes.items(), strict=True):
        decoder, encoder = (truth_cosines(weights, directions) for weights in (sae.W_dec, sae.W_enc))
        matched = assign(decoder)
        latents = matched[matched >= 0]
        activations = sae.encode(samples.x[shown].to(sae.device)).cpu()[:, latents].T
        labels = [str(latent) for latent in latents.tolist()]
        _draw_row(row, name, activations, decoder[:, latents].T, encoder[:, latents].T, labels, top)
    for axis, title in zip(axes[0], ("activations", "decoder × truth", "encoder × truth"), strict=True):
        axis.set_title(title, fontsize="medium")
    for axis in axes[-1, 1:]:
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
    for border in _borders(world.forest, order):
        for axis in axes.flat:
            axis.axhline(border, color="grey", linewidth=0.6)
        for axis in axes[:, 1:].flat:
            axis.axvline(border, color="grey", linewidth=0.6)
    figure.colorbar(images[0], ax=axes[:, 0], location="bottom", label="activation", shrink=0.7, aspect=30, pad=0.01)
    bar = figure.colorbar(
        images[1], ax=axes[:, 1:], location="bottom", label="cosine", shrink=0.5, aspect=30, pad=0.01
    )
    bar.set_ticks([-1, -0.5, 0, 0.5, 1])
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _sorted_samples(features: Tensor) -> list[int]:
    """Up to NUM_SHOWN samples in which a feature fires, so sorted that those of a feature stand together."""
    fires = (features > 0).int()
    some = fires.any(1).nonzero().flatten()[:NUM_SHOWN].tolist()
    return sorted(some, key=lambda sample: fires[sample].tolist(), reverse=True)


def _draw_row(
    axes: Any,
    name: str,
    activations: Tensor,
    decoder: Tensor,
    encoder: Tensor,
    labels: list[str],
    top: float,
) -> tuple[Any, Any]:
    """One SAE's three pictures; gives the activations' image and a cosine image, for colour bars."""
    options = {"aspect": "auto", "interpolation": "nearest"}
    strengths = axes[0].imshow(activations.numpy(), cmap="magma", vmin=0, vmax=1.2 * top, **options)
    axes[0].set_ylabel(name, fontsize="large", fontweight="bold")
    axes[0].set_xticks([])
    for axis, cosines in ((axes[1], decoder), (axes[2], encoder)):
        image = axis.imshow(cosines.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, **options)
        axis.set_xticks([])
        if cosines.shape[1] <= NUMBERS_UP_TO:
            _write_numbers(axis, cosines)
    for axis in axes:
        axis.set_yticks(range(len(labels)), labels, fontsize="x-small")
        axis.tick_params(length=0)
    return strengths, image


def _borders(forest: Forest, order: list[int]) -> list[float]:
    """Where a tree with children begins or ends among the rows, at the cells' edges."""
    places = [place for place, row in enumerate(order) if forest.parents[row] < 0]
    sizes = [end - start for start, end in pairwise([*places, len(order)])]
    edges = {edge for place, size in zip(places, sizes, strict=True) if size > 1 for edge in (place, place + size)}
    return [edge - 0.5 for edge in sorted(edges - {0, len(order)})]


def _write_numbers(axis: "Axes", cosines: Tensor) -> None:
    for row, values in enumerate(cosines.tolist()):
        for column, value in enumerate(values):
            color = "white" if abs(value) > 0.6 else "black"
            text = f"{value:.2f}"
            axis.text(
                column,
                row,
                "0.00" if text == "-0.00" else text,
                ha="center",
                va="center",
                fontsize="small",
                color=color,
            )
