"""`hf-msae convert`: into ours and back out, whole or absent, with what is missing asked for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig, steer
from hf_msae.cli.main import main
from hf_msae.sites import capture, resolve_site
from hf_msae.steering import SteeringError

pytestmark = pytest.mark.slow


def convert(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main(["convert", *map(str, arguments)])
    return int(end.value.code or 0)


@pytest.fixture
def saelens(tmp_path: Path) -> Path:
    """A SAELens training checkpoint of a Matryoshka SAE whose widths can be left out, built by hand."""
    folder, generator = tmp_path / "peer", torch.Generator().manual_seed(0)
    folder.mkdir()
    state = {
        "W_enc": torch.randn(8, 32, generator=generator),
        "W_dec": torch.randn(32, 8, generator=generator),
        "b_enc": torch.zeros(32),
        "b_dec": torch.zeros(8),
        "topk_threshold": torch.tensor(0.5, dtype=torch.float64),
    }
    save_file(state, folder / "sae_weights.safetensors")
    config = {"architecture": "matryoshka_batchtopk", "d_in": 8, "d_sae": 32, "dtype": "float32", "k": 4}
    config |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "rescale_acts_by_decoder_norm": False}
    (folder / "cfg.json").write_text(json.dumps(config | {"metadata": {}}))
    return folder


def test_a_peers_checkpoint_becomes_ours_once_its_sizes_are_given(saelens, tmp_path, capsys):
    dest = tmp_path / "ours"
    assert convert(saelens, dest) == 2
    assert "--prefix-sizes" in capsys.readouterr().err
    assert not dest.exists()
    assert convert(saelens, dest, "--prefix-sizes", "4", "16") == 0
    assert "32 latents of width 8, prefixes 4, 16, 32" in capsys.readouterr().out
    assert MatryoshkaSAE.from_pretrained(dest).config.prefix_sizes == [4, 16, 32]
    assert convert(saelens, tmp_path / "small", "--prefix-sizes", "4", "16", "--prefix", "16") == 0
    assert MatryoshkaSAE.from_pretrained(tmp_path / "small").config.prefix_sizes == [4, 16]


def test_ours_becomes_a_peers_and_ours_again(tmp_path):
    torch.manual_seed(0)
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=8, num_latents=32, prefix_sizes=[4, 16, 32], k=4)).eval()
    sae.threshold.fill_(0.25)
    sae.save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "peer", "--to", "saelens") == 0
    assert (tmp_path / "peer" / "cfg.json").is_file()
    assert convert(tmp_path / "peer", tmp_path / "again", "--format", "saelens") == 0
    again, x = MatryoshkaSAE.from_pretrained(tmp_path / "again"), torch.randn(50, 8)
    assert again.config.prefix_sizes == [4, 16, 32]
    torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again.decode(again.encode(x)), sae.decode(sae.encode(x)), rtol=1e-5, atol=1e-6)


def test_mistakes_are_named_and_nothing_is_written(saelens, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    cases = [
        ((saelens, tmp_path / "there"), "exists already"),
        ((saelens, tmp_path / "x", "--format", "nonsense"), "There is no format 'nonsense'"),
        ((saelens, tmp_path / "x", "--format", "gemma_scope"), "is no Gemma Scope"),
        ((tmp_path / "there", tmp_path / "x"), "no files"),
        ((saelens, tmp_path / "x", "--prefix-sizes", "many"), "'many' is not a number"),
    ]
    for arguments, words in cases:
        assert convert(*arguments) == 2, words
        assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.fixture
def on_disk(tmp_path, lm, tokenizer, texts) -> list[str]:
    """The flags that name a language model and text."""
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    lines = [json.dumps({"text": text}) for text in texts * 3]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    flags = {"--model": tmp_path / "lm", "--dataset": tmp_path / "texts.jsonl", "--site": "layers.0"}
    return [str(part) for pair in flags.items() for part in pair] + [
        "--measure",
        "--use-cpu",
        "--measure-tokens",
        "3000",
    ]


def test_what_another_library_does_not_record_is_measured_and_then_it_steers(tmp_path, on_disk, lm, tokenizer, capsys):
    torch.manual_seed(0)
    ours = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=16, num_latents=32, prefix_sizes=[8, 32], k=4)).eval()
    ours.threshold.fill_(0.02)
    ours.save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", tmp_path / "peer", "--to", "saelens") == 0
    assert convert(tmp_path / "peer", tmp_path / "plain") == 0
    assert convert(tmp_path / "peer", tmp_path / "measured", *on_disk) == 0
    plain, measured = (MatryoshkaSAE.from_pretrained(tmp_path / name) for name in ("plain", "measured"))
    latent = int(measured.firing_rate.argmax())
    inputs = tokenizer("w1 w2 w3", return_tensors="pt")
    plain.config.site = "layers.0"
    unmeasured = pytest.raises(SteeringError, match="hf-msae convert SAE FOLDER --measure")
    with unmeasured, steer(lm, plain, {latent: 1.0}):
        pass
    with torch.no_grad(), steer(lm, measured, {latent: 1.0}):
        steered = lm(**inputs).logits
    with torch.no_grad():
        assert not torch.equal(steered, lm(**inputs).logits)
    x = capture(lm, [resolve_site(lm, "layers.0")], **inputs).popitem()[1]
    assert torch.equal(plain.encode(x), measured.encode(x))
    assert measured.config.measured["l0"][-1] == pytest.approx(measured.firing_rate.sum().item(), rel=1e-3)
    assert measured.config.site == "model.layers.0:output"
    assert measured.config.norm_limit > 0


def test_a_batch_topk_without_a_threshold_is_refused_or_given_one(tmp_path, on_disk, capsys):
    folder, generator = tmp_path / "original", torch.Generator().manual_seed(0)
    folder.mkdir()
    rows = torch.nn.functional.normalize(torch.randn(32, 16, generator=generator), dim=1)
    tensors = {"W_enc": rows.T.contiguous(), "W_dec": rows, "b_enc": torch.zeros(32), "b_dec": torch.zeros(16)}
    torch.save(tensors, folder / "sae.pt")
    config = {"sae_type": "batch-topk", "input_unit_norm": False, "act_size": 16, "dict_size": 32, "top_k": 6}
    (folder / "config.json").write_text(json.dumps({key: str(value) for key, value in config.items()}))
    assert convert(folder, tmp_path / "refused") == 2
    assert "--measure" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    assert convert(folder, tmp_path / "ours", *on_disk) == 0
    sae = MatryoshkaSAE.from_pretrained(tmp_path / "ours")
    assert sae.config.measured["l0"][-1] == pytest.approx(6, rel=0.1)
    assert sae.max_activation.min() >= 0
    assert (sae.max_activation > 0).any()
