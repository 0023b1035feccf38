"""Evaluating tokenized SAEs: their tokens' vectors are a part of every number that is of reconstructions."""

import logging

import pytest
import torch
from small_saes import copying_sae

from hf_msae import EvaluationArguments, MatryoshkaSAE, MatryoshkaSAEConfig, run_evaluation
from hf_msae.errors import InputError
from hf_msae.evaluation.activations import collect
from hf_msae.evaluation.baselines import baseline_config
from hf_msae.evaluation.completing import complete
from hf_msae.evaluation.core import measure_core
from hf_msae.evaluation.metric import Subject
from hf_msae.sites import resolve_site


def tokenized(lm, **changes) -> MatryoshkaSAE:
    """Latents of a plain SAE, and for each token its own random vector."""
    torch.manual_seed(0)
    form = {"hidden_size": 16, "num_latents": 32, "prefix_sizes": [8, 32], "k": 4, "site": "model.layers.0:output"}
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**form | {"lookup_size": lm.config.vocab_size} | changes)).eval()
    with torch.no_grad():
        sae.W_token.normal_(0, 0.1)
        sae.threshold.fill_(0.3)
    return sae


def test_numbers_are_those_of_a_plain_sae_of_what_the_vectors_leave(lm, tokenizer, texts):
    sae = tokenized(lm)
    text = collect(lm, tokenizer, resolve_site(lm, sae.config.site), texts, num_tokens=300, context_length=24)
    core = measure_core(text, {"sae": sae}, ce_tokens=0, rate_tokens=120)["sae"]
    vectors = sae.W_token[text.token_ids].detach()
    spread = (text.x - text.x.mean(0)).double().pow(2).sum()
    f = sae.encode(text.x)
    for level, m in zip(core.measurement.levels, sae.config.prefix_sizes, strict=True):
        error = text.x - vectors - sae.b_dec - f[:, :m] @ sae.W_dec[:m]
        assert level.fve == pytest.approx(1 - (error.double().pow(2).sum() / spread).item(), rel=1e-5, abs=1e-6)
    # Finely quantised values decode to nearly the same.
    finest = max(point.cells for point in core.rate_distortion)
    coded = [point.fve for point in core.rate_distortion if point.cells == finest]
    errors = text.x[:120] - sae.reconstruct_levels(text.x[:120], text.token_ids[:120])
    centred = text.x[:120] - text.x[:120].mean(0)
    exact = [1 - (error.pow(2).sum() / centred.pow(2).sum()).item() for error in errors.detach()]
    assert coded == pytest.approx(exact, abs=0.02)


def test_what_is_written_into_one_is_measured_with_its_vectors(lm, tokenizer, texts):
    sae = tokenized(lm)
    text = collect(lm, tokenizer, resolve_site(lm, sae.config.site), texts, num_tokens=300, context_length=24)
    measured = complete(sae, text)
    expected = measure_core(text, {"sae": sae}, ce_tokens=0, rate_tokens=10)["sae"].measurement
    assert [level.fve for level in measured.levels] == pytest.approx([level.fve for level in expected.levels])


@pytest.mark.slow
def test_it_stands_beside_others_without_what_takes_reconstructions_apart(lm, tokenizer, texts, tmp_path, caplog):
    sae = tokenized(lm)
    args = EvaluationArguments(
        output_dir=str(tmp_path),
        metrics=["core", "geometry", "progressive"],
        eval_tokens=400,
        ce_tokens=100,
        rate_tokens=100,
        stories=0,
        baselines=["pca"],
        context_length=24,
        use_cpu=True,
    )
    subjects = [Subject("ours", "ours", sae), Subject("plain", "plain", copying_sae(16))]
    with caplog.at_level(logging.WARNING):
        found = run_evaluation(subjects, lm, tokenizer, texts, args)
    assert "Left out: progressive. They take reconstructions apart into latents" in caplog.text
    assert baseline_config("batch_topk", sae.config).lookup_size == sae.config.lookup_size
    assert set(found.results["core"]) == {"ours", "plain", "pca"}


def test_tokens_of_another_tokenizer_are_refused(lm, tokenizer, build_tokenizer, texts, tmp_path):
    other = build_tokenizer()
    other.add_tokens(["owl"])
    other.name_or_path = "somebody/else"
    sae = tokenized(lm, lookup_tokenizer="the/first", lookup_vocabulary="0" * 64)
    args = EvaluationArguments(output_dir=str(tmp_path / "report"), baselines=[], use_cpu=True)
    with pytest.raises(InputError, match=r"ours is tokenized: .* of the/first, and these are tokens of somebody/else"):
        run_evaluation([Subject("ours", "ours", sae)], lm, other, texts, args)
    assert not (tmp_path / "report").exists()
