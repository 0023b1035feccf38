"""What an SAE does on activations, sparse: active latents, and per-latent statistics that grow batch by batch.

Nothing here is ever of size tokens × latents. Histograms have bins of equal width between 0 and the power of two above
the latent's maximum. Where a larger activation comes, the range doubles and pairs of bins are merged, which is exact
for powers of two: so the histogram does not depend on the order in which activations came.
"""

import torch
from torch import Tensor

from hf_msae.errors import InputError
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.modeling.sparse_encoder import ActiveLatents

NUM_BINS = 64
# Dense latent activations that exist at once where an SAE is too dense for the sparse path.
DENSE_AT_ONCE = 1 << 24
# Numbers of an (active latents, hidden_size) product that exist at once.
PRODUCT_AT_ONCE = 1 << 24


@torch.no_grad()
def without_latents(sae: MatryoshkaSAE, x: Tensor, token_ids: Tensor) -> Tensor:
    """What a reconstruction is where no latent is active.

    That is the decoder bias, what a skip makes of x, and of a tokenized SAE the token's vector.

    Args:
        sae: the SAE.
        x: activations, (tokens, hidden_size).
        token_ids: their tokens, (tokens,).

    Returns:
        (output_size,) float32, or with a skip, or of a tokenized SAE, (tokens, output_size).
    """
    base = sae.b_dec.detach().float()
    if sae.W_skip is not None:
        base = torch.nn.functional.linear(x.float(), sae.W_skip.detach().float(), base)
    return base if sae.W_token is None else base + sae.W_token.detach()[token_ids.to(sae.device)].float()


@torch.no_grad()
def active_latents(sae: MatryoshkaSAE, x: Tensor) -> ActiveLatents:
    """The latents that are active in evaluation mode: what `sae.encode(x)` has above zero, without its zeros.

    Args:
        sae: in evaluation mode.
        x: activations, (tokens, hidden_size).

    Returns:
        Ordered by token and then by latent.

    Raises:
        InputError: the SAE is in training mode, which selects in another way.
    """
    if sae.training:
        raise InputError("the SAE is in training mode, where it selects by rank; call sae.eval() first")
    # A variance of zero leaves jumprelu exactly its thresholds, without the margin that their gradient needs.
    active = sae.select(x, variance=0.0)
    if active is None:
        return _dense_active(sae, x)
    if sae.config.activation == "jumprelu":
        kept = (active.values > sae.threshold[active.latents]) & (active.values > 0)
        active = active.take(kept)
    return active


def _dense_active(sae: MatryoshkaSAE, x: Tensor) -> ActiveLatents:
    size = max(1, DENSE_AT_ONCE // sae.config.num_latents)
    parts = []
    for start in range(0, len(x), size):
        latents = sae.encode(x[start : start + size])
        tokens, columns = latents.nonzero(as_tuple=True)
        parts.append((tokens + start, columns, latents[tokens, columns]))
    return ActiveLatents(*(torch.cat(column) for column in zip(*parts, strict=True)))


def reconstruct(sae: MatryoshkaSAE, active: ActiveLatents, num_tokens: int, base: Tensor | None = None) -> Tensor:
    """The reconstruction from active latents.

    Args:
        sae: the SAE.
        active: ordered by token.
        num_tokens: how many tokens they are of.
        base: what it begins with, (output_size,) or (num_tokens, output_size); by default the decoder bias.

    Returns:
        (num_tokens, output_size) float32.
    """
    starts = torch.searchsorted(active.tokens, torch.arange(num_tokens, device=active.tokens.device))
    decoder, values = sae.W_dec.detach().float(), active.values.float()
    bags = torch.nn.functional.embedding_bag(active.latents, decoder, starts, mode="sum", per_sample_weights=values)
    return bags + (sae.b_dec.detach().float() if base is None else base)


def gains(sae: MatryoshkaSAE, active: ActiveLatents, errors: Tensor) -> Tensor:
    """By how much the squared error of its token would grow without each active latent.

    This is 2a⟨d, x − x̂⟩ + a²‖d‖², with a the activation and d the decoder row.

    Args:
        sae: the SAE.
        active: the active latents of some tokens.
        errors: x − x̂ of these tokens, or of a transcoder y − ŷ, (tokens, output_size).

    Returns:
        (n,) float32.
    """
    decoder = sae.W_dec.detach().float()
    size = max(1, PRODUCT_AT_ONCE // decoder.shape[1])
    rows = zip(active.tokens.split(size), active.latents.split(size), strict=True)
    along = torch.cat([(errors[tokens] * decoder[latents]).sum(-1) for tokens, latents in rows])
    values = active.values.float()
    return 2 * values * along + values.square() * decoder.square().sum(-1)[active.latents]


class LatentStatistics:
    """Per latent, over all tokens seen: how often it fires and how strongly.

    count: tokens on which it fires, (num_latents,) int64. total: sum of its activations, float64. maximum: float32.
    histogram: (num_latents, NUM_BINS) int64, of activations from 0 to 2^exponent; exponent: (num_latents,) int64.
    """

    def __init__(self, num_latents: int) -> None:
        self.num_tokens = 0
        self.count = torch.zeros(num_latents, dtype=torch.int64)
        self.total = torch.zeros(num_latents, dtype=torch.float64)
        self.maximum = torch.zeros(num_latents)
        self.histogram = torch.zeros(num_latents, NUM_BINS, dtype=torch.int64)
        self.exponent = torch.full((num_latents,), -126, dtype=torch.int64)

    @property
    def firing_rate(self) -> Tensor:
        """Share of tokens on which each latent fires, (num_latents,) float64."""
        return self.count.double() / max(1, self.num_tokens)

    @property
    def mean(self) -> Tensor:
        """Mean activation where it fires, (num_latents,) float64; 0 for a latent that never does."""
        return self.total / self.count.clamp_min(1)

    def update(self, latents: Tensor, values: Tensor, num_tokens: int) -> None:
        """Count the active latents of some tokens.

        Args:
            latents: their numbers, (n,) int64.
            values: their activations, (n,).
            num_tokens: how many tokens they are of.
        """
        values = values.float()
        self.num_tokens += num_tokens
        self.count += torch.bincount(latents, minlength=len(self.count))
        self.total.index_add_(0, latents, values.double())
        self.maximum.scatter_reduce_(0, latents, values, "amax")
        self._widen()
        scaled = values.double() * NUM_BINS * torch.exp2(-self.exponent.double())[latents]
        bins = scaled.long().clamp_max(NUM_BINS - 1)
        places = latents * NUM_BINS + bins
        self.histogram.view(-1).index_add_(0, places, torch.ones_like(places))

    def _widen(self) -> None:
        """Double ranges until they hold the maxima."""
        needed = torch.frexp(self.maximum).exponent.long().clamp_min(-126)
        shifts = torch.where(self.maximum > 0, needed - self.exponent, 0).clamp(0, NUM_BINS.bit_length() - 1)
        for shift in shifts.unique().tolist():
            rows = (shifts == shift).nonzero().flatten()
            if shift:
                merged = self.histogram[rows].view(len(rows), -1, 1 << shift).sum(-1)
                self.histogram[rows] = torch.nn.functional.pad(merged, (0, NUM_BINS - merged.shape[1]))
        self.exponent = torch.where(self.maximum > 0, torch.maximum(needed, self.exponent), self.exponent)
