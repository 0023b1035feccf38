"""What a language model's predictions keep where an SAE's reconstructions stand in place of its activations.

The model runs as it is, with the site replaced by each prefix's reconstruction, and with it ablated, by zero and by
the mean: cross-entropy on the next token, and how far the predictions are from those of the model as it is. And where
that means nothing: for a model that does not predict the next token, or only guesses it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace as replace_fields
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from hf_msae.data.windows import TokenBatch
from hf_msae.errors import InputError
from hf_msae.metrics import LevelMetrics, Measurement
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


def why_no_recovery(measured: Measurement, model: PreTrainedModel) -> str | None:
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


def without_recovery(measured: Measurement, reason: str) -> Measurement:
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


class Splice:
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
        splice = Splice(model, output_site or site, inputs, site)
        clean, hidden, read = splice.clean()
        keep = keep & within_limit(read, norm_limit).to(keep.device)
        for sae in saes.values():
            if sae.config.is_transcoder:
                keep = keep & within_limit(hidden, sae.config.norm_limit_out).to(keep.device)
        counted = keep[:, :-1] & keep[:, 1:]
        sums.add(CLEAN, clean, clean, batch["input_ids"], counted)
        where = keep.to(hidden.device).unsqueeze(-1)
        for name, replacement in _replacements(saes, read, hidden, mean, batch["input_ids"]):
            logits = splice.logits(torch.where(where, replacement.to(hidden), hidden))
            sums.add(name, logits, clean, batch["input_ids"], counted)
        sums.count += int(counted.sum())
    ce, kl = sums.means()
    return {name: _functional_measurement(name, sae, ce, kl, sums.count) for name, sae in saes.items()}


def _replacements(
    saes: Mapping[str, MatryoshkaSAE], read: Tensor, hidden: Tensor, mean: Tensor, token_ids: Tensor
) -> Iterator[tuple[Key, Tensor]]:
    yield ZERO, torch.zeros_like(hidden)
    yield MEAN, mean.to(hidden).expand_as(hidden)
    for name, sae in saes.items():
        levels = sae.reconstruct_levels(read.to(sae.device), token_ids)
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
