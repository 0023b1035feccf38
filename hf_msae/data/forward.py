"""One forward pass of the language model over token windows.

It gives the activations of the tokens that count, and the norm beyond which they are outliers.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_msae.data.windows import Window, collate
from hf_msae.devices import device_of
from hf_msae.errors import InputError
from hf_msae.modeling.devices import sent
from hf_msae.outliers import NORM_OUTLIER_MULTIPLE, NORM_TOKENS, activation_norms, check_multiple, norm_limit_of
from hf_msae.sites import Site, capture
from hf_msae.sites.padding import known_padding

# A site, or its name.
Place = TypeVar("Place", Site, Site | str)
# Among the sites of a batch: not a place in the model, but the token id of each activation, (n,) int64.
TOKEN_IDS = Site("token ids", "input")


def leave_out(windows: Sequence[Window], inlying: Tensor) -> list[Window]:
    """The windows, in which outliers no longer count; inlying: of all tokens that count, bool (n,)."""
    counts = [int(window.keep.sum()) for window in windows]
    found = []
    for window, part in zip(windows, inlying.cpu().split(counts), strict=True):
        keep = window.keep.clone()
        keep[window.keep] = part
        found.append(Window(window.input_ids, keep))
    return found


def find_norm_limits(
    model: PreTrainedModel,
    sites: Sequence[Site],
    windows: Iterable[Window],
    *,
    multiple: float | None = NORM_OUTLIER_MULTIPLE,
    lm_batch_size: int = 16,
    pad_id: int = 0,
) -> dict[Site, float]:
    """For each site the norm beyond which an activation is an outlier.

    Args:
        model: The language model, in eval mode.
        sites: The sites.
        windows: Token windows; no more are read than needed.
        multiple: How many times the median norm of the first 10,000 tokens that count the limit is.
        lm_batch_size: Windows per forward pass.
        pad_id: The token that fills short windows.

    Returns:
        The limits; 0, which is none, where `multiple` is None or 0.

    Raises:
        ValueError: `multiple` is not above 1.
        ActivationError: no token counts, or activations are NaN or infinite.
    """
    if not multiple:
        return dict.fromkeys(sites, 0.0)
    check_multiple(multiple)
    sites = activation_sites(sites)
    norms: dict[Site, list[Tensor]] = {site: [] for site in sites}
    tokens = 0
    for captured in harvest(model, sites, windows, lm_batch_size=lm_batch_size, pad_id=pad_id):
        for site, x in captured.items():
            norms[site].append(activation_norms(x).cpu())
        tokens += len(norms[sites[0]][-1])
        if tokens >= NORM_TOKENS:
            break
    empty = torch.empty(0)
    return {site: norm_limit_of(torch.cat([empty, *parts]), site, multiple) for site, parts in norms.items()}


def harvest(
    model: PreTrainedModel, sites: Sequence[Site], windows: Iterable[Window], *, lm_batch_size: int, pad_id: int = 0
) -> Iterator[dict[Site, Tensor]]:
    """Activations of the tokens that count, in the order of the windows, one forward pass at a time.

    Yields:
        `{site: (tokens that count in the pass, hidden_size)}`, on the device where the model gives them; where
        `TOKEN_IDS` is among the sites, with the tokens themselves. Passes over windows without any such token are left
        out.

    Raises:
        ValueError: the model is in training mode, where dropout would change its activations.
    """
    check_eval(model)
    for group in groups(windows, lm_batch_size):
        captured = capture_counted(model, sites, group, pad_id)
        if captured is not None:
            yield captured


def capture_counted(
    model: PreTrainedModel, sites: Sequence[Site], windows: Sequence[Window], pad_id: int
) -> dict[Site, Tensor] | None:
    """`{site: (tokens that count, hidden_size)}` of one forward pass, as `harvest`; None where no token counts."""
    check_eval(model)
    device = device_of(model)
    batch = collate(windows, pad_id)
    rows = batch["keep"].flatten().nonzero().flatten()
    if not len(rows):
        return None
    inputs = {"input_ids": sent(batch["input_ids"], device)}
    if batch["attention_mask"] is not None:
        inputs["attention_mask"] = sent(batch["attention_mask"], device)
    with known_padding(batch["attention_mask"] is not None):
        captured = capture(model, activation_sites(sites), **inputs)
    found = {site: x.flatten(0, 1)[sent(rows, x.device)] for site, x in captured.items()}
    if TOKEN_IDS in sites:
        found[TOKEN_IDS] = sent(batch["input_ids"].flatten()[rows], device)
    return {site: found[site] for site in sites}


def activation_sites(sites: Iterable[Place]) -> list[Place]:
    """The places in the model among sites: without `TOKEN_IDS`."""
    return [site for site in sites if site != TOKEN_IDS]


def groups(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    """The windows, `size` at a time."""
    group: list[Window] = []
    for window in windows:
        group.append(window)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def check_eval(model: PreTrainedModel) -> None:
    """Raise `InputError` for a model in training mode."""
    if model.training:
        raise InputError(
            "the language model is in training mode, where dropout changes its activations; call model.eval() first"
        )
