"""The papers' own instruments as `evaluate` uses them: on which SAEs and prefixes, and which numbers are kept.

Progressive coding compares prefixes of all SAEs, each in its own order and sorted. Stitching goes from an SAE's first
prefix to its whole, and from every SAE to every wider one. Meta-SAEs and hedging train SAEs of their own, for each SAE
that is measured; hedging is asked of every prefix *by itself*, because widening the last level gives an inner one no
reason to let go (see `hedging`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_msae.evaluation.activations import TextActivations
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.research.hedging import HedgingDegree, measure_hedging
from hf_msae.research.meta import train_meta_sae
from hf_msae.research.progressive import ProgressiveResult, measure_progressive
from hf_msae.research.stitching import Novelty, StitchResult, measure_level_novelty, measure_stitching

# By contribution, E[a²]·‖W_dec‖², is by energy where decoder rows are of norm 1.
ORDERS = ("own", "energy", "frequency")
META_STEPS, HEDGING_STEPS, HEDGING_BATCH = 500, 200, 2048


@dataclass(frozen=True)
class NoveltyNumbers:
    """A dictionary's latents against a smaller one, in shares of the latents that fire.

    novel: by effect. novel_by_cosine: by a decoder cosine below `cosine_cut`. agreement: where both say the same.
    auroc: how well a low cosine ranks novel latents first; None where all latents are of one kind.
    """

    small: str
    large: str
    fire: int
    novel: float
    novel_by_cosine: float
    agreement: float
    auroc: float | None

    @classmethod
    def of(cls, small: str, large: str, novelty: Novelty) -> "NoveltyNumbers":
        fire = int(novelty.alive.sum())
        return cls(
            small,
            large,
            fire,
            novelty.novel_share,
            novelty.novel_share_by_cosine(),
            novelty.agreement(),
            novelty.auroc(),
        )


@dataclass(frozen=True)
class Stitching:
    """From a small dictionary to a large one: what is novel, and the curve. The levels of one SAE have no curve."""

    novelty: NoveltyNumbers
    curve: StitchResult | None


@dataclass(frozen=True)
class MetaNumbers:
    """A meta-SAE of one SAE: `explained` of its decoder rows' variance, and of as many random directions."""

    rows: int
    num_latents: int
    l0: float
    explained: float
    explained_random: float


def compare_prefixes(
    text: TextActivations, saes: Mapping[str, MatryoshkaSAE], sizes: Sequence[int], seed: int
) -> ProgressiveResult:
    """Every SAE cut to these sizes in its own order and in two sorted ones. The language model is not run again: what
    prefixes in their own order keep of it is among the core numbers.
    """
    return measure_progressive(text, saes, sizes, orders=ORDERS, ce_tokens=0, seed=seed)


def stitch(text: TextActivations, saes: Mapping[str, MatryoshkaSAE]) -> list[Stitching]:
    """Between the levels of each SAE, from its first prefix to its whole, and between SAEs of different width."""
    found = []
    for name, sae in saes.items():
        for level in measure_level_novelty(text, sae):
            numbers = NoveltyNumbers.of(f"{name}, {level.inner:,}", f"{name}, {level.prefix:,}", level.novelty)
            found.append(Stitching(numbers, None))
    for small_name, small in saes.items():
        if small.config.num_levels > 1:
            inner = small.config.prefix_sizes[0]
            found.append(_curve(text, f"{small_name}, {inner:,}", small.truncate(inner), small_name, small))
        for large_name, large in saes.items():
            if small.config.num_latents < large.config.num_latents:
                found.append(_curve(text, small_name, small, large_name, large))
    return found


def _curve(
    text: TextActivations, small_name: str, small: MatryoshkaSAE, large_name: str, large: MatryoshkaSAE
) -> Stitching:
    result = measure_stitching(text, small, large)
    return Stitching(NoveltyNumbers.of(small_name, large_name, result.novelty), result)


def measure_composition(sae: MatryoshkaSAE, name: str, seed: int) -> MetaNumbers:
    """A meta-SAE of a quarter of the width, and one on random directions, which tells what is no composition."""
    result = train_meta_sae(sae, max_steps=META_STEPS, seed=seed, name=name, use_cpu=sae.device.type == "cpu")
    assert result.explained_random is not None
    width = result.sae.config.num_latents
    return MetaNumbers(len(result.rows), width, result.l0, result.explained, result.explained_random)


def measure_hedging_of_prefixes(text: TextActivations, sae: MatryoshkaSAE, seed: int) -> list[HedgingDegree]:
    """Each prefix by itself, widened and trained on with the activations that everything is measured on."""
    found = []
    for prefix in sae.config.prefix_sizes:
        degrees = measure_hedging(
            text,
            sae.truncate(prefix),
            max_steps=HEDGING_STEPS,
            batch_size=min(HEDGING_BATCH, text.num_tokens),
            seed=seed,
            use_cpu=sae.device.type == "cpu",
        )
        found.append(degrees[-1])
    return found
