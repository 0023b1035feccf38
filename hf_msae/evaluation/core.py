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

import torch
from torch import Tensor
from transformers.utils import logging

from hf_msae.evaluation.activations import TextActivations, tokens_at_once, total_variance
from hf_msae.metrics import Measurement, ReconstructionMeter, measure_cross_entropies, merge, predicts_next_token
from hf_msae.modeling import MatryoshkaSAE

QUANTISATION = (4, 16, 64)
# Lower edges of the bins of firing rates, in powers of ten.
DENSITY_EDGES = tuple(-5.0 + 0.5 * step for step in range(11))


@dataclass(frozen=True)
class Density:
    """How often latents fire. `counts[g]` are those of group g (the latents that level g adds) whose firing rate lies
    between two of `edges` (log10); rates below the first edge count in the first bin, dead latents apart.

    above_1_percent, above_10_percent: shares of all latents that fire on so many tokens.
    """

    edges: list[float]
    counts: list[list[int]]
    dead: list[int]
    above_1_percent: float
    above_10_percent: float


@dataclass(frozen=True)
class RatePoint:
    """A prefix as a code: bits per token, and the FVE of what is decoded from `cells` quantised values per latent."""

    prefix: int
    cells: int
    bits: float
    fve: float


@dataclass(frozen=True)
class CoreResult:
    """The core numbers of one SAE.

    firing_rate: (num_latents,) float64, over all tokens. rate_tokens: how many of them the rate–distortion points use.
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

    ce_tokens: how many tokens to run the spliced language model on; 0 skips it, as a model that predicts none does.
    rate_tokens: how many tokens to code.
    """
    meters: dict[str, ReconstructionMeter] = {}
    for name, sae in logging.tqdm(saes.items(), desc="Reconstruction", unit=" SAE"):
        meters[name] = ReconstructionMeter(sae)
        for x in text.batches(sae):
            meters[name].update(x)
    cross_entropies: dict[str, Measurement] = {}
    if ce_tokens and predicts_next_token(text.model):
        mean = next(iter(meters.values())).mean
        batches = list(text.token_batches(ce_tokens))
        shown = logging.tqdm(batches, desc="Cross-entropy", unit=" batch")
        cross_entropies = measure_cross_entropies(text.model, text.site, saes, mean, shown)
    results = {}
    for name, sae in logging.tqdm(saes.items(), desc="Rate–distortion", unit=" SAE"):
        rate = meters[name].firing_rate.cpu()
        coded = text.x[:rate_tokens]
        results[name] = CoreResult(
            measurement=replace(merge(meters[name], cross_entropies.get(name)), outliers=text.num_outliers),
            density=density(rate, sae.config.prefix_sizes),
            rate_distortion=rate_distortion(sae, coded),
            rate_tokens=len(coded),
            firing_rate=rate,
        )
    return results


def density(firing_rate: Tensor, prefix_sizes: Iterable[int]) -> Density:
    """The distribution of firing rates (num_latents,) over the groups of latents between prefixes."""
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
def rate_distortion(sae: MatryoshkaSAE, x: Tensor) -> list[RatePoint]:
    """A point for every prefix and fineness of quantisation, from activations (n, hidden_size)."""
    parts = x.split(tokens_at_once(sae))
    low, high = _value_range(sae, parts)
    total = total_variance(x)
    points = []
    for cells in QUANTISATION:
        counts = torch.zeros(sae.config.num_latents * cells, dtype=torch.float64)
        errors = torch.zeros(sae.config.num_levels, dtype=torch.float64)
        for part in parts:
            part = part.to(sae.device)
            latents = sae.encode(part)
            tokens, active = latents.nonzero(as_tuple=True)
            width = (high - low)[active] / cells
            cell = ((latents[tokens, active] - low[active]) / width.clamp_min(1e-30)).floor().clamp(0, cells - 1)
            counts += torch.bincount(active * cells + cell.long(), minlength=len(counts)).cpu()
            latents[tokens, active] = (low[active] + (cell + 0.5) * width).to(latents.dtype)
            for level, reconstruction in enumerate(sae.decode_levels(latents)):
                errors[level] += (part.double() - reconstruction).pow(2).sum().item()
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
    """Bits per token of each latent, (num_latents,), from how often its value fell into each cell, (num_latents,
    cells).
    """
    active = counts.sum(1)
    p = active / num_tokens
    of_cells = counts / active.clamp_min(1)[:, None]
    return _entropy(torch.stack([p, 1 - p], 1)) + p * _entropy(of_cells)


def _entropy(p: Tensor) -> Tensor:
    return -torch.where(p > 0, p * p.clamp_min(1e-300).log2(), 0.0).sum(1)
