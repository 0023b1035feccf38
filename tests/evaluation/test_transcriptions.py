"""Definitions once more, token by token and in plain loops, on random input that has every case at once.

Hand-made examples have one main latent, one nearest row, one weight; so an error in what happens with several hides.
"""

import math

import pytest
import torch
from small_saes import rough_sae

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.evaluation.absorption import absorption_of
from hf_msae.evaluation.core import rate_distortion
from hf_msae.evaluation.erasure import measure_perturbation, order_latents
from hf_msae.evaluation.geometry import measure_agreement
from hf_msae.evaluation.labelled import LabelledActivations
from hf_msae.evaluation.probes import make_split

SEEDS = range(8)


@pytest.mark.parametrize("num_main", [1, 2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_absorption_with_several_main_latents(seed, num_main):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(60, 9, generator=generator).clamp_min(0)
    latents[:30, :num_main] = 0  # full absorption needs all of them silent, which is rare
    cosines = torch.tensor([0.6, 0.3, 0.2, 0.5, 0.4, 0.15, 0.06, 0.01, -0.4])
    projections = latents * cosines * 2
    whole = torch.randn(60, generator=generator) + 0.8  # of some examples it is negative
    found = absorption_of(latents, projections, whole, cosines, list(range(num_main)))
    full, shares = 0, 0.0
    for row in range(60):
        of_main = max(0.0, sum(projections[row, j].item() for j in range(num_main)))
        target = max(whole[row].item(), 1e-12)
        others = [(projections[row, j].item(), cosines[j].item()) for j in range(num_main, 9)]
        silent = all(latents[row, j] <= 0 for j in range(num_main))
        strongest = max(value if cosine >= 0.025 else 0.0 for value, cosine in others)
        full += silent and strongest / target >= 0.4
        absorbers = sum(sorted((max(0.0, v) for v, cosine in others if cosine >= 0.1), reverse=True)[:3])
        absorbed = min(absorbers, max(0.0, whole[row].item() - of_main)) if absorbers / target >= 0.4 else 0.0
        shares += absorbed / max(absorbed + of_main, 1e-12)
    assert found == pytest.approx((full / 60, shares / 60), abs=1e-6)
    assert 0 < full < 60
    assert 0.05 < shares / 60 < 0.95


def random_sae(seed: int, num_latents: int) -> MatryoshkaSAE:
    config = MatryoshkaSAEConfig(
        hidden_size=5, num_latents=num_latents, prefix_sizes=[num_latents // 3, num_latents], k=2
    )
    sae = MatryoshkaSAE(config).eval()
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(seed)))
    return sae


@pytest.mark.parametrize("seed", SEEDS)
def test_agreement_counts_rows_that_are_each_others_nearest(seed):
    """In five dimensions many rows have a near one that is nearer to another, or is dead."""
    one, two = random_sae(seed, 30), random_sae(seed + 100, 24)
    generator = torch.Generator().manual_seed(seed)
    rates = [(torch.rand(len(sae.W_dec), generator=generator) < 0.8).float() for sae in (one, two)]
    for found in measure_agreement(("one", one, rates[0]), ("two", two, rates[1])):
        rows = [
            [
                row.detach().double() / row.norm().item()
                for row, rate in zip(sae.W_dec[:size], its, strict=False)
                if rate
            ]
            for sae, its, size in zip((one, two), rates, found.prefixes, strict=True)
        ]
        cosines = [[(a @ b).item() for b in rows[1]] for a in rows[0]]
        there = [max(range(len(rows[1])), key=lambda j, i=i: cosines[i][j]) for i in range(len(rows[0]))]
        back = [max(range(len(rows[0])), key=lambda i, j=j: cosines[i][j]) for j in range(len(rows[1]))]
        mutual = [i for i, j in enumerate(there) if back[j] == i and cosines[i][j] > 0.7]
        assert found.shared == pytest.approx(2 * len(mutual) / (len(rows[0]) + len(rows[1])))
        assert found.one_to_two == pytest.approx(sum(map(max, cosines)) / len(rows[0]), abs=1e-6)
        columns = [max(line[j] for line in cosines) for j in range(len(rows[1]))]
        assert found.two_to_one == pytest.approx(sum(columns) / len(rows[1]), abs=1e-6)
        # Nearest in one direction only, which a weaker definition would count.
        assert any(back[j] != i and cosines[i][j] > 0.7 for i, j in enumerate(there)) or found.prefixes[0] == 10


@pytest.mark.parametrize("seed", range(3))
def test_codes_are_the_middles_of_cells(seed):
    """Rate and distortion, value by value: cells of equal width from a latent's least active value to its largest."""
    sae, x = rough_sae(seed), torch.randn(150, 6, generator=torch.Generator().manual_seed(seed))
    latents = sae.encode(x).detach()
    total = (x - x.mean(0)).double().square().sum().item()
    for point in rate_distortion(sae, x):
        coded, bits = torch.zeros_like(latents), 0.0
        for latent in range(point.prefix):
            active = latents[:, latent] > 0
            values = latents[active, latent]
            share = active.double().mean().item()
            bits += sum(-p * math.log2(p) for p in (share, 1 - share) if p > 0)
            if not len(values):
                continue
            low, width = values.min().item(), (values.max() - values.min()).item() / point.cells
            places = [min(int((value - low) / max(width, 1e-30)), point.cells - 1) for value in values.tolist()]
            coded[active, latent] = torch.tensor([low + (place + 0.5) * width for place in places])
            shares = [places.count(place) / len(places) for place in set(places)]
            bits -= share * sum(p * math.log2(p) for p in shares)
        left = (x - sae.decode(coded)).double().square().sum().item()
        assert point.bits == pytest.approx(bits, abs=1e-6)
        assert point.fve == pytest.approx(1 - left / total, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_perturbation_is_what_ablating_does_to_each_probe(seed):
    """TPP by taking a class's latents out of the reconstruction and asking every probe again."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.nn.functional.one_hot(torch.randint(4, (3000,), generator=generator), 4).bool()
    x = labels.float() @ torch.randn(4, 6, generator=generator) * 2 + torch.randn(3000, 6, generator=generator)
    data = LabelledActivations(x, labels, ["a", "b", "c", "d"], torch.arange(3000) // 10, "four classes")
    sae, split = rough_sae(seed), make_split(data, seed)
    found = measure_perturbation(data, sae, [split], counts=[3])
    classes = [c for c in range(4) if split.scores.f1[c] > 0.6]
    classes.sort(key=lambda c: -int(labels[:, c].sum()))
    orders = order_latents(data, sae, split, classes)
    for score in found:
        drops = torch.zeros(len(classes), len(classes), dtype=torch.float64)
        for i in range(len(classes)):
            taken = orders[score.prefix][i, :3]
            kept = sae.encode(x).detach()
            moved = x - kept[:, taken] @ sae.W_dec[taken].detach()
            for j, probed in enumerate(classes):
                rows, weights = split.test.rows[probed], split.test.weights[probed]
                logits = moved[rows].double() @ split.probes.direction[probed] + split.probes.bias[probed]
                right = (logits > 0) == split.test.targets.bool()
                after = right[weights > 0].double().mean()
                drops[i, j] = max(0.0, (split.scores.accuracy[probed] - after).item())
        others = [drops[i, j].item() for i in range(len(classes)) for j in range(len(classes)) if i != j]
        assert score.intended == pytest.approx(drops.diagonal().mean().item(), abs=0.01)
        assert score.unintended == pytest.approx(sum(others) / len(others), abs=0.004)
        assert score.unintended > 0.02
