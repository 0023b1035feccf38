"""An evaluation on text that the SAE was trained on says so, and one on other text does not."""

import pytest

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.evaluation.arguments import EvaluationArguments
from hf_msae.evaluation.pipeline import load_subjects, run_evaluation
from hf_msae.training import SAETrainer, SAETrainingArguments

pytestmark = pytest.mark.slow

HELD_OUT = 400


@pytest.fixture(scope="module")
def trained(lm, tokenizer, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    args = SAETrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=64,
        eval_tokens=HELD_OUT,
        calibration_tokens=200,
        ce_tokens=0,
        context_length=32,
        save_steps=0,
        disable_tqdm=True,
        use_cpu=True,
    )
    sae = MatryoshkaSAE(
        MatryoshkaSAEConfig(hidden_size=16, num_latents=32, prefix_sizes=[8, 32], k=4, site="layers.0")
    )
    SAETrainer(lm, sae, args, texts, processing_class=tokenizer).train()
    return folder


@pytest.mark.parametrize(
    ("tokens", "other_text", "is_told"),
    [
        (HELD_OUT // 2, False, False),
        (HELD_OUT, False, False),
        (4 * HELD_OUT, False, True),
        (4 * HELD_OUT, True, False),
    ],
)
def test_text_that_was_trained_on_is_told(
    trained, lm, tokenizer, texts, tmp_path, caplog, tokens, other_text, is_told
):
    args = EvaluationArguments(
        output_dir=str(tmp_path / "report"), eval_tokens=tokens, metrics=["core"], baselines=[], ce_tokens=0
    )
    run_evaluation(
        load_subjects([trained]),
        lm,
        tokenizer,
        texts,
        args,
        eval_documents=texts if other_text else None,
        source=trained,
    )
    said = [
        record.getMessage() for record in caplog.records if "was trained on some of the text" in record.getMessage()
    ]
    assert bool(said) is is_told
    if is_told:
        assert "--eval-tokens" in said[0]
        recommended = int(said[0].split("Give --eval-tokens ")[1].split(",")[0])
        assert HELD_OUT <= recommended < 4 * HELD_OUT
