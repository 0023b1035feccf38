"""`from_pretrained` tells ours from others': it converts what it recognises, and says what anything else holds."""

import importlib
import json
import logging
from pathlib import Path

import pytest
import torch
from local_hub.server import LocalHub
from safetensors.torch import load_file, save_file

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.errors import InputError
from hf_msae.formats.circuit_tracer import write_set
from hf_msae.formats.common import Files, FormatError
from hf_msae.formats.conversion import FORMATS, recognise, write_library_checkpoint
from hf_msae.formats.libraries import WRITABLE

FIXTURES = {
    "saelens_matryoshka_inference": ("saelens", [64, 128, 256, 512, 1024]),
    "saelens_matryoshka_training": ("saelens", [32, 128, 512]),
    "dictionary_learning_matryoshka": ("dictionary_learning", [64, 128, 256, 512, 1024]),
    "sparsify_topk/layers.2": ("sparsify", [512]),
}


@pytest.fixture
def fixtures(shared_data: Path) -> Path:
    return shared_data.parent / "fixtures"


def make_sae() -> MatryoshkaSAE:
    torch.manual_seed(0)
    config = MatryoshkaSAEConfig(
        hidden_size=8, num_latents=32, prefix_sizes=[8, 32], k=4, site="model.layers.1:output"
    )
    sae = MatryoshkaSAE(config).eval()
    sae.threshold.fill_(0.3)
    return sae


def write_sparsify(folder: Path) -> dict[str, torch.Tensor]:
    """A SparseCoder folder in the documented layout, built by hand."""
    generator = torch.Generator().manual_seed(3)
    state = {
        "encoder.weight": torch.randn(32, 8, generator=generator),
        "encoder.bias": torch.randn(32, generator=generator),
        "W_dec": torch.nn.functional.normalize(torch.randn(32, 8, generator=generator), dim=-1),
        "b_dec": torch.randn(8, generator=generator),
    }
    folder.mkdir(parents=True)
    save_file(state, folder / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": 4, "normalize_decoder": True, "num_latents": 32, "k": 4}
    (folder / "cfg.json").write_text(json.dumps(config | {"multi_topk": False, "skip_connection": False, "d_in": 8}))
    return state


@pytest.mark.parametrize("name", FIXTURES)
def test_from_pretrained_converts_every_fixture_and_gives_its_librarys_outputs(fixtures, name):
    library, sizes = FIXTURES[name]
    assert recognise(Files(fixtures / name)) == library
    sae = MatryoshkaSAE.from_pretrained(fixtures / name)
    assert sae.config.prefix_sizes == sizes
    expected = load_file(fixtures / name.split("/")[0] / "expected.safetensors")
    with torch.no_grad():
        latents = sae.encode(expected["x"])
        torch.testing.assert_close(latents, expected["latents"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.decode(latents), expected["reconstruction"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_converted_checkpoint_saves_and_loads_as_one_of_ours(fixtures, name, tmp_path):
    sae = MatryoshkaSAE.from_pretrained(fixtures / name)
    sae.save_pretrained(tmp_path)
    again = MatryoshkaSAE.from_pretrained(tmp_path)
    assert again.config.converted_from == sae.config.converted_from is not None
    assert (again.config.inference, again.config.k) == (sae.config.inference, sae.config.k)
    x = load_file(fixtures / name.split("/")[0] / "expected.safetensors")["x"]
    assert torch.equal(again.encode(x), sae.encode(x))


def test_every_fixture_is_of_one_format_only(fixtures):
    for name, (library, _) in FIXTURES.items():
        found = [other for other in FORMATS if _recognises(other, fixtures / name)]
        assert found == [library]


def _recognises(name: str, folder: Path) -> bool:
    return importlib.import_module(f"hf_msae.formats.{name}").recognises(Files(folder))


def test_a_foreign_repo_loads_over_the_network_whole_or_its_first_latents(hub: LocalHub, tmp_path):
    state = write_sparsify(tmp_path / "layers.2")
    hub.put("someone/coder", {f"layers.2/{p.name}": p.read_bytes() for p in (tmp_path / "layers.2").iterdir()})
    sae = MatryoshkaSAE.from_pretrained("someone/coder", subfolder="layers.2")
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(4))
    pre = torch.relu((x - state["b_dec"]) @ state["encoder.weight"].T + state["encoder.bias"])
    values, places = pre.topk(4)
    expected = torch.zeros_like(pre).scatter(-1, places, values)
    torch.testing.assert_close(sae.encode(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(expected), expected @ state["W_dec"] + state["b_dec"], rtol=1e-5, atol=1e-5)
    small = MatryoshkaSAE.from_pretrained("someone/coder", subfolder="layers.2", prefix=8)
    assert torch.equal(small.encode(x), sae.truncate(8).encode(x))
    hub.stop()
    offline = MatryoshkaSAE.from_pretrained("someone/coder", subfolder="layers.2", local_files_only=True)
    hub.start()
    assert torch.equal(offline.encode(x), sae.encode(x))


def test_the_repos_root_names_the_folders_to_choose_from(hub: LocalHub, tmp_path):
    write_sparsify(tmp_path / "layers.2")
    hub.put("someone/coder", {f"layers.2/{p.name}": p.read_bytes() for p in (tmp_path / "layers.2").iterdir()})
    with pytest.raises(FormatError, match=r"layers\.2"):
        MatryoshkaSAE.from_pretrained("someone/coder")


def test_a_language_models_repo_is_named_as_such(hub: LocalHub):
    hub.put("someone/lm", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"})
    with pytest.raises(FormatError, match="someone/lm holds a llama model, not an SAE"):
        MatryoshkaSAE.from_pretrained("someone/lm")


def test_anything_else_is_said_by_its_files(hub: LocalHub, tmp_path):
    hub.put("someone/notes", {"notes.txt": b"hello", "README.md": b"# Notes"})
    with pytest.raises(FormatError, match=r"holds no SAE that is known here.*notes\.txt"):
        MatryoshkaSAE.from_pretrained("someone/notes")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="no files"):
        MatryoshkaSAE.from_pretrained(tmp_path / "empty")
    (tmp_path / "config.json").write_text("{half")
    with pytest.raises(FormatError, match="is no JSON"):
        MatryoshkaSAE.from_pretrained(tmp_path)


def test_what_is_not_there_raises_as_in_transformers(hub: LocalHub):
    with pytest.raises(OSError, match="someone/nothing"):
        MatryoshkaSAE.from_pretrained("someone/nothing")
    hub.put("someone/coder", {"README.md": b"x"})
    with pytest.raises(OSError, match="v9"):
        MatryoshkaSAE.from_pretrained("someone/coder", revision="v9")
    with pytest.raises(FormatError, match=r"no folder \./nowhere"):
        MatryoshkaSAE.from_pretrained("./nowhere")


def test_another_librarys_loader_is_refused_by_name(tmp_path):
    make_sae().save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"is no SAELens checkpoint: it holds .*config\.json"):
        MatryoshkaSAE.from_saelens(tmp_path)
    with pytest.raises(FormatError, match="can be written for saelens and sparsify"):
        write_library_checkpoint(make_sae(), tmp_path / "x", "openmoss")


def test_no_library_is_given_an_sae_that_needs_the_tokens(tmp_path):
    plain = make_sae()
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**plain.config.to_dict() | {"lookup_size": 30})).eval()
    for name in WRITABLE:
        with pytest.raises(InputError, match=r"cannot express this SAE: it is tokenized"):
            write_library_checkpoint(sae, tmp_path / name, name)
    with pytest.raises(InputError, match="circuit-tracer cannot express this SAE: it is tokenized"):
        write_set([sae], tmp_path / "set")
    with pytest.raises(InputError, match="SAEBench cannot express this SAE: it is tokenized"):
        sae.to_saebench()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["saelens_matryoshka_inference", "sparsify_topk/layers.2"])
