"""How well steerings bring concepts into texts, at what cost, beside controls; strengths chosen apart from the report.

For each concept every method has a shift that costs the same loss on neutral text at strength 1, and texts are
continued from the same prompts with the same noise at every strength. Of each text three things are measured, from 0
to 1, and their harmonic mean, which is 0 where any is (AxBench, arXiv:2501.17148):

- *concept*: by words, a function or a judge (`scorers`);
- *fluency*: exp(−(loss − loss₀)), at most 1; the loss is that of the text under the model as it is, in nats per token,
  and loss₀ the mean over unsteered texts. So it is the factor by which a token is less likely than usual;
- *instruction*: 1 where the model as it is finds the text likelier behind its own prompt than behind another one.

The strength of a method is the one with the largest harmonic mean on every other prompt, and what is reported is
measured on the rest.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from hf_msae.concepts.examples import ConceptError
from hf_msae.concepts.finding import Found, Search, find_with_shifts
from hf_msae.concepts.results import MethodResult, SteeringEvaluation, TextScores
from hf_msae.concepts.scorers import JudgeScorer, Scorer, WordScorer
from hf_msae.concepts.writing import Continuation, Writer
from hf_msae.data.documents import DocumentsLike
from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.steering import Direction, steer_direction

logger = logging.getLogger(__name__)

NOTHING, PROMPT, NEGATIVE = "nothing", "prompt alone", "few latents, negative"
# Methods with a shift are named as `Found.shifts` has them.
METHODS = (
    "few latents",
    "one latent",
    "DiffMean",
    "random latent",
    "random direction",
    NEGATIVE,
    PROMPT,
    NOTHING,
)
STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0)
INSTRUCTION = "Write about {concept}. "


@dataclass(frozen=True)
class Concept:
    """What is to be said, and how it is known.

    Args:
        name: for people, for the prompt and for a judge.
        positive: texts with it, from which latents are found.
        negative: texts without it.
        words: that say it; a text is scored by them, unless there is a scorer, and latents are found by what says
            them. Without words, texts are scored by the tokens typical of the positive texts.
        scorer: how much a text shows it, 0 to 1.
    """

    name: str
    positive: DocumentsLike
    negative: DocumentsLike
    words: Sequence[str] = ()
    scorer: Scorer | None = None


def evaluate_steering(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: MatryoshkaSAE,
    concepts: Sequence[Concept],
    prompts: Sequence[str],
    *,
    methods: Sequence[str] = METHODS,
    strengths: Sequence[float] = STRENGTHS,
    loss: float = 0.5,
    new_tokens: int = 40,
    temperature: float = 1.0,
    chat: bool = False,
    seed: int = 0,
    of: str = "",
    done: SteeringEvaluation | None = None,
    on_concept: Callable[[SteeringEvaluation], None] = lambda so_far: None,
    **finding: Any,
) -> SteeringEvaluation:
    """Find a steering for each concept, and measure what it and the controls write.

    Args:
        model: in evaluation mode, one that predicts the next token.
        tokenizer: its own.
        sae: in evaluation mode.
        concepts: at least one.
        prompts: texts to continue, at least two; on every other one strengths are chosen.
        methods: which of `METHODS`.
        strengths: of the shifts, in units of what costs `loss`.
        loss: of a shift at strength 1, in nats per token on neutral text.
        new_tokens: to write at most.
        temperature: of the sampling.
        chat: whether prompts are messages to a chat model.
        seed: of all that is random.
        of: names the language model, the SAE and the judge, so that `done` is known to be of these.
        done: an earlier evaluation. Where its settings are these, its concepts are not measured again.
        on_concept: called after each concept with all that is known by then.
        **finding: further arguments of `find_latents`.

    Returns:
        Results of all concepts that the model knows; the others are in `skipped`.

    Raises:
        InputError: there are too few prompts, a method is not known, or a strength is not positive.
        ConceptError: no concept is known to the model, or a judge answers nonsense.
    """
    _check(concepts, prompts, methods, strengths)
    writer = Writer(model, tokenizer, new_tokens=new_tokens, temperature=temperature, seed=seed, chat=chat)
    bench = _Bench(writer, list(prompts), strengths)
    settings = {"of": of, "methods": list(methods), "strengths": list(strengths), "loss": loss, "seed": seed}
    settings |= {"new_tokens": new_tokens, "temperature": temperature, "chat": chat, "prompts": list(prompts)}
    settings = json.loads(json.dumps(settings | {"finding": finding}, default=str))
    facts = {"concepts": 0, "prompts": len(prompts), "strengths": list(strengths), "loss": loss}
    facts |= {"new_tokens": new_tokens, "temperature": temperature, "loss_unsteered": bench.usual_loss, "seed": seed}
    so_far = SteeringEvaluation([], {}, facts=facts, settings=settings)
    known = done.keys if done is not None and done.settings == settings else {}
    for concept in transformers_logging.tqdm(concepts, desc="Concepts", unit=" concept"):
        key = _key(concept)
        if done is not None and key is not None and known.get(concept.name) == key:
            so_far.add(done.of_concept(concept.name))
        else:
            search = Search(words=concept.words, name=concept.name, loss=loss, seed=seed, **finding)
            so_far.add(_measure_concept(model, tokenizer, sae, concept, search, bench, methods))
        so_far.keys.update({} if key is None else {concept.name: key})
        so_far.facts["concepts"] = len(so_far.latents)
        if so_far.results:
            on_concept(so_far)
    if not so_far.results:
        raise ConceptError(f"None of the concepts could be tried: {next(iter(so_far.skipped.values()))}")
    return so_far


def _measure_concept(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: MatryoshkaSAE,
    concept: Concept,
    search: Search,
    bench: "_Bench",
    methods: Sequence[str],
) -> SteeringEvaluation:
    try:
        found = find_with_shifts(model, tokenizer, sae, concept.positive, concept.negative, search)
    except ConceptError as error:
        logger.warning("%s is left out: %s", concept.name, error)
        return SteeringEvaluation([], {}, {concept.name: str(error)})
    scorer = concept.scorer or WordScorer(concept.words or [token.strip() for token in found.finding.tokens])
    warnings = [f"{concept.name}: {warning}" for warning in found.finding.warnings]
    results = [bench.measure(concept.name, method, found, scorer) for method in methods]
    if isinstance(scorer, JudgeScorer) and (said := scorer.check()):
        warnings.append(said)
    return SteeringEvaluation(results, {concept.name: list(found.finding.rows[0].latents)}, warnings=warnings)


def _key(concept: Concept) -> str | None:
    """A digest of what is known of a concept; None where its examples are no list, or a function scores it."""
    sides, scorers = (concept.positive, concept.negative), (type(None), WordScorer, JudgeScorer)
    if not all(isinstance(side, list) for side in sides) or not isinstance(concept.scorer, scorers):
        return None
    known = json.dumps([concept.name, list(concept.words), *sides], default=str)
    return hashlib.sha256(known.encode()).hexdigest()


def _check(
    concepts: Sequence[Concept], prompts: Sequence[str], methods: Sequence[str], strengths: Sequence[float]
) -> None:
    if not concepts:
        raise InputError("No concept was given; give at least one.")
    names = [concept.name for concept in concepts]
    if len(set(names)) < len(names):
        raise InputError(f"Concepts need names of their own; {max(names, key=names.count)!r} is given twice.")
    if len(prompts) < 2:
        raise InputError(f"Strengths are chosen on every other prompt, so two are needed; got {len(prompts)}.")
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise InputError(f"Methods are {', '.join(METHODS)}; got {', '.join(unknown) or 'none'}.")
    if not strengths or not all(math.isfinite(strength) and strength > 0 for strength in strengths):
        raise InputError(f"Strengths are finite numbers above 0, got {list(strengths)}.")


class _Bench:
    """The same prompts for every method."""

    def __init__(self, writer: Writer, prompts: list[str], strengths: Sequence[float]) -> None:
        self.writer, self.prompts, self.strengths = writer, prompts, strengths
        self.ids = [writer.encode(prompt) for prompt in prompts]
        # The next prompt that is another one, for each; itself where all are the same.
        self.others = [
            next((other for other in (*self.ids[place:], *self.ids[:place]) if other != ids), ids)
            for place, ids in enumerate(self.ids)
        ]
        self.has_others = any(ids != other for ids, other in zip(self.ids, self.others, strict=True))
        self.plain = writer.write(self.ids, nullcontext())
        self.usual_loss = fmean(writer.losses(self.ids, self.plain))

    def measure(self, concept: str, method: str, found: Found, scorer: Scorer) -> MethodResult:
        """One method at every strength, and what is reported of it."""
        shift = _shift(method, found)
        strengths = self.strengths if shift is not None else (1.0,)
        tried = []
        for strength in strengths:
            texts = self._write(concept, method, found, None if shift is None else strength * shift)
            tried.append((strength, self._score(texts, scorer)))
        chosen, scores = max(tried, key=lambda one: fmean(row[3] for row in one[1][::2]))
        kl = None if shift is None else found.held_out.effect(chosen * shift).kl
        curve = [(strength, self._mean(rows)) for strength, rows in tried]
        return MethodResult(concept, method, chosen, self._mean(scores[1::2]), kl, curve)

    def _write(self, concept: str, method: str, found: Found, shift: Tensor | None) -> list[Continuation]:
        if method == NOTHING:
            return self.plain
        if shift is None:
            asked = [self.writer.encode(INSTRUCTION.format(concept=concept) + prompt) for prompt in self.prompts]
            return self.writer.write(asked, nullcontext())
        direction = Direction(str(found.held_out.site), shift)
        context: AbstractContextManager[None] = steer_direction(
            self.writer.model, direction, float(shift.norm()), norm_limit=found.held_out.norm_limit
        )
        return self.writer.write(self.ids, context)

    def _score(self, texts: Sequence[Continuation], scorer: Scorer) -> list[tuple[float, float, float, float, float]]:
        """Concept, fluency, instruction, harmonic mean and loss of each text."""
        own, other = self.writer.losses(self.ids, texts), self.writer.losses(self.others, texts)
        rows = []
        for text, here, there in zip(texts, own, other, strict=True):
            concept = min(1.0, max(0.0, float(scorer(text.text))))
            fluency = math.exp(min(0.0, self.usual_loss - here))
            instruction = float(here < there)
            parts = [concept, fluency, *([instruction] if self.has_others else [])]
            rows.append((concept, fluency, instruction, harmonic_mean(parts), here))
        return rows

    def _mean(self, rows: Sequence[tuple[float, float, float, float, float]]) -> TextScores:
        concept, fluency, instruction, overall, loss = (fmean(column) for column in zip(*rows, strict=True))
        return TextScores(concept, fluency, instruction if self.has_others else None, overall, loss, len(rows))


def _shift(method: str, found: Found) -> Tensor | None:
    """The method's shift at strength 1; None for methods without one."""
    if method in (NOTHING, PROMPT):
        return None
    return -found.shifts["few latents"] if method == NEGATIVE else found.shifts[method]


def harmonic_mean(values: Sequence[float]) -> float:
    """The harmonic mean, 0 where a value is 0.

    Args:
        values: from 0 to 1.
    """
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def concepts_of_words(
    words: Mapping[str, Sequence[str]],
    texts: Sequence[str],
    most: int = 100,
    scorer: Callable[[str], Scorer] | None = None,
) -> list[Concept]:
    """Concepts that are known by words alone, with examples from some texts: those with a word and those without.

    Args:
        words: by the concept's name.
        texts: where examples are looked for.
        most: examples of each kind.
        scorer: makes the scorer of a concept from its name; by default texts are scored by the words.
    """
    found = []
    for name, of in words.items():
        says = WordScorer(of)
        sides: dict[bool, list[str]] = {True: [], False: []}
        for text in texts:
            sides[says(text) > 0].append(text)
        by = None if scorer is None else scorer(name)
        found.append(Concept(name, sides[True][:most], sides[False][:most], tuple(of), by))
    return found
