"""Does steering by a latent bring its concept into the text, at what cost, and beside what else?

    hf-msae train --output-dir runs/quickstart
    python benchmarks/steering.py --sae runs/quickstart --json steering.json --plot steering.png

In the story world the truth is known: every word says which concepts it expresses, in a steered text as in any other.
A concept's latent is the one whose activation correlates best with the concept's labels on held-out stories, where
the concept is also the one that fits the latent best. Such a latent says what a token is, which need not make the
model say it; so the latent that correlates best with the labels of the *next* token is tried, too. DiffMean gets its
two means from the same stories, with the labels of the token or of the next one. `find_latents` gets stories with
the concept and stories without it, and its words only with `--find-words`; it gives one latent or a few. All add a
shift to every token but BOS: a latent in units of its maximum, the directions as far as the concept's latent, what was
found in units of what costs `--find-loss` on neutral text, and DiffMean so, too, as a method of its own. Stories are
continued from the same openings with the same noise. Counted are only words that the model wrote.

Loss is that of the unsteered model, in nats per generated token: low is fluent, but a text that repeats itself is
cheap, too, so the share of repeated three-word sequences stands beside it.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from hf_msae import MatryoshkaSAE
from hf_msae.concepts import ConceptError
from hf_msae.concepts.finding import Found, Search, find_with_shifts
from hf_msae.sites import capture, resolve_site
from hf_msae.steering import (
    Direction,
    LatentEdit,
    diff_mean,
    random_direction,
    seeded_sampling,
    steer,
    steer_direction,
)
from hf_msae.worlds.stories import CONCEPTS, StoryWorld, ancestors, load_story_lm, token_concepts, word_concepts

METHODS = (
    "latent",
    "latent of next",
    "DiffMean",
    "DiffMean of next",
    "random",
    "found latent",
    "found few",
    "DiffMean at loss",
)
# Stories on each side that `find_latents` gets.
FIND_STORIES = 100
OPENING_TOKENS = 5
WORD = re.compile(r"[A-Za-z]+")
HELD_OUT_SEED, OPENING_SEED = 1_001, 1_002


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", required=True, help="folder of an SAE of the story model")
    parser.add_argument("--concepts", type=int, default=40, help="how many, those with the best latents")
    parser.add_argument("--pairs", type=int, default=10, help="of a coarse and a fine latent; 0: none")
    parser.add_argument("--held-out-stories", type=int, default=1000)
    parser.add_argument("--stories", type=int, default=24, help="stories written for each concept, method, strength")
    parser.add_argument("--new-tokens", type=int, default=60)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
    parser.add_argument("--min-occurrences", type=int, default=50, help="of a concept among the held-out tokens")
    parser.add_argument("--min-correlation", type=float, default=0.4)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--find-loss", type=float, default=1.3, help="of what find_latents finds, at strength 1")
    parser.add_argument(
        "--find-words",
        action="store_true",
        help="tell find_latents which words are the concept's, as DiffMean is told",
    )
    parser.add_argument("--json", help="write the numbers here")
    parser.add_argument("--plot", help="draw here")
    return parser.parse_args()


@dataclass(frozen=True)
class Match:
    """A concept and its latent; `length` is the shift of 1 × the latent's maximum. `next_latent` tells best whether
    the next token expresses the concept. `is_own`, `is_next_own`: whether the concept also fits the latent best.
    """

    concept: str
    latent: int
    correlation: float
    length: float
    is_own: bool
    next_latent: int
    next_correlation: float
    is_next_own: bool
    next_level: int


@dataclass(frozen=True)
class Written:
    """Stories: the concepts of each, its words, and the unsteered model's loss per token of each."""

    words: list[list[str]]
    losses: list[float]

    def rate(self, concept: str) -> float:
        """The share of stories with a word of the concept."""
        return fmean(any(concept in word_concepts(word) for word in words) for words in self.words)

    def density(self, concept: str) -> float:
        """The share of words that are of the concept."""
        return fmean(concept in word_concepts(word) for words in self.words for word in words)

    def variety(self, concept: str) -> int:
        """How many of the most specific concepts under this one are named."""
        found = {word_concepts(word)[0] for words in self.words for word in words if concept in word_concepts(word)}
        return len(found)

    @property
    def loss(self) -> float:
        return fmean(self.losses)

    @property
    def repetition(self) -> float:
        """The share of three-word sequences that stood in the same story before."""
        triples = [[tuple(words[i : i + 3]) for i in range(len(words) - 2)] for words in self.words]
        return 1 - sum(len(set(story)) for story in triples) / max(1, sum(map(len, triples)))


