"""Training Matryoshka SAEs on the activations of a language model."""

from typing import TYPE_CHECKING

from hf_msae.importing import lazy_names

if TYPE_CHECKING:
    from hf_msae.training.arguments import SAETrainingArguments
    from hf_msae.training.checkpoints import CheckpointError
    from hf_msae.training.grid import make_saes
    from hf_msae.training.recipes import RECIPES
    from hf_msae.training.run import TrainingInterrupted
    from hf_msae.training.trainer import SAETrainer, TrainingDiverged
else:
    # The arguments are read by commands, before anything that takes time is imported.
    _HOMES = {
        "hf_msae.training.arguments": ("SAETrainingArguments",),
        "hf_msae.training.checkpoints": ("CheckpointError",),
        "hf_msae.training.grid": ("make_saes",),
        "hf_msae.training.recipes": ("RECIPES",),
        "hf_msae.training.run": ("TrainingInterrupted",),
        "hf_msae.training.trainer": ("SAETrainer", "TrainingDiverged"),
    }
    __getattr__, __dir__ = lazy_names(__name__, {name: home for home, names in _HOMES.items() for name in names})

__all__ = [
    "RECIPES",
    "CheckpointError",
    "SAETrainer",
    "SAETrainingArguments",
    "TrainingDiverged",
    "TrainingInterrupted",
    "make_saes",
]
