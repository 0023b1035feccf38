"""What is planted in one corpus is found, what chance deals to both is not, and text is compared as latents of it."""

import json

import pytest
import torch
from known_world import BIRD, FIRST_WORD
from tests_of_concepts import texts_of

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig, diff_corpora, encode_dataset
from hf_msae.corpora import CorpusError, EncodedError, write_diff_report
from hf_msae.sites import SiteError

FISH_AND_OTHERS = [3, 4, 5, 20, 21, 22, 23, 24, 25]


@pytest.fixture(scope="module")
def corpora() -> tuple[list[str], list[str]]:
    """Texts without birds, and texts of which each has w0, a bird, twice."""
    return texts_of(FISH_AND_OTHERS, 50, seed=1), texts_of(FISH_AND_OTHERS, 40, seed=2, always=[0])


@pytest.fixture(scope="module")
def found(known, corpora):
    return diff_corpora(known.model, known.tokenizer, known.sae, *corpora)


@pytest.fixture(scope="module")
def random_sae() -> MatryoshkaSAE:
    """Of the tiny LM's first layer."""
    torch.manual_seed(1)
    config = MatryoshkaSAEConfig(hidden_size=16, num_latents=64, prefix_sizes=[16, 64], k=4, site="layers.0")
    sae = MatryoshkaSAE(config).eval()
    torch.nn.init.normal_(sae.W_enc)
    sae.threshold.fill_(0.1)
    return sae


def test_a_planted_word_is_found_at_its_levels(found, known):
    assert {finding.latent for finding in found.findings if finding.delta == 1} == {BIRD, FIRST_WORD}
    (bird,) = [finding for finding in found.of_level(1) if finding.latent == BIRD]
    assert (bird.share_a, bird.share_b, bird.mean_a) == (0, 1, 0)
    assert bird.mean_b == pytest.approx(0.8 * 2 / 10)
    assert bird.name == "w0"
    assert len(bird.examples) == 3
    assert all(text.count("<<w0>>") == 1 for text in bird.examples)
    # Two words in ten of B are no others' places, so that B has less of the rest, a little.
    assert all(finding.delta < 0.9 for finding in found.findings if finding.latent not in (BIRD, FIRST_WORD))
    assert [level.num_latents for level in found.levels] == [4, 2, 12]
    assert [level.more_in_b for level in found.levels[1:]] == [1, 1]
    assert found.facts["documents_a"] == 50
    assert found.warnings == []


def test_turned_round_it_is_the_same_with_the_other_sign(found, known, corpora):
    turned = diff_corpora(known.model, known.tokenizer, known.sae, *reversed(corpora))
    torch.testing.assert_close(turned.tests.delta, -found.tests.delta)
    torch.testing.assert_close(turned.tests.p, found.tests.p)
    assert [level.more_in_a for level in turned.levels] == [level.more_in_b for level in found.levels]


def test_two_samples_of_one_corpus_do_not_differ(lm, tokenizer, random_sae):
    """At a false discovery rate of 0.05, of ten pairs about one in twenty has any finding."""
    tested = with_findings = 0
    for seed in range(10):
        texts = texts_of(range(60), 140, seed=100 + seed)
        diff = diff_corpora(lm, tokenizer, random_sae, texts[:40], texts[40:])
        tested += int(diff.tests.tested.sum())
        with_findings += bool(diff.findings)
    assert tested > 400
    assert with_findings <= 2


