"""The toy hierarchies of the literature, and a random one.

Each comes with what its source trains on it: number of latents, prefixes, and the weight that balances them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hf_msae.research.toys.sampling import FeatureWorld
from hf_msae.research.toys.trees import Forest, Node, group, random_forest


@dataclass(frozen=True)
class Toy:
    """A world and the SAE that its source trains on it.

    Args:
        world: of the features.
        prefix_sizes: nested sizes for fixed prefixes; the last is the number of latents.
        balance: c of the weights c^(levels inward) for the balanced variant.
    """

    world: FeatureWorld
    prefix_sizes: tuple[int, ...]
    balance: float

    @property
    def num_latents(self) -> int:
        """The number of latents."""
        return self.prefix_sizes[-1]


def tree(seed: int = 0) -> Toy:
    """Nabeshima's tree ("Matryoshka Sparse Autoencoders", 2024): 20 orthogonal features in 20 dimensions.

    Three parents of probability 0.15, each with three children that exclude each other, of probability 0.2 given the
    parent, and eight independent features of probability 0.05; strengths vary by 5% between features. Mean L0 is 1.12.
    He samples the prefixes; the fixed ones here are the package's default fractions, which know nothing of the tree.

    Args:
        seed: of the directions and strengths.
    """
    parents = [group(f"parent {i}", 0.15, (0.2, 0.2, 0.2), exclusive=True) for i in range(3)]
    singles = [Node(f"single {i}", 0.05) for i in range(8)]
    world = FeatureWorld(Forest((*parents, *singles)), 20, magnitude_spread=0.05, seed=seed)
    return Toy(world, (1, 2, 5, 10, 20), balance=0.75)


def parent(seed: int = 0) -> Toy:
    """A parent and two children in 20 dimensions with prefixes 1 and 3.

    It is the smallest toy in which a narrow prefix mixes children into their parent (comments under Nabeshima's post;
    the probabilities 0.3 and 0.3 are ours).

    Args:
        seed: of the directions.
    """
    world = FeatureWorld(Forest((group("parent", 0.3, (0.3, 0.3), exclusive=False),)), 20, seed=seed)
    return Toy(world, (1, 3), balance=0.25)


def absorption(seed: int = 0) -> Toy:
    """The absorption toy of arXiv:2409.14507: four features in 50 dimensions.

    One has a probability of 0.25 and three have 0.05, the second only where the first fires.

    Args:
        seed: of the directions.
    """
    nodes = (group("parent", 0.25, (0.2,), exclusive=False), Node("single 0", 0.05), Node("single 1", 0.05))
    return Toy(FeatureWorld(Forest(nodes), 50, seed=seed), (1, 4), balance=0.25)


def hedging(seed: int = 0) -> Toy:
    """The hedging and balancing toy of arXiv:2505.11756: a parent and three children in 50 dimensions.

    The parent has a probability of 0.25, the children, independent given the parent, of 0.15. Prefixes are 1 and 4; an
    inner weight of 0.25 is shown there as nearly perfect.

    Args:
        seed: of the directions.
    """
    forest = Forest((group("parent", 0.25, (0.15, 0.15, 0.15), exclusive=False),))
    return Toy(FeatureWorld(forest, 50, seed=seed), (1, 4), balance=0.25)


def random(seed: int = 0) -> Toy:
    """A random forest of three levels, whose directions interfere; a new one with every seed.

    Strengths vary from sample to sample, and there is a little noise. As many latents as features.

    Args:
        seed: of the forest, the directions and strengths.
    """
    forest = random_forest(seed, num_roots=6, depth=3)
    world = FeatureWorld(forest, 64, orthogonal=False, sample_spread=0.3, noise=0.01, seed=seed)
    n = forest.num_features
    sizes = sorted({max(1, n // part) for part in (16, 8, 4, 2, 1)})
    return Toy(world, tuple(sizes), balance=0.75)


TOYS: dict[str, Callable[..., Toy]] = {
    "tree": tree,
    "parent": parent,
    "absorption": absorption,
    "hedging": hedging,
    "random": random,
}
