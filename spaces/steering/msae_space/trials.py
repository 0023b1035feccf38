"""Presets for the story model, found by trying latents out.

A latent steers well where the text leaves a place open: after "He had a new", any toy is in order, and a small push
decides which. So each promising latent is put to many places of unseen stories in one forward pass; the place where it
moves most probability between words that were in order anyway becomes its prompt. The best are then tried in earnest:
texts are written from that prompt at several strengths, and a preset is kept only if its words become much likelier
and the unsteered model is not much more surprised by the texts.
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
from msae_space import asked
from msae_space.links import MAX_SEED
from msae_space.presets import NUM_PRESETS, NUM_WORDS, Preset, is_word, promoting
from msae_space.reading import encode_text, surprise
from msae_space.strengths import MAX_DIALS, MAX_STRENGTH, METHODS, Dial, edits, starting_value
from msae_space.workbench import SpaceError, Workbench

NUM_STORIES, NUM_TOKENS, FIRST_PLACE, LAST_PLACE = 32, 36, 8, 32
NUM_CANDIDATES, NUM_TRIED, NUM_TEXTS, NUM_NEW_TOKENS, NUM_SEEDS = 160, 16, 4, 30, 12
ENDS = (".", "!", "?")
PLACE_SHARE, SHARES = 0.5, (0.35, 0.45)
# A word is in order where the unsteered model gives it this probability, and out of order below the second.
IN_ORDER, OUT_OF_ORDER = 0.004, 0.001
# Words that make up more of all text than this (was, had, she) say nothing about a story.
MAX_SHARE_OF_TEXT = 0.004
# Probability that a word has to gain, and all of a preset's words together.
MIN_GAIN, MIN_MOVED = 0.01, 0.1
# In nats per token, beyond what the model's own text has; and how much probability a nat is worth.
MAX_COST, COST_WEIGHT = 1.0, 0.2


@dataclass(frozen=True)
class Place:
    """Where a latent decides something. moved: how much probability it moves there to `words`, which are `tokens`."""

    latent: int
    prompt: str
    words: tuple[str, ...]
    tokens: tuple[int, ...]
    moved: float


def tried(bench: Workbench, model: PreTrainedModel, found: Interpretation, path: Path) -> list[Preset]:
    """The presets, the most telling first, kept in the file `path` for the next start."""
    kept = _kept(bench, path)
    if kept is not None:
        return kept
    candidates = [latent for latent, _ in promoting(bench, found)[:NUM_CANDIDATES]]
    places = _different(find_places(bench, model, candidates))[:NUM_TRIED]
    pipe = SteeredPipeline(model, bench.tokenizer, bench.sae, Steering())
    ranked = [one for place in places if (one := _try(bench, pipe, place)) is not None]
    ranked.sort(key=lambda one: -one[0])
    presets = [preset for _, preset in ranked[:NUM_PRESETS]]
    with atomic_file(path) as draft:
        draft.write_text(json.dumps([asdict(preset) for preset in presets]), encoding="utf-8")
    return presets


def _kept(bench: Workbench, path: Path) -> list[Preset] | None:
    """Those of an earlier start, None where there are none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [_preset(bench, values) for values in found]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # SpaceError is a ValueError
        return None


def _preset(bench: Workbench, values: dict[str, Any]) -> Preset:
    """A preset as `tried` wrote it. Raises TypeError, KeyError or SpaceError for anything else."""
    dials = [
        Dial(
            bench.checked(asked.whole(latent, "A latent", 0, asked.MAX_NUMBER)),
            asked.number(value, "A strength", -MAX_STRENGTH, MAX_STRENGTH),
        )
        for latent, value in values["dials"]
    ]
    if not 0 < len(dials) <= MAX_DIALS:
        raise SpaceError(f"A preset has 1 to {MAX_DIALS} dials.")
    return Preset(
        name=asked.words(values["name"], "The name"),
        dials=tuple(dials),
        method=asked.choice(values["method"], "method", METHODS),
        prompt=asked.words(values["prompt"], "The prompt"),
        seed=asked.whole(values["seed"], "The seed", 0, MAX_SEED),
        why=asked.words(values["why"], "The reason"),
    )


@torch.inference_mode()
def find_places(bench: Workbench, model: PreTrainedModel, candidates: Sequence[int]) -> list[Place]:
    """For each latent the place where it moves most probability between words that are in order, best first."""
    ids = _stories(bench)
    clean = model(input_ids=ids, use_cache=False).logits.float().softmax(-1)
    words = torch.tensor([is_word(bench.decode([token])) for token in range(clean.shape[-1])], device=clean.device)
    in_order = (clean > IN_ORDER) & words & (clean.mean((0, 1)) < MAX_SHARE_OF_TEXT)
    # Where a sentence begins, almost any word is in order, and none says much.
    ends = torch.tensor([[bench.decode([token]).strip()[-1:] in ENDS for token in row] for row in ids.tolist()])
    places = []
    for latent in candidates:
        value = starting_value(bench, latent, PLACE_SHARE)
        with _steering(bench, Dial(latent, value)).on(model, bench.sae, bench.special_ids):
            steered = model(input_ids=ids, use_cache=False).logits.float().softmax(-1)
        gains = ((steered - clean) * in_order).clamp_min(0)
        # What goes to words that are out of order breaks the text, so it counts twice against the place.
        broken = (steered * (clean < OUT_OF_ORDER)).sum(-1)
        score = gains.topk(NUM_WORDS, -1).values.sum(-1) - 2 * broken
        score[:, :FIRST_PLACE] = score[:, LAST_PLACE:] = -torch.inf
        score[ends] = -torch.inf
        row, column = divmod(int(score.argmax()), score.shape[1])
        places.append(_place(bench, latent, ids[row, : column + 1], gains[row, column]))
    return sorted((one for one in places if len(one.words) == NUM_WORDS), key=lambda one: -one.moved)


