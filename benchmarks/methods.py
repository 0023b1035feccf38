"""Does a method help at equal L0? SAEs of equal width and k, trained by each method on the same tokens, over seeds.

    python benchmarks/methods.py --json stories.json
    python benchmarks/methods.py --model ../shared/data/stories260K --dataset ../shared/data/tinystories.txt \\
        --json stories260K.json

Methods that differ in the SAE's configuration alone are trained from one pass of the language model; one that changes
the run has a pass of its own over the same tokens. All numbers are what the run measures at its end on the same
held-out tokens: FVE at every level, CE recovered against mean ablation, and the share of latents that never fired. ±
is the standard deviation over seeds. The first methods are what the others are to be read beside: rows compare only
where their L0 does. What is in `--output-dir` already is not trained again.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from claims import World, add_world_arguments, cell, load_world

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.data import vocabulary
from hf_msae.sites import site_width
from hf_msae.training import SAETrainer, SAETrainingArguments
from hf_msae.training.recipes import RECIPES

CONTEXT_LENGTH = 256
Numbers = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Method:
    """What a method changes: of the SAE's configuration, and of the run."""

    config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    token_lookup: bool = False
    nested: bool = True


METHODS: dict[str, Method] = {
    "BatchTopK": Method(),
    "TopK": Method({"activation": "topk"}),
    "ReLU + L1": Method({"activation": "relu"}),
    "ReLU, p-annealing": Method({"activation": "relu", "p_end": 0.2}),
    "BatchTopK, aligned": Method({"aligned": True}),
    "TopK, aligned": Method({"activation": "topk", "aligned": True}),
    "BatchTopK, tokenized": Method(token_lookup=True),
    "TopK, tokenized": Method({"activation": "topk"}, token_lookup=True),
    "ReLU, p-annealing, aligned": Method({"activation": "relu", "p_end": 0.2, "aligned": True}),
    "BatchTopK, not nested": Method(nested=False),
    **{f"recipe {name}": Method(dict(shares)) for name, shares in RECIPES.items() if name != "prefixes"},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_world_arguments(parser, num_latents=512, tokens=300_000)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--eval-tokens", type=int, default=20_000)
    parser.add_argument("--calibration-tokens", type=int, default=50_000)
    parser.add_argument("--ce-tokens", type=int, default=5_000)
    parser.add_argument("--output-dir", default="runs/methods")
    return parser.parse_args()


def passes(methods: Sequence[str]) -> list[list[str]]:
    """The methods that may be trained together, from one pass of the language model."""
    found: list[tuple[dict[str, Any], list[str]]] = []
    for name in methods:
        training = METHODS[name].training
        together = next((names for settings, names in found if settings == training), None)
        if together is None:
            found.append((training, [name]))
        else:
            together.append(name)
    return [names for _, names in found]


def train(world: World, options: argparse.Namespace, names: Sequence[str], seed: int, folder: Path) -> None:
    """Train methods from one pass, and write what the run measures of each."""
    shape = {"hidden_size": site_width(world.model, world.site), "num_latents": options.num_latents, "k": options.k}
    shape["site"] = str(world.site)
    saes = {}
    for name in names:
        form = {} if METHODS[name].nested else {"prefix_sizes": [options.num_latents]}
        form |= METHODS[name].config | {"lookup_size": vocabulary(world.model) if METHODS[name].token_lookup else None}
        saes[name] = MatryoshkaSAE(MatryoshkaSAEConfig(**(shape | form)))
    settings: dict[str, Any] = {
        "output_dir": str(folder / "pass"),
        "overwrite_output_dir": True,
        "max_tokens": options.tokens,
        # No more text is read before the first step than the run takes.
        "block_tokens": min(SAETrainingArguments.block_tokens, max(options.tokens, options.batch_size)),
        "per_device_train_batch_size": options.batch_size,
        "context_length": CONTEXT_LENGTH,
        "eval_tokens": options.eval_tokens,
        "calibration_tokens": options.calibration_tokens,
        "ce_tokens": options.ce_tokens,
        "save_steps": 0,
        "seed": seed,
        "use_cpu": True,
    }
    args = SAETrainingArguments(**(settings | METHODS[names[0]].training))
    measured = SAETrainer(world.model, saes, args, world.documents, processing_class=world.tokenizer).train()
    for name in names:
        (folder / f"{name}.json").write_text(json.dumps(measured[name].to_dict()), encoding="utf-8")


def collect(world: World, options: argparse.Namespace) -> Numbers:
    """Train what is not there; every method's measurement, one a seed."""
    numbers: Numbers = {name: [] for name in options.methods}
    for seed in range(options.seeds):
        folder = Path(options.output_dir) / world.name / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for names in passes([name for name in options.methods if not (folder / f"{name}.json").is_file()]):
            train(world, options, names, seed, folder)
        for name in options.methods:
            numbers[name].append(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
    return numbers


def write_table(numbers: Numbers) -> str:
    """A row for each method, as markdown."""
    sizes = [level["prefix"] for level in max((each[0]["levels"] for each in numbers.values()), key=len)]
    header = ["method", "L0", *(f"FVE at {size:,}" for size in sizes), "CE rec. (mean)", "dead"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, measured in numbers.items():
        levels = [one["levels"] for one in measured]
        cells = [cell([level[-1]["l0"] for level in levels], 2)]
        # What is not nested has its last level alone.
        fves = [[level[index]["fve"] for level in levels] for index in range(len(levels[0]))]
        cells += [""] * (len(sizes) - len(fves)) + [cell(values, 3) for values in fves]
        cells.append(cell([level[-1]["ce_recovered_mean"] for level in levels], 4))
        cells.append(cell([level[-1]["dead"] for level in levels], 3))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    world = load_world(options)
    numbers = collect(world, options)
    print(write_table(numbers))
    if options.json:
        facts = {"world": world.name, "seconds": round(time.perf_counter() - started)}
        content = {"facts": facts, "options": vars(options), "numbers": numbers}
        Path(options.json).write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
