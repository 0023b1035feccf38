"""What is changed at a site: the change of latent activations, and the vector that it adds to the activation.

Every edit adds Σ_j Δf_j · W_dec[j] to the activation h. The SAE never decodes in its place, so what the SAE does not
explain stays as it is, and where all Δf_j are zero nothing is touched, to the last bit. With f_j the latent's own
activation, v the value and u its unit:

| method | Δf_j                | acts                      |
|--------|---------------------|---------------------------|
| add    | v · u               | on every token            |
| clamp  | v · u − f_j         | on every token            |
| ablate | −f_j                | where the latent is active |
| scale  | (v − 1) · f_j       | where the latent is active |

Units: "max" is the latent's largest activation in training (`max_activation`), "absolute" is the latent's activation
itself, and "norm" is a shift as long as the token's activation h.

A `PrefixEdit` keeps only a level: h − Σ_{j ≥ m} f_j · W_dec[j] with the SAE's error kept, else the reconstruction by
the first m latents.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_msae.modeling import MatryoshkaSAE
from hf_msae.steering.gates import Gate, Gates, SteeringError, activations_of, check_gates, largest_activation

METHODS = ("add", "clamp", "ablate", "scale")
UNITS = ("max", "absolute", "norm")
Method = Literal["add", "clamp", "ablate", "scale"]
Units = Literal["max", "absolute", "norm"]
# An encoder's product, summed in another order, moves an activation by less than this share of it. A latent that
# stands so near to the value it is clamped to stands at it.
ROUNDING = 1e-5


@dataclass(frozen=True)
class LatentEdit:
    """One latent's change; the module's table says what it does.

    value: how much, in `units`; the factor for "scale"; without meaning for "ablate".
    sae: the subfolder of the SAE, where several are steered at once.
    when: a gate, or several that must all be open: the edit acts only there. By default it acts everywhere.
    Raises SteeringError for an unknown method or unit, a negative index and a value that is not finite.
    """

    latent: int
    value: float = 0.0
    method: Method = "add"
    units: Units = "max"
    sae: str = ""
    when: Gate | Sequence[Gate] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "when", self.gates)
        if self.method not in METHODS or self.units not in UNITS:
            raise SteeringError(
                f"latent {self.latent}: expected a method out of {', '.join(METHODS)} and units out of "
                f"{', '.join(UNITS)}; got method={self.method!r}, units={self.units!r}."
            )
        if isinstance(self.latent, bool) or not isinstance(self.latent, int) or self.latent < 0:
            raise SteeringError(f"a latent is a whole number from 0, got {self.latent!r}.")
        number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        if not number or not abs(self.value) <= sys.float_info.max:
            raise SteeringError(f"latent {self.latent}: the value must be a finite number, got {self.value!r:.40}.")
        _check_sae_name(self.sae)

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The gates that must all be open."""
        return _as_gates(self.when)

    @property
    def changes_nothing(self) -> bool:
        """Whether the edit is the identity for every activation."""
        return (self.method == "add" and self.value == 0) or (self.method == "scale" and self.value == 1)


@dataclass(frozen=True)
class PrefixEdit:
    """Keep only what the latents of level `level` (an index into `config.prefix_sizes`; -1 is the last) write.

    keep_error: whether what the whole dictionary leaves unexplained stays, too.
    """

    level: int
    keep_error: bool = True
    sae: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.level, bool) or not isinstance(self.level, int):
            raise SteeringError(f"a level is a whole number, an index into prefix_sizes, got {self.level!r}.")
        if not isinstance(self.keep_error, bool):
            raise SteeringError(f"keep_error is true or false, got {self.keep_error!r:.40}.")
        _check_sae_name(self.sae)


Edit = LatentEdit | PrefixEdit


def _as_gates(when: object) -> tuple[Gate, ...]:
    gates = (when,) if isinstance(when, Gate) else tuple(when) if isinstance(when, list | tuple) else (when,)
    if not all(isinstance(gate, Gate) for gate in gates):
        raise SteeringError(f"when takes a Gate or several, such as Gate(40, above=0.5); got {when!r:.80}.")
    return gates  # type: ignore[return-value]


