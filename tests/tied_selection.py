"""Pre-activations of which many are equal, as they are in bfloat16: which of them BatchTopK takes."""

import pytest
import torch
from hf_msae.modeling import sparse_encoder
from hypothesis import strategies as st
from torch import Tensor

# Arguments of `check_ties`. With one or three values, all or a third of a batch are equal.
TIES = {
    "pre": st.builds(
        lambda tokens, latents, levels, seed: torch.randint(
            -1, levels + 1, (tokens, latents), generator=torch.Generator().manual_seed(seed)
        ),
        st.integers(1, 12),
        st.integers(1, 40),
        st.sampled_from([1, 3, 30]),
        st.integers(0, 1000),
    ),
    "share": st.sampled_from([0.02, 0.2, 0.7]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "tile": st.tuples(st.sampled_from([8, 64, 1 << 20]), st.sampled_from([1, 5, 1 << 11])),
    "guessed": st.booleans(),
}


def check_ties(pre: Tensor, share: float, dtype: torch.dtype, tile: tuple[int, int], guessed: bool) -> None:
    """What is selected of a batch is what a stable sort puts first.

    Args:
        pre: The pre-activations (B, F), whole numbers.
        share: How much of the batch is to be selected.
        dtype: Of activations and weights.
        tile: Numbers and tokens that a tile has at most.
        guessed: Whether the threshold is guessed from the first tile, which may mislead, and then any of equal ones
            may be taken; else it is zero.
    """
    count = max(1, int(share * pre.numel()))
    sizes, values = pre.shape, pre.flatten().to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_encoder, "CPU_TILE", tile[0])
        patch.setattr(sparse_encoder, "CPU_TILE_TOKENS", tile[1])
        if not guessed:
            patch.setattr(sparse_encoder, "_sampled_threshold", lambda tile, share: tile.product.new_zeros(()))
        x, W_enc = torch.eye(sizes[0], dtype=dtype), values.view(sizes).T.contiguous()
        active = sparse_encoder.select_largest(x, W_enc, torch.zeros(sizes[1], dtype=dtype), count)
    first = values.double().sort(descending=True, stable=True).indices[:count]
    first = first[values[first] > 0].sort().values
    places = active.tokens * sizes[1] + active.latents
    assert active.values.dtype == dtype
    assert torch.equal(active.values, values[places])
    assert torch.equal(places, places.unique())  # in order, and none twice
    assert torch.equal(active.values.sort().values, values[first].sort().values)
    assert guessed or torch.equal(places, first)
