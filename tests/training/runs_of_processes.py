"""A run of real processes for the tests beside this file: the program that each process executes, and what starts it.

    python -m torch.distributed.run --nproc_per_node 2 runs_of_processes.py plan.json

The plan says which SAEs are trained, a whole grid in one run because starting processes takes longer than the run, on
a cache of activations or on texts and a model. It may set constants of hf_msae's modules, such as the size of a
message. With "dry_run", the main process first writes to this path what `--dry-run` says, by a clock that ticks once
whenever it is read.
"""

import importlib
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def launch(num_processes: int, plan: dict[str, Any]) -> str:
    """Execute a plan by so many processes, and give what they wrote to stderr."""
    from patience import HANG_SECONDS  # the processes themselves do not find it

    path = Path(plan["args"]["output_dir"]).with_suffix(".plan")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(num_processes), "--master_port", str(port)]
    done = subprocess.run(
        [sys.executable, *launcher, str(Path(__file__).resolve()), str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


def main(plan: dict[str, Any]) -> None:
    """Train what the plan says, as one of its processes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
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
    dataset = plan["texts"] if "texts" in plan else CachedActivations(plan["cache"], batch_size=1)
    trainer = SAETrainer(model, saes, args, dataset, processing_class=tokenizer)
    if "dry_run" in plan:
        dry_run(trainer, Path(plan["dry_run"]))
        trainer = SAETrainer(model, saes, args, dataset, processing_class=tokenizer)
    trainer.train()
    print(f"process {os.environ['RANK']}: {trainer.loader.epoch} passes ended", file=sys.stderr)


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
            )
        )


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
