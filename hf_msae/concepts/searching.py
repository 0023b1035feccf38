"""How well latents tell a concept, and what they make the model say: the parts of `find_latents`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.concepts.choosing import Push, best_few, best_single, promising, unit_rows
from hf_msae.concepts.examples import NO_NEXT, ConceptError, Texts
from hf_msae.concepts.pushing import Effect, NeutralText
from hf_msae.concepts.reading import (
    BEYOND_CHANCE,
    auroc,
    chance_error,
    fit_probe,
    probe_auroc,
    read_levels,
)
from hf_msae.concepts.typical import typical_tokens
from hf_msae.concepts.words import tokens_of_words
from hf_msae.data import vocabulary
from hf_msae.evaluation.labelled import encoder_of
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.sites import Site
from hf_msae.steering import random_direction

NUM_RANDOM = 4


@dataclass(frozen=True)
class FoundRow:
    """What a latent, several or a direction tell and do.

    Args:
        name: of the row.
        latents: that are pushed; empty for directions that need no SAE.
        level: of the latent, the index of the first prefix that has it; None for several and for directions.
        auroc: on held-out examples; None for what reads nothing.
        effect: on held-out neutral text; a mean where the row stands for several pushes.
        length: of the shift.
    """

    name: str
    latents: tuple[int, ...]
    level: int | None
    auroc: float | None
    effect: Effect
    length: float


class Reading:
    """How well latents and a probe on whole activations tell the examples apart."""

    def __init__(self, sae: MatryoshkaSAE, fitting: Texts, held: Texts) -> None:
        self.fitting, self.held = fitting, held
        encode, at_once = encoder_of(sae)
        self.latents = [texts.means(encode, at_once) for texts in (fitting, held)]
        self.raw = [texts.means(lambda x: x, 8192) for texts in (fitting, held)]
        self.known = auroc(self.latents[0], fitting.positive)
        self.tested = auroc(self.latents[1], held.positive)
        self.levels = read_levels(
            self.latents[0], fitting.positive, self.latents[1], held.positive, sae.config.prefix_sizes
        )
        self.probe = fit_probe(self.raw[0], fitting.positive)
        self.probe_auroc = probe_auroc(self.probe, self.raw[1], held.positive)
        self.fires = torch.stack([latents.amax(0) for latents in self.latents]).amax(0) > 0

    def check(self) -> list[str]:
        """Sentences on what looks wrong. Raises ConceptError where nothing tells the examples apart."""
        bound = 0.5 + BEYOND_CHANCE * chance_error(self.held.positive)
        best, worst = int(self.known.argmax()), int(self.known.argmin())
        high, low = float(self.tested[best]), float(self.tested[worst])
        few = max(level.few_auroc for level in self.levels)
        if max(high, few, self.probe_auroc, 1 - low) < bound:
            raise ConceptError(
                f"Neither a latent (AUROC {high:.2f}), nor a few ({few:.2f}), nor a probe on whole activations "
                f"({self.probe_auroc:.2f}) tells positive from negative examples on the {len(self.held.windows)} that "
                f"are held out, where chance reaches {bound:.2f}: the model does not know this concept at this site, "
                "or there are too few examples; give more, or an SAE of another layer."
            )
        if 1 - low >= bound and (0.5 - low) > 2 * max(0.0, high - 0.5):
            return [
                f"Positive and negative examples may be swapped: latent {worst} has an AUROC of {low:.2f}, so it "
                f"fires on the negative ones, and no latent tells the positive ones better than {high:.2f}."
            ]
        return []

    def of_direction(self, direction: Tensor) -> float:
        """AUROC of mean activations along a direction, on held-out examples."""
        values = self.raw[1] @ direction.float().cpu()
        return float(auroc(values[:, None], self.held.positive)[0])

    def of_latents(self, latents: Sequence[int]) -> float:
        """AUROC of a latent, or of a probe on several, on held-out examples."""
        if len(latents) == 1:
            return float(self.tested[latents[0]])
        probe = fit_probe(self.latents[0], self.fitting.positive, latents)
        return probe_auroc(probe, self.latents[1], self.held.positive)


def wanted_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: Sequence[str], reading: "Reading"
) -> Tensor:
    """The tokens that are to be said."""
    if words:
        return tokens_of_words(words, tokenizer)
    plus, minus = (
        [
            window.input_ids[window.keep]
            for texts in (reading.fitting, reading.held)
            for window, of in zip(texts.windows, texts.positive.tolist(), strict=True)
            if of is side
        ]
        for side in (True, False)
    )
    wanted = typical_tokens(plus, minus, vocabulary(model))
    if not len(wanted):
        swapped = reading.check()
        raise ConceptError(
            "No token is typical of the positive examples, so there is nothing that a latent should make the model "
            "say: give more examples, or the words that it should say." + (f" {swapped[0]}" if swapped else "")
        )
    return wanted


class Finder:
    """Pushes latents and directions: fitted on one part of the neutral text, measured on the other."""

    def __init__(
        self,
        sae: MatryoshkaSAE,
        site: Site,
        reading: Reading,
        text: NeutralText,
        held_out: NeutralText,
        loss: float,
        seed: int,
        tell: Callable[[str], None],
    ) -> None:
        self.sae, self.site, self.reading, self.loss, self.seed = sae, site, reading, loss, seed
        self.tell = tell
        self.text, self.held_out = text, held_out
        self.units = unit_rows(sae.W_dec.detach().float())
        # What never fired stands for nothing, whatever its direction does.
        self.usable = ((sae.max_activation > 0) | reading.fires.to(sae.device)) & (self.units.norm(dim=-1) > 0)

    def latents(self, count: int) -> list[FoundRow]:
        """Latents of every level that tell or say the concept, each pushed alone, what says it most first."""
        sizes = self.sae.config.prefix_sizes
        chosen = promising(self.text, self.units, self.usable, sizes, count)
        chosen += [level.latent for level in self.reading.levels if self.usable[level.latent]]
        pushes = best_single(self.text, self.units, list(dict.fromkeys(chosen)), self.loss, self.tell)
        self.pushes = {push.latents[0]: push for push in pushes}
        return [self._row(f"latent {push.latents[0]}", push) for push in pushes]

    def few(self, latents: Sequence[FoundRow], count: int) -> Push:
        """The sum of a few latents that is saved."""
        first = self.pushes[latents[0].latents[0]]
        return best_few(self.text, self.units, self.usable, first, self.loss, count, self.tell)

    def rows(self, push: Push, latents: Sequence[FoundRow], wanted: Tensor) -> list[FoundRow]:
        """The steering, the best single latent and what they are compared with."""
        self.tell("Pushing what needs no SAE, and latents drawn at random")
        last = self.reading.levels[-1].latent
        reader = [row for row in latents if row.latents == (last,)]
        return [
            self._row("few latents", push),
            FoundRow(**{**vars(latents[0]), "name": "the latent that says it best"}),
            *(FoundRow(**{**vars(row), "name": "the latent that tells it best"}) for row in reader),
            *(self._direction(name, vector) for name, vector in self._directions(wanted).items()),
            self._random(),
        ]

    def shifts(self, push: Push, latents: Sequence[FoundRow], wanted: Tensor) -> dict[str, Tensor]:
        """Shifts that cost the same loss, by what they are."""
        directions = self._directions(wanted)
        mean = directions.get("DiffMean of what foretells", directions["DiffMean of all tokens"])
        drawn = random_direction(str(self.site), self.units.shape[1], self.seed).vector
        one = latents[0]
        return {
            "few latents": self._shift(push),
            "one latent": one.length * self.units[one.latents[0]],
            "DiffMean": self._at_loss(mean),
            "random latent": self._at_loss(self.units[self._drawn()[0]]),
            "random direction": self._at_loss(drawn),
        }

    def _at_loss(self, vector: Tensor) -> Tensor:
        """The shift in a direction that costs the loss."""
        direction = vector.to(self.units)
        length, _ = self.text.at_loss(direction, self.loss)
        return length * direction / direction.norm().clamp_min(1e-30)

    def _shift(self, push: Push) -> Tensor:
        return torch.tensor(push.amounts, device=self.units.device) @ self.units[list(push.latents)]

    def _row(self, name: str, push: Push) -> FoundRow:
        shift = self._shift(push)
        level = None
        if len(push.latents) == 1:
            level = sum(push.latents[0] >= size for size in self.sae.config.prefix_sizes)
        told = self.reading.of_latents(push.latents)
        return FoundRow(name, push.latents, level, told, self.held_out.effect(shift), float(shift.norm()))

    def _directions(self, wanted: Tensor) -> dict[str, Tensor]:
        """What needs labels and no SAE."""
        texts = self.reading.fitting
        of_positive = texts.of_positive
        foretells = torch.isin(texts.next_ids, wanted.to(texts.next_ids.device)) & of_positive
        others = (texts.next_ids != NO_NEXT) & ~foretells
        found = {"DiffMean of all tokens": texts.x[of_positive].mean(0) - texts.x[~of_positive].mean(0)}
        if foretells.any() and others.any():
            found["DiffMean of what foretells"] = texts.x[foretells].mean(0) - texts.x[others].mean(0)
        found["probe"] = self.reading.probe.direction[0].float()
        return found

    def _direction(self, name: str, vector: Tensor) -> FoundRow:
        told = self.reading.probe_auroc if name == "probe" else self.reading.of_direction(vector)
        shift = self._at_loss(vector)
        return FoundRow(name, (), None, told, self.held_out.effect(shift), float(shift.norm()))

    def _random(self) -> FoundRow:
        """The mean of some random latents."""
        drawn = self._drawn()
        rows = [self._row("", push) for push in best_single(self.text, self.units, drawn, self.loss, self.tell)]
        mean = Effect(*(fmean(vars(row.effect)[name] for row in rows) for name in ("said", "loss", "kl")))
        told, length = fmean(row.auroc or 0.0 for row in rows), fmean(row.length for row in rows)
        return FoundRow(f"{len(rows)} random latents, each alone", drawn, None, told, mean, length)

    def _drawn(self) -> tuple[int, ...]:
        """Latents that were drawn from all that fire."""
        usable = self.usable.nonzero().flatten().cpu()
        order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(self.seed))
        return tuple(usable[order[:NUM_RANDOM]].tolist())
