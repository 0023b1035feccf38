"""sparsify's checkpoints, both ways: real ones, ones its own class writes and reads, and layouts built by hand."""

import json

import pytest
import torch
from huggingface_hub import HfApi
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.formats import sparsify
from hf_msae.formats.common import Files, FormatError
from hf_msae.formats.conversion import load_library_checkpoint
from hf_msae.sites import resolve_site

CFG = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": 40,
    "k": 6,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": 12,
}


@pytest.fixture
def save(tmp_path, random_weights):
    """Writes the documented layout with random weights into a folder of the hookpoint's name."""

    def write(hookpoint="layers.2", drop=(), **cfg):
        folder = tmp_path / hookpoint
        folder.mkdir(parents=True)
        weights = random_weights()
        tensors = {
            "encoder.weight": weights["W_enc"].T.contiguous(),
            "encoder.bias": weights["b_enc"],
            "W_dec": weights["W_dec"],
            "b_dec": weights["b_dec"],
        }
        save_file({name: tensor for name, tensor in tensors.items() if name not in drop}, folder / "sae.safetensors")
        (folder / "cfg.json").write_text(json.dumps(CFG | cfg))
        return folder

    return write


def random_sae(seed=0, **config):
    config = {"hidden_size": 12, "num_latents": 40, "k": 5, "activation": "topk", "inference": "topk"} | config
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae


def test_the_real_checkpoint_gives_its_own_outputs(library_checkpoints, imported, reproduces):
    run = library_checkpoints / "sparsify_topk"
    sae = imported(run / "layers.2", "sparsify")
    reproduces(sae, run / "expected.safetensors")
    assert (sae.config.activation, sae.config.inference, sae.config.k) == ("topk", "topk", 8)
    assert sae.config.site == "layers.2:output"
    assert sae.config.prefix_sizes == [512]
    notes = sparsify.read(Files(run / "layers.2")).notes
    assert any("not recorded" in note for note in notes)
    assert sparsify.read(Files(run, subfolder="layers.2"), [64, 512]).config["prefix_sizes"] == [64, 512]


