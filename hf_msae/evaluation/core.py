"""How well an SAE does what it was trained for, at every prefix: sparsity, reconstruction, and what is left of the LM.

On top of `hf_msae.metrics`, which training reports too, stand the distribution of firing rates and the rate–distortion
curve: read as a code, an SAE tells for each latent whether it is active and then how much, and a Matryoshka SAE is a
progressive code whose prefixes are shorter messages. The description length of a token (after Ayonrinde et al.,
arXiv:2410.11179) is the entropy of these in bits, each latent by itself, Σ_j H(p_j) + p_j·H(quantised value | active);
the distortion is the FVE of what the quantised values decode to. No cost of the dictionary is counted, and the
entropies come from the same tokens, so those of latents that fire a few times are too low.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.utils import logging

from hf_msae.cross_entropy import measure_cross_entropies, predicts_next_token, why_no_recovery
from hf_msae.evaluation.activations import TextActivations, tokens_at_once, total_variance
from hf_msae.evaluation.metric import Evaluation, Metric, MetricInputs, Plot, Table
from hf_msae.evaluation.plots import Point, draw_lines, legend_outside, log_axis
from hf_msae.evaluation.tables import Column, field_at_prefix, table_by_prefix
from hf_msae.metrics import Measurement, ReconstructionMeter, merge
from hf_msae.modeling import MatryoshkaSAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTISATION = (4, 16, 64)
# Lower edges of the bins of firing rates, in powers of ten.
DENSITY_EDGES = tuple(-5.0 + 0.5 * step for step in range(11))
# How many values per latent the plotted code has, of QUANTISATION.
SHOWN_CELLS = 16


@dataclass(frozen=True)
class Density:
    """The distribution of firing rates.

    Args:
        edges: of the bins, in powers of ten.
        counts: for each group of latents, which is what a level adds, how many latents fire at a rate between two
            edges. Rates below the first edge count in the first bin.
        dead: for each group, how many latents never fire; they are in no bin.
        above_1_percent: share of all latents that fire on more than 1% of tokens.
        above_10_percent: share of all latents that fire on more than 10% of tokens.
    """

    edges: list[float]
    counts: list[list[int]]
    dead: list[int]
    above_1_percent: float
    above_10_percent: float


@dataclass(frozen=True)
class RatePoint:
    """A prefix as a code.

    Args:
        prefix: latents in the prefix.
        cells: values per latent after quantisation.
        bits: per token.
        fve: of what the quantised values decode to.
    """

    prefix: int
    cells: int
    bits: float
    fve: float


@dataclass(frozen=True)
class CoreResult:
    """The core numbers of one SAE.

    Args:
        measurement: per prefix.
        density: the distribution of firing rates.
        rate_distortion: a point for each prefix and fineness of quantisation.
        rate_tokens: how many tokens these points use.
        firing_rate: of each latent over all tokens, (num_latents,) float64.
    """

    measurement: Measurement
    density: Density
    rate_distortion: list[RatePoint]
    rate_tokens: int
    firing_rate: Tensor


@torch.inference_mode()
def measure_core(
    text: TextActivations, saes: Mapping[str, MatryoshkaSAE], *, ce_tokens: int, rate_tokens: int
) -> dict[str, CoreResult]:
    """Measure SAEs of one site on the same tokens.

    Args:
        text: activations of the site.
        saes: by name, in evaluation mode.
        ce_tokens: how many tokens to run the language model on with reconstructions; 0 skips it, as a model that
            predicts no next token does.
        rate_tokens: how many tokens to code.

    Returns:
        By name.
    """
    meters: dict[str, ReconstructionMeter] = {}
    for name, sae in logging.tqdm(saes.items(), desc="Reconstruction", unit=" SAE"):
        meters[name] = ReconstructionMeter(sae)
        for batch in text.with_targets(sae):
            meters[name].update(*batch)
    cross_entropies: dict[str, Measurement] = {}
    if ce_tokens and predicts_next_token(text.model):
        mean = next(iter(meters.values())).mean
        batches = list(text.token_batches(ce_tokens))
        shown = logging.tqdm(batches, desc="Cross-entropy", unit=" batch")
        cross_entropies = measure_cross_entropies(text.model, text.site, saes, mean, shown, output_site=text.site_out)
    results = {}
    token_ids = text.token_ids[:rate_tokens]
    for name, sae in logging.tqdm(saes.items(), desc="Rate–distortion", unit=" SAE"):
        rate = meters[name].firing_rate.cpu()
        coded, wanted = text.x[:rate_tokens], text.targets[:rate_tokens]
        measurement = replace(merge(meters[name], cross_entropies.get(name)), outliers=text.num_outliers)
        measurement.ce_absent = why_no_recovery(measurement, text.model)
        results[name] = CoreResult(
            measurement=measurement,
            density=density(rate, sae.config.prefix_sizes),
            rate_distortion=rate_distortion(sae, coded, wanted, token_ids),
            rate_tokens=len(coded),
            firing_rate=rate,
        )
    return results


def density(firing_rate: Tensor, prefix_sizes: Iterable[int]) -> Density:
    """The distribution of firing rates over the groups of latents between prefixes.

    Args:
        firing_rate: (num_latents,).
        prefix_sizes: of the SAE.
    """
    edges = torch.tensor(DENSITY_EDGES[1:-1], dtype=torch.float64)
    counts, dead = [], []
    for low, high in pairwise([0, *prefix_sizes]):
        rates = firing_rate[low:high]
        dead.append(int((rates == 0).sum()))
        places = torch.bucketize(rates[rates > 0].log10(), edges, right=True)
        counts.append(torch.bincount(places, minlength=len(DENSITY_EDGES) - 1).tolist())
    return Density(
        edges=list(DENSITY_EDGES),
        counts=counts,
        dead=dead,
        above_1_percent=(firing_rate > 0.01).double().mean().item(),
        above_10_percent=(firing_rate > 0.1).double().mean().item(),
    )


@torch.inference_mode()
def rate_distortion(
    sae: MatryoshkaSAE, x: Tensor, target: Tensor | None = None, token_ids: Tensor | None = None
) -> list[RatePoint]:
    """A point for every prefix and fineness of quantisation.

    Args:
        sae: in evaluation mode.
        x: activations, (n, hidden_size).
        target: what is to be reconstructed, (n, output_size); x by default.
        token_ids: the token of each, (n,), which a tokenized SAE needs.
    """
    target = x if target is None else target
    parts = x.split(tokens_at_once(sae))
    low, high = _value_range(sae, parts)
    total = total_variance(target)
    points = []
    for cells in QUANTISATION:
        counts = torch.zeros(sae.config.num_latents * cells, dtype=torch.float64)
        errors = torch.zeros(sae.config.num_levels, dtype=torch.float64)
        begin = 0
        for part, wanted in zip(parts, target.split(tokens_at_once(sae)), strict=True):
            ids = None if token_ids is None else token_ids[begin : begin + len(part)]
            begin += len(part)
            part, wanted = part.to(sae.device), wanted.to(sae.device)
            latents = sae.encode(part)
            tokens, active = latents.nonzero(as_tuple=True)
            width = (high - low)[active] / cells
            cell = ((latents[tokens, active] - low[active]) / width.clamp_min(1e-30)).floor().clamp(0, cells - 1)
            counts += torch.bincount(active * cells + cell.long(), minlength=len(counts)).cpu()
            latents[tokens, active] = (low[active] + (cell + 0.5) * width).to(latents.dtype)
            for level, reconstruction in enumerate(sae.decode_levels(latents, part, ids)):
                errors[level] += (wanted.double() - reconstruction).pow(2).sum().item()
        bits = description_bits(counts.view(-1, cells), len(x)).cumsum(0)
        for level, prefix in enumerate(sae.config.prefix_sizes):
            points.append(RatePoint(prefix, cells, bits[prefix - 1].item(), 1 - errors[level].item() / total))
    return points


def _value_range(sae: MatryoshkaSAE, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The smallest and the largest active value of every latent, (num_latents,) each."""
    low = torch.full((sae.config.num_latents,), torch.inf, device=sae.device)
    high = torch.zeros(sae.config.num_latents, device=sae.device)
    for part in parts:
        latents = sae.encode(part.to(sae.device)).float()
        low = torch.minimum(low, latents.masked_fill(latents == 0, torch.inf).min(0).values)
        high = torch.maximum(high, latents.max(0).values)
    return torch.minimum(low, high), high


