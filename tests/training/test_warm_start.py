"""Beginning with the weights of another SAE: what it computes is kept at any width; what does not fit is told."""

import pytest
import torch
from safetensors.torch import load_file

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.training import SAETrainer, SAETrainingArguments
from hf_msae.training.warm_start import WarmStartError, warm_start, wider_prefix_sizes

pytestmark = pytest.mark.slow

SITE = "model.layers.0:output"


def make_sae(seed: int = 0, **changes) -> MatryoshkaSAE:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_latents": 64, "prefix_sizes": [8, 24, 64], "k": 4, "site": SITE}
    return MatryoshkaSAE(MatryoshkaSAEConfig(**(shape | changes)))


@pytest.fixture
def source(tmp_path, x):
    """A saved SAE whose decoder rows are not of norm 1, measured on x."""
    sae = make_sae(1)
    with torch.no_grad():
        sae.W_dec *= torch.rand(64, 1) + 0.5
        sae.b_enc.normal_(0, 0.1)
        sae.b_dec.normal_()
    sae.calibrate_threshold([torch.randn(1000, 16)])
    latents = sae.eval().encode(x)
    sae.max_activation.copy_(latents.max(0).values)
    sae.firing_rate.copy_((latents > 0).float().mean(0))
    sae.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def x():
    return torch.randn(50, 16, generator=torch.Generator().manual_seed(5))


def reconstruct(sae: MatryoshkaSAE, x: torch.Tensor, prefix: int) -> torch.Tensor:
    return sae.eval().decode(sae.encode(x, prefix=prefix))


def assert_unit_rows(sae: MatryoshkaSAE) -> None:
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(sae.config.num_latents), atol=1e-6)


def test_the_same_width_computes_the_same(source, x):
    sae, initial = make_sae(2), MatryoshkaSAE.from_pretrained(source)
    warm_start(sae, str(source), seed=0)
    assert_unit_rows(sae)
    for prefix in (8, 24, 64):
        assert torch.allclose(reconstruct(sae, x, prefix), reconstruct(initial, x, prefix), atol=1e-5)
    assert int((sae.encode(x) > 0).sum()) > 0
    # What was measured is in the units of the new rows, and is what measuring again gives.
    assert torch.allclose(sae.max_activation, sae.encode(x).max(0).values, atol=1e-5)
    assert torch.allclose(sae.firing_rate, (sae.encode(x) > 0).float().mean(0))


def test_a_wider_one_is_cut_to_its_prefix(source, x):
    sae, initial = make_sae(2, num_latents=24, prefix_sizes=[8, 24]), MatryoshkaSAE.from_pretrained(source)
    warm_start(sae, str(source), seed=0)
    assert_unit_rows(sae)
    assert torch.allclose(reconstruct(sae, x, 24), reconstruct(initial, x, 24), atol=1e-5)


def test_a_narrower_one_keeps_every_level_and_gets_quiet_latents_behind(source, x):
    sizes = wider_prefix_sizes(MatryoshkaSAEConfig.from_pretrained(source), 100)
    assert sizes == [8, 24, 64, 100]
    sae, initial = make_sae(2, num_latents=100, prefix_sizes=sizes), MatryoshkaSAE.from_pretrained(source)
    warm_start(sae, str(source), seed=0)
    assert_unit_rows(sae)
    for prefix in (8, 24, 64):
        assert torch.allclose(reconstruct(sae, x, prefix), reconstruct(initial, x, prefix), atol=1e-5)
    latents = sae.eval().encode(x - initial.b_dec + sae.b_dec)
    assert (latents[:, 64:] > 0).double().mean() < 0.1 * (latents[:, :64] > 0).double().mean()
    assert sae.W_dec[64:].unique(dim=0).shape == (36, 16)  # directions of their own
    again = make_sae(3, num_latents=100, prefix_sizes=sizes)
    warm_start(again, str(source), seed=0)
    assert torch.equal(again.W_dec, sae.W_dec)


def test_rows_without_a_direction_get_one(tmp_path, x):
    initial = make_sae(1)
    with torch.no_grad():
        initial.W_dec[5] = 0
    initial.save_pretrained(tmp_path / "source")
    sae = make_sae(2)
    warm_start(sae, str(tmp_path / "source"), seed=0)
    assert_unit_rows(sae)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 8, "num_aux_latents": 4}, "hidden_size is 16 there and 8 here"),
        ({"activation": "topk"}, "activation is 'batch_topk' there and 'topk' here"),
        ({"site": "model.layers.1:output"}, "its site is model.layers.0:output, and model.layers.1:output is to be"),
        ({"prefix_sizes": [32, 64]}, r"its levels \[8, 24\] are not among prefix_sizes=\[32, 64\]"),
        ({"num_latents": 128, "prefix_sizes": [8, 24, 128]}, r"its levels \[64\] are not among"),
        ({"aligned": True}, "aligned is True here, and its encoder rows are not aligned"),
    ],
)
def test_what_does_not_fit_is_told(source, changes, message):
    with pytest.raises(WarmStartError, match=message):
        warm_start(make_sae(**changes), str(source), seed=0)


def test_another_base_model_is_a_warning_and_nothing_there_an_error(source, tmp_path, caplog):
    initial = MatryoshkaSAE.from_pretrained(source)
    initial.config.base_model = "owner/base"
    initial.save_pretrained(tmp_path / "of-base")
    warm_start(make_sae(base_model="owner/chat"), str(tmp_path / "of-base"), seed=0)
    assert "was trained on owner/base, and goes on with activations of owner/chat" in caplog.text
    with pytest.raises(WarmStartError, match="Cannot begin with"):
        warm_start(make_sae(), str(tmp_path / "nowhere"), seed=0)


def arguments(output, **changes) -> SAETrainingArguments:
    settings = {"per_device_train_batch_size": 64, "block_tokens": 300, "context_length": 32, "eval_tokens": 400}
    settings |= {"calibration_tokens": 200, "ce_tokens": 0, "save_steps": 0, "logging_steps": 1}
    settings |= {"use_cpu": True, "disable_tqdm": True}
    return SAETrainingArguments(output_dir=str(output), **(settings | changes))


def test_a_run_goes_on_from_where_the_first_one_was(tmp_path, lm, tokenizer, texts):
    def train(name, **changes):
        args = arguments(tmp_path / name, **changes)
        trainer = SAETrainer(lm, make_sae(), args, texts, processing_class=tokenizer)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history]

    first = train("first", max_steps=60)
    tuned = train("tuned", max_steps=3, init_from=str(tmp_path / "first"))
    assert tuned[0] < 1.1 * first[-1] < 0.9 * first[0]
    # The first step of the warm-up moves weights by no more than its learning rate allows.
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "tuned"))
    assert 0 < (after["W_dec"] - before["W_dec"]).abs().max() < 0.2