def _steering(bench: Workbench, dial: Dial) -> Steering:
    return Steering(edits(bench, [dial], "add"))


def _stories(bench: Workbench) -> Tensor:
    """Token ids (stories, NUM_TOKENS) of the beginnings of unseen stories."""
    stories = StoryWorld(seed=2).documents(NUM_STORIES)
    ids = [bench.tokenizer(story).input_ids[:NUM_TOKENS] for story in stories]
    return torch.tensor([row for row in ids if len(row) == NUM_TOKENS], device=bench.model.device)


def _place(bench: Workbench, latent: int, prompt: Tensor, gains: Tensor) -> Place:
    moved, found = gains.topk(NUM_WORDS)
    tokens = tuple(token for token, gain in zip(found.tolist(), moved.tolist(), strict=True) if gain > MIN_GAIN)
    words = tuple(bench.decode([token]).strip() for token in tokens)
    return Place(latent, bench.decode(prompt.tolist(), skip_special=True), words, tokens, moved.sum().item())


def _different(places: Sequence[Place]) -> list[Place]:
    """Those that share neither words nor prompt with a better one."""
    seen: set[str] = set()
    kept = []
    for place in places:
        if not seen & {*place.words, place.prompt}:
            kept.append(place)
            seen |= {*place.words, place.prompt}
    return kept


def _try(bench: Workbench, pipe: SteeredPipeline, place: Place) -> tuple[float, Preset] | None:
    """The preset at its best strength and how good it is, or None where no strength is good enough."""
    before, calm = _chance(bench, pipe, place, Steering()), _loss(bench, pipe, place, Steering())
    best: tuple[float, Preset] | None = None
    for share in SHARES:
        dial = Dial(place.latent, starting_value(bench, place.latent, share))
        steering = _steering(bench, dial)
        after, cost = _chance(bench, pipe, place, steering), _loss(bench, pipe, place, steering) - calm
        quality = after - before - COST_WEIGHT * max(0.0, cost)
        if after - before >= MIN_MOVED and cost <= MAX_COST and (best is None or quality > best[0]):
            why = f"Tried out: next comes one of these in {100 * after:.0f}% of texts instead of {100 * before:.0f}%."
            seed = _telling_seed(bench, pipe, place, steering)
            best = quality, Preset(", ".join(place.words), (dial,), prompt=place.prompt, seed=seed, why=why)
    return best


def _telling_seed(bench: Workbench, pipe: SteeredPipeline, place: Place, steering: Steering) -> int:
    """The first seed at which one of the words comes next when steered, and otherwise not; or 0."""
    prompts = [place.prompt] * NUM_SEEDS
    settings: dict[str, Any] = {"seed": 0, "temperature": 0.7, "max_new_tokens": 1, "batch_size": NUM_SEEDS}
    both = [pipe.with_steering(one)(prompts, **settings) for one in (steering, Steering())]
    for seed, pair in enumerate(zip(*both, strict=True)):
        steered, plain = (one[0]["generated_text"].removeprefix(place.prompt).strip() for one in pair)
        if steered in place.words and plain not in place.words:
            return seed
    return 0


@torch.inference_mode()
def _chance(bench: Workbench, pipe: SteeredPipeline, place: Place, steering: Steering) -> float:
    """The probability that one of the place's words comes next."""
    ids = encode_text(bench, place.prompt)[None]
    with steering.on(pipe.model, bench.sae, bench.special_ids):
        probabilities = pipe.model(input_ids=ids, use_cache=False).logits[0, -1].float().softmax(-1)
    return probabilities[list(place.tokens)].sum().item()


def _loss(bench: Workbench, pipe: SteeredPipeline, place: Place, steering: Steering) -> float:
    """How surprised the unsteered model is by texts from the place's prompt, in nats per token."""
    prompts = [place.prompt] * NUM_TEXTS
    answers = pipe.with_steering(steering)(
        prompts, seed=0, temperature=0.7, max_new_tokens=NUM_NEW_TOKENS, batch_size=NUM_TEXTS
    )
    texts = [answer[0]["generated_text"].removeprefix(place.prompt) for answer in answers]
    losses = [loss for text in texts if (loss := surprise(bench, place.prompt, text)) is not None]
    return sum(losses) / max(1, len(losses))
