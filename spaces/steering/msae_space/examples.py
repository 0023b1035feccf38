"""Latents of a concept that a visitor gives by examples, one a line: what is read, and the search in a thread.

A search runs the language model over the examples some hundred times, on a free Space's two cores too. So what it may
cost is bounded, it says what it does, and it ends when nobody listens.
"""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_msae.concepts import Finding, find_latents
from hf_msae.concepts.examples import MIN_EXAMPLES
from hf_msae.steering import LatentEdit
from hf_msae.worlds.stories import STORIES, StoryWorld
from msae_space import validation
from msae_space.loaded_sae import LoadedSAE, SpaceError, own_modules
from msae_space.strengths import MAX_STRENGTH, Dial, has_maximum
from msae_space.zerogpu import find_zerogpu, on_gpu

# Of each kind; characters of all of a kind; tokens of an example that are read.
MAX_EXAMPLES, MAX_EXAMPLES_TEXT, EXAMPLE_TOKENS = 60, 8_000, 48
MAX_WORDS_TO_SAY, MAX_LATENTS = 12, 5
# Latents that are pushed one by one, and tokens of neutral text on which they are.
NUM_CANDIDATES, NEUTRAL_TOKENS, NUM_STORIES, BATCH_SIZE = 8, 512, 40, 8

POSITIVE = """A small dog ran to the gate.
The owl had hurt its leg.
She saw a white fox under a pine.
A sheep stood in the way.
The cat slept on a chair.
In a basket lay an owl with three babies.
A horse looked at him with big eyes.
The rabbit jumped out of the box.
He gave some bread to the ducks at the pond.
A beetle walked slowly along the wall.
The dog followed him all the way home.
There was a noise, and a bear came out."""
NEGATIVE = """She put on her red boots.
The lamp on the table was broken.
On Saturday, he went to the river with his father.
A drum lay in the way.
The scarf was on a chair.
In a basket lay a hat with three holes.
His mother looked at him and laughed.
The ball fell out of the box.
He had some bread and a cup of milk.
The train went slowly along the wall.
The rain did not stop until he was home.
There was a noise, and a doctor came out."""
WORDS = "dog, fox, owl"


@dataclass(frozen=True)
class Asked:
    """What is looked for; `asked` checks it."""

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    words: tuple[str, ...] = ()
    max_latents: int = MAX_LATENTS


class _Ended(Exception):
    """Nobody listens any more."""


def asked(positive: Any, negative: Any, words: Any, max_latents: Any) -> Asked:
    """What a visitor has typed: examples one a line, words between commas.

    Raises:
        SpaceError: There are too few examples or too many, or a value is none that the page sends.
    """
    count = validation.whole(max_latents, "The number of latents", 1, MAX_LATENTS)
    listed = validation.words(words, "The words", validation.MAX_WORDS).split(",")
    to_say = tuple(dict.fromkeys(word.strip() for word in listed if word.strip()))
    if len(to_say) > MAX_WORDS_TO_SAY:
        raise SpaceError(f"There are {len(to_say)} words to say; this page takes up to {MAX_WORDS_TO_SAY}.")
    return Asked(_lines(positive, "positive"), _lines(negative, "negative"), to_say, count)


def _lines(value: Any, kind: str) -> tuple[str, ...]:
    text = validation.words(value, f"What the {kind} examples are", MAX_EXAMPLES_TEXT)
    found = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if len(found) < MIN_EXAMPLES:
        raise SpaceError(
            f"There are {len(found)} different {kind} examples, and {MIN_EXAMPLES} are needed, one a line; add some."
        )
    if len(found) > MAX_EXAMPLES:
        raise SpaceError(f"There are {len(found)} {kind} examples; this page takes up to {MAX_EXAMPLES} of each kind.")
    return found


def search(loaded: LoadedSAE, what: Asked) -> Iterator[str | Finding]:
    """Look for latents in a thread, which ends when whoever reads along stops. What it raises is raised here.

    Args:
        loaded: The SAE and its language model.
        what: Is looked for.

    Yields:
        What is done next, in words, and at last what was found.
    """
    news: queue.SimpleQueue[str | Finding | BaseException] = queue.SimpleQueue()
    ended = threading.Event()

    def tell(words: str) -> None:
        if ended.is_set():
            raise _Ended
        news.put(words)

    def work() -> None:
        try:
            news.put(_find(loaded, what, tell))
        except BaseException as error:  # a thread's exception would reach nobody
            news.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            found = news.get()
            if isinstance(found, BaseException):
                raise found
            yield found
            if isinstance(found, Finding):
                return
    finally:
        ended.set()
        thread.join()


lent_search = on_gpu(search)


def _find(loaded: LoadedSAE, what: Asked, tell: Any) -> Finding:
    # Modules of its own, which meet no visitor's hooks; a process that ZeroGPU forks has them anyway.
    model = own_modules(loaded.language.untouched) if find_zerogpu() is None else loaded.model
    stories = loaded.sae.config.base_model == STORIES
    return find_latents(
        model,
        loaded.tokenizer,
        loaded.sae,
        list(what.positive),
        list(what.negative),
        # Where there is text of the model's own kind, effects are measured on it.
        neutral=StoryWorld(seed=2).documents(NUM_STORIES) if stories else None,
        words=what.words,
        max_latents=what.max_latents,
        num_candidates=NUM_CANDIDATES,
        neutral_tokens=NEUTRAL_TOKENS,
        context_length=EXAMPLE_TOKENS,
        lm_batch_size=BATCH_SIZE,
        refuse_swapped=True,
        on_progress=tell,
    )


def dials_of(loaded: LoadedSAE, finding: Finding) -> tuple[Dial, ...]:
    """The steering that was found, as sliders give it."""
    edits = (edit for edit in finding.steering.edits if isinstance(edit, LatentEdit))  # it has no others
    return tuple(Dial(edit.latent, _strength(loaded, edit.latent, edit.value)) for edit in edits)


def _strength(loaded: LoadedSAE, latent: int, activation: float) -> float:
    """What an activation of the latent is in the unit of its slider."""
    if has_maximum(loaded, latent):
        value = activation / loaded.maxima[latent]
    else:
        value = activation * loaded.row_norms[latent] / loaded.mean_norm
    return round(max(-MAX_STRENGTH, min(value, MAX_STRENGTH)), 3)


def listed(examples: Any) -> str:
    """Examples of a program as a visitor types them; each is one line.

    Raises:
        SpaceError: They are no list of texts.
    """
    if not isinstance(examples, list | tuple) or not all(isinstance(one, str) for one in examples):
        raise SpaceError("Examples are a list of texts.")
    return "\n".join(" ".join(one.split()) for one in examples)