def test_the_named_loaders_are_the_recognising_one(fixtures, name):
    library = FIXTURES[name][0]
    named = getattr(MatryoshkaSAE, f"from_{library}")(fixtures / name)
    found = MatryoshkaSAE.from_pretrained(fixtures / name)
    for key, tensor in named.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[key]), key


def test_given_sizes_are_kept_and_contradictions_refused(fixtures, tmp_path, caplog):
    write_sparsify(tmp_path / "layers.2")
    with caplog.at_level(logging.WARNING):
        plain = MatryoshkaSAE.from_pretrained(tmp_path / "layers.2")
    assert plain.config.prefix_sizes == [32]
    nested = MatryoshkaSAE.from_pretrained(tmp_path / "layers.2", prefix_sizes=[4, 16])
    assert nested.config.prefix_sizes == [4, 16, 32]
    with pytest.raises(FormatError, match="records the prefix sizes"):
        MatryoshkaSAE.from_pretrained(fixtures / "saelens_matryoshka_inference", prefix_sizes=[10])


def test_without_the_package_the_methods_say_what_is_missing(monkeypatch):
    sae = make_sae()
    for module in ("formats_module", "publishing_module"):
        monkeypatch.setattr(MatryoshkaSAE, module, None)
    with pytest.raises(ImportError, match="pip install hf-msae"):
        sae.push_to_hub("me/sae")
    with pytest.raises(ImportError, match="pip install hf-msae"):
        MatryoshkaSAE.from_saelens("me/sae")


# Names that people have at hand


