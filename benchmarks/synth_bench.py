"""SynthSAEBench (arXiv:2602.14687), scaled to the machine: does an SAE find features that are known?

    .venv-peers/bin/python benchmarks/synth_bench.py --scale 1024 --samples 3000000 --seeds 3 --json synth_bench.json

Every SAE of a seed takes its steps on the same samples in the same order: ours by the learner of `hf-msae train`,
those of SAELens (`make peers`) by its own trainer, at each of the rates that are given. That has warm-up and decay as
long as ours, and calls a latent dead as soon: its default, 1,000 steps, is longer than a short run. All thresholds are
set alike, so that L0 is the same, and all SAEs are measured on the same samples. What is in `--output-dir` is not
trained again.

`--scale 16384` is the published problem. With fewer features the probabilities keep their bounds, so fewer fire at
once, by about the square root. Trees, latents and prefixes stay in proportion, and so do L0 and what truly fires. The
dimensions stay in proportion to what fires, not to what exists: the noise that a latent reads from all other features
has the variance (features that fire) / (dimensions), and this is what makes the problem as hard as it is. With an
eighth of the features an eighth of the dimensions would nearly triple it.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from claims import cell
from torch import Tensor

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.atomic_files import atomic_file
from hf_msae.research.detection import measure_detection
from hf_msae.research.toys import Samples, SynthBenchSettings, SynthBenchWorld
from hf_msae.sites import Site
from hf_msae.training import SAETrainingArguments
from hf_msae.training.learner import Learner
from hf_msae.training.run import Run

FULL = SynthBenchSettings()
# Of the full world: features that fire at once, active latents, features of a latent, and prefixes as shares.
TRUE_L0, L0 = 34.5, 25.0
FEATURES_PER_LATENT = 4
PREFIX_SHARES = (1 / 32, 1 / 8, 1 / 2, 1)
# Samples made and measured at once.
PART = 5_000
START_SAMPLES = 10_000
SAELENS = {"SAELens BatchTopK": False, "SAELens Matryoshka": True}
COLUMNS = {"f1": "F1", "precision": "precision", "recall": "recall", "mcc": "MCC", "uniqueness": "uniqueness"}
COLUMNS |= {"dead": "dead", "shrinkage": "shrinkage", "fve": "FVE", "l0": "L0"}


@dataclass(frozen=True)
class Method:
    """What a method of ours changes: of the SAE's configuration, and of the run; and whether it has inner levels."""

    config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    nested: bool = True


