"""A run small enough to be tried many times: eight steps of 64 tokens of the random LM."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.sites import Site
from hf_msae.training import SAETrainer, SAETrainingArguments
from hf_msae.training.learner import Learner, make_learners
from hf_msae.training.run import Run
from hf_msae.training.schedules import Length

SETTINGS = {
    "max_steps": 8,
    "per_device_train_batch_size": 64,
    "block_tokens": 300,
    "eval_tokens": 400,
    "calibration_tokens": 200,
    "ce_tokens": 0,
    "context_length": 32,
    "save_steps": 4,
    "disable_tqdm": True,
    "use_cpu": True,
}


def make_sae(**changes: Any) -> MatryoshkaSAE:
    """The same weights every time."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_latents": 64, "prefix_sizes": [8, 64], "k": 4, "site": "layers.0"}
    return MatryoshkaSAE(MatryoshkaSAEConfig(**(shape | changes)))


def make_trainer(
    lm,
    tokenizer,
    dataset: Any,
    folder: Path,
    sae: Any = None,
    eval_dataset: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    **changes: Any,
) -> SAETrainer:
    """A trainer that writes to a folder, or where the changes to the settings say."""
    args = SAETrainingArguments(**({"output_dir": str(folder)} | SETTINGS | changes))
    sae = make_sae() if sae is None else sae
    return SAETrainer(lm, sae, args, dataset, eval_dataset, processing_class=tokenizer, callbacks=callbacks)


def make_learner(device: torch.device, tokens: int = 96, length: int = 20, **changes: Any) -> Learner:
    """The same at every call, on a device; changes are those of the run's arguments or of the SAE's configuration."""
    torch.manual_seed(0)
    of_run = {field.name: changes.pop(field.name) for field in fields(SAETrainingArguments) if field.name in changes}
    options = {"hidden_size": 16, "num_latents": 64, "prefix_sizes": [8, 24, 64], "k": 4}
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**(options | changes)))
    run = Run(SAETrainingArguments(per_device_train_batch_size=tokens, use_cpu=True, **of_run))
    run.device = device
    return make_learners(run, {"sae": sae}, {"sae": Site("layers.0")}, Length(length))[0]
