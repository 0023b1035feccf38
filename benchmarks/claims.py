"""Which of the papers' claims hold here: Matryoshka against BatchTopK of equal width and L0, over several seeds.

    python benchmarks/claims.py --json stories.json
    python benchmarks/claims.py --model ../shared/data/stories260K --dataset ../shared/data/tinystories.txt \\
        --labelled ../shared/data/probing/udhr_langid.jsonl --json stories260K.json

Every seed trains both SAEs from one pass of the language model, and all are measured on the same held-out tokens and
the same labelled stories. The BatchTopK SAE is one level when it is trained; its latents are then put in order of
E[a²‖d‖²] and cut at the Matryoshka SAE's prefixes (arXiv:2505.00190), which changes nothing at the whole width and
gives it prefixes to compare below. A number is the mean over the splits of the labelled data; ± is the standard
deviation over seeds.

A claim *holds* where every Matryoshka SAE does better than every BatchTopK SAE, which chance gives once in twenty with
three seeds each, *does not hold* where every one does worse, and is *within noise* otherwise. With `--threads 1` and
the defaults each world takes about twelve minutes of one core. SAEs that are in `--output-dir` already are not trained
again.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hierarchy import EDGE_SEED, correlations, judge, label_tokens, match, possible_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cli.sources import STORY_DOCUMENTS
from hf_msae.data import Documents, as_documents, load_documents
from hf_msae.evaluation import (
    Evaluation,
    Subject,
    collect,
    evaluate,
    labelled_documents,
    read_labelled,
    story_examples,
)
from hf_msae.evaluation.baselines import prune
from hf_msae.evaluation.probes import make_split
from hf_msae.evaluation.probing import measure_probing
from hf_msae.interpret.edges import find_hierarchy
from hf_msae.interpret.scan import scan
from hf_msae.research.meta import train_meta_sae
from hf_msae.sites import Site, resolve_site, site_width
from hf_msae.training import SAETrainer, SAETrainingArguments
from hf_msae.worlds.stories import StoryWorld, load_story_lm

MATRYOSHKA, PLAIN = "Matryoshka", "BatchTopK"
CONTEXT_LENGTH = 256
COUNT = 10  # latents ablated for the erasure scores
LABEL_STORIES, EDGE_TOKENS, MIN_CORRELATION = 600, 120_000, 0.5


def add_world_arguments(parser: argparse.ArgumentParser, *, num_latents: int, tokens: int) -> None:
    """What `load_world` reads, and the SAEs of it that are trained."""
    parser.add_argument("--model", help="a folder; default: the story model")
    parser.add_argument("--dataset", help="text for it; default: stories")
    parser.add_argument("--site", default="layers.2")
    parser.add_argument("--num-latents", type=int, default=num_latents)
    parser.add_argument("--k", type=float, default=8)
    parser.add_argument("--tokens", type=int, default=tokens, help="to train each SAE on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write all numbers here")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_world_arguments(parser, num_latents=1024, tokens=1_400_000)
    parser.add_argument("--labelled", help="documents with a label each, to probe too")
    parser.add_argument("--eval-tokens", type=int, default=100_000)
    parser.add_argument("--stories", type=int, default=600, help="labelled ones")
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--meta-steps", type=int, default=500, help="of each meta-SAE; 0 trains none")
    parser.add_argument("--output-dir", default="runs/claims", help="where the SAEs go")
    return parser.parse_args()


@dataclass(frozen=True)
class World:
    """A language model and its text."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    documents: Documents
    site: Site

    @property
    def is_stories(self) -> bool:
        return self.name == "stories"


def load_world(options: argparse.Namespace) -> World:
    if (options.model is None) != (options.dataset is None):
        raise SystemExit("--model and --dataset go together.")
    if options.model is None:
        model, tokenizer = load_story_lm()
        documents = as_documents(StoryWorld(seed=0).documents(STORY_DOCUMENTS))
        return World("stories", model, tokenizer, documents, resolve_site(model, options.site))
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    site = resolve_site(model, options.site)
    return World(Path(options.model).name, model, tokenizer, load_documents(options.dataset), site)


