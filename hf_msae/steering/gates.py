"""Conditions: an edit that acts only where other latents are active.

A gate reads the activation before any edit at its site, by the SAE of its edit. With `then="after"` it stays open for
the rest of a text once its latent was active, which takes memory of the tokens before: the tracker has it, for each
text that the model is writing. Special tokens, padding and outliers open no gate: no SAE has learnt what they mean.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.modeling.dense_ops import pre_activations, select_above

ACTS = ("here", "after")
GATE_UNITS = ("max", "absolute")


class SteeringError(InputError):
    """A steering that the SAE, the model or the text does not allow."""


@dataclass(frozen=True)
class Gate:
    """Where an edit acts: on tokens on which a latent of the same SAE is active, or behind such tokens.

    Args:
        latent: its index.
        above: the activation that it must exceed, in `units`; 0 means active at all.
        units: "max" (the latent's largest activation in training) or "absolute" (its activation).
        then: "here" opens the gate on that token, "after" on every later token of the text and not on that one.

    Raises:
        SteeringError: anything else than that.
    """

    latent: int
    above: float = 0.0
    units: Literal["max", "absolute"] = "max"
    then: Literal["here", "after"] = "here"

    def __post_init__(self) -> None:
        if isinstance(self.latent, bool) or not isinstance(self.latent, int) or self.latent < 0:
            raise SteeringError(f"a gate's latent is a whole number from 0, got {self.latent!r:.40}.")
        number = isinstance(self.above, int | float) and not isinstance(self.above, bool)
        if not number or not 0 <= self.above <= sys.float_info.max:
            raise SteeringError(
                f"the gate of latent {self.latent} opens above a finite number from 0, got {self.above!r:.40}."
            )
        if self.units not in GATE_UNITS or self.then not in ACTS:
            raise SteeringError(
                f"the gate of latent {self.latent} takes units out of {', '.join(GATE_UNITS)} and then out of "
                f"{', '.join(ACTS)}; got units={self.units!r:.40}, then={self.then!r:.40}."
            )


class Gates:
    """Several gates of one SAE, which are open together or not at all."""

    def __init__(self, sae: MatryoshkaSAE, gates: Sequence[Gate]) -> None:
        self.sae = sae
        self.latents = torch.tensor([gate.latent for gate in gates], dtype=torch.long, device=sae.device)
        limits = [gate.above * _unit(sae, gate) for gate in gates]
        self.limits = torch.tensor(limits, dtype=sae.W_dec.dtype, device=sae.device)
        self.later = torch.tensor([gate.then == "after" for gate in gates], device=sae.device)
        self.any_later = any(gate.then == "after" for gate in gates)

    def fired(self, x: Tensor) -> Tensor:
        """On which activations x (n, hidden_size) each gate's latent is active enough, bool (n, gates)."""
        return activations_of(self.sae, self.latents, x) > self.limits


def check_gates(sae: MatryoshkaSAE, gates: Sequence[Gate]) -> None:
    """Raises SteeringError where an SAE lacks what the gates look at."""
    for gate in gates:
        if gate.latent >= sae.config.num_latents:
            raise SteeringError(
                f"the gate's latent {gate.latent} is not there; the SAE has latents 0 … {sae.config.num_latents - 1}."
            )
        _unit(sae, gate)


def activations_of(sae: MatryoshkaSAE, latents: Tensor, x: Tensor) -> Tensor:
    """Activations (n, m) of m latents; only their rows are multiplied, where no ranking needs all."""
    if sae.config.inference == "topk":
        return sae.encode(x)[:, latents]
    b_dec = sae.b_dec if sae.config.apply_b_dec_to_input else None
    pre = pre_activations(x, sae.W_enc[latents], sae.b_enc[latents], b_dec)
    return select_above(pre, sae.threshold[latents]).to(pre.dtype)


def _unit(sae: MatryoshkaSAE, gate: Gate) -> float:
    """What `above=1` means as an activation."""
    return 1.0 if gate.units == "absolute" or gate.above == 0 else largest_activation(sae, gate.latent)


def largest_activation(sae: MatryoshkaSAE, latent: int) -> float:
    """The latent's largest activation in training. Raises SteeringError where none was measured."""
    largest = sae.max_activation[latent].item()
    if not largest > 0:
        raise SteeringError(
            f"latent {latent} has no measured maximum (it never fired in training, or the checkpoint does not "
            "say), so units='max' has no meaning for it; use units='absolute' or 'norm', or have maxima measured: "
            "hf-msae convert SAE FOLDER --measure --dataset TEXT."
        )
    return largest
