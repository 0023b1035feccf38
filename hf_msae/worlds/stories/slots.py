"""What may fill a slot of a frame, and how the place of a story bends what is likely there.

A slot names the nodes of the concept tree whose leaves it may hold, and the slots whose content it must not repeat.
The nodes of a slot are equally likely; below them the tree's Zipf weights decide, each multiplied by the boosts of
the story's plot and place. So owls and oaks come together in forests, and ships and sailors in harbours. As a slot
holds one thing for a whole story, a story has at most one weather, one time of day and one instrument: siblings
exclude each other.
"""

import math
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from .concepts import CONCEPTS, children, path


@dataclass(frozen=True)
class Table:
    """A finite distribution to draw from.

    Args:
        items: what is drawn.
        probs: their probabilities, which are positive and sum to 1.
    """

    items: tuple[str, ...]
    probs: tuple[float, ...]

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> "Table":
        """The distribution proportional to weights; what has the weight 0 is left out.

        Args:
            weights: by the item.
        """
        total = math.fsum(weights.values())
        probs = {item: weight / total for item, weight in weights.items() if weight > 0.0}
        return cls(tuple(probs), tuple(probs.values()))

    @cached_property
    def log_probs(self) -> tuple[float, ...]:
        """The natural logarithms of the probabilities."""
        return tuple(math.log(p) for p in self.probs)

    @cached_property
    def _cumulative(self) -> tuple[float, ...]:
        return tuple(accumulate(self.probs))[:-1]

    def index(self, uniform: float) -> int:
        """The item that a number drawn uniformly from [0, 1) selects.

        Args:
            uniform: the number.
        """
        return bisect_right(self._cumulative, uniform)

    def without(self, excluded: Collection[str]) -> "Table":
        """The same distribution given that none of some items is drawn.

        Args:
            excluded: these items.
        """
        return Table.of({item: p for item, p in zip(self.items, self.probs, strict=True) if item not in excluded})


@dataclass(frozen=True)
class Slot:
    """What may fill a slot.

    Args:
        nodes: whose leaves may fill it.
        unlike: slots that it must differ from where they are filled first.
    """

    nodes: tuple[str, ...]
    unlike: tuple[str, ...] = ()


def _slot(nodes: str, unlike: str = "") -> Slot:
    return Slot(tuple(nodes.split()), tuple(unlike.split()))


