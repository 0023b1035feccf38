"""What an SAE keeps of a language model's activations, at every prefix: L0, FVE, CE recovered, dead latents.

These numbers are measured the same way during training, at its end and afterwards, so they live below all of those.
Two passes over the same windows: the first compares activations with their reconstructions, here; the second runs the
model with reconstructions in place of activations (`cross_entropy.py`). Special positions (`keep` false) and outliers
(attention sinks, beyond the SAE's `norm_limit`) take no part: they are left unreplaced in the second pass and counted
in no number. Sums are accumulated in float64.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_msae.modeling import MatryoshkaSAE
from hf_msae.outliers import within_limit


@dataclass
class LevelMetrics:
    """One prefix's numbers on held-out tokens.

    Args:
        prefix: latents in the prefix.
        l0: mean number of active latents per token.
        fve: fraction of variance explained.
        dead: share of latents that fire on no token.
        ce_recovered: share of the cross-entropy that setting the site to zero costs which the reconstruction wins
            back.
        ce_recovered_mean: the same against setting it to the mean activation, which is the harder test.
        ce_increase: of the cross-entropy with the reconstruction, in nats per token.
        nmse: E‖x − x̂‖² / E‖x‖². It is not centred, so that a large mean makes it look far better than 1 − FVE.
        cosine: mean cosine of x and x̂.
        norm_ratio: mean of ‖x̂‖ / ‖x‖.
        kl: divergence of the model with the reconstruction from the model as it is, in nats per token.
    """

    prefix: int
    l0: float
    fve: float
    dead: float
    ce_recovered: float | None = None
    ce_recovered_mean: float | None = None
    ce_increase: float | None = None
    nmse: float | None = None
    cosine: float | None = None
    norm_ratio: float | None = None
    kl: float | None = None


@dataclass
class Measurement:
    """Per-level numbers, and what they were measured on.

    Args:
        levels: from the first prefix to the whole.
        tokens: behind the numbers that need no language model.
        ce_tokens: behind the cross-entropies.
        ce_clean: cross-entropy of the model as it is, in nats per token.
        ce_zero: with the site set to zero.
        ce_mean: with the site set to the mean activation.
        kl_zero: divergence that setting it to zero causes, in nats per token.
        kl_mean: divergence that setting it to the mean causes.
        outliers: tokens left out because their activation's norm is beyond the SAE's limit.
        ce_absent: why there is no `ce_recovered`; None where there is.
    """

    levels: list[LevelMetrics]
    tokens: int
    ce_tokens: int = 0
    ce_clean: float | None = None
    ce_zero: float | None = None
    ce_mean: float | None = None
    kl_zero: float | None = None
    kl_mean: float | None = None
    outliers: int = 0
    ce_absent: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; without `ce_absent` where cross-entropy was measured."""
        values = asdict(self)
        if self.ce_absent is None:
            del values["ce_absent"]
        return values


