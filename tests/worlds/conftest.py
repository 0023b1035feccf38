"""Stories, the language model that tells them, and a reader that finds out which choices made a story."""

import re
from collections.abc import Callable, Iterable
from functools import cache

import pytest

from hf_msae.worlds.stories import CONCEPTS, Story, StoryWorld, ancestors, leaves, load_story_lm
from hf_msae.worlds.stories.grammar import FRAMES, PLOTS, Frame
from hf_msae.worlds.stories.slots import PREPOSITIONS, SLOTS


@pytest.fixture(scope="session")
def stories() -> list[Story]:
    """500 stories."""
    world = StoryWorld(11)
    return [world.story(i) for i in range(500)]


@pytest.fixture(scope="session")
def story_lm():
    """The shipped model and its tokenizer."""
    return load_story_lm()


@pytest.fixture(scope="session")
def readings() -> Callable[[str], list[tuple[str, ...]]]:
    """All the ways to read a text as a story: for each, its frames in order."""
    return _readings


def _alternatives(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(set(words), key=len, reverse=True)) + ")"


@cache
def _slot_pattern(slot: str, form: str) -> str:
    """What a slot can look like, whatever fills the others: wider than the truth, so that one reading means one."""
    pronouns = {"he": ["he", "she"], "him": ["him", "her"], "his": ["his", "her"]}
    people = [CONCEPTS[leaf].word for leaf in leaves("girl") + leaves("boy")]
    if slot in pronouns or form == "his":
        return _alternatives(pronouns[form or slot])
    if slot == "H":
        return _alternatives(people + pronouns["he"])
    if slot == "child":
        return _alternatives(["girl", "boy"])
    if slot == "helper":
        relatives = [f"{p} {name}" for p in pronouns["his"] for name in leaves("woman") + leaves("man")]
        workers = [f"{'a' if form else 'the'} {name}" for name in leaves("worker")]
        friends = [f"{p} friend {name}" for p in pronouns["his"] for name in people] if form else people
        return _alternatives(relatives + workers + friends)
    nodes = ("place",) if slot == "place" else SLOTS[slot].nodes
    names = [leaf for node in nodes for leaf in leaves(node)]
    if form == "kind":
        return _alternatives(
            CONCEPTS[above].words[0] for name in names for above in ancestors(name) if CONCEPTS[above].words
        )
    if form == "at":
        return _alternatives(f"{PREPOSITIONS.get(name, 'in')} the {name}" for name in names)
    return _alternatives((CONCEPTS[name].plural or "") if form == "s" else CONCEPTS[name].word for name in names)


@cache
def _frame_pattern(frame: Frame) -> re.Pattern[str]:
    pattern = ""
    for part in frame.parts:
        text = re.escape(part.text)
        pattern += (text[:-2] + r"n?\ " if part.takes_article else text) + (
            _slot_pattern(part.slot, part.form) if part.slot else ""
        )
    return re.compile(pattern + "(?: |$)", re.IGNORECASE)


def _readings(text: str) -> list[tuple[str, ...]]:
    """All the ways to read a text as a story: for each, its frames in order."""
    found: list[tuple[str, ...]] = []

    def read(name: str, side: str, position: int, act_index: int, so_far: tuple[str, ...]) -> None:
        acts = PLOTS[name].acts
        if act_index == len(acts):
            if position == len(text):
                found.append(so_far)
            return
        act, probability = acts[act_index]
        if probability < 1.0:
            read(name, side, position, act_index + 1, so_far)
        for frame in FRAMES[f"{name}.{act}" if act in PLOTS[name].frames else act.replace("@", side)]:
            match = _frame_pattern(frame).match(text, position)
            if match:
                read(name, side, match.end(), act_index + 1, (*so_far, frame.template))

    for name in PLOTS:
        for side in (".in", ".out"):
            read(name, side, 0, 0, ())
    return found