def train_seed(world: World, options: argparse.Namespace, seed: int) -> dict[str, MatryoshkaSAE]:
    """Both SAEs of a seed, from one pass; from the disk where an earlier run left them."""
    folder = Path(options.output_dir) / world.name / f"seed-{seed}"
    if not (folder / PLAIN / "metrics.json").is_file():
        shape = {"hidden_size": site_width(world.model, world.site), "num_latents": options.num_latents}
        configs = {MATRYOSHKA: {}, PLAIN: {"prefix_sizes": [options.num_latents]}}
        saes = {
            name: MatryoshkaSAE(MatryoshkaSAEConfig(**shape, k=options.k, site=str(world.site), **more))
            for name, more in configs.items()
        }
        args = SAETrainingArguments(
            output_dir=str(folder),
            overwrite_output_dir=True,
            max_tokens=options.tokens,
            per_device_train_batch_size=2048,
            context_length=CONTEXT_LENGTH,
            eval_tokens=options.eval_tokens,
            ce_tokens=0,
            save_steps=0,
            seed=seed,
            use_cpu=True,
        )
        SAETrainer(world.model, saes, args, world.documents, processing_class=world.tokenizer).train()
    return {name: MatryoshkaSAE.from_pretrained(folder / name).eval() for name in (MATRYOSHKA, PLAIN)}


# Measuring. Numbers are kept as (method, prefix) -> name of the measure -> one value per seed.

Numbers = dict[tuple[str, int], dict[str, list[float]]]


