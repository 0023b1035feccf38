"""Where the language model's predictions mean nothing, no cross-entropy recovered is reported, and it is said why."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForMaskedLM, BertConfig

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cross_entropy import why_no_recovery
from hf_msae.training import SAETrainer, SAETrainingArguments

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def taught(lm):
    """A model that predicts better than one that knows nothing: words come one after the other, and it says so."""
    model = copy.deepcopy(lm)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.normal_(generator=torch.Generator().manual_seed(2))
        # Layers write little, so the last norm sees the token itself; the head answers with the one after it.
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(0.01)
            layer.self_attn.o_proj.weight.mul_(0.01)
        model.lm_head.weight.copy_(embedding.roll(1, 0))
    return model


@pytest.fixture(scope="module")
def counting():
    """Documents in which every word is followed by the next."""
    return [" ".join(f"w{(start + i) % 60}" for i in range(30)) for start in range(300)]


@pytest.fixture
def train(tmp_path, tokenizer, counting):
    def run(model, **changes):
        config = {"hidden_size": 16, "num_latents": 64, "prefix_sizes": [16, 64], "k": 4, "site": "layers.0"}
        settings = {"max_steps": 4, "per_device_train_batch_size": 64, "block_tokens": 300, "eval_tokens": 400}
        settings |= {"calibration_tokens": 200, "ce_tokens": 200, "context_length": 32, "save_steps": 0} | changes
        args = SAETrainingArguments(output_dir=str(tmp_path / "run"), disable_tqdm=True, use_cpu=True, **settings)
        sae = MatryoshkaSAE(MatryoshkaSAEConfig(**config))
        SAETrainer(model, sae, args, counting, processing_class=tokenizer).train()
        card = (tmp_path / "run" / "README.md").read_text()
        return json.loads((tmp_path / "run" / "metrics.json").read_text()), card

    return run


def with_random_head(model):
    """As transformers makes it where a checkpoint lacks one; nothing of the rest changes."""
    model = copy.deepcopy(model)
    model.lm_head.weight.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    return model


def encoder():
    widths = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoModelForMaskedLM.from_config(BertConfig(vocab_size=80, pad_token_id=0, **widths)).eval()


def test_a_model_that_predicts_is_reported(train, taught):
    metrics, card = train(taught)
    assert metrics["ce_clean"] < 2
    assert all(level["ce_recovered"] is not None for level in metrics["levels"])
    assert "ce_absent" not in metrics
    assert "CE recovered compares the language model's loss" in card


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_random_head, "no better than guessing among 80 tokens (4.38); its head was never trained"),
        (lambda model: model.model, "the language model has no head that predicts the next token"),
        (lambda model: encoder(), "the language model is an encoder"),
    ],
)
def test_predictions_that_mean_nothing_are_not_compared(train, taught, change, reason):
    metrics, card = train(change(taught))
    assert reason in metrics["ce_absent"]
    for level in metrics["levels"]:
        assert {level[name] for name in ("ce_recovered", "ce_recovered_mean", "ce_increase", "kl")} == {None}
        assert level["fve"] is not None
    assert f"There is no CE recovered: {metrics['ce_absent']}." in card


def test_what_was_not_asked_for_is_said(train, taught):
    metrics, _ = train(taught, ce_tokens=0)
    assert metrics["ce_absent"] == "ce_tokens is 0"


@pytest.mark.parametrize("scale", [0.001, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_no_random_head_passes_for_a_trained_one(stories260k, shared_data, scale, seed):
    """Of a real model: whatever the random head's size and seed."""
    model, tokenizer = copy.deepcopy(stories260k[0]), stories260k[1]
    shape = model.lm_head.weight.shape
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    text = (shared_data / "tinystories.txt").read_text()[:2000]
    ids = {"input_ids": tokenizer(text, return_tensors="pt").input_ids[:, :400]}
    with torch.no_grad():
        measured = Measured(model(**ids, labels=ids["input_ids"]).loss.item())
        assert why_no_recovery(measured, model) is None
        model.lm_head.weight = torch.nn.Parameter(scale * drawn)
        measured = Measured(model(**ids, labels=ids["input_ids"]).loss.item())
    assert "no better than guessing" in why_no_recovery(measured, model)


class Measured:
    def __init__(self, ce_clean):
        self.ce_clean = ce_clean
