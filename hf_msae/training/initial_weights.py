"""The weights that an SAE begins with: random directions, and biases from the first activations.

They are the same whatever the number of processes, and whoever holds which latents.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.modeling.selection import ProcessGroup

# Encoder rows start as this times the decoder rows. k unit rows together would reconstruct an activation several times
# over; starting low costs nothing and gave 0.015 more FVE at the last level after 730 steps (docs/training.md).
INITIAL_ENCODER_SCALE = 0.3
# Of a transcoder, encoder rows are drawn with the run's seed plus this.
TRANSCODER_ENCODER_SEED = 1_000_003
# Numbers of initial weights that exist at once where only some rows are wanted.
DRAWN_AT_ONCE = 1 << 26


def sum_moments(x: Tensor, ranks: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Add up activations, in one message.

    Args:
        x: Activations, (n, width).
        ranks: Processes that have others.

    Returns:
        Of all processes, float64: their sum (width,), the sum of their squared norms, and their number, scalars.
    """
    doubles = x.double()
    parts = torch.cat([doubles.sum(0), doubles.pow(2).sum()[None], doubles.new_full((1,), x.shape[0])])
    parts = ranks.sum(parts)
    return parts[:-2], parts[-2], parts[-1]


class InputScale(NamedTuple):
    """Of a transcoder: what its input is like beside what it is to give.

    Args:
        mean: The mean of what it reads, (hidden_size,) float64.
        gain: How much larger than that what it writes is.
    """

    mean: Tensor
    gain: float

    @classmethod
    def of(cls, x: Tensor, variance: Tensor, config: MatryoshkaSAEConfig, ranks: ProcessGroup) -> "InputScale":
        """From activations.

        Args:
            x: What is read, (n, hidden_size).
            variance: Total variance of what is reconstructed, a scalar.
            config: The transcoder's.
            ranks: Processes that have other activations.
        """
        sums, square, count = sum_moments(x, ranks)
        mean = sums / count
        of_input = (square / count - mean.pow(2).sum()).clamp_min(1e-12)
        gain = (variance / config.output_size) / (of_input / config.hidden_size)
        return cls(mean, math.sqrt(gain.item()))


@torch.no_grad()
def draw_weights(sae: MatryoshkaSAE, mean: Tensor, seed: int, rows: slice, transcoder: InputScale | None) -> None:
    """Draw weights and set biases.

    Args:
        sae: The SAE, or the part of it that a process holds.
        mean: Mean of what is to be reconstructed, (output_size,).
        seed: Fixes all rows.
        rows: Which latents these are.
        transcoder: Of a transcoder, what its input is like.
    """
    config = sae.config
    sae.b_dec.copy_(mean)
    sae.b_enc.zero_()
    sae.W_dec.copy_(initial_decoder_rows(config.num_latents, config.output_size, seed, rows))
    if transcoder is None:
        sae.W_enc.copy_(INITIAL_ENCODER_SCALE * sae.W_dec)
        return
    # What a row reads and what it writes are of different places, so they are drawn apart; and the mean of what is
    # read is taken off by the encoder's bias, since no bias of the decoder does it.
    own_seed = (seed + TRANSCODER_ENCODER_SEED) % 2**63
    read = initial_decoder_rows(config.num_latents, config.hidden_size, own_seed, rows)
    sae.W_enc.copy_(INITIAL_ENCODER_SCALE * transcoder.gain * read)
    sae.b_enc.copy_(-(sae.W_enc @ transcoder.mean.to(sae.W_enc.dtype)))
    if sae.W_skip is not None:
        sae.W_skip.zero_()


@torch.no_grad()
def draw_token_vectors(sae: MatryoshkaSAE, y: Tensor, token_ids: Tensor, ranks: ProcessGroup) -> None:
    """Begin with what each token adds to the mean, shrunk as if it had been seen once more and added nothing.

    Args:
        sae: A tokenized SAE, with its decoder bias.
        y: What is to be reconstructed, (n, output_size).
        token_ids: The token of each, (n,).
        ranks: Processes that have other activations.
    """
    vectors = sae.W_token
    assert vectors is not None
    # On the CPU, where they are added up in one order: on a GPU the sums would differ from run to run.
    ids, centred = token_ids.cpu(), (y.float() - sae.b_dec).cpu()
    sums = torch.zeros(vectors.shape).index_add_(0, ids, centred).to(vectors.device)
    counts = torch.bincount(ids, minlength=len(vectors)).to(vectors.device)
    sums, counts = ranks.sum(sums), ranks.sum(counts)
    vectors.copy_(sums / (counts[:, None] + 1))


def initial_decoder_rows(num_latents: int, hidden_size: int, seed: int, rows: slice) -> Tensor:
    """Draw random rows of norm 1 for some of the latents: the same for a latent, whoever asks.

    They are drawn on the CPU, so that a seed means the same on every device and in every process, and those of other
    latents are drawn and dropped, some at a time. (torch draws normal numbers in sixteens, so that blocks of sixteen
    rows give what one draw gives.)

    Args:
        num_latents: Latents of the whole.
        hidden_size: Width of a row.
        seed: Fixes all rows.
        rows: Which of them are wanted.

    Returns:
        Rows, (n, hidden_size).
    """
    generator = torch.Generator().manual_seed(seed)
    size = 16 * max(1, DRAWN_AT_ONCE // (16 * hidden_size))
    # The last block takes what is left with it: fewer than sixteen numbers would be drawn in another way.
    begins: Sequence[int] = range(0, max(1, num_latents - 15), size)
    kept = []
    for begin, end in zip(begins, [*begins[1:], num_latents], strict=True):
        block = torch.randn(end - begin, hidden_size, generator=generator)
        kept.append(block[max(0, rows.start - begin) : max(0, rows.stop - begin)])
    return nn.functional.normalize(torch.cat(kept), dim=-1)
