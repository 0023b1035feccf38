"""Toy experiments: train SAEs where the truth is known, and see what each of them does to a hierarchy.

Every variant is trained by the package's own learner on the same samples, several times, each time in a world with
other directions. Below the variants stand two controls that must fail, so that the table cannot flatter: an SAE as it
is before training, and the first Matryoshka SAE judged by a hierarchy whose labels were shuffled.
"""

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import tqdm
from torch import Tensor

from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.research.recovery import Recovery, measure_recovery
from hf_msae.research.toys.arguments import SHUFFLED, UNTRAINED, VARIANTS, ToyArguments
from hf_msae.research.toys.sampling import Samples
from hf_msae.research.toys.toys import TOYS, Toy
from hf_msae.research.toys.trees import Forest
from hf_msae.sites import Site
from hf_msae.training import SAETrainingArguments
from hf_msae.training.learner import Learner
from hf_msae.training.run import Run

EVALUATION_SAMPLES = 50_000


def make_sae(toy: Toy, variant: str, activation: str) -> MatryoshkaSAE:
    """The SAE of a variant, with the truth's L0 as its own.

    Args:
        toy: the world.
        variant: of `VARIANTS`.
        activation: as in `MatryoshkaSAEConfig`.
    """
    world = toy.world
    options: dict[str, Any] = {"prefix_sizes": list(toy.prefix_sizes)} | VARIANTS[variant](toy)
    k = max(1, round(world.forest.l0)) if activation == "topk" else world.forest.l0
    return MatryoshkaSAE(
        MatryoshkaSAEConfig(
            hidden_size=world.hidden_size, num_latents=toy.num_latents, k=k, activation=activation, **options
        )
    )


@torch.no_grad()
def set_to_truth(sae: MatryoshkaSAE, toy: Toy) -> None:
    """Make latent i stand for feature i, encoder and decoder, where there are as many.

    Args:
        sae: it is changed.
        toy: the world.
    """
    rows = min(toy.num_latents, toy.world.num_features)
    for weights in (sae.W_enc, sae.W_dec):
        weights[:rows] = toy.world.directions[:rows].to(weights)
    sae.b_dec.zero_()


def train(
    sae: MatryoshkaSAE, toy: Toy, args: ToyArguments, seed: int, advance: Callable[[], Any], **changes: Any
) -> None:
    """Train in place on fresh samples at every step.

    Args:
        sae: it is changed.
        toy: the world.
        args: how to train.
        seed: of the samples.
        advance: called after each step.
        **changes: further training arguments, such as schedules.
    """
    options = SAETrainingArguments(
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=seed,
        use_cpu=True,  # twenty latents are no work for anything else
        **changes,
    )
    learner = Learner("toy", sae, Site("features"), Run(options), args.steps)
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1))
    learner.start(toy.world.sample(10_000, generator).x)
    if args.init == "truth":
        set_to_truth(sae, toy)
    for step in range(args.steps):
        learner.step(toy.world.sample(args.batch_size, generator).x, step)
        advance()
    learner.finish()
    sae.calibrate_threshold([toy.world.sample(EVALUATION_SAMPLES, generator).x])


def make_untrained(toy: Toy, args: ToyArguments, seed: int) -> MatryoshkaSAE:
    """Random unit rows, and a threshold at which L0 is the truth's: what chance recovers.

    Args:
        toy: the world.
        args: of the experiment.
        seed: of the rows and samples.
    """
    torch.manual_seed(seed)
    sae = make_sae(toy, "vanilla", "batch_topk").eval()
    samples = toy.world.sample(EVALUATION_SAMPLES, torch.Generator().manual_seed(seed))
    sae.calibrate_threshold([samples.x])
    return sae


def evaluate(sae: MatryoshkaSAE, toy: Toy, seed: int, shuffle: bool = False) -> Recovery:
    """Measure an SAE on samples of their own.

    Args:
        sae: in evaluation mode.
        toy: the world.
        seed: of the samples.
        shuffle: whether features swap their places in the hierarchy, as a control.
    """
    world = toy.world
    samples = world.sample(EVALUATION_SAMPLES, torch.Generator().manual_seed(2_000_003 * (seed + 1)))
    places = wrong_places(world.forest, seed) if shuffle else torch.arange(world.num_features)
    samples = Samples(samples.x, samples.features[:, places])
    return measure_recovery(sae, world.forest, world.directions[places], samples)