def test_latents_on_disk_are_compared_as_their_text(found, known, corpora, tmp_path):
    encoded = {}
    for form, options in {"tokens": {}, "levels": {"by_level": True}, "pooled": {"pool": "mean"}}.items():
        for name, texts in zip("ab", corpora, strict=True):
            folder = tmp_path / f"{form} {name}"
            encoded[form, name] = encode_dataset(
                known.model, known.tokenizer, known.sae, texts, folder, shard_tokens=150, **options
            )
    for form in ("tokens", "levels", "pooled"):
        diff = diff_corpora(None, known.tokenizer, known.sae, encoded[form, "a"], encoded[form, "b"])
        torch.testing.assert_close(diff.tests.p, found.tests.p)
        torch.testing.assert_close(diff.share_b, found.share_b)
        (bird,) = [finding for finding in diff.of_level(1) if finding.latent == BIRD]
        if form == "pooled":
            assert all("w0" in text and "<<" not in text for text in bird.examples)
        else:
            assert bird.name == "w0"
    mixed = diff_corpora(known.model, known.tokenizer, known.sae, corpora[0], encoded["pooled", "b"])
    torch.testing.assert_close(mixed.tests.p, found.tests.p)
    first = diff_corpora(None, None, known.sae, encoded["tokens", "a"], encoded["tokens", "b"], document_tokens=6)
    text = diff_corpora(known.model, known.tokenizer, known.sae, *corpora, document_tokens=6)
    torch.testing.assert_close(first.tests.p, text.tests.p)
    assert first.facts["median_tokens_a"] == 5  # and BOS
    with pytest.raises(EncodedError, match="pooled over whole documents"):
        diff_corpora(None, None, known.sae, encoded["pooled", "a"], encoded["pooled", "b"], document_tokens=6)
    with pytest.raises(EncodedError, match="are the documents' mean, and max is compared"):
        diff_corpora(None, None, known.sae, encoded["pooled", "a"], encoded["pooled", "b"], pool="max")
    other = known.sae.truncate(18)
    with torch.no_grad():
        other.W_enc[0, 0] += 1
    with pytest.raises(EncodedError, match="encoded by another SAE"):
        diff_corpora(None, None, other, encoded["tokens", "a"], encoded["tokens", "b"])
    smaller = encode_dataset(known.model, known.tokenizer, known.sae.truncate(6), corpora[0], tmp_path / "smaller")
    with pytest.raises(EncodedError, match="those of the prefix of 6, and the SAE has 18; give --prefix 6"):
        diff_corpora(None, None, known.sae, smaller, encoded["tokens", "b"])
    with pytest.raises(ValueError, match="give the model and its tokenizer"):
        diff_corpora(None, None, known.sae, corpora[0], encoded["tokens", "b"])
    with pytest.raises(CorpusError, match="the same data"):
        diff_corpora(None, None, known.sae, encoded["tokens", "a"], encoded["pooled", "a"])


def test_a_prefix_is_compared_as_in_the_whole(found, known, corpora):
    inner = diff_corpora(known.model, known.tokenizer, known.sae.truncate(6), *corpora)
    torch.testing.assert_close(inner.tests.p, found.tests.p[:6])
    assert [level.prefix for level in inner.levels] == [4, 6]


def test_equal_documents_count_once_and_shared_ones_are_told(found, known, corpora):
    a, b = corpora
    repeated = diff_corpora(known.model, known.tokenizer, known.sae, [*a, *a, *a[:7]], b)
    torch.testing.assert_close(repeated.tests.p, found.tests.p)
    assert (repeated.facts["documents_a"], repeated.facts["repeated_a"]) == (50, 57)
    shared = diff_corpora(known.model, known.tokenizer, known.sae, a, [*b, *a[:3]])
    assert shared.warnings == ["3 documents are in both corpora, which makes them more alike than they are."]


def test_other_lengths_are_told(known, corpora):
    a, b = corpora
    long = [f"{one} {other}" for one, other in zip(a[::2], a[1::2], strict=True)]
    diff = diff_corpora(known.model, known.tokenizer, known.sae, long, b)
    assert "20 tokens in the median in A and 10 in B" in diff.warnings[0]
    assert "--document-tokens 10" in diff.warnings[0]


def test_the_report_has_every_finding_and_no_markup_of_texts(found, known, corpora, tmp_path):
    names = [f"<script>latent {latent}" for latent in range(18)]
    diff = diff_corpora(known.model, known.tokenizer, known.sae, *corpora, names=names)
    write_diff_report(diff, tmp_path / "report", "birds & fish")
    page = (tmp_path / "report" / "report.html").read_text()
    assert f"&lt;script&gt;latent {BIRD}" in page
    assert "<script>" not in page
    assert "<mark>w0</mark>" in page
    assert "&lt;&lt;" not in page
    assert "birds &amp; fish" in page
    written = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert written == json.loads(json.dumps(diff.to_dict()))
    assert [one["latent"] for one in written["findings"]] == [one.latent for one in found.findings]


def test_what_cannot_be_compared_is_refused(known, lm, tokenizer, corpora):
    a, b = corpora

    def diff(one=a, other=b, **options):
        return diff_corpora(known.model, known.tokenizer, known.sae, one, other, **options)

    for said, arguments in (
        ("A, 9 documents in memory, has 9 different documents, and 10 are needed", (a[:9], b)),
        (r"B, .* has 5 different documents \(15 more repeat them\)", (a, b[:5] * 4)),
        ("A and B are the same data", (a, list(a))),
        ("All 20 documents of the smaller corpus are in the other one", (a, a[:20])),
    ):
        with pytest.raises(CorpusError, match=said):
            diff(*arguments)
    for said, options in (
        ("fdr is between 0 and 1, got 1", {"fdr": 1}),
        ("max_documents must be at least 10, got 5", {"max_documents": 5}),
        ("document_tokens must be at least 1", {"document_tokens": 0}),
        ("pool is max, mean, sum or None, got 'median'", {"pool": "median"}),
        ("There are 3 names, and the SAE has 18 latents", {"names": ["a", "b", "c"]}),
    ):
        with pytest.raises(ValueError, match=said):
            diff(**options)
    with pytest.raises(SiteError):
        diff_corpora(lm, tokenizer, known.sae, a, b)