class World:
    """The story model, an SAE of it, and what is measured on them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model: Any
        self.model, self.tokenizer = load_story_lm()
        self.sae = MatryoshkaSAE.from_pretrained(options.sae)
        self.site = resolve_site(self.model, self.sae.config.site or "layers.2")
        openings = [self.tokenizer(text).input_ids for text in self._texts(OPENING_SEED, options.stories)]
        self.openings = torch.tensor([ids[:OPENING_TOKENS] for ids in openings])
        self.activations, self.labels, self.next_labels = self._held_out()
        self.findings: dict[str, Found | None] = {}

    @staticmethod
    def _texts(seed: int, count: int) -> Iterator[str]:
        world = StoryWorld(seed=seed)
        return (world.story(index).text for index in range(count))

    def _held_out(self) -> tuple[Tensor, Tensor, Tensor]:
        """Activations (tokens, hidden_size); which concepts each token, and the next, express (tokens, concepts)."""
        columns = {name: index for index, name in enumerate(CONCEPTS)}
        activations, labels, next_labels = [], [], []
        for text in self._texts(HELD_OUT_SEED, self.options.held_out_stories):
            hidden = capture(self.model, [self.site], **self.tokenizer(text, return_tensors="pt"))[self.site][0]
            concepts = token_concepts(text, self.tokenizer)
            expressed = torch.zeros(len(concepts), len(columns), dtype=torch.bool)
            for row, names in zip(expressed, concepts, strict=True):
                row[[columns[name] for name in names]] = True
            # Without BOS, and without the last token, which has no next.
            activations.append(hidden[1:-1])
            labels.append(expressed[1:-1])
            next_labels.append(expressed[2:])
        return torch.cat(activations), torch.cat(labels), torch.cat(next_labels)

    def matches(self) -> list[Match]:
        """Concepts that occur often enough, with their latents, the best correlated first."""
        with torch.no_grad():
            latents = self.sae.encode(self.activations)
        often = self.labels.sum(0) >= self.options.min_occurrences
        own = correlations(latents, self.labels.float()) * often
        following = correlations(latents, self.next_labels.float()) * often
        lengths = self.sae.max_activation * self.sae.W_dec.detach().norm(dim=-1)
        found = []
        for column, name in enumerate(CONCEPTS):
            if often[column]:
                latent, next_latent = int(own[:, column].argmax()), int(following[:, column].argmax())
                found.append(
                    Match(
                        concept=name,
                        latent=latent,
                        correlation=float(own[latent, column]),
                        length=float(lengths[latent]),
                        is_own=int(own[latent].argmax()) == column,
                        next_latent=next_latent,
                        next_correlation=float(following[next_latent, column]),
                        is_next_own=int(following[next_latent].argmax()) == column,
                        next_level=self._level(next_latent),
                    )
                )
        return sorted(found, key=lambda match: -match.correlation)

    def _level(self, latent: int) -> int:
        return sum(latent >= size for size in self.sae.config.prefix_sizes)

    def direction(self, match: Match, method: str) -> Direction:
        """DiffMean of the concept, or a random direction."""
        if method == "random":
            return random_direction(str(self.site), self.sae.config.hidden_size, seed=match.latent)
        labels = self.labels if method == "DiffMean" else self.next_labels
        has = labels[:, list(CONCEPTS).index(match.concept)]
        return diff_mean(str(self.site), self.activations[has], self.activations[~has])

    def steered(self, match: Match, method: str, strength: float) -> AbstractContextManager[None]:
        """The shift of `strength` × the latent's maximum, along the latent or a direction, or × what was found."""
        if method.startswith("found"):
            return self._found(match.concept, method, strength)
        if method == "DiffMean at loss":
            return self._at_loss(match, strength)
        if method.startswith("latent"):
            latent = match.latent if method == "latent" else match.next_latent
            return steer(self.model, self.sae, {latent: strength})
        return steer_direction(self.model, self.direction(match, method), strength * match.length)

    def _found(self, concept: str, method: str, strength: float) -> AbstractContextManager[None]:
        known = self.finding(concept)
        if known is None:
            return nullcontext()
        found = known.finding
        if method == "found few":
            return steer(
                self.model,
                self.sae,
                {edit.latent: strength * edit.value for edit in found.steering.edits if isinstance(edit, LatentEdit)},
                units="absolute",
            )
        best = found.latents[0]
        unit = self.sae.W_dec.detach()[best.latents[0]].norm().item()
        return steer(self.model, self.sae, {best.latents[0]: strength * best.length / unit}, units="absolute")

    def _at_loss(self, match: Match, strength: float) -> AbstractContextManager[None]:
        """DiffMean of what foretells the concept, scaled on the neutral text on which what is found is scaled."""
        known = self.finding(match.concept)
        if known is None:
            return nullcontext()
        direction = self.direction(match, "DiffMean of next")
        length, _ = known.held_out.at_loss(direction.vector, self.options.find_loss)
        return steer_direction(self.model, direction, strength * length)

    def finding(self, concept: str) -> Found | None:
        """What is found in stories with a word of the concept and stories without one, if anything."""
        if concept not in self.findings:
            sides: dict[bool, list[str]] = {True: [], False: []}
            words: set[str] = set()
            for text in self._texts(HELD_OUT_SEED, self.options.held_out_stories):
                own = {word for word in WORD.findall(text) if concept in word_concepts(word)}
                sides[bool(own)].append(text)
                words |= own
            try:
                self.findings[concept] = find_with_shifts(
                    self.model,
                    self.tokenizer,
                    self.sae,
                    sides[True][:FIND_STORIES],
                    sides[False][:FIND_STORIES],
                    Search(words=sorted(words) if self.options.find_words else (), loss=self.options.find_loss),
                )
            except ConceptError as error:
                print(f"{concept}: {error}", flush=True)
                self.findings[concept] = None
        return self.findings[concept]

    def write(self, context: AbstractContextManager[None], seed: int = 0) -> Written:
        """Stories continued from the openings."""
        with torch.no_grad(), context:
            ids = self.model.generate(
                self.openings,
                attention_mask=torch.ones_like(self.openings),
                max_new_tokens=self.options.new_tokens,
                do_sample=False,
                logits_processor=seeded_sampling(seed),
            )
        return self._read(ids)

    @torch.no_grad()
    def _read(self, ids: Tensor) -> Written:
        generated = ids[:, OPENING_TOKENS:]
        # EOS ends a story and still counts; what follows it is padding.
        real = ((generated == self.model.config.eos_token_id).cumsum(1) <= 1) & (
            generated != self.model.config.pad_token_id
        )
        log_probs = self.model(ids).logits[:, OPENING_TOKENS - 1 : -1].log_softmax(-1)
        losses = -log_probs.gather(-1, generated.unsqueeze(-1)).squeeze(-1)
        per_story = (losses * real).sum(1) / real.sum(1)
        texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return Written([WORD.findall(text) for text in texts], per_story.tolist())