def _check_sae_name(name: str) -> None:
    if not isinstance(name, str):
        raise SteeringError(f"an edit's sae is the SAE's subfolder, a text, got {name!r:.40}.")


def check_sae_names(edits: Sequence[Edit], saes: Mapping[str, MatryoshkaSAE]) -> None:
    """Raises SteeringError where an edit names an SAE that is not there."""
    unknown = sorted({edit.sae for edit in edits} - saes.keys())
    if unknown:
        raise SteeringError(f"there is no SAE {unknown[0]!r}; there are {', '.join(map(repr, saes)) or 'none'}.")


def check_edits(sae: MatryoshkaSAE, edits: Sequence[Edit], name: str = "") -> None:
    """Raises SteeringError where an SAE (called `name` in words) cannot do the edits, or two of them contradict."""
    where = f" of {name}" if name else ""
    if sae.training:
        raise SteeringError(f"the SAE{where} is in training mode, where latents depend on the batch; call sae.eval().")
    latents = [edit.latent for edit in edits if isinstance(edit, LatentEdit)]
    for latent in latents:
        if latent >= sae.config.num_latents:
            raise SteeringError(
                f"latent {latent}{where} is not there; it has latents 0 … {sae.config.num_latents - 1}."
            )
        if latents.count(latent) > 1:
            raise SteeringError(f"latent {latent}{where} is edited twice; give one edit for it.")
    for edit in edits:
        if isinstance(edit, PrefixEdit):
            _prefix_size(sae, edit)
            if sae.config.is_tokenized and not edit.keep_error:
                raise SteeringError(
                    f"a prefix edit{where} that keeps no error replaces activations by reconstructions, of which the "
                    "token's own vector is a part here, and steering does not see tokens; leave keep_error true."
                )
            if any(not isinstance(other, LatentEdit) or other.method != "add" for other in edits if other is not edit):
                raise SteeringError(
                    f"a prefix edit{where} goes only with edits that add: what the others do depends on latents that "
                    "it takes away."
                )
        else:
            _unit(sae, edit)
            check_gates(sae, edit.gates)


