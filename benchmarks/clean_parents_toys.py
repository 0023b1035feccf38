"""The tree toy from a random start: does a schedule of gradients, of k, or of places, find the hierarchy?

    python benchmarks/clean_parents_toys.py --steps 1500 4000

Trains BatchTopK SAEs, with as many latents as Nabeshima's tree has features, in a world of other directions for each
seed, and prints what each schedule recovers of the truth. Every run leaves its numbers in `--output-dir` and is not
done again.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.research.toys.arguments import ToyArguments
from hf_msae.research.toys.experiment import evaluate, format_cell, train
from hf_msae.research.toys.toys import TOYS

HELD_BACK = {"inner_decoder_share": 0.0, "inner_activation_share": 0.25}
# By name: what changes in the SAE's configuration, and in the arguments of training.
SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "standard": ({}, {}),
    "decoder cut from .4": ({"inner_decoder_share": 0.0}, {"inner_share_start": 0.4}),
    "decoder cut, activations .25 from .25": (HELD_BACK, {}),
    "decoder cut, activations .25 from .4": (HELD_BACK, {"inner_share_start": 0.4}),
    "k from 4 k over .4": ({}, {"k_anneal_steps": 0.4}),
    "all from .4, k from 4 k, sorted at .35": (
        HELD_BACK,
        {"inner_share_start": 0.4, "k_anneal_steps": 0.4, "sort_latents_at": 0.35},
    ),
}
COLUMNS = {
    "matched cosine": "matched_cosine",
    "found": "found",
    "parent recall with child": "parent_recall_with_child",
    "parents first": "order",
    "FVE": "fve",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="tree", choices=list(TOYS))
    parser.add_argument("--activation", default="batch_topk")
    parser.add_argument("--steps", type=int, nargs="+", default=[1500])
    parser.add_argument("--learning-rate", type=float, default=ToyArguments.learning_rate)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES), metavar="SCHEDULE")
    parser.add_argument("--output-dir", default="runs/clean-parents-toys")
    return parser.parse_args()


def run(options: argparse.Namespace, schedule: str, steps: int, seed: int) -> dict[str, Any]:
    """Train and measure, or read what was measured."""
    rate = options.learning_rate
    name = f"{options.world}-{options.activation}-{rate}-{steps}-{schedule}-{seed}.json".replace(" ", "_")
    path = Path(options.output_dir) / name
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    toy = TOYS[options.world](seed)
    of_sae, of_training = SCHEDULES[schedule]
    if "k_anneal_steps" in of_training:
        of_training = of_training | {"k_initial": 4 * toy.world.forest.l0}
    config = MatryoshkaSAEConfig(
        hidden_size=toy.world.hidden_size,
        num_latents=toy.num_latents,
        prefix_sizes=list(toy.prefix_sizes),
        k=toy.world.forest.l0,
        activation=options.activation,
        **of_sae,
    )
    sae = MatryoshkaSAE(config)
    args = ToyArguments(world=options.world, activation=options.activation, steps=steps, learning_rate=rate)
    train(sae, toy, args, seed, lambda: None, **of_training)
    found = asdict(evaluate(sae, toy, seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found), encoding="utf-8")
    return found


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    for steps in options.steps:
        setting = f"{options.world}, {options.activation}, rate {options.learning_rate}"
        print(f"\n{setting}, {steps:,} steps, {options.seeds} seeds\n")
        print("| | " + " | ".join(COLUMNS) + " | decoder parent→child | its size |")
        print("|---" * (len(COLUMNS) + 3) + "|")
        for schedule in options.schedules:
            runs = [run(options, schedule, steps, seed) for seed in range(options.seeds)]
            cells = [format_cell([one[key] for one in runs], signed=False) for key in COLUMNS.values()]
            mixing = [one["decoder"]["parent_to_child"] for one in runs]
            cells += [format_cell(mixing, signed=True), f"{fmean(map(abs, mixing)):.2f}"]
            print(f"| {schedule} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
