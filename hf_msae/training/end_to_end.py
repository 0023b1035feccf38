"""End-to-end fine-tuning: for the last part of a run, what the language model predicts counts beside the errors.

The language model runs with reconstructions in place of its activations, and the KL divergence from its own
predictions is led back through its later layers into the SAE (Karvonen: "Revisiting End-To-End Sparse Autoencoder
Training: A Short Finetune Is All You Need", arXiv:2503.17272). A short part at the end does most of what a whole run
of it would (arXiv:2405.12241), at a small part of its price.

Errors need tokens that are shuffled, and predictions need texts that are whole. So a step has both: its batch as ever,
and windows with about as many tokens, drawn from the block that the batch comes from. The divergence is scaled to the
size of the error, so that learning rate and penalties stay what they were.

Of the language model nothing changes, and nothing but activations is kept for the way back.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_msae.cross_entropy import Splice, why_no_next_token
from hf_msae.data import Window, collate
from hf_msae.devices import device_of
from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.modeling.devices import sent
from hf_msae.modeling.selection import ProcessGroup
from hf_msae.outliers import within_limit
from hf_msae.sites import Site
from hf_msae.training.loaders import ActivationLoader, TextLoader
from hf_msae.training.run import Run

# Logits of many tokens over a large vocabulary fill gigabytes; they are compared this many tokens at a time.
CHUNK = 1024


class EndToEnd:
    """What adds the divergence's gradients to those of a step.

    Args:
        run: The run.
        model: The language model.
        loader: Where the run's batches come from.
    """

    def __init__(self, run: Run, model: PreTrainedModel, loader: TextLoader) -> None:
        self.run, self.model, self.loader = run, model, loader

    def add_gradients(
        self,
        sae: MatryoshkaSAE,
        sites: tuple[Site, Site],
        options: Mapping[str, Any],
        error: Tensor,
        ranks: ProcessGroup,
    ) -> Tensor:
        """Add the gradients of the divergence, scaled to the size of the error, to those that parameters have.

        Args:
            sae: In training mode, with this process's gradients of the step.
            sites: Where it reads, and where what it reconstructs comes from.
            options: Of the step: `k` and `variance`, as `MatryoshkaSAE.forward` takes them.
            error: This process's part of the mean error by which to scale, a scalar.
            ranks: The processes; each adds its part.

        Returns:
            The mean divergence in nats per token, of all processes, a float64 scalar.
        """
        parameters = list(sae.parameters())
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        sums = torch.zeros(3, dtype=torch.float64, device=sae.device)  # divergence, tokens, error
        sums[2] = error
        with _frozen(self.model):
            for windows, widths in self._passes(sae):
                spliced = self._spliced(sae, sites, windows, widths, options)
                if spliced is None:
                    continue
                logits, clean, counted = spliced
                total, gradient = divergence(clean, logits, counted)
                found = torch.autograd.grad(logits, parameters, gradient, allow_unused=True)
                for summed, part in zip(gradients, found, strict=True):
                    if part is not None:
                        summed += part
                sums[0] += total
                sums[1] += counted.sum()
        total, count, error = ranks.sum(sums)
        factor = torch.where(total > 0, self.run.args.kl_weight * error / total, 0.0)  # not of windows without tokens
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert parameter.grad is not None
            parameter.grad += gradient * factor.to(gradient.dtype)
        return total / count.clamp_min(1)

    def _passes(self, sae: MatryoshkaSAE) -> Iterator[tuple[list[Window], list[int]]]:
        """This step's windows, a pass of the language model at a time, and of each how many latents stand in."""
        windows = self.loader.draw_windows()
        weights = torch.tensor(sae.config.normalized_level_weights, dtype=torch.float64)
        places = (torch.arange(len(windows), dtype=torch.float64) + 0.5) / len(windows)
        levels = torch.bucketize(places, weights.cumsum(0)[:-1]).tolist()
        widths = [sae.config.prefix_sizes[level] for level in levels]
        pairs = sorted(zip(windows, widths, strict=True), key=lambda pair: -len(pair[0].input_ids))
        size = self.run.args.lm_batch_size
        for start in range(0, len(pairs), size):
            yield [w for w, _ in pairs[start : start + size]], [n for _, n in pairs[start : start + size]]

    def _spliced(
        self,
        sae: MatryoshkaSAE,
        sites: tuple[Site, Site],
        windows: Sequence[Window],
        widths: Sequence[int],
        options: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Logits with the reconstructions in place, logits of the model as it is, and which of them count (B, T)."""
        device = device_of(self.model)
        batch = collate(windows, self.loader.source.pad_id)
        inputs = {"input_ids": sent(batch["input_ids"], device)}
        if batch["attention_mask"] is not None:
            inputs["attention_mask"] = sent(batch["attention_mask"], device)
        read, written = sites
        splice = Splice(self.model, written, inputs, read)
        with torch.no_grad():
            clean, target, hidden = splice.clean()
        keep = batch["keep"].to(hidden.device) & within_limit(hidden, sae.config.norm_limit)
        if sae.config.is_transcoder:
            keep = keep & within_limit(target, sae.config.norm_limit_out).to(keep.device)
        rows = keep.flatten().nonzero().flatten()
        if not len(rows):
            return None
        of_token = torch.tensor(widths, device=rows.device)[rows // keep.shape[1]].to(sae.device)
        x = hidden.flatten(0, 1)[rows].to(sae.device, torch.float32)
        with torch.autocast(sae.device.type, torch.bfloat16, enabled=bool(self.run.args.bf16)):
            ids = batch["input_ids"].flatten()[rows.cpu()] if sae.config.is_tokenized else None
            reconstruction = sae.reconstruct_as_trained(x, options["k"], options["variance"], of_token, ids)
        flat = target.flatten(0, 1)
        replaced = flat.index_copy(0, rows.to(flat.device), reconstruction.to(flat)).view_as(target)
        logits = splice.logits(replaced)
        return logits, clean.to(logits.device), keep.to(logits.device)


@torch.no_grad()
def divergence(clean: Tensor, logits: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """KL(clean || spliced), summed over the tokens that count, and its gradient.

    Args:
        clean: Logits of the model as it is, (B, T, V).
        logits: Logits with the reconstructions in place, (B, T, V).
        counted: Which tokens count, bool (B, T).

    Returns:
        The sum in nats, a float64 scalar, and its gradient with respect to `logits`: the difference of the
        probabilities, zero where tokens do not count.
    """
    # In rows, whatever the logits' own layout, so that the flat gradient is a view.
    gradient = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    flat, flat_clean, flat_gradient = (tensor.flatten(0, 1) for tensor in (logits, clean, gradient))
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for rows in counted.flatten().nonzero().flatten().split(CHUNK):
        log_p, log_q = (tensor[rows].float().log_softmax(-1) for tensor in (flat_clean, flat))
        p = log_p.exp()
        total += (p * (log_p - log_q)).sum(-1).double().sum()
        flat_gradient[rows] = (log_q.exp() - p).to(gradient.dtype)
    return total, gradient


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """While open, the language model's weights take no gradient, so that less is kept for the way back."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def make_end_to_end(run: Run, model: PreTrainedModel | None, loader: ActivationLoader) -> EndToEnd | None:
    """Make what a run with `kl_from` needs; None for a run without.

    Args:
        run: The run.
        model: The language model, if there is one.
        loader: Where its batches come from.

    Raises:
        InputError: Where predictions cannot count in this run, with the reason.
    """
    if run.args.kl_from is None:
        return None
    if model is None or not isinstance(loader, TextLoader):
        reason = "an activation cache holds no text, and the language model must run: train on the text itself"
    elif run.args.shard_latents:
        reason = "shard_latents gives each process a part of the SAE, and a reconstruction needs all of it"
    elif loader.sliced:
        reason = "gradients are not led back through a language model that is split over processes (tensor parallel)"
    else:
        missing = why_no_next_token(model)
        if missing is None:
            return EndToEnd(run, model, loader)
        reason = f"{missing}, so it has no predictions"
    raise InputError(f"kl_from={run.args.kl_from:g} cannot be had here: {reason}. Or leave kl_from out.")
