"""An evaluation as tables, for the terminal and for the HTML report.

A row is a method at a prefix. Where there are several SAEs of a method, or several splits of the labelled data, a cell
is their mean ± the standard deviation.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_msae.evaluation.suite import Evaluation

# How many latents the erasure scores of the tables ablate.
SHOWN_COUNT = 10
# Titles, by which plots find their table.
CORE, PROBING = "Reconstruction", "Sparse probing"
ABSORPTION, ERASURE = "Splitting and absorption", "Targeted concept erasure"
PROGRESSIVE, STITCHING = "Progressive coding", "Stitching"
Cells = Sequence[float | None]


@dataclass(frozen=True)
class Table:
    """Text cells; `note` says what the columns mean and on how many tokens they were measured."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Column:
    """One column: its name, the values of an SAE at a prefix (several: one per split), and how to write them."""

    name: str
    values: Callable[[str, int], Cells]
    digits: int = 3
    scale: float = 1.0


def write_cell(values: Cells, digits: int, scale: float = 1.0) -> str:
    """Mean ± standard deviation, the mean of a single value, or a dash for none."""
    known = [scale * value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def all_tables(result: Evaluation) -> list[Table]:
    """What was measured, table by table."""
    tables = [core_table(result)]
    if result.geometry:
        tables.append(geometry_table(result))
    if result.agreement:
        tables.append(agreement_table(result))
    if result.probing is not None:
        tables += [probing_table(result), reference_table(result)]
    if result.absorption:
        tables.append(absorption_table(result))
    if result.erasure:
        tables.append(erasure_table(result))
    if result.progressive is not None:
        tables += [progressive_table(result), power_law_table(result)]
    if result.stitching:
        tables.append(stitching_table(result))
    if result.meta:
        tables.append(meta_table(result))
    if result.hedging:
        tables.append(hedging_table(result))
    return tables


def _rows(result: Evaluation, columns: Sequence[Column]) -> list[list[str]]:
    """A row for each method and place of a level, from the outermost, so that seeds whose prefixes differ in size
    (principal components) still share rows.
    """
    rows = []
    for method in dict.fromkeys(result.methods.values()):
        names = [name for name, of in result.methods.items() if of == method]
        levels = [[level.prefix for level in result.core[name].measurement.levels] for name in names]
        for place in range(max(map(len, levels))):
            at = [(name, sizes[place]) for name, sizes in zip(names, levels, strict=True) if place < len(sizes)]
            label = method if len(names) == 1 else f"{method} ({len(names)} seeds)"
            prefixes = sorted({prefix for _, prefix in at})
            row = [label, "–".join(f"{prefix:,}" for prefix in {prefixes[0]: 0, prefixes[-1]: 0})]
            for column in columns:
                values = [value for name, prefix in at for value in column.values(name, prefix)]
                row.append(write_cell(values, column.digits, column.scale))
            rows.append(row)
    return rows


def _table(result: Evaluation, title: str, note: str, columns: Sequence[Column]) -> Table:
    header = ["SAE", "prefix", *(column.name for column in columns)]
    return Table(title, note, header, _rows(result, columns))


def core_table(result: Evaluation) -> Table:
    """Sparsity, reconstruction, and the language model with reconstructions."""
    first = next(iter(result.core.values())).measurement

    def of(field: str) -> Callable[[str, int], Cells]:
        def values(name: str, prefix: int) -> Cells:
            levels = result.core[name].measurement.levels
            return [vars(level)[field] for level in levels if level.prefix == prefix]

        return values

    note = f"On {first.tokens:,} tokens"
    if first.outliers:
        note += f" ({first.outliers:,} with outlying norms, attention sinks, left out)"
    if first.ce_clean is not None and first.ce_zero is not None and first.ce_mean is not None:
        note += (
            f"; cross-entropy (CE, nats per token) and KL on {first.ce_tokens:,}. The model as it is has CE "
            f"{first.ce_clean:.3f}, with the site set to zero {first.ce_zero:.3f}, to the mean {first.ce_mean:.3f}. "
            "CE recovered is 1 where the reconstruction costs nothing and 0 where it is as bad as that ablation; "
            "against zero it flatters"
        )
    note += ". NMSE is not centred, so a large mean makes it look better than FVE."
    columns = [
        Column("L0", of("l0"), 2),
        Column("FVE", of("fve")),
        Column("NMSE", of("nmse")),
        Column("cosine", of("cosine")),
        Column("CE rec. (mean)", of("ce_recovered_mean")),
        Column("CE rec. (zero)", of("ce_recovered")),
        Column("ΔCE", of("ce_increase")),
        Column("KL", of("kl")),
        Column("dead %", of("dead"), 1, 100.0),
    ]
    return _table(result, CORE, note, columns)


def geometry_table(result: Evaluation) -> Table:
    """Cosines among latents."""

    def of(field: str) -> Callable[[str, int], Cells]:
        def values(name: str, prefix: int) -> Cells:
            return [vars(level)[field] for level in result.geometry[name] if level.prefix == prefix]

        return values

    columns = [
        Column("alive", of("alive"), 0),
        Column("nearest decoder |cos|", of("decoder_nearest")),
        Column("mean decoder |cos|", of("decoder_pairs"), 4),
        Column("nearest encoder |cos|", of("encoder_nearest")),
        Column("encoder·decoder", of("encoder_decoder")),
        Column("nearest in level before", of("parent_nearest")),
        Column("of these > 0.7, %", of("parent_same"), 1, 100.0),
    ]
    note = "Means over the latents that fire. The last two columns are of the latents that a level adds."
    return _table(result, "Geometry", note, columns)


def agreement_table(result: Evaluation) -> Table:
    """Seeds against each other."""
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
        for item in result.agreement
    ]
    note = (
        "MMCS: mean over one SAE's latents of the largest decoder cosine with the other's. Shared: latents that are "
        "each other's nearest, with a cosine above 0.7."
    )
    return Table("Agreement across seeds", note, header, rows)


