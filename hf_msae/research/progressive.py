"""Progressive coding: any SAE as a nested code, its latents in order of importance (arXiv:2505.00190).

Sort the latents of a plain SAE by how much they matter, keep the first m, and there is a prefix without any training
for nesting. It is the baseline that a Matryoshka SAE must beat at every size. The paper orders by E[a²] (best there)
or by how often a latent fires; where decoder rows are not of norm 1, E[a²]·‖W_dec‖² is the former in the units of the
activations. The order is found on the same tokens on which it is then judged, which can only flatter the baseline.

The paper also reports that sorted importance follows a power law. A straight line in a log–log plot is easily seen
and seldom true, so the fit comes with its range, its R², and the R² of an exponential over the same ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.utils import logging

from hf_msae.cross_entropy import measure_cross_entropy, predicts_next_token
from hf_msae.errors import InputError
from hf_msae.evaluation.activations import TextActivations
from hf_msae.evaluation.importance import IMPORTANCES, Importance, measure_importance, reorder
from hf_msae.evaluation.metric import Evaluation, Metric, MetricInputs, Plot, Table
from hf_msae.evaluation.tables import labelled_methods, write_cell
from hf_msae.metrics import ReconstructionMeter
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.research.representation import linear_cka, pair_ranks, rank_correlation
from hf_msae.research.subjects import trained_saes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDERS = ("own", *IMPORTANCES)
# Those of a report. By contribution, E[a²]·‖W_dec‖², is by energy where decoder rows are of norm 1.
REPORTED_ORDERS = ("own", "energy", "frequency")


@dataclass(frozen=True)
class PowerLaw:
    """A fit of importance ≈ scale · rank^(−exponent), by least squares in logarithms.

    Each rank weighs 1/rank, so that every decade of ranks counts alike and not the tail alone.

    Args:
        exponent: of the rank, with its sign turned.
        scale: of the law.
        first: the first rank of the fit, from 1.
        last: the last rank of the fit.
        r2: the share of the logarithm's variance that the line explains.
        r2_exponential: that of importance ≈ a·e^(−b·rank) under the same weights: where it is as good, there is no
            power law to speak of.
    """

    exponent: float
    scale: float
    first: int
    last: int
    r2: float
    r2_exponential: float


@dataclass(frozen=True)
class ProgressivePoint:
    """The first latents of one SAE in one order.

    Args:
        sae: its name.
        order: of `ORDERS`.
        prefix: how many latents.
        l0: mean number of active latents per token.
        fve: fraction of variance explained.
        ce_recovered: against setting the site to zero; None where it was not measured.
        ce_recovered_mean: against setting it to the mean.
        rsa: of x̂ with x, a mean over draws of tokens.
        rsa_spread: standard deviation over draws.
        cka: of x̂ with x, a mean over draws of tokens.
    """

    sae: str
    order: str
    prefix: int
    l0: float
    fve: float
    ce_recovered: float | None
    ce_recovered_mean: float | None
    rsa: float
    rsa_spread: float
    cka: float


@dataclass(frozen=True)
class ProgressiveResult:
    """All points, and each SAE's law of importance.

    Args:
        points: by SAE, order and prefix.
        laws: by the SAE's name, of importance by contribution.
        importances: by the SAE's name.
        tokens: behind L0 and FVE.
        ce_tokens: behind cross-entropies.
        rsa_tokens: in each draw behind RSA and CKA.
    """

    points: list[ProgressivePoint]
    laws: dict[str, PowerLaw]
    importances: dict[str, Importance]
    tokens: int
    ce_tokens: int
    rsa_tokens: int


def fit_power_law(importance: Tensor, first: int = 1, last: int | None = None) -> PowerLaw:
    """Fit sorted importance.

    Args:
        importance: (n,), in any order.
        first: the first rank, from 1.
        last: the last rank; by default the number of latents whose importance is above zero.

    Raises:
        InputError: fewer than three ranks are left, or the range reaches zeros.
    """
    values = importance.double().sort(descending=True).values
    alive = int((values > 0).sum())
    last = alive if last is None else last
    if first < 1 or last > alive or last - first < 2:
        raise InputError(
            f"A power law needs at least three ranks from 1 to {alive}, the number of latents with importance above "
            f"zero; got {first} to {last}."
        )
    ranks = torch.arange(first, last + 1, dtype=torch.float64)
    logs = values[first - 1 : last].log()
    slope, intercept, r2 = _weighted_line(ranks.log(), logs, 1 / ranks)
    r2_exponential = _weighted_line(ranks, logs, 1 / ranks)[2]
    return PowerLaw(-slope, float(torch.tensor(intercept).exp()), first, last, r2, r2_exponential)


def _weighted_line(x: Tensor, y: Tensor, weights: Tensor) -> tuple[float, float, float]:
    """Slope, intercept and R² of a line through points (n,)."""
    weights = weights / weights.sum()
    mean_x, mean_y = weights @ x, weights @ y
    slope = (weights @ ((x - mean_x) * (y - mean_y))) / (weights @ (x - mean_x).pow(2))
    intercept = mean_y - slope * mean_x
    total = weights @ (y - mean_y).pow(2)
    left = weights @ (y - slope * x - intercept).pow(2)
    return slope.item(), intercept.item(), (1 - left / total).item() if total > 0 else 1.0


@torch.inference_mode()
def measure_progressive(
    text: TextActivations,
    saes: Mapping[str, MatryoshkaSAE],
    sizes: Sequence[int],
    *,
    orders: Sequence[str] = ORDERS,
    ce_tokens: int = 10_000,
    rsa_tokens: int = 1_000,
    rsa_draws: int = 3,
    seed: int = 0,
) -> ProgressiveResult:
    """Cut every SAE to the same sizes, in several orders of its latents, and measure what is left.

    Args:
        text: activations of the SAEs' site.
        saes: by name, in evaluation mode.
        sizes: numbers of latents, increasing; those above an SAE's own are left out, and its whole is always added.
        orders: of `ORDERS`; "own" is the order in the file, which only nesting gives a meaning.
        ce_tokens: how many tokens to run the spliced language model on; 0 skips it, as a model that predicts none
            does.
        rsa_tokens: tokens in each draw for the representational similarity.
        rsa_draws: how many draws.
        seed: of these.

    Raises:
        InputError: an order is not known, sizes do not increase, or an SAE is of another width than the activations.
    """
    _check(text, saes, sizes, orders)
    rsa_tokens = min(rsa_tokens, text.num_tokens)
    draws = _draws(text.x, rsa_tokens, rsa_draws, seed)
    points: list[ProgressivePoint] = []
    importances: dict[str, Importance] = {}
    with logging.tqdm(total=len(saes) * len(orders), desc="Progressive coding", unit=" order") as progress:
        for name, sae in saes.items():
            importances[name] = measure_importance(sae, text.batches(sae))
            fitting = [size for size in sizes if size < sae.config.num_latents]
            levels = [*fitting, sae.config.num_latents]
            for order in orders:
                ranked = torch.arange(sae.config.num_latents)
                if order != "own":
                    ranked = importances[name].by(order).argsort(descending=True, stable=True)
                nested = reorder(sae, ranked, levels)
                points += _measure_levels(text, nested, (name, order), draws, ce_tokens)
                progress.update()
    laws = {name: fit_power_law(importance.contribution) for name, importance in importances.items()}
    return ProgressiveResult(points, laws, importances, text.num_tokens, ce_tokens, rsa_tokens)


def _check(
    text: TextActivations, saes: Mapping[str, MatryoshkaSAE], sizes: Sequence[int], orders: Sequence[str]
) -> None:
    unknown = [order for order in orders if order not in ORDERS]
    if unknown or not orders:
        raise InputError(f"Latents can be ordered by {', '.join(ORDERS)}; got {', '.join(unknown) or 'none'}.")
    if list(sizes) != sorted(set(sizes)) or not sizes or sizes[0] < 1:
        raise InputError(f"sizes must be numbers of latents that increase, got {list(sizes)}.")
    for name, sae in saes.items():
        if sae.config.hidden_size != text.x.shape[1]:
            raise InputError(
                f"The SAE {name} reads activations of {sae.config.hidden_size} dimensions, but these have "
                f"{text.x.shape[1]}."
            )


@dataclass(frozen=True)
class _Draw:
    """Some tokens' activations (n, hidden_size), the mean of all tokens, and how alike these tokens are."""

    x: Tensor
    mean: Tensor
    ranks: Tensor


