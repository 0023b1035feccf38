"""Who is put where: processes on accelerators that have float64, language models where their run is, SAEs there."""

import copy

import pytest
import torch
from pretended_cuda import DEVICE, PretendedCuda, pretended_cuda

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig, devices
from hf_msae.devices import device_of, move_language_model, stays_on_cpu
from hf_msae.interpret.scan import scan
from hf_msae.steering import LatentEdit, SteeredPipeline, Steering
from hf_msae.training import SAETrainer, SAETrainingArguments
from hf_msae.training.outputs import Saver
from hf_msae.training.run import Run

CPU = torch.device("cpu")


@pytest.fixture
def gpu():
    with pretended_cuda() as device:
        yield device


@pytest.fixture
def own_lm(lm):
    """One that a test may move."""
    return copy.deepcopy(lm)


def make_sae() -> MatryoshkaSAE:
    torch.manual_seed(0)
    config = MatryoshkaSAEConfig(hidden_size=16, num_latents=40, prefix_sizes=[8, 40], k=4, site="layers.0")
    sae = MatryoshkaSAE(config).eval()
    sae.threshold.fill_(0.1)
    return sae


@pytest.mark.parametrize(
    ("accelerator", "on_cpu", "warned"),
    [(None, True, False), ("cuda", False, False), ("xpu", False, False), ("mps", True, True)],
)
def test_which_accelerators_are_used(monkeypatch, caplog, accelerator: str | None, on_cpu: bool, warned: bool) -> None:
    kind = None if accelerator is None else torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: kind)
    devices._say_that_it_is_not_used.cache_clear()
    assert [stays_on_cpu() for _ in range(2)] == [on_cpu] * 2
    assert SAETrainingArguments().on_cpu == on_cpu
    assert len(caplog.records) == warned
    assert stays_on_cpu(use_cpu=True)


def test_a_language_model_is_moved_unless_it_is_split(gpu: PretendedCuda, own_lm) -> None:
    own_lm.model.layers[1].to(DEVICE)
    move_language_model(own_lm, CPU)
    assert {parameter.device for parameter in own_lm.parameters()} == {CPU, DEVICE}
    own_lm.to(DEVICE)
    own_lm.config.quantization_config = {"quant_method": "bitsandbytes"}
    move_language_model(own_lm, CPU)
    assert device_of(own_lm) == DEVICE
    del own_lm.config.quantization_config
    before = own_lm.lm_head.weight
    move_language_model(own_lm, DEVICE)
    assert own_lm.lm_head.weight is before
    move_language_model(own_lm, CPU)
    assert {parameter.device for parameter in own_lm.parameters()} == {CPU}


def test_weights_that_are_offloaded_read_tokens_of_the_cpu(own_lm) -> None:
    assert device_of(own_lm.to("meta")) == CPU


def test_a_trainer_moves_the_language_model_to_its_device(
    gpu, own_lm, tokenizer, texts, tmp_path, monkeypatch
) -> None:
    begin = Run.__init__

    def on_the_gpu(run: Run, *args, **kwargs) -> None:
        begin(run, *args, **kwargs)
        run.device = DEVICE

    monkeypatch.setattr(Run, "__init__", on_the_gpu)
    # Pretended tensors have no memory that a file could be written from.
    monkeypatch.setattr(Saver, "save_results", lambda *args: None)
    monkeypatch.setattr(SAETrainer, "_hand_over", lambda *args: None)
    args = SAETrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=64,
        block_tokens=300,
        eval_tokens=200,
        calibration_tokens=100,
        ce_tokens=100,
        context_length=32,
        disable_tqdm=True,
        use_cpu=True,
        save_steps=0,
    )
    trainer = SAETrainer(own_lm, make_sae(), args, texts, processing_class=tokenizer)
    assert device_of(own_lm) == DEVICE
    measured = trainer.train()
    assert len(measured) == 1
    assert trainer.learners[0].sae.device == DEVICE


def test_a_pipeline_and_a_scan_take_saes_to_the_language_model(gpu: PretendedCuda, own_lm, tokenizer, texts) -> None:
    own_lm.to(DEVICE)
    sae = make_sae()
    pipe = SteeredPipeline(own_lm, tokenizer, sae, Steering([LatentEdit(3, 5.0, units="absolute")]), device=DEVICE)
    assert sae.device == DEVICE
    assert pipe("w1 w2", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    other = make_sae()
    found = scan(own_lm, tokenizer, other, texts[:20], max_tokens=100)
    assert other.device == DEVICE
    assert found.statistics.num_tokens >= 100