def probing_table(result: Evaluation) -> Table:
    """Accuracy of sparse probes at every prefix."""
    probing = result.probing
    if probing is None:
        raise ValueError("Probing was not measured.")

    def of(k: int) -> Callable[[str, int], Cells]:
        def values(name: str, prefix: int) -> Cells:
            return [s.accuracy for s in probing.scores if (s.features, s.prefix, s.k) == (name, prefix, k)]

        return values

    note = (
        f"Accuracy of probes on the k latents of a prefix that differ most with a concept, mean over "
        f"{len(probing.concepts)} concepts; 0.5 is chance. {probing.description}; {probing.train_examples:.0f} "
        f"examples of a concept to train on, {probing.test_examples:.0f} to test on, from other documents. The "
        "next table has what a probe reaches without an SAE."
    )
    return _table(result, PROBING, note, [Column(f"k = {k}", of(k)) for k in _ks(result)])


def _ks(result: Evaluation) -> list[int]:
    scores = result.probing.scores if result.probing is not None else []
    return sorted({score.k for score in scores if score.features in result.methods})


def reference_table(result: Evaluation) -> Table:
    """What probes reach without an SAE."""
    scores = result.probing.scores if result.probing is not None else []
    names = dict.fromkeys(score.features for score in scores if score.features not in result.methods)
    rows = []
    for name in names:
        of = [score for score in scores if score.features == name]
        for k in sorted({score.k for score in of}):
            rows.append([name, f"{k:,}", write_cell([score.accuracy for score in of if score.k == k], 3)])
    note = "The same concepts, examples and probes on other features. The whole activation bounds what can be read."
    return Table("Sparse probing, references", note, ["features", "k", "accuracy"], rows)


