"""One pass of a language model over text that collects what the pages of all latents need.

Memory does not grow with the text: per latent there are statistics, a fixed number of contexts, and one sum of errors;
of the tokens, only those of a first stretch (`record_tokens`) leave their active latents behind, from which the
hierarchy is found. A latent takes about 8 · (top_contexts + sampled_contexts) · context_tokens bytes, 9 KB by default.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_msae.data import ActivationError, TokenWindows, Window, as_documents, pad_id, vocabulary
from hf_msae.data.documents import DocumentsLike
from hf_msae.data.forward import capture_counted, leave_out
from hf_msae.data.windows import counted_ids
from hf_msae.devices import device_of
from hf_msae.errors import InputError
from hf_msae.interpret.activity import LatentStatistics, active_latents, gains, reconstruct, without_latents
from hf_msae.interpret.contexts import (
    NO_TOKEN,
    Contexts,
    ContextStore,
    as_uniform,
    best_of_each,
    place_hashes,
    window_hashes,
)
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.modeling.sparse_encoder import ActiveLatents
from hf_msae.outliers import NORM_OUTLIER_MULTIPLE, activation_norms, check_multiple, norm_limit_of, within_limit
from hf_msae.sites import find_output_site, find_site, resolve_site

# Contexts end a little after the token they were taken for: a causal model has not read what comes later.
SHARE_BEFORE = 3 / 4
# Activations behind the last layer, at which the effect on the output is linearised.
NUM_REFERENCES = 16
DEFAULT_CONTEXT_LENGTH = 256


@dataclass(frozen=True)
class Firings:
    """The active latents of some tokens, and what they gain there.

    Args:
        active: ordered by token, then by latent.
        gains: by how much a token's squared error would grow without the latent, (n,) float32.
        energies: ‖x − b_dec‖² of each token, (num_tokens,). Of a transcoder, x is here and below what it reconstructs,
            and what a skip gives is taken off.
        error_sums: Σ (x − x̂) over the tokens on which each latent fires, (num_latents, output_size).
    """

    active: ActiveLatents
    gains: Tensor
    energies: Tensor
    error_sums: Tensor

    @property
    def num_tokens(self) -> int:
        """The number of tokens."""
        return len(self.energies)


@dataclass(frozen=True)
class Scan:
    """What one pass collected.

    Args:
        statistics: per latent, over all tokens.
        top: the strongest contexts of each latent.
        sampled: contexts drawn evenly from all on which it fires.
        firings: active latents of the first tokens.
        references: activations behind the last layer, (n, width), for `LogitEffects`.
        description: of the documents, for people.
        context_length: tokens per window.
        norm_limit: beyond which activations were left out as outliers, 0 for no limit.
        num_outliers: how many.
    """

    statistics: LatentStatistics
    top: ContextStore
    sampled: ContextStore
    firings: Firings
    references: Tensor
    description: str
    context_length: int
    norm_limit: float | None = None
    num_outliers: int = 0

    @property
    def num_tokens(self) -> int:
        """The number of tokens read."""
        return self.statistics.num_tokens


def scan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: MatryoshkaSAE,
    documents: DocumentsLike,
    *,
    max_tokens: int,
    site: str | None = None,
    context_length: int | None = None,
    packing: bool = True,
    lm_batch_size: int = 16,
    top_contexts: int = 12,
    sampled_contexts: int = 24,
    context_tokens: int = 32,
    record_tokens: int = 200_000,
    norm_outlier_multiple: float | None = NORM_OUTLIER_MULTIPLE,
    seed: int = 0,
) -> Scan:
    """Read documents until enough tokens that count have passed, or the documents end.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        sae: in evaluation mode; it is moved to where the model is.
        documents: `Documents`, or what `as_documents` takes.
        max_tokens: how many tokens that count are enough.
        site: where the SAE reads; by default what its configuration records.
        context_length: tokens per window; by default what the SAE was trained with, or else 256.
        packing: whether documents are packed into full windows.
        lm_batch_size: windows per forward pass.
        top_contexts: strongest contexts per latent.
        sampled_contexts: contexts per latent drawn from all.
        context_tokens: tokens in a context.
        record_tokens: how many of the first tokens are kept for the hierarchy.
        norm_outlier_multiple: where the SAE records no limit, activations of this many times the median norm are left
            out as outliers; None or 0 keeps all.
        seed: fixes the order in which documents are read, so that they are from all parts of the data.

    Raises:
        InputError: the SAE does not fit the model, or a number is not positive.
        ActivationError: activations are NaN or infinite.
    """
    for name, number in (
        ("max_tokens", max_tokens),
        ("top_contexts", top_contexts),
        ("context_tokens", context_tokens),
    ):
        if number < 1:
            raise InputError(f"{name} must be at least 1, got {number}")
    check_multiple(norm_outlier_multiple)
    place, limit = find_site(model, sae.config, site), sae.config.norm_limit
    other, limit_out = find_output_site(model, sae.config, place), sae.config.norm_limit_out
    places = list(dict.fromkeys([place, other]))
    sae.to(device_of(model))  # type: ignore[arg-type]  # transformers hides the signature
    length = context_length or sae.config.context_length or DEFAULT_CONTEXT_LENGTH
    rows = vocabulary(model)
    filler = pad_id(tokenizer, rows)
    mixed = as_documents(documents).shuffle(seed)
    windows = TokenWindows(mixed, tokenizer, context_length=length, pack=packing, vocab_size=rows)
    collector = _Collector(sae, top_contexts, sampled_contexts, context_tokens, record_tokens)
    last = resolve_site(model, "layers.-1")
    references, num_outliers = torch.empty(0), 0
    with logging.tqdm(total=max_tokens, desc="Reading", unit=" tokens", unit_scale=True) as progress:
        for group in _groups(windows, lm_batch_size):
            wanted = places if len(references) else list(dict.fromkeys([*places, last]))
            captured = capture_counted(model, wanted, group, filler)
            if captured is None:
                continue
            for one in places:
                if not captured[one].isfinite().all():
                    raise ActivationError(f"Activations at {one} are NaN or infinite; load the model in float32.")
            x, y = captured[place], captured[other].to(captured[place].device)
            if limit is None:
                limit = norm_limit_of(activation_norms(x), place, norm_outlier_multiple)
            inlying = within_limit(x, limit)
            if other != place:
                if limit_out is None:
                    limit_out = norm_limit_of(activation_norms(y), other, norm_outlier_multiple)
                inlying = inlying & within_limit(y, limit_out)
            if not len(references):
                references = _spread(captured[last][inlying.to(captured[last].device)])
            num_outliers += len(x) - int(inlying.sum())
            collector.add(leave_out(group, inlying), x[inlying], y[inlying])
            progress.update(len(x))
            if collector.statistics.num_tokens >= max_tokens:
                break
    top, sampled = collector.top, collector.sampled
    description = windows.documents.description
    firings = collector.firings()
    return Scan(collector.statistics, top, sampled, firings, references, description, length, limit, num_outliers)


class _Collector:
    """Adds up batch after batch."""

    def __init__(
        self, sae: MatryoshkaSAE, top_contexts: int, sampled_contexts: int, context_tokens: int, record_tokens: int
    ) -> None:
        self.sae, self.context_tokens, self.record_tokens = sae, context_tokens, record_tokens
        num_latents = sae.config.num_latents
        self.statistics = LatentStatistics(num_latents)
        self.top = ContextStore(num_latents, top_contexts, context_tokens)
        self.sampled = ContextStore(num_latents, sampled_contexts, context_tokens)
        self.error_sums = torch.zeros(num_latents, sae.config.output_size)
        self.records: list[tuple[ActiveLatents, Tensor, Tensor]] = []
        self.num_recorded = 0

    @torch.no_grad()
    def add(self, group: Sequence[Window], x: Tensor, y: Tensor) -> None:
        """Windows, the activations (tokens that count, hidden_size) of their tokens, and what is reconstructed."""
        x, y = x.to(self.sae.device), y.to(self.sae.device)
        active = active_latents(self.sae, x)
        if self.num_recorded < self.record_tokens:
            self._record(x, y, counted_ids(group), active)
        active = ActiveLatents(*(part.cpu() for part in active))
        self.statistics.update(active.latents, active.values, len(x))
        batch = _Batch(group, active, self.sae.config.num_latents, self.context_tokens)
        self._offer_top(batch)
        if self.sampled.size:
            ties = place_hashes(batch.hashes[batch.windows], batch.positions, active.latents)
            scores = as_uniform(ties)
            places = self.sampled.may_enter(active.latents, scores)
            self._offer(self.sampled, batch, places, scores[places], ties[places])

    def _offer_top(self, batch: "_Batch") -> None:
        """The strongest token of every window and latent."""
        values, latents = batch.active.values.double(), batch.active.latents
        places = self.top.may_enter(latents, values)
        ties = place_hashes(batch.hashes[batch.windows[places]], batch.positions[places], latents[places])
        of_window = batch.windows[places] * self.sae.config.num_latents + latents[places]
        peaks, _ = best_of_each(of_window, values[places], ties, 1)
        self._offer(self.top, batch, places[peaks], values[places[peaks]], ties[peaks])

    def _offer(self, store: ContextStore, batch: "_Batch", places: Tensor, scores: Tensor, ties: Tensor) -> None:
        store.offer(batch.active.latents[places], scores, ties, lambda rows: batch.contexts(places[rows]))

    def _record(self, x: Tensor, y: Tensor, token_ids: Tensor, active: ActiveLatents) -> None:
        y, base = y.float(), without_latents(self.sae, x, token_ids)
        errors = y - reconstruct(self.sae, active, len(y), base)
        energies = (y - base).square().sum(-1)
        order = active.latents.argsort(stable=True)
        latents, counts = active.latents.unique(return_counts=True)
        starts = counts.cumsum(0) - counts
        sums = torch.nn.functional.embedding_bag(active.tokens[order], errors, starts, mode="sum")
        self.error_sums.index_add_(0, latents.cpu(), sums.cpu())
        gain = gains(self.sae, active, errors).cpu()
        parts = active.tokens.cpu() + self.num_recorded, active.latents.cpu(), active.values.float().cpu()
        self.records.append((ActiveLatents(*parts), gain, energies.cpu()))
        self.num_recorded += len(x)

    def firings(self) -> Firings:
        if not self.records:
            empty = torch.empty(0, dtype=torch.int64)
            nothing = ActiveLatents(empty, empty, torch.empty(0))
            return Firings(nothing, torch.empty(0), torch.empty(0), self.error_sums)
        actives, gained, energies = zip(*self.records, strict=True)
        active = ActiveLatents(*(torch.cat(parts) for parts in zip(*actives, strict=True)))
        return Firings(active, torch.cat(gained), torch.cat(energies), self.error_sums)


class _Batch:
    """The tokens of some windows, and where in them each active latent fired.

    windows, positions: of each active latent's token, (n,). hashes: of each window.
    """

    def __init__(self, group: Sequence[Window], active: ActiveLatents, num_latents: int, length: int) -> None:
        self.active, self.num_latents, self.length = active, num_latents, length
        self.lengths = torch.tensor([len(window.input_ids) for window in group])
        width = int(self.lengths.max())
        self.token_ids = torch.full((len(group), width), NO_TOKEN, dtype=torch.int32)
        keep = torch.zeros(len(group), width, dtype=torch.bool)
        for row, window in enumerate(group):
            self.token_ids[row, : len(window.input_ids)] = window.input_ids.int()
            keep[row, : len(window.input_ids)] = window.keep
        counted = keep.nonzero()
        self.windows, self.positions = counted[active.tokens].unbind(1)
        self.hashes = window_hashes(self.token_ids)
        self.index_of = torch.full((len(group), width), -1)
        self.index_of[counted[:, 0], counted[:, 1]] = torch.arange(len(counted))
        # Ascending, because active latents are ordered by token and then by latent.
        self.keys = active.tokens * num_latents + active.latents

    def contexts(self, places: Tensor) -> Contexts:
        """The contexts of some active latents, with their activations on every token of it."""
        windows, positions = self.windows[places, None], self.positions[places, None]
        before = int(self.length * SHARE_BEFORE)
        latest = (self.lengths[windows] - self.length).clamp_min(0)
        starts = torch.minimum((positions - before).clamp_min(0), latest)
        columns = starts + torch.arange(self.length)
        inside = columns < self.lengths[windows]
        columns = columns.clamp_max(self.token_ids.shape[1] - 1)
        token_ids = torch.where(inside, self.token_ids[windows, columns], NO_TOKEN)
        index = torch.where(inside, self.index_of[windows, columns], -1)
        keys = index * self.num_latents + self.active.latents[places, None]
        found = torch.searchsorted(self.keys, keys).clamp_max(len(self.keys) - 1)
        # What is no token that counts has a key below all others.
        values = torch.where(self.keys[found] == keys, self.active.values[found].float(), 0.0)
        return Contexts(token_ids, values, (positions - starts)[:, 0])


def _groups(windows: TokenWindows, size: int) -> Iterator[list[Window]]:
    reader = iter(windows)
    while group := list(islice(reader, size)):
        yield group


def _spread(x: Tensor) -> Tensor:
    """Rows from all over (n, width), at most NUM_REFERENCES."""
    return x[torch.linspace(0, len(x) - 1, min(NUM_REFERENCES, len(x))).round().long().to(x.device)].clone()
