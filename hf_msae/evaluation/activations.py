"""The activations that every metric shares: one pass of the language model, kept in memory.

The text is the documents of a dataset that a training run on it holds out to measure on. So an SAE and the
baselines that are trained for comparison are all measured on the same tokens, and none was trained on them. What the
language model does with replaced activations cannot be kept, so cross-entropy runs the same windows again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_msae.data import TokenBatch, Window, as_documents, harvest, hold_out, pad_id, vocabulary
from hf_msae.data.documents import DocumentsLike
from hf_msae.data.forward import leave_out
from hf_msae.data.windows import counted_ids
from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.outliers import NORM_OUTLIER_MULTIPLE, activation_norms, norm_limit_of, within_limit
from hf_msae.sites import Site
from hf_msae.training.held_out import collated

# Dense latents of a batch are at most this many numbers: 256 MB in float32.
LATENTS_AT_ONCE = 2**26


def tokens_at_once(sae: MatryoshkaSAE) -> int:
    """How many tokens to encode together, so that dense latents fit into memory.

    Args:
        sae: whose latents they are.
    """
    return max(64, min(8192, LATENTS_AT_ONCE // sae.config.num_latents))


@dataclass
class TextActivations:
    """Token windows and the activations of their tokens that count.

    Args:
        model: the language model.
        site: where in it.
        windows: of tokens.
        pad_id: the token that fills short windows.
        lm_batch_size: windows per forward pass.
        x: activations, (num_tokens, hidden_size) float32 on the CPU, in the order of the windows.
        description: of the documents, for people.
        norm_limit: activations with a larger norm do not count, and are not in x; 0 for no limit.
        num_outliers: how many there were.
        held_out_share: which of the documents these are, as in `data.HeldOutWindows`.
        site_out: where what transcoders reconstruct is; None where SAEs are measured.
        y: the activations there, (num_tokens, output_size) float32 on the CPU; None likewise.
        norm_limit_out: as `norm_limit`, of these.
    """

    model: PreTrainedModel
    site: Site
    windows: Sequence[Window]
    pad_id: int
    lm_batch_size: int
    x: Tensor
    description: str
    norm_limit: float = 0.0
    num_outliers: int = 0
    held_out_share: float = 0.0
    site_out: Site | None = None
    y: Tensor | None = None
    norm_limit_out: float | None = None

    @property
    def targets(self) -> Tensor:
        """What is to be reconstructed: `x`, or of transcoders `y`."""
        return self.x if self.y is None else self.y

    @property
    def num_tokens(self) -> int:
        """The number of tokens that count."""
        return len(self.x)

    @property
    def token_ids(self) -> Tensor:
        """The token of each activation, (num_tokens,) int64."""
        return counted_ids(self.windows)

    def batches(self, sae: MatryoshkaSAE) -> Iterator[Tensor]:
        """The activations in parts (n, hidden_size) that an SAE can encode at once, on its device.

        Args:
            sae: the SAE.
        """
        for part in self.x.split(tokens_at_once(sae)):
            yield part.to(sae.device)

    def with_targets(self, sae: MatryoshkaSAE) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """As `batches`, each with what is to be reconstructed of it and with its tokens.

        The former is None where SAEs are measured, which reconstruct what they read, and the tokens are where the SAE
        is not tokenized.

        Args:
            sae: the SAE.
        """
        begin, ids = 0, self.token_ids if sae.config.is_tokenized else None
        for x in self.batches(sae):
            own = slice(begin, begin + len(x))
            yield x, None if self.y is None else self.y[own].to(sae.device), None if ids is None else ids[own]
            begin += len(x)

    def token_batches(self, num_tokens: int) -> Iterator[TokenBatch]:
        """The first windows that hold enough tokens, collated, on the model's device; all where there are fewer.

        Args:
            num_tokens: how many tokens that count are enough.
        """
        return collated(self.model, self.windows, num_tokens, self.lm_batch_size, self.pad_id)


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    site: Site,
    documents: DocumentsLike,
    *,
    num_tokens: int,
    context_length: int,
    packing: bool = True,
    lm_batch_size: int = 16,
    norm_limit: float | None = None,
    norm_outlier_multiple: float | None = NORM_OUTLIER_MULTIPLE,
    site_out: Site | None = None,
    norm_limit_out: float | None = None,
) -> TextActivations:
    """Run the language model over documents that training holds out.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        site: where in it, from `resolve_site`.
        documents: `Documents`, or what `as_documents` takes.
        num_tokens: how many tokens that count, outliers included.
        context_length: tokens per window.
        packing: whether documents are packed into full windows.
        lm_batch_size: windows per forward pass.
        norm_limit: beyond which activations do not count (0 for none), as an SAE's configuration records it; by
            default `norm_outlier_multiple` times the median norm.
        norm_outlier_multiple: see `norm_limit`; None or 0 keeps all.
        site_out: of transcoders, where what they reconstruct is.
        norm_limit_out: as `norm_limit`, there.

    Returns:
        The activations, and the windows that they are of.

    Raises:
        DatasetError: the documents have fewer tokens.
        InputError: an activation is NaN or infinite.
    """
    documents = as_documents(documents)
    rows = vocabulary(model)
    held_out = hold_out(documents, tokenizer, context_length, num_tokens, packing, vocab_size=rows)
    windows = held_out.windows
    filler = pad_id(tokenizer, rows)
    sites = [site] if site_out is None else [site, site_out]
    x, *others = run_model_at(model, sites, windows, filler, lm_batch_size, "Activations")
    if norm_limit is None:
        norm_limit = norm_limit_of(activation_norms(x), site, norm_outlier_multiple)
    inlying, y = within_limit(x, norm_limit), None
    if site_out is not None:
        (y,) = others
        if norm_limit_out is None:
            norm_limit_out = norm_limit_of(activation_norms(y), site_out, norm_outlier_multiple)
        inlying = inlying & within_limit(y, norm_limit_out)
        y = y[inlying]
    kept = leave_out(windows, inlying)
    outliers = len(x) - int(inlying.sum())
    description = documents.description
    x, share = x[inlying], held_out.share
    facts = (description, norm_limit, outliers, share, site_out, y, norm_limit_out)
    return TextActivations(model, site, kept, filler, lm_batch_size, x, *facts)


def total_variance(x: Tensor) -> float:
    """Σ‖x − x̄‖² over tokens.

    Args:
        x: activations, (n, hidden_size).
    """
    doubles = x.double()
    return (doubles.pow(2).sum() - len(x) * doubles.mean(0).pow(2).sum()).item()


def run_model(
    model: PreTrainedModel, site: Site, windows: Sequence[Window], pad_id: int, lm_batch_size: int, what: str
) -> Tensor:
    """The activations of all tokens that count, in the order of the windows.

    Args:
        model: the language model.
        site: where in it.
        windows: of tokens.
        pad_id: the token that fills short windows.
        lm_batch_size: windows per forward pass.
        what: the name of the progress bar.

    Returns:
        (num_tokens, hidden_size) float32 on the CPU.

    Raises:
        InputError: an activation is NaN or infinite.
    """
    return run_model_at(model, [site], windows, pad_id, lm_batch_size, what)[0]


def run_model_at(
    model: PreTrainedModel,
    sites: Sequence[Site],
    windows: Sequence[Window],
    pad_id: int,
    lm_batch_size: int,
    what: str,
) -> list[Tensor]:
    """As `run_model`, at several sites: a tensor for each, with the same tokens in the same order.

    Args:
        model: the language model.
        sites: where in it.
        windows: of tokens.
        pad_id: the token that fills short windows.
        lm_batch_size: windows per forward pass.
        what: the name of the progress bar.
    """
    total = sum(int(window.keep.sum()) for window in windows)
    parts: list[list[Tensor]] = [[] for _ in sites]
    with logging.tqdm(total=total, desc=what, unit=" tokens", unit_scale=True) as progress:
        for captured in harvest(model, sites, windows, lm_batch_size=lm_batch_size, pad_id=pad_id):
            for site, there in zip(sites, parts, strict=True):
                there.append(captured[site].float().cpu())
            progress.update(len(parts[0][-1]))
    found = [torch.cat(there) for there in parts]
    for site, x in zip(sites, found, strict=True):
        if not x.isfinite().all():
            raise InputError(
                f"The activations at {site} hold NaN or infinity, so that nothing can be measured on them."
            )
    return found
