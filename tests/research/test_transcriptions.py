"""Definitions once more, latent by latent and with numpy, on random input that has every case at once."""

import math

import numpy as np
import pytest
import torch
from small_saes import rough_sae

from hf_msae.evaluation.activations import TextActivations
from hf_msae.research.novelty import measure_novelty
from hf_msae.research.progressive import fit_power_law


@pytest.mark.parametrize("seed", range(8))
def test_a_power_law_is_a_weighted_line_in_logarithms(seed):
    """Against numpy's fit, whose weights multiply the residuals before they are squared."""
    generator = torch.Generator().manual_seed(seed)
    importance = torch.cat([torch.exp(2 * torch.randn(50, generator=generator)), torch.zeros(7)]).double()
    found = fit_power_law(importance, 3, 40)
    values = np.sort(importance.numpy())[::-1][2:40]
    ranks, logs = np.arange(3.0, 41.0), np.log(values)
    for x, r2 in ((np.log(ranks), found.r2), (ranks, found.r2_exponential)):
        slope, intercept = np.polyfit(x, logs, 1, w=ranks**-0.5)
        middle = np.average(logs, weights=1 / ranks)
        left = np.average((logs - slope * x - intercept) ** 2, weights=1 / ranks)
        assert r2 == pytest.approx(1 - left / np.average((logs - middle) ** 2, weights=1 / ranks))
    slope, intercept = np.polyfit(np.log(ranks), logs, 1, w=ranks**-0.5)
    assert (found.exponent, found.scale) == (pytest.approx(-slope), pytest.approx(math.exp(intercept)))


def text_of(x: torch.Tensor) -> TextActivations:
    return TextActivations(None, None, [], 0, 1, x, "made up")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
def test_a_gain_is_the_error_that_goes_with_one_latent_more(seed):
    small, large = rough_sae(seed), rough_sae(seed + 10, 26)
    x = torch.randn(120, 6, generator=torch.Generator().manual_seed(seed))
    gain = measure_novelty(text_of(x), small, large).gain
    total = (x - x.mean(0)).double().square().sum()
    error, latents = (x - small.decode(small.encode(x))).detach().double(), large.encode(x).detach().double()
    for latent in range(26):
        without = error - latents[:, latent, None] * large.W_dec[latent].detach().double()
        expected = (error.square().sum() - without.square().sum()) / total
        assert gain[latent].item() == pytest.approx(expected.item(), abs=1e-5)
