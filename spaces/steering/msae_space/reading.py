"""A text as the SAE reads it: which latents are active on which token, and what each level keeps.

Many visitors share one model, and hooks are on the model. So activations are read by a hook that looks which thread
runs it, and levels are put in position by `hf_msae.steering`, which looks, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_msae.outliers import within_limit
from hf_msae.sites import in_this_thread, replace
from hf_msae.steering import PrefixEdit, steering_context
from msae_space.loaded_sae import Key, LoadedSAE, SpaceError
from msae_space.zerogpu import on_gpu

MAX_TOKENS, MAX_PROMPT_TOKENS, MAX_PHRASE_TOKENS = 256, 512, 64
NUM_GUESSES = 3


@dataclass(frozen=True)
class Reading:
    """A text as an SAE reads it.

    Args:
        key: Which SAE.
        pieces: The tokens as text.
        skipped: Which tokens the SAE was never trained on: special tokens and outliers.
        active: Per token its active latents with their activations, strongest first; none where `skipped`.
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
    """What one level keeps of a text. Special tokens and outliers are left as they are.

    Args:
        prefix: Number of latents.
        fve: Fraction of variance explained, over the text's own mean.
        ce: Cross-entropy with reconstructions in place of activations, in nats per token. As in every metric, a
            prediction counts where its token and the next one were replaced.
        ce_clean: The same without replacing anything.
        kl: Per token the divergence of the prediction after it, in nats.
        guesses: Per token the likeliest next tokens.
        guesses_clean: The same without replacing anything.
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


def encode_text(loaded: LoadedSAE, text: str, what: str = "The text", most: int = MAX_TOKENS) -> Tensor:
    """A text as token ids, of shape (tokens,).

    Raises:
        SpaceError: There is no text, or it has more than `most` tokens or more than the model has positions.
    """
    if not text.strip():
        raise SpaceError(f"{what} is empty; type some words.")
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids[0]
    most = min(most, loaded.language.num_positions or most)
    if len(ids) > most:
        raise SpaceError(f"{what} has {len(ids)} tokens; this page reads up to {most} of this model. Shorten it.")
    if not len(ids):
        raise SpaceError(f"{what} has no tokens for this model; type some words.")
    return ids.to(loaded.model.device)


def check_prompt(loaded: LoadedSAE, prompt: str, max_new_tokens: int) -> None:
    """Checks that a prompt leaves room for what is to be written, in tokens, of which characters say little.

    Raises:
        SpaceError: The prompt is too long, or has no tokens.
    """
    room = (loaded.language.num_positions or MAX_PROMPT_TOKENS + max_new_tokens) - max_new_tokens
    most = min(MAX_PROMPT_TOKENS, room)
    number = len(loaded.tokenizer(prompt).input_ids)
    if number > most:
        raise SpaceError(
            f"The prompt has {number:,} tokens; with {max_new_tokens} new ones, this page takes up to {most}. "
            "Shorten it."
        )
    if not number:
        raise SpaceError("The prompt has no tokens for this model; type some words.")


def token_pieces(loaded: LoadedSAE, ids: Tensor) -> tuple[str, ...]:
    """Each token as it reads in the text, spaces included."""
    listed, pieces = ids.tolist(), []
    for position in range(len(listed)):
        # Decoded behind its predecessor, since many tokenizers drop the space before a text's first token.
        before = loaded.decode(listed[max(0, position - 1) : position])
        both = loaded.decode(listed[max(0, position - 1) : position + 1])
        alone = loaded.decode(listed[position : position + 1])
        pieces.append(both[len(before) :] if both.startswith(before) else alone)
    return tuple(pieces)


def are_special(loaded: LoadedSAE, pieces: Sequence[str]) -> list[bool]:
    """Which pieces of a text are special tokens, written out."""
    written = {loaded.decode([token]) for token in loaded.special_ids}
    return [piece in written for piece in pieces]


def activations(loaded: LoadedSAE, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Activations at the SAE's site (tokens, hidden_size), and logits (tokens, vocabulary).

    Raises:
        SpaceError: The model never runs the site, or its activations have another width than the SAE's.
    """
    seen: list[Tensor] = []

    def look(hidden: Tensor) -> Tensor:
        seen.append(hidden.detach().clone())
        return hidden

    with torch.inference_mode(), replace(loaded.model, {loaded.site: look}, in_this_thread()):
        logits = loaded.model(input_ids=ids[None], use_cache=False).logits[0]
    if not seen:
        raise SpaceError(f"The language model never runs {loaded.site}, where the SAE reads.")
    width, wanted = seen[0].shape[-1], loaded.sae.config.hidden_size
    if width != wanted:
        raise SpaceError(f"The SAE reads activations of width {wanted}, and those at {loaded.site} have {width}.")
    return seen[0][0].float(), logits.float()


