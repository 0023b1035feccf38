"""The tokens that are typical of texts with a concept, by how much more often they stand there than in other texts.

The measure is the signed root of the log-likelihood ratio (Dunning, 1993), the usual one of corpus linguistics, which
holds for rare tokens, too: with c the count of a token on each side, n the number of tokens there, and e = n · (c₊ +
c₋) / (n₊ + n₋) what would be expected if sides made no difference,

    z = ± √(2 Σ over both sides of c · log (c / e) + (n − c) · log ((n − c) / (n − e)))

positive where the token stands more often in texts with the concept. By chance it is about a standard normal number.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Beyond so many standard deviations a token is typical. Seven times on one side and never on the other is.
TYPICAL_Z = 3.0
MAX_TYPICAL = 50


def typical_scores(positive: Sequence[Tensor], negative: Sequence[Tensor], vocabulary_size: int) -> Tensor:
    """The z of every token, (vocabulary,) float64; 0 for tokens that stand in no text.

    Args:
        positive: the tokens of each text with the concept, int64.
        negative: of each text without it.
        vocabulary_size: of the language model.
    """
    counts = torch.stack([_counts(texts, vocabulary_size) for texts in (positive, negative)])
    totals = counts.sum(1, keepdim=True).clamp_min(1)
    expected = totals * counts.sum(0) / totals.sum()
    there = torch.xlogy(counts, counts / expected.clamp_min(1e-30))
    elsewhere = torch.xlogy(totals - counts, (totals - counts) / (totals - expected).clamp_min(1e-30))
    ratio = 2 * (there + elsewhere).sum(0).clamp_min(0)
    return (counts[0] - expected[0]).sign() * ratio.sqrt()


def typical_tokens(positive: Sequence[Tensor], negative: Sequence[Tensor], vocabulary_size: int) -> Tensor:
    """The tokens that are typical of texts with the concept, the most typical first, (n,) int64.

    At most `MAX_TYPICAL`, and only such as stand in two texts or more: one text has words of its own.

    Args:
        positive: the tokens of each text with the concept, int64.
        negative: of each text without it.
        vocabulary_size: of the language model.
    """
    z = typical_scores(positive, negative, vocabulary_size)
    z[_counts([text.unique() for text in positive], vocabulary_size) < 2] = 0
    order = z.argsort(descending=True)[:MAX_TYPICAL]
    return order[z[order] >= TYPICAL_Z]


def _counts(texts: Sequence[Tensor], vocabulary_size: int) -> Tensor:
    flat = torch.cat([torch.zeros(0, dtype=torch.int64), *texts])
    return torch.bincount(flat, minlength=vocabulary_size).double()
