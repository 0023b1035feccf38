"""Latents of a concept, found by labelled examples: which tell it, which make the model say it, and a steering.

Telling and saying are different things (Arad et al., arXiv:2505.20063): what fires on a concept rarely writes it. So
both are measured for every latent that is looked at. How well it tells is its AUROC on held-out examples. What it
does is the change of the next-token distribution of held-out neutral text when it is pushed, all pushes costing the
same loss: by how much the probability of the tokens that are typical of the positive examples rises. Beside them stand
what needs no SAE (DiffMean, a probe) and what means nothing (random latents).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.concepts.choosing import Push
from hf_msae.concepts.examples import ConceptError, check_apart, halves, read_windows, run_texts
from hf_msae.concepts.pushing import NeutralText
from hf_msae.concepts.reading import LevelReading
from hf_msae.concepts.searching import Finder, FoundRow, Reading, wanted_tokens
from hf_msae.cross_entropy import why_no_next_token
from hf_msae.data import Window, pad_id, vocabulary
from hf_msae.data.documents import DocumentsLike
from hf_msae.devices import device_of
from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.sites import find_site
from hf_msae.steering import LatentEdit, Steering

logger = logging.getLogger(__name__)

# Tokens of an example or of neutral text that are read, where the SAE was trained on more.
CONTEXT_LENGTH = 128
MAX_LATENTS = 5


@dataclass(frozen=True)
class Search:
    """What is looked for, and what that may cost: the arguments of `find_latents`, which says what they are."""

    neutral: "DocumentsLike | None" = None
    words: Sequence[str] = ()
    name: str = "found"
    max_latents: int = MAX_LATENTS
    loss: float = 0.5
    num_candidates: int = 16
    neutral_tokens: int = 1000
    context_length: int | None = None
    site: str | None = None
    lm_batch_size: int = 16
    seed: int = 0
    refuse_swapped: bool = False
    on_progress: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.max_latents <= MAX_LATENTS:
            raise InputError(f"max_latents must be 1 to {MAX_LATENTS}, got {self.max_latents}.")
        if not 0 < self.loss <= 10:
            raise InputError(f"loss must be above 0 and at most 10 nats per token, got {self.loss}; 0.5 is usual.")
        if self.num_candidates < 1 or self.neutral_tokens < 1:
            raise InputError(
                "num_candidates and neutral_tokens must be at least 1, got "
                f"{self.num_candidates} and {self.neutral_tokens}."
            )

    def tell(self, words: str) -> None:
        """Say what is done next."""
        if self.on_progress is not None:
            self.on_progress(words)

    def length(self, sae: MatryoshkaSAE) -> int:
        """Tokens of a text that are read."""
        return self.context_length or min(sae.config.context_length or CONTEXT_LENGTH, CONTEXT_LENGTH)


@dataclass(frozen=True)
class Finding:
    """What `find_latents` found.

    Args:
        tokens: that are typical of the positive examples, as text, the most typical first.
        token_ids: the same, as the model numbers them.
        at_rest: their probability in the model as it is, on held-out neutral text.
        loss: that each push was to cost, in nats per token.
        levels: how well each prefix tells the concept.
        rows: baselines, and the steering as "few latents".
        latents: those that were pushed, what says the concept most first.
        auroc: of every latent, on held-out examples, (num_latents,).
        steering: the few latents, as `save_steering` takes it.
        warnings: what a person should know, in sentences.
        facts: numbers of examples and tokens.
    """

    tokens: list[str]
    token_ids: list[int]
    at_rest: float
    loss: float
    levels: list[LevelReading]
    rows: list[FoundRow]
    latents: list[FoundRow]
    auroc: Tensor
    steering: Steering
    warnings: list[str]
    facts: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; without the AUROC of latents that no row is of."""
        return {
            "tokens": self.tokens,
            "token_ids": self.token_ids,
            "at_rest": self.at_rest,
            "loss": self.loss,
            "levels": [asdict(level) for level in self.levels],
            "rows": [asdict(row) for row in self.rows],
            "latents": [asdict(row) for row in self.latents],
            "steering": self.steering.to_dict(),
            "warnings": self.warnings,
            "facts": self.facts,
        }