@dataclass
class ReconstructionMeter:
    """Accumulates, batch by batch, what the activation-side numbers of one SAE need.

    Args:
        sae: in evaluation mode.
        norm_limit: activations with a larger norm are left out, and counted as `num_outliers`; None or 0 for none. Of
            what a transcoder is to reconstruct, `config.norm_limit_out` is the limit.
        num_tokens: taken in so far.
        num_outliers: left out so far.
        sums: of what the numbers are made of, float64 on the SAE's device.
    """

    sae: MatryoshkaSAE
    norm_limit: float | None = None
    num_tokens: int = 0
    num_outliers: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device, config = self.sae.device, self.sae.config
        shapes = {
            "x": (config.output_size,),
            "x_squared": (),
            "errors": (config.num_levels,),
            "cosines": (config.num_levels,),
            "norm_ratios": (config.num_levels,),
            "fired": (config.num_latents,),
        }
        self.sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
        self.max_activation = torch.zeros(config.num_latents, device=device)

    @torch.no_grad()
    def update(self, x: Tensor, target: Tensor | None = None, token_ids: Tensor | None = None) -> None:
        """Take in activations.

        Args:
            x: (n, hidden_size).
            target: what a transcoder is to reconstruct of them, (n, output_size).
            token_ids: the token of each, (n,), which a tokenized SAE needs.
        """
        inlying = within_limit(x, self.norm_limit)
        if target is not None:
            inlying = inlying & within_limit(target, self.sae.config.norm_limit_out).to(inlying.device)
            target = target[inlying.to(target.device)].to(self.sae.device, self.sae.dtype)
        if token_ids is not None:
            token_ids = token_ids[inlying.to(token_ids.device)]
        x = x[inlying].to(self.sae.device, self.sae.dtype)
        self.num_outliers += len(inlying) - len(x)
        begin = 0
        for part in self.sae.in_parts(x):
            own = slice(begin, begin + len(part))
            ids = None if token_ids is None else token_ids[own]
            self._take_in(part, part if target is None else target[own], ids)
            begin += len(part)

    def _take_in(self, x: Tensor, y: Tensor, token_ids: Tensor | None) -> None:
        latents = self.sae.encode(x)
        self.num_tokens += x.shape[0]
        doubles = y.double()
        self.sums["x"] += doubles.sum(0)
        self.sums["x_squared"] += doubles.pow(2).sum()
        norms = doubles.norm(dim=-1).clamp_min(1e-30)
        for level, reconstruction in enumerate(self.sae.decode_levels(latents, x, token_ids)):
            self.sums["errors"][level] += (doubles - reconstruction).pow(2).sum()
            sizes = reconstruction.double().norm(dim=-1)
            products = (doubles * reconstruction).sum(-1)
            self.sums["cosines"][level] += (products / (norms * sizes.clamp_min(1e-30))).sum()
            self.sums["norm_ratios"][level] += (sizes / norms).sum()
        self.sums["fired"] += (latents > 0).sum(0)
        self.max_activation = torch.maximum(self.max_activation, latents.max(0).values.float())

    @property
    def mean(self) -> Tensor:
        """Mean of what is to be reconstructed, (output_size,) float64."""
        return self.sums["x"] / self.num_tokens

    @property
    def firing_rate(self) -> Tensor:
        """Share of tokens on which each latent is active, (num_latents,) float64."""
        return self.sums["fired"] / self.num_tokens

    def levels(self) -> list[LevelMetrics]:
        """What of every prefix can be told without the language model."""
        total = self.sums["x_squared"] - self.num_tokens * self.mean.pow(2).sum()
        fve = 1 - self.sums["errors"] / total
        nmse = self.sums["errors"] / self.sums["x_squared"]
        rate = self.firing_rate
        return [
            LevelMetrics(
                prefix=prefix,
                l0=rate[:prefix].sum().item(),
                fve=fve[level].item(),
                dead=(rate[:prefix] == 0).double().mean().item(),
                nmse=nmse[level].item(),
                cosine=(self.sums["cosines"][level] / self.num_tokens).item(),
                norm_ratio=(self.sums["norm_ratios"][level] / self.num_tokens).item(),
            )
            for level, prefix in enumerate(self.sae.config.prefix_sizes)
        ]


def merge(meter: ReconstructionMeter, cross_entropy: Measurement | None) -> Measurement:
    """Both passes' numbers in one.

    Args:
        meter: of the pass over activations.
        cross_entropy: of the pass of the language model; None where there was none.
    """
    levels = meter.levels()
    if cross_entropy is None:
        return Measurement(levels, meter.num_tokens, outliers=meter.num_outliers)
    for level, other in zip(levels, cross_entropy.levels, strict=True):
        level.ce_recovered = other.ce_recovered
        level.ce_recovered_mean = other.ce_recovered_mean
        level.ce_increase = other.ce_increase
        level.kl = other.kl
    return Measurement(
        levels,
        meter.num_tokens,
        cross_entropy.ce_tokens,
        cross_entropy.ce_clean,
        cross_entropy.ce_zero,
        cross_entropy.ce_mean,
        cross_entropy.kl_zero,
        cross_entropy.kl_mean,
        meter.num_outliers,
        cross_entropy.ce_absent,
    )


def measured_facts(measurement: Measurement) -> dict[str, Any]:
    """What an SAE's configuration says as `measured`: the number of tokens, and L0 and FVE per prefix.

    Args:
        measurement: of the SAE.
    """
    return {
        "tokens": measurement.tokens,
        "l0": [round(level.l0, 4) for level in measurement.levels],
        "fve": [round(level.fve, 5) for level in measurement.levels],
    }


def table_rows(measurement: Measurement) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table by level, as text, for the terminal and for the model card.

    Args:
        measurement: of the SAE.
    """
    header = ("prefix", "L0", "FVE", "CE recovered", "dead %")
    rows: list[tuple[str, ...]] = [
        (
            f"{level.prefix:,}",
            f"{level.l0:.2f}",
            f"{level.fve:.3f}",
            "–" if level.ce_recovered is None else f"{level.ce_recovered:.3f}",
            f"{100 * level.dead:.1f}",
        )
        for level in measurement.levels
    ]
    return header, rows