def wrong_places(forest: Forest, seed: int) -> Tensor:
    """A permutation of the features that makes every edge of the hierarchy wrong.

    The pair that takes an edge's place is no edge.

    Args:
        forest: of the features.
        seed: of the permutation.

    Returns:
        (num_features,) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    edges = set(forest.edges)
    while True:
        places = torch.randperm(forest.num_features, generator=generator)
        if all((int(places[parent]), int(places[child])) not in edges for parent, child in edges):
            return places


@dataclass(frozen=True)
class ToyResults:
    """What an experiment measured.

    Args:
        toy: the world of the first seed.
        recoveries: of every variant and control, one a seed.
        saes: of the first seed, by variant and control.
    """

    toy: Toy
    recoveries: dict[str, list[Recovery]]
    saes: dict[str, MatryoshkaSAE]


def run_toy(args: ToyArguments) -> ToyResults:
    """Train and measure all variants and controls.

    Args:
        args: what is trained on what.
    """
    recoveries: dict[str, list[Recovery]] = {name: [] for name in (*args.variants, UNTRAINED, SHUFFLED)}
    saes: dict[str, MatryoshkaSAE] = {}
    judged = next((name for name in args.variants if name != "vanilla"), args.variants[0])
    first = TOYS[args.world](0)
    with tqdm(total=args.seeds * len(args.variants) * args.steps, desc="Training", unit="step") as progress:
        for seed in range(args.seeds):
            toy = TOYS[args.world](seed)
            for variant in args.variants:
                sae = make_sae(toy, variant, args.activation)
                train(sae, toy, args, seed, progress.update)
                recoveries[variant].append(evaluate(sae, toy, seed))
                if variant == judged:
                    recoveries[SHUFFLED].append(evaluate(sae, toy, seed, shuffle=True))
                if seed == 0:
                    saes[variant] = sae
            untrained = make_untrained(toy, args, seed)
            recoveries[UNTRAINED].append(evaluate(untrained, toy, seed))
            if seed == 0:
                saes[UNTRAINED] = untrained
    return ToyResults(first, recoveries, saes)


# What the table shows: a heading, and how it is read off.
COLUMNS: dict[str, Callable[[Recovery], float]] = {
    "matched cosine": lambda r: r.matched_cosine,
    "features found (cosine ≥ .9)": lambda r: r.found,
    "parent recall, alone": lambda r: r.parent_recall_alone,
    "parent recall, with child": lambda r: r.parent_recall_with_child,
    "strength with child / alone": lambda r: r.parent_strength_ratio,
    "decoder parent→child": lambda r: r.decoder.parent_to_child,
    "encoder parent→child": lambda r: r.encoder.parent_to_child,
    "decoder child→parent": lambda r: r.decoder.child_to_parent,
    "encoder child→parent": lambda r: r.encoder.child_to_parent,
    "order: parents first": lambda r: r.order,
    "L0": lambda r: r.l0,
    "FVE": lambda r: r.fve,
}
SIGNED = ("decoder", "encoder")


def summarise(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds where there is a number; NaN where there are too few.

    Args:
        values: one a seed, NaN for none.
    """
    known = [value for value in values if not math.isnan(value)]
    mean = statistics.fmean(known) if known else math.nan
    return mean, statistics.stdev(known) if len(known) > 1 else math.nan


def format_cell(values: Sequence[float], signed: bool) -> str:
    """Mean ± standard deviation, a dash for nothing; zeros before the point are left out, as seven columns must fit.

    Args:
        values: one a seed, NaN for none.
        signed: whether positive numbers get a sign, too.
    """
    mean, spread = summarise(values)
    if math.isnan(mean):
        return "–"
    text = (f"{mean:+.2f}" if signed else f"{mean:.2f}").replace("-0.00", "+0.00")
    text = text if math.isnan(spread) else f"{text}±{spread:.2f}"
    return re.sub(r"(?<!\d)0\.", ".", text)


def make_rows(recoveries: dict[str, list[Recovery]]) -> dict[str, dict[str, str]]:
    """The table's cells by column and then by variant; variants are its columns, so that it fits a terminal.

    Args:
        recoveries: of every variant and control, one a seed.
    """
    return {
        column: {
            name: format_cell([read(recovery) for recovery in runs], column.startswith(SIGNED))
            for name, runs in recoveries.items()
        }
        for column, read in COLUMNS.items()
    }


def to_json(args: ToyArguments, results: ToyResults) -> str:
    """Arguments, every run's numbers, and their means; NaN is written as null.

    Args:
        args: what was trained on what.
        results: what was measured.
    """
    runs = {name: [asdict(recovery) for recovery in runs] for name, runs in results.recoveries.items()}
    means = {
        name: {column: summarise([read(r) for r in runs]) for column, read in COLUMNS.items()}
        for name, runs in results.recoveries.items()
    }
    forest = results.toy.world.forest
    truth = {"names": forest.names, "parents": forest.parents.tolist(), "l0": forest.l0}
    content = {"arguments": asdict(args), "first_world": truth, "mean_and_sd": means, "runs": runs}
    return json.dumps(_without_nan(content), indent=2)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