def are_ordinary(loaded: LoadedSAE, ids: Tensor, x: Tensor) -> Tensor:
    """Which tokens are of the kind that the SAE was trained on, bool (tokens,).

    Those are neither the special ones, nor those whose activations x (tokens, hidden_size) are outliers, such as
    attention sinks.
    """
    special = torch.tensor([token in loaded.special_ids for token in ids.tolist()], device=x.device)
    return within_limit(x, loaded.sae.config.norm_limit).to(x.device) & ~special


@on_gpu
def mean_norm(loaded: LoadedSAE, text: str) -> float:
    """The mean length of the activations at the SAE's site, over a text's ordinary tokens."""
    ids = encode_text(loaded, text)
    x, _ = activations(loaded, ids)
    return x[are_ordinary(loaded, ids, x)].norm(dim=-1).mean().item()


@on_gpu
def read(loaded: LoadedSAE, text: str) -> Reading:
    """The text's tokens and latents."""
    ids = encode_text(loaded, text)
    x, _ = activations(loaded, ids)
    skipped = tuple((~are_ordinary(loaded, ids, x)).tolist())
    with torch.inference_mode():
        latents = loaded.sae.encode(x.to(loaded.sae.device)).cpu()
    active = []
    for row, left_out in zip(latents, skipped, strict=True):
        positions = row.nonzero().squeeze(-1)
        found = sorted(zip(positions.tolist(), row[positions].tolist(), strict=True), key=lambda pair: -pair[1])
        active.append(() if left_out else tuple(found))
    return Reading(loaded.key, token_pieces(loaded, ids), skipped, tuple(active))


@on_gpu
def read_levels(loaded: LoadedSAE, text: str) -> tuple[tuple[str, ...], list[LevelReading]]:
    """The text's tokens, and what each level keeps of it.

    Raises:
        SpaceError: No two ordinary tokens follow one another in the text.
    """
    ids = encode_text(loaded, text)
    x, clean = activations(loaded, ids)
    ordinary = are_ordinary(loaded, ids, x)
    # As in every metric: a prediction counts where its token and the next one were replaced.
    counted = ordinary[:-1] & ordinary[1:]
    if not counted.any():
        raise SpaceError("The text is too short to predict anything; type a sentence.")
    kept = x[ordinary].to(loaded.sae.device)
    total = (kept - kept.mean(0)).pow(2).sum()
    levels = []
    with torch.inference_mode():
        latents = loaded.sae.encode(kept)
        for level, prefix in enumerate(loaded.prefix_sizes):
            error = (kept - loaded.sae.decode(latents, prefix)).pow(2).sum()
            edits = [PrefixEdit(level, keep_error=False)]
            with steering_context(loaded.model, {"": loaded.sae}, edits, special_ids=loaded.special_ids):
                logits = loaded.model(input_ids=ids[None], use_cache=False).logits[0].float()
            levels.append(_compare(loaded, ids, counted, clean, logits, prefix, (1 - error / total).item()))
    return token_pieces(loaded, ids), levels


def _compare(
    loaded: LoadedSAE, ids: Tensor, counted: Tensor, clean: Tensor, logits: Tensor, prefix: int, fve: float
) -> LevelReading:
    log_p, log_q = clean.log_softmax(-1), logits.log_softmax(-1)
    where, following = counted.to(ids.device), ids[1:]
    return LevelReading(
        prefix=prefix,
        fve=fve,
        ce=nn.functional.cross_entropy(logits[:-1][where], following[where]).item(),
        ce_clean=nn.functional.cross_entropy(clean[:-1][where], following[where]).item(),
        kl=tuple((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0).tolist()),
        guesses=_guesses(loaded, logits),
        guesses_clean=_guesses(loaded, clean),
    )


def _guesses(loaded: LoadedSAE, logits: Tensor) -> tuple[tuple[str, ...], ...]:
    return tuple(
        tuple(loaded.decode([token]) for token in row) for row in logits.topk(NUM_GUESSES, -1).indices.tolist()
    )


def continuation_loss(loaded: LoadedSAE, prompt: str, text: str) -> float | None:
    """The unsteered model's loss on `text` after `prompt`, in nats per token; None where there is no text."""
    before = len(loaded.tokenizer(prompt).input_ids)
    ids = loaded.tokenizer(prompt + text, return_tensors="pt").input_ids[0].to(loaded.model.device)
    if len(ids) <= before:
        return None
    with torch.inference_mode():
        logits = loaded.model(input_ids=ids[None], use_cache=False).logits[0].float()
    return nn.functional.cross_entropy(logits[before - 1 : -1], ids[before:]).item()
