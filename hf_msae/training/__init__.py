"""Training Matryoshka SAEs on the activations of a language model."""

from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.checkpoints import CheckpointError
from hf_msae.training.trainer import SAETrainer, TrainingDiverged, TrainingInterrupted

__all__ = ["CheckpointError", "SAETrainer", "SAETrainingArguments", "TrainingDiverged", "TrainingInterrupted"]