def description_bits(counts: Tensor, num_tokens: int) -> Tensor:
    """Bits per token of each latent.

    Args:
        counts: how often its value fell into each cell, (num_latents, cells).
        num_tokens: of how many tokens.

    Returns:
        (num_latents,) float64.
    """
    active = counts.sum(1)
    p = active / num_tokens
    of_cells = counts / active.clamp_min(1)[:, None]
    return _entropy(torch.stack([p, 1 - p], 1)) + p * _entropy(of_cells)


def _entropy(p: Tensor) -> Tensor:
    return -torch.where(p > 0, p * p.clamp_min(1e-300).log2(), 0.0).sum(1)


class CoreMetric(Metric[dict[str, CoreResult]]):
    """Sparsity, reconstruction, and the language model with reconstructions, by the SAE's name."""

    name = "core"
    takes_transcoders = True

    def measure(self, inputs: MetricInputs) -> dict[str, CoreResult]:
        """Measure all SAEs on the same tokens."""
        return measure_core(inputs.text, inputs.saes, ce_tokens=inputs.ce_tokens, rate_tokens=inputs.rate_tokens)

    def tables(self, result: dict[str, CoreResult], evaluation: Evaluation) -> list[Table]:
        """One, with a row for each method at each prefix."""
        found = {name: core.measurement.levels for name, core in result.items()}
        columns = [
            Column("L0", field_at_prefix(found, "l0"), 2),
            Column("FVE", field_at_prefix(found, "fve")),
            Column("NMSE", field_at_prefix(found, "nmse")),
            Column("cosine", field_at_prefix(found, "cosine")),
            Column("CE rec. (mean)", field_at_prefix(found, "ce_recovered_mean")),
            Column("CE rec. (zero)", field_at_prefix(found, "ce_recovered")),
            Column("ΔCE", field_at_prefix(found, "ce_increase")),
            Column("KL", field_at_prefix(found, "kl")),
            Column("dead %", field_at_prefix(found, "dead"), 1, 100.0),
        ]
        note = _note(next(iter(result.values())).measurement)
        return [table_by_prefix(evaluation, "Reconstruction", note, columns)]

    def plots(self, result: dict[str, CoreResult], evaluation: Evaluation) -> list[Plot]:
        """Fidelity against sparsity, the rate–distortion curve, and how often latents fire."""
        return [
            Plot(
                "Fidelity against sparsity: each point is a prefix, each line a method.",
                lambda figure: _draw_fidelity(result, evaluation, figure),
            ),
            Plot(
                f"As a code: bits per token, with {SHOWN_CELLS} values per latent, and what they explain.",
                lambda figure: _draw_rate_distortion(result, evaluation, figure),
            ),
            Plot(
                "How often latents fire, by the level that adds them.",
                lambda figure: _draw_density(*next(iter(result.items())), figure),
            ),
        ]


