"""Meta-SAEs: an SAE on the decoder rows of another SAE (Leask et al., arXiv:2502.04878).

If the latents of an SAE were atoms, their directions could not be explained by a smaller dictionary. In fact many are
sums: "Einstein" is scientist + Germany + famous person. The share of the rows' variance that a meta-SAE explains is
therefore a measure of composition, and lower is better: 55% for BatchTopK and 42% for Matryoshka SAEs of 65,536
latents with a quarter as many meta-latents and k = 4 (arXiv:2503.17547). It depends on the meta-SAE's width, k and
training, so only numbers of equal settings compare; random rows of the same shape give the floor.

A meta-SAE is a `MatryoshkaSAE` like any other, trained by the package's own learner. Its configuration says what it
is: the site is `W_dec`, `base_model` the SAE that was decomposed, and `measured["meta_sae_of"]` names it too.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.utils import logging

from hf_msae.errors import InputError
from hf_msae.evaluation.metric import Evaluation, Metric, MetricInputs, Table
from hf_msae.evaluation.tables import labelled_methods, write_cell
from hf_msae.metrics import ReconstructionMeter
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.research.subjects import trained_saes
from hf_msae.sites import Site
from hf_msae.training import SAETrainingArguments, TrainingDiverged
from hf_msae.training.learner import Learner
from hf_msae.training.run import Run

SITE = Site("W_dec")
META_KEY = "meta_sae_of"
WIDTH_SHARE = 4
BATCH_SIZE = 1024
# Of the meta-SAEs of a report.
REPORT_STEPS = 500


@dataclass(frozen=True)
class MetaResult:
    """A meta-SAE and how much it explains.

    Args:
        sae: the meta-SAE.
        rows: which latents of the base SAE it was trained on, (n,): those that fire.
        explained: 1 − Σ‖d − d̂‖²/Σ‖d − d̄‖² over their unit decoder rows.
        explained_random: of a meta-SAE of the same settings on random directions, the floor; None without a control.
        l0: meta-latents per row.
        dead: the share of meta-latents that no row uses.
    """

    sae: MatryoshkaSAE
    rows: Tensor
    explained: float
    explained_random: float | None
    l0: float
    dead: float


@dataclass(frozen=True)
class Part:
    """A meta-latent in a decomposition.

    Args:
        meta_latent: its number.
        activation: in the row that is decomposed.
        shared_with: the other latents that use it most, with their activations of it.
    """

    meta_latent: int
    activation: float
    shared_with: list[tuple[int, float]]


@dataclass(frozen=True)
class Decomposition:
    """What a latent's decoder row is made of.

    Args:
        latent: its number.
        cosine: of the sum of the parts with the row, less the meta-SAE's bias, which holds what all rows have in
            common; 0 where there is no part.
        parts: the largest first.
    """

    latent: int
    cosine: float
    parts: list[Part]


def unit_rows(sae: MatryoshkaSAE) -> tuple[Tensor, Tensor]:
    """Latents that fire, and their unit decoder rows.

    Where no firing rates were recorded, all latents. Directions of latents that never fire are left from the beginning
    of training.

    Args:
        sae: the SAE.

    Returns:
        Numbers of latents, (n,), and rows, (n, hidden_size) float32; both on the CPU.
    """
    recorded = bool((sae.firing_rate > 0).any())
    rows = (sae.firing_rate > 0).nonzero().flatten() if recorded else torch.arange(sae.config.num_latents)
    return rows.cpu(), normalize(sae.W_dec.detach()[rows].float(), dim=1).cpu()


def train_meta_sae(
    sae: MatryoshkaSAE,
    *,
    num_latents: int | None = None,
    k: float = 4,
    prefix_sizes: Sequence[int] = (),
    max_steps: int = 1500,
    learning_rate: float | None = None,
    seed: int = 0,
    name: str | None = None,
    random_control: bool = True,
    use_cpu: bool = False,
) -> MetaResult:
    """Train a meta-SAE on an SAE's decoder rows.

    Args:
        sae: the base SAE.
        num_latents: meta-latents; by default a quarter of the latents that fire (SAEBench's share).
        k: mean number of meta-latents per row.
        prefix_sizes: nested sizes of the meta-SAE; a plain one by default, as in the papers.
        max_steps: steps of up to 1,024 rows.
        learning_rate: by default what training takes for that width.
        seed: of the weights, the batches and the random directions.
        name: what the base SAE is called in the configuration; by default where it was loaded from.
        random_control: train another one on random directions, for the floor.
        use_cpu: whether to train on the CPU even where there is an accelerator.

    Raises:
        InputError: fewer than eight latents fire, or sizes do not fit.
    """
    rows, directions = unit_rows(sae)
    num_latents = num_latents or max(1, len(rows) // WIDTH_SHARE)
    _check_sizes(len(rows), num_latents, k, max_steps)
    origin = name or sae.config.name_or_path or None
    config = MatryoshkaSAEConfig(
        hidden_size=sae.config.hidden_size,
        num_latents=num_latents,
        prefix_sizes=list(prefix_sizes) or [num_latents],
        k=k,
        base_model=origin,
        site=str(SITE),
    )
    args = SAETrainingArguments(
        output_dir="",
        max_steps=max_steps,
        per_device_train_batch_size=min(BATCH_SIZE, len(rows)),
        learning_rate=learning_rate,
        seed=seed,
        use_cpu=use_cpu,
    )
    meta = MatryoshkaSAE(config)
    fit_rows(meta, directions, args, SITE, "Meta-SAE")
    meter = _calibrate_and_measure(meta, directions)
    level = meter.levels()[-1]
    meta.config.measured = {
        "tokens": len(rows),
        "l0": [round(item.l0, 4) for item in meter.levels()],
        "fve": [round(item.fve, 5) for item in meter.levels()],
        META_KEY: origin,
    }
    floor = None
    if random_control:
        generator = torch.Generator().manual_seed(seed)
        noise = normalize(torch.randn(directions.shape, generator=generator), dim=1)
        # A configuration of its own: training says in it what is no longer true of the weights.
        control = MatryoshkaSAE(deepcopy(config))
        fit_rows(control, noise, args, SITE, "Random rows")
        floor = _calibrate_and_measure(control, noise).levels()[-1].fve
    return MetaResult(meta, rows, level.fve, floor, level.l0, level.dead)


def is_meta_sae(sae: MatryoshkaSAE) -> bool:
    """Whether an SAE was trained on another one's decoder rows.

    Args:
        sae: the SAE.
    """
    return META_KEY in (sae.config.measured or {})


def _check_sizes(num_rows: int, num_latents: int, k: float, max_steps: int) -> None:
    if num_rows < 8:
        raise InputError(
            f"A meta-SAE needs the decoder rows of at least 8 latents that fire; this SAE has {num_rows}."
        )
    if num_latents >= num_rows:
        raise InputError(
            f"A meta-SAE of {num_latents} latents could store each of the {num_rows} decoder rows by itself; give "
            f"fewer, such as {max(1, num_rows // WIDTH_SHARE)}."
        )
    if not 0 < k <= num_latents or max_steps < 1:
        raise InputError(f"Expected 0 < k <= {num_latents} and max_steps of at least 1; got {k} and {max_steps}.")


def fit_rows(sae: MatryoshkaSAE, x: Tensor, args: SAETrainingArguments, site: Site, what: str) -> None:
    """Train an SAE on rows in memory, reshuffled in every pass.

    It ends in evaluation mode, without a threshold set.

    Args:
        sae: it is changed.
        x: rows, (n, hidden_size).
        args: of which it takes what a learner takes; with `init_from` the SAE's weights are where it begins.
        site: what the learner takes the rows to be of.
        what: the name of the progress bar.

    Raises:
        TrainingDiverged: the loss was not finite.
    """
    learner = Learner(what, sae, site, Run(args), args.max_steps)
    batches = _batches(x, args.per_device_train_batch_size, args.seed)
    learner.start(x[: 64 * args.per_device_train_batch_size])
    for step in logging.tqdm(range(args.max_steps), desc=what, unit="step"):
        learner.step(next(batches), step)
    learner.finish()
    if int(learner.bad_step) >= 0:
        raise TrainingDiverged(
            f"{what}: the loss was NaN or infinite at step {int(learner.bad_step)}. Give a lower learning rate than "
            f"{learner.learning_rate:g}."
        )


def _batches(x: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches of rows without end; a remainder of a pass is left out of that pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) - size + 1, size):
            yield x[order[start : start + size]]


def _calibrate_and_measure(sae: MatryoshkaSAE, rows: Tensor) -> ReconstructionMeter:
    """Set the threshold so that L0 is k, and record firing rates and maxima.

    There is no other data to hold out: the rows are all that will ever be decomposed.
    """
    parts = rows.split(BATCH_SIZE)
    sae.calibrate_threshold(part.to(sae.device) for part in parts)
    meter = ReconstructionMeter(sae)
    for part in parts:
        meter.update(part)
    with torch.no_grad():
        sae.max_activation.copy_(meter.max_activation)
        sae.firing_rate.copy_(meter.firing_rate)
    return meter


@torch.inference_mode()
def decompose(
    meta: MatryoshkaSAE, sae: MatryoshkaSAE, latents: Sequence[int], *, neighbours: int = 5
) -> list[Decomposition]:
    """Take latents of an SAE apart.

    Args:
        meta: a meta-SAE.
        sae: the SAE that it was trained on.
        latents: their numbers.
        neighbours: how many other latents to list that use a meta-latent most; 0 for none.

    Raises:
        InputError: the SAE does not have such a latent, or the meta-SAE is of another width.
    """
    if meta.config.hidden_size != sae.config.hidden_size:
        raise InputError(
            f"The meta-SAE reads rows of {meta.config.hidden_size} dimensions, the SAE's have "
            f"{sae.config.hidden_size}; it was trained on {meta.config.base_model or 'another SAE'}."
        )
    missing = [latent for latent in latents if not 0 <= latent < sae.config.num_latents]
    if missing:
        raise InputError(f"There are latents 0 to {sae.config.num_latents - 1}; got {missing}.")
    rows, directions = unit_rows(sae)
    users = meta.encode(directions.to(meta.device)).cpu()
    wanted = normalize(sae.W_dec[torch.tensor(list(latents), dtype=torch.long)].float(), dim=1).to(meta.device)
    found = meta.encode(wanted)
    cosines = torch.cosine_similarity(found @ meta.W_dec, wanted - meta.b_dec, dim=1).tolist()
    return [
        Decomposition(latent, cosine, _parts(latent, activations, users, rows, neighbours))
        for latent, cosine, activations in zip(latents, cosines, found.cpu(), strict=True)
    ]


def _parts(latent: int, activations: Tensor, users: Tensor, rows: Tensor, neighbours: int) -> list[Part]:
    used = activations.nonzero().flatten()
    parts = []
    for meta_latent in used[activations[used].argsort(descending=True)].tolist():
        others = _others(latent, users[:, meta_latent], rows, neighbours) if neighbours else []
        parts.append(Part(meta_latent, activations[meta_latent].item(), others))
    return parts


def _others(latent: int, column: Tensor, rows: Tensor, neighbours: int) -> list[tuple[int, float]]:
    """The latents but one with the largest activations of a meta-latent (n,), and these."""
    column = column.masked_fill(rows == latent, 0.0)
    order = column.argsort(descending=True, stable=True)[:neighbours]
    return [(int(rows[place]), column[place].item()) for place in order.tolist() if column[place] > 0]


@dataclass(frozen=True)
class MetaNumbers:
    """A meta-SAE of one SAE in numbers.

    Args:
        rows: decoder rows that it was trained on.
        num_latents: meta-latents.
        l0: meta-latents per row.
        explained: of the rows' variance.
        explained_random: of as many random directions.
    """

    rows: int
    num_latents: int
    l0: float
    explained: float
    explained_random: float


class MetaMetric(Metric[dict[str, MetaNumbers]]):
    """How far decoder rows are sums of fewer directions, by the SAE's name."""

    name = "meta"

    def measure(self, inputs: MetricInputs) -> dict[str, MetaNumbers]:
        """Train a meta-SAE of a quarter of the width for each trained SAE, and one on random directions.

        The latter tells what is no composition.
        """
        return {name: _measure(sae, name, inputs.seed) for name, sae in trained_saes(inputs).items()}

    def tables(self, result: dict[str, MetaNumbers], evaluation: Evaluation) -> list[Table]:
        """One, with a row for each method."""
        if not result:
            return []
        rows = []
        for label, names in labelled_methods(evaluation, result).items():
            of = [result[name] for name in names]
            shares = [
                [m.explained for m in of],
                [m.explained_random for m in of],
                [m.explained - m.explained_random for m in of],
            ]
            sizes = [write_cell([m.rows for m in of], 0), write_cell([m.num_latents for m in of], 0)]
            rows.append([label, *sizes, *(write_cell(values, 1, 100.0) for values in shares)])
        note = (
            "A meta-SAE of a quarter of the width, k = 4, on the decoder rows of the latents that fire, and one on as "
            "many random directions. Only what is beyond random directions is composition. hf-msae meta has the "
            "browser."
        )
        header = ["SAE", "rows", "meta-latents", "explained %", "of random %", "beyond %"]
        return [Table("Meta-SAEs", note, header, rows)]


def _measure(sae: MatryoshkaSAE, name: str, seed: int) -> MetaNumbers:
    result = train_meta_sae(sae, max_steps=REPORT_STEPS, seed=seed, name=name, use_cpu=sae.device.type == "cpu")
    assert result.explained_random is not None
    width = result.sae.config.num_latents
    return MetaNumbers(len(result.rows), width, result.l0, result.explained, result.explained_random)