def _draws(x: Tensor, size: int, count: int, seed: int) -> list[_Draw]:
    generator = torch.Generator().manual_seed(seed)
    mean = x.double().mean(0)
    drawn = [x[torch.randperm(len(x), generator=generator)[:size]] for _ in range(count)]
    return [_Draw(rows, mean, pair_ranks(rows - mean)) for rows in drawn]


def _measure_levels(
    text: TextActivations, sae: MatryoshkaSAE, label: tuple[str, str], draws: Sequence[_Draw], ce_tokens: int
) -> list[ProgressivePoint]:
    meter = ReconstructionMeter(sae)
    for x in text.batches(sae):
        meter.update(x)
    functional = None
    if ce_tokens and predicts_next_token(text.model):
        functional = measure_cross_entropy(text.model, text.site, sae, meter.mean, text.token_batches(ce_tokens))
    similar = [_similarities(draw, sae) for draw in draws]
    points = []
    for level, measured in enumerate(meter.levels()):
        of_rsa = torch.tensor([found[level][0] for found in similar])
        spliced = functional.levels[level] if functional is not None else None
        points.append(
            ProgressivePoint(
                sae=label[0],
                order=label[1],
                prefix=measured.prefix,
                l0=measured.l0,
                fve=measured.fve,
                ce_recovered=spliced.ce_recovered if spliced else None,
                ce_recovered_mean=spliced.ce_recovered_mean if spliced else None,
                rsa=of_rsa.mean().item(),
                rsa_spread=of_rsa.std(correction=0).item(),
                cka=sum(found[level][1] for found in similar) / len(similar),
            )
        )
    return points


