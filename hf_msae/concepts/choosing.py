"""Which latents to push, and how far each: those that make the wanted tokens likeliest at a given loss.

One latent rarely writes a concept alone. Latents are taken one after the other. The next is the one whose direction
raises log *said* most for what it costs at the shift so far: with λ the price of the loss there, the largest
(∇ log said − λ ∇ loss) · w / ‖w‖. Then the amounts of all are moved along their own gradients, with the loss kept
where it is; λ is what makes a longer shift of the same direction worth nothing. A latent that brings nothing ends it.

Amounts are not negative: a latent that is pushed below zero would say the opposite of what its page says.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_msae.concepts.pushing import Effect, NeutralText

# Moves of the amounts after each latent that is taken, each by less of their length than the one before.
MOVES = 8
FIRST_MOVE, LAST_MOVE = 0.5, 0.08
# A latent more must bring at least this much of log said.
LEAST_GAIN = 0.01


@dataclass(frozen=True)
class Push:
    """A shift along a sum of latents.

    Args:
        latents: their numbers.
        amounts: how far along each latent's unit direction, all positive.
        effect: what the shift does to the text that it was fitted on.
    """

    latents: tuple[int, ...]
    amounts: tuple[float, ...]
    effect: Effect


def unit_rows(decoder: Tensor) -> Tensor:
    """Decoder rows (num_latents, hidden_size) at length 1; those without length stay 0."""
    return decoder / decoder.norm(dim=-1, keepdim=True).clamp_min(1e-30)


def promising(text: NeutralText, units: Tensor, usable: Tensor, sizes: Sequence[int], count: int) -> list[int]:
    """The latents that raise what is to be said most by a short push, of every level.

    Args:
        text: that the push is tried on.
        units: decoder rows of length 1, (num_latents, hidden_size).
        usable: which latents may be pushed, (num_latents,) bool.
        sizes: the prefixes; each gives its share.
        count: how many latents in all.
    """
    _, of_said, _ = text.gradients(torch.zeros_like(units[0]))
    slopes = torch.where(usable, units @ of_said, -torch.inf)
    found: dict[int, None] = {}
    for place, size in enumerate(sizes, start=1):
        order = slopes[:size].argsort(descending=True).tolist()
        fresh = [latent for latent in order if latent not in found and slopes[latent] > -torch.inf]
        found |= dict.fromkeys(fresh[: max(1, round(count * place / len(sizes)) - len(found))])
    return list(found)


def best_single(
    text: NeutralText, units: Tensor, latents: Sequence[int], loss: float, tell: Callable[[str], None]
) -> list[Push]:
    """Each latent alone, at the same loss, what makes the wanted tokens likeliest first.

    Args:
        text: that the push is tried on.
        units: decoder rows of length 1.
        latents: which to try.
        loss: that every push costs.
        tell: gets a few words before each push.
    """
    found = []
    length = None
    for place, latent in enumerate(latents, start=1):
        tell(f"Pushing latent {latent}, {place} of {len(latents)}")
        length, effect = text.at_loss(units[latent], loss, length)
        found.append(Push((latent,), (length,), effect))
    return sorted(found, key=lambda push: -push.effect.said)


def best_few(
    text: NeutralText,
    units: Tensor,
    usable: Tensor,
    first: Push,
    loss: float,
    count: int,
    tell: Callable[[str], None],
) -> Push:
    """The sum of a few latents that makes the wanted tokens likeliest at a loss.

    Args:
        text: that it is fitted on.
        units: decoder rows of length 1.
        usable: which latents may be pushed, (num_latents,) bool.
        first: the latent to begin with.
        loss: that the push costs.
        count: how many latents at most.
        tell: gets a few words before each latent more.
    """
    best, free = first, usable.clone()
    while len(best.latents) < count:
        tell(f"Fitting a sum of {len(best.latents) + 1} latents")
        amounts = torch.tensor(best.amounts, device=units.device)
        _, of_said, of_loss = text.gradients(amounts @ units[list(best.latents)])
        total = of_said - price(amounts, units[list(best.latents)], of_said, of_loss) * of_loss
        free[list(best.latents)] = False
        slopes = torch.where(free, units @ total, -torch.inf)
        latent = int(slopes.argmax())
        if slopes[latent] <= 0:
            break
        free[latent] = False
        amounts = torch.cat([amounts, amounts.norm().view(1) * FIRST_MOVE])
        longer = _moved(text, units, (*best.latents, latent), amounts, loss)
        if longer.effect.said <= best.effect.said * (1 + LEAST_GAIN):
            break
        best = longer
    return best


def price(amounts: Tensor, rows: Tensor, of_said: Tensor, of_loss: Tensor) -> float:
    """λ: what the loss is worth where a longer shift in the same direction would be worth nothing.

    Args:
        amounts: along the rows, (n,).
        rows: directions, (n, hidden_size).
        of_said: the derivative of log said, (hidden_size,).
        of_loss: the derivative of the loss, (hidden_size,).
    """
    shift = amounts @ rows
    cost = float(shift @ of_loss)
    return max(0.0, float(shift @ of_said) / cost) if cost > 0 else 0.0


def _moved(text: NeutralText, units: Tensor, latents: tuple[int, ...], amounts: Tensor, loss: float) -> Push:
    """The amounts after some moves, the loss being kept; latents that end with nothing are left out."""
    rows = units[list(latents)]
    for move in range(MOVES):
        effect, of_said, of_loss = text.gradients(amounts @ rows)
        amounts = amounts * min(2.0, max(0.5, (loss / max(effect.loss, loss / 4)) ** 0.5))
        slopes = rows @ (of_said - price(amounts, rows, of_said, of_loss) * of_loss)
        share = FIRST_MOVE * (LAST_MOVE / FIRST_MOVE) ** (move / (MOVES - 1))
        slopes[(amounts <= 0) & (slopes < 0)] = 0
        amounts = (amounts + share * amounts.norm() * slopes / slopes.norm().clamp_min(1e-30)).clamp_min(0)
    kept = [place for place, amount in enumerate(amounts.tolist()) if amount > 0]
    shift = amounts @ rows
    length, effect = text.at_loss(shift, loss, float(shift.norm()))
    scale = length / float(shift.norm().clamp_min(1e-30))
    return Push(
        tuple(latents[place] for place in kept), tuple(scale * float(amounts[place]) for place in kept), effect
    )
