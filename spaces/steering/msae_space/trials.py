"""Presets for the story model, found by trying latents out.

A latent steers well where the text leaves something open: after "He had a new", any toy is likely, and a small push
decides which. So each promising latent is added at many positions of unseen stories in one forward pass. The position
where it moves most probability between words that were likely anyway gives its prompt. The best latents are then
steered with for real: texts are written from that prompt at several strengths, and a preset is kept only if its words
become much likelier and the texts' loss under the unsteered model hardly rises.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_msae.atomic_files import atomic_file
from hf_msae.interpret.store import Interpretation
from hf_msae.steering import SteeredPipeline, Steering
from hf_msae.worlds.stories import StoryWorld
from msae_space import validation
from msae_space.links import MAX_SEED
from msae_space.loaded_sae import LoadedSAE, SpaceError
from msae_space.presets import NUM_PRESETS, NUM_WORDS, Preset, is_word, promoting
from msae_space.reading import continuation_loss, encode_text
from msae_space.strengths import MAX_DIALS, MAX_STRENGTH, METHODS, Dial, edits, starting_value

NUM_STORIES, NUM_TOKENS, FIRST_POSITION, LAST_POSITION = 32, 36, 8, 32
NUM_CANDIDATES, NUM_TRIED, NUM_TEXTS, NUM_NEW_TOKENS, NUM_SEEDS = 160, 16, 4, 30, 12
ENDS = (".", "!", "?")
PROBE_SHARE, SHARES = 0.5, (0.35, 0.45)
# A word is likely enough where the unsteered model gives it this probability, and out of order below the second.
IN_ORDER, OUT_OF_ORDER = 0.004, 0.001
# Words that make up more of all text than this (was, had, she) say nothing about a story.
MAX_SHARE_OF_TEXT = 0.004
# Probability that a word has to gain, and all of a preset's words together.
MIN_GAIN, MIN_MOVED = 0.01, 0.1
# In nats per token, beyond what the model's own text has; and how much probability a nat is worth.
MAX_COST, COST_WEIGHT = 1.0, 0.2


@dataclass(frozen=True)
class Trial:
    """A latent, and the prompt at which steering with it decides the next word.

    Args:
        latent: Its number.
        prompt: The beginning of a story.
        words: What it makes likelier as the next word, most of all first.
        tokens: The ids of the words.
        moved: Probability that it moves to the words.
    """

    latent: int
    prompt: str
    words: tuple[str, ...]
    tokens: tuple[int, ...]
    moved: float


def presets_by_trial(loaded: LoadedSAE, model: PreTrainedModel, found: Interpretation, path: Path) -> list[Preset]:
    """Finds presets by steering with many latents, and keeps them in a file for the next start.

    Args:
        loaded: The SAE.
        model: Modules of its language model that nobody else runs.
        found: The SAE's interpretation, which says which latents promote words.
        path: The file; what is in it already is taken.

    Returns:
        The presets, those that move most probability at the least loss first.
    """
    kept = _kept(loaded, path)
    if kept is not None:
        return kept
    candidates = [latent for latent, _ in promoting(loaded, found)[:NUM_CANDIDATES]]
    trials = _different(find_trials(loaded, model, candidates))[:NUM_TRIED]
    pipe = SteeredPipeline(model, loaded.tokenizer, loaded.sae, Steering())
    ranked = [one for trial in trials if (one := _try(loaded, pipe, trial)) is not None]
    ranked.sort(key=lambda one: -one[0])
    presets = [preset for _, preset in ranked[:NUM_PRESETS]]
    with atomic_file(path) as draft:
        draft.write_text(json.dumps([asdict(preset) for preset in presets]), encoding="utf-8")
    return presets


def _kept(loaded: LoadedSAE, path: Path) -> list[Preset] | None:
    """Those of an earlier start, None where there are none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [_preset(loaded, values) for values in found]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # SpaceError is a ValueError
        return None


def _preset(loaded: LoadedSAE, values: dict[str, Any]) -> Preset:
    """A preset as `presets_by_trial` wrote it. Raises TypeError, KeyError or SpaceError for anything else."""
    dials = [
        Dial(
            loaded.checked(validation.whole(latent, "A latent", 0, validation.MAX_NUMBER)),
            validation.number(value, "A strength", -MAX_STRENGTH, MAX_STRENGTH),
        )
        for latent, value in values["dials"]
    ]
    if not 0 < len(dials) <= MAX_DIALS:
        raise SpaceError(f"A preset has 1 to {MAX_DIALS} dials.")
    return Preset(
        name=validation.words(values["name"], "The name"),
        dials=tuple(dials),
        method=validation.choice(values["method"], "method", METHODS),
        prompt=validation.words(values["prompt"], "The prompt"),
        seed=validation.whole(values["seed"], "The seed", 0, MAX_SEED),
        why=validation.words(values["why"], "The reason"),
    )


