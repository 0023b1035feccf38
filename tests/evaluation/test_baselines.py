"""Baselines: what each is, by what it does."""

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.evaluation.baselines import (
    TRAINED,
    baseline_config,
    build_random,
    check_baselines,
    prune,
    train_baselines,
)
from hf_msae.metrics import ReconstructionMeter
from hf_msae.training import SAETrainingArguments

CONFIG = MatryoshkaSAEConfig(hidden_size=16, num_latents=32, prefix_sizes=[8, 32], k=3, site="layers.0")


def measured(sae: MatryoshkaSAE, x: torch.Tensor) -> ReconstructionMeter:
    meter = ReconstructionMeter(sae)
    meter.update(x)
    return meter


def test_a_trained_baseline_has_the_same_width_and_sparsity():
    plain, topk = baseline_config("batch_topk", CONFIG), baseline_config("pruned_topk", CONFIG)
    assert (plain.num_latents, plain.k, plain.prefix_sizes, plain.activation) == (32, 3, [32], "batch_topk")
    assert (topk.num_latents, topk.k, topk.prefix_sizes, topk.activation) == (32, 3, [32], "topk")
    assert baseline_config("frozen_decoder", CONFIG).prefix_sizes == [8, 32]
    assert plain.site == "layers.0"


@pytest.mark.parametrize("kind", TRAINED)
def test_a_trained_baseline_looks_up_the_tokens_that_the_sae_does(kind):
    tokens = {"lookup_size": 50, "lookup_tokenizer": "someone/model", "lookup_vocabulary": "0a1b"}
    config = baseline_config(kind, MatryoshkaSAEConfig(hidden_size=16, num_latents=32, prefix_sizes=[8, 32], **tokens))
    assert {name: getattr(config, name) for name in tokens} == tokens


@pytest.mark.parametrize("kind", TRAINED)
def test_a_trained_baseline_reads_and_writes_where_the_sae_does(kind):
    where = {
        "site": "layers.0.mlp:input",
        "site_out": "layers.0.mlp",
        "hidden_size_out": 24,
        "skip": True,
        "base_model": "someone/model",
        "base_model_revision": "0123abc",
    }
    config = baseline_config(kind, MatryoshkaSAEConfig(hidden_size=16, num_latents=32, prefix_sizes=[8, 32], **where))
    assert {name: getattr(config, name) for name in where} == where


def test_pruning_orders_latents_by_what_they_add_and_keeps_the_whole():
    torch.manual_seed(0)
    sae = MatryoshkaSAE(baseline_config("batch_topk", CONFIG)).eval()
    x = torch.randn(500, 16) * torch.linspace(0.2, 3, 16)
    sae.calibrate_threshold([x])
    pruned = prune(sae, x, [8, 32])
    assert pruned.config.prefix_sizes == [8, 32]
    assert torch.allclose(pruned(x).reconstruction, sae(x).reconstruction, atol=1e-5)
    energy = pruned.encode(x).double().pow(2).mean(0) * pruned.W_dec.double().pow(2).sum(1)
    assert (energy[:-1] >= energy[1:] - 1e-9).all()
    first = prune(pruned, x, [8, 32]).encode(x)[:, :8]
    assert torch.allclose(first, pruned.encode(x)[:, :8])


def test_a_random_dictionary_has_the_same_sparsity_and_the_best_scale():
    torch.manual_seed(0)
    x = torch.randn(2000, 16) + 3
    sae = build_random(x, CONFIG, seed=1)
    whole = measured(sae, x).levels()[-1]
    assert whole.l0 == pytest.approx(3, rel=0.02)
    assert whole.fve > 0.1
    for factor in (0.9, 1.1):
        other = build_random(x, CONFIG, seed=1)
        with torch.no_grad():
            other.W_enc.mul_(factor)
            other.threshold.mul_(factor)
        assert measured(other, x).levels()[-1].fve < whole.fve
    assert torch.equal(build_random(x, CONFIG, seed=1).W_dec, sae.W_dec)
    assert not torch.equal(build_random(x, CONFIG, seed=2).W_dec, sae.W_dec)


def test_the_scale_of_a_random_dictionary_is_that_of_least_squares():
    """Of few activations, where a little too much would show."""
    torch.manual_seed(0)
    x = torch.randn(12, 16) + 3
    sae = build_random(x, CONFIG, seed=1)
    given, change = (x - sae.b_dec).double(), (sae.decode(sae.encode(x)) - sae.b_dec).double()
    assert ((given * change).sum() / change.square().sum()).item() == pytest.approx(1, abs=1e-5)


def test_unknown_baselines_are_named():
    with pytest.raises(ValueError, match="no baseline 'pcb'; there are batch_topk, pruned_topk"):
        check_baselines(["pca", "pcb"])


def test_baselines_are_trained_on_one_pass_and_a_frozen_decoder_stays_random(lm, tokenizer, texts, tmp_path):
    args = SAETrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=30,
        per_device_train_batch_size=64,
        block_tokens=400,
        eval_tokens=300,
        calibration_tokens=200,
        ce_tokens=0,
        context_length=24,
        save_steps=0,
        use_cpu=True,
        disable_tqdm=True,
    )
    saes = train_baselines(["batch_topk", "frozen_decoder"], CONFIG, lm, tokenizer, texts * 3, args)
    assert list(saes) == ["batch_topk", "frozen_decoder"]
    learnt, frozen = saes["batch_topk"], saes["frozen_decoder"]
    # Both began at the same random rows, and only one has moved; encoders began at 0.3 times those.
    assert not torch.allclose(learnt.W_dec, frozen.W_dec, atol=1e-3)
    generator = torch.Generator().manual_seed(0)
    start = torch.nn.functional.normalize(torch.randn(32, 16, generator=generator), dim=1)
    assert torch.allclose(frozen.W_dec, start, atol=1e-5)
    assert not torch.allclose(frozen.W_enc, 0.3 * start, atol=1e-3)
    for sae in saes.values():
        assert not sae.training
        assert sae.config.measured["tokens"] >= 300
