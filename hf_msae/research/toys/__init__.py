"""Worlds without a language model: activations made of known features in a known hierarchy."""

from hf_msae.research.toys.sampling import FeatureWorld, Samples, make_directions
from hf_msae.research.toys.toys import TOYS, Toy
from hf_msae.research.toys.trees import Forest, Node, group, random_forest

__all__ = [
    "TOYS",
    "FeatureWorld",
    "Forest",
    "Node",
    "Samples",
    "Toy",
    "group",
    "make_directions",
    "random_forest",
]
