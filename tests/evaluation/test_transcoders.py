"""Evaluating transcoders: every number is of what they reconstruct, and what makes no sense for them is left out."""

import logging

import pytest
import torch
from small_saes import copying_sae, mlp_transcoder

from hf_msae import EvaluationArguments, run_evaluation
from hf_msae.errors import InputError
from hf_msae.evaluation.activations import collect
from hf_msae.evaluation.core import measure_core
from hf_msae.evaluation.metric import Subject
from hf_msae.sites import resolve_site


@pytest.mark.parametrize("skip", [False, True])
def test_numbers_by_level_are_those_of_the_mlp_replaced_by_hand(lm, tokenizer, texts, skip):
    sae = mlp_transcoder(lm, skip)
    site, site_out = (resolve_site(lm, name) for name in (sae.config.site, sae.config.site_out))
    text = collect(lm, tokenizer, site, texts, num_tokens=300, context_length=24, site_out=site_out)
    mlp = lm.model.layers[0].mlp
    torch.testing.assert_close(mlp(text.x), text.y, rtol=1e-4, atol=1e-6)
    core = measure_core(text, {"sae": sae}, ce_tokens=200, rate_tokens=100)["sae"]

    batches = list(text.token_batches(200))
    mean = text.y.double().mean(0).float()

    def cross_entropy(change=None) -> float:
        total, count = 0.0, 0
        for batch in batches:
            keep = batch["keep"]
            hooks = []
            if change is not None:
                hooks.append(
                    mlp.register_forward_hook(
                        lambda module, args, out, keep=keep: torch.where(keep[..., None], change(args[0], out), out)
                    )
                )
            with torch.no_grad():
                log_p = lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
            for hook in hooks:
                hook.remove()
            of_next = log_p[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
            counted = keep[:, :-1] & keep[:, 1:]
            total, count = total - of_next[counted].double().sum().item(), count + int(counted.sum())
        return total / count

    clean, zero = cross_entropy(), cross_entropy(lambda x, out: torch.zeros_like(out))
    assert core.measurement.ce_clean == pytest.approx(clean, rel=1e-6)
    assert core.measurement.ce_zero == pytest.approx(zero, rel=1e-6)
    spread = (text.y - mean).double().pow(2).sum()
    for index, level in enumerate(core.measurement.levels):
        reconstruction = sae.reconstruct_levels(text.x)[index]
        assert level.fve == pytest.approx(
            1 - ((text.y - reconstruction).double().pow(2).sum() / spread).item(), rel=1e-5, abs=1e-5
        )
        spliced = cross_entropy(lambda x, out, index=index: sae.reconstruct_levels(x)[index])
        assert level.ce_increase == pytest.approx(spliced - clean, abs=1e-6)
        assert level.ce_recovered == pytest.approx((zero - spliced) / (zero - clean), rel=1e-3)


@pytest.mark.slow
def test_a_report_leaves_out_what_compares_both_places_and_says_so(lm, tokenizer, texts, tmp_path, caplog):
    settings = {"eval_tokens": 300, "ce_tokens": 100, "rate_tokens": 100, "context_length": 24, "use_cpu": True}
    arguments = EvaluationArguments(
        output_dir=str(tmp_path / "e"), baselines=["pca", "random"], metrics=["core", "geometry", "meta"], **settings
    )
    subject = Subject("transcoder", "transcoder", mlp_transcoder(lm, skip=True))
    with caplog.at_level(logging.WARNING):
        result = run_evaluation([subject], lm, tokenizer, texts, arguments, eval_documents=texts)
    assert list(result.methods) == ["transcoder"]
    assert "Left out: meta. They compare decoder rows with what is read" in caplog.text
    assert "Left out: pca, random, which reconstruct what they read" in caplog.text
    assert (tmp_path / "e" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_an_sae_beside_a_transcoder_is_refused(lm, tokenizer, texts, tmp_path):
    sae = copying_sae()
    sae.config.site = "layers.0.mlp:input"
    subjects = [Subject("transcoder", "transcoder", mlp_transcoder(lm)), Subject("sae", "sae", sae)]
    arguments = EvaluationArguments(output_dir=str(tmp_path / "e"), eval_tokens=200, context_length=24)
    with pytest.raises(InputError, match=r"transcoder and sae cannot stand in one table: .* Evaluate them apart"):
        run_evaluation(subjects, lm, tokenizer, texts, arguments)