class LatentDelta:
    """The vector that edits of some latents add to activations. `latents` are those whose edit does anything.

    A transcoder's latents are read from x, and what they write is added to h, at its other site; of an SAE both are
    one. With units of the norm, it is h's.
    """

    def __init__(self, sae: MatryoshkaSAE, edits: Sequence[LatentEdit]) -> None:
        edits = [edit for edit in edits if not edit.changes_nothing]
        self.sae = sae
        self.latents = torch.tensor([edit.latent for edit in edits], dtype=torch.long, device=sae.device)
        self.rows = sae.W_dec.detach()[self.latents]
        self.clamps = self._column([edit.method in ("clamp", "ablate") for edit in edits], torch.bool)
        self.slopes = self._column([_slope(edit) for edit in edits])
        in_norms = [edit.units == "norm" and edit.method in ("add", "clamp") for edit in edits]
        amounts = [_unit(sae, edit) * edit.value for edit in edits]
        self.constants = self._column(
            [0.0 if norm else amount for amount, norm in zip(amounts, in_norms, strict=True)]
        )
        self.per_norm = self._column([amount if norm else 0.0 for amount, norm in zip(amounts, in_norms, strict=True)])
        self.in_norms = any(in_norms)
        self.needs_encoder = any(_slope(edit) != 0 for edit in edits)

    def _column(self, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(values, dtype=dtype or self.rows.dtype, device=self.rows.device)

    def __call__(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """The delta (n, output_size) for activations x (n, hidden_size), added to h (n, output_size)."""
        return self.changes(x, h) @ self.rows

    def changes(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """Δf (n, number of latents) in the order of `latents`."""
        h = x if h is None else h
        values = self.constants.expand(len(h), -1)
        if self.in_norms:
            values = values + self.per_norm * h.norm(dim=-1, keepdim=True)
        if not self.needs_encoder:
            return values
        own = activations_of(self.sae, self.latents, x)
        changed = values + self.slopes * own
        at_value = self.clamps & ((values - own).abs() <= ROUNDING * own.abs())
        return torch.where(at_value, torch.zeros_like(changed), changed)


class PrefixDelta:
    """The vector that turns activations into what a level keeps of them."""

    def __init__(self, sae: MatryoshkaSAE, edit: PrefixEdit) -> None:
        self.sae, self.size, self.keep_error = sae, _prefix_size(sae, edit), edit.keep_error

    @property
    def needs_encoder(self) -> bool:
        """Always: levels are told apart by latents."""
        return True

    def __call__(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """The delta (n, output_size) for activations x (n, hidden_size), added to h (n, output_size)."""
        if not self.keep_error:
            return self.sae.decode(self.sae.encode(x, self.size), hidden_states=x) - (x if h is None else h)
        outer = self.sae.encode(x)[:, self.size :]
        return -(outer @ self.sae.W_dec[self.size :])


@dataclass(frozen=True)
class Delta:
    """A vector that edits add to activations, and where they do."""

    vector: LatentDelta | PrefixDelta
    gates: Gates | None = None


def deltas(sae: MatryoshkaSAE, edits: Sequence[Edit]) -> Iterator[Delta]:
    """What an SAE's edits add, without those that never change anything; edits behind the same gates together."""
    by_gates: dict[tuple[Gate, ...], list[LatentEdit]] = {}
    for edit in edits:
        if isinstance(edit, LatentEdit):
            by_gates.setdefault(edit.gates, []).append(edit)
    for gates, gated in by_gates.items():
        latent_delta = LatentDelta(sae, gated)
        if len(latent_delta.latents):
            yield Delta(latent_delta, Gates(sae, gates) if gates else None)
    for edit in edits:
        if isinstance(edit, PrefixEdit) and not (
            edit.keep_error and _prefix_size(sae, edit) == sae.config.num_latents
        ):
            yield Delta(PrefixDelta(sae, edit))


def latent_edits(
    latents: Mapping[int, float] | Sequence[int] | None,
    method: str,
    units: Units,
    level: int | None,
    keep_error: bool,
    when: Gate | Sequence[Gate] = (),
) -> list[Edit]:
    """The edits that the arguments of `steer` mean. Raises SteeringError where they do not go together."""
    if method == "prefix":
        if level is None or latents is not None:
            raise SteeringError(f"method='prefix' takes a level and no latents; got level={level}, latents={latents}.")
        if when:
            raise SteeringError(
                f"method='prefix' acts everywhere; gates go with edits of latents, got when={when!r:.80}."
            )
        return [PrefixEdit(level, keep_error)]
    if level is not None or not keep_error:
        raise SteeringError(f"level and keep_error go with method='prefix', got method={method!r}.")
    if method not in METHODS:
        raise SteeringError(f"method must be one of {', '.join(METHODS)}, prefix; got {method!r}.")
    if isinstance(latents, Mapping):
        return [LatentEdit(index, value, method, units, when=when) for index, value in latents.items()]  # type: ignore[arg-type]
    if latents is None or method != "ablate":
        raise SteeringError(f"method={method!r} takes a value for each latent, such as {{12: 4.0}}; got {latents}.")
    return [LatentEdit(latent, 0.0, "ablate", units, when=when) for latent in latents]


def _slope(edit: LatentEdit) -> float:
    """How Δf grows with the latent's own activation."""
    return {"add": 0.0, "clamp": -1.0, "ablate": -1.0, "scale": edit.value - 1}[edit.method]


def _unit(sae: MatryoshkaSAE, edit: LatentEdit) -> float:
    """What a value of 1 means as an activation of the latent; for "norm", as a share of the token's norm."""
    if edit.method in ("ablate", "scale"):
        return 0.0
    if edit.units == "absolute":
        return 1.0
    if edit.units == "norm":
        return 1.0 / sae.W_dec[edit.latent].norm().clamp_min(torch.finfo(sae.W_dec.dtype).tiny).item()
    return largest_activation(sae, edit.latent)


def _prefix_size(sae: MatryoshkaSAE, edit: PrefixEdit) -> int:
    sizes = sae.config.prefix_sizes
    if not -len(sizes) <= edit.level < len(sizes):
        raise SteeringError(f"there is no level {edit.level}; the SAE has levels 0 … {len(sizes) - 1}, {sizes}.")
    return sizes[edit.level]
