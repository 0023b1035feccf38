"""RSA and CKA against their definitions, and what must not change them."""

import pytest
import torch

from hf_msae.research.representation import _ranks, linear_cka, rsa


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator)
    return x, x[:, :4] + 0.7 * torch.randn(40, 4, generator=generator)


def test_a_description_and_its_rotation_are_the_same(pair):
    x, _ = pair
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    assert rsa(x, 3 * x @ rotation) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-6)


def test_the_order_of_tokens_and_of_arguments_does_not_matter(pair):
    x, y = pair
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    for measure in (rsa, linear_cka):
        assert measure(x[order], y[order]) == pytest.approx(measure(x, y), abs=1e-12)
        assert measure(y, x) == pytest.approx(measure(x, y), abs=1e-12)
        assert 0.3 < measure(x, y) < 0.95
        assert measure(x[order], y) < measure(x, y) - 0.2


def test_rsa_is_spearmans_formula_where_nothing_ties(pair):
    x, y = (rows.double() for rows in pair)
    cosines = [
        torch.tensor([torch.cosine_similarity(a, b, dim=0) for i, a in enumerate(rows) for b in rows[i + 1 :]])
        for rows in (x, y)
    ]
    difference = cosines[0].argsort().argsort() - cosines[1].argsort().argsort()
    n = len(difference)
    assert n == 40 * 39 / 2
    assert rsa(x, y) == pytest.approx(1 - 6 * difference.double().pow(2).sum().item() / (n * (n**2 - 1)), abs=1e-9)


def test_ties_share_their_mean_rank():
    assert _ranks(torch.tensor([3.0, 1.0, 3.0, 7.0, 3.0])).tolist() == [3, 1, 3, 5, 3]


def test_cka_is_that_of_centred_gram_matrices(pair):
    x, y = (rows.double() for rows in pair)
    centre = torch.eye(40, dtype=torch.float64) - 1 / 40
    one, two = (centre @ rows @ rows.T @ centre for rows in (x, y))
    expected = (one * two).sum() / (one.norm() * two.norm())
    assert linear_cka(x, y) == pytest.approx(expected.item(), abs=1e-12)


def test_what_tells_no_tokens_apart_gives_zero(pair):
    x, _ = pair
    assert linear_cka(x, torch.ones(40, 3)) == 0
    assert rsa(x, torch.zeros(40, 3)) == 0


def test_descriptions_of_other_tokens_are_refused(pair):
    x, y = pair
    with pytest.raises(ValueError, match=r"same tokens.*\(40, 6\) and \(39, 4\)"):
        rsa(x, y[1:])
    with pytest.raises(ValueError, match=r"at least 3; got \(2, 6\)"):
        linear_cka(x[:2], y[:2])
