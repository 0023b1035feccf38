"""Worlds without a language model: activations made of known features in a known hierarchy."""

from typing import TYPE_CHECKING

from hf_msae.importing import lazy_names

if TYPE_CHECKING:
    from hf_msae.research.toys.arguments import ToyArguments
    from hf_msae.research.toys.sampling import FeatureWorld, Samples, make_directions
    from hf_msae.research.toys.synth_bench import SynthBenchSettings, SynthBenchWorld
    from hf_msae.research.toys.toys import TOYS, Toy
    from hf_msae.research.toys.trees import Forest, Node, group, random_forest
else:
    # The arguments are read by a command, before anything that takes time is imported.
    _HOMES = {
        "hf_msae.research.toys.arguments": ("ToyArguments",),
        "hf_msae.research.toys.sampling": ("FeatureWorld", "Samples", "make_directions"),
        "hf_msae.research.toys.synth_bench": ("SynthBenchSettings", "SynthBenchWorld"),
        "hf_msae.research.toys.toys": ("TOYS", "Toy"),
        "hf_msae.research.toys.trees": ("Forest", "Node", "group", "random_forest"),
    }
    __getattr__, __dir__ = lazy_names(__name__, {name: home for home, names in _HOMES.items() for name in names})

__all__ = [
    "TOYS",
    "FeatureWorld",
    "Forest",
    "Node",
    "Samples",
    "SynthBenchSettings",
    "SynthBenchWorld",
    "Toy",
    "ToyArguments",
    "group",
    "make_directions",
    "random_forest",
]
