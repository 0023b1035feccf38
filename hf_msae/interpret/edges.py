"""The hierarchy between levels: which later latents refine which earlier ones, as far as firing tells.

A child c of a parent p fires where p fires: coverage P(p | c) is high. By itself that means little. A parent that
fires on most tokens covers anything, and an audit of published SAEs found that seven to nine of ten covered pairs are
what chance gives at the parent's firing rate. So an edge has to pass a chain of filters, and how many pass each is
reported:

1. cofiring: the two share at least `min_shared` tokens.
2. coverage: P(p | c) is at least `min_coverage`.
3. chance: the odds of p given c exceed those without c, tested one-sided, with Benjamini and Hochberg's bound on the
   share of false discoveries among all pairs that were eligible.
4. score: (P(p | c) − P(p)) / (1 − P(p)), how far above chance coverage lies on the way to 1, is at least `min_score`.
   Tokens of one text are not independent, so that significance alone comes too easily.
5. use: on the shared tokens, each of the two makes the squared error smaller, by at least `min_gain` of the
   activation's energy.
6. order: there, the parent gains at least as much as the child, which adds detail to it.
7. strength: there, the parent's mean activation is at least `min_strength` times its typical one, which is the mean
   of its activations, each weighed by itself. A latent that takes part in describing a token by chance fires weakly
   on it, and weak firings are many, so that a plain mean would be too low a bar.
8. residual: on the child's tokens, take the activation less what all other latents explain. Its mean has to point
   along the parent's decoder row, with a larger cosine than 95% of shuffled pairs have, in which a child is put under
   another child's parent.

Where the true hierarchy is known (`benchmarks/hierarchy.py`, docs/interpretation.md), order and strength tell right
edges from wrong ones best. The test that Tree SAE proposes (arXiv:2605.07922), the smaller of the residual's cosines
with the parent's and the child's row, did worse than chance there, because a true child's own share is small.

A child keeps all its parents: the result is a directed graph from earlier to later levels, not a tree. Latents that
are parents to a large share of all later ones are flagged as super-parents. That one latent fires where another fires
is a statistic of the text, and no proof that it means something more general.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hf_msae.errors import InputError
from hf_msae.interpret.cofiring import Cofirings, PairSums
from hf_msae.interpret.hierarchy import Edge, Hierarchy, HierarchySettings
from hf_msae.interpret.scan import Firings
from hf_msae.modeling import MatryoshkaSAE

SHUFFLES = 20
# Numbers of a (pairs, hidden_size) product that exist at once.
NUMBERS_AT_ONCE = 1 << 22


def find_hierarchy(sae: MatryoshkaSAE, firings: Firings, settings: HierarchySettings | None = None) -> Hierarchy:
    """Find parent → child edges in the active latents that a `scan` recorded.

    Args:
        sae: that was scanned.
        firings: what was recorded.
        settings: thresholds; the defaults, where none are given.

    Raises:
        InputError: the SAE has one level only, or nothing was recorded.
    """
    settings = settings or HierarchySettings()
    candidates = find_candidates(sae, firings, settings)
    survivors = {"eligible": candidates.num_eligible, "cofiring": candidates.num_shared}
    survivors["coverage"] = len(candidates.edges)
    alive = [True] * len(candidates.edges)
    for name, passes in filter_edges(candidates, settings).items():
        alive = [was and now for was, now in zip(alive, passes, strict=True)]
        survivors[name] = sum(alive)
    kept = [edge for edge, passed in zip(candidates.edges, alive, strict=True) if passed]
    sizes = list(sae.config.prefix_sizes)
    return Hierarchy(
        edges=kept,
        prefix_sizes=sizes,
        counts=candidates.counts,
        num_tokens=firings.num_tokens,
        survivors=survivors,
        residual_threshold=candidates.residual_threshold,
        super_parents=_super_parents(kept, sizes, candidates.counts, settings),
        settings=settings,
    )


@dataclass(frozen=True)
class Candidates:
    """Pairs that co-fire and cover, before the filters from "chance" on.

    Args:
        edges: the highest score first.
        counts: tokens on which each latent fires.
        num_eligible: pairs of latents that fire often enough.
        num_shared: of these, pairs that share enough tokens.
        residual_threshold: what shuffled pairs reach.
    """

    edges: list[Edge]
    counts: list[int]
    num_eligible: int
    num_shared: int
    residual_threshold: float


def find_candidates(sae: MatryoshkaSAE, firings: Firings, settings: HierarchySettings) -> Candidates:
    """Count and measure pairs.

    Args:
        sae: that was scanned.
        firings: what was recorded.
        settings: thresholds.

    Raises:
        InputError: the SAE has one level only, or nothing was recorded.
    """
    sizes = list(sae.config.prefix_sizes)
    if len(sizes) < 2:
        raise InputError(f"A hierarchy needs at least two levels; this SAE has one, of {sizes[0]} latents.")
    if not firings.num_tokens:
        raise InputError("No firings were recorded; scan with record_tokens above 0.")
    cofirings = Cofirings(firings, sae.config.num_latents)
    pairs, num_eligible, num_shared = _covered_pairs(cofirings, sizes, settings)
    edges, threshold = _measured(sae, cofirings, pairs, sizes, settings)
    return Candidates(edges, cofirings.count.tolist(), num_eligible, num_shared, threshold)


def filter_edges(candidates: Candidates, settings: HierarchySettings) -> dict[str, list[bool]]:
    """Which of the candidates' edges each filter from "chance" on lets pass, every filter by itself.

    Args:
        candidates: the edges.
        settings: thresholds.

    Returns:
        By the filter's name, in the order in which they are applied.
    """
    edges = candidates.edges
    return {
        "chance": _significant(edges, candidates.num_eligible, settings.false_discovery_rate),
        "score": [edge.score >= settings.min_score for edge in edges],
        "use": [min(edge.parent_gain, edge.child_gain) >= settings.min_gain for edge in edges],
        "order": [edge.parent_gain >= edge.child_gain for edge in edges],
        # A parent that always fires equally strongly has a strength of 1, but for rounding.
        "strength": [edge.strength * (1 + 1e-9) >= settings.min_strength for edge in edges],
        "residual": [edge.residual > candidates.residual_threshold for edge in edges],
    }


def _covered_pairs(cofirings: Cofirings, sizes: Sequence[int], settings: HierarchySettings) -> tuple[Tensor, int, int]:
    """Pairs (2, n) of parent and child that pass the first two filters.

    And how many pairs were eligible, and co-fire often enough.
    """
    eligible = cofirings.count >= settings.min_firings
    found, num_eligible, num_shared = [torch.empty(2, 0, dtype=torch.int64)], 0, 0
    for low, high in pairwise(sizes):
        num_eligible += int(eligible[:low].sum()) * int(eligible[low:high].sum())
        for block, counts in cofirings.counts(range(low, high), low):
            of_child = cofirings.count[block.start : block.stop, None]
            fit = eligible[:low] & eligible[block.start : block.stop, None]
            shared = fit & (counts >= settings.min_shared)
            num_shared += int(shared.sum())
            children, parents = (shared & (counts >= settings.min_coverage * of_child)).nonzero(as_tuple=True)
            found.append(torch.stack([parents, children + block.start]))
    return torch.cat(found, 1), num_eligible, num_shared


def _measured(
    sae: MatryoshkaSAE, cofirings: Cofirings, pairs: Tensor, sizes: Sequence[int], settings: HierarchySettings
) -> tuple[list[Edge], float]:
    """The edges of some pairs, the highest score first, and the cosine that the residual test asks for."""
    if not pairs.shape[1]:
        return [], 0.0
    parents, children = pairs
    sums = cofirings.sums(parents, children)
    num_tokens = cofirings.firings.num_tokens
    coverage = sums.count / cofirings.count[children]
    base = cofirings.count[parents].double() / num_tokens
    log_odds, p_values = _odds(sums.count, cofirings.count[parents], cofirings.count[children], num_tokens)
    residual = residual_scores(sae, cofirings, parents, children, sums)
    shuffled = _shuffled(parents, children, sizes, settings.seed)
    threshold = 0.0
    if shuffled.shape[1]:
        other_parents, same_children = shuffled
        other_sums = cofirings.sums(other_parents, same_children)
        scores = residual_scores(sae, cofirings, other_parents, same_children, other_sums)
        threshold = max(0.0, torch.quantile(scores, settings.residual_quantile).item())
    columns = {
        "parent": parents,
        "child": children,
        "shared": sums.count.long(),
        "coverage": coverage,
        "parent_firing_rate": base,
        "lift": coverage / base,
        "log_odds": log_odds,
        "p_value": p_values,
        "score": (coverage - base) / (1 - base).clamp_min(1 / num_tokens),
        "parent_gain": sums.gain_of_first / sums.energy,
        "child_gain": sums.gain_of_second / sums.energy,
        "strength": sums.activation / sums.count / cofirings.typical[parents],
        "residual": residual,
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    edges = [Edge(*row) for row in rows]
    return sorted(edges, key=lambda edge: (-edge.score, edge.parent, edge.child)), threshold


def _odds(shared: Tensor, of_parent: Tensor, of_child: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Log odds ratios of the 2 × 2 tables of firing, and the one-sided p-values of their z-scores.

    Each cell is half a token larger (Haldane).
    """
    cells = [shared, of_child - shared, of_parent - shared, num_tokens - of_parent - of_child + shared]
    both, child, parent, neither = ((cell + 0.5).double() for cell in cells)
    log_odds = (both * neither / (child * parent)).log()
    z = log_odds / (1 / both + 1 / child + 1 / parent + 1 / neither).sqrt()
    return log_odds, 0.5 * torch.special.erfc(z / math.sqrt(2))