def absorption_table(result: Evaluation) -> Table:
    """Splitting, absorption, and the parent's latent on its children."""

    def of(field: str) -> Callable[[str, int], Cells]:
        def values(name: str, prefix: int) -> Cells:
            return [vars(level)[field] for level in result.absorption[name].levels if level.prefix == prefix]

        return values

    columns = [
        Column("main F1", of("main_f1")),
        Column("latents per concept", of("split_latents"), 2),
        Column("absorbed (full)", of("full")),
        Column("absorbed (fraction)", of("fraction")),
        Column("fires on children", of("child_recall")),
        Column("on the worst child", of("worst_child")),
        Column("fires elsewhere", of("elsewhere")),
    ]
    levels = [level for found in result.absorption.values() for level in found.levels]
    if not levels:
        note = (
            "Refused: no concept has a probe on the whole activation with an F1 of at least 0.6 and examples enough."
        )
        return Table(ABSORPTION, note, [], [])
    first = levels[0]
    note = (
        f"Means over {first.concepts} general concepts (probe F1 {first.probe_f1:.2f} on the whole activation; "
        f"{first.refused} refused for a probe F1 below 0.6 or too few examples), {first.tokens:,} tokens. Main F1 is "
        "that of a probe on the concept's own latents: low absorption at a low main F1 only says that the concept was "
        "not learnt. The last three columns: the share of a child's tokens on which the parent's best latent fires, "
        "and of tokens of other concepts."
    )
    return _table(result, ABSORPTION, note, columns)


def erasure_table(result: Evaluation) -> Table:
    """TPP and SCR."""

    def of(kind: str, field: str) -> Callable[[str, int], Cells]:
        def values(name: str, prefix: int) -> Cells:
            scores: list[Any] = vars(result.erasure[name])[kind]
            return [vars(s)[field] for s in scores if s.prefix == prefix and s.count == SHOWN_COUNT]

        return values

    columns = [
        Column("TPP", of("perturbation", "score")),
        Column("intended", of("perturbation", "intended")),
        Column("unintended", of("perturbation", "unintended")),
        Column("SCR", of("removal", "score")),
        Column("biased acc.", of("removal", "biased")),
        Column("ablated acc.", of("removal", "ablated")),
        Column("balanced acc.", of("removal", "balanced")),
    ]
    first = next(iter(result.erasure.values()))
    classes = first.perturbation[0].classes if first.perturbation else 0
    pairs = first.removal[0].pairs if first.removal else 0
    note = (
        f"With {SHOWN_COUNT} latents ablated per concept; TPP over {classes} classes, SCR over {pairs} pairs of "
        f"labels ({first.pairs_left_out} left out because the bias cost too little). The Matryoshka paper reports "
        "them; arXiv:2605.18229 found them unreliable across seeds: do not rest a claim on them."
    )
    return _table(result, ERASURE, note, columns)


def _names_by_method(result: Evaluation, names: Sequence[str]) -> dict[str, list[str]]:
    """The SAEs of each method, under what its rows are called."""
    methods: dict[str, list[str]] = {}
    for name in names:
        methods.setdefault(result.methods[name], []).append(name)
    return {method if len(of) == 1 else f"{method} ({len(of)} seeds)": of for method, of in methods.items()}


def progressive_table(result: Evaluation) -> Table:
    """What is left of each SAE at the same sizes, in its own order and sorted."""
    progressive = result.progressive
    if progressive is None:
        raise ValueError("Progressive coding was not measured.")
    rows = []
    for label, names in _names_by_method(result, list(progressive.laws)).items():
        points = [point for point in progressive.points if point.sae in names]
        for order, prefix in dict.fromkeys((point.order, point.prefix) for point in points):
            found = [point for point in points if (point.order, point.prefix) == (order, prefix)]
            cells = [write_cell([vars(p)[name] for p in found], 3) for name in ("fve", "rsa", "cka")]
            rows.append([label, order, f"{prefix:,}", write_cell([p.l0 for p in found], 2), *cells])
    note = (
        f"The first latents in the order of the file, and sorted by E[a²] (energy) and by how often they fire, on "
        f"{progressive.tokens:,} tokens. Order is found on the tokens it is judged on, which favours sorted ones; and "
        "at equal size they have fewer active latents. RSA and CKA: how far reconstructions keep the relations "
        f"between tokens ({progressive.rsa_tokens:,} of them, three draws); the form of RSA is ours, as the paper "
        "leaves it open."
    )
    return Table(PROGRESSIVE, note, ["SAE", "order", "latents", "L0", "FVE", "RSA", "CKA"], rows)


