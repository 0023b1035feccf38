"""A directed graph of parents and children between an SAE's levels, with what speaks for each edge, and its exports.

`hf_msae.interpret.edges` finds it and says what the numbers mean.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_msae.errors import InputError
from hf_msae.interpret.function_words import is_function_word
from hf_msae.modeling.untrusted import parse_json

# So many of a latent's children tell whether it is the sum of a few kinds.
NUM_LARGEST = 5
# A child is a part of its parent that has so much of its firings there, and at most so many for one of the parent's.
PART_COVERAGE, PART_SIZE = 0.9, 0.5
# What fields are called in the files, where that is another word.
KEYS = {
    "parent_firing_rate": "base_rate",
    "parent_gain": "parent_use",
    "child_gain": "child_use",
    "min_gain": "min_use",
}


@dataclass(frozen=True)
class HierarchySettings:
    """Thresholds of the filters that `hf_msae.interpret.edges` describes.

    Args:
        min_firings: tokens on which a latent has to fire to be looked at.
        min_shared: tokens that parent and child share.
        min_coverage: P(parent | child).
        false_discovery_rate: bound on the share of false discoveries.
        min_score: how far above chance coverage lies on the way to 1.
        min_gain: what each takes from the squared error on the shared tokens, as a share of the energy.
        min_strength: the parent's mean activation on the shared tokens over its typical one.
        residual_quantile: of the scores of shuffled pairs, which a pair's must exceed.
        super_parent_share: the share of later latents from which on a parent is a super-parent.
        seed: of the shuffled pairs.
    """

    min_firings: int = 20
    min_shared: int = 30
    min_coverage: float = 0.5
    false_discovery_rate: float = 0.01
    min_score: float = 0.5
    min_gain: float = 0.0
    min_strength: float = 0.9
    residual_quantile: float = 0.95
    super_parent_share: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("min_coverage", "false_discovery_rate", "min_score", "min_gain", "residual_quantile"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise InputError(f"{name} must be between 0 and 1, got {value}")


@dataclass(frozen=True)
class Edge:
    """A parent and a child, and what speaks for it.

    Args:
        parent: a latent of an earlier level.
        child: a latent of a later one.
        shared: tokens on which both fire.
        coverage: P(parent | child).
        parent_firing_rate: P(parent).
        lift: coverage over the parent's firing rate.
        log_odds: natural logarithm of the odds ratio.
        p_value: of the one-sided test that the log odds exceed 0.
        score: excess of coverage over chance, from 0 to 1.
        parent_gain: by how much the squared error on the shared tokens would grow without the parent, as a share of
            the activations' energy there.
        child_gain: the same of the child.
        strength: the parent's mean activation on the shared tokens over its typical one, which is the mean of all its
            activations, each weighed by itself.
        residual: the cosine of the residual test.
    """

    parent: int
    child: int
    shared: int
    coverage: float
    parent_firing_rate: float
    lift: float
    log_odds: float
    p_value: float
    score: float
    parent_gain: float
    child_gain: float
    strength: float
    residual: float


@dataclass(frozen=True)
class Hierarchy:
    """Edges from earlier to later levels, the highest score first.

    Args:
        edges: parents and children, with what speaks for each pair.
        prefix_sizes: of the SAE.
        counts: tokens on which each latent fires.
        num_tokens: of how many tokens.
        survivors: how many pairs are eligible, and how many of them pass each filter and those before it.
        residual_threshold: what shuffled pairs reach.
        super_parents: latents to read with care.
        settings: that it was found with.
    """

    edges: list[Edge]
    prefix_sizes: list[int]
    counts: list[int]
    num_tokens: int
    survivors: dict[str, int]
    residual_threshold: float
    super_parents: list[int]
    settings: HierarchySettings = field(default_factory=HierarchySettings)

    def children(self, latent: int) -> list[Edge]:
        """The edges to a latent's children, those that make up most of it first.

        Args:
            latent: its number.
        """
        return list(self._by_parent.get(latent, ()))

    def parents(self, latent: int) -> list[Edge]:
        """The edges from a latent's parents.

        Args:
            latent: its number.
        """
        return [edge for edge in self.edges if edge.child == latent]

    def share(self, edge: Edge) -> float:
        """P(child | parent): the share of the parent's firings that the child makes up.

        Args:
            edge: between them.
        """
        return edge.shared / self.counts[edge.parent]

    def roots(self, names: Sequence[str] | None = None) -> list[int]:
        """Latents with children and without parents, the easiest to understand first.

        These are those of which a few children make up the most. The number of children would put the least specific
        latents first.

        Args:
            names: of all latents. Children whose names begin alike then count as one, and those whose names begin as
                their parent's not at all, because a latent that splits into contexts of one word says less than one
                that splits into kinds. Roots that are named by function words or punctuation come last.
        """

        def kind(latent: int) -> str:
            return str(latent) if names is None else _kind(names[latent])

        with_parents = {edge.child for edge in self.edges}
        explained: dict[int, float] = {}
        for root in self._by_parent.keys() - with_parents:
            kinds: dict[str, float] = {}
            for edge in self._by_parent[root]:
                kinds.setdefault(kind(edge.child), self.share(edge))
            kinds.pop(kind(root), None)
            explained[root] = sum(list(kinds.values())[:NUM_LARGEST])
        return sorted(explained, key=lambda latent: (is_function_word(kind(latent)), -explained[latent], latent))

    def is_split(self, edge: Edge, names: Sequence[str]) -> bool:
        """Whether a child is a part of what its parent stands for, and no other thing.

        Their names begin alike, the child fires hardly anywhere else, and on at most half as many tokens.

        Args:
            edge: between them.
            names: of all latents.
        """
        alike = _kind(names[edge.parent]) == _kind(names[edge.child])
        small = self.counts[edge.child] <= PART_SIZE * self.counts[edge.parent]
        return alike and small and edge.coverage >= PART_COVERAGE

    def descendants(self) -> dict[int, set[int]]:
        """All latents below each latent that has children."""
        below: dict[int, set[int]] = {}
        # Children come after their parents in the dictionary, so that the last parents are complete first.
        for edge in sorted(self.edges, key=lambda edge: -edge.parent):
            below.setdefault(edge.parent, set()).update({edge.child}, below.get(edge.child, ()))
        return below

    def reduced(self) -> "Hierarchy":
        """The same without the edges that a longer path implies: where animal → bird → owl is, animal → owl goes."""
        below = self.descendants()
        implied: dict[int, set[int]] = {}
        for edge in self.edges:
            implied.setdefault(edge.parent, set()).update(below.get(edge.child, ()))
        return replace(self, edges=[edge for edge in self.edges if edge.child not in implied[edge.parent]])

    def level(self, latent: int) -> int:
        """The index of the first prefix that has a latent.

        Args:
            latent: its number.
        """
        return next(level for level, size in enumerate(self.prefix_sizes) if latent < size)

    @cached_property
    def _by_parent(self) -> dict[int, list[Edge]]:
        found: dict[int, list[Edge]] = {}
        for edge in sorted(self.edges, key=lambda edge: (-edge.shared, edge.child)):
            found.setdefault(edge.parent, []).append(edge)
        return found

    def at_least(self, min_score: float) -> "Hierarchy":
        """The same with only the edges of at least a score.

        Args:
            min_score: from 0 to 1.
        """
        return replace(self, edges=[edge for edge in self.edges if edge.score >= min_score])

    def to_json(self) -> str:
        """All of it; `from_json` is the inverse."""
        values = asdict(self)
        values["edges"] = [_renamed(edge, KEYS) for edge in values["edges"]]
        values["settings"] = _renamed(values["settings"], KEYS)
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> "Hierarchy":
        """Read what `to_json` wrote.

        Args:
            text: JSON.

        Raises:
            InputError: it is anything else.
        """
        try:
            values = parse_json(text, "The file")
            fields = {key: name for name, key in KEYS.items()}
            values["edges"] = [Edge(**_renamed(edge, fields)) for edge in values["edges"]]
            values["settings"] = HierarchySettings(**_renamed(values["settings"], fields))
            found = cls(**values)
            _check(found)
            return found
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"This is no hierarchy as Hierarchy.to_json writes it: {error!s:.200}") from error

    def save(self, path: str | Path) -> None:
        """Write it as Graphviz where the name ends in .dot or .gv, else as JSON.

        Args:
            path: of the file.
        """
        path = Path(path)
        path.write_text(self.to_graphviz() if path.suffix in (".dot", ".gv") else self.to_json(), encoding="utf-8")

    def to_graphviz(self, names: Mapping[int, str] | None = None) -> str:
        """A digraph in the DOT language, one rank a level, edges as thick as their score.

        Args:
            names: of some latents.
        """
        names = names or {}
        latents = sorted({latent for edge in self.edges for latent in (edge.parent, edge.child)})
        lines = ["digraph hierarchy {", "  rankdir=LR;", "  node [shape=box];"]
        for level in sorted({self.level(latent) for latent in latents}):
            lines.append("  { rank=same;")
            for latent in latents:
                if self.level(latent) == level:
                    label = f"{latent}\n{names[latent]}" if latent in names else str(latent)
                    # JSON's strings are DOT's: the same quotes, and \n for a new line.
                    lines.append(f"    {latent} [label={json.dumps(label, ensure_ascii=False)}];")
            lines.append("  }")
        lines += [f"  {e.parent} -> {e.child} [penwidth={0.5 + 2.5 * e.score:.2f}];" for e in self.edges]
        return "\n".join([*lines, "}"]) + "\n"


def _kind(name: str) -> str:
    """The first word of a latent's name."""
    return name.casefold().partition(",")[0]


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}


