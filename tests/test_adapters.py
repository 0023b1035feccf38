"""PEFT adapters as language models: loaded onto their base, recorded by SAEs, found again by all that reads one."""

import json
import shlex
from contextlib import redirect_stdout
from io import StringIO

import peft
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.adapters import has_adapter
from hf_msae.cli.main import main
from hf_msae.cross_entropy import predicts_next_token
from hf_msae.errors import InputError
from hf_msae.language_models import load_language_model, load_language_model_config, model_of, origin_of
from hf_msae.sites import capture, resolve_site
from hf_msae.steering import LatentEdit, SteeredPipeline, Steering, save_steering
from hf_msae.training.preparation import resolve_sites

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
IDS = torch.tensor([[1, 5, 9, 33, 8]])
KINDS = {
    "lora": peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, task_type="CAUSAL_LM"),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "a trained head": peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"]),
}


def at(name, model):
    """The activations at a site."""
    return capture(model, [resolve_site(model, name)], input_ids=IDS).popitem()[1]


def randomise(model):
    """An adapter that was trained: a fresh one changes nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.5)
    return model.eval()


@pytest.fixture
def save(lm, tokenizer, tmp_path):
    """Saves a base model and an adapter on it; gives the adapter's folder and the model that PEFT makes of them."""
    lm.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")

    def saved(config, auto=AutoModelForCausalLM):
        wrapped = randomise(peft.get_peft_model(auto.from_pretrained(tmp_path / "base"), config))
        wrapped.save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter"), wrapped

    return saved


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_computes_what_peft_computes(save, lm, kind):
    adapter, expected = save(KINDS[kind])
    model, tokenizer = load_language_model(adapter)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
        assert not torch.allclose(model(IDS).logits, lm(IDS).logits)
    for name in ("layers.1", "layers.0.attn", "embeddings"):
        site = resolve_site(model, name)
        assert site == resolve_site(lm, name)
        assert torch.equal(
            *(capture(one, [resolve_site(one, name)], input_ids=IDS).popitem()[1] for one in (model, expected))
        )
    assert tokenizer("w1").input_ids
    assert has_adapter(model)
    assert not has_adapter(lm)
    assert origin_of(model).adapter == adapter


@pytest.mark.parametrize(
    ("task", "auto"), [("FEATURE_EXTRACTION", AutoModel), ("SEQ_CLS", AutoModelForSequenceClassification)]
)
def test_an_adapter_for_another_head_gives_its_layers_and_no_cross_entropy(save, lm, task, auto):
    adapter, expected = save(peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, task_type=task), auto)
    model, _ = load_language_model(adapter)
    assert not predicts_next_token(model)
    assert torch.equal(at("layers.1", model), at("layers.1", expected))
    assert not torch.allclose(at("layers.1", model), at("layers.1", lm))


def test_an_adapter_that_would_change_nothing_is_refused(save, tmp_path):
    """Weights that the model has no place for, or that the file lacks, would leave the base model as it is."""
    from safetensors.torch import load_file, save_file

    adapter, _ = save(KINDS["lora"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({key: value for key, value in weights.items() if "layers.1" not in key}, path)
    with pytest.raises(InputError, match=r"adapter .* lacks .*layers\.1"):
        load_language_model(adapter)
    save_file(
        {key.replace("base_model.model.model", "base_model.model.other"): value for key, value in weights.items()},
        path,
    )
    with pytest.raises(InputError, match="is made for modules that"):
        load_language_model(adapter)
    save_file({key: value[:, :-1].contiguous() for key, value in weights.items()}, path)
    with pytest.raises(InputError, match="does not fit"):
        load_language_model(adapter)


def test_an_adapter_of_no_layers_is_refused(save):
    adapter, _ = save(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(InputError, match=r"PROMPT_TUNING\) puts vectors before the text"):
        load_language_model_config(adapter)


@pytest.mark.parametrize("fault", ["no base", "not JSON", "an unknown kind"])
def test_a_damaged_adapter_is_told_in_a_sentence(save, tmp_path, fault):
    adapter, _ = save(KINDS["lora"])
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    changed = {"no base": {"base_model_name_or_path": None}, "an unknown kind": {"peft_type": "UNHEARD"}}
    path.write_text("{" if fault == "not JSON" else json.dumps(config | changed[fault]))
    with pytest.raises(InputError, match=r"base_model_name_or_path|cannot be read"):
        load_language_model_config(adapter)


def test_without_peft_there_is_one_sentence(save, monkeypatch):
    adapter, _ = save(KINDS["lora"])
    monkeypatch.setattr("hf_msae.adapters.is_peft_available", lambda: False)
    with pytest.raises(InputError, match="is a PEFT adapter, and peft is not installed: pip install peft"):
        load_language_model_config(adapter)


def test_an_adapter_that_was_put_on_elsewhere_is_not_forgotten(save, lm, caplog):
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=16, num_latents=32, k=4, site="layers.1"))
    _, wrapped = save(KINDS["lora"])
    resolve_sites(wrapped, {"sae": sae})
    assert "has a PEFT adapter whose name is not known" in caplog.text
    sae.config.adapter = "somebody/adapter"
    resolve_sites(wrapped, {"sae": sae})
    assert sae.config.adapter == "somebody/adapter"
    resolve_sites(lm, {"sae": sae})
    assert sae.config.adapter is None


@pytest.mark.slow
def test_an_sae_of_an_adapter_is_trained_and_read_by_every_command(save, tmp_path, texts):
    """Trained with `--model ADAPTER`; then nobody says the model again, and all read the adapted one."""
    adapter, expected = save(KINDS["lora"])
    data, run, evaluation = tmp_path / "texts.jsonl", tmp_path / "run", tmp_path / "evaluation"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    read = f"--dataset {data} --context-length 16"
    call(
        f"train --model {adapter} {read} --site layers.1 --num-latents 32 --prefix-sizes 16 32 --k 4 "
        f"--output-dir {run} --max-tokens 2048 --eval-tokens 300 --calibration-tokens 200 --ce-tokens 100 "
        "--per-device-train-batch-size 128 --save-steps 0 --block-tokens 512"
    )
    sae = MatryoshkaSAE.from_pretrained(run).eval()
    assert model_of(sae.config) == (adapter, None)
    assert sae.config.base_model == str(tmp_path / "base")
    assert sae.config.site == "model.layers.1:output"
    card = (run / "README.md").read_text()
    assert "activations of **base with the adapter adapter** at" in card
    assert f'load_language_model("{adapter}")' in card
    call(f"interpret {run} {read} --max-tokens 500")
    call(
        f"eval {run} {read} --eval-tokens 300 --ce-tokens 100 --rate-tokens 100 --baselines none --metrics core "
        f"--output-dir {evaluation}"
    )
    facts = json.loads((evaluation / "evaluation.json").read_text())["facts"]
    assert facts["model"] == adapter
    assert "w1 w2" in call(f"steer {run} --latent 1=1 --units absolute --prompt 'w1 w2' --max-new-tokens 3")
    save_steering(Steering([LatentEdit(1, 1.0, units="absolute")]), run)
    assert torch.equal(at("layers.1", SteeredPipeline.from_pretrained(run).model), at("layers.1", expected))


def call(command):
    """What a command prints."""
    with redirect_stdout(StringIO()) as printed, pytest.raises(SystemExit) as done:
        main(shlex.split(command))
    assert done.value.code == 0
    return printed.getvalue()