def _note(first: Measurement) -> str:
    note = f"On {first.tokens:,} tokens"
    if first.outliers:
        note += f" ({first.outliers:,} with outlying norms, attention sinks, left out)"
    if first.ce_clean is not None and first.ce_zero is not None and first.ce_mean is not None:
        note += (
            f"; cross-entropy (CE, nats per token) and KL on {first.ce_tokens:,}. The model as it is has CE "
            f"{first.ce_clean:.3f}, with the site set to zero {first.ce_zero:.3f}, to the mean {first.ce_mean:.3f}. "
            "CE recovered is 1 where the reconstruction costs nothing and 0 where it is as bad as that ablation; "
            "against zero it flatters"
        )
        if first.ce_absent is not None:
            note += f". But {first.ce_absent}: then CE recovered means nothing"
    return note + ". NMSE is not centred, so a large mean makes it look better than FVE."


def _draw_fidelity(result: Mapping[str, CoreResult], evaluation: Evaluation, figure: "Figure") -> None:
    spliced = next(iter(result.values())).measurement.ce_clean is not None
    left, *others = figure.subplots(1, 1 + spliced, squeeze=False)[0]
    draw_lines(left, evaluation, lambda name: [(level.l0, level.fve) for level in result[name].measurement.levels])
    left.set(xlabel="L0", ylabel="FVE")
    log_axis(left)
    left.set_ylim(top=1.02, bottom=max(-0.1, left.get_ylim()[0]))

    def recovered(name: str) -> list[Point]:
        levels = result[name].measurement.levels
        return [(level.l0, level.ce_recovered_mean) for level in levels if level.ce_recovered_mean is not None]

    for right in others:
        draw_lines(right, evaluation, recovered)
        right.set(xlabel="L0", ylabel="CE recovered (against mean)")
        log_axis(right)
        right.set_ylim(top=1.02, bottom=max(-0.5, right.get_ylim()[0]))
    legend_outside(figure.axes[-1])


def _draw_rate_distortion(result: Mapping[str, CoreResult], evaluation: Evaluation, figure: "Figure") -> None:
    axis = figure.subplots()

    def points(name: str) -> list[Point]:
        return [(p.bits, p.fve) for p in result[name].rate_distortion if p.cells == SHOWN_CELLS]

    draw_lines(axis, evaluation, points)
    axis.set(xlabel="bits per token", ylabel="FVE")
    log_axis(axis)
    axis.set_ylim(top=1.02, bottom=max(-0.1, axis.get_ylim()[0]))
    legend_outside(axis)


def _draw_density(name: str, core: CoreResult, figure: "Figure") -> None:
    from matplotlib import colormaps

    axis = figure.subplots()
    sizes = [level.prefix for level in core.measurement.levels]
    edges, bottom = core.density.edges, [0] * (len(core.density.edges) - 1)
    centres = [(low + high) / 2 for low, high in pairwise(edges)]
    for group, (counts, size) in enumerate(zip(core.density.counts, sizes, strict=True)):
        # The ends of the colormap would vanish on a dark or on a white page.
        colour = colormaps["plasma"](0.35 + 0.45 * group / max(1, len(sizes) - 1))
        label = f"up to {size:,} ({core.density.dead[group]} dead)"
        axis.bar(centres, counts, width=0.46, bottom=bottom, color=colour, label=label)
        bottom = [below + count for below, count in zip(bottom, counts, strict=True)]
    axis.set(xlabel=f"share of tokens on which a latent of {name} fires", ylabel="latents")
    ticks = [edge for edge in edges if edge == int(edge)]
    axis.set_xticks(ticks, [f"{100 * 10**tick:g}%" for tick in ticks])
    legend_outside(axis)
