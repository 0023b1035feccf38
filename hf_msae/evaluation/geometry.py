"""Where the latents lie: how near to each other, to their encoders, to the level before, and to another SAE's.

Only latents that fire are compared: dead ones keep the random directions they began with. The mean of |cosine| over
pairs of decoder rows (c_dec) is lowest near the right L0 (arXiv:2508.16560); a high nearest neighbour is redundancy.
Agreement between SAEs that differ in their seed is low in general (about 30% of latents are shared, arXiv:2501.16615):
what a single SAE shows may be an accident of its seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_msae.evaluation.metric import Evaluation, Metric, MetricInputs, Table
from hf_msae.evaluation.tables import Column, field_at_prefix, table_by_prefix
from hf_msae.modeling import MatryoshkaSAE

# From here on two latents count as the same: the cut-off that papers on seeds use.
SAME_COSINE = 0.7
ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class LevelGeometry:
    """Cosines among the latents of one prefix that fire.

    Args:
        prefix: latents in the prefix.
        alive: how many of them fire.
        decoder_nearest: mean over latents of the largest |cosine| of a decoder row with another.
        decoder_pairs: mean |cosine| over pairs of decoder rows.
        encoder_nearest: as `decoder_nearest`, of encoder rows.
        encoder_decoder: mean cosine of a latent's two rows; None of a transcoder, whose rows are of two places.
        parent_nearest: mean over the latents that this level adds of the largest cosine with a latent of the level
            before; None at the first level.
        parent_same: the share of them where it is above 0.7; None at the first level.
    """

    prefix: int
    alive: int
    decoder_nearest: float
    decoder_pairs: float
    encoder_nearest: float
    encoder_decoder: float | None
    parent_nearest: float | None
    parent_same: float | None


@dataclass(frozen=True)
class Agreement:
    """How far two SAEs' prefixes hold the same latents.

    Args:
        one: name of an SAE.
        two: name of the other.
        prefixes: latents in the prefix of each.
        one_to_two: mean over one's latents of the largest decoder cosine with the other's (MMCS).
        two_to_one: the same the other way.
        shared: the share of latents, of both together, that are each other's nearest with a cosine above 0.7.
    """

    one: str
    two: str
    prefixes: tuple[int, int]
    one_to_two: float
    two_to_one: float
    shared: float


@dataclass(frozen=True)
class GeometryResult:
    """Geometry of all SAEs.

    Args:
        levels: by the SAE's name.
        agreement: of every two SAEs of one method.
    """

    levels: dict[str, list[LevelGeometry]]
    agreement: list[Agreement]


@torch.inference_mode()
def measure_geometry(sae: MatryoshkaSAE, firing_rate: Tensor) -> list[LevelGeometry]:
    """Cosines at every prefix.

    Args:
        sae: the SAE.
        firing_rate: of each latent, (num_latents,), as measured.
    """
    alive = (firing_rate > 0).to(sae.device)
    results = []
    inner: Tensor | None = None
    for prefix in sae.config.prefix_sizes:
        rows = alive[:prefix].nonzero().flatten()
        decoder, encoder = normalize(sae.W_dec[rows].float(), dim=1), normalize(sae.W_enc[rows].float(), dim=1)
        nearest, pairs = _within(decoder)
        parents = None
        if inner is not None and len(inner) < len(rows) and len(inner):
            parents = nearest_rows(decoder[len(inner) :], decoder[: len(inner)])[0]
        results.append(
            LevelGeometry(
                prefix=prefix,
                alive=len(rows),
                decoder_nearest=nearest,
                decoder_pairs=pairs,
                encoder_nearest=_within(encoder)[0],
                encoder_decoder=None if sae.config.is_transcoder else _mean_cosine(decoder, encoder),
                parent_nearest=None if parents is None else parents.mean().item(),
                parent_same=None if parents is None else (parents > SAME_COSINE).double().mean().item(),
            )
        )
        inner = rows
    return results


def _mean_cosine(rows: Tensor, others: Tensor) -> float:
    """Of unit rows (n, d), each with its own other."""
    return (rows * others).sum(1).mean().item() if len(rows) else 0.0


def _within(rows: Tensor) -> tuple[float, float]:
    """Mean largest |cosine| with another row, and mean |cosine| over pairs, of unit rows (n, d)."""
    if len(rows) < 2:
        return 0.0, 0.0
    nearest, total = 0.0, 0.0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        cosines = (rows[start : start + ROWS_AT_ONCE] @ rows.T).abs()
        cosines.diagonal(start).zero_()
        nearest += cosines.max(1).values.sum().item()
        total += cosines.sum(dtype=torch.float64).item()
    return nearest / len(rows), total / (len(rows) * (len(rows) - 1))


def nearest_rows(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """For each unit row the largest cosine with one of the others, and which.

    Args:
        rows: (n, d).
        others: (m, d).

    Returns:
        Cosines and indices, (n,) each.
    """
    found = [(part @ others.T).max(1) for part in rows.split(ROWS_AT_ONCE)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


@torch.inference_mode()
def measure_agreement(
    one: tuple[str, MatryoshkaSAE, Tensor], two: tuple[str, MatryoshkaSAE, Tensor]
) -> list[Agreement]:
    """Compare two SAEs of one site level by level; levels are paired by their place, from the outermost inwards.

    Args:
        one: an SAE's name, the SAE, and its latents' firing rates, (num_latents,).
        two: the same of the other.
    """
    sizes: Sequence[tuple[int, int]] = list(
        zip(reversed(one[1].config.prefix_sizes), reversed(two[1].config.prefix_sizes), strict=False)
    )
    results = []
    for prefixes in reversed(sizes):
        rows = [
            normalize(sae.W_dec[:prefix].float().cpu()[rate[:prefix] > 0], dim=1)
            for (_, sae, rate), prefix in zip((one, two), prefixes, strict=True)
        ]
        if not len(rows[0]) or not len(rows[1]):
            continue
        there, back = nearest_rows(rows[0], rows[1]), nearest_rows(rows[1], rows[0])
        mutual = back[1][there[1]] == torch.arange(len(rows[0]))
        shared = 2 * int((mutual & (there[0] > SAME_COSINE)).sum()) / (len(rows[0]) + len(rows[1]))
        results.append(Agreement(one[0], two[0], prefixes, there[0].mean().item(), back[0].mean().item(), shared))
    return results


class GeometryMetric(Metric[GeometryResult]):
    """Cosines among the latents of an SAE, and between SAEs that differ in their seed."""

    name = "geometry"
    takes_transcoders = True

    def measure(self, inputs: MetricInputs) -> GeometryResult:
        """Measure every SAE, and every pair of one method."""
        rates = inputs.firing_rates
        agreement = []
        for one, two in combinations(inputs.subjects, 2):
            if one.method == two.method:
                pair = ((subject.name, subject.sae, rates[subject.name]) for subject in (one, two))
                agreement += measure_agreement(*pair)
        return GeometryResult(
            {name: measure_geometry(sae, rates[name]) for name, sae in inputs.saes.items()}, agreement
        )

    def entries(self, result: GeometryResult) -> dict[str, Any]:
        """Both parts have a key of their own."""
        return {"geometry": result.levels, "agreement": result.agreement}

    def tables(self, result: GeometryResult, evaluation: Evaluation) -> list[Table]:
        """One of methods at prefixes, and one of pairs of seeds where there are several of a method."""
        columns = [
            Column("alive", field_at_prefix(result.levels, "alive"), 0),
            Column("nearest decoder |cos|", field_at_prefix(result.levels, "decoder_nearest")),
            Column("mean decoder |cos|", field_at_prefix(result.levels, "decoder_pairs"), 4),
            Column("nearest encoder |cos|", field_at_prefix(result.levels, "encoder_nearest")),
            Column("encoder·decoder", field_at_prefix(result.levels, "encoder_decoder")),
            Column("nearest in level before", field_at_prefix(result.levels, "parent_nearest")),
            Column("of these > 0.7, %", field_at_prefix(result.levels, "parent_same"), 1, 100.0),
        ]
        note = "Means over the latents that fire. The last two columns are of the latents that a level adds."
        tables = [table_by_prefix(evaluation, "Geometry", note, columns)]
        return [*tables, _agreement_table(result.agreement)] if result.agreement else tables


def _agreement_table(agreement: Sequence[Agreement]) -> Table:
    header = ["SAE", "other seed", "prefixes", "MMCS →", "MMCS ←", "shared %"]
    rows = [
        [
            item.one,
            item.two,
            f"{item.prefixes[0]:,} / {item.prefixes[1]:,}",
            f"{item.one_to_two:.3f}",
            f"{item.two_to_one:.3f}",
            f"{100 * item.shared:.1f}",
        ]
        for item in agreement
    ]
    note = (
        "MMCS: mean over one SAE's latents of the largest decoder cosine with the other's. Shared: latents that are "
        "each other's nearest, with a cosine above 0.7."
    )
    return Table("Agreement across seeds", note, header, rows)
