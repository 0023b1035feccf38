"""Parents without their children: what it gains, and what it costs, to hold back gradients of inner levels.

    python benchmarks/clean_parents.py train
    python benchmarks/clean_parents.py measure
    python benchmarks/clean_parents.py claims
    python benchmarks/clean_parents.py table --plot clean_parents.png

In the story world the concept tree is known. Each method trains an SAE for each seed; those of a seed see the same
activations in the same order. Every SAE leaves its results in `--output-dir` as soon as they are there, and what is
there is not done again: a run may be stopped at any time and go on later. `claims` measures what `claims.py` does
with labels and with the language model: cross-entropy, probes, erasure.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from claims import CONTEXT_LENGTH, read_evaluation
from hierarchy import EDGE_SEED, LabelledTokens, correlations, judge, label_tokens, match, possible_pairs

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.atomic_files import atomic_file
from hf_msae.cli.sources import STORY_DOCUMENTS
from hf_msae.data import as_documents
from hf_msae.evaluation import Subject, collect, evaluate, story_examples
from hf_msae.evaluation.absorption import measure_absorption
from hf_msae.evaluation.baselines import prune
from hf_msae.evaluation.geometry import measure_agreement
from hf_msae.evaluation.probes import make_split
from hf_msae.interpret.activity import active_latents
from hf_msae.interpret.edges import find_hierarchy
from hf_msae.interpret.hierarchy import Edge
from hf_msae.interpret.scan import scan
from hf_msae.metrics import ReconstructionMeter
from hf_msae.sites import resolve_site, site_width
from hf_msae.training import SAETrainer, SAETrainingArguments
from hf_msae.worlds.stories import StoryWorld, load_story_lm

NUM_LATENTS, K = 1024, 8
PREFIX_SIZES = [64, 128, 256, 512, 1024]
# By name, as in the tables; the methods of a list are trained from one pass of the language model.
PLAIN = "BatchTopK"
METHODS = {
    PLAIN: {"prefix_sizes": [NUM_LATENTS]},
    "standard": {},
    "decoder cut": {"inner_decoder_share": 0.0},
    "decoder cut, activations .25": {"inner_decoder_share": 0.0, "inner_activation_share": 0.25},
    "balance .5": {"balance": 0.5},
    "all inner gradients .25": {"inner_decoder_share": 0.25, "inner_activation_share": 0.25},
    "no inner gradients": {"inner_decoder_share": 0.0, "inner_activation_share": 0.0},
    "all inner gradients .1": {"inner_decoder_share": 0.1, "inner_activation_share": 0.1},
    "decoder cut, activations .1": {"inner_decoder_share": 0.0, "inner_activation_share": 0.1},
}
MEASURED_NAME, CLAIMS_NAME = "clean_parents.json", "claims.json"
EVAL_TOKENS, LABEL_STORIES, EDGE_TOKENS, CHILD_STORIES = 100_000, 600, 120_000, 600
CORRELATIONS = (0.4, 0.5)
# A child is kept by the filter of token types where so much of its energy lies on types that carry more than this
# share of the parent's.
TYPE_SHARE, MIN_ENERGY = 0.01, 0.5
TOGETHER = (list(METHODS)[:4], list(METHODS)[4:])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "measure", "claims", "table"])
    parser.add_argument("--site", default="layers.2")
    parser.add_argument("--tokens", type=int, default=1_400_000, help="to train each SAE on")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--start", type=float, default=0.25, help="share of training before gradients are held back")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output-dir", default="runs/clean-parents")
    parser.add_argument("--plot", help="where `table` draws a picture")
    return parser.parse_args()


def folder_of(options: argparse.Namespace, method: str, seed: int) -> Path:
    number = next(number for number, methods in enumerate(TOGETHER) if method in methods)
    return Path(options.output_dir) / f"seed-{seed}" / f"pass-{number}" / method


def train(options: argparse.Namespace) -> None:
    """Train what is not there."""
    model, tokenizer = load_story_lm()
    site = resolve_site(model, options.site)
    documents = as_documents(StoryWorld(seed=0).documents(STORY_DOCUMENTS))
    shape = {"hidden_size": site_width(model, site), "num_latents": NUM_LATENTS, "k": K, "site": str(site)}
    for methods in TOGETHER:
        wanted = [method for method in methods if method in options.methods]
        for seed in range(options.seeds):
            folders = [folder_of(options, method, seed) for method in wanted]
            if all((folder / "metrics.json").is_file() for folder in folders):
                continue
            args = SAETrainingArguments(
                output_dir=str(folders[0].parent),
                overwrite_output_dir=True,
                max_tokens=options.tokens,
                per_device_train_batch_size=2048,
                inner_share_start=options.start,
                context_length=CONTEXT_LENGTH,
                ce_tokens=0,
                save_steps=0,
                seed=seed,
                use_cpu=True,
            )
            saes = {
                name: MatryoshkaSAE(MatryoshkaSAEConfig(**(shape | {"prefix_sizes": PREFIX_SIZES} | METHODS[name])))
                for name in wanted
            }
            SAETrainer(model, saes, args, documents, processing_class=tokenizer).train()


class Measure:
    """Measures SAEs one after the other on the same tokens, which it reads once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model, self.tokenizer = load_story_lm()
        self.site = resolve_site(self.model, options.site)
        where = (self.model, self.tokenizer, self.site)
        documents = as_documents(StoryWorld(seed=0).documents(STORY_DOCUMENTS))
        self.text = collect(*where, documents, num_tokens=EVAL_TOKENS, context_length=CONTEXT_LENGTH)
        self.labelled = label_tokens(self.site, LABEL_STORIES)
        self.examples, self.of_documents = story_examples(
            *where, num_stories=CHILD_STORIES, context_length=CONTEXT_LENGTH
        )
        self.splits = [make_split(self.examples, 0)]

    def __call__(self, sae: MatryoshkaSAE) -> dict[str, Any]:
        """All numbers of an SAE, JSON-able; a plain one's latents are put in the order of their energy first."""
        if sae.config.num_levels == 1:
            sae = prune(sae, self.text.x, PREFIX_SIZES)
        meter = ReconstructionMeter(sae)
        meter.update(self.text.x)
        levels, _ = measure_absorption(self.examples, sae, self.splits)
        return {
            "prefix_sizes": list(sae.config.prefix_sizes),
            "fve": [level.fve for level in meter.levels()],
            "l0": [level.l0 for level in meter.levels()],
            "dead": [level.dead for level in meter.levels()],
            "firing_rate": meter.firing_rate.tolist(),
            "absorption": [asdict(level) for level in levels],
            "tree": self._measure_tree(sae),
        }

    def _measure_tree(self, sae: MatryoshkaSAE) -> dict[str, Any]:
        texts = StoryWorld(seed=EDGE_SEED).documents(EDGE_TOKENS // 50)
        limits = {"max_tokens": EDGE_TOKENS, "record_tokens": EDGE_TOKENS, "top_contexts": 1, "sampled_contexts": 0}
        found = scan(self.model, self.tokenizer, sae, texts, **limits)
        hierarchy = find_hierarchy(sae, found.firings)
        kept = hierarchy.edges
        shared = shared_energy(sae, self.labelled, kept)
        eligible = [count >= hierarchy.settings.min_firings for count in hierarchy.counts]
        correlation = correlations(sae, self.labelled)
        results = {}
        for least in CORRELATIONS:
            concept_of = match(correlation, least)
            possible, chance = possible_pairs(concept_of, sae.config.prefix_sizes, eligible)
            rows = {"edges": kept, "energy": [e for e, s in zip(kept, shared, strict=True) if s >= MIN_ENERGY]}
            results[str(least)] = {
                name: asdict(judge(edges, concept_of, possible, found.num_tokens)) for name, edges in rows.items()
            } | {"possible": len(possible), "chance": chance, "concepts": len(set(concept_of.values()))}
        best, concepts = correlation.max(1)
        return results | {
            "num_tokens": found.num_tokens,
            "edge_list": [asdict(edge) | {"shared_energy": share} for edge, share in zip(kept, shared, strict=True)],
            "concept_of": concepts.tolist(),
            "correlation": best.tolist(),
        }


def shared_energy(sae: MatryoshkaSAE, tokens: LabelledTokens, edges: Sequence[Edge]) -> list[float]:
    """For each edge, the share of the child's energy on token types that carry over 1% of the parent's."""
    active = active_latents(sae, tokens.x)
    energies = torch.zeros(sae.config.num_latents, int(tokens.ids.max()) + 1, dtype=torch.float64)
    energies.index_put_((active.latents, tokens.ids[active.tokens]), active.values.double().square(), accumulate=True)
    shares = energies / energies.sum(1, keepdim=True).clamp_min(1e-30)
    return [(shares[edge.child] * (shares[edge.parent] > TYPE_SHARE)).sum().item() for edge in edges]


def measure(options: argparse.Namespace) -> None:
    """Measure what is trained and not measured."""
    todo = [
        folder
        for seed in range(options.seeds)
        for method in options.methods
        if (folder := folder_of(options, method, seed)).joinpath("metrics.json").is_file()
        and not (folder / MEASURED_NAME).is_file()
    ]
    if not todo:
        return
    with torch.no_grad():
        of = Measure(options)
        for folder in todo:
            print(folder, flush=True)
            found = json.dumps(of(MatryoshkaSAE.from_pretrained(folder).eval()))
            with atomic_file(folder / MEASURED_NAME) as draft:
                draft.write_text(found, encoding="utf-8")


def claims(options: argparse.Namespace) -> None:
    """Measure with labels, and with the language model, what was not yet; all SAEs of a seed at once."""
    of = None
    for seed in range(options.seeds):
        folders = {method: folder_of(options, method, seed) for method in options.methods}
        folders = {
            method: folder
            for method, folder in folders.items()
            if (folder / "metrics.json").is_file() and not (folder / CLAIMS_NAME).is_file()
        }
        if not folders:
            continue
        print(f"seed {seed}: {', '.join(folders)}", flush=True)
        of = of or Measure(options)
        saes = {method: MatryoshkaSAE.from_pretrained(folder).eval() for method, folder in folders.items()}
        subjects = [
            Subject(method, method, sae if sae.config.num_levels > 1 else prune(sae, of.text.x, PREFIX_SIZES))
            for method, sae in saes.items()
        ]
        metrics = ("core", "geometry", "probing", "absorption", "erasure")
        found = read_evaluation(evaluate(subjects, of.text, of.examples, of.of_documents, metrics=metrics))
        for method, folder in folders.items():
            numbers = {prefix: found[method, prefix] for prefix in PREFIX_SIZES}
            with atomic_file(folder / CLAIMS_NAME) as draft:
                draft.write_text(json.dumps(numbers), encoding="utf-8")


Run = dict[str, Any]


def level(run: Run, prefix: int) -> int:
    return run["prefix_sizes"].index(prefix)


def of_tree(least: float, rows: str, column: str) -> Callable[[Run], float]:
    return lambda run: run["tree"][str(least)][rows][column]


def of_absorption(column: str) -> Callable[[Run], float]:
    return lambda run: run["absorption"][-1][column]


# Heading, how it is read off a run, digits.
COLUMNS: tuple[tuple[str, Callable[[Run], float], int], ...] = (
    ("FVE", lambda run: run["fve"][-1], 3),
    *((f"at {size}", lambda run, size=size: run["fve"][level(run, size)], 3) for size in PREFIX_SIZES[:-1]),
    ("L0", lambda run: run["l0"][-1], 2),
    ("fires on children", of_absorption("child_recall"), 3),
    ("worst child", of_absorption("worst_child"), 3),
    ("elsewhere", of_absorption("elsewhere"), 3),
    ("absorbed, fraction", of_absorption("fraction"), 3),
)


# The same of what `claims` measured, by its names: of the whole dictionary, and of inner prefixes.
CLAIM_COLUMNS = (
    ("CE rec. (mean)", "ce", NUM_LATENTS, 4),
    ("CE rec. at 64", "ce", 64, 3),
    ("probe k=1", "probe_1", NUM_LATENTS, 3),
    ("probe k=5", "probe_5", NUM_LATENTS, 3),
    ("probe k=1 at 64", "probe_1", 64, 3),
    ("latents per concept", "split_latents", NUM_LATENTS, 2),
    ("TPP", "tpp", NUM_LATENTS, 3),
    ("SCR", "scr", NUM_LATENTS, 3),
    ("nearest row", "nearest", NUM_LATENTS, 3),
)


def cell(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def pooled(runs: Sequence[Run], least: float, rows: str) -> list[str]:
    """Edges of all seeds together: precision without and with same concept, recall, splits."""
    found = [run["tree"][str(least)] for run in runs]
    judged, right, same, splits = (
        sum(one[rows][name] for one in found) for name in ("judged", "right", "same_concept", "splits")
    )
    possible = sum(one["possible"] for one in found)
    recalled = sum(one[rows]["recall"] * one["possible"] for one in found)
    spread = [one[rows]["precision"] for one in found]
    return [
        f"{right / judged:.2f} ({min(spread):.2f} to {max(spread):.2f})",
        f"{right / (judged + same):.2f}",
        f"{recalled / possible:.2f}",
        f"{judged / len(runs):.0f}",
        f"{same / len(runs):.0f}",
        f"{splits / len(runs):.0f}",
    ]


def agreement(options: argparse.Namespace, method: str, runs: dict[int, Run]) -> list[float]:
    """The share of latents that each two seeds have in common."""
    saes = []
    for seed, run in runs.items():
        sae = MatryoshkaSAE.from_pretrained(folder_of(options, method, seed))
        saes.append((str(seed), sae, torch.tensor(run["firing_rate"])))
    if len(runs) > 1 and saes[0][1].config.num_levels == 1:
        # Firing rates were measured in the order of energies; here only whether a latent fires at all counts.
        saes = [(name, sae, torch.ones_like(rate)) for name, sae, rate in saes]
    pairs = [(one, two) for number, one in enumerate(saes) for two in saes[number + 1 :]]
    return [measure_agreement(one, two)[-1].shared for one, two in pairs]


def read_runs(options: argparse.Namespace, name: str = MEASURED_NAME) -> dict[str, dict[int, Run]]:
    """What was measured, by method and seed."""
    runs: dict[str, dict[int, Run]] = {}
    for method in options.methods:
        for seed in range(options.seeds):
            path = folder_of(options, method, seed) / name
            if path.is_file():
                runs.setdefault(method, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
    return runs


def draw(runs: dict[str, dict[int, Run]], path: str) -> None:
    """A picture of what is had for what: FVE by prefix, and the tree; a small point a seed, a large one the mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    by_prefix, precision, recall = figure.subplots(1, 3)
    for number, (method, of_method) in enumerate(runs.items()):
        found, style = list(of_method.values()), {"color": f"C{number}", "label": method}
        fves = [statistics.fmean(run["fve"][place] for run in found) for place in range(len(PREFIX_SIZES))]
        by_prefix.plot(PREFIX_SIZES, fves, marker="o", **style)
        rows = [run["tree"][str(CORRELATIONS[-1])]["edges"] for run in found]
        right, parts = [row["precision"] for row in rows], [row["recall"] for row in rows]
        for axis, across in ((precision, [run["fve"][-1] for run in found]), (recall, parts)):
            axis.scatter(across, right, s=12, alpha=0.5, color=style["color"])
            axis.scatter(statistics.fmean(across), statistics.fmean(right), s=90, **style)
    by_prefix.set(xscale="log", xlabel="latents in the prefix", ylabel="FVE")
    by_prefix.set_xticks(PREFIX_SIZES, [str(size) for size in PREFIX_SIZES])
    precision.set(xlabel="FVE of the whole dictionary", ylabel="precision of the tree's edges")
    recall.set(xlabel="recall of the tree's edges", ylabel="precision of the tree's edges")
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    methods = by_prefix.get_legend_handles_labels()
    figure.legend(*methods, loc="outside lower center", ncols=len(runs), fontsize="small")
    figure.savefig(path, dpi=120)


def table(options: argparse.Namespace) -> None:
    """Print what was measured as markdown, and draw it."""
    runs = read_runs(options)
    if options.plot:
        draw(runs, options.plot)
    print("| | seeds | " + " | ".join(heading for heading, _, _ in COLUMNS) + " | agreement of seeds |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for method, of_method in runs.items():
        cells = [cell([read(run) for run in of_method.values()], digits) for _, read, digits in COLUMNS]
        shared = agreement(options, method, of_method)
        cells.append(cell(shared, 3) if shared else "–")
        print(f"| {method} | {len(of_method)} | " + " | ".join(cells) + " |")
    by_labels = read_runs(options, CLAIMS_NAME)
    if by_labels:
        print("\n| | seeds | " + " | ".join(heading for heading, *_ in CLAIM_COLUMNS) + " |")
        print("|---" * (len(CLAIM_COLUMNS) + 2) + "|")
    for method, of_method in by_labels.items():
        values = [
            cell([statistics.fmean(run[str(prefix)][name]) for run in of_method.values()], digits)
            for _, name, prefix, digits in CLAIM_COLUMNS
        ]
        print(f"| {method} | {len(of_method)} | " + " | ".join(values) + " |")
    for least in CORRELATIONS:
        for rows in ("edges", "energy"):
            print(f"\nConcepts by a correlation of {least}; {rows}\n")
            print("| | precision (of each seed) | strict | recall | judged | same concept | of these splits |")
            print("|---" * 7 + "|")
            for method, of_method in runs.items():
                print(f"| {method} | " + " | ".join(pooled(list(of_method.values()), least, rows)) + " |")


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    {"train": train, "measure": measure, "claims": claims, "table": table}[options.what](options)


if __name__ == "__main__":
    main()