HELD_BACK = {"inner_decoder_share": 0.0, "inner_activation_share": 0.25}
ALIGNED, ANNEALED = {"aligned": True}, {"k_anneal_steps": 0.3}
METHODS = {
    "BatchTopK": Method(nested=False),
    "BatchTopK, aligned, k annealed": Method(ALIGNED, ANNEALED, nested=False),
    "Matryoshka": Method(),
    "Matryoshka, aligned": Method(ALIGNED),
    "Matryoshka, k annealed": Method({}, ANNEALED),
    "Matryoshka, aligned, k annealed": Method(ALIGNED, ANNEALED),
    "decoder cut": Method({"inner_decoder_share": 0.0}),
    "decoder cut, activations .25": Method(HELD_BACK),
    "decoder cut, activations .25, aligned, k annealed": Method(HELD_BACK | ALIGNED, ANNEALED),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=1024, help="features of the world; a multiple of 128")
    parser.add_argument("--hidden-size", type=int, help="dimensions; default: as many as keep the noise")
    parser.add_argument("--samples", type=int, default=3_000_000, help="to train each SAE on")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument(
        "--saelens-rates", type=float, nargs="*", default=[3e-3, 1e-2], help="learning rates of SAELens' trainer"
    )
    parser.add_argument("--eval-samples", type=int, default=50_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output-dir", default="runs/synth-bench")
    parser.add_argument("--json", help="write all numbers here")
    return parser.parse_args()


@dataclass(frozen=True)
class Problem:
    """A world, and the shape of the SAEs that are to find its features."""

    world: SynthBenchWorld
    shape: dict[str, Any]

    def draw(self, number: int, seed: int) -> list[Samples]:
        """Samples in parts, which no other seed has."""
        generator = torch.Generator().manual_seed(seed)
        sizes = [PART] * (number // PART) + [number % PART] * (number % PART > 0)
        return [self.world.sample(size, generator) for size in sizes]


def make_problem(options: argparse.Namespace) -> Problem:
    """The world of as many features, and an SAE in proportion."""
    if options.scale < 128 or options.scale % 128:
        raise SystemExit(f"--scale must be a multiple of 128, got {options.scale}.")
    settings = FULL.scaled(options.scale)
    # Spreads are drawn after directions, so a world of another size is not quite the same; it is near enough here.
    fires = SynthBenchWorld(replace(settings, orthogonal_steps=0)).l0
    size = options.hidden_size or round(FULL.hidden_size * fires / TRUE_L0)
    world = SynthBenchWorld(replace(settings, hidden_size=size))
    latents = options.scale // FEATURES_PER_LATENT
    shape = {
        "hidden_size": size,
        "num_latents": latents,
        "prefix_sizes": [round(latents * share) for share in PREFIX_SHARES],
        "k": L0 * world.l0 / TRUE_L0,
    }
    return Problem(world, shape)


class Training(Protocol):
    """An SAE that learns from one batch after the other."""

    def step(self, x: Tensor, step: int) -> None: ...

    def finish(self) -> MatryoshkaSAE: ...


class Ours:
    """The learner that `hf-msae train` has for each SAE."""

    def __init__(self, name: str, problem: Problem, options: argparse.Namespace, seed: int, first: Tensor) -> None:
        method, steps = METHODS[name], options.samples // options.batch_size
        levels = {} if method.nested else {"prefix_sizes": [problem.shape["num_latents"]]}
        sae = MatryoshkaSAE(MatryoshkaSAEConfig(**(problem.shape | levels | method.config)))
        args = SAETrainingArguments(
            max_steps=steps, per_device_train_batch_size=options.batch_size, seed=seed, use_cpu=True, **method.training
        )
        self.learner = Learner(name, sae, Site("features"), Run(args), steps)
        self.learner.start(first)

    def step(self, x: Tensor, step: int) -> None:
        self.learner.step(x, step)

    def finish(self) -> MatryoshkaSAE:
        self.learner.finish()
        return self.learner.sae


class SAELens:
    """SAELens' trainer, driven as its own `MultiSAETrainer` drives several."""

    def __init__(self, nested: bool, rate: float, problem: Problem, options: argparse.Namespace, seed: int) -> None:
        from sae_lens import (
            BatchTopKTrainingSAE,
            BatchTopKTrainingSAEConfig,
            MatryoshkaBatchTopKTrainingSAE,
            MatryoshkaBatchTopKTrainingSAEConfig,
        )
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        shape, steps = problem.shape, options.samples // options.batch_size
        sizes = {"d_in": shape["hidden_size"], "d_sae": shape["num_latents"], "k": shape["k"]}
        self.prefix_sizes = list(shape["prefix_sizes"]) if nested else [shape["num_latents"]]
        torch.manual_seed(seed)
        sae: Any
        if nested:
            config = MatryoshkaBatchTopKTrainingSAEConfig(**sizes, matryoshka_widths=list(self.prefix_sizes))
            sae = MatryoshkaBatchTopKTrainingSAE(config)
        else:
            sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**sizes))
        self.trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=steps * options.batch_size,
                train_batch_size_samples=options.batch_size,
                lr=rate,
                lr_end=rate / 10,
                lr_warm_up_steps=int(SAETrainingArguments.warmup_steps * steps),
                lr_decay_steps=int(SAETrainingArguments.decay_steps * steps),
                dead_feature_window=max(1, steps // 20),
            ),
            sae,
            data_provider=iter(()),
        )

    def step(self, x: Tensor, step: int) -> None:
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def finish(self) -> MatryoshkaSAE:
        with tempfile.TemporaryDirectory() as folder:
            self.trainer.sae.save_inference_model(folder)
            return MatryoshkaSAE.from_saelens(folder, prefix_sizes=self.prefix_sizes).eval()