@dataclass(frozen=True)
class Found:
    """A finding with what it was measured with.

    Args:
        finding: what `find_latents` gives.
        held_out: the neutral text on which effects are reported.
        make_shifts: makes `shifts`.
    """

    finding: Finding
    held_out: NeutralText
    make_shifts: Callable[[], dict[str, Tensor]]

    @cached_property
    def shifts(self) -> dict[str, Tensor]:
        """Shifts that cost the same loss, (hidden_size,) each.

        They are "few latents", "one latent", "DiffMean", "random latent" and "random direction".
        """
        return self.make_shifts()


def find_latents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: MatryoshkaSAE,
    positive: DocumentsLike,
    negative: DocumentsLike,
    *,
    neutral: "DocumentsLike | None" = None,
    words: Sequence[str] = (),
    name: str = "found",
    max_latents: int = MAX_LATENTS,
    loss: float = 0.5,
    num_candidates: int = 16,
    neutral_tokens: int = 1000,
    context_length: int | None = None,
    site: str | None = None,
    lm_batch_size: int = 16,
    seed: int = 0,
    refuse_swapped: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Finding:
    """Find the latents of a concept by examples, and fit a steering of a few to them.

    Args:
        model: in evaluation mode, one that predicts the next token.
        tokenizer: its own.
        sae: in evaluation mode; it is moved to where the model is.
        positive: texts with the concept, `Documents` or what `as_documents` takes; at least 10 different ones.
        negative: texts without it, as much like the others as can be had otherwise; at least 10.
        neutral: text on which pushes are tried; by default the negative examples.
        words: what is to be said; by default the tokens that are typical of the positive examples.
        name: of the steering.
        max_latents: in the steering, one to five.
        loss: what a push costs: by how much what the pushed model says next is less likely to the model as it is, in
            nats per token.
        num_candidates: how many latents are pushed one by one.
        neutral_tokens: how many tokens of text for fitting, and as many that are held out.
        context_length: tokens of a text that are read; by default as the SAE was trained, 128 at most.
        site: where the SAE reads; by default what its configuration records.
        lm_batch_size: texts per forward pass.
        seed: of the division into halves and of random latents.
        refuse_swapped: whether examples that look swapped are an error; by default they are a warning.
        on_progress: gets a few words before each step; what it raises ends the search.

    Returns:
        What was found; `save_steering(found.steering, folder)` keeps the steering.

    Raises:
        ConceptError: there are too few different examples, a text stands on both sides, nothing is typical of the
            positive ones, they look swapped and that is refused, or neither a latent nor a probe tells them apart on
            held-out examples.
        InputError: the SAE does not fit the model, or a number is out of its bounds.
    """
    search = Search(
        neutral=neutral,
        words=words,
        name=name,
        max_latents=max_latents,
        loss=loss,
        num_candidates=num_candidates,
        neutral_tokens=neutral_tokens,
        context_length=context_length,
        site=site,
        lm_batch_size=lm_batch_size,
        seed=seed,
        refuse_swapped=refuse_swapped,
        on_progress=on_progress,
    )
    return find_with_shifts(model, tokenizer, sae, positive, negative, search).finding


