"""The concept tree of the story world: what can be spoken of, under what it falls, and how it is written.

The tree is the ground truth that probes, absorption, splitting and recovered hierarchies are judged against, so it is
plain data with two rules that keep labels crisp. A concept has one parent, so a word's concepts are one path to a
root. A surface form (a word as written) belongs to one concept, so a word never needs its context to be labelled;
"he" and "she" carry the gender of whom they stand for, and "it" carries nothing.

Siblings are listed from common to rare: the weight of the r-th child is 1 / r (Zipf), so a world of these concepts
has the long tail that makes absorption and dead latents appear.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from hf_msae.errors import InputError

# One line a parent, its children after it from common to rare. `*` stands above the roots. A name with an underscore
# is a kind that no word of the stories names; every other name is also a word.
TREE = """
* > person animal food place action feeling toy tool vehicle plant clothing colour weather calendar_time trait
* > size_kind container furniture number instrument material
person > female male worker
female > girl woman
male > boy man
girl > Lily Mia Anna Emma Zoe Nora Ella Kate Sue Ivy
boy > Tom Ben Max Sam Leo Jack Tim Finn Peter Hugo
woman > mother grandmother aunt
man > father grandfather uncle
worker > teacher farmer baker gardener doctor driver librarian sailor painter shopkeeper
animal > furry_animal bird insect pond_animal
furry_animal > pet farm_animal wild_animal
pet > dog cat rabbit hamster
farm_animal > cow sheep horse pig goat donkey
wild_animal > fox squirrel mouse deer hedgehog bear
bird > owl songbird water_bird hen
songbird > robin sparrow finch crow
water_bird > duck goose swan
insect > bee butterfly beetle moth ladybug
pond_animal > frog turtle fish snail toad
food > fruit baked_food vegetable dish drink ingredient
fruit > apple berry pear banana plum peach lemon
berry > strawberry blueberry raspberry blackberry
baked_food > cake pie bun muffin cookie tart pancake
vegetable > carrot potato pumpkin onion cabbage turnip
dish > soup stew porridge salad
drink > milk juice tea cocoa lemonade
ingredient > flour sugar butter honey salt
place > outdoor_place indoor_place
outdoor_place > nature_place town_place
nature_place > forest river beach meadow hill lake pond field
town_place > park garden market farm playground harbour zoo station
indoor_place > room building
room > kitchen bedroom attic garage cellar
building > school library bakery museum barn shop
weather > fine_weather wet_weather cold_weather
fine_weather > sunny mild bright breezy
wet_weather > rainy stormy cloudy foggy
cold_weather > snowy windy frosty chilly
calendar_time > time_of_day weekday
time_of_day > morning afternoon evening
weekday > Saturday Sunday Friday Monday Wednesday Tuesday Thursday
feeling > good_feeling bad_feeling
good_feeling > joyful_feeling quiet_feeling
joyful_feeling > happy glad excited merry
quiet_feeling > proud calm thankful relieved
bad_feeling > sad_feeling fear_feeling anger_feeling
sad_feeling > sad lonely upset unhappy
fear_feeling > scared worried nervous afraid
anger_feeling > angry cross grumpy
trait > warm_trait bold_trait
warm_trait > kind gentle polite honest
bold_trait > brave clever curious cheerful
tool > garden_tool workshop_tool kitchen_tool
garden_tool > spade rake shovel hoe
workshop_tool > hammer rope ladder wrench screwdriver
kitchen_tool > spoon pan whisk ladle
vehicle > land_vehicle water_vehicle air_vehicle
land_vehicle > bus car bike train truck tractor
water_vehicle > boat ship raft ferry canoe
air_vehicle > plane balloon helicopter glider
colour > warm_colour cool_colour neutral_colour
warm_colour > red yellow orange pink
cool_colour > blue green purple
neutral_colour > white brown black grey
size_kind > small_size large_size
small_size > small little tiny
large_size > big tall huge
toy > outdoor_toy indoor_toy
outdoor_toy > ball kite hoop
indoor_toy > doll robot puzzle puppet
clothing > headwear outerwear
headwear > hat cap bonnet crown
outerwear > scarf coat jacket sweater
plant > flower tree
flower > daisy tulip poppy sunflower violet
tree > oak pine willow maple birch
container > basket box bag jar bucket bowl
furniture > table chair bench bed shelf
instrument > drum string_instrument wind_instrument
string_instrument > violin guitar harp
wind_instrument > flute trumpet whistle
material > wood paper wool clay
number > three four five six seven
action > speaking_action moving_action sensing_action making_action showing_action
speaking_action > say ask call shout whisper
moving_action > go run walk climb jump
sensing_action > see look hear find
making_action > make bake build paint repair
showing_action > smile laugh cry hug
"""

_PLURALS = {
    "mouse": "mice",
    "goose": "geese",
    "fox": "foxes",
    "peach": "peaches",
    "bench": "benches",
    "box": "boxes",
    "bus": "buses",
    "birch": "birches",
    "shelf": "shelves",
    "woman": "women",
    "man": "men",
    "potato": "potatoes",
    "wrench": "wrenches",
    "sheep": "sheep",
    "deer": "deer",
    "fish": "fish",
}

_VERB_FORMS = {
    "say": "said",
    "ask": "asked",
    "call": "called",
    "shout": "shouted",
    "whisper": "whispered",
    "go": "went going",
    "run": "ran running",
    "walk": "walked walking",
    "climb": "climbed",
    "jump": "jumped jumping",
    "see": "saw seen",
    "look": "looked looking",
    "hear": "heard",
    "find": "found",
    "make": "made making",
    "bake": "baked baking",
    "build": "built",
    "paint": "painted painting",
    "repair": "repaired",
    "smile": "smiled smiling",
    "laugh": "laughed laughing",
    "cry": "cried crying",
    "hug": "hugged",
}

_COUNTED_ROOTS = {"person", "animal", "food", "place", "toy", "tool", "vehicle", "plant", "clothing", "container"} | {
    "furniture",
    "instrument",
}
_MASS_KINDS = {"dish", "drink", "ingredient"}


@dataclass(frozen=True)
class Concept:
    """One node of the tree.

    Args:
        name: unique in the tree.
        parent: the name of its parent, None for a root.
        weight: its Zipf weight among its siblings (1 / rank).
        words: the forms that express it, the base form first; empty for a kind that no word names (`farm_animal`).
        plural: None for what is not counted.
    """

    name: str
    parent: str | None
    weight: float
    words: tuple[str, ...]
    plural: str | None

    @property
    def word(self) -> str:
        """The base form; an `InputError` for a kind without a word."""
        if not self.words:
            raise InputError(f"no word names the concept {self.name!r}; ask for the word of one of its children")
        return self.words[0]


def _plural(name: str) -> str:
    if name in _PLURALS:
        return _PLURALS[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def _words(name: str, path: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
    """The forms of a concept and its plural, given its path of ancestors (parent first)."""
    if "_" in name:
        return (), None
    if name in _VERB_FORMS:
        return (name, *_VERB_FORMS[name].split()), None
    is_counted = (path[-1] if path else name) in _COUNTED_ROOTS and not _MASS_KINDS & {name, *path}
    if not is_counted or name[0].isupper():
        return (name,), None
    plural = _plural(name)
    return (name, plural) if plural != name else (name,), plural


def _read_tree() -> dict[str, Concept]:
    edges: dict[str, list[str]] = {}
    for line in TREE.split("\n"):
        if line:
            parent, _, names = line.partition(" > ")
            edges.setdefault(parent, []).extend(names.split())
    concepts: dict[str, Concept] = {}

    def add(parent: str, path: tuple[str, ...]) -> None:
        for rank, name in enumerate(edges.get(parent, ()), start=1):
            words, plural = _words(name, path)
            concepts[name] = Concept(name, path[0] if path else None, 1.0 / rank, words, plural)
            add(name, (name, *path))

    add("*", ())
    return concepts


CONCEPTS: dict[str, Concept] = _read_tree()
"""Every concept by name, parents before children."""

CONCEPT_OF_WORD: dict[str, str] = {word: concept.name for concept in CONCEPTS.values() for word in concept.words}
"""The one concept that a surface form expresses."""


def concept(name: str) -> Concept:
    """The concept of a name.

    Args:
        name: such as "owl".

    Raises:
        InputError: there is none.
    """
    if name not in CONCEPTS:
        raise InputError(f"{name!r} is no concept of the story world; CONCEPTS has them all, such as 'owl'")
    return CONCEPTS[name]


@cache
def ancestors(name: str) -> tuple[str, ...]:
    """The concepts above one, the parent first and the root last; empty for a root.

    Args:
        name: of the concept.
    """
    parent = concept(name).parent
    return () if parent is None else (parent, *ancestors(parent))


@cache
def path(name: str) -> tuple[str, ...]:
    """A concept and its ancestors: all that a word for it expresses.

    Args:
        name: of the concept.
    """
    return (name, *ancestors(name))


@cache
def children(name: str) -> tuple[str, ...]:
    """The concepts right under one, from common to rare; empty for a leaf.

    Args:
        name: of the concept.
    """
    concept(name)
    return tuple(child.name for child in CONCEPTS.values() if child.parent == name)


@cache
def leaves(name: str | None = None) -> tuple[str, ...]:
    """The concepts without children under one; a leaf is its own only leaf.

    Args:
        name: of the concept; by default those of the whole tree.
    """
    if name is None:
        return tuple(leaf for root in roots() for leaf in leaves(root))
    below = children(name)
    return tuple(leaf for child in below for leaf in leaves(child)) if below else (name,)


def roots() -> tuple[str, ...]:
    """The concepts without a parent."""
    return tuple(name for name, node in CONCEPTS.items() if node.parent is None)


def depth(name: str) -> int:
    """The number of concepts above one: 0 for a root.

    Args:
        name: of the concept.
    """
    return len(ancestors(name))


def edges() -> Iterator[tuple[str, str]]:
    """All (parent, child) pairs: the hierarchy that a dictionary's recovered edges are compared with."""
    return ((node.parent, name) for name, node in CONCEPTS.items() if node.parent is not None)
