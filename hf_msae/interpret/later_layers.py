"""Effects that see the later layers: the mean derivative of what reaches the output, through the model itself.

The direct effect stops where the latent's direction leaves its site: what later layers make of it is left out. Here
the model is run on some text, and what reaches the unembedding is differentiated with respect to a shift that is
added at the site to every token that counts, as steering adds it, so attention to shifted tokens is in it, too. The
mean over tokens is a matrix (width at the site, width at the unembedding), which serves all latents at once.

It is found backwards, one dimension of the output after the other, because every kind of attention can be
differentiated so, where forward mode needs kernels that some lack. A dimension costs a backward pass through the
layers above the site, over all tokens: for a wide model, a few windows take as long as much text.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_msae.data import Window
from hf_msae.data.forward import groups
from hf_msae.data.windows import collate
from hf_msae.devices import device_of
from hf_msae.outliers import within_limit
from hf_msae.sites import Site, in_this_thread, replace


class _Reached(Exception):
    """Raised at the unembedding, to leave the forward there."""


def mean_jacobian(
    model: PreTrainedModel,
    site: Site,
    windows: Sequence[Window],
    *,
    pad_id: int,
    norm_limit: float | None = None,
    lm_batch_size: int = 16,
) -> Tensor:
    """The mean over tokens of the derivative of what reaches the unembedding, with respect to a shift at a site.

    Args:
        model: in evaluation mode, with an unembedding.
        site: where the shift is added, to all tokens that count and are no outliers.
        windows: of text.
        pad_id: the token that fills short windows.
        norm_limit: beyond which activations are outliers; None or 0 for no limit.
        lm_batch_size: windows per forward pass.

    Returns:
        (width at the site, width at the unembedding) float32.
    """
    sums: Tensor | None = None
    for group in groups(windows, lm_batch_size):
        part = _summed_jacobian(model, site, group, pad_id, norm_limit)
        sums = part if sums is None else sums + part
    assert sums is not None, "there are windows"
    return sums / sum(int(window.keep.sum()) for window in windows)


def _summed_jacobian(
    model: PreTrainedModel, site: Site, windows: Sequence[Window], pad_id: int, norm_limit: float | None
) -> Tensor:
    device = device_of(model)
    batch = collate(windows, pad_id)
    keep = batch["keep"].to(device)
    inputs = {"input_ids": batch["input_ids"].to(device)}
    if batch["attention_mask"] is not None:
        inputs["attention_mask"] = batch["attention_mask"].to(device)
    shifts: list[Tensor] = []

    def add(hidden: Tensor) -> Tensor:
        # Before the site nothing depends on the shift, so nothing of it is kept for the way back.
        hidden = hidden.detach()
        shifts.append(torch.zeros(hidden.shape[-1], device=hidden.device, requires_grad=True))
        acts = keep.to(hidden.device) & within_limit(hidden, norm_limit)
        return torch.where(acts.unsqueeze(-1), hidden + shifts[0].to(hidden.dtype), hidden)

    with torch.enable_grad():
        reached = _reaching(model, {site: add}, inputs)
        total = reached[keep.to(reached.device)].float().sum(0)
        columns = [torch.autograd.grad(one, shifts[0], retain_graph=True)[0] for one in total]
    return torch.stack(columns, 1).float()


def _reaching(model: PreTrainedModel, edits: dict[Site, Any], inputs: dict[str, Tensor]) -> Tensor:
    """What reaches the unembedding, (batch, sequence, width)."""
    reached: list[Tensor] = []
    is_ours = in_this_thread()

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        if is_ours():
            reached.append(args[0])
            raise _Reached

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(keep)
    try:
        with replace(model, edits, is_ours), suppress(_Reached):
            model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return reached[0]