@torch.inference_mode()
def find_trials(loaded: LoadedSAE, model: PreTrainedModel, candidates: Sequence[int]) -> list[Trial]:
    """For each latent the prompt where it moves most probability between words that are likely anyway, best first."""
    ids = _stories(loaded)
    clean = model(input_ids=ids, use_cache=False).logits.float().softmax(-1)
    words = torch.tensor([is_word(loaded.decode([token])) for token in range(clean.shape[-1])], device=clean.device)
    in_order = (clean > IN_ORDER) & words & (clean.mean((0, 1)) < MAX_SHARE_OF_TEXT)
    # Where a sentence begins, almost any word is in order, and none says much.
    ends = torch.tensor([[loaded.decode([token]).strip()[-1:] in ENDS for token in row] for row in ids.tolist()])
    trials = []
    for latent in candidates:
        value = starting_value(loaded, latent, PROBE_SHARE)
        with _steering(loaded, Dial(latent, value)).on(model, loaded.sae, loaded.special_ids):
            steered = model(input_ids=ids, use_cache=False).logits.float().softmax(-1)
        gains = ((steered - clean) * in_order).clamp_min(0)
        # What goes to words that are out of order breaks the text, so it counts twice against the position.
        broken = (steered * (clean < OUT_OF_ORDER)).sum(-1)
        score = gains.topk(NUM_WORDS, -1).values.sum(-1) - 2 * broken
        score[:, :FIRST_POSITION] = score[:, LAST_POSITION:] = -torch.inf
        score[ends] = -torch.inf
        row, column = divmod(int(score.argmax()), score.shape[1])
        trials.append(_trial_at(loaded, latent, ids[row, : column + 1], gains[row, column]))
    return sorted((one for one in trials if len(one.words) == NUM_WORDS), key=lambda one: -one.moved)


def _steering(loaded: LoadedSAE, dial: Dial) -> Steering:
    return Steering(edits(loaded, [dial], "add"))


def _stories(loaded: LoadedSAE) -> Tensor:
    """Token ids (stories, NUM_TOKENS) of the beginnings of unseen stories."""
    stories = StoryWorld(seed=2).documents(NUM_STORIES)
    ids = [loaded.tokenizer(story).input_ids[:NUM_TOKENS] for story in stories]
    return torch.tensor([row for row in ids if len(row) == NUM_TOKENS], device=loaded.model.device)


def _trial_at(loaded: LoadedSAE, latent: int, prompt: Tensor, gains: Tensor) -> Trial:
    moved, found = gains.topk(NUM_WORDS)
    tokens = tuple(token for token, gain in zip(found.tolist(), moved.tolist(), strict=True) if gain > MIN_GAIN)
    words = tuple(loaded.decode([token]).strip() for token in tokens)
    return Trial(latent, loaded.decode(prompt.tolist(), skip_special=True), words, tokens, moved.sum().item())


def _different(trials: Sequence[Trial]) -> list[Trial]:
    """Those that share neither words nor prompt with a better one."""
    seen: set[str] = set()
    kept = []
    for trial in trials:
        if not seen & {*trial.words, trial.prompt}:
            kept.append(trial)
            seen |= {*trial.words, trial.prompt}
    return kept


def _try(loaded: LoadedSAE, pipe: SteeredPipeline, trial: Trial) -> tuple[float, Preset] | None:
    """The preset at its best strength and how good it is, or None where no strength is good enough."""
    before, calm = _probability(loaded, pipe, trial, Steering()), _loss(loaded, pipe, trial, Steering())
    best: tuple[float, Preset] | None = None
    for share in SHARES:
        dial = Dial(trial.latent, starting_value(loaded, trial.latent, share))
        steering = _steering(loaded, dial)
        after, cost = _probability(loaded, pipe, trial, steering), _loss(loaded, pipe, trial, steering) - calm
        quality = after - before - COST_WEIGHT * max(0.0, cost)
        if after - before >= MIN_MOVED and cost <= MAX_COST and (best is None or quality > best[0]):
            why = f"Tried out: next comes one of these in {100 * after:.0f}% of texts instead of {100 * before:.0f}%."
            seed = _telling_seed(loaded, pipe, trial, steering)
            best = quality, Preset(", ".join(trial.words), (dial,), prompt=trial.prompt, seed=seed, why=why)
    return best


def _telling_seed(loaded: LoadedSAE, pipe: SteeredPipeline, trial: Trial, steering: Steering) -> int:
    """The first seed at which one of the words comes next when steered, and otherwise not; or 0."""
    prompts = [trial.prompt] * NUM_SEEDS
    settings: dict[str, Any] = {"seed": 0, "temperature": 0.7, "max_new_tokens": 1, "batch_size": NUM_SEEDS}
    both = [pipe.with_steering(one)(prompts, **settings) for one in (steering, Steering())]
    for seed, pair in enumerate(zip(*both, strict=True)):
        steered, plain = (one[0]["generated_text"].removeprefix(trial.prompt).strip() for one in pair)
        if steered in trial.words and plain not in trial.words:
            return seed
    return 0


@torch.inference_mode()
def _probability(loaded: LoadedSAE, pipe: SteeredPipeline, trial: Trial, steering: Steering) -> float:
    """The probability that one of the trial's words comes next."""
    ids = encode_text(loaded, trial.prompt)[None]
    with steering.on(pipe.model, loaded.sae, loaded.special_ids):
        probabilities = pipe.model(input_ids=ids, use_cache=False).logits[0, -1].float().softmax(-1)
    return probabilities[list(trial.tokens)].sum().item()


def _loss(loaded: LoadedSAE, pipe: SteeredPipeline, trial: Trial, steering: Steering) -> float:
    """The unsteered model's loss on texts written from the trial's prompt, in nats per token."""
    prompts = [trial.prompt] * NUM_TEXTS
    answers = pipe.with_steering(steering)(
        prompts, seed=0, temperature=0.7, max_new_tokens=NUM_NEW_TOKENS, batch_size=NUM_TEXTS
    )
    texts = [answer[0]["generated_text"].removeprefix(trial.prompt) for answer in answers]
    losses = [loss for text in texts if (loss := continuation_loss(loaded, trial.prompt, text)) is not None]
    return sum(losses) / max(1, len(losses))
