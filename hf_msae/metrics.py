"""What an SAE keeps of a language model's activations, at every prefix: L0, FVE, CE recovered, dead latents.

These numbers are measured the same way during training, at its end and afterwards, so they live below all of those.
Two passes over the same windows: the first compares activations with their reconstructions, the second runs the model
with reconstructions in place of activations. Special positions (`keep` false) and outliers (attention sinks, beyond
the SAE's `norm_limit`) take no part: they are left unreplaced in the second pass and counted in no number. Sums are
accumulated in float64.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from dataclasses import replace as replace_fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from hf_msae.data.windows import TokenBatch
from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.outliers import within_limit
from hf_msae.sites import Site, in_this_thread, replace

# What the language model is run with: as it is, ablated in two ways, or with the prefix of an SAE, (name, prefix).
Key = tuple[str, int]
# A language model whose cross-entropy is this share of the logarithm of its vocabulary, or more, only guesses.
GUESSING_SHARE = 0.95

CLEAN: Key = ("as it is", 0)
ZERO: Key = ("zero", 0)
MEAN: Key = ("mean", 0)


def predicts_next_token(model: PreTrainedModel) -> bool:
    """Whether the model's cross-entropy on the next token means something.

    It does where the model has a head, and is neither an encoder, which sees that token, nor an encoder–decoder.

    Args:
        model: the language model.
    """
    return why_no_next_token(model) is None


def why_no_next_token(model: PreTrainedModel) -> str | None:
    """Why a model's cross-entropy on the next token would mean nothing; None where it means something.

    Args:
        model: the language model.
    """
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        return "the language model is an encoder–decoder"
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and model.config.to_dict().get("is_decoder") is False:
        return "the language model is an encoder, which sees the token that it would predict"
    if model.get_output_embeddings() is None or not model.can_generate():
        return "the language model has no head that predicts the next token"
    return None


def why_no_recovery(measured: "Measurement", model: PreTrainedModel) -> str | None:
    """Why what is left of the language model's predictions means nothing; None where it means something.

    It means nothing where the model by itself predicts no better than one that knows nothing. So it is with a head
    that was never trained, which transformers makes where a checkpoint lacks one, and which nothing tells from a
    trained head afterwards.

    Args:
        measured: of which the model's own cross-entropy counts.
        model: the language model.
    """
    size = model.config.get_text_config().vocab_size
    if measured.ce_clean is None or measured.ce_clean < GUESSING_SHARE * math.log(size):
        return None
    return (
        f"the language model's own cross-entropy is {measured.ce_clean:.2f} nats per token, no better than guessing "
        f"among {size:,} tokens ({math.log(size):.2f}); its head was never trained, or not for such text"
    )


def without_recovery(measured: "Measurement", reason: str) -> "Measurement":
    """The same measurement without the numbers that compare with the language model as it is.

    Args:
        measured: what was measured.
        reason: why they mean nothing.
    """
    levels = [
        replace_fields(level, ce_recovered=None, ce_recovered_mean=None, ce_increase=None, kl=None)
        for level in measured.levels
    ]
    return replace_fields(measured, levels=levels, ce_absent=reason)


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
    def update(self, x: Tensor, target: Tensor | None = None) -> None:
        """Take in activations.

        Args:
            x: (n, hidden_size).
            target: what a transcoder is to reconstruct of them, (n, output_size).
        """
        inlying = within_limit(x, self.norm_limit)
        if target is not None:
            inlying = inlying & within_limit(target, self.sae.config.norm_limit_out).to(inlying.device)
            target = target[inlying.to(target.device)].to(self.sae.device, self.sae.dtype)
        x = x[inlying].to(self.sae.device, self.sae.dtype)
        self.num_outliers += len(inlying) - len(x)
        begin = 0
        for part in self.sae.in_parts(x):
            self._take_in(part, part if target is None else target[begin : begin + len(part)])
            begin += len(part)

    def _take_in(self, x: Tensor, y: Tensor) -> None:
        latents = self.sae.encode(x)
        self.num_tokens += x.shape[0]
        doubles = y.double()
        self.sums["x"] += doubles.sum(0)
        self.sums["x_squared"] += doubles.pow(2).sum()
        norms = doubles.norm(dim=-1).clamp_min(1e-30)
        for level, reconstruction in enumerate(self.sae.decode_levels(latents, x)):
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


@torch.inference_mode()
def measure_reconstruction(
    saes: Mapping[str, tuple[Site, MatryoshkaSAE]], activations: Iterable[Mapping[Site, Tensor]]
) -> dict[str, ReconstructionMeter]:
    """Measure several SAEs in one pass over activations.

    Args:
        saes: by name, the site and the SAE.
        activations: batches, each a mapping from site to (n, hidden_size).

    Returns:
        A meter for each name.

    Raises:
        InputError: there is no activation.
    """
    meters = {name: ReconstructionMeter(sae) for name, (_, sae) in saes.items()}
    for batch in activations:
        for name, (site, _) in saes.items():
            meters[name].update(batch[site])
    if any(meter.num_tokens == 0 for meter in meters.values()):
        raise InputError("Nothing to measure: the held-out data gave no activation.")
    return meters


class _Splice:
    """The model with one site under control: reads the activations once, then runs with others in their place.

    What a transcoder reads is of another site, `read`, which is left as it is.
    """

    def __init__(self, model: PreTrainedModel, site: Site, inputs: dict[str, Tensor], read: Site) -> None:
        self.model, self.site, self.inputs, self.read = model, site, inputs, read

    def clean(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the model as it is, its activations at the site, and those that are read."""
        seen: dict[Site, Tensor] = {}

        def record(site: Site, hidden: Tensor) -> Tensor:
            # What runs next may add into a tensor that is read in place.
            seen.setdefault(site, hidden if site == self.site else hidden.clone())
            return hidden

        edits = {site: partial(record, site) for site in dict.fromkeys([self.read, self.site])}
        with replace(self.model, edits, in_this_thread()):
            return self.model(**self.inputs).logits, seen[self.site], seen[self.read]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits with the activations at the site replaced."""
        with replace(self.model, {self.site: lambda _: hidden}, in_this_thread()):
            return self.model(**self.inputs).logits


class _Sums:
    """Summed cross-entropy and divergence from the clean model of the counted positions' next tokens, by name."""

    # Logits of many tokens over a large vocabulary fill gigabytes; they are compared this many tokens at a time.
    CHUNK = 1024

    def __init__(self, names: Iterable[Key]) -> None:
        self.names = list(names)
        self.cross_entropy = dict.fromkeys(self.names, 0.0)
        self.divergence = dict.fromkeys(self.names, 0.0)
        self.count = 0

    def add(self, name: Key, logits: Tensor, clean: Tensor, input_ids: Tensor, counted: Tensor) -> None:
        """Take in the logits of a model, and of the clean one, (batch, sequence, vocabulary) each.

        `counted` is (batch, sequence − 1).
        """
        targets = input_ids[:, 1:][counted]
        parts = (logits[:, :-1][counted], clean[:, :-1][counted], targets)
        for some, clean_some, wanted in zip(*(part.split(self.CHUNK) for part in parts), strict=True):
            log_p = clean_some.float().log_softmax(-1)
            log_q = log_p if logits is clean else some.float().log_softmax(-1)
            self.cross_entropy[name] -= log_q.gather(-1, wanted[:, None]).double().sum().item()
            if logits is not clean:
                self.divergence[name] += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum().item()

    def means(self) -> tuple[dict[Key, float], dict[Key, float]]:
        """Both sums per token; an `InputError` where no token was counted."""
        if self.count == 0:
            raise InputError("Cross-entropy needs windows with at least two tokens that are not special; got none.")
        return (
            {name: total / self.count for name, total in self.cross_entropy.items()},
            {name: total / self.count for name, total in self.divergence.items()},
        )


