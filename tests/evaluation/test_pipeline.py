"""An evaluation as a whole: what was asked for is what is measured, how baselines are trained, and what is written."""

import json

import pytest

from hf_msae import EvaluationArguments, MatryoshkaSAE, MatryoshkaSAEConfig, run_evaluation
from hf_msae.errors import InputError
from hf_msae.evaluation.metric import Subject
from hf_msae.evaluation.pipeline import _training_arguments

CONFIG = MatryoshkaSAEConfig(hidden_size=16, num_latents=32, prefix_sizes=[8, 32], k=4, site="layers.0")


@pytest.mark.parametrize(("ce_tokens", "counted"), [(0, (0, 0)), (60, (60, 60 + 24))])
def test_what_is_measured_is_what_was_asked_for_and_what_is_written(
    lm, tokenizer, texts, tmp_path, ce_tokens, counted
):
    args = EvaluationArguments(
        output_dir=str(tmp_path / "e"), metrics=["core"], baselines=[], eval_tokens=300, ce_tokens=ce_tokens,
        rate_tokens=100, context_length=24, lm_batch_size=1, use_cpu=True,
    )  # fmt: skip
    found = run_evaluation([Subject("ours", "ours", MatryoshkaSAE(CONFIG))], lm, tokenizer, texts, args)
    measured = found["core"]["ours"].measurement
    assert measured.tokens >= 300
    assert counted[0] <= (measured.ce_tokens or 0) <= counted[1]
    assert (measured.levels[0].ce_recovered is None) == (ce_tokens == 0)
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    page = (tmp_path / "e" / "report.html").read_text()
    assert f"{measured.levels[-1].fve:.3f}" in page


def test_baselines_are_trained_as_the_run_beside_the_sae_was(tmp_path):
    args = EvaluationArguments(baselines=["batch_topk"], eval_tokens=500, lm_batch_size=3, use_cpu=True)
    recorded = {"learning_rate": 0.0123, "warmup_steps": 7, "packing": False, "seed": 99, "max_steps": 5}
    (tmp_path / "training_arguments.json").write_text(json.dumps(recorded))
    (tmp_path / "metrics.json").write_text(json.dumps({"training_tokens": 43_210}))
    found = _training_arguments(args, str(tmp_path), tmp_path / "e")
    assert found is not None
    assert (found.learning_rate, found.warmup_steps, found.packing) == (0.0123, 7, False)
    assert (found.max_tokens, found.eval_tokens, found.lm_batch_size, found.use_cpu) == (43_210, 500, 3, True)
    assert (found.ce_tokens, found.save_steps, found.seed) == (0, 0, 0), "what a baseline has of its own"


def test_without_a_run_beside_the_sae_baselines_need_their_length_and_take_the_defaults(tmp_path):
    args = EvaluationArguments(baselines=["frozen_decoder", "pca"])
    with pytest.raises(InputError, match="does not say on how many tokens it was trained; give --baseline-tokens"):
        _training_arguments(args, str(tmp_path), tmp_path / "e")
    args.baseline_tokens = 10_000
    found = _training_arguments(args, str(tmp_path), tmp_path / "e")
    assert found is not None
    assert (found.max_tokens, found.learning_rate) == (10_000, None)
    assert _training_arguments(EvaluationArguments(baselines=["pca"]), str(tmp_path), tmp_path / "e") is None
