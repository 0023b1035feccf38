"""Language models that bitsandbytes quantizes as they are loaded, on a CPU where it is installed."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig, SAETrainer, SAETrainingArguments, quantization
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.main import main
from hf_msae.cli.sources import load_language_model as load_of_command
from hf_msae.cli.sources import load_sae
from hf_msae.data import as_documents
from hf_msae.errors import InputError
from hf_msae.language_models import load_language_model
from hf_msae.quantization import quantization_of, quantization_to_load
from hf_msae.worlds.stories import StoryWorld

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_model_is_quantized_and_the_sae_records_it_and_later_loads_it_likewise(tmp_path, bits):
    """Layers of bitsandbytes, near the model's own numbers; found again from what a run on it wrote."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain, _ = load_language_model("stories")
    model, tokenizer = load_language_model("stories", quantization=bits, device_map={"": "cpu"})
    kind = bitsandbytes.nn.Linear4bit if bits == "4bit" else bitsandbytes.nn.Linear8bitLt
    assert isinstance(model.model.layers[0].mlp.down_proj, kind)
    assert (quantization_of(model), quantization_of(plain)) == (bits, None)
    ids = torch.arange(3, 40)[None]
    difference = (model(ids).logits - plain(ids).logits).norm() / plain(ids).logits.norm()
    assert 0 < difference < {"4bit": 0.3, "8bit": 0.1}[bits]
    sae = MatryoshkaSAE(
        MatryoshkaSAEConfig(hidden_size=model.config.hidden_size, num_latents=64, k=4, site="layers.1")
    )
    settings = {"max_steps": 2, "per_device_train_batch_size": 64, "eval_tokens": 64, "calibration_tokens": 64}
    arguments = SAETrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, **settings)
    stories = as_documents(StoryWorld(seed=0).documents(60))
    SAETrainer(model, sae, arguments, stories, processing_class=tokenizer).train()
    config = MatryoshkaSAE.from_pretrained(tmp_path / "run").config
    assert (config.base_model, config.base_model_quantization) == ("stories", bits)
    assert quantization_to_load(config) == bits
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"in {bits} (bitsandbytes)" in card
    sources = SourceArguments()
    found = load_sae(str(tmp_path / "run"), "", sources)
    assert (sources.model, sources.quantization, found.config.base_model_quantization) == ("stories", bits, bits)
    again, _ = load_of_command(sources)
    assert torch.equal(again(ids).logits, model(ids).logits)
    sources = SourceArguments(quantization="none")
    load_sae(str(tmp_path / "run"), "", sources)
    assert torch.equal(load_of_command(sources)[0](ids).logits, plain(ids).logits)


def test_what_cannot_be_quantized_is_told_before_weights_are_read(tmp_path, lm, monkeypatch, caplog):
    folder = tmp_path / "lm"
    lm.save_pretrained(folder)
    with pytest.raises(InputError, match="quantization must be one of 4bit, 8bit, got '2bit'"):
        load_language_model(folder, quantization="2bit")
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(InputError, match=r"needs bitsandbytes, which is not installed: pip install bitsandbytes, or"):
        load_language_model(folder, quantization="4bit")
    config = MatryoshkaSAEConfig(hidden_size=8, num_latents=64, base_model="org/lm", base_model_quantization="8bit")
    assert quantization_to_load(config) is None
    assert "trained on org/lm in 8bit. bitsandbytes is not installed" in caplog.text
    with pytest.raises(InputError, match="cannot be split by tensor parallelism"):
        load_language_model(folder, quantization="4bit", tp_plan="auto")
    saved = json.loads((folder / "config.json").read_text())
    gptq = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(saved | gptq))
    with pytest.raises(InputError, match=r"was saved quantized \(gptq\), so it cannot be loaded in 4bit"):
        load_language_model(folder, quantization="4bit")


def test_an_sae_of_no_such_quantization_is_refused():
    with pytest.raises(StrictDataclassError, match="base_model_quantization must be one of 4bit, 8bit or None"):
        MatryoshkaSAEConfig(hidden_size=8, num_latents=64, base_model_quantization="3bit")


def test_bad_bits_end_a_command_in_a_sentence(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--quantization", "3bit"])
    assert caught.value.code == 2
    assert "3bit" in capsys.readouterr().err