SLOTS: dict[str, Slot] = {
    "hero": _slot("girl boy"),
    "friend": _slot("girl boy", "hero"),
    "relative": _slot("woman man"),
    "giver": _slot("woman man", "relative"),
    "guest": _slot("woman man", "relative giver"),
    "worker": _slot("worker", "expert job"),
    "worker2": _slot("worker", "worker expert job"),
    "finder": _slot("worker", "worker expert job"),
    "expert": _slot("worker", "worker worker2 finder job"),
    "job": _slot("worker", "worker expert"),
    "trait": _slot("trait"),
    "trait2": _slot("trait", "trait"),
    "size": _slot("size_kind"),
    "size2": _slot("size_kind", "size"),
    "number": _slot("number"),
    "number2": _slot("number", "number"),
    "favourite": _slot("colour"),
    "colour": _slot("colour", "favourite"),
    "colour2": _slot("colour", "favourite colour"),
    "neutral": _slot("neutral_colour"),
    "good": _slot("good_feeling"),
    "good2": _slot("good_feeling", "good"),
    "bad": _slot("bad_feeling"),
    "weather": _slot("weather"),
    "time": _slot("time_of_day"),
    "weekday": _slot("weekday"),
    "weekday2": _slot("weekday", "weekday"),
    "place2": _slot("forest river beach hill lake farm harbour", "place"),
    "shop": _slot("market shop farm", "place"),
    "indoors": _slot("kitchen attic barn garage library", "place"),
    "pet": _slot("pet", "victim thief robber"),
    "bird": _slot("bird"),
    "songbird": _slot("songbird", "victim"),
    "water_bird": _slot("water_bird", "victim"),
    "insect": _slot("insect"),
    "farm": _slot("farm_animal"),
    "wild": _slot("wild_animal"),
    "animal": _slot("furry_animal bird pond_animal"),
    "victim": _slot("pet wild_animal songbird owl water_bird", "pet songbird water_bird"),
    "thief": _slot("dog fox squirrel goat", "pet"),
    "robber": _slot("dog fox squirrel goat bear goose", "pet farm"),
    "pest": _slot("rabbit mouse deer goat snail beetle crow", "pet farm insect songbird"),
    "noisy": _slot("cat owl mouse hedgehog toad moth duck rabbit", "pet insect"),
    "imagined": _slot("bear fox horse goose"),
    "hoarse": _slot("farm_animal water_bird crow"),
    "slow": _slot("snail turtle"),
    "dreamt": _slot("animal vehicle"),
    "fruit": _slot("fruit"),
    "baked": _slot("baked_food"),
    "vegetable": _slot("vegetable"),
    "dish": _slot("dish"),
    "drink": _slot("drink"),
    "ingredient": _slot("ingredient"),
    "ingredient2": _slot("ingredient", "ingredient"),
    "crop": _slot("vegetable flower", "flower"),
    "flower": _slot("flower", "crop"),
    "tree": _slot("tree"),
    "tool": _slot("garden_tool workshop_tool", "garden_tool"),
    "garden_tool": _slot("garden_tool"),
    "kitchen_tool": _slot("kitchen_tool"),
    "thing": _slot("toy clothing", "worn toy2"),
    "toy": _slot("toy", "toy2"),
    "toy2": _slot("toy", "toy thing"),
    "present": _slot("toy clothing", "toy2 worn"),
    "find": _slot("kitchen_tool indoor_toy headwear", "thing toy2 worn kitchen_tool"),
    "worn": _slot("clothing"),
    "worn2": _slot("clothing", "worn thing present"),
    "container": _slot("container"),
    "container2": _slot("container", "container"),
    "furniture": _slot("furniture"),
    "furniture2": _slot("furniture", "furniture"),
    "vessel": _slot("bucket bowl jar"),
    "seat": _slot("chair bench bed"),
    "instrument": _slot("instrument"),
    "material": _slot("material"),
    "land": _slot("land_vehicle"),
    "air": _slot("air_vehicle"),
    "water_vehicle": _slot("water_vehicle"),
    "ride": _slot("land_vehicle water_vehicle", "land"),
    "machine": _slot("land_vehicle boat", "land"),
}

PREPOSITIONS: dict[str, str] = {
    **dict.fromkeys(("beach", "river", "lake", "pond", "market", "harbour", "station", "farm"), "at"),
    **dict.fromkeys(("school", "bakery", "museum", "zoo"), "at"),
    **dict.fromkeys(("hill", "playground"), "on"),
}
"""The word before a place where something happens; `in` where none is given."""

