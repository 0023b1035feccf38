"""Meta-SAEs on decoder rows that are planted sums of atoms."""

import json
import re
from itertools import combinations

import pytest
import torch
from torch.nn.functional import normalize

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.research.meta import decompose, is_meta_sae, train_meta_sae, unit_rows
from hf_msae.research.meta_browser import render_browser, token_labels

pytestmark = pytest.mark.slow

ATOMS, WIDTH = 16, 32
PAIRS = list(combinations(range(ATOMS), 2))


def sae_of_rows(rows: torch.Tensor) -> MatryoshkaSAE:
    """An SAE with these decoder rows, all of which fire."""
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=rows.shape[1], num_latents=len(rows), k=2))
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.firing_rate.fill_(0.1)
    return sae.eval()


@pytest.fixture(scope="module")
def atoms() -> torch.Tensor:
    """Sixteen orthonormal directions."""
    return torch.linalg.qr(torch.randn(WIDTH, ATOMS, generator=torch.Generator().manual_seed(0))).Q.T


@pytest.fixture(scope="module")
def planted(atoms) -> MatryoshkaSAE:
    """Latent (i, j) is the sum of atoms i and j, in any length."""
    first, second = (torch.tensor(side) for side in zip(*PAIRS, strict=True))
    return sae_of_rows((atoms[first] + atoms[second]) * torch.linspace(0.5, 3, len(PAIRS))[:, None])


@pytest.fixture(scope="module")
def result(planted):
    return train_meta_sae(planted, num_latents=24, k=2, max_steps=300, name="planted", use_cpu=True)


def test_planted_atoms_are_found(result, atoms):
    cosines = (normalize(result.sae.W_dec, dim=1) @ atoms.T).detach()
    # The rest of each direction is a share of the mean of all atoms, which is in the bias.
    assert cosines.max(0).values.min() > 0.9
    assert len(set(cosines.argmax(0).tolist())) == ATOMS == round((1 - result.dead) * 24)
    assert result.explained > 0.98
    assert result.explained > result.explained_random + 0.3
    assert result.l0 == pytest.approx(2, rel=0.1)


def test_a_latent_comes_apart_into_its_atoms(result, planted, atoms):
    owner = (normalize(result.sae.W_dec, dim=1) @ atoms.T).detach().argmax(1).tolist()
    found = decompose(result.sae, planted, range(len(PAIRS)), neighbours=40)
    right = [
        item for item in found if sorted(owner[part.meta_latent] for part in item.parts) == list(PAIRS[item.latent])
    ]
    assert len(right) > 0.9 * len(PAIRS)
    assert min(item.cosine for item in right) > 0.99
    for item in right[:10]:
        for part in item.parts:
            sharing = [latent for latent, _ in part.shared_with]
            assert item.latent not in sharing
            atom = owner[part.meta_latent]
            assert sum(atom in PAIRS[latent] for latent in sharing) >= 0.9 * len(sharing) >= 10
            strengths = [value for _, value in part.shared_with]
            assert strengths == sorted(strengths, reverse=True)


def test_orthogonal_rows_are_atoms_already():
    """A quarter as many meta-latents cannot say what orthogonal directions are."""
    rows = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(1))).Q
    alone = train_meta_sae(sae_of_rows(rows), k=2, max_steps=150, random_control=False, use_cpu=True)
    assert alone.sae.config.num_latents == 12
    assert alone.explained < 0.45
    assert alone.explained_random is None


def test_the_order_of_latents_only_renames_them(result, planted):
    order = torch.randperm(len(PAIRS), generator=torch.Generator().manual_seed(2))
    other = sae_of_rows(planted.W_dec.detach()[order])
    new_name = order.argsort().tolist()
    for latent in (0, 17, 100):
        (one,), (two,) = (
            decompose(result.sae, sae, [number], neighbours=4)
            for sae, number in ((planted, latent), (other, new_name[latent]))
        )
        assert two.cosine == pytest.approx(one.cosine, abs=1e-5)
        assert [part.meta_latent for part in two.parts] == [part.meta_latent for part in one.parts]
        for part, again in zip(one.parts, two.parts, strict=True):
            assert [value for _, value in again.shared_with] == pytest.approx(
                [v for _, v in part.shared_with], abs=1e-5
            )