def _check(hierarchy: Hierarchy) -> None:
    """Refuse edges between latents that there are not, and values that are no numbers."""
    sizes, counts = hierarchy.prefix_sizes, hierarchy.counts
    numbers = [*sizes, *counts, hierarchy.num_tokens, *hierarchy.super_parents, *hierarchy.survivors.values()]
    if not sizes or any(type(number) is not int or number < 0 for number in numbers):
        raise TypeError("sizes, counts, tokens, survivors and super-parents are whole numbers")
    if len(counts) != sizes[-1] or max(counts) > hierarchy.num_tokens or not hierarchy.num_tokens:
        raise InputError(f"{len(counts):,} counts of {hierarchy.num_tokens:,} tokens, for {sizes[-1]:,} latents")
    if not _is_number(hierarchy.residual_threshold):
        raise TypeError("the threshold of the residual is no number")
    for edge in hierarchy.edges:
        ends = (edge.parent, edge.child, edge.shared)
        if any(type(end) is not int for end in ends) or not all(map(_is_number, vars(edge).values())):
            raise TypeError("an edge holds a value that is no number")
        # Edges go from earlier latents to later ones, so that no walk along them ends where it began.
        between = 0 <= edge.parent < edge.child < len(counts) and counts[edge.parent]
        if not between or not 0 <= edge.shared <= hierarchy.num_tokens:
            raise InputError(
                f"an edge goes from {edge.parent} to {edge.child} with {edge.shared} tokens, of {len(counts):,}"
            )


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)