def find_with_shifts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: MatryoshkaSAE,
    positive: DocumentsLike,
    negative: DocumentsLike,
    search: Search,
) -> Found:
    """What `find_latents` finds, with the shifts that were tried.

    Args:
        model: as there, and so are the texts.
        tokenizer: its own.
        sae: in evaluation mode; it is moved to where the model is.
        positive: texts with the concept.
        negative: texts without it.
        search: what is looked for.
    """
    _check_fit(model, sae)
    place = find_site(model, sae.config, search.site)
    sae.to(device_of(model))  # type: ignore[arg-type]  # transformers hides the signature
    length = search.length(sae)
    sides = (
        read_windows(tokenizer, model, positive, length, "Positive examples"),
        read_windows(tokenizer, model, negative, length, "Negative examples"),
    )
    check_apart(*sides, tokenizer)
    (plus, plus_held), (minus, minus_held) = (halves(side, search.seed) for side in sides)
    limit = sae.config.norm_limit
    search.tell(f"Reading {len(sides[0]) + len(sides[1])} examples")
    fitting, held = (
        run_texts(model, tokenizer, place, a, b, limit, search.lm_batch_size)
        for a, b in ((plus, minus), (plus_held, minus_held))
    )
    reading = Reading(sae, fitting, held)
    warnings = reading.check()
    if warnings and search.refuse_swapped:
        raise ConceptError(warnings[0])
    wanted = wanted_tokens(model, tokenizer, search.words, reading)
    quiet = (fitting.negatives(), held.negatives())
    if search.neutral is not None:
        quiet = halves(read_windows(tokenizer, model, search.neutral, length, "Neutral text"), search.seed)
    texts = [
        NeutralText(
            model,
            place,
            _first_tokens(windows, search.neutral_tokens),
            wanted,
            norm_limit=limit,
            pad_id=pad_id(tokenizer, vocabulary(model)),
            lm_batch_size=search.lm_batch_size,
        )
        for windows in quiet
    ]
    finder = Finder(sae, place, reading, texts[0], texts[1], search.loss, search.seed, search.tell)
    latents = finder.latents(search.num_candidates)
    push = finder.few(latents, search.max_latents)
    rows = finder.rows(push, latents, wanted)
    ids = wanted.tolist()
    tokens = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    facts = {
        "positive": len(sides[0]),
        "negative": len(sides[1]),
        "neutral_tokens": texts[1].num_tokens,
        "tokens": len(fitting.x) + len(held.x),
    }
    few = next(row for row in rows if row.name == "few latents")
    at_rest = texts[1].at_rest.said
    if few.effect.said <= at_rest:
        warnings.append("Pushing these latents does not make the typical tokens likelier on held-out text.")
    for warning in warnings:
        logger.warning(warning)
    steering = _steering(sae, push, search.name, tokens, at_rest, few)
    finding = Finding(
        tokens, ids, at_rest, search.loss, reading.levels, rows, latents, reading.tested, steering, warnings, facts
    )
    return Found(finding, texts[1], lambda: finder.shifts(push, latents, wanted))


def _check_fit(model: PreTrainedModel, sae: MatryoshkaSAE) -> None:
    """Raises InputError where there is nothing to push, or nothing that pushing would make the model say."""
    reason = why_no_next_token(model)
    if reason is not None:
        raise InputError(f"Latents are found by what they make the model say, and {reason}.")
    if sae.config.is_transcoder:
        raise InputError(
            "Latents are found of SAEs; this is a transcoder, which writes at another site than it reads: give an "
            "SAE, or look latents up by what they promote (search_promoting)."
        )


def _first_tokens(windows: Sequence[Window], num_tokens: int) -> list[Window]:
    """The first windows that hold so many tokens that count."""
    found: list[Window] = []
    for window in windows:
        found.append(window)
        num_tokens -= int(window.keep.sum())
        if num_tokens <= 0:
            break
    return found


def _steering(
    sae: MatryoshkaSAE, push: Push, name: str, tokens: Sequence[str], at_rest: float, few: FoundRow
) -> Steering:
    lengths = sae.W_dec.detach().float().norm(dim=-1)[list(push.latents)].tolist()
    edits = [
        LatentEdit(latent, amount / length, units="absolute")
        for latent, amount, length in zip(push.latents, push.amounts, lengths, strict=True)
    ]
    shown = ", ".join(token.strip() for token in tokens[:5])
    description = (
        f"Says {shown}: their probability on neutral text rises from {at_rest:.4f} to {few.effect.said:.4f}, at a "
        f"loss of {few.effect.loss:.2f} nats per token."
    )
    return Steering(edits, name=name, description=description)
