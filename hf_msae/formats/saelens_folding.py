"""What SAELens does beside the weights, folded into them: scales, whitening, norms of the decoder's rows.

All of it is linear, so that an SAE of raw activations with the same latents and the same reconstruction exists. It is
computed in float64, and in the order of SAELens' own trainer, on which the units of the latents depend.
"""

from typing import Any

from torch import Tensor, float32, promote_types

from hf_msae.formats.common import Files, FormatError, check_tensors, peek_json, read_safetensors

CONFIG = "cfg.json"
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
# The factor of each latent's contribution that old checkpoints finetuned, by the names that it had.
FACTORS = ("scaling_factor", "finetuning_scaling_factor")


def fold(files: Files, settings: dict[str, Any], state: dict[str, Tensor]) -> list[str]:
    """Fold into `state` (in our orientation, shapes checked) and return a note on each thing that was folded.

    Raises `FormatError` where the files do not tell the numbers.
    """
    normalisation = settings.get("normalize_activations") or "none"
    by_norm = bool(settings.get("rescale_acts_by_decoder_norm"))
    factors = [state.pop(name) for name in FACTORS if name in state]
    factors = [factor for factor in factors if (factor != 1).any()]
    if not (by_norm or factors or normalisation in ("expected_average_only_in", "covariance_whitening")):
        return []
    notes = []
    exact = {name: tensor.double() for name, tensor in state.items()}
    for factor in factors:
        if not settings.get("finetuning_scaling_factor"):
            raise FormatError(f"{files} holds a scale for each latent, but {CONFIG} denies it: they do not fit.")
        exact["W_dec"] *= factor.double().unsqueeze(1)
        notes.append("The finetuned scale of each latent was folded into its decoder row.")
    if normalisation == "expected_average_only_in":
        _fold_scale(exact, _recorded_scale(files), by_norm)
        notes.append("The scaling of the activations was folded into the weights.")
    if by_norm:
        _fold_decoder_norms(exact)
    if normalisation == "covariance_whitening":
        _fold_whitening(exact, _recorded_whitening(files, state), bool(settings.get("apply_b_dec_to_input", True)))
        notes.append("The whitening of the activations was folded into the weights.")
    # Half precision would round what was folded, and latents near a threshold would come and go.
    state.update({name: exact[name].to(promote_types(tensor.dtype, float32)) for name, tensor in state.items()})
    return notes


def _fold_scale(state: dict[str, Tensor], scale: float, by_norm: bool) -> None:
    """The SAE was trained on `scale` times the activations."""
    state["W_enc"] *= scale
    state["W_dec"] /= scale
    state["b_dec"] /= scale
    if by_norm and "threshold" in state:
        # Latents are in units of the decoder rows' norms, which have just changed.
        state["threshold"] /= scale


def _fold_decoder_norms(state: dict[str, Tensor]) -> None:
    """Latents were pre-activations times the norm of their decoder row, which then counted as a unit vector."""
    norms = state["W_dec"].norm(dim=1)
    state["W_enc"] *= norms.unsqueeze(1)
    state["b_enc"] *= norms
    state["W_dec"] /= norms.clamp_min(1e-8).unsqueeze(1)


def _fold_whitening(state: dict[str, Tensor], whitening: dict[str, Tensor], subtracts_b_dec: bool) -> None:
    """The SAE was trained on z = (x - mean) M, and what it reconstructs is z M⁻¹ + mean (arXiv:2511.13981)."""
    mean, matrix, inverse = (whitening[name].double() for name in ("mean", "matrix", "inverse_matrix"))
    state["W_enc"] = state["W_enc"] @ matrix.T
    if not subtracts_b_dec:
        state["b_enc"] = state["b_enc"] - state["W_enc"] @ mean
    state["W_dec"] = state["W_dec"] @ inverse
    state["b_dec"] = state["b_dec"] @ inverse + mean


def _recorded_scale(files: Files) -> float:
    scale = peek_json(files, SCALER).get("scaling_factor")
    if isinstance(scale, (int, float)) and scale > 0:
        return float(scale)
    raise FormatError(
        f"{files} was trained on activations times a factor (normalize_activations='expected_average_only_in') that "
        "its files do not tell. SAELens lists those of published SAEs as norm_scaling_factor; put the factor beside "
        f'{CONFIG}, as {{"scaling_factor": ...}} in {SCALER}.'
    )


def _recorded_whitening(files: Files, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if WHITENING not in files.names:
        raise FormatError(
            f"{files} was trained on whitened activations (normalize_activations='covariance_whitening'), and the "
            f"whitening, {WHITENING}, does not lie beside {CONFIG}. Take it from the training checkpoint."
        )
    whitening = read_safetensors(files, WHITENING)
    check_tensors(files, WHITENING, whitening, ["mean", "matrix", "inverse_matrix"])
    size = state["b_dec"].shape[0]
    for name, shape in (("mean", (size,)), ("matrix", (size, size)), ("inverse_matrix", (size, size))):
        if tuple(whitening[name].shape) != shape:
            raise FormatError(
                f"{WHITENING} of {files}: {name} should be {shape}, but is {tuple(whitening[name].shape)}."
            )
    return whitening