def measure_cross_entropy(
    model: PreTrainedModel,
    site: Site,
    sae: MatryoshkaSAE,
    mean: Tensor,
    batches: Iterable[TokenBatch],
    norm_limit: float | None = None,
    output_site: Site | None = None,
) -> Measurement:
    """[`measure_cross_entropies`] of a single SAE.

    Args:
        model: the language model.
        site: where in it.
        sae: in evaluation mode.
        mean: mean activation, (hidden_size,).
        batches: collated windows.
        norm_limit: positions with activations of a larger norm are not replaced; None or 0 for none.
        output_site: as there.
    """
    return measure_cross_entropies(model, site, {"": sae}, mean, batches, norm_limit, output_site)[""]


@torch.inference_mode()
def measure_cross_entropies(
    model: PreTrainedModel,
    site: Site,
    saes: Mapping[str, MatryoshkaSAE],
    mean: Tensor,
    batches: Iterable[TokenBatch],
    norm_limit: float | None = None,
    output_site: Site | None = None,
) -> dict[str, Measurement]:
    """Cross-entropy with the site replaced by each prefix's reconstruction, by zero and by the mean.

    And how far the predictions then are from those of the model as it is.

    Args:
        model: the language model.
        site: where in it.
        saes: SAEs of this site, by name; the model as it is and its ablations are run once for all of them.
        mean: mean activation, (hidden_size,).
        batches: collated windows, with `input_ids`, `attention_mask` (or None) and `keep`, each (batch, sequence). A
            position counts where it and the next one were replaced.
        norm_limit: positions with activations of a larger norm are not replaced; None or 0 for none.
        output_site: of transcoders, which read `site`: the site that is replaced.

    Returns:
        For each SAE a [`Measurement`] whose levels hold only the numbers measured here.

    Raises:
        InputError: no window has two tokens that count.
    """
    levels = [(name, prefix) for name, sae in saes.items() for prefix in sae.config.prefix_sizes]
    sums = _Sums([CLEAN, ZERO, MEAN, *levels])
    for batch in batches:
        keep = batch["keep"]
        inputs = {"input_ids": batch["input_ids"]}
        if batch["attention_mask"] is not None:
            inputs["attention_mask"] = batch["attention_mask"]
        splice = _Splice(model, output_site or site, inputs, site)
        clean, hidden, read = splice.clean()
        keep = keep & within_limit(read, norm_limit).to(keep.device)
        for sae in saes.values():
            if sae.config.is_transcoder:
                keep = keep & within_limit(hidden, sae.config.norm_limit_out).to(keep.device)
        counted = keep[:, :-1] & keep[:, 1:]
        sums.add(CLEAN, clean, clean, batch["input_ids"], counted)
        where = keep.to(hidden.device).unsqueeze(-1)
        for name, replacement in _replacements(saes, read, hidden, mean):
            logits = splice.logits(torch.where(where, replacement.to(hidden), hidden))
            sums.add(name, logits, clean, batch["input_ids"], counted)
        sums.count += int(counted.sum())
    ce, kl = sums.means()
    return {name: _functional_measurement(name, sae, ce, kl, sums.count) for name, sae in saes.items()}


