"""A text as the SAE reads it: which latents are active on which token, and what each level keeps.

Many visitors share one model, and hooks are on the model. So activations are read by a hook that looks which thread
runs it, and levels are put in place by `hf_msae.steering`, which looks, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_msae.outliers import within_limit
from hf_msae.sites import in_this_thread, replace
from hf_msae.steering import steer
from msae_space.workbench import Key, SpaceError, Workbench
from msae_space.zerogpu import on_gpu

MAX_TOKENS, MAX_PROMPT_TOKENS, MAX_PHRASE_TOKENS = 256, 512, 64
NUM_GUESSES = 3


@dataclass(frozen=True)
class Reading:
    """Of which SAE; tokens as text, which of them the SAE was never trained on (special tokens and outliers), and
    per token its active latents with their activations, strongest first; none where it was not trained.
    """

    key: Key
    pieces: tuple[str, ...]
    skipped: tuple[bool, ...]
    active: tuple[tuple[tuple[int, float], ...], ...]

    def values(self, latent: int) -> list[float]:
        """The latent's activation on each token."""
        return [dict(found).get(latent, 0.0) for found in self.active]


@dataclass(frozen=True)
class LevelReading:
    """What one level keeps of a text: the fraction of variance explained (over the text's own mean), the cross-entropy
    with and without it in nats per token, the divergence of each token's prediction, and what is predicted now.
    Special tokens and outliers are left as they are, and count in neither of the first two.
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


def encode_text(bench: Workbench, text: str, what: str = "The text", most: int = MAX_TOKENS) -> Tensor:
    """Token ids (tokens,). Raises SpaceError for no text, and for more than `most` tokens or the model's positions."""
    if not text.strip():
        raise SpaceError(f"{what} is empty; type some words.")
    ids = bench.tokenizer(text, return_tensors="pt").input_ids[0]
    most = min(most, bench.language.num_positions or most)
    if len(ids) > most:
        raise SpaceError(f"{what} has {len(ids)} tokens; this page reads up to {most} of this model. Shorten it.")
    if not len(ids):
        raise SpaceError(f"{what} has no tokens for this model; type some words.")
    return ids.to(bench.model.device)


def check_prompt(bench: Workbench, prompt: str, max_new_tokens: int) -> None:
    """Raises SpaceError for a prompt that is too long to go on from, in tokens; characters say little of those."""
    room = (bench.language.num_positions or MAX_PROMPT_TOKENS + max_new_tokens) - max_new_tokens
    most = min(MAX_PROMPT_TOKENS, room)
    number = len(bench.tokenizer(prompt).input_ids)
    if number > most:
        raise SpaceError(
            f"The prompt has {number:,} tokens; with {max_new_tokens} new ones, this page takes up to {most}. "
            "Shorten it."
        )
    if not number:
        raise SpaceError("The prompt has no tokens for this model; type some words.")


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
    """Activations at the SAE's site (tokens, hidden_size), and logits (tokens, vocabulary). Raises SpaceError for
    activations of another width than the SAE's.
    """
    seen: list[Tensor] = []

    def look(hidden: Tensor) -> Tensor:
        seen.append(hidden.detach().clone())
        return hidden

    with torch.inference_mode(), replace(bench.model, {bench.site: look}, in_this_thread()):
        logits = bench.model(input_ids=ids[None], use_cache=False).logits[0]
    if not seen:
        raise SpaceError(f"The language model never runs {bench.site}, where the SAE reads.")
    width, wanted = seen[0].shape[-1], bench.sae.config.hidden_size
    if width != wanted:
        raise SpaceError(f"The SAE reads activations of width {wanted}, and those at {bench.site} have {width}.")
    return seen[0][0].float(), logits.float()


def are_ordinary(bench: Workbench, ids: Tensor, x: Tensor) -> Tensor:
    """Which tokens are of the kind that the SAE was trained on, bool (tokens,): not the special ones, nor those whose
    activations x (tokens, hidden_size) are outliers, such as attention sinks.
    """
    special = torch.tensor([token in bench.special_ids for token in ids.tolist()], device=x.device)
    return within_limit(x, bench.sae.config.norm_limit).to(x.device) & ~special


@on_gpu
def mean_norm(bench: Workbench, text: str) -> float:
    """The mean length of the activations at the SAE's site, over a text's ordinary tokens."""
    ids = encode_text(bench, text)
    x, _ = activations(bench, ids)
    return x[are_ordinary(bench, ids, x)].norm(dim=-1).mean().item()


@on_gpu
def read(bench: Workbench, text: str) -> Reading:
    """The text's tokens and latents."""
    ids = encode_text(bench, text)
    x, _ = activations(bench, ids)
    skipped = tuple((~are_ordinary(bench, ids, x)).tolist())
    with torch.inference_mode():
        latents = bench.sae.encode(x.to(bench.sae.device)).cpu()
    active = []
    for row, left_out in zip(latents, skipped, strict=True):
        places = row.nonzero().squeeze(-1)
        found = sorted(zip(places.tolist(), row[places].tolist(), strict=True), key=lambda pair: -pair[1])
        active.append(() if left_out else tuple(found))
    return Reading(bench.key, token_pieces(bench, ids), skipped, tuple(active))


@on_gpu
def read_levels(bench: Workbench, text: str) -> tuple[tuple[str, ...], list[LevelReading]]:
    """The text's tokens, and what each level keeps of it. Raises SpaceError for a text without two ordinary tokens."""
    ids = encode_text(bench, text)
    x, clean = activations(bench, ids)
    ordinary = are_ordinary(bench, ids, x)
    # As in every metric: a prediction counts where its token and the next one were replaced.
    counted = ordinary[:-1] & ordinary[1:]
    if not counted.any():
        raise SpaceError("The text is too short to predict anything; type a sentence.")
    kept = x[ordinary].to(bench.sae.device)
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
            levels.append(_compare(bench, ids, counted, clean, logits, prefix, (1 - error / total).item()))
    return token_pieces(bench, ids), levels


def _compare(
    bench: Workbench, ids: Tensor, counted: Tensor, clean: Tensor, logits: Tensor, prefix: int, fve: float
) -> LevelReading:
    log_p, log_q = clean.log_softmax(-1), logits.log_softmax(-1)
    where, following = counted.to(ids.device), ids[1:]
    return LevelReading(
        prefix=prefix,
        fve=fve,
        ce=nn.functional.cross_entropy(logits[:-1][where], following[where]).item(),
        ce_clean=nn.functional.cross_entropy(clean[:-1][where], following[where]).item(),
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
