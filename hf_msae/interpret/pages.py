"""A latent's page: all that is known of it, as plain data that a person, a web page or another model can read."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_msae.interpret.hierarchy import Edge


@dataclass(frozen=True)
class Context:
    """A stretch of text.

    Args:
        tokens: as texts.
        activations: of the latent, one a token.
        position: the token for which it was taken.
        quantile: for a sampled context, the share of the latent's activations that are smaller; None for a top
            context.
    """

    tokens: Sequence[str]
    activations: Sequence[float]
    position: int
    quantile: float | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.tokens)

    @property
    def peak_token(self) -> str:
        """The token for which it was taken."""
        return self.tokens[self.position]

    @property
    def peak(self) -> float:
        """The latent's activation on that token."""
        return self.activations[self.position]

    def marked(self, marks: Sequence[bool], left: str = "<<", right: str = ">>") -> str:
        """The text with the marked tokens set off; neighbouring ones share a pair of marks.

        Args:
            marks: for each token whether it is marked.
            left: stands before marked tokens.
            right: stands behind them.
        """
        parts = []
        for index, (token, mark) in enumerate(zip(self.tokens, marks, strict=True)):
            opens = mark and not (index and marks[index - 1])
            closes = mark and not (index + 1 < len(marks) and marks[index + 1])
            space = token[: len(token) - len(token.lstrip())] if opens else ""
            parts.append(f"{space}{left if opens else ''}{token[len(space) :]}{right if closes else ''}")
        return "".join(parts)

    def marked_active(self, share: float = 0.3) -> str:
        """The text with the tokens marked on which the latent is active.

        Args:
            share: of its maximum here that it must reach.
        """
        return self.marked(self.active(share))

    def active(self, share: float = 0.3) -> list[bool]:
        """On which tokens the latent is active.

        Args:
            share: of its maximum here that it must reach.
        """
        bound = share * max(self.activations)
        return [value > 0 and value >= bound for value in self.activations]


@dataclass(frozen=True)
class TokenEffect:
    """A token, and how a latent changes its logit.

    Args:
        token: as text.
        id: of the token.
        effect: what an activation of 1 adds to the logit beside the mean of all tokens, in nats.
    """

    token: str
    id: int
    effect: float


@dataclass(frozen=True)
class Neighbour:
    """Another latent with a near decoder row.

    Args:
        latent: its number.
        cosine: of the two decoder rows.
    """

    latent: int
    cosine: float


@dataclass(frozen=True)
class Label:
    """What a language model calls a latent, and how well it can tell by that where the latent is active.

    Args:
        text: the phrase.
        detection: AUC, 0.5 at chance; None where it was not scored.
        fuzzing: AUC, 0.5 at chance; None where it was not scored.
    """

    text: str
    detection: float | None = None
    fuzzing: float | None = None


@dataclass(frozen=True)
class LatentPage:
    """One latent.

    Args:
        latent: its number.
        level: the index of the first prefix that has it.
        firing_rate: share of tokens on which it fires.
        mean_activation: where it fires.
        max_activation: the largest.
        histogram: how many activations lie in each of the bins of equal width from 0 to `histogram_range`.
        histogram_range: the upper end of the last bin.
        peak_tokens: those at which its top contexts peak, the most frequent first.
        promoted: tokens whose logits it raises, the largest effect first.
        suppressed: tokens whose logits it lowers, the largest effect first.
        nearest: latents with the largest decoder cosines.
        top: contexts, the strongest first.
        sampled: contexts of tokens drawn evenly from all on which it fires, the strongest first.
        label: what a language model calls it, if one was asked.
        parents: edges to those of earlier levels, the highest score first.
        children: edges to those of later levels, those that make up most of it first.
    """

    latent: int
    level: int
    firing_rate: float
    mean_activation: float
    max_activation: float
    histogram: Sequence[int]
    histogram_range: float
    peak_tokens: Sequence[str]
    promoted: Sequence[TokenEffect]
    suppressed: Sequence[TokenEffect]
    nearest: Sequence[Neighbour]
    top: Sequence[Context]
    sampled: Sequence[Context]
    label: Label | None = None
    parents: Sequence[Edge] = ()
    children: Sequence[Edge] = ()

    @property
    def is_dead(self) -> bool:
        """Whether it fires on no token."""
        return self.firing_rate == 0

    @property
    def density(self) -> float:
        """What `firing_rate` was called in the version before, and still is in the files."""
        warnings.warn(
            "page.density is now page.firing_rate; the old name goes with the next version.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.firing_rate

    @property
    def name(self) -> str:
        """Its label, or else the tokens at which it peaks."""
        return name_of(self.peak_tokens, self.label)

    def quantile(self, low: float, high: float) -> list[Context]:
        """The sampled contexts whose activation lies between two quantiles of all.

        Args:
            low: the lower one, from 0 to 1.
            high: the higher one, which is left out.
        """
        return [context for context in self.sampled if low <= (context.quantile or 0.0) < high]


def name_of(peak_tokens: Sequence[str], label: Label | None = None, most: int = 4) -> str:
    """What to call a latent: its label, or else the tokens at which it peaks.

    Args:
        peak_tokens: the most frequent first.
        label: if it has one.
        most: how many tokens to name it by.
    """
    if label is not None:
        return label.text
    shown = [token.strip() or repr(token) for token in peak_tokens[:most]]
    return ", ".join(shown) if shown else "(never fires)"


def page_from_row(
    row: Mapping[str, Any], label: Label | None = None, parents: Sequence[Edge] = (), children: Sequence[Edge] = ()
) -> LatentPage:
    """The page of one row of the Parquet files.

    Args:
        row: its columns.
        label: of the latent, if it has one.
        parents: edges from its parents.
        children: edges to its children.
    """
    values = {"firing_rate" if name == "density" else name: value for name, value in row.items()}
    for name in ("promoted", "suppressed"):
        values[name] = [TokenEffect(**effect) for effect in values[name]]
    values["nearest"] = [Neighbour(**other) for other in values["nearest"]]
    for name in ("top", "sampled"):
        values[name] = [Context(**context) for context in values[name]]
    return LatentPage(**values, label=label, parents=parents, children=children)
