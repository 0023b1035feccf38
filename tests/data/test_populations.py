"""What is measured on is like what is trained on, or it is said that it is not."""

import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.cli.cache_activations import run as cache_command
from hf_msae.data import CachedActivations, as_documents, hold_out, hold_out_for_training
from hf_msae.data.populations import Population
from hf_msae.interpret.scan import scan
from hf_msae.training import SAETrainer, SAETrainingArguments


def kind(first: int, number: int, seed: int) -> list[str]:
    """Documents of twenty of the words only."""
    drawn = torch.randint(first, first + 20, (number, 25), generator=torch.Generator().manual_seed(seed))
    return [" ".join(f"w{word}" for word in row) for row in drawn.tolist()]


@given(
    sizes=st.tuples(st.integers(100, 3000), st.integers(100, 3000)),
    seed=st.integers(0, 2**31),
    offset=st.floats(-100, 100),
    scale=st.floats(0.01, 100),
)
@settings(max_examples=40)
def test_samples_of_one_kind_do_not_differ_and_a_shift_does(sizes, seed, offset, scale):
    """Whatever the scale and the mean; and sums over parts are those over the whole."""
    generator = torch.Generator().manual_seed(seed)
    one, other = (scale * (offset + torch.randn(size, 16, generator=generator)) for size in sizes)
    population = Population.of(one[:40]) + Population.of(one[40:])
    assert population.differs(Population.of(other)) is None
    shifted = other + 2 * scale * torch.eye(16)[3]
    expected = 4 / 16
    assert population.distance(Population.of(shifted)) == pytest.approx(expected, rel=0.5)
    assert population.differs(Population.of(shifted)) is not None


@pytest.fixture
def train(tmp_path, lm, tokenizer, caplog):
    def run(dataset, eval_dataset=None):
        config = {"hidden_size": 16, "num_latents": 64, "prefix_sizes": [16, 64], "k": 4, "site": "layers.0"}
        settings = {"max_steps": 20, "per_device_train_batch_size": 128, "block_tokens": 1000, "eval_tokens": 1000}
        settings |= {"calibration_tokens": 500, "ce_tokens": 0, "context_length": 32, "save_steps": 0}
        args = SAETrainingArguments(output_dir=str(tmp_path / "run"), disable_tqdm=True, use_cpu=True, **settings)
        sae = MatryoshkaSAE(MatryoshkaSAEConfig(**config))
        with caplog.at_level(logging.WARNING):
            SAETrainer(lm, sae, args, dataset, eval_dataset, processing_class=tokenizer).train()
        return [message for message in caplog.messages if "is of another kind than what it was trained on" in message]

    return run


def test_a_run_whose_held_out_text_is_of_its_kind_says_nothing(train):
    assert train(kind(0, 300, 0) + kind(40, 300, 1)) == []


def test_a_run_that_is_measured_on_another_kind_says_so(train):
    (message,) = train(kind(0, 400, 0), kind(40, 200, 1))
    assert message.startswith("model.layers.0:output: What the SAE was measured on")
    assert "shuffle such data beforehand" in message


def test_a_stream_that_is_sorted_by_kind_is_noticed(train, monkeypatch):
    """Its blocks come in order, so the held-out text is of the kinds that it begins with."""
    from datasets import Dataset

    monkeypatch.setattr("hf_msae.data.shuffling.BLOCK_ROWS", 100)
    monkeypatch.setattr("hf_msae.data.holding_out.BASE_SHARE", 0.3)
    rows = kind(0, 150, 0) + kind(40, 600, 1)
    assert len(train(Dataset.from_dict({"text": rows}).to_iterable_dataset())) == 1


def test_an_interpretation_reads_all_kinds(lm, tokenizer):
    """Of documents that are sorted by kind, half of the tokens are of both."""
    torch.manual_seed(0)
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=16, num_latents=32, k=4, site="layers.0")).eval()
    sae.threshold.zero_()
    found = scan(lm, tokenizer, sae, kind(0, 100, 0) + kind(40, 100, 1), max_tokens=1250, context_length=32)
    ids = tokenizer.convert_tokens_to_ids([f"w{word}" for word in range(60)])
    seen = {int(token) for latent in range(32) for token in found.sampled.of(latent).token_ids.flatten()}
    assert any(token in seen for token in ids[:20])
    assert any(token in seen for token in ids[40:])


@pytest.mark.parametrize("words", [1, 3])
def test_documents_that_are_words_are_asked_about(tokenizer, caplog, words):
    documents = [" ".join(text.split()[:words]) for text in kind(0, 400, 0)]
    hold_out(documents, tokenizer, 16, 40)
    assert f"have {words}.0 tokens on average, which is little context" in caplog.text
    caplog.clear()
    hold_out(kind(0, 400, 0), tokenizer, 16, 40)
    assert "on average" not in caplog.text


@pytest.mark.parametrize("eval_tokens", [100, 700, 2500])
def test_a_cache_lacks_what_an_evaluation_measures_on(lm, tokenizer, tmp_path, eval_tokens):
    """Whatever share of the documents that is: it holds as many tokens as training has left."""
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    texts = kind(0, 300, 0)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = f"--model {tmp_path}/lm --dataset {tmp_path}/texts.jsonl --site layers.0 --output-dir {tmp_path}/cache"
    options += f" --max-tokens 10000 --batch-size 1 --eval-tokens {eval_tokens} --calibration-tokens 100"
    cache_command(f"{options} --context-length 16 --norm-outlier-multiple 0".split())
    split = hold_out_for_training(texts, tokenizer, 16, eval_tokens, 100).split
    left = sum(len(text.split()) for text in as_documents(texts).without(split))
    assert CachedActivations(tmp_path / "cache", batch_size=1).num_available == left <= 300 * 25 - eval_tokens
