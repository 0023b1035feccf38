"""Are the edges between an SAE's levels those of the concept tree?

    hf-msae train --output-dir runs/quickstart
    python benchmarks/hierarchy.py --sae runs/quickstart --json hierarchy.json

In the story world the truth is known: every word expresses a path of concepts (owl, bird, animal). A latent stands for
the concept whose labels its activation correlates with best, on stories that neither the language model nor the SAE
has seen, if the correlation is at least `--min-correlation`; other latents stand for none. Edges are found in other
stories, without labels. An edge between two latents that stand for concepts is right if the parent's concept is above
the child's in the tree. Edges with a latent that stands for no concept cannot be judged; how many there are is shown.

Precision: of the edges between latents of different concepts, the share that is right. Edges between two latents of
the same concept are counted by themselves, because the tree cannot judge them; those whose child is a part of its
parent are splits, a narrower sense that the tree does not have. `strict_precision` counts all of them as wrong.
Recall: of all pairs of a concept and one above it that the dictionary could show (both have a latent, in this order of
levels), the share that some right edge shows. Beside each stand two controls: all pairs in the right order of levels
that fire often enough (chance), and the edges with parents exchanged at random among the children (shuffled), which
keeps how many children each parent has.
"""

import argparse
import json
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from hf_msae import MatryoshkaSAE
from hf_msae.data.forward import capture_counted
from hf_msae.data.windows import DocumentEncoder, pad_id
from hf_msae.interpret.activity import active_latents
from hf_msae.interpret.edges import filter_edges, find_candidates
from hf_msae.interpret.hierarchy import PART_COVERAGE, PART_SIZE, Edge, HierarchySettings
from hf_msae.interpret.scan import scan
from hf_msae.sites import Site, find_site
from hf_msae.worlds.stories import CONCEPTS, StoryWorld, ancestors, load_story_lm, token_concepts

LABEL_SEED, EDGE_SEED = 1_003, 1_004
STORIES_AT_ONCE = 16
PLACES_AT_ONCE = 1 << 15
SHUFFLES = 20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", required=True, help="folder of an SAE of the story model")
    parser.add_argument("--label-stories", type=int, default=1500, help="stories to match latents and concepts on")
    parser.add_argument("--tokens", type=int, default=300_000, help="tokens to find edges in")
    parser.add_argument("--min-correlation", type=float, default=0.5)
    parser.add_argument("--json", help="write the numbers here")
    return parser.parse_args()


@dataclass(frozen=True)
class Row:
    """What the edges that pass a filter are worth; precision and recall are NaN where nothing can be judged."""

    edges: int
    judged: int
    right: int
    same_concept: int
    splits: int
    precision: float
    strict_precision: float
    shuffled_precision: float
    recall: float
    recall_of_tree_edges: float


@dataclass(frozen=True)
class LabelledTokens:
    """Activations of stories' tokens, (n, hidden_size), their concepts, (n, concepts), and their ids, (n,)."""

    x: Tensor
    labels: Tensor
    ids: Tensor


def label_tokens(site: Site, num_stories: int) -> LabelledTokens:
    """The tokens of stories that neither the language model nor an SAE has seen."""
    model, tokenizer = load_story_lm()
    encoder, names = DocumentEncoder(tokenizer), {name: number for number, name in enumerate(CONCEPTS)}
    parts, ids, rows, columns, count = [], [], [], [], 0
    texts = StoryWorld(seed=LABEL_SEED).documents(num_stories)
    for start in range(0, num_stories, STORIES_AT_ONCE):
        part = list(texts[start : start + STORIES_AT_ONCE])
        windows = [encoder.window(of_story) for of_story in encoder.encode(part)]
        captured = capture_counted(model, [site], windows, pad_id(tokenizer))
        assert captured is not None
        parts.append(captured[site])
        for text, window in zip(part, windows, strict=True):
            ids.append(window.input_ids[window.keep])
            for concepts, keep in zip(token_concepts(text, tokenizer), window.keep.tolist(), strict=True):
                if keep:
                    rows += [count] * len(concepts)
                    columns += [names[name] for name in concepts]
                    count += 1
    labels = torch.zeros(count, len(names))
    labels[rows, columns] = 1
    return LabelledTokens(torch.cat(parts), labels, torch.cat(ids))


def correlations(sae: MatryoshkaSAE, tokens: LabelledTokens) -> Tensor:
    """Of every latent's activation with every concept's labels, (latents, concepts)."""
    num_tokens, active = len(tokens.x), active_latents(sae, tokens.x)
    values = active.values.double()
    together = torch.zeros(sae.config.num_latents, tokens.labels.shape[1]).double()
    for part in torch.arange(len(values)).split(PLACES_AT_ONCE):
        labels = tokens.labels[active.tokens[part]].double()
        together.index_add_(0, active.latents[part], values[part, None] * labels)
    sums = torch.zeros(2, sae.config.num_latents).double()
    sums.index_add_(1, active.latents, torch.stack([values, values.square()]))
    (means, squares), shares = sums / num_tokens, tokens.labels.double().mean(0)
    spread = (squares - means.square()).clamp_min(0).sqrt()
    covariance = together / num_tokens - means[:, None] * shares
    return covariance / (spread[:, None] * (shares * (1 - shares)).sqrt()).clamp_min(1e-12)


def match(correlation: Tensor, min_correlation: float) -> dict[int, str]:
    """The concept that each latent stands for, of those that stand for one."""
    best, concepts = correlation.max(1)
    names = list(CONCEPTS)
    return {
        latent: names[concept]
        for latent, (value, concept) in enumerate(zip(best.tolist(), concepts.tolist(), strict=True))
        if value >= min_correlation
    }


