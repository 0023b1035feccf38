"""What an SAE keeps of a language model's activations, at every prefix: L0, FVE, CE recovered, dead latents.

These numbers are measured the same way during training, at its end and afterwards, so they live below all of those.
Two passes over the same windows: the first compares activations with their reconstructions, the second runs the model
with reconstructions in place of activations. Special positions (`keep` false) take no part: they are left unreplaced
in the second pass and counted in no number. Sums are accumulated in float64.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_msae.modeling import MatryoshkaSAE
from hf_msae.sites import Site, replace


class TokenBatch(TypedDict):
    """Collated token windows, each (batch, sequence); no mask where nothing is padded."""

    input_ids: Tensor
    attention_mask: Tensor | None
    keep: Tensor


@dataclass
class LevelMetrics:
    """One prefix's numbers on held-out tokens."""

    prefix: int
    l0: float
    fve: float
    dead: float
    ce_recovered: float | None = None
    ce_recovered_mean: float | None = None
    ce_increase: float | None = None


@dataclass
class Measurement:
    """Per-level numbers, and what they were measured on.

    `ce_*` are cross-entropies in nats per token: of the model as it is, with the site set to zero, and set to the mean
    activation. `ce_recovered` of a level compares with zero, `ce_recovered_mean` with the mean, which is the harder
    test.
    """

    levels: list[LevelMetrics]
    tokens: int
    ce_tokens: int = 0
    ce_clean: float | None = None
    ce_zero: float | None = None
    ce_mean: float | None = None


@dataclass
class ReconstructionMeter:
    """Accumulates, batch by batch, what the activation-side numbers of one SAE need."""

    sae: MatryoshkaSAE
    num_tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        device, config = self.sae.device, self.sae.config
        shapes = {
            "x": (config.hidden_size,),
            "x_squared": (),
            "errors": (config.num_levels,),
            "fired": (config.num_latents,),
        }
        self.sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
        self.max_activation = torch.zeros(config.num_latents, device=device)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in activations (n, hidden_size)."""
        x = x.to(self.sae.device, self.sae.dtype)
        latents = self.sae.encode(x)
        self.num_tokens += x.shape[0]
        doubles = x.double()
        self.sums["x"] += doubles.sum(0)
        self.sums["x_squared"] += doubles.pow(2).sum()
        for level, reconstruction in enumerate(self.sae.decode_levels(latents)):
            self.sums["errors"][level] += (doubles - reconstruction).pow(2).sum()
        self.sums["fired"] += (latents > 0).sum(0)
        self.max_activation = torch.maximum(self.max_activation, latents.max(0).values.float())

    @property
    def mean(self) -> Tensor:
        """Mean activation, (hidden_size,) float64."""
        return self.sums["x"] / self.num_tokens

    @property
    def firing_rate(self) -> Tensor:
        """Share of tokens on which each latent is active, (num_latents,) float64."""
        return self.sums["fired"] / self.num_tokens

    def levels(self) -> list[LevelMetrics]:
        """L0, FVE and the share of dead latents of every prefix."""
        total = self.sums["x_squared"] - self.num_tokens * self.mean.pow(2).sum()
        fve = 1 - self.sums["errors"] / total
        rate = self.firing_rate
        return [
            LevelMetrics(
                prefix=prefix,
                l0=rate[:prefix].sum().item(),
                fve=fve[level].item(),
                dead=(rate[:prefix] == 0).double().mean().item(),
            )
            for level, prefix in enumerate(self.sae.config.prefix_sizes)
        ]


@torch.inference_mode()
def measure_reconstruction(
    saes: Mapping[str, tuple[Site, MatryoshkaSAE]], activations: Iterable[Mapping[Site, Tensor]]
) -> dict[str, ReconstructionMeter]:
    """Measure several SAEs in one pass over batches of activations, each a mapping from site to (n, hidden_size)."""
    meters = {name: ReconstructionMeter(sae) for name, (_, sae) in saes.items()}
    for batch in activations:
        for name, (site, _) in saes.items():
            meters[name].update(batch[site])
    if any(meter.num_tokens == 0 for meter in meters.values()):
        raise ValueError("Nothing to measure: the held-out data gave no activation.")
    return meters


class _Splice:
    """The model with one site under control: reads the activations once, then runs with others in their place."""

    def __init__(self, model: PreTrainedModel, site: Site, inputs: dict[str, Tensor]) -> None:
        self.model, self.site, self.inputs = model, site, inputs

    def clean(self) -> tuple[Tensor, Tensor]:
        """Logits of the model as it is, and its activations at the site."""
        seen: list[Tensor] = []

        def record(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return hidden

        with replace(self.model, {self.site: record}):
            return self.model(**self.inputs).logits, seen[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits with the activations at the site replaced."""
        with replace(self.model, {self.site: lambda _: hidden}):
            return self.model(**self.inputs).logits