def test_a_saved_meta_sae_says_what_it_is(result, planted, tmp_path):
    result.sae.save_pretrained(tmp_path)
    loaded = MatryoshkaSAE.from_pretrained(tmp_path).eval()
    assert is_meta_sae(loaded)
    assert not is_meta_sae(planted)
    assert (loaded.config.site, loaded.config.base_model) == ("W_dec:output", "planted")
    assert loaded.config.measured["meta_sae_of"] == "planted"
    assert loaded.config.measured["fve"] == [pytest.approx(result.explained, abs=1e-4)]
    assert is_meta_sae(loaded.truncate(5))
    assert decompose(loaded, planted, [3]) == decompose(result.sae, planted, [3])


def test_the_same_seed_gives_the_same_numbers(planted):
    runs = [
        train_meta_sae(planted, num_latents=10, max_steps=20, seed=seed, random_control=False, use_cpu=True)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0].sae.W_dec, runs[1].sae.W_dec)
    assert not torch.equal(runs[0].sae.W_dec, runs[2].sae.W_dec)


def test_a_meta_sae_can_be_nested(planted):
    nested = train_meta_sae(
        planted, num_latents=20, k=2, prefix_sizes=[8, 20], max_steps=50, random_control=False, use_cpu=True
    )
    assert nested.sae.config.prefix_sizes == [8, 20]
    assert len(nested.sae.config.measured["fve"]) == 2


def test_latents_that_never_fire_are_left_out(planted):
    with torch.no_grad():
        some = sae_of_rows(planted.W_dec.detach())
        some.firing_rate[5:100] = 0
    rows, directions = unit_rows(some)
    assert rows.tolist() == [*range(5), *range(100, 120)]
    assert directions.norm(dim=1).tolist() == pytest.approx([1.0] * 25, abs=1e-6)
    some.firing_rate.zero_()
    assert len(unit_rows(some)[0]) == 120


def test_what_does_not_fit_is_refused_in_words(result, planted):
    with pytest.raises(ValueError, match=r"of 120 latents could store each of the 120 decoder rows.*such as 30"):
        train_meta_sae(planted, num_latents=120)
    with pytest.raises(ValueError, match="at least 8 latents that fire; this SAE has 3"):
        train_meta_sae(sae_of_rows(torch.eye(3, 5)))
    with pytest.raises(ValueError, match="0 < k <= 20"):
        train_meta_sae(planted, num_latents=20, k=21)
    with pytest.raises(ValueError, match=r"latents 0 to 119; got \[120\]"):
        decompose(result.sae, planted, [120])
    with pytest.raises(ValueError, match="reads rows of 32 dimensions, the SAE's have 5; it was trained on planted"):
        decompose(result.sae, sae_of_rows(torch.eye(9, 5)), [0])


def test_the_browser_holds_every_decomposition(result, planted):
    labels = [f"</script><b>{i}&{j}" for i, j in PAIRS]
    page = render_browser(result.sae, planted, {"explained": 0.9}, labels)
    assert page.count("</script>") == 1
    data = json.loads(re.search(r"const data = (.*);\n", page)[1])
    assert data["labels"] == labels
    assert data["facts"] == {"explained": 0.9}
    assert len(data["latents"]) == 120
    (item,) = decompose(result.sae, planted, [7], neighbours=3)
    cosine, parts = data["latents"]["7"]
    assert cosine == pytest.approx(item.cosine, abs=1e-3)
    assert [part[0] for part in parts] == [part.meta_latent for part in item.parts]
    for part in item.parts:
        count, *users = data["metas"][str(part.meta_latent)]
        assert count[0] >= len(users) > 0
        # Planted sums tie, so that which three latents come first is a matter of rounding.
        shown = {latent: value for latent, value in users if latent != 7}
        assert {latent for latent, _ in part.shared_with} <= set(shown)
        assert [value for _, value in part.shared_with] == pytest.approx(list(shown.values())[:3], abs=1e-3)


def test_latents_are_named_by_their_strongest_tokens(lm, tokenizer, texts):
    from hf_msae.evaluation.activations import collect
    from hf_msae.sites import resolve_site

    text = collect(lm, tokenizer, resolve_site(lm, "embeddings"), texts[:60], num_tokens=400, context_length=32)
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=16, num_latents=64, prefix_sizes=[64], k=4)).eval()
    words = [tokenizer.convert_tokens_to_ids(word) for word in ("w3", "w41")]
    with torch.no_grad():
        embeddings = normalize(lm.get_input_embeddings().weight, dim=1)
        sae.W_enc.zero_()
        sae.W_enc[:2] = embeddings[words]
        sae.threshold.fill_(0.9 * lm.get_input_embeddings().weight[words].norm(dim=1).min())
    labels = token_labels(text, tokenizer, sae)
    assert [label.split()[0] for label in labels[:2]] == ["w3", "w41"]
    assert labels[2:] == [""] * 62
