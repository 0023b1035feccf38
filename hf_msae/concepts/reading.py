"""How well latents and probes tell texts with a concept from texts without it: AUROC on held-out texts.

AUROC is the chance that a text with the concept has the larger value; 0.5 is guessing, and below it a latent fires on
texts without the concept. A text's value is the mean over its tokens, as everywhere where documents are examples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_msae.evaluation.probes import Probes, Samples, fit_probes

# Latents that a sparse probe reads, as many as a steering has at most.
FEW = 5
# How many standard errors above 0.5 are more than chance.
BEYOND_CHANCE = 2.0
NUMBERS_AT_ONCE = 2**24


@dataclass(frozen=True)
class LevelReading:
    """How well the latents of a prefix tell the concept.

    Args:
        prefix: how many latents there are to choose from.
        latent: the best one on the texts for fitting.
        auroc: its, on held-out texts.
        few: the latents of the sparse probe.
        few_auroc: of the sparse probe, on held-out texts.
    """

    prefix: int
    latent: int
    auroc: float
    few: tuple[int, ...]
    few_auroc: float


def auroc(values: Tensor, positive: Tensor) -> Tensor:
    """AUROC of each column, equal values counting half, (width,) float64.

    Args:
        values: (num_texts, width).
        positive: which texts have the concept, (num_texts,) bool.
    """
    plus, minus = values[positive], values[~positive]
    at_once = max(1, NUMBERS_AT_ONCE // max(1, len(plus) * len(minus)))
    parts = []
    for a, b in zip(plus.split(at_once, 1), minus.split(at_once, 1), strict=True):
        larger = (a[:, None] > b[None]).double() + 0.5 * (a[:, None] == b[None]).double()
        parts.append(larger.mean((0, 1)))
    return torch.cat(parts)


def chance_error(positive: Tensor) -> float:
    """The standard error of an AUROC that is 0.5 in truth (Mann and Whitney).

    Args:
        positive: which texts have the concept, (num_texts,) bool.
    """
    n, m = int(positive.sum()), int((~positive).sum())
    return math.sqrt((n + m + 1) / (12 * n * m))


def fit_probe(features: Tensor, positive: Tensor, columns: Sequence[int] | None = None) -> Probes:
    """Logistic regression, both kinds of texts having the same weight in all.

    Args:
        features: (num_texts, width).
        positive: which texts have the concept, (num_texts,) bool.
        columns: which features the probe reads; by default all.
    """
    sides = [positive.nonzero().flatten(), (~positive).nonzero().flatten()]
    half = max(map(len, sides))
    rows, weights = torch.zeros(2 * half, dtype=torch.int64), torch.zeros(2 * half, dtype=torch.float64)
    for start, found in zip((0, half), sides, strict=True):
        rows[start : start + len(found)] = found
        weights[start : start + len(found)] = len(positive) / 2 / len(found)
    chosen = None if columns is None else torch.tensor([list(columns)])
    return fit_probes(features, Samples(rows[None], weights[None]), chosen)


def probe_auroc(probe: Probes, features: Tensor, positive: Tensor) -> float:
    """AUROC of a probe.

    Args:
        probe: from `fit_probe`.
        features: (num_texts, width).
        positive: which texts have the concept, (num_texts,) bool.
    """
    read = features if probe.columns is None else features[:, probe.columns[0]]
    return float(auroc(read.double() @ probe.direction[0][:, None], positive)[0])


def standardised_differences(features: Tensor, positive: Tensor) -> Tensor:
    """By how many standard deviations the means of both kinds differ, (width,); 0 for what does not vary.

    Args:
        features: (num_texts, width).
        positive: which texts have the concept, (num_texts,) bool.
    """
    difference = features[positive].mean(0) - features[~positive].mean(0)
    spread = features.std(0)
    return torch.where(spread > 1e-12, difference / spread.clamp_min(1e-12), 0.0)


def read_levels(
    fitting: Tensor, of_fitting: Tensor, held_out: Tensor, of_held_out: Tensor, sizes: Sequence[int]
) -> list[LevelReading]:
    """The best latent and the best few of each prefix.

    Args:
        fitting: latents of the texts for fitting, (num_texts, num_latents).
        of_fitting: which of them have the concept.
        held_out: latents of the other texts.
        of_held_out: which of them have the concept.
        sizes: the prefixes.
    """
    known, tested = auroc(fitting, of_fitting), auroc(held_out, of_held_out)
    differences = standardised_differences(fitting, of_fitting)
    found = []
    for size in sizes:
        latent = int(known[:size].argmax())
        few = differences[:size].abs().topk(min(FEW, size)).indices.tolist()
        probe = fit_probe(fitting, of_fitting, few)
        score = probe_auroc(probe, held_out, of_held_out)
        found.append(LevelReading(size, latent, float(tested[latent]), tuple(few), score))
    return found
