"""Which activations are outliers.

A few tokens of a text, the first one of a window above all, serve a model as attention sinks; their activations reach
a hundred times the norm of others and say nothing of the text. A dictionary that has to reconstruct them is ruled by
them, and so is every number that is measured with them. So one limit of the norm is found for a site, before
anything is trained, and everything goes by it: training, calibration, measuring, pages, maxima. It stands in the SAE's
configuration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_msae.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

# How many times the median norm an activation may have, unless said otherwise. Ordinary ones stay within 3 times.
NORM_OUTLIER_MULTIPLE = 10.0
# The norms of so many tokens tell the median well.
NORM_TOKENS = 10_000


class ActivationError(InputError):
    """The language model gave activations that no dictionary can be trained on."""


def activation_norms(x: Tensor) -> Tensor:
    """Norms (n,) of activations (n, hidden_size), in float32 at least, where squares of float16 do not overflow."""
    import torch  # not before: commands read their flags, whose defaults stand here, without it

    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def within_limit(x: Tensor, norm_limit: float | None) -> Tensor:
    """Which of the activations (..., hidden_size) are no outliers, bool (...); all where the limit is None or 0."""
    if not norm_limit:
        return x.new_ones(x.shape[:-1]).bool()
    norms = activation_norms(x)
    # What is NaN or infinite is no attention sink but a fault, which must be seen by whoever reads the rest.
    return (norms <= norm_limit) | ~norms.isfinite()


def norm_limit_of(norms: Tensor, site: object, multiple: float | None = NORM_OUTLIER_MULTIPLE) -> float:
    """`multiple` times the median of the first 10,000 of some norms (n,); 0 where `multiple` is None or 0.

    Raises as `find_norm_limits` does.
    """
    if not multiple:
        return 0.0
    check_multiple(multiple)
    norms = norms[:NORM_TOKENS]
    if not len(norms) or not norms.isfinite().all():
        found = f"{int((~norms.isfinite()).sum()):,} of {len(norms):,} are NaN or infinite" if len(norms) else "none"
        raise ActivationError(
            f"The usual norm of activations at {site} cannot be told: {found}. A float16 model often overflows: load "
            "it in bfloat16 or float32. Else check its weights, and whether the text has tokens that are not special."
        )
    return multiple * norms.median().item()


def check_multiple(multiple: float | None) -> None:
    """Raises `ValueError` for a multiple of the median that would take ordinary activations for outliers."""
    if multiple and multiple <= 1:
        raise InputError(f"norm_outlier_multiple must be above 1 (or 0 for no filter), got {multiple}")
