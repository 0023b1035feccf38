"""SAE stitching: what a larger SAE knows that a smaller one does not (Leask et al., arXiv:2502.04878).

Which latents are novel to the small one is the question of `hf_msae.research.novelty`. Stitching then leads from the
small SAE to the large one. First novel latents are inserted, which raises L0; then groups are swapped, large for
small, which keeps it about the same. How the paper forms groups was not to be found out: here they are the connected
components of the graph that joins latents of the two SAEs whose decoder rows have a cosine of at least the cut. Last,
all that found no partner is exchanged, the decoder bias too. So the curve ends at exactly the large SAE.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_msae.errors import InputError
from hf_msae.evaluation.activations import TextActivations, total_variance
from hf_msae.evaluation.metric import Evaluation, Metric, MetricInputs, Plot, Table
from hf_msae.evaluation.tables import write_cell
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.research.novelty import (
    COSINE_CUT,
    Novelty,
    NoveltyNumbers,
    measure_level_novelty,
    measure_novelty,
    shared_batches,
)
from hf_msae.research.subjects import trained_saes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INSERTIONS, SWAPS = "insert", "swap"


@dataclass(frozen=True)
class StitchPoint:
    """A dictionary on the way from the small SAE to the large one.

    Args:
        step: what was done last.
        inserted: latents of the large SAE that are in it.
        removed: latents of the small SAE that are out of it.
        l0: mean number of active latents per token.
        fve: fraction of variance explained.
    """

    step: str
    inserted: int
    removed: int
    l0: float
    fve: float


@dataclass(frozen=True)
class StitchResult:
    """A small and a large SAE.

    Args:
        novelty: of the large one's latents.
        curve: begins with the step "small" and ends with "large".
        groups: pairs of latents of the small SAE and of the large one that are swapped together.
        cosine_cut: from which cosine on latents are swapped.
        tokens: that it was measured on.
    """

    novelty: Novelty
    curve: list[StitchPoint]
    groups: list[tuple[list[int], list[int]]]
    cosine_cut: float
    tokens: int


@torch.inference_mode()
def measure_stitching(
    text: TextActivations,
    small: MatryoshkaSAE,
    large: MatryoshkaSAE,
    *,
    cosine_cut: float = COSINE_CUT,
    steps: int = 12,
) -> StitchResult:
    """Novelty, and the curve from the small SAE to the large one.

    Novel latents are inserted in the order of what each gains alone, groups swapped in the order of their largest
    cosine.

    Args:
        text: activations of the SAEs' site.
        small: in evaluation mode.
        large: in evaluation mode.
        cosine_cut: from which cosine on latents are swapped.
        steps: about how many insertions, and as many swaps.

    Raises:
        InputError: the SAEs are of different widths, the cut is outside (0, 1], or there is less than one step.
    """
    if not 0 < cosine_cut <= 1 or steps < 1:
        raise InputError(
            f"cosine_cut must be in (0, 1] and steps at least 1, got cosine_cut={cosine_cut}, steps={steps}."
        )
    novelty = measure_novelty(text, small, large)
    groups = swap_groups(small.W_dec, large.W_dec, novelty.reconstruction, cosine_cut)
    plan = _Plan.make(novelty, groups, small.config.num_latents, steps)
    curve = _walk(text, small, large, plan)
    return StitchResult(novelty, curve, groups, cosine_cut, text.num_tokens)


def swap_groups(
    small: Tensor, large: Tensor, eligible: Tensor, cosine_cut: float
) -> list[tuple[list[int], list[int]]]:
    """Which latents replace which: connected components of the graph of decoder rows.

    It has an edge where the cosine of a small and a large row is at least the cut.

    Args:
        small: decoder rows, (m, d).
        large: decoder rows, (n, d).
        eligible: which of the large ones take part, (n,) bool.
        cosine_cut: the cut.

    Returns:
        Latents of the small and of the large SAE; the components with the largest cosine come first.
    """
    candidates = eligible.nonzero().flatten().cpu()
    cosines = (normalize(large[candidates.to(large.device)].float(), dim=1) @ normalize(small.float(), dim=1).T).cpu()
    new, old = (cosines >= cosine_cut).nonzero(as_tuple=True)
    # Small latents are the nodes 0 … m - 1, the candidates those after them; each takes the lowest label around it.
    offset, labels = len(small), torch.arange(len(small) + len(candidates))
    while True:
        lowest = torch.minimum(labels[old], labels[new + offset])
        spread = labels.scatter_reduce(0, old, lowest, "amin").scatter_reduce(0, new + offset, lowest, "amin")
        if torch.equal(spread, labels):
            break
        labels = spread
    best: dict[int, float] = {}
    members: dict[int, tuple[set[int], set[int]]] = {}
    for label, i, j, cosine in zip(
        labels[old].tolist(), old.tolist(), candidates[new].tolist(), cosines[new, old].tolist(), strict=True
    ):
        members.setdefault(label, (set(), set()))
        members[label][0].add(i)
        members[label][1].add(j)
        best[label] = max(best.get(label, -1.0), cosine)
    ordered = sorted(members, key=lambda label: -best[label])
    return [(sorted(members[label][0]), sorted(members[label][1])) for label in ordered]


@dataclass(frozen=True)
class _Plan:
    """At which step each latent of the large SAE comes in, (n,), and each of the small one goes, (m,)."""

    names: list[str]
    comes: Tensor
    goes: Tensor

    @classmethod
    def make(cls, novelty: Novelty, groups: list[tuple[list[int], list[int]]], num_small: int, steps: int) -> "_Plan":
        novel = novelty.novel.nonzero().flatten()
        novel = novel[novelty.gain[novel].argsort(descending=True)]
        insertions = _portions(len(novel), steps)
        swaps = _portions(len(groups), steps)
        names = ["small", *[INSERTIONS] * len(insertions), *[SWAPS] * len(swaps), "large"]
        last = len(names) - 1
        comes = torch.full(novelty.gain.shape, last)
        goes = torch.full((num_small,), last)
        for step, (low, high) in enumerate(insertions, start=1):
            comes[novel[low:high]] = step
        for step, (low, high) in enumerate(swaps, start=1 + len(insertions)):
            for old, new in groups[low:high]:
                goes[old], comes[new] = step, step
        return cls(names, comes, goes)


def _portions(count: int, steps: int) -> list[tuple[int, int]]:
    """`count` things in at most `steps` portions of nearly one size."""
    bounds = sorted({round(count * step / steps) for step in range(steps + 1)})
    return list(pairwise(bounds))


def _walk(text: TextActivations, small: MatryoshkaSAE, large: MatryoshkaSAE, plan: _Plan) -> list[StitchPoint]:
    count = len(plan.names)
    errors, active = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    coming, going = ([(at == step).nonzero().flatten() for step in range(count)] for at in (plan.comes, plan.goes))
    for x in shared_batches(text, small, large):
        new, old = large.encode(x), small.encode(x)
        error = x.double() - small.decode(old)
        l0 = (old > 0).sum().item()
        for step in range(count):
            comes, goes = coming[step].to(x.device), going[step].to(x.device)
            if step == count - 1:
                # Exactly the large SAE's, and not what rounding left on the way.
                error, l0 = x.double() - large.decode(new), (new > 0).sum().item()
            else:
                error = error - new[:, comes] @ large.W_dec[comes] + old[:, goes] @ small.W_dec[goes]
                l0 += (new[:, comes] > 0).sum().item() - (old[:, goes] > 0).sum().item()
            errors[step] += error.pow(2).sum().item()
            active[step] += l0
    total = total_variance(text.x)
    return [
        StitchPoint(
            step=name,
            inserted=int((plan.comes <= step).sum()),
            removed=int((plan.goes <= step).sum()),
            l0=active[step].item() / text.num_tokens,
            fve=1 - errors[step].item() / total,
        )
        for step, name in enumerate(plan.names)
    ]


def draw_stitching(result: StitchResult, figure: "Figure") -> None:
    """The curve from the small SAE to the large one, and gains against cosines.

    Args:
        result: what is drawn.
        figure: an empty matplotlib figure.
    """
    left, middle, right = figure.subplots(1, 3)
    steps = range(len(result.curve))
    for axis, values, name in (
        (left, [point.fve for point in result.curve], "FVE"),
        (middle, [point.l0 for point in result.curve], "L0"),
    ):
        axis.plot(steps, values, color="0.7", linewidth=1)
        for kind, colour in (("small", "C7"), (INSERTIONS, "C0"), (SWAPS, "C1"), ("large", "C2")):
            at = [place for place in steps if result.curve[place].step == kind]
            axis.plot(at, [values[place] for place in at], "o", markersize=4, color=colour, label=kind)
        axis.set(xlabel="step", ylabel=name)
    left.legend(fontsize=7)
    alive = result.novelty.alive
    right.plot(result.novelty.cosine[alive], result.novelty.gain[alive], ".", markersize=2, alpha=0.4)
    right.axhline(0, color="C3", linewidth=0.8)
    right.axvline(result.cosine_cut, color="C3", linewidth=0.8, linestyle="--")
    right.set(xlabel="largest cosine with the small SAE", ylabel="gain in FVE when inserted alone")
    right.set_yscale("symlog", linthresh=1e-5)


@dataclass(frozen=True)
class Stitching:
    """From a small dictionary to a large one.

    Args:
        novelty: of the large one's latents.
        curve: from the one to the other; the levels of one SAE have none.
    """

    novelty: NoveltyNumbers
    curve: StitchResult | None


class StitchingMetric(Metric[list[Stitching]]):
    """Between the levels of each SAE, from its first prefix to its whole, and between SAEs of different width."""

    name = "stitching"
    takes_tokenized = False

    def measure(self, inputs: MetricInputs) -> list[Stitching]:
        """Measure trained SAEs: novelty between levels, then the curves."""
        text, saes = inputs.text, trained_saes(inputs)
        found = []
        for name, sae in saes.items():
            for level in measure_level_novelty(text, sae):
                numbers = NoveltyNumbers.of(f"{name}, {level.inner:,}", f"{name}, {level.prefix:,}", level.novelty)
                found.append(Stitching(numbers, None))
        for small_name, small in saes.items():
            if small.config.num_levels > 1:
                inner = small.config.prefix_sizes[0]
                found.append(_stitch(text, f"{small_name}, {inner:,}", small.truncate(inner), small_name, small))
            for large_name, large in saes.items():
                if small.config.num_latents < large.config.num_latents:
                    found.append(_stitch(text, small_name, small, large_name, large))
        return found

    def tables(self, result: list[Stitching], evaluation: Evaluation) -> list[Table]:
        """One, with a row for each pair of dictionaries."""
        if not result:
            return []
        rows = []
        for item in result:
            numbers = item.novelty
            shares = (f"{100 * share:.1f}" for share in (numbers.novel, numbers.novel_by_cosine, numbers.agreement))
            rows.append([numbers.small, numbers.large, f"{numbers.fire:,}", *shares, write_cell([numbers.auroc], 2)])
        note = (
            "A latent of the large dictionary is novel if inserting it alone into the small one lowers the squared "
            f"error; by cosine, if no decoder row of the small one is nearer than {COSINE_CUT}. AUROC: how well a low "
            "cosine ranks novel latents first; none where all are of one kind."
        )
        header = ["small", "large", "fire", "novel %", "by cosine %", "agree %", "AUROC"]
        return [Table("Stitching", note, header, rows)]

    def plots(self, result: list[Stitching], evaluation: Evaluation) -> list[Plot]:
        """The curves."""
        return [
            Plot(
                f"From {item.novelty.small} to {item.novelty.large}: novel latents are inserted, twins swapped, and "
                "at last the rest.",
                partial(draw_stitching, item.curve),
            )
            for item in result
            if item.curve is not None
        ]


def _stitch(
    text: TextActivations, small_name: str, small: MatryoshkaSAE, large_name: str, large: MatryoshkaSAE
) -> Stitching:
    result = measure_stitching(text, small, large)
    return Stitching(NoveltyNumbers.of(small_name, large_name, result.novelty), result)