def _significant(edges: Sequence[Edge], num_tests: int, rate: float) -> list[bool]:
    """Which edges Benjamini and Hochberg's procedure accepts among `num_tests` tests.

    Ranks are counted among these edges alone, which errs on the safe side.
    """
    order = sorted(range(len(edges)), key=lambda i: edges[i].p_value)
    last = max((rank for rank, i in enumerate(order, 1) if edges[i].p_value <= rate * rank / num_tests), default=0)
    accepted = set(order[:last])
    return [i in accepted for i in range(len(edges))]


def residual_scores(
    sae: MatryoshkaSAE, cofirings: Cofirings, parents: Tensor, children: Tensor, sums: PairSums
) -> Tensor:
    """The cosine of a parent's decoder row with what all other latents leave of its child's tokens.

    This is the mean, over the child's tokens, of the activation less what all other latents explain.

    Args:
        sae: that was scanned.
        cofirings: pairs of what was recorded.
        parents: of each pair, (n,) int64.
        children: of each pair, (n,) int64.
        sums: over the pairs' tokens.

    Returns:
        (n,) float64.
    """
    decoder = sae.W_dec.detach().double().cpu()
    firings, scores = cofirings.firings, []
    for places in torch.arange(len(parents)).split(max(1, NUMBERS_AT_ONCE // decoder.shape[1])):
        parent, child = parents[places], children[places]
        count = cofirings.count[child].double().clamp_min(1).unsqueeze(1)
        of_parent = sums.activation[places].unsqueeze(1) / count * decoder[parent]
        of_child = cofirings.total[child].unsqueeze(1) / count * decoder[child]
        left = firings.error_sums[child].double() / count + of_parent + of_child
        scores.append(torch.nn.functional.cosine_similarity(left, decoder[parent]))
    return torch.cat(scores)


def _shuffled(parents: Tensor, children: Tensor, sizes: Sequence[int], seed: int) -> Tensor:
    """Pairs (2, n) of the children with parents of other children.

    These lie in an earlier level and are none of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    own = {*zip(parents.tolist(), children.tolist(), strict=True)}
    first_of_group = torch.tensor([0, *sizes[:-1]])
    drawn = parents[torch.randint(len(parents), (SHUFFLES, len(parents)), generator=generator)]
    limits = first_of_group[torch.bucketize(children, torch.tensor(sizes), right=True)]
    pairs = {
        (parent, child)
        for row in drawn.tolist()
        for parent, child, limit in zip(row, children.tolist(), limits.tolist(), strict=True)
        if parent < limit and (parent, child) not in own
    }
    return torch.tensor(sorted(pairs), dtype=torch.int64).view(-1, 2).T


def _super_parents(
    edges: Sequence[Edge], sizes: Sequence[int], counts: Sequence[int], settings: HierarchySettings
) -> list[int]:
    """Parents of at least a share of all later latents that fire often enough to be anybody's child."""
    later = {size: sum(count >= settings.min_firings for count in counts[size:]) for size in sizes}
    children: dict[int, int] = {}
    for edge in edges:
        children[edge.parent] = children.get(edge.parent, 0) + 1
    found = []
    for parent, number in children.items():
        possible = later[next(size for size in sizes if parent < size)]
        if number >= settings.super_parent_share * possible:
            found.append(parent)
    return sorted(found)
