"""Which latents of a larger dictionary are novel to a smaller one (Leask et al., arXiv:2502.04878).

Put one latent of the large SAE into the small one: where the squared error falls, the latent is *novel*; where it
rises, it repeats what the small one reconstructs already, and is a *reconstruction* latent. That is the definition.
The paper's cheap proxy is the largest decoder cosine with any latent of the small SAE, low for novel ones; where to
cut is a parameter here (the 0.7 that is often quoted could not be confirmed), and how far the proxy agrees with the
definition is reported beside it.

Inside one Matryoshka SAE the same question needs no second SAE: which latents of a level lower the error of the level
inside it when they are added alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_msae.errors import InputError
from hf_msae.evaluation.activations import TextActivations, total_variance
from hf_msae.evaluation.geometry import nearest_rows
from hf_msae.modeling import MatryoshkaSAE

COSINE_CUT = 0.7


@dataclass(frozen=True)
class Novelty:
    """Latents of a larger dictionary, one by one, against a smaller one.

    Args:
        gain: fall of the mean squared error when the latent alone is inserted, as a share of the variance of the
            activations, (n,) float64. Above 0 the latent is novel.
        cosine: its largest decoder cosine with a latent of the smaller one, (n,); -1 where that has none.
        alive: whether it fired, (n,) bool. A latent that never fired is neither novel nor a reconstruction latent.
    """

    gain: Tensor
    cosine: Tensor
    alive: Tensor

    @property
    def novel(self) -> Tensor:
        """By effect, mask (n,)."""
        return self.alive & (self.gain > 0)

    @property
    def reconstruction(self) -> Tensor:
        """By effect, mask (n,)."""
        return self.alive & (self.gain <= 0)

    @property
    def novel_share(self) -> float:
        """Of the latents that fire; 0 where none does."""
        return int(self.novel.sum()) / max(1, int(self.alive.sum()))

    def novel_share_by_cosine(self, cut: float = COSINE_CUT) -> float:
        """The share of the latents that fire whose cosine is below a cut.

        Args:
            cut: the cosine.
        """
        return int((self.alive & (self.cosine < cut)).sum()) / max(1, int(self.alive.sum()))

    def agreement(self, cut: float = COSINE_CUT) -> float:
        """The share of the latents that fire on which cosine and effect agree.

        Args:
            cut: the cosine below which a latent is novel.
        """
        same = (self.cosine < cut) == (self.gain > 0)
        return int((self.alive & same).sum()) / max(1, int(self.alive.sum()))

    def auroc(self) -> float | None:
        """How well a low cosine ranks novel latents first: 1 perfectly, 0.5 not at all; None where one kind lacks."""
        novel, others = self.cosine[self.novel], self.cosine[self.reconstruction].sort().values
        if not len(novel) or not len(others):
            return None
        above = len(others) - torch.searchsorted(others, novel, right=True)
        ties = len(others) - torch.searchsorted(others, novel) - above
        return ((above + ties / 2).double().mean() / len(others)).item()


@dataclass(frozen=True)
class NoveltyNumbers:
    """A dictionary's latents against a smaller one, in shares of the latents that fire.

    Args:
        small: what the smaller one is called.
        large: what the larger one is called.
        fire: latents of the larger one that fire.
        novel: share that is novel by effect.
        novel_by_cosine: share with a decoder cosine below `COSINE_CUT`.
        agreement: share on which both say the same.
        auroc: how well a low cosine ranks novel latents first; None where all latents are of one kind.
    """

    small: str
    large: str
    fire: int
    novel: float
    novel_by_cosine: float
    agreement: float
    auroc: float | None

    @classmethod
    def of(cls, small: str, large: str, novelty: Novelty) -> "NoveltyNumbers":
        """The numbers of a [`Novelty`].

        Args:
            small: what the smaller dictionary is called.
            large: what the larger one is called.
            novelty: of the larger one's latents.
        """
        return cls(
            small,
            large,
            int(novelty.alive.sum()),
            novelty.novel_share,
            novelty.novel_share_by_cosine(),
            novelty.agreement(),
            novelty.auroc(),
        )


@dataclass(frozen=True)
class LevelNovelty:
    """The latents that a level of one SAE adds, against the level inside it.

    Args:
        prefix: latents in the level.
        inner: latents in the level inside it.
        novelty: of the latents that it adds.
    """

    prefix: int
    inner: int
    novelty: Novelty


@torch.inference_mode()
def measure_novelty(text: TextActivations, small: MatryoshkaSAE, large: MatryoshkaSAE) -> Novelty:
    """Every latent of the large SAE, inserted alone into the small one.

    Inserting takes the encoder row, biases and threshold along: a latent fires on the tokens on which it fires in its
    own SAE.

    Args:
        text: activations of the SAEs' site.
        small: in evaluation mode.
        large: in evaluation mode.

    Raises:
        InputError: the SAEs are of different widths.
    """
    _check_widths(text, small, large)
    meter = _GainMeter(large.config.num_latents)
    for x in shared_batches(text, small, large):
        error = x.double() - small.decode(small.encode(x))
        meter.update(error, large.encode(x), large.W_dec)
    return meter.novelty(_nearest(large.W_dec, small.W_dec), total_variance(text.x))


@torch.inference_mode()
def measure_level_novelty(text: TextActivations, sae: MatryoshkaSAE) -> list[LevelNovelty]:
    """For each level of an SAE but the first, the novelty of the latents that it adds to the level inside it.

    Args:
        text: activations of the SAE's site.
        sae: in evaluation mode.
    """
    _check_widths(text, sae, sae)
    pairs = list(pairwise(sae.config.prefix_sizes))
    meters = [_GainMeter(high - low) for low, high in pairs]
    for x in text.batches(sae):
        latents = sae.encode(x)
        for meter, (low, high), inner in zip(meters, pairs, sae.decode_levels(latents), strict=False):
            meter.update(x.double() - inner, latents[:, low:high], sae.W_dec[low:high])
    total = total_variance(text.x)
    return [
        LevelNovelty(high, low, meter.novelty(_nearest(sae.W_dec[low:high], sae.W_dec[:low]), total))
        for meter, (low, high) in zip(meters, pairs, strict=True)
    ]


class _GainMeter:
    """Sums what every latent, inserted alone, takes from the squared error."""

    def __init__(self, count: int) -> None:
        self.gain = torch.zeros(count, dtype=torch.float64)
        self.alive = torch.zeros(count, dtype=torch.bool)

    def update(self, error: Tensor, latents: Tensor, decoder: Tensor) -> None:
        """Take in errors x − x̂ (n, d) and latents (n, count) whose decoder rows are (count, d).

        It uses ‖e‖² − ‖e − f·w‖² = 2f⟨e, w⟩ − f²‖w‖².
        """
        projections = error.to(decoder.dtype) @ decoder.T
        norms = decoder.double().pow(2).sum(1)
        gain = 2 * (latents * projections).sum(0, dtype=torch.float64) - latents.double().pow(2).sum(0) * norms
        self.gain += gain.cpu()
        self.alive |= (latents > 0).any(0).cpu()

    def novelty(self, cosine: Tensor, total_variance: float) -> Novelty:
        return Novelty(self.gain / total_variance, cosine, self.alive)


def shared_batches(text: TextActivations, small: MatryoshkaSAE, large: MatryoshkaSAE) -> Iterable[Tensor]:
    """The activations in parts (n, hidden_size) that both SAEs can encode at once.

    Args:
        text: activations of the SAEs' site.
        small: one SAE.
        large: the other.
    """
    return text.batches(max(small, large, key=lambda sae: sae.config.num_latents))


def _nearest(rows: Tensor, others: Tensor) -> Tensor:
    """For each decoder row (n, d) the largest cosine with another SAE's rows (m, d), float32 on the CPU."""
    return nearest_rows(*(normalize(part.float(), dim=1) for part in (rows, others)))[0].cpu()


def _check_widths(text: TextActivations, small: MatryoshkaSAE, large: MatryoshkaSAE) -> None:
    widths = (text.x.shape[1], small.config.hidden_size, large.config.hidden_size)
    if len(set(widths)) > 1:
        raise InputError(
            "Stitching needs two SAEs of one site: the activations have "
            f"{widths[0]} dimensions, the SAEs read {widths[1]} and {widths[2]}."
        )