PLACE_BOOSTS: dict[str, dict[str, float]] = {
    "nature_place": {"wild_animal": 2.0, "insect": 1.5, "flower": 1.5},
    "forest": {"wild_animal": 4.0, "owl": 4.0, "tree": 3.0, "berry": 6.0, "sparrow": 3.0, "oak": 2.0},
    "river": {"water_bird": 5.0, "pond_animal": 4.0, "fish": 4.0, "willow": 6.0, "water_vehicle": 4.0, "canoe": 5.0},
    "beach": {"water_vehicle": 5.0, "sailor": 6.0, "sunny": 3.0, "bucket": 6.0, "goose": 3.0, "ball": 2.0, "hat": 2.0},
    "meadow": {"insect": 3.0, "butterfly": 3.0, "poppy": 4.0, "farm_animal": 3.0, "finch": 4.0},
    "hill": {"sheep": 5.0, "goat": 5.0, "kite": 6.0, "windy": 6.0, "breezy": 4.0, "pine": 4.0, "glider": 8.0},
    "lake": {"water_bird": 5.0, "swan": 6.0, "pond_animal": 3.0, "water_vehicle": 4.0, "canoe": 4.0, "foggy": 4.0},
    "pond": {"pond_animal": 6.0, "frog": 3.0, "duck": 4.0, "toad": 4.0, "moth": 2.0},
    "field": {"horse": 4.0, "tractor": 6.0, "crow": 6.0, "farmer": 6.0, "mouse": 3.0, "cabbage": 3.0},
    "park": {"squirrel": 4.0, "bench": 6.0, "bike": 5.0, "ball": 3.0, "maple": 3.0},
    "garden": {"gardener": 8.0, "tulip": 3.0, "snail": 5.0, "hedgehog": 4.0, "spade": 3.0},
    "market": {"shopkeeper": 5.0, "baker": 3.0, "fruit": 2.0, "plum": 4.0, "basket": 4.0},
    "farm": {"farmer": 8.0, "farm_animal": 5.0, "hen": 6.0, "tractor": 8.0, "pumpkin": 4.0, "milk": 3.0},
    "playground": {"ball": 4.0, "hoop": 5.0, "bench": 4.0, "lemonade": 4.0, "bike": 3.0},
    "harbour": {
        "sailor": 10.0,
        "water_vehicle": 8.0,
        "ship": 4.0,
        "fish": 6.0,
        "rope": 5.0,
        "foggy": 4.0,
        "goose": 3.0,
    },
    "zoo": {"bear": 8.0, "turtle": 5.0, "donkey": 3.0, "balloon": 4.0, "banana": 5.0},
    "station": {"driver": 8.0, "train": 8.0, "bus": 3.0, "bench": 4.0, "bag": 5.0},
    "indoor_place": {"cat": 2.0, "mouse": 3.0, "rainy": 2.0, "fine_weather": 0.4},
    "kitchen": {"kitchen_tool": 6.0, "spoon": 2.0, "bowl": 6.0, "table": 3.0, "soup": 2.0, "cake": 2.0},
    "bedroom": {"bed": 8.0, "doll": 3.0, "cocoa": 4.0, "moth": 4.0, "evening": 3.0},
    "attic": {"box": 4.0, "puppet": 5.0, "moth": 5.0, "owl": 3.0, "violin": 3.0, "stormy": 3.0},
    "garage": {"car": 4.0, "bike": 3.0, "workshop_tool": 4.0, "wrench": 5.0, "hammer": 2.0, "driver": 3.0},
    "cellar": {"jar": 6.0, "shelf": 5.0, "toad": 5.0, "potato": 3.0, "apple": 2.0},
    "school": {"teacher": 12.0, "chair": 3.0, "puzzle": 3.0, "flute": 3.0, "Monday": 5.0},
    "library": {"librarian": 20.0, "shelf": 8.0, "chair": 2.0, "Wednesday": 5.0},
    "bakery": {"baker": 15.0, "baked_food": 2.0, "bun": 4.0, "flour": 3.0, "morning": 3.0},
    "museum": {"painter": 8.0, "ship": 4.0, "crown": 6.0, "Sunday": 4.0, "harp": 5.0},
    "barn": {"farmer": 6.0, "farm_animal": 4.0, "horse": 4.0, "ladder": 4.0, "owl": 4.0, "hen": 4.0, "bucket": 4.0},
    "shop": {"shopkeeper": 12.0, "toy": 2.0, "bag": 4.0, "robot": 3.0, "Saturday": 4.0},
}
"""By place (or kind of place): how many times likelier a concept is among its siblings."""


def boosts_at(place: str, plot_boosts: Mapping[str, float]) -> dict[str, float]:
    """The boosts of a plot times those of a place and of the kinds of place that it falls under.

    Args:
        place: the name of a concept.
        plot_boosts: by the name of a concept.
    """
    boosts = dict(plot_boosts)
    for node in path(place):
        for name, factor in PLACE_BOOSTS.get(node, {}).items():
            boosts[name] = boosts.get(name, 1.0) * factor
    return boosts


def leaf_table(nodes: Sequence[str], boosts: Mapping[str, float]) -> Table:
    """The distribution over the leaves under nodes: a walk down the tree, Zipf weight times boost at each step.

    Args:
        nodes: names of concepts.
        boosts: by the name of a concept.
    """
    probs: dict[str, float] = {}

    def descend(name: str, prob: float) -> None:
        below = children(name)
        if not below:
            probs[name] = probs.get(name, 0.0) + prob
        weights = [CONCEPTS[child].weight * boosts.get(child, 1.0) for child in below]
        for child, weight in zip(below, weights, strict=True):
            descend(child, prob * weight / sum(weights))

    for node in nodes:
        descend(node, boosts.get(node, 1.0))
    return Table.of(probs)
