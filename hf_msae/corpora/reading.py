"""Blocks of documents through the language model and the SAE: which latents are active on which token."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.corpora.blocks import Block, DocumentBlocks
from hf_msae.corpora.rows import TokenRows
from hf_msae.data import ActivationError, Documents, find_norm_limits, pad_id, vocabulary
from hf_msae.data.forward import capture_counted, check_eval, groups
from hf_msae.devices import device_of
from hf_msae.errors import InputError
from hf_msae.interpret.activity import active_latents
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.outliers import NORM_OUTLIER_MULTIPLE, check_multiple, within_limit
from hf_msae.sites import find_site

DEFAULT_CONTEXT_LENGTH = 256
# Rows of the encoder, evenly spaced, that tell an SAE from others.
FINGERPRINT_ROWS = 64


class LatentReader:
    """An SAE at its site of a language model.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        sae: in evaluation mode; it is moved to where the model is.
        site: where the SAE reads; by default what its configuration records.
        context_length: tokens per window; by default what the SAE was trained with, or else 256.
        packing: whether a window may hold several documents.
        lm_batch_size: windows per forward pass.
        norm_outlier_multiple: where the SAE records no limit, activations of this many times the median norm are
            left out as outliers; None or 0 keeps all.

    Attributes:
        norm_limit: beyond which activations are outliers; None until it is known.
        num_outliers: tokens left out so far.

    Raises:
        InputError: the SAE does not fit the model, or is in training mode, as the model may not be; or a number is out
            of its bounds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sae: MatryoshkaSAE,
        *,
        site: str | None = None,
        context_length: int | None = None,
        packing: bool = False,
        lm_batch_size: int = 16,
        norm_outlier_multiple: float | None = NORM_OUTLIER_MULTIPLE,
    ) -> None:
        if lm_batch_size < 1:
            raise InputError(f"lm_batch_size must be at least 1, got {lm_batch_size}.")
        check_multiple(norm_outlier_multiple)
        check_eval(model)
        self.model, self.tokenizer, self.sae = model, tokenizer, sae
        self.site = find_site(model, sae.config, site)
        self.sae.to(device_of(model))  # type: ignore[arg-type]  # transformers hides the signature
        self.context_length = context_length or sae.config.context_length or DEFAULT_CONTEXT_LENGTH
        self.packing, self.lm_batch_size = packing, lm_batch_size
        self.norm_outlier_multiple = norm_outlier_multiple
        self.norm_limit = sae.config.norm_limit
        self.num_outliers = 0
        self._rows = vocabulary(model)
        self._filler = pad_id(tokenizer, self._rows)

    def blocks(self, documents: Documents, **options: Any) -> DocumentBlocks:
        """The blocks of some documents as this reader cuts them.

        Args:
            documents: to read.
            **options: the other arguments of `DocumentBlocks`.
        """
        return DocumentBlocks(
            documents,
            self.tokenizer,
            context_length=self.context_length,
            packing=self.packing,
            vocab_size=self._rows,
            **options,
        )

    def find_norm_limit(self, documents: Documents) -> float:
        """The limit that the SAE records, or else that of the first tokens of some documents.

        Args:
            documents: read before any other pass over them begins.
        """
        if self.norm_limit is None:
            windows = (placed.window for block in self.blocks(documents) for placed in block.windows)
            self.norm_limit = find_norm_limits(
                self.model,
                [self.site],
                windows,
                multiple=self.norm_outlier_multiple,
                lm_batch_size=self.lm_batch_size,
                pad_id=self._filler,
            )[self.site]
        return self.norm_limit

    @torch.no_grad()
    def read(self, block: Block) -> TokenRows:
        """The active latents of a block's tokens; outliers have no row.

        Args:
            block: of `blocks`.

        Raises:
            ActivationError: activations are NaN or infinite.
        """
        # Long ones first, so that passes have little padding.
        placed = sorted(block.windows, key=lambda one: -len(one.window.input_ids))
        counts, latents, values, inlying = [], [], [], []
        for group in groups([one.window for one in placed], self.lm_batch_size):
            captured = capture_counted(self.model, [self.site], group, self._filler)
            if captured is None:
                continue
            x = captured[self.site]
            if not x.isfinite().all():
                raise ActivationError(f"Activations at {self.site} are NaN or infinite; load the model in float32.")
            kept = within_limit(x, self.norm_limit)
            if not kept.all():
                x = x[kept]
            active = active_latents(self.sae, x.to(self.sae.device))
            tokens = active.tokens.cpu()
            counts.append(torch.bincount(tokens, minlength=len(x)))
            latents.append(active.latents.cpu())
            values.append(active.values.float().cpu())
            inlying.append(kept.cpu())
        keep = [one.window.keep for one in placed]
        columns = (
            torch.cat([one.documents[there] for one, there in zip(placed, keep, strict=True)]),
            torch.cat([one.positions[there] for one, there in zip(placed, keep, strict=True)]),
            torch.cat([one.window.input_ids[there] for one, there in zip(placed, keep, strict=True)]),
        )
        mask = torch.cat(inlying)
        self.num_outliers += int((~mask).sum())
        rows = TokenRows(*(column[mask] for column in columns), *map(torch.cat, (counts, latents, values)))
        return rows.in_order()

    def read_all(self, blocks: DocumentBlocks) -> Iterator[tuple[Block, TokenRows]]:
        """Each block with what is active in it."""
        for block in blocks:
            yield block, self.read(block)


def sae_fingerprint(sae: MatryoshkaSAE) -> str:
    """What tells an SAE from others; the same for each of its prefixes.

    Args:
        sae: the SAE.
    """
    first = sae.config.prefix_sizes[0]
    rows = torch.linspace(0, first - 1, min(first, FINGERPRINT_ROWS)).round().long()
    parts = [part.detach().cpu()[rows] for part in (sae.W_enc, sae.b_enc, sae.threshold)] + [sae.b_dec.detach().cpu()]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.float().numpy().tobytes())
    return digest.hexdigest()[:16]