def _similarities(draw: _Draw, sae: MatryoshkaSAE) -> list[tuple[float, float]]:
    """RSA and CKA of each level's reconstructions with the activations."""
    levels = sae.decode_levels(sae.encode(draw.x.to(sae.device))).cpu()
    return [
        (rank_correlation(draw.ranks, pair_ranks(level - draw.mean)), linear_cka(draw.x, level)) for level in levels
    ]


def draw_progressive(result: ProgressiveResult, figure: "Figure") -> None:
    """FVE and RSA against the number of latents kept, and sorted importance with its law.

    Args:
        result: what is drawn.
        figure: an empty matplotlib figure.
    """
    left, middle, right = figure.subplots(1, 3)
    kept = sorted({point.prefix for point in result.points})
    for number, name in enumerate(result.importances):
        for order, style in zip(ORDERS, ("-", "--", ":", "-."), strict=True):
            points = [point for point in result.points if (point.sae, point.order) == (name, order)]
            sizes = [point.prefix for point in points]
            if points and order != "contribution":
                options = {"linestyle": style, "color": f"C{number}", "marker": "o", "markersize": 3}
                left.plot(sizes, [point.fve for point in points], label=f"{name}, {order}", **options)
                middle.plot(sizes, [point.rsa for point in points], **options)
        law = result.laws[name]
        values = result.importances[name].contribution.sort(descending=True).values[: law.last].tolist()
        ranks = list(range(1, law.last + 1))
        right.loglog(ranks, values, color=f"C{number}")
        fitted = [law.scale * rank**-law.exponent for rank in ranks]
        label = f"{name}: rank^−{law.exponent:.2f}, R² {law.r2:.2f}"
        right.loglog(ranks, fitted, "--", color=f"C{number}", linewidth=1, label=label)
    for axis, name in ((left, "FVE"), (middle, "RSA")):
        axis.set(xlabel="latents kept", ylabel=name, ylim=(-0.05, 1.02), xscale="log")
        axis.set_xticks(kept, [f"{size:,}" for size in kept])
        axis.minorticks_off()
    right.set(xlabel="rank", ylabel="E[a²]·‖W_dec‖²")
    # Curves of many SAEs leave no room for a legend among them.
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(ORDERS) - 1, fontsize=8)
    right.legend(fontsize=7)