def power_law_table(result: Evaluation) -> Table:
    """Whether sorted importance follows a power law."""
    laws = result.progressive.laws if result.progressive is not None else {}
    rows = []
    for label, names in _names_by_method(result, list(laws)).items():
        of = [laws[name] for name in names]
        ranks = f"{of[0].first:,}–{of[0].last:,}"
        cells = [write_cell([vars(law)[field] for law in of], 2) for field in ("exponent", "r2", "r2_exponential")]
        rows.append([label, ranks, *cells])
    note = (
        "E[a²]·‖W_dec‖² of the latents that fire, sorted, fitted in logarithms with each rank weighed 1/rank. Where "
        "the exponential fits as well, there is no power law to speak of."
    )
    return Table("Importance by rank", note, ["SAE", "ranks", "exponent", "R²", "R², exponential"], rows)


def stitching_table(result: Evaluation) -> Table:
    """What larger dictionaries know that smaller ones do not."""
    from hf_msae.research.stitching import COSINE_CUT

    rows = []
    for item in result.stitching:
        numbers = item.novelty
        shares = (f"{100 * share:.1f}" for share in (numbers.novel, numbers.novel_by_cosine, numbers.agreement))
        rows.append([numbers.small, numbers.large, f"{numbers.fire:,}", *shares, write_cell([numbers.auroc], 2)])
    note = (
        "A latent of the large dictionary is novel if inserting it alone into the small one lowers the squared error; "
        f"by cosine, if no decoder row of the small one is nearer than {COSINE_CUT}. AUROC: how well a low cosine "
        "ranks novel latents first; none where all are of one kind."
    )
    return Table(STITCHING, note, ["small", "large", "fire", "novel %", "by cosine %", "agree %", "AUROC"], rows)


def meta_table(result: Evaluation) -> Table:
    """How far decoder rows are sums of fewer directions."""
    rows = []
    for label, names in _names_by_method(result, list(result.meta)).items():
        of = [result.meta[name] for name in names]
        shares = [[m.explained for m in of], [m.explained_random for m in of]]
        cells = [write_cell(values, 1, 100.0) for values in (*shares, [m.explained - m.explained_random for m in of])]
        rows.append([label, write_cell([m.rows for m in of], 0), write_cell([m.num_latents for m in of], 0), *cells])
    note = (
        "A meta-SAE of a quarter of the width, k = 4, on the decoder rows of the latents that fire, and one on as "
        "many random directions. Only what is beyond random directions is composition. hf-msae meta has the browser."
    )
    header = ["SAE", "rows", "meta-latents", "explained %", "of random %", "beyond %"]
    return Table("Meta-SAEs", note, header, rows)


def hedging_table(result: Evaluation) -> Table:
    """How far latents change when they get company."""
    rows = []
    for label, names in _names_by_method(result, list(result.hedging)).items():
        for prefix in dict.fromkeys(item.prefix for name in names for item in result.hedging[name]):
            of = [item for name in names for item in result.hedging[name] if item.prefix == prefix]
            fields = ("drift", "projection", "baseline", "degree")
            rows.append(
                [label, f"{prefix:,}", *(write_cell([vars(item)[field] for item in of], 4) for field in fields)]
            )
    new = next(iter(result.hedging.values()))[0].num_new
    note = (
        f"Every prefix by itself gets {new} more latents and is trained on, as is a control without them. Drift: how "
        "far the old decoder rows then lie from the control's; projection: the part of it within the new rows' span; "
        "chance: within as many random directions. It depends on the steps and the rate: compare within this table."
    )
    return Table("Hedging", note, ["SAE", "prefix", "drift", "projection", "chance", "degree"], rows)