GEMMA = ("layer_12/width_16k/average_l0_22", "layer_12/width_16k/average_l0_82", "layer_12/width_16k/average_l0_445")


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize(
    ("folder", "told"),
    [
        (
            "layer_12/width_16k/canonical",
            r"has no folder 'layer_12/width_16k/canonical'; .*layer_12/width_16k holds average_l0_22, average_l0_82, "
            r"average_l0_445\. SAELens calls .* nearest to 100: average_l0_82\.",
        ),
        ("layer_12/width_1m/average_l0_82", r"/layer_12 holds width_16k\.$"),
        ("layer_13/width_16k/canonical", r"scope holds layer_12\.$"),
    ],
)
def test_a_folder_that_is_not_there_is_answered_with_what_is(hub: LocalHub, tmp_path, folder, told, local):
    files = {f"{place}/params.npz": b"x" for place in GEMMA}
    for name, content in files.items():
        (tmp_path / "scope" / name).parent.mkdir(parents=True)
        (tmp_path / "scope" / name).write_bytes(content)
    hub.put("someone/scope", files)
    with pytest.raises(FormatError, match=told):
        MatryoshkaSAE.from_pretrained(tmp_path / "scope" if local else "someone/scope", subfolder=folder)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gemma-scope-2b-pt-res-canonical", "SAELens' name of a release that lies in google/gemma-scope-2b-pt-res:"),
        ("gpt2-small-res-jb", "name of a release in SAELens.*pretrained_saes.yaml.*repo_id"),
        ("gemma-2-2b/12-gemmascope-res-16k", "google/gemma-scope-2b-pt-res.*subfolder='layer_12/width_16k/average_l0"),
        ("gemma-2-9b-it/9-gemmascope-att-131k", "google/gemma-scope-9b-it-att.*subfolder='layer_9/width_131k/"),
        ("gpt2-small/8-res-jb", "looks like an id of Neuronpedia"),
        ("owner/repo/layer_1/width_2", "give owner/repo, with subfolder='layer_1/width_2'"),
    ],
)
def test_names_of_other_places_are_told_from_repos(hub: LocalHub, name, told):
    with pytest.raises(FormatError, match=told):
        MatryoshkaSAE.from_pretrained(name)


# A file in place of its folder


def write_trainer(folder: Path, names: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """A dictionary_learning trainer with the weights of these names, all different."""
    states = {}
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"encoder.weight": (32, 8), "encoder.bias": (32,), "decoder.weight": (8, 32), "decoder.bias": (8,)}
        states[name] = {key: torch.randn(*shape, generator=generator) for key, shape in shapes.items()}
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(states[name], folder / name)
    # Trainers of that library record this class for the other, whose tensors these are.
    trainer = {"dict_class": "AutoEncoder", "lm_name": "gpt2", "dict_size": 32}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return states


@pytest.mark.parametrize("name", ["ae.pt", "checkpoints/ae_0.pt", "checkpoints/ae_30.pt"])
@pytest.mark.parametrize("form", ["path", "subfolder", "repo"])
def test_a_file_of_weights_may_stand_for_its_folder(hub: LocalHub, tmp_path, name, form):
    folder = tmp_path / "trainer_0"
    states = write_trainer(folder, ["ae.pt", "checkpoints/ae_0.pt", "checkpoints/ae_30.pt"])
    if form == "path":
        sae = MatryoshkaSAE.from_pretrained(folder / name)
    elif form == "subfolder":
        sae = MatryoshkaSAE.from_pretrained(tmp_path, subfolder=f"trainer_0/{name}")
    else:
        hub.put(
            "someone/saes", {f"trainer_0/{path}": (folder / path).read_bytes() for path in (*states, "config.json")}
        )
        sae = MatryoshkaSAE.from_pretrained("someone/saes", subfolder=f"trainer_0/{name}")
    assert torch.equal(sae.W_enc, states[name]["encoder.weight"])
    assert (sae.config.base_model, sae.config.activation) == ("gpt2", "relu")


def test_checkpoints_of_a_trainer_are_named_to_choose_from(tmp_path):
    write_trainer(tmp_path, ["checkpoints/ae_100.pt", "checkpoints/ae_30.pt"])
    with pytest.raises(
        FormatError, match=r"no ae\.pt, but 2 .*: checkpoints/ae_30\.pt, checkpoints/ae_100\.pt\. Give"
    ):
        MatryoshkaSAE.from_pretrained(tmp_path)


def test_files_of_ours_and_files_that_are_no_weights_are_told(tmp_path):
    make_sae().save_pretrained(tmp_path / "ours")
    with pytest.raises(FormatError, match=r"model\.safetensors is a file of the SAE in .*ours; give that folder"):
        MatryoshkaSAE.from_pretrained(tmp_path / "ours" / "model.safetensors")
    write_sparsify(tmp_path / "layers.2")
    x = torch.randn(5, 8)
    by_file = MatryoshkaSAE.from_pretrained(tmp_path / "layers.2" / "sae.safetensors")
    assert torch.equal(by_file.encode(x), MatryoshkaSAE.from_pretrained(tmp_path / "layers.2").encode(x))
    with pytest.raises(FormatError, match=r"cfg\.json of .* is not what a sparsify checkpoint keeps its weights in"):
        MatryoshkaSAE.from_pretrained(tmp_path / "layers.2" / "cfg.json")