def _cross_entropy(logits: Tensor, input_ids: Tensor, counted: Tensor) -> Tensor:
    """Summed cross-entropy (scalar float64) of the counted positions' next tokens; counted is (batch, sequence -
    1).
    """
    picked = logits[:, :-1][counted].float()
    return nn.functional.cross_entropy(picked, input_ids[:, 1:][counted], reduction="none").double().sum()


@torch.inference_mode()
def measure_cross_entropy(
    model: PreTrainedModel, site: Site, sae: MatryoshkaSAE, mean: Tensor, batches: Iterable[TokenBatch]
) -> Measurement:
    """Cross-entropy of the language model with the site replaced by each prefix's reconstruction, by zero, and by the
    mean.

    Args:
        mean: mean activation, (hidden_size,).
        batches: collated windows, with `input_ids`, `attention_mask` (or None) and `keep`, each (batch, sequence).
            A position counts where it was replaced and its next token is not special.
    Returns a [`Measurement`] whose levels hold only the numbers measured here.
    """
    prefixes = sae.config.prefix_sizes
    sums: dict[str | int, float] = dict.fromkeys(["clean", "zero", "mean", *prefixes], 0.0)
    count = 0
    for batch in batches:
        keep = batch["keep"]
        inputs = {"input_ids": batch["input_ids"]}
        if batch["attention_mask"] is not None:
            inputs["attention_mask"] = batch["attention_mask"]
        counted = keep[:, :-1] & keep[:, 1:]
        splice = _Splice(model, site, inputs)
        clean_logits, hidden = splice.clean()
        where = keep.to(hidden.device).unsqueeze(-1)
        latents = sae.encode(hidden.to(sae.device))
        replaced = {"zero": torch.zeros_like(hidden), "mean": mean.to(hidden).expand_as(hidden)}
        sums["clean"] += _cross_entropy(clean_logits, inputs["input_ids"], counted).item()
        for name, reconstruction in _with_levels(replaced, sae, latents):
            values = torch.where(where, reconstruction.to(hidden), hidden)
            sums[name] += _cross_entropy(splice.logits(values), inputs["input_ids"], counted).item()
        count += int(counted.sum())
    if count == 0:
        raise ValueError("Cross-entropy needs windows with at least two tokens that are not special; got none.")
    ce = {name: total / count for name, total in sums.items()}
    levels = [
        LevelMetrics(
            prefix=prefix,
            l0=float("nan"),
            fve=float("nan"),
            dead=float("nan"),
            ce_recovered=(ce["zero"] - ce[prefix]) / (ce["zero"] - ce["clean"]),
            ce_recovered_mean=(ce["mean"] - ce[prefix]) / (ce["mean"] - ce["clean"]),
            ce_increase=ce[prefix] - ce["clean"],
        )
        for prefix in prefixes
    ]
    return Measurement(levels, 0, count, ce["clean"], ce["zero"], ce["mean"])


def _with_levels(
    replaced: dict[str, Tensor], sae: MatryoshkaSAE, latents: Tensor
) -> Iterator[tuple[str | int, Tensor]]:
    yield from replaced.items()
    yield from zip(sae.config.prefix_sizes, sae.decode_levels(latents), strict=True)


def merge(meter: ReconstructionMeter, cross_entropy: Measurement | None) -> Measurement:
    """Both passes' numbers in one."""
    levels = meter.levels()
    if cross_entropy is None:
        return Measurement(levels, meter.num_tokens)
    for level, other in zip(levels, cross_entropy.levels, strict=True):
        level.ce_recovered = other.ce_recovered
        level.ce_recovered_mean = other.ce_recovered_mean
        level.ce_increase = other.ce_increase
    return Measurement(
        levels,
        meter.num_tokens,
        cross_entropy.ce_tokens,
        cross_entropy.ce_clean,
        cross_entropy.ce_zero,
        cross_entropy.ce_mean,
    )


def table_rows(measurement: Measurement) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table by level, as text, for the terminal and for the model card."""
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
