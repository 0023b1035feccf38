"""A text as the SAE reads it: which latents are active on which token, and what each level keeps.

Many visitors share one model, and hooks are on the model. So activations are read by a hook that looks which thread
runs it, and levels are put in place by `hf_msae.steering`, which looks, too.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_msae.sites import replace
from hf_msae.steering import steer
from msae_space.library import SpaceError, Workbench
from msae_space.zerogpu import on_gpu

MAX_TOKENS = 256
NUM_GUESSES = 3


@dataclass(frozen=True)
class Reading:
    """Tokens as text, whether each is special, and per token its active latents with their activations, strongest
    first. Special tokens have none: the SAE never saw any.
    """

    pieces: tuple[str, ...]
    special: tuple[bool, ...]
    active: tuple[tuple[tuple[int, float], ...], ...]

    def values(self, latent: int) -> list[float]:
        """The latent's activation on each token."""
        return [dict(found).get(latent, 0.0) for found in self.active]


@dataclass(frozen=True)
class LevelReading:
    """What one level keeps of a text: the fraction of variance explained (over the text's own mean), the increase of
    cross-entropy in nats per token, the divergence of each token's prediction, and what is predicted now.
    """

    prefix: int
    fve: float
    ce: float
    ce_clean: float
    kl: tuple[float, ...]
    guesses: tuple[tuple[str, ...], ...]
    guesses_clean: tuple[tuple[str, ...], ...]

    @property
    def num_changed(self) -> int:
        """Tokens after which another token is the likeliest next one."""
        return sum(now[0] != before[0] for now, before in zip(self.guesses, self.guesses_clean, strict=True))


def encode_text(bench: Workbench, text: str) -> Tensor:
    """Token ids (tokens,). Raises SpaceError for no text, and for more than MAX_TOKENS."""
    if not text.strip():
        raise SpaceError("There is no text; type some.")
    ids = bench.tokenizer(text, return_tensors="pt").input_ids[0]
    if len(ids) > MAX_TOKENS:
        raise SpaceError(f"The text has {len(ids)} tokens; this page reads up to {MAX_TOKENS}. Shorten it.")
    return ids.to(bench.model.device)


def token_pieces(bench: Workbench, ids: Tensor) -> tuple[str, ...]:
    """Each token as it reads in the text, spaces included."""
    listed, pieces = ids.tolist(), []
    for place in range(len(listed)):
        # Decoded behind its predecessor, since many tokenizers drop the space before a text's first token.
        before = bench.decode(listed[max(0, place - 1) : place])
        both = bench.decode(listed[max(0, place - 1) : place + 1])
        pieces.append(both[len(before) :] if both.startswith(before) else bench.decode(listed[place : place + 1]))
    return tuple(pieces)


def are_special(bench: Workbench, pieces: Sequence[str]) -> list[bool]:
    """Which pieces of a text are special tokens, written out."""
    written = {bench.decode([token]) for token in bench.special_ids}
    return [piece in written for piece in pieces]


def activations(bench: Workbench, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Activations at the SAE's site (tokens, hidden_size), and logits (tokens, vocabulary)."""
    here, seen = threading.get_ident(), []

    def look(hidden: Tensor) -> Tensor:
        if threading.get_ident() == here:
            seen.append(hidden.detach().clone())
        return hidden

    with torch.inference_mode(), replace(bench.model, {bench.site: look}):
        logits = bench.model(input_ids=ids[None], use_cache=False).logits[0]
    return seen[0][0].float(), logits.float()


@on_gpu
def read(bench: Workbench, text: str) -> Reading:
    """The text's tokens and latents."""
    ids = encode_text(bench, text)
    x, _ = activations(bench, ids)
    special = tuple(token in bench.special_ids for token in ids.tolist())
    with torch.inference_mode():
        latents = bench.sae.encode(x.to(bench.sae.device)).cpu()
    active = []
    for row, skipped in zip(latents, special, strict=True):
        places = row.nonzero().squeeze(-1)
        found = sorted(zip(places.tolist(), row[places].tolist(), strict=True), key=lambda pair: -pair[1])
        active.append(() if skipped else tuple(found))
    return Reading(token_pieces(bench, ids), special, tuple(active))


@on_gpu
def read_levels(bench: Workbench, text: str) -> tuple[tuple[str, ...], list[LevelReading]]:
    """The text's tokens, and what each level keeps of it. Raises SpaceError for a text of fewer than three tokens."""
    ids = encode_text(bench, text)
    special = torch.tensor([token in bench.special_ids for token in ids.tolist()], device=ids.device)
    if int((~special).sum()) < 2:
        raise SpaceError("The text is too short to predict anything; type a sentence.")
    x, clean = activations(bench, ids)
    kept = x[~special].to(bench.sae.device)
    total = (kept - kept.mean(0)).pow(2).sum()
    levels = []
    with torch.inference_mode():
        latents = bench.sae.encode(kept)
        for level, prefix in enumerate(bench.prefix_sizes):
            error = (kept - bench.sae.decode(latents, prefix)).pow(2).sum()
            with steer(
                bench.model, bench.sae, method="prefix", level=level, keep_error=False, special_ids=bench.special_ids
            ):
                logits = bench.model(input_ids=ids[None], use_cache=False).logits[0].float()
            levels.append(_compare(bench, ids, clean, logits, prefix, (1 - error / total).item()))
    return token_pieces(bench, ids), levels


def _compare(bench: Workbench, ids: Tensor, clean: Tensor, logits: Tensor, prefix: int, fve: float) -> LevelReading:
    log_p, log_q = clean.log_softmax(-1), logits.log_softmax(-1)
    return LevelReading(
        prefix=prefix,
        fve=fve,
        ce=nn.functional.cross_entropy(logits[:-1], ids[1:]).item(),
        ce_clean=nn.functional.cross_entropy(clean[:-1], ids[1:]).item(),
        kl=tuple((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0).tolist()),
        guesses=_guesses(bench, logits),
        guesses_clean=_guesses(bench, clean),
    )


def _guesses(bench: Workbench, logits: Tensor) -> tuple[tuple[str, ...], ...]:
    return tuple(
        tuple(bench.decode([token]) for token in row) for row in logits.topk(NUM_GUESSES, -1).indices.tolist()
    )


def surprise(bench: Workbench, prompt: str, text: str) -> float | None:
    """Nats per token by which the unsteered model is surprised by `text` after `prompt`; None where there is none."""
    before = len(bench.tokenizer(prompt).input_ids)
    ids = bench.tokenizer(prompt + text, return_tensors="pt").input_ids[0].to(bench.model.device)
    if len(ids) <= before:
        return None
    with torch.inference_mode():
        logits = bench.model(input_ids=ids[None], use_cache=False).logits[0].float()
    return nn.functional.cross_entropy(logits[before - 1 : -1], ids[before:]).item()
