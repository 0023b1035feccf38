"""A run of several real processes for the tests beside this file: what starts it, and what each process executes.

A plan says which SAEs are trained, a whole grid in one run because a run takes longer than an SAE more, on a cache of
activations, on one of the Hub at a commit for each process, or on texts and a model. It may set constants of hf_msae's
modules, such as the size of a message. With "dry_run", the main process first writes to this path what `--dry-run`
says, by a clock that ticks once whenever it is read.
"""

import importlib
import itertools
import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from warm_processes import run_together


def launch(num_processes: int, plan: dict[str, Any]) -> str:
    """Execute a plan by so many processes, and give what they wrote to stdout and stderr."""
    output = Path(plan["args"]["output_dir"]).with_suffix(".output")
    output.parent.mkdir(parents=True, exist_ok=True)
    status, written = run_together(num_processes, main, plan, output=output)
    assert status == 0, written[-6000:]
    return written


def main(plan: dict[str, Any]) -> None:
    """Train what the plan says, as one of its processes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig, load_activation_cache
    from hf_msae.data import CachedActivations
    from hf_msae.training import SAETrainer, SAETrainingArguments

    torch.set_num_threads(1)
    for name, value in plan.get("constants", {}).items():
        module, constant = name.rsplit(".", 1)
        setattr(importlib.import_module(module), constant, value)
    logging.basicConfig(level=logging.WARNING)
    model = tokenizer = None
    if "model" in plan:
        model = AutoModelForCausalLM.from_pretrained(plan["model"]).eval()
        tokenizer = AutoTokenizer.from_pretrained(plan["model"])
    args = SAETrainingArguments(**plan["args"])
    # No process needs the whole where each has a part.
    with torch.device("meta" if args.shard_latents else "cpu"):
        saes = {name: MatryoshkaSAE(MatryoshkaSAEConfig(**options)) for name, options in plan["saes"].items()}
    if "texts" in plan:
        dataset = plan["texts"]
    elif "commits" in plan:
        commit = plan["commits"][int(os.environ["RANK"])]
        dataset = load_activation_cache(plan["cache"], revision=commit)
    else:
        dataset = CachedActivations(plan["cache"], batch_size=1)
    trainer = SAETrainer(model, saes, args, dataset, plan.get("eval_texts"), processing_class=tokenizer)
    if "dry_run" in plan:
        dry_run(trainer, Path(plan["dry_run"]))
        trainer = SAETrainer(model, saes, args, dataset, processing_class=tokenizer)
    trainer.train()
    print(f"process {os.environ.get('RANK', 0)}: {trainer.loader.epoch} passes ended", file=sys.stderr)


def dry_run(trainer: Any, path: Path) -> None:
    """Write what `--dry-run` would say of the run, in numbers that do not depend on how fast the machine is."""
    from hf_msae.training import plan
    from hf_msae.training import trainer as loop

    for module in (plan, loop):
        module.time = SimpleNamespace(perf_counter=itertools.count().__next__)  # type: ignore[attr-defined]
    told, rates = trainer.plan(), trainer.probe()
    if trainer.state.is_world_process_zero:
        path.write_text(
            json.dumps(
                {
                    "steps": told.steps,
                    "tokens": told.tokens,
                    "tokens_per_step": told.tokens_per_step,
                    "rate": rates.steps,
                    "language_model": rates.language_model,
                }
            ),
            encoding="utf-8",
        )
