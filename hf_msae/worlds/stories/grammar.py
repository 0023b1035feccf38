"""The story world: endless small English stories, each a pure function of (seed, index), each word with its concepts.

Everything random about a story is a sequence of draws from finite tables, and the text can be read back into the
draws (no two frames can be written the same way, and nothing is drawn that is not written). So the probability of the
draws is the probability of the text, and its mean negative logarithm is the entropy that a language model of these
stories can reach and not beat.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import overload

from hf_msae.errors import InputError

from .adventures import ADVENTURES
from .concepts import CONCEPTS, ancestors
from .frames import COMMON_FRAMES
from .gatherings import GATHERINGS
from .labels import PRONOUNS, Span, concept_spans
from .plot import Plot
from .slots import PREPOSITIONS, SLOTS, Table, boosts_at, leaf_table

PLOTS: dict[str, Plot] = {**ADVENTURES, **GATHERINGS}

_SLOT = re.compile(r"\{([a-zA-Z0-9_]+)(\.[a-z]+)?(!?)\}")
_ARTICLE_AT_END = re.compile(r"\b[Aa] $")


@dataclass(frozen=True)
class _Part:
    """A stretch of fixed text and the slot after it (empty at the end of a frame)."""

    text: str
    takes_article: bool
    slot: str
    form: str


@dataclass(frozen=True)
class Frame:
    """A sentence with slots.

    Args:
        template: its text, with the slots in braces.
        parts: the template, taken apart.
        needs: the slots that must be filled before it can be used.
    """

    template: str
    parts: tuple[_Part, ...]
    needs: frozenset[str]


def _compile(template: str) -> Frame:
    parts, needs, end = [], set(), 0
    for match in _SLOT.finditer(template):
        text = template[end : match.start()]
        slot, form, must_be_known = match.group(1), (match.group(2) or "")[1:], match.group(3)
        parts.append(_Part(text, bool(_ARTICLE_AT_END.search(text)), slot, form))
        if must_be_known or (slot == "helper" and not form):
            needs.add(slot)
        end = match.end()
    parts.append(_Part(template[end:], False, "", ""))
    if any(part.slot == "helper" and part.form for part in parts):
        needs.discard("helper")
    return Frame(template, tuple(parts), frozenset(needs))


FRAMES: dict[str, tuple[Frame, ...]] = {
    **{role: tuple(_compile(text) for text in texts) for role, texts in COMMON_FRAMES.items()},
    **{
        f"{plot_name}.{role}": tuple(_compile(text) for text in texts)
        for plot_name, plot in PLOTS.items()
        for role, texts in plot.frames.items()
    },
}
"""Every frame by role; a plot's own roles begin with its name."""

# Of the slots filled so far, only these decide which frames can be used: so there are few tables of frames to keep.
_NEEDABLE = frozenset(slot for frames in FRAMES.values() for frame in frames for slot in frame.needs)

_PLOT_TABLE = Table.of({name: 1.0 / (rank + 4) for rank, name in enumerate(PLOTS)})
_NAME_OR_PRONOUN = Table.of({"hero": 0.4, "he": 0.6})
_ANY_HELPER = Table.of({"relative": 0.4, "expert": 0.35, "friend": 0.25})
_ADULT_HELPER = _ANY_HELPER.without({"friend"})


@cache
def _yes_no(probability: float) -> Table:
    return Table.of({"yes": probability, "no": 1.0 - probability})


@cache
def _frame_table(role: str, known: frozenset[str]) -> tuple[Table, tuple[Frame, ...]]:
    """The frames of a role that can be used when the slots `known` are filled, the first the likeliest."""
    usable = {frame: 1.0 / (rank + 4) for rank, frame in enumerate(FRAMES[role]) if frame.needs <= known}
    return Table.of({frame.template: weight for frame, weight in usable.items()}), tuple(usable)


@cache
def _place_table(plot: str) -> Table:
    return leaf_table(PLOTS[plot].places, {})


@cache
def _boosts(plot: str, place: str) -> dict[str, float]:
    return boosts_at(place, PLOTS[plot].boosts)


@cache
def _slot_table(slot: str, plot: str, place: str, excluded: frozenset[str]) -> Table:
    table = leaf_table(SLOTS[slot].nodes, _boosts(plot, place))
    return table.without(excluded) if excluded & set(table.items) else table


@cache
def _kind_word(name: str) -> str:
    """The nearest concept above `name` that has a word: what an owl is called when it is called a bird."""
    return next(CONCEPTS[above].word for above in ancestors(name) if CONCEPTS[above].words)


@cache
def _noun(name: str, form: str) -> str:
    """A slot's content in the form asked for."""
    node = CONCEPTS[name]
    if form == "s":
        if node.plural is None:
            raise InputError(f"the concept {name!r} has no plural, so a frame cannot ask for '.s'")
        return node.plural
    if form == "at":
        return f"{PREPOSITIONS.get(name, 'in')} the {node.word}"
    if form == "kind":
        return _kind_word(name)
    if form:
        raise InputError(f"a frame asks for the unknown form {form!r} of {name!r}; use s, at or kind")
    return node.word


def with_article(word: str) -> str:
    """`a` or `an`, as the sound of a word asks.

    Args:
        word: the word.
    """
    return "an" if word[0] in "aeiouAEIOU" or word == "honest" else "a"


@dataclass(frozen=True)
class Choice:
    """One draw.

    Args:
        point: what it decided: a role of `FRAMES`, a slot, or one of `plot`, `place`, `helper kind`, `name or pronoun`
            and `<act>?`.
        table: from which distribution.
        index: which item of it came.
    """

    point: str
    table: Table
    index: int

    @property
    def item(self) -> str:
        """What was drawn."""
        return self.table.items[self.index]


