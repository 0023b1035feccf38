"""Does end-to-end fine-tuning help at equal L0? Runs that part where the predictions begin to count.

    python benchmarks/kl_finetune.py --json stories.json
    python benchmarks/kl_finetune.py --model ../shared/data/stories260K --dataset ../shared/data/tinystories.txt \\
        --json stories260K.json

An SAE is trained as ever. Copies of it leave at each `--kl-from`, and go on with `kl_from` over the same batches, to
the same end: what `hf-msae train --kl-from` would have come to, without training the same steps again. All are then
measured on the same held-out tokens. ± is the standard deviation over seeds; of the differences to the run without, it
is that of the differences.
"""

import argparse
import copy
import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from claims import World, add_world_arguments, cell, load_world

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.sites import site_width
from hf_msae.training import SAETrainer, SAETrainingArguments
from hf_msae.training.learner import Learner, make_learners
from hf_msae.training.preparation import set_norm_limits
from hf_msae.training.schedules import Length

CONTEXT_LENGTH = 128
NONE = "never"
Numbers = dict[str, list[dict[str, Any]]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_world_arguments(parser, num_latents=512, tokens=300_000)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--kl-from", type=float, nargs="+", default=[0.9], metavar="SHARE")
    parser.add_argument("--kl-weight", type=float, default=1.0)
    parser.add_argument("--held-out-tokens", type=int, default=10_000, help="to calibrate, and to measure on")
    parser.add_argument("--ce-tokens", type=int, default=4_000)
    return parser.parse_args()


def make_trainer(world: World, options: argparse.Namespace, seed: int, folder: str) -> SAETrainer:
    """Of one SAE, with predictions from the first share that is asked for."""
    config = MatryoshkaSAEConfig(
        hidden_size=site_width(world.model, world.site),
        num_latents=options.num_latents,
        k=options.k,
        site=str(world.site),
    )
    args = SAETrainingArguments(
        output_dir=folder,
        max_tokens=options.tokens,
        per_device_train_batch_size=options.batch_size,
        context_length=CONTEXT_LENGTH,
        block_tokens=65_536,
        eval_tokens=options.held_out_tokens,
        calibration_tokens=options.held_out_tokens,
        ce_tokens=options.ce_tokens,
        save_steps=0,
        kl_from=min(options.kl_from),
        kl_weight=options.kl_weight,
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
    )
    sae = {NONE: MatryoshkaSAE(config)}
    return SAETrainer(world.model, sae, args, world.documents, processing_class=world.tokenizer)


def train(world: World, options: argparse.Namespace, seed: int, folder: str) -> dict[str, dict[str, Any]]:
    """What is measured of a seed's SAE at the end of each way, by where predictions begin to count."""
    trainer = make_trainer(world, options, seed, folder)
    run, sites, length = trainer.run, trainer.sites, Length(trainer.loader.count_steps())
    set_norm_limits(run, trainer.saes, sites, trainer.loader, trainer.evaluator.held_out, {})
    learners = make_learners(run, trainer.saes, sites, length)

    def leaving(share: float) -> Learner:
        """A copy of the SAE's learner, with which predictions count from now on."""
        plain = learners[0]
        saes = {NONE: copy.deepcopy(plain.sae)}
        (other,) = make_learners(run, saes, sites, length, end_to_end=trainer.end_to_end)
        other.name, other.args = f"from {share:g}", replace(run.args, kl_from=share)
        other.load_state_dict(*copy.deepcopy((plain.state_dict(), plain.latent_state())))
        return other

    for step in range(length.max_steps):
        learners += [leaving(share) for share in options.kl_from if step == math.ceil(share * length.max_steps)]
        batch = next(trainer.loader)
        for learner in learners:
            learner.take(batch, step)
    with trainer.evaluator.calibrated(learners, length.max_steps):
        measured = trainer.evaluator.measure(learners)
    return {name: measurement.to_dict() for name, measurement in measured.items()}


def write_table(numbers: Numbers) -> str:
    """A row for each way, as markdown, and for each but the first one of its differences to the first."""
    sizes = [level["prefix"] for level in numbers[NONE][0]["levels"]]
    header = ["predictions count", "L0", *(f"FVE at {size:,}" for size in sizes)]
    header += [f"CE rec. (mean) at {size:,}" for size in sizes]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    names = [("l0", [len(sizes) - 1], 2), ("fve", range(len(sizes)), 3), ("ce_recovered_mean", range(len(sizes)), 4)]
    for way, measured in numbers.items():
        values = {
            (name, index): [one["levels"][index][name] for one in measured]
            for name, indices, _ in names
            for index in indices
        }
        lines.append(_line(way, [cell(values[name, index], digits) for name, some, digits in names for index in some]))
        if way == NONE:
            plain = values
            continue
        pairs = {key: [a - b for a, b in zip(values[key], plain[key], strict=True)] for key in values}
        cells = [cell(pairs[name, index], digits) for name, some, digits in names for index in some]
        lines.append(_line("difference", cells))
    return "\n".join(lines)


def _line(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    world = load_world(options)
    numbers: Numbers = {}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            for name, measured in train(world, options, seed, folder).items():
                numbers.setdefault(name, []).append(measured)
    print(write_table(numbers))
    if options.json:
        facts = {"world": world.name, "seconds": round(time.perf_counter() - started)}
        content = {"facts": facts, "options": vars(options), "numbers": numbers}
        Path(options.json).write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
