"""What an evaluation of steerings found out: scores of texts, of methods on concepts, and all of it."""

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

# Draws of concepts, with replacement, from which an interval is read.
NUM_DRAWS = 2000


@dataclass(frozen=True)
class TextScores:
    """Means over texts.

    Args:
        concept: 0 to 1.
        fluency: 0 to 1.
        instruction: 0 to 1; None where all prompts are the same.
        overall: mean of the texts' harmonic means.
        loss: under the model as it is, in nats per token.
        num_texts: how many.
    """

    concept: float
    fluency: float
    instruction: float | None
    overall: float
    loss: float
    num_texts: int


@dataclass(frozen=True)
class MethodResult:
    """One method on one concept.

    Args:
        concept: its name.
        method: its name.
        strength: chosen on every other prompt.
        reported: on the rest, at this strength.
        kl: of the shift at this strength on neutral text, in nats per token; None for what is no shift.
        curve: strength and scores on all prompts, for each strength.
    """

    concept: str
    method: str
    strength: float
    reported: TextScores
    kl: float | None
    curve: list[tuple[float, TextScores]]


@dataclass(frozen=True)
class SteeringEvaluation:
    """All results.

    Args:
        results: one for each concept and method.
        latents: by concept the latents of "few latents".
        skipped: by concept why it was left out.
        warnings: sentences.
        facts: of the run.
        settings: what every number depends on beside the concepts.
        keys: by concept a digest of what is known of it.
    """

    results: list[MethodResult]
    latents: dict[str, list[int]]
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """The methods, in the order in which they were tried."""
        return list(dict.fromkeys(result.method for result in self.results))

    def of_method(self, method: str) -> list[MethodResult]:
        """The results of a method, one a concept.

        Args:
            method: its name.
        """
        return [result for result in self.results if result.method == method]

    def curve(self, method: str) -> list[tuple[float, float, float]]:
        """Strength, mean loss and mean concept score over all concepts, for each strength of a method.

        Args:
            method: its name.
        """
        points: dict[float, list[TextScores]] = {}
        for result in self.of_method(method):
            for strength, scores in result.curve:
                points.setdefault(strength, []).append(scores)
        return [
            (strength, fmean(one.loss for one in scores), fmean(one.concept for one in scores))
            for strength, scores in sorted(points.items())
        ]

    def interval(self, method: str) -> tuple[float, float] | None:
        """Where 95% of a method's mean overall scores lie if other concepts of the kind had been drawn (bootstrap).

        Args:
            method: its name.

        Returns:
            Both ends; None for fewer than three concepts.
        """
        scores = [result.reported.overall for result in self.of_method(method)]
        if len(scores) < 3:
            return None
        draw = random.Random(0)
        means = sorted(fmean(draw.choices(scores, k=len(scores))) for _ in range(NUM_DRAWS))
        return means[NUM_DRAWS // 40], means[-1 - NUM_DRAWS // 40]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SteeringEvaluation":
        """From what JSON has.

        Args:
            values: as `to_dict` gave them.
        """
        results = [
            MethodResult(
                **one
                | {
                    "reported": TextScores(**one["reported"]),
                    "curve": [(strength, TextScores(**scores)) for strength, scores in one["curve"]],
                }
            )
            for one in values["results"]
        ]
        return cls(**{**values, "results": results})

    def of_concept(self, name: str) -> "SteeringEvaluation":
        """What was found out about one concept, without facts.

        Args:
            name: of the concept.
        """
        return SteeringEvaluation(
            [result for result in self.results if result.concept == name],
            {known: latents for known, latents in self.latents.items() if known == name},
            {known: why for known, why in self.skipped.items() if known == name},
            [warning for warning in self.warnings if warning.startswith(f"{name}: ")],
        )

    def add(self, other: "SteeringEvaluation") -> None:
        """Take another's concepts in.

        Args:
            other: an evaluation of other concepts.
        """
        self.results.extend(other.results)
        self.latents.update(other.latents)
        self.skipped.update(other.skipped)
        self.warnings.extend(other.warnings)