def possible_pairs(concept_of: dict[int, str], sizes: Sequence[int], eligible: Sequence[bool]) -> tuple[set, float]:
    """Pairs of concepts, one above the other, that have latents in this order of levels; and the share of right ones
    among all pairs of latents in the order of levels.
    """

    def level(latent: int) -> int:
        return next(index for index, size in enumerate(sizes) if latent < size)

    latents = [latent for latent in concept_of if eligible[latent]]
    pairs, right, total = set(), 0, 0
    for parent in latents:
        for child in latents:
            if level(parent) < level(child):
                total += 1
                if concept_of[parent] in ancestors(concept_of[child]):
                    right += 1
                    pairs.add((concept_of[parent], concept_of[child]))
    return pairs, right / max(1, total)


def judge(edges: Sequence[Edge], concept_of: dict[int, str], possible: set[tuple[str, str]], num_tokens: int) -> Row:
    judged = [edge for edge in edges if edge.parent in concept_of and edge.child in concept_of]
    pairs = [(concept_of[edge.parent], concept_of[edge.child]) for edge in judged]
    distinct = [pair for pair in pairs if pair[0] != pair[1]]
    right = [pair for pair in distinct if pair[0] in ancestors(pair[1])]
    same = [edge for edge, (parent, child) in zip(judged, pairs, strict=True) if parent == child]
    direct = {pair for pair in possible if CONCEPTS[pair[1]].parent == pair[0]}
    return Row(
        edges=len(edges),
        judged=len(distinct),
        right=len(right),
        same_concept=len(same),
        splits=sum(is_split(edge, num_tokens) for edge in same),
        precision=len(right) / len(distinct) if distinct else math.nan,
        strict_precision=len(right) / len(judged) if judged else math.nan,
        shuffled_precision=shuffled_precision(distinct),
        recall=len(possible & set(right)) / len(possible) if possible else math.nan,
        recall_of_tree_edges=len(direct & set(right)) / len(direct) if direct else math.nan,
    )


def is_split(edge: Edge, num_tokens: int) -> bool:
    """Whether the child is a part of the parent: it fires hardly anywhere else, and on at most half as many tokens."""
    parent, child = edge.parent_firing_rate * num_tokens, edge.shared / edge.coverage
    return edge.coverage >= PART_COVERAGE and child <= PART_SIZE * parent


def shuffled_precision(pairs: Sequence[tuple[str, str]]) -> float:
    """Mean precision with the parents exchanged among the children."""
    if not pairs:
        return math.nan
    chooser, shares = random.Random(0), []
    for _ in range(SHUFFLES):
        parents = [parent for parent, _ in pairs]
        chooser.shuffle(parents)
        found = [parent in ancestors(child) for parent, (_, child) in zip(parents, pairs, strict=True)]
        shares.append(sum(found) / len(found))
    return fmean(shares)


def main() -> None:
    args = parse()
    sae = MatryoshkaSAE.from_pretrained(args.sae).eval()
    model, tokenizer = load_story_lm()
    tokens = label_tokens(find_site(model, sae.config), args.label_stories)
    concept_of = match(correlations(sae, tokens), args.min_correlation)
    # About 100 tokens a story, with some to spare.
    texts = StoryWorld(seed=EDGE_SEED).documents(max(100, args.tokens // 50))
    found = scan(
        model,
        tokenizer,
        sae,
        texts,
        max_tokens=args.tokens,
        record_tokens=args.tokens,
        top_contexts=1,
        sampled_contexts=0,
    )
    settings = HierarchySettings()
    candidates = find_candidates(sae, found.firings, settings)
    eligible = [count >= settings.min_firings for count in candidates.counts]
    possible, chance = possible_pairs(concept_of, sae.config.prefix_sizes, eligible)
    rows, alive = (
        {"coverage": judge(candidates.edges, concept_of, possible, found.num_tokens)},
        [True] * len(candidates.edges),
    )
    for name, passes in filter_edges(candidates, settings).items():
        alive = [was and now for was, now in zip(alive, passes, strict=True)]
        kept = [edge for edge, passed in zip(candidates.edges, alive, strict=True) if passed]
        rows[name] = judge(kept, concept_of, possible, found.num_tokens)
    by_level: dict[int, int] = defaultdict(int)
    for latent in concept_of:
        by_level[next(i for i, size in enumerate(sae.config.prefix_sizes) if latent < size)] += 1
    facts = {
        "sae": args.sae,
        "tokens": found.num_tokens,
        "latents_with_concept": len(concept_of),
        "by_level": dict(sorted(by_level.items())),
        "concepts_with_latent": len(set(concept_of.values())),
        "possible_pairs": len(possible),
        "precision_by_chance": chance,
    }
    print(json.dumps(facts))
    columns = ("precision", "strict_precision", "shuffled_precision", "recall", "recall_of_tree_edges")
    print(
        f"{'filter':10} {'edges':>7} {'judged':>7} {'right':>6} {'same':>5} {'splits':>6}",
        *(f"{name:>20}" for name in columns),
    )
    for name, row in rows.items():
        shares = (f"{asdict(row)[column]:20.3f}" for column in columns)
        print(
            f"{name:10} {row.edges:7,} {row.judged:7,} {row.right:6,} {row.same_concept:5,} {row.splits:6,}", *shares
        )
    if args.json:
        Path(args.json).write_text(
            json.dumps({**facts, "rows": {name: asdict(row) for name, row in rows.items()}}), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
