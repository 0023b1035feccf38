"""Which features fire together: a forest in which a feature can fire only where its parent fires.

The published toy hierarchies are all of this kind. Children of a parent fire independently of each other, or at most
one at a time. Because nothing else ties two features together, the probability of any two firing at once has a closed
form, against which a sampler, and whatever was learnt from its samples, can be checked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_msae.errors import InputError


@dataclass(frozen=True)
class Node:
    """A feature and what depends on it.

    Args:
        name: unique in its forest.
        probability: of firing where the parent fires (for a root: of firing).
        children: features that fire only where this one does.
        exclusive: whether at most one of the children fires at a time; their probabilities then sum to at most 1.
        magnitude: its mean strength where it fires.
    """

    name: str
    probability: float
    children: tuple["Node", ...] = ()
    exclusive: bool = False
    magnitude: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise InputError(f"The probability of feature {self.name!r} must be in (0, 1], got {self.probability}.")
        if not 0 < self.magnitude < float("inf"):
            raise InputError(
                f"The magnitude of feature {self.name!r} must be finite and above 0, got {self.magnitude}."
            )
        total = sum(child.probability for child in self.children)
        if self.exclusive and total > 1 + 1e-9:
            raise InputError(
                f"The children of {self.name!r} exclude each other, so their probabilities must sum to at most 1, "
                f"got {total:.4g}."
            )


@dataclass(frozen=True, eq=False)
class Forest:
    """Trees of features, as tables with a row per feature; a parent's row comes before its children's.

    Features are numbered in the order of their depth: all roots, then all their children, and so on.

    Args:
        roots: of the trees; the rest is made from them.

    Attributes:
        roots: as given.
        names: (num_features,).
        parents: row of each feature's parent, -1 for a root.
        depths: 0 for a root.
        conditional: probability of firing where the parent fires, float64.
        exclusive: whether a feature fires only where its siblings do not.
        magnitudes: (num_features,).
    """

    roots: tuple[Node, ...]
    names: list[str] = field(init=False)
    parents: Tensor = field(init=False)
    depths: Tensor = field(init=False)
    conditional: Tensor = field(init=False)
    exclusive: Tensor = field(init=False)
    magnitudes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rows = [(root, -1, 0, False) for root in self.roots]
        if not rows:
            raise InputError("A forest needs at least one feature, got no roots.")
        for row, (node, _, depth, _) in enumerate(rows):  # the list grows while it is read
            rows.extend((child, row, depth + 1, node.exclusive) for child in node.children)
        nodes, parents, depths, exclusive = zip(*rows, strict=True)
        names = [node.name for node in nodes]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise InputError(f"Features need names of their own; {', '.join(twice)} was given more than once.")
        tables = {
            "names": names,
            "parents": torch.tensor(parents),
            "depths": torch.tensor(depths),
            "conditional": torch.tensor([node.probability for node in nodes], dtype=torch.float64),
            "exclusive": torch.tensor(exclusive),
            "magnitudes": torch.tensor([node.magnitude for node in nodes], dtype=torch.float64),
        }
        for name, table in tables.items():
            object.__setattr__(self, name, table)

    @property
    def num_features(self) -> int:
        """The number of features."""
        return len(self.names)

    @property
    def edges(self) -> list[tuple[int, int]]:
        """(parent, child) rows."""
        return [(parent, child) for child, parent in enumerate(self.parents.tolist()) if parent >= 0]

    def children(self, row: int) -> list[int]:
        """Rows of a feature's children.

        Args:
            row: of the feature.
        """
        return (self.parents == row).nonzero().flatten().tolist()

    @property
    def probabilities(self) -> Tensor:
        """Probability of each feature firing: the product of what stands on the path to it, (num_features,)."""
        values = self.conditional.clone()
        for parent, child in self.edges:
            values[child] *= values[parent]
        return values

    @property
    def l0(self) -> float:
        """Mean number of features that fire at once."""
        return self.probabilities.sum().item()

    @property
    def joint_probabilities(self) -> Tensor:
        """Probability of features i and j firing at once, (num_features, num_features).

        The diagonal is each one's own. Let c be the nearest common ancestor (or nothing at all, which always fires).
        Where i is c, j firing implies i, and the probability is P(j). Else the paths part at two children of c. If
        these exclude each other it is 0, otherwise i and j are independent given c, and it is P(i) P(j) / P(c).
        """
        p = self.probabilities
        lineages = [self._lineage(row) for row in range(self.num_features)]
        joint = torch.zeros(self.num_features, self.num_features, dtype=torch.float64)
        for i, first in enumerate(lineages):
            for j, second in enumerate(lineages):
                shared = sum(a == b for a, b in zip(first, second, strict=False))
                if shared in (len(first), len(second)):
                    joint[i, j] = min(p[i], p[j])
                elif not self.exclusive[first[shared]]:
                    joint[i, j] = p[i] * p[j] / (p[first[shared - 1]] if shared else 1.0)
        return joint

    def _lineage(self, row: int) -> list[int]:
        """Rows from the root down to a feature."""
        path = [row]
        while (parent := int(self.parents[path[0]])) >= 0:
            path.insert(0, parent)
        return path


def random_forest(
    seed: int,
    *,
    num_roots: int = 6,
    depth: int = 2,
    branching: int = 3,
    branching_share: float = 0.5,
    exclusive_share: float = 0.5,
    root_probability: tuple[float, float] = (0.05, 0.2),
    child_probability: tuple[float, float] = (0.1, 0.3),
    magnitude: tuple[float, float] = (0.8, 1.25),
) -> Forest:
    """A forest drawn at random.

    Args:
        seed: the same seed gives the same forest.
        num_roots: how many trees.
        depth: levels of features in the deepest tree; 1 makes all features independent.
        branching: most children of a feature that has any; it has from 2 (or `branching`, if that is less) on.
        branching_share: share of features above the last level that have children; the first root always has.
        exclusive_share: share of those whose children exclude each other.
        root_probability: the lowest and highest value, drawn evenly between.
        child_probability: the same for children; those of children that exclude each other are scaled down where they
            would sum to more than 1.
        magnitude: the lowest and highest mean strength, drawn evenly between.

    Raises:
        InputError: a count is below 1, or a share or probability outside [0, 1].
    """
    for name, count in (("num_roots", num_roots), ("depth", depth), ("branching", branching)):
        if count < 1:
            raise InputError(f"{name} must be at least 1, got {count}.")
    for name, share in (("branching_share", branching_share), ("exclusive_share", exclusive_share)):
        if not 0 <= share <= 1:
            raise InputError(f"{name} must be in [0, 1], got {share}.")
    for name, (low, high) in (("root_probability", root_probability), ("child_probability", child_probability)):
        if not 0 < low <= high <= 1:
            raise InputError(f"{name} must be (lowest, highest) in (0, 1], got {(low, high)}.")
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

    def grow(name: str, probability: float, levels_below: int) -> Node:
        # Drawn whether or not they are needed, so that a forest does not change shape with the shares.
        splits, exclusive = draw(0, 1) < branching_share or name == "0", draw(0, 1) < exclusive_share
        count = int(torch.randint(min(2, branching), branching + 1, (), generator=generator))
        chances = [draw(*child_probability) for _ in range(count)]
        scale = min(1.0, 1 / sum(chances)) if exclusive else 1.0
        children = [
            grow(f"{name}.{i}", chance * scale, levels_below - 1)
            for i, chance in enumerate(chances if splits and levels_below else [])
        ]
        return Node(name, probability, tuple(children), exclusive, draw(*magnitude))

    return Forest(tuple(grow(str(i), draw(*root_probability), depth - 1) for i in range(num_roots)))


def group(name: str, probability: float, children: Sequence[float], exclusive: bool) -> Node:
    """A parent and its children, named after it.

    Args:
        name: of the parent.
        probability: of the parent.
        children: the probability of each child given the parent.
        exclusive: whether at most one child fires at a time.
    """
    nodes = tuple(Node(f"{name}.{i}", chance) for i, chance in enumerate(children))
    return Node(name, probability, nodes, exclusive)