def correlations(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of every column of `a` (n, p) with every column of `b` (n, q), (p, q); 0 for constants."""
    a, b = a - a.mean(0), b - b.mean(0)
    a, b = (x / x.norm(dim=0).clamp_min(1e-12) for x in (a, b))
    return a.T @ b


def steering_rates(world: World, matches: Sequence[Match], plain: Written) -> list[dict]:
    """A row per method and strength: means over the concepts, and each concept's rate."""
    unsteered = {match.concept: plain.rate(match.concept) for match in matches}
    rows = [summary("unsteered", 0.0, [(match, plain) for match in matches])]
    for method in world.options.methods:
        for strength in world.options.strengths:
            written = [(match, world.write(world.steered(match, method, strength))) for match in matches]
            rows.append(summary(method, strength, written))
            print(describe(rows[-1]), flush=True)
    rows[0]["rates"] = unsteered
    return rows


def summary(method: str, strength: float, written: Sequence[tuple[Match, Written]]) -> dict:
    rates = {match.concept: stories.rate(match.concept) for match, stories in written}
    return {
        "method": method,
        "strength": strength,
        "rate": fmean(rates.values()),
        "density": fmean(stories.density(match.concept) for match, stories in written),
        "loss": fmean(stories.loss for _, stories in written),
        "repetition": fmean(stories.repetition for _, stories in written),
        "rates": rates,
    }


def describe(row: dict) -> str:
    return (
        f"| {row['method']} | {row['strength']:g} | {row['rate']:.3f} | {row['density']:.3f} | {row['loss']:.2f} | "
        f"{row['repetition']:.3f} |"
    )


def pairs_of(matches: Sequence[Match], count: int) -> list[tuple[Match, Match]]:
    """A concept and one under it, each with a latent of its own that foretells it, the coarse one's no further out."""
    pairs = [
        (coarse, fine)
        for coarse in matches
        for fine in matches
        if coarse.concept in ancestors(fine.concept)
        and coarse.is_next_own
        and fine.is_next_own
        and coarse.next_level <= fine.next_level
    ]
    return sorted(pairs, key=lambda pair: -min(pair[0].next_correlation, pair[1].next_correlation))[:count]


def coarse_and_fine(world: World, pairs: Sequence[tuple[Match, Match]], plain: Written) -> list[dict]:
    """For each grain and strength, means over the pairs: how often each concept appears, and how varied it is."""
    rows = [grain_summary("unsteered", 0.0, [(coarse, fine, plain) for coarse, fine in pairs])]
    for grain in ("coarse", "fine", "both"):
        for strength in world.options.strengths:
            written = []
            for coarse, fine in pairs:
                chosen = {"coarse": (coarse,), "fine": (fine,), "both": (coarse, fine)}[grain]
                # Both at once share the strength.
                values = {match.next_latent: strength / len(chosen) for match in chosen}
                written.append((coarse, fine, world.write(steer(world.model, world.sae, values))))
            rows.append(grain_summary(grain, strength, written))
            print(describe_grain(rows[-1]), flush=True)
    return rows


def grain_summary(grain: str, strength: float, written: Sequence[tuple[Match, Match, Written]]) -> dict:
    return {
        "grain": grain,
        "strength": strength,
        "coarse_rate": fmean(stories.rate(coarse.concept) for coarse, _, stories in written),
        "fine_rate": fmean(stories.rate(fine.concept) for _, fine, stories in written),
        "variety": fmean(stories.variety(coarse.concept) for coarse, _, stories in written),
        "loss": fmean(stories.loss for *_, stories in written),
    }


def describe_grain(row: dict) -> str:
    return (
        f"| {row['grain']} | {row['strength']:g} | {row['coarse_rate']:.3f} | {row['fine_rate']:.3f} | "
        f"{row['variety']:.1f} | {row['loss']:.2f} |"
    )


def draw(rows: Sequence[dict], grains: Sequence[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    marks = dict(zip(METHODS, ("o-", "o--", "s-", "s--", "^:", "D-", "D--", "s:"), strict=True)) | {
        "coarse": "o-",
        "fine": "s-",
        "both": "^-",
    }
    panels = (
        (left, rows, "method", "rate", "stories with the concept", "A concept, against fluency"),
        (middle, grains, "grain", "coarse_rate", "stories with the coarse concept", "Coarse, fine or both latents"),
        (right, grains, "grain", "fine_rate", "stories with the fine concept", "The same stories"),
    )
    for axes, table, key, value, label, title in panels:
        base = table[0]
        axes.plot(base["loss"], base[value], "k*", markersize=12, label="unsteered", zorder=3)
        for name in dict.fromkeys(row[key] for row in table[1:]):
            line = [base, *(row for row in table if row[key] == name)]
            axes.plot([row["loss"] for row in line], [row[value] for row in line], marks[name], label=name)
            # Near the unsteered text, numbers would lie upon each other.
            for row in (row for row in line if row["loss"] > base["loss"] + 0.7):
                axes.annotate(f"{row['strength']:g}", (row["loss"], row[value]), fontsize=7, xytext=(4, -9),
                              textcoords="offset points", color="0.35")  # fmt: skip
        axes.set(
            xlabel="loss under the unsteered model (nats per token)", ylabel=label, title=title, ylim=(-0.03, 1.03)
        )
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
    figure.savefig(path, dpi=130)


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    world = World(options)
    matches = world.matches()
    chosen = [match for match in matches if match.is_own and match.correlation >= options.min_correlation]
    num_matched, chosen = len(chosen), chosen[: options.concepts]
    pairs = pairs_of(matches, options.pairs)
    if not chosen or (options.pairs and not pairs):
        raise SystemExit(f"{options.sae} has {num_matched} latents that match a concept; too few to compare.")
    print(f"{len(matches)} concepts occur {options.min_occurrences} times, {num_matched} have a latent of their own")
    print(f"steered: {', '.join(match.concept for match in chosen)}")
    print(f"pairs: {', '.join(f'{coarse.concept} > {fine.concept}' for coarse, fine in pairs)}")
    plain = world.write(nullcontext())
    print("\n| method | strength | rate | words | loss | repetition |\n|---|---|---|---|---|---|")
    rows = steering_rates(world, chosen, plain)
    print(describe(rows[0]))
    grains = []
    if pairs:
        print("\n| grain | strength | coarse concept | fine concept | variety | loss |\n|---|---|---|---|---|---|")
        grains = coarse_and_fine(world, pairs, plain)
        print(describe_grain(grains[0]))
    if options.json:
        names = [(coarse.concept, fine.concept) for coarse, fine in pairs]
        result = {"matches": [asdict(match) for match in chosen], "steering": rows, "pairs": names, "grains": grains}
        Path(options.json).write_text(json.dumps({"setting": vars(options), **result}, indent=1), encoding="utf-8")
    if options.plot and grains:
        draw(rows, grains, options.plot)


if __name__ == "__main__":
    main()
