"""A whole activation cache from documents: held-out text left out, the rest shuffled, read and written."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data.cache import CachedActivations, cache_activations
from hf_msae.data.documents import DocumentsLike
from hf_msae.data.forward import find_norm_limits
from hf_msae.data.holding_out import hold_out_for_training
from hf_msae.data.loading import as_documents
from hf_msae.data.stream import ActivationStream
from hf_msae.data.windows import TokenWindows, pad_id, vocabulary
from hf_msae.outliers import NORM_OUTLIER_MULTIPLE
from hf_msae.sites import Site, resolve_site


def make_activation_cache(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sites: Sequence[str | Site],
    documents: DocumentsLike,
    folder: str | Path,
    *,
    max_tokens: int,
    context_length: int = 512,
    packing: bool = True,
    shard_tokens: int = 131_072,
    block_tokens: int = 262_144,
    lm_batch_size: int = 16,
    batch_size: int = 4096,
    norm_outlier_multiple: float | None = NORM_OUTLIER_MULTIPLE,
    eval_tokens: int = 100_000,
    calibration_tokens: int = 50_000,
    seed: int = 0,
) -> CachedActivations:
    """Write a language model's activations to disk, shuffled, to train on many times.

    What training on the same documents holds out is left out. A cache that was interrupted goes on with the same call.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        sites: where in the model, such as "layers.12".
        documents: `Documents`, or what `as_documents` takes.
        folder: to make.
        max_tokens: how many tokens to write.
        context_length: tokens per window.
        packing: whether documents are packed into full windows.
        shard_tokens: tokens per file.
        block_tokens: tokens shuffled together.
        lm_batch_size: windows per forward pass.
        batch_size: rows written at once.
        norm_outlier_multiple: tokens whose norm exceeds this multiple of the median are dropped; None or 0 keeps all.
        eval_tokens: the documents on which training and evaluation measure with so many tokens are left out.
        calibration_tokens: those with which training sets thresholds likewise.
        seed: fixes the order.

    Returns:
        The cache, opened.

    Raises:
        CacheError: the folder exists, or the unfinished one was begun with other settings; or the disk is too small.
        SiteError: the model has no such site.
        DatasetError: the documents have too few tokens.
    """
    documents, rows = as_documents(documents), vocabulary(model)
    found, filler = [resolve_site(model, site) for site in sites], pad_id(tokenizer, rows)
    # The order makes the first rows, which training on the cache holds out, as mixed as the rest.
    held_out = hold_out_for_training(
        documents, tokenizer, context_length, eval_tokens, calibration_tokens, packing, vocab_size=rows
    )
    mixed = documents.without(held_out.split).shuffle(seed)
    windows = TokenWindows(mixed, tokenizer, context_length=context_length, pack=packing, vocab_size=rows)
    limits = find_norm_limits(
        model, found, windows, multiple=norm_outlier_multiple, lm_batch_size=lm_batch_size, pad_id=filler
    )
    stream = ActivationStream(
        model,
        found,
        windows,
        batch_size=batch_size,
        block_tokens=block_tokens,
        lm_batch_size=lm_batch_size,
        seed=seed,
        norm_limits=limits,
        pad_id=filler,
    )
    written = cache_activations(stream, folder, max_tokens=max_tokens, shard_tokens=shard_tokens)
    return CachedActivations(written, batch_size=1)
