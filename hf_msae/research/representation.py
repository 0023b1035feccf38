"""How alike two descriptions of the same tokens are, whatever their coordinates.

An SAE can explain most of the variance and still bring together tokens that the model keeps apart. Two measures look
at the relations between tokens instead. RSA (representational similarity analysis; Kriegeskorte et al. 2008) compares
the ranks of all pairwise cosines; it sees directions only and weighs every pair alike. Linear CKA (Kornblith et al.,
arXiv:1905.00414) compares inner products; the directions of largest variance rule it. Both are 1 for a description
and its rotations. The papers that report RSA of SAEs (arXiv:2505.00190) leave open which form they mean: this one is
ours, and its numbers should be compared with each other only.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_msae.errors import InputError


def rsa(x: Tensor, y: Tensor) -> float:
    """Spearman correlation of the cosines of all pairs of rows, in [-1, 1].

    Memory grows with n²; a thousand tokens give half a million pairs. A row of zeros has the cosine 0 with all others;
    a description in which all pairs have one cosine tells nothing, and gives 0.

    Args:
        x: (n, d), centred by the caller: where both have a common mean, it is part of every cosine.
        y: (n, e), the same tokens as rows.

    Raises:
        InputError: there are fewer than three rows, or different numbers of them.
    """
    _check_rows(x, y)
    return rank_correlation(pair_ranks(x), pair_ranks(y))


def pair_ranks(rows: Tensor) -> Tensor:
    """Ranks of the cosines of all pairs of rows, less their mean: what [`rsa`] compares.

    Args:
        rows: (n, d).

    Returns:
        (n·(n − 1)/2,) float64.
    """
    ranks = _ranks(_pair_cosines(rows))
    return ranks - ranks.mean()


def rank_correlation(one: Tensor, two: Tensor) -> float:
    """[`rsa`] of two descriptions' [`pair_ranks`], which need not be found again for each comparison.

    Args:
        one: ranks of one description.
        two: ranks of the other.
    """
    scale = (one.norm() * two.norm()).item()
    return (one @ two).item() / scale if scale > 0 else 0.0


def linear_cka(x: Tensor, y: Tensor) -> float:
    """‖yᵀx‖² / (‖xᵀx‖·‖yᵀy‖) of centred rows, in [0, 1].

    It is 0 where one of the two is the same for all tokens.

    Args:
        x: (n, d).
        y: (n, e), the same tokens as rows.

    Raises:
        InputError: there are fewer than three rows, or different numbers of them.
    """
    _check_rows(x, y)
    one, two = (rows.double() - rows.double().mean(0) for rows in (x, y))
    scale = ((one.T @ one).norm() * (two.T @ two).norm()).item()
    return (two.T @ one).square().sum().item() / scale if scale > 0 else 0.0


def _check_rows(x: Tensor, y: Tensor) -> None:
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or len(x) < 3:
        raise InputError(
            "Expected two descriptions of the same tokens, (n, d) and (n, e) with n of at least 3; got "
            f"{tuple(x.shape)} and {tuple(y.shape)}."
        )


def _pair_cosines(rows: Tensor) -> Tensor:
    units = normalize(rows.double(), dim=1)
    first, second = torch.triu_indices(len(rows), len(rows), 1)
    return (units @ units.T)[first, second]


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, float64, (n,); those that tie share their mean rank."""
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[places]