def add(numbers: Numbers, method: str, prefix: int, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None:
            numbers.setdefault((method, prefix), {}).setdefault(name, []).append(value)


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def read_evaluation(result: Evaluation) -> Numbers:
    """The evaluation's numbers, means over splits."""
    numbers: Numbers = {}
    for name, method in result.methods.items():
        for level in result["core"][name].measurement.levels:
            add(numbers, method, level.prefix, l0=level.l0, fve=level.fve, kl=level.kl, dead=level.dead)
            add(numbers, method, level.prefix, ce=level.ce_recovered_mean, ce_zero=level.ce_recovered)
        for geometry in result["geometry"][name]:
            add(numbers, method, geometry.prefix, nearest=geometry.decoder_nearest)
        for prefix in {level.prefix for level in result["core"][name].measurement.levels}:
            add(numbers, method, prefix, **_concept_numbers(result, name, prefix))
    for pair in result["agreement"]:
        add(numbers, result.methods[pair.one], pair.prefixes[0], shared=pair.shared)
    return numbers


def _concept_numbers(result: Evaluation, name: str, prefix: int) -> dict[str, float | None]:
    probing = result["probing"].scores if result["probing"] else []
    found: dict[str, float | None] = {
        f"probe_{k}": mean([s.accuracy for s in probing if (s.features, s.prefix, s.k) == (name, prefix, k)])
        for k in (1, 5)
    }
    levels = [level for level in result["absorption"][name].levels if level.prefix == prefix]
    fields = ("main_f1", "split_latents", "full", "fraction", "child_recall", "worst_child", "elsewhere")
    found |= {field: mean([vars(level)[field] for level in levels]) for field in fields}
    if levels:
        found["selectivity"] = mean([level.worst_child - level.elsewhere for level in levels if level.worst_child])
    erasure = result["erasure"][name]
    for field, scores in (("tpp", erasure.perturbation), ("scr", erasure.removal)):
        found[field] = mean([vars(s)["score"] for s in scores if (s.prefix, s.count) == (prefix, COUNT)])
    return found


def measure_edges(world: World, sae: MatryoshkaSAE) -> dict[str, float]:
    """Precision and recall of the edges between levels against the concept tree, as in `hierarchy.py`."""
    concept_of = match(correlations(sae, label_tokens(world.site, LABEL_STORIES)), MIN_CORRELATION)
    texts = StoryWorld(seed=EDGE_SEED).documents(EDGE_TOKENS // 50)
    limits = {"max_tokens": EDGE_TOKENS, "record_tokens": EDGE_TOKENS, "top_contexts": 1, "sampled_contexts": 0}
    found = scan(world.model, world.tokenizer, sae, texts, **limits)
    hierarchy = find_hierarchy(sae, found.firings)
    eligible = [count >= hierarchy.settings.min_firings for count in hierarchy.counts]
    possible, _ = possible_pairs(concept_of, sae.config.prefix_sizes, eligible)
    row = judge(hierarchy.edges, concept_of, possible, found.num_tokens)
    concepts = len(set(concept_of.values()))
    return {"edges": row.edges, "edge_precision": row.precision, "edge_recall": row.recall} | {
        "concepts": concepts,
        "right_edges": row.right,
    }


def measure(world: World, options: argparse.Namespace) -> tuple[Numbers, dict[str, Any]]:
    """Train and measure everything of a world."""
    trained = [train_seed(world, options, seed) for seed in range(options.seeds)]
    shared = {"context_length": CONTEXT_LENGTH}
    arguments = (world.model, world.tokenizer, world.site)
    text = collect(*arguments, world.documents, num_tokens=options.eval_tokens, **shared)
    sizes = trained[0][MATRYOSHKA].config.prefix_sizes
    subjects = []
    for method in (MATRYOSHKA, PLAIN):
        for seed, saes in enumerate(trained):
            sae = saes[method] if method == MATRYOSHKA else prune(saes[method], text.x, sizes)
            subjects.append(Subject(f"{method} {seed}", method, sae))
    labelled, of_documents = story_examples(*arguments, num_stories=options.stories, **shared)
    result = evaluate(subjects, text, labelled, of_documents, splits=options.splits)
    numbers = read_evaluation(result)
    facts = {"tokens": text.num_tokens, "examples": labelled.num_examples, "text": text.description}
    levels = next(iter(result["absorption"].values())).levels
    facts |= {"probe_f1": levels[0].probe_f1, "concepts": levels[0].concepts, "refused": levels[0].refused}
    for subject in subjects:
        if world.is_stories:
            add(numbers, subject.method, sizes[-1], **measure_edges(world, subject.sae))
        if options.meta_steps:
            meta = train_meta_sae(subject.sae, max_steps=options.meta_steps, use_cpu=True)
            assert meta.explained_random is not None
            beyond = meta.explained - meta.explained_random
            add(numbers, subject.method, sizes[-1], meta=meta.explained, meta_beyond=beyond)
    if options.labelled:
        description = Path(options.labelled).name
        data = labelled_documents(*arguments, read_labelled(options.labelled), description=description, **shared)
        splits = [make_split(data, seed) for seed in range(options.splits)]
        found = measure_probing(data, {subject.name: subject.sae for subject in subjects}, splits)
        facts["documents_whole"] = mean([s.accuracy for s in found.scores if s.features == "whole activation"])
        for subject in subjects:
            for prefix in sizes:
                of = [s.accuracy for s in found.scores if (s.features, s.prefix, s.k) == (subject.name, prefix, 1)]
                add(numbers, subject.method, prefix, documents_1=mean(of))
    return numbers, facts


# What the papers say, and whether it is so.


@dataclass(frozen=True)
class Claim:
    """Words, the measure, where it is read (of the whole width, the first prefix, or a mean over inner ones), and
    whether more of it supports the claim.
    """

    words: str
    measure: str
    more: bool
    where: str = "whole"
    digits: int = 3


CLAIMS = (
    Claim("reconstruction costs a little: lower FVE", "fve", False),
    Claim("lower CE recovered (mean ablation)", "ce", False, digits=4),
    Claim("prefixes explain more than those of a pruned BatchTopK SAE: FVE, inner prefixes", "fve", True, "inner"),
    Claim("and keep more of the LM: CE recovered, inner prefixes", "ce", True, "inner"),
    Claim("less absorption, full", "full", False),
    Claim("less absorption, fraction", "fraction", False),
    Claim("parents' latents fire on their children", "child_recall", True),
    Claim("also on the child they know worst", "worst_child", True),
    Claim("the same, less how often they fire elsewhere", "selectivity", True),
    Claim("less splitting: latents per concept", "split_latents", False, digits=2),
    Claim("better probing with one latent", "probe_1", True),
    Claim("better probing with five latents", "probe_5", True),
    Claim("better probing with one latent of the best prefix", "probe_1", True, "best"),
    Claim("better probing of documents (languages) with one latent", "documents_1", True),
    Claim("better erasure, TPP", "tpp", True),
    Claim("better erasure, SCR", "scr", True),
    Claim("latents less alike: cosine of the nearest decoder rows", "nearest", False),
    Claim("latents less composed: meta-SAE's FVE beyond that of random rows", "meta_beyond", False),
    Claim("edges between levels are the concept tree's: precision", "edge_precision", True),
    Claim("and more of the tree is found: recall", "edge_recall", True),
    Claim("(no claim, but asked) latents agree more across seeds", "shared", True),
    Claim("the same at the first prefix", "shared", True, "first"),
)


def values_of(numbers: Numbers, method: str, claim: Claim, sizes: Sequence[int]) -> list[float]:
    """One value per seed (or pair of seeds)."""

    def at(prefix: int) -> list[float]:
        return numbers[method, prefix].get(claim.measure, [])

    if claim.where == "whole":
        return at(sizes[-1])
    if claim.where == "first":
        return at(sizes[0])
    combine = max if claim.where == "best" else statistics.fmean
    prefixes = sizes if claim.where == "best" else sizes[:-1]
    return [combine(found) for found in zip(*map(at, prefixes), strict=True)]


def verdict(claim: Claim, nested: Sequence[float], plain: Sequence[float]) -> str:
    """Whether all of one are above all of the other, in the claim's direction."""
    if not claim.more:
        nested, plain = [-value for value in nested], [-value for value in plain]
    if min(nested) > max(plain):
        return "holds"
    return "does not hold" if max(nested) < min(plain) else "within noise"


def cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


LEVEL_COLUMNS: dict[str, tuple[str, int]] = {
    "L0": ("l0", 1),
    "FVE": ("fve", 3),
    "CE rec. (mean)": ("ce", 3),
    "probe k=1": ("probe_1", 3),
    "latents per concept": ("split_latents", 2),
    "main F1": ("main_f1", 2),
    "absorbed, fraction": ("fraction", 3),
    "fires on children": ("child_recall", 2),
    "elsewhere": ("elsewhere", 3),
    "TPP": ("tpp", 3),
}


def write_tables(numbers: Numbers, sizes: Sequence[int]) -> str:
    """Claims, then levels, as markdown."""
    lines = [f"| claim | {MATRYOSHKA} | {PLAIN} | here |", "|---|---|---|---|"]
    for claim in CLAIMS:
        nested, plain = (values_of(numbers, method, claim, sizes) for method in (MATRYOSHKA, PLAIN))
        if nested and plain:
            cells = (cell(nested, claim.digits), cell(plain, claim.digits), verdict(claim, nested, plain))
            lines.append(f"| {claim.words} | " + " | ".join(cells) + " |")
    lines += ["", "| SAE | prefix | " + " | ".join(LEVEL_COLUMNS) + " |", "|---" * (len(LEVEL_COLUMNS) + 2) + "|"]
    for method in (MATRYOSHKA, PLAIN):
        for prefix in sizes:
            found = numbers[method, prefix]
            cells = [cell(found.get(name, []), digits) for name, digits in LEVEL_COLUMNS.values()]
            lines.append(f"| {method if prefix == sizes[0] else ''} | {prefix:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def to_json(numbers: Numbers) -> dict[str, Any]:
    return {f"{method}, {prefix}": measures for (method, prefix), measures in numbers.items()}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    world = load_world(options)
    numbers, facts = measure(world, options)
    sizes = sorted({prefix for _, prefix in numbers})
    facts |= {"world": world.name, "seeds": options.seeds, "seconds": round(time.perf_counter() - started)}
    facts["cpu_seconds"] = round(time.process_time())
    print(json.dumps(facts))
    print(write_tables(numbers, sizes))
    if options.json:
        content = {"facts": facts, "options": vars(options), "numbers": to_json(numbers)}
        Path(options.json).write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