def test_the_documented_layout_gives_the_formulas_values(save, random_weights, imported, agrees):
    """Built by hand: relu(W (x - b_dec) + b), the k largest of each token, decoded; in float64."""
    w = {name: tensor.double() for name, tensor in random_weights().items()}
    acts = ((w["x"] - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).clamp_min(0)
    values, places = acts.topk(6, dim=-1)
    latents = torch.zeros_like(acts).scatter(-1, places, values)
    sae = imported(save(), "sparsify")
    agrees(sae, w["x"].float(), latents, latents @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize(
    "cfg",
    [{"num_latents": 0, "expansion_factor": 40 / 12}, {"multi_topk": True}, {"signed": False}, {"later_key": 1}],
)
def test_forms_of_the_configuration(save, cfg):
    """num_latents may be derived, multi_topk only changes training, old files have `signed`, others unknown keys."""
    converted = sparsify.read(Files(save(**cfg)))
    assert (converted.config["num_latents"], converted.config["hidden_size"], converted.config["k"]) == (40, 12, 6)


@pytest.mark.parametrize(
    ("folder", "site"),
    [
        ("layers.10", "layers.10:output"),
        ("h.3.mlp", "h.3.mlp:output"),
        ("layers.10.mlp/seed1", "layers.10.mlp:output"),
        ("my-sae", None),
    ],
)
def test_the_site_is_the_folders_name(save, folder, site):
    converted = sparsify.read(Files(save(folder)))
    assert converted.config["site"] == site
    assert any("set config.site" in note for note in converted.notes) == (site is None)


def test_the_site_is_found_in_a_model(save, lm):
    converted = sparsify.read(Files(save("layers.1.mlp")))
    assert str(resolve_site(lm, converted.config["site"])) == "model.layers.1.mlp:output"


@pytest.mark.parametrize("hookpoint", ["layers.2", "layers.2/seed3"])
def test_the_runs_root_says_the_language_model(save, tmp_path, hookpoint):
    folder = save(hookpoint)
    (tmp_path / "config.json").write_text(json.dumps({"sae": {}, "model": "EleutherAI/pythia-160m", "ctx_len": 2048}))
    config = sparsify.read(Files(folder)).config
    assert (config["base_model"], config["context_length"]) == ("EleutherAI/pythia-160m", 2048)


def test_the_runs_root_in_a_repo(save, tmp_path, imported, hub):
    save("layers.1.mlp")
    (tmp_path / "config.json").write_text(json.dumps({"sae": {}, "model": "gpt2", "ctx_len": 64}))
    repo = f"{hub.user}/sparse-coders"
    HfApi().create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=tmp_path)
    config = imported(repo, "sparsify", subfolder="layers.1.mlp").config
    assert (config.base_model, config.context_length, config.site) == ("gpt2", 64, "layers.1.mlp:output")


def test_another_config_above_the_folder_is_not_taken_for_the_runs(save, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": "gpt2"}))
    assert sparsify.read(Files(save())).config["base_model"] is None


class TestRecognition:
    def test_its_own(self, save):
        assert sparsify.recognises(Files(save()))

    def test_a_run(self, save, tmp_path):
        save()
        assert sparsify.recognises(Files(tmp_path))

    def test_not_saelens(self, tmp_path):
        (tmp_path / "cfg.json").write_text("{}")
        (tmp_path / "sae_weights.safetensors").touch()
        assert not sparsify.recognises(Files(tmp_path))


class TestRefusals:
    def refused(self, folder, message, prefix_sizes=None):
        with pytest.raises(FormatError, match=message):
            sparsify.read(Files(folder), prefix_sizes)

    def test_a_run_of_many_hookpoints(self, save, tmp_path):
        save("layers.10")
        save("layers.2")
        self.refused(tmp_path, r"holds 2 sparsify checkpoint.*subfolder=: layers\.2, layers\.10\.")

    @pytest.mark.parametrize(
        ("cfg", "message"),
        [
            ({"transcode": True, "skip_connection": True}, "lacks W_skip"),
            ({"skip_connection": True}, "skip_connection=true: it adds a linear map"),
            ({"signed": True}, "signed=true: it ranks latents by magnitude"),
            ({"activation": "groupmax"}, "activation='groupmax'; only 'topk' has an equal"),
            ({"k": None}, "should say k.* k=None"),
            ({"d_in": 13}, "d_in=13, but sae.safetensors says 12"),
            ({"num_latents": 41}, "num_latents=41, but sae.safetensors says 40"),
            ({"num_latents": 0}, "expansion_factor x d_in=384, but sae.safetensors says 40"),
        ],
    )
    def test_configurations(self, save, cfg, message):
        self.refused(save(**cfg), message)

    def test_missing_tensors(self, save):
        self.refused(save(drop=("W_dec",)), r"lacks W_dec; it holds b_dec, encoder\.bias, encoder\.weight")

    def test_missing_configuration(self, save):
        folder = save()
        (folder / "cfg.json").unlink()
        self.refused(folder, "no cfg.json beside it")

    @pytest.mark.parametrize("keep", [0, 4, 100, 3000])
    def test_truncated_weights(self, save, keep):
        folder = save()
        path = folder / "sae.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(folder, rf"sae\.safetensors of .*{keep:,} bytes.* is no whole safetensors file.*fetch it again")

    def test_prefix_sizes_that_contradict_the_file(self, save):
        self.refused(save(prefix_sizes=[10, 40]), r"records the prefix sizes \[10, 40\]", [20, 40])


class TestExport:
    def test_there_and_back(self, tmp_path, imported):
        sae = random_sae(prefix_sizes=[8, 20, 40])
        sparsify.write(sae, tmp_path / "layers.3")
        back = imported(tmp_path / "layers.3", "sparsify")
        assert back.config.prefix_sizes == [8, 20, 40]
        assert (back.config.k, back.config.inference, back.config.site) == (5, "topk", "layers.3:output")
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            assert torch.equal(back.get_parameter(name), sae.get_parameter(name))

    @settings(max_examples=15, deadline=None)
    @given(
        hidden_size=st.integers(2, 9),
        num_latents=st.integers(4, 30),
        data=st.data(),
        subtract=st.booleans(),
        seed=st.integers(0, 99),
    )
    def test_there_and_back_computes_the_same(self, tmp_path_factory, hidden_size, num_latents, data, subtract, seed):
        k = data.draw(st.integers(1, num_latents))
        inner = data.draw(st.sets(st.integers(1, num_latents - 1), max_size=3))
        sizes = [*sorted(inner), num_latents]
        sae = random_sae(
            seed,
            hidden_size=hidden_size,
            num_latents=num_latents,
            k=k,
            prefix_sizes=sizes,
            apply_b_dec_to_input=subtract,
        )
        folder = tmp_path_factory.mktemp("export") / "layers.0"
        sparsify.write(sae, folder)
        back = load_library_checkpoint(MatryoshkaSAE, folder, "sparsify")
        x = torch.randn(7, hidden_size, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            torch.testing.assert_close(back.encode(x), sae.encode(x), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(back.decode(back.encode(x)), sae.decode(sae.encode(x)), atol=1e-5, rtol=1e-5)
        assert back.config.prefix_sizes == sizes

    @pytest.mark.parametrize("activation", ["batch_topk", "jumprelu", "relu"])
    def test_thresholds_are_refused_and_nothing_is_written(self, tmp_path, activation):
        sae = random_sae(activation=activation, inference="threshold")
        with pytest.raises(ValueError, match=f"only TopK SAEs.*activation='{activation}'.*to_saelens"):
            sparsify.write(sae, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_a_topk_sae_with_a_threshold_goes_by_rank_there_and_a_warning_says_so(self, tmp_path, imported, caplog):
        sae = random_sae(inference="threshold")
        sparsify.write(sae, tmp_path / "layers.0")
        assert "sparsify will keep the 5 largest of each token instead" in caplog.text
        cfg = json.loads((tmp_path / "layers.0" / "cfg.json").read_text())
        del cfg["hf_msae"]  # which sparsify does not read
        (tmp_path / "layers.0" / "cfg.json").write_text(json.dumps(cfg))
        x = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            latents = imported(tmp_path / "layers.0", "sparsify").encode(x)
            torch.testing.assert_close(latents, sae.train().encode(x), atol=1e-5, rtol=1e-5)

    def test_an_existing_folder_is_not_overwritten(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("keep")
        with pytest.raises(FileExistsError, match="is not an empty folder; name another"):
            sparsify.write(random_sae(), tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.peer
class TestPeer:
    """Beside sparsify's own class, where it is installed."""

    @pytest.fixture
    def peer(self):
        return pytest.importorskip("sparsify", reason="needs the package eai-sparsify")

    def outputs(self, coder, x):
        """Dense latents and reconstruction, by sparsify's encoder and decoder."""
        with torch.no_grad():
            values, places, _ = coder.encode(x)
            latents = torch.zeros(*x.shape[:-1], coder.num_latents).scatter(-1, places, values)
            return latents, coder.decode(values, places)

    @pytest.mark.parametrize("cfg", [{"num_latents": 40}, {"expansion_factor": 3, "normalize_decoder": False}])
    def test_what_it_writes_is_read(self, peer, tmp_path, random_weights, imported, agrees, cfg):
        torch.manual_seed(0)
        coder = peer.SparseCoder(12, peer.SparseCoderConfig(k=6, **cfg))
        with torch.no_grad():
            for parameter in coder.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        coder.save_to_disk(tmp_path / "layers.1")
        x = random_weights()["x"]
        agrees(imported(tmp_path / "layers.1", "sparsify"), x, *self.outputs(coder, x))

    @pytest.mark.parametrize("subtract", [True, False])
    def test_what_we_write_it_reads(self, peer, tmp_path, random_weights, agrees, subtract):
        sae = random_sae(apply_b_dec_to_input=subtract, prefix_sizes=[8, 40])
        sparsify.write(sae, tmp_path / "layers.1")
        coder = peer.SparseCoder.load_from_disk(tmp_path / "layers.1")
        x = random_weights()["x"]
        agrees(sae, x, *self.outputs(coder, x))
        assert peer.SparseCoder.load_many(str(tmp_path), local=True).keys() == {"layers.1"}