def _replacements(
    saes: Mapping[str, MatryoshkaSAE], read: Tensor, hidden: Tensor, mean: Tensor
) -> Iterator[tuple[Key, Tensor]]:
    yield ZERO, torch.zeros_like(hidden)
    yield MEAN, mean.to(hidden).expand_as(hidden)
    for name, sae in saes.items():
        levels = sae.reconstruct_levels(read.to(sae.device))
        for prefix, reconstruction in zip(sae.config.prefix_sizes, levels, strict=True):
            yield (name, prefix), reconstruction


def _functional_measurement(
    name: str, sae: MatryoshkaSAE, ce: Mapping[Key, float], kl: Mapping[Key, float], count: int
) -> Measurement:
    def recovered(ablated: float, level: float) -> float | None:
        # An ablation that changes nothing leaves nothing to recover.
        return (ablated - level) / (ablated - ce[CLEAN]) if ablated != ce[CLEAN] else None

    levels = [
        LevelMetrics(
            prefix=prefix,
            l0=float("nan"),
            fve=float("nan"),
            dead=float("nan"),
            ce_recovered=recovered(ce[ZERO], ce[name, prefix]),
            ce_recovered_mean=recovered(ce[MEAN], ce[name, prefix]),
            ce_increase=ce[name, prefix] - ce[CLEAN],
            kl=kl[name, prefix],
        )
        for prefix in sae.config.prefix_sizes
    ]
    return Measurement(levels, 0, count, ce[CLEAN], ce[ZERO], ce[MEAN], kl[ZERO], kl[MEAN])


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
