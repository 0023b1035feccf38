"""Matryoshka sparse autoencoders for any Hugging Face language model.

Importing this package takes no time, and registers the model with transformers as soon as that is used, so that
`AutoModel.from_pretrained` loads it without remote code.
"""

from typing import TYPE_CHECKING

from hf_msae.importing import install, lazy_names

__version__ = "0.1.0"

install()

if TYPE_CHECKING:
    from hf_msae.concepts import evaluate_steering, find_latents
    from hf_msae.corpora import EncodedLatents, diff_corpora, encode_dataset
    from hf_msae.data import CachedActivations, cache_activations, load_documents, make_activation_cache
    from hf_msae.errors import HfMsaeError
    from hf_msae.evaluation import EvaluationArguments, collect, evaluate, run_evaluation
    from hf_msae.formats import convert
    from hf_msae.hub import SAEEntry, find_saes, list_saes, load_saes, pull, push_folder
    from hf_msae.interpret import Interpretation, find_hierarchy, interpret, scan
    from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
    from hf_msae.shared_caches import load_activation_cache, push_activation_cache
    from hf_msae.sites import Site, capture, resolve_site
    from hf_msae.steering import SteeredPipeline, Steering, load_steering, save_steering, steer
    from hf_msae.training import SAETrainer, SAETrainingArguments
else:
    _HOMES = {
        "hf_msae.concepts": ("evaluate_steering", "find_latents"),
        "hf_msae.corpora": ("EncodedLatents", "diff_corpora", "encode_dataset"),
        "hf_msae.data": ("CachedActivations", "cache_activations", "load_documents", "make_activation_cache"),
        "hf_msae.errors": ("HfMsaeError",),
        "hf_msae.evaluation": ("EvaluationArguments", "collect", "evaluate", "run_evaluation"),
        "hf_msae.formats": ("convert",),
        "hf_msae.hub": ("SAEEntry", "find_saes", "list_saes", "load_saes", "pull", "push_folder"),
        "hf_msae.interpret": ("Interpretation", "find_hierarchy", "interpret", "scan"),  # a room that can be called
        "hf_msae.modeling": ("MatryoshkaSAE", "MatryoshkaSAEConfig"),
        "hf_msae.shared_caches": ("load_activation_cache", "push_activation_cache"),
        "hf_msae.sites": ("Site", "capture", "resolve_site"),
        "hf_msae.steering": ("SteeredPipeline", "Steering", "load_steering", "save_steering", "steer"),
        "hf_msae.training": ("SAETrainer", "SAETrainingArguments"),
    }
    __getattr__, __dir__ = lazy_names(__name__, {name: home for home, names in _HOMES.items() for name in names})

__all__ = [
    "CachedActivations",
    "EncodedLatents",
    "EvaluationArguments",
    "HfMsaeError",
    "Interpretation",
    "MatryoshkaSAE",
    "MatryoshkaSAEConfig",
    "SAEEntry",
    "SAETrainer",
    "SAETrainingArguments",
    "Site",
    "SteeredPipeline",
    "Steering",
    "__version__",
    "cache_activations",
    "capture",
    "collect",
    "convert",
    "diff_corpora",
    "encode_dataset",
    "evaluate",
    "evaluate_steering",
    "find_hierarchy",
    "find_latents",
    "find_saes",
    "interpret",
    "list_saes",
    "load_activation_cache",
    "load_documents",
    "load_saes",
    "load_steering",
    "make_activation_cache",
    "pull",
    "push_activation_cache",
    "push_folder",
    "resolve_site",
    "run_evaluation",
    "save_steering",
    "scan",
    "steer",
]