@dataclass(frozen=True)
class Story:
    """A story and the truth about it.

    Args:
        text: the story.
        facts: what fills each slot that was used (`hero`, `place`, `weather`, ...) and the `plot`.
        choices: all the draws that made the text.
    """

    text: str
    facts: dict[str, str]
    choices: tuple[Choice, ...] = field(repr=False)

    @property
    def spans(self) -> tuple[Span, ...]:
        """(start, end, concepts) in characters for every word that expresses concepts; see `concept_spans`."""
        return concept_spans(self.text)

    @property
    def log_prob(self) -> float:
        """The natural logarithm of the probability of this story among all stories."""
        return sum(choice.table.log_probs[choice.index] for choice in self.choices)


class _Teller:
    """Tells one story: draws, remembers what fills which slot, and writes."""

    def __init__(self, rng: random.Random) -> None:
        self._uniform = rng.random
        self.facts: dict[str, str] = {}
        self.choices: list[Choice] = []
        self._text: list[str] = []
        self._plot = ""
        self._place = ""
        self._pronouns: dict[str, str] = {}

    def _draw(self, point: str, table: Table) -> str:
        index = table.index(self._uniform())
        self.choices.append(Choice(point, table, index))
        return table.items[index]

    def tell(self) -> Story:
        self._plot = self.facts["plot"] = self._draw("plot", _PLOT_TABLE)
        self._place = self.facts["place"] = self._draw("place", _place_table(self._plot))
        side = ".out" if "outdoor_place" in ancestors(self._place) else ".in"
        plot = PLOTS[self._plot]
        for act, probability in plot.acts:
            if probability < 1.0 and self._draw(f"{act}?", _yes_no(probability)) == "no":
                continue
            role = f"{self._plot}.{act}" if act in plot.frames else act.replace("@", side)
            table, frames = _frame_table(role, _NEEDABLE.intersection(self.facts))
            self._draw(role, table)
            self._text.append(self._sentence(frames[self.choices[-1].index]))
        return Story(" ".join(self._text), self.facts, tuple(self.choices))

    def _fill(self, slot: str) -> str:
        """What fills the slot: drawn when it is first written, kept from then on."""
        if slot not in self.facts:
            taken = frozenset(self.facts[other] for other in SLOTS[slot].unlike if other in self.facts)
            self.facts[slot] = self._draw(slot, _slot_table(slot, self._plot, self._place, taken))
            if slot == "hero":
                self._pronouns = PRONOUNS[_gender(self.facts["hero"])]
        return self.facts[slot]

    def _hero_word(self, form: str) -> str:
        hero = self._fill("hero")
        if form == "H":
            form = self._draw("name or pronoun", _NAME_OR_PRONOUN)
        if form == "hero":
            return _noun(hero, "")
        return _kind_word(hero) if form == "child" else self._pronouns[form]

    def _helper_words(self, form: str) -> str:
        if "helper" not in self.facts:
            table = _ADULT_HELPER if form == "adult" or "friend" in self.facts else _ANY_HELPER
            self.facts["helper"] = self._draw("helper kind", table)
        kind = self.facts["helper"]
        word = _noun(self._fill(kind), "")
        if kind == "expert":
            return f"a {word}" if form else f"the {word}"
        if kind == "relative":
            return f"{self._hero_word('his')} {word}"
        return f"{self._hero_word('his')} friend {word}" if form else word

    def _words(self, slot: str, form: str) -> str:
        if slot in ("hero", "H", "he", "him", "his", "child"):
            return self._hero_word(slot)
        if slot == "helper":
            return self._helper_words(form)
        if form == "his":
            return PRONOUNS[_gender(self._fill(slot))]["his"]
        return _noun(self._fill(slot), form)

    def _sentence(self, frame: Frame) -> str:
        written = []
        for part in frame.parts:
            words = self._words(part.slot, part.form) if part.slot else ""
            is_an = part.takes_article and with_article(words) == "an"
            written.append(part.text[:-1] + "n " if is_an else part.text)
            written.append(words)
        text = "".join(written)
        return text[0].upper() + text[1:]


def _gender(name: str) -> str:
    return "female" if "female" in ancestors(name) else "male"


class StoryDocuments(Sequence[str]):
    """The texts of consecutive stories, made when asked for: a training set that takes no space.

    Args:
        world: the stories.
        indices: their numbers.
    """

    def __init__(self, world: "StoryWorld", indices: range) -> None:
        self._world = world
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> "StoryDocuments": ...

    def __getitem__(self, index: int | slice) -> "str | StoryDocuments":
        if isinstance(index, slice):
            return StoryDocuments(self._world, self._indices[index])
        return self._world.story(self._indices[index]).text


class StoryWorld:
    """All the stories of one seed.

    Stories of different seeds are independent draws from the same distribution.

    Args:
        seed: 0 or more.

    Raises:
        InputError: the seed is negative.
    """

    def __init__(self, seed: int = 0) -> None:
        if seed < 0:
            raise InputError(f"the seed of a StoryWorld must be 0 or more, got {seed}")
        self.seed = seed

    def story(self, index: int) -> Story:
        """One story: a pure function of seed and number.

        Args:
            index: its number, 0, 1, 2, ... without end.
        """
        if index < 0:
            raise InputError(f"stories are numbered from 0, got {index}")
        return _Teller(random.Random(f"hf_msae stories {self.seed} {index}")).tell()

    def documents(self, num_documents: int, start: int = 0) -> StoryDocuments:
        """The texts of consecutive stories, as a sequence.

        Args:
            num_documents: how many.
            start: the number of the first.
        """
        if num_documents < 0 or start < 0:
            raise InputError(f"num_documents and start must be 0 or more, got {num_documents} and {start}")
        return StoryDocuments(self, range(start, start + num_documents))