class ProgressiveMetric(Metric[ProgressiveResult]):
    """Every SAE cut to the first one's prefixes, in its own order and in two sorted ones."""

    name = "progressive"
    takes_tokenized = False

    def measure(self, inputs: MetricInputs) -> ProgressiveResult | None:
        """Measure trained SAEs.

        The language model is not run again: what prefixes in their own order keep of it is among the core numbers.
        """
        saes = trained_saes(inputs)
        if not saes:
            return None
        sizes = inputs.subjects[0].sae.config.prefix_sizes
        return measure_progressive(inputs.text, saes, sizes, orders=REPORTED_ORDERS, ce_tokens=0, seed=inputs.seed)

    def tables(self, result: ProgressiveResult, evaluation: Evaluation) -> list[Table]:
        """What is left of each SAE at the same sizes, and whether sorted importance follows a power law."""
        return [_points_table(result, evaluation), _laws_table(result, evaluation)]

    def plots(self, result: ProgressiveResult, evaluation: Evaluation) -> list[Plot]:
        """One SAE of each method: more lines could not be told apart."""
        firsts = {names[0] for names in evaluation.names_by_method().values()}
        importances = {name: found for name, found in result.importances.items() if name in firsts}
        return [
            Plot(
                "FVE and RSA of prefixes, and importance by rank with its fitted law.",
                lambda figure: draw_progressive(replace(result, importances=importances), figure),
            )
        ]


def _points_table(result: ProgressiveResult, evaluation: Evaluation) -> Table:
    rows = []
    for label, names in labelled_methods(evaluation, result.laws).items():
        points = [point for point in result.points if point.sae in names]
        for order, prefix in dict.fromkeys((point.order, point.prefix) for point in points):
            found = [point for point in points if (point.order, point.prefix) == (order, prefix)]
            cells = [write_cell([vars(p)[name] for p in found], 3) for name in ("fve", "rsa", "cka")]
            rows.append([label, order, f"{prefix:,}", write_cell([p.l0 for p in found], 2), *cells])
    note = (
        "The first latents in the order of the file, and sorted by E[a²] (energy) and by how often they fire, on "
        f"{result.tokens:,} tokens. Order is found on the tokens it is judged on, which favours sorted ones; and "
        "at equal size they have fewer active latents. RSA and CKA: how far reconstructions keep the relations "
        f"between tokens ({result.rsa_tokens:,} of them, three draws); the form of RSA is ours, as the paper "
        "leaves it open."
    )
    return Table("Progressive coding", note, ["SAE", "order", "latents", "L0", "FVE", "RSA", "CKA"], rows)


def _laws_table(result: ProgressiveResult, evaluation: Evaluation) -> Table:
    rows = []
    for label, names in labelled_methods(evaluation, result.laws).items():
        of = [result.laws[name] for name in names]
        ranks = f"{of[0].first:,}–{of[0].last:,}"
        cells = [write_cell([vars(law)[field] for law in of], 2) for field in ("exponent", "r2", "r2_exponential")]
        rows.append([label, ranks, *cells])
    note = (
        "E[a²]·‖W_dec‖² of the latents that fire, sorted, fitted in logarithms with each rank weighed 1/rank. Where "
        "the exponential fits as well, there is no power law to speak of."
    )
    return Table("Importance by rank", note, ["SAE", "ranks", "exponent", "R²", "R², exponential"], rows)