def names_of(options: argparse.Namespace) -> list[str]:
    """Ours, and SAELens' at each rate."""
    return [*options.methods, *(f"{name}, {rate:g}" for name in SAELENS for rate in options.saelens_rates)]


def begin(name: str, problem: Problem, options: argparse.Namespace, seed: int, first: Tensor) -> Training:
    if name in METHODS:
        return Ours(name, problem, options, seed, first)
    library, _, rate = name.rpartition(", ")
    return SAELens(SAELENS[library], float(rate), problem, options, seed)


def run_seed(problem: Problem, options: argparse.Namespace, seed: int, names: Sequence[str]) -> None:
    """Train and measure some methods from one pass over the samples of a seed."""
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1))
    first = problem.world.sample(START_SAMPLES, generator).x
    saes = {name: begin(name, problem, options, seed, first) for name in names}
    seconds = dict.fromkeys(["samples", *names], 0.0)
    steps = options.samples // options.batch_size
    for step in range(steps):
        begun = time.perf_counter()
        x = problem.world.sample(options.batch_size, generator).x
        seconds["samples"] += time.perf_counter() - begun
        for name, sae in saes.items():
            begun = time.perf_counter()
            sae.step(x, step)
            seconds[name] += time.perf_counter() - begun
        if step % max(1, steps // 10) == 0:
            spent = ", ".join(f"{name} {1000 * spent / (step + 1):.0f}" for name, spent in seconds.items())
            print(f"seed {seed}, step {step:,} of {steps:,}; ms a step: {spent}", flush=True)
    calibration, evaluation = (
        problem.draw(options.eval_samples, 1_000_003 * (seed + 1) + number) for number in (1, 2)
    )
    for name, trained in saes.items():
        sae = trained.finish()
        sae.calibrate_threshold([samples.x for samples in calibration])
        found = asdict(measure_detection(sae, problem.world.directions, evaluation))
        path = path_of(options, name, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as draft:
            draft.write_text(json.dumps(found | {"seconds": seconds[name]}), encoding="utf-8")


def path_of(options: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(options.output_dir) / f"seed-{seed}" / f"{name}.json"


def collect(problem: Problem, options: argparse.Namespace, names: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """Train what is not there; every method's numbers, one a seed."""
    for seed in range(options.seeds):
        missing = [name for name in names if not path_of(options, name, seed).is_file()]
        if missing:
            run_seed(problem, options, seed, missing)
    return {
        name: [json.loads(path_of(options, name, seed).read_text(encoding="utf-8")) for seed in range(options.seeds)]
        for name in names
    }


def write_table(numbers: dict[str, list[dict[str, float]]]) -> str:
    """A row for each method, as markdown."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, runs in numbers.items():
        cells = [cell([run[column] for run in runs], 3) for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.saelens_rates and find_spec("sae_lens") is None:
        print("skipped SAELens: sae-lens is not installed")
        options.saelens_rates = []
    problem = make_problem(options)
    names = names_of(options)
    numbers = collect(problem, options, names)
    world, shape = problem.world, problem.shape
    facts = {
        "features": world.num_features,
        "trees": world.settings.num_trees,
        "true_l0": world.l0,
        "samples": options.samples,
        **shape,
    }
    print(
        f"{world.num_features:,} features in {shape['hidden_size']} dimensions, {world.settings.num_trees} trees, "
        f"{world.l0:.1f} features fire; {shape['num_latents']} latents in levels of "
        f"{', '.join(map(str, shape['prefix_sizes']))}, L0 {shape['k']:.1f}; {options.samples:,} samples, "
        f"{options.seeds} seeds\n"
    )
    print(write_table(numbers))
    if options.json:
        Path(options.json).write_text(
            json.dumps({"facts": facts, "options": vars(options), "numbers": numbers}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
