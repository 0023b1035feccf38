"""OpenMOSS's Language-Model-SAEs. None is at hand here: the layouts are built by hand as they are documented, and
compared with the formulas in float64, in the scaled units in which these SAEs were trained.
"""

import json
import math

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from hf_msae.formats import openmoss
from hf_msae.formats.common import Files, FormatError
from hf_msae.sites import resolve_site

HOOK = "blocks.1.hook_resid_post"
AVERAGE = 9.0
SCALE = math.sqrt(12) / AVERAGE
CONFIG = {
    "sae_type": "sae",
    "d_model": 12,
    "expansion_factor": 40 / 12,
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "top_k": 7,
    "hook_point_in": HOOK,
    "hook_point_out": HOOK,
    "use_decoder_bias": True,
}
OLD_CONFIG = CONFIG | {
    "d_sae": 40,
    "jump_relu_threshold": 0.5,
    "dataset_average_activation_norm": {"in": AVERAGE, "out": AVERAGE},
}


def change(config, changes):
    return {key: value for key, value in (config | changes).items() if value is not None}


@pytest.fixture
def save(tmp_path, random_weights):
    """Writes the present layout; a key set to None is left out of configuration or tensors."""

    def write(tensors=None, **config):
        folder = tmp_path / "sae"
        folder.mkdir()
        w = random_weights()
        state = {
            "W_E": w["W_enc"],
            "b_E": w["b_enc"],
            "W_D": w["W_dec"],
            "b_D": w["b_dec"],
            "activation_function.log_jumprelu_threshold": w["threshold"].log(),
            f"dataset_average_activation_norm.{HOOK}": torch.tensor(AVERAGE),
        }
        save_file(change(state, tensors or {}), folder / "sae_weights.safetensors")
        (folder / "config.json").write_text(json.dumps(change(CONFIG, config)))
        return folder

    return write


@pytest.fixture
def save_old(tmp_path, random_weights):
    """Writes Llama Scope's layout, with weights of bfloat16."""

    def write(name="Llama3_1-8B-Base-L1R-8x", **config):
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        w = rounded(random_weights())
        state = {
            "encoder.weight": w["W_enc"].T.contiguous(),
            "encoder.bias": w["b_enc"],
            "decoder.weight": w["W_dec"].T.contiguous(),
            "decoder.bias": w["b_dec"],
        }
        save_file(state, folder / "checkpoints" / "final.safetensors")
        (folder / "hyperparams.json").write_text(json.dumps(change(OLD_CONFIG, config)))
        return folder

    return write


def rounded(weights):
    return {name: tensor if name == "x" else tensor.bfloat16().float() for name, tensor in weights.items()}


def scaled(weights, keep, scale=SCALE):
    """The SAE on x·s: latents and reconstruction, both divided by s again, so that they are in units of x."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    pre = w["x"] * scale @ w["W_enc"] + w["b_enc"]
    latents = pre * keep(pre, w["W_dec"].norm(dim=1))
    return latents / scale, (latents @ w["W_dec"] + w["b_dec"]) / scale


class TestPresentLayout:
    @pytest.mark.parametrize("by_norm", [True, False])
    def test_jumprelu(self, save, random_weights, imported, agrees, by_norm):
        w = random_weights()
        sae = imported(save(sparsity_include_decoder_norm=by_norm), "openmoss")
        threshold = w["threshold"].double()
        agrees(sae, w["x"], *scaled(w, lambda pre, norms: pre * (norms if by_norm else 1) > threshold))
        assert (sae.config.activation, sae.config.k, sae.config.prefix_sizes) == ("jumprelu", 7, [40])
        assert sae.config.converted_from == "Language-Model-SAEs"

    def test_jumprelu_whose_scaling_was_folded(self, save, random_weights, imported, agrees):
        w = random_weights()
        sae = imported(save(norm_activation="inference"), "openmoss")
        threshold = w["threshold"].double()
        agrees(sae, w["x"], *scaled(w, lambda pre, norms: pre * norms > threshold, scale=1.0))

    def test_relu_without_decoder_bias(self, save, random_weights, imported, agrees):
        w = random_weights()
        sae = imported(save({"b_D": None}, act_fn="relu", use_decoder_bias=False), "openmoss")
        w["b_dec"] = torch.zeros(12)
        agrees(sae, w["x"], *scaled(w, lambda pre, norms: pre > 0))

    @pytest.mark.parametrize("by_norm", [True, False])
    def test_topk_ranks_by_decoder_norm(self, save, random_weights, imported, agrees, by_norm):
        """Ranking by pre-activation times norm; the norm then moves into the latents' units."""
        w = random_weights()
        sae = imported(save(act_fn="topk", sparsity_include_decoder_norm=by_norm), "openmoss")

        def keep(pre, norms):
            places = (pre * (norms if by_norm else 1)).clamp_min(0).topk(7).indices
            return torch.zeros_like(pre).scatter(-1, places, 1.0) * (pre > 0)

        latents, reconstruction = scaled(w, keep)
        units = w["W_dec"].double().norm(dim=1) if by_norm else 1
        agrees(sae, w["x"], latents * units, reconstruction)
        assert (sae.config.inference, sae.config.k) == ("topk", 7)

    def test_batch_topk_has_no_threshold_and_is_read_only_to_get_one(self, save, random_weights, imported, agrees):
        w = random_weights()
        folder = save(act_fn="batchtopk", sparsity_include_decoder_norm=False)
        with pytest.raises(FormatError, match=r"batch TopK SAE without a threshold.*hf-msae convert .* --measure"):
            imported(folder, "openmoss")
        sae = imported(folder, "openmoss", calibrating=True).eval()
        agrees(sae, w["x"], *scaled(w, lambda pre, norms: pre > 0))
        assert abs(sae.calibrate_threshold([w["x"]]) - 7) < 0.1

    def test_a_latent_that_writes_nothing_is_never_active(self, save, random_weights, imported, agrees):
        w = random_weights()
        w["W_dec"][3] = 0
        sae = imported(save({"W_D": w["W_dec"]}), "openmoss")
        agrees(sae, w["x"], *scaled(w, lambda pre, norms: pre * norms > w["threshold"].double()))

    def test_older_tensor_names(self, save, random_weights, imported, agrees):
        """Those of R1-Distill: nn.Linear weights and log_jumprelu_threshold."""
        w = random_weights()
        names = {
            "W_E": None,
            "b_E": None,
            "W_D": None,
            "b_D": None,
            "activation_function.log_jumprelu_threshold": None,
            "encoder.weight": w["W_enc"].T.contiguous(),
            "encoder.bias": w["b_enc"],
            "decoder.weight": w["W_dec"].T.contiguous(),
            "decoder.bias": w["b_dec"],
            "log_jumprelu_threshold": w["threshold"].log(),
        }
        sae = imported(save(names, sparsity_include_decoder_norm=False), "openmoss")
        agrees(sae, w["x"], *scaled(w, lambda pre, norms: pre > w["threshold"].double()))

    def test_site(self, save, lm):
        converted = openmoss.read(Files(save()))
        assert str(resolve_site(lm, converted.config["site"])) == "model.layers.1:output"
        assert converted.config["base_model"] is None
        assert any("set config.base_model" in note for note in converted.notes)


class TestLlamaScope:
    def test_outputs(self, save_old, random_weights, imported, agrees):
        """Its one threshold is in units of raw activations: SAELens multiplies it by s for an encoder of x·s."""
        w = rounded(random_weights())
        sae = imported(save_old(sparsity_include_decoder_norm=False), "openmoss")
        agrees(sae, w["x"], *scaled(w, lambda pre, norms: pre > 0.5 * SCALE))
        assert (sae.config.base_model, sae.config.site) == ("meta-llama/Llama-3.1-8B", "layers.1")

    @pytest.mark.peer
    def test_saelens_reads_the_same(self, save_old, random_weights, imported, agrees, hub):
        """Beside SAELens' loader of this layout and its folding of s, whose latents are in units of x·s."""
        loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders", reason="needs the package sae-lens")
        from sae_lens import SAE

        folder = save_old(sparsity_include_decoder_norm=False)
        repo = f"{hub.user}/Llama3_1-8B-Base-LXR-8x"
        HfApi().create_repo(repo)
        HfApi().upload_folder(repo_id=repo, folder_path=folder.parent)
        cfg, state, _ = loaders.llama_scope_sae_huggingface_loader(repo, folder.name)
        peer = SAE.from_dict(cfg | {"dtype": "float32"})
        peer.process_state_dict_for_loading(state)
        peer.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        peer.fold_activation_norm_scaling_factor(SCALE)
        x = random_weights()["x"]
        sae = imported(repo, "openmoss", subfolder=folder.name)
        assert sae.config.base_model == "meta-llama/Llama-3.1-8B"
        with torch.no_grad():
            latents = peer.encode(x)
            agrees(sae, x, latents / SCALE, peer.decode(latents))


class TestRecognition:
    def test_its_own(self, save, save_old):
        assert openmoss.recognises(Files(save()))
        assert openmoss.recognises(Files(save_old()))

    def test_not_ours_and_not_something_broken(self, tmp_path):
        (tmp_path / "model.safetensors").touch()
        (tmp_path / "config.json").write_text('{"model_type": "matryoshka_sae"}')
        assert not openmoss.recognises(Files(tmp_path))
        (tmp_path / "sae_weights.safetensors").touch()
        (tmp_path / "config.json").write_text("{")
        assert not openmoss.recognises(Files(tmp_path))


class TestRefusals:
    def refused(self, folder, message):
        with pytest.raises(FormatError, match=message):
            openmoss.read(Files(folder))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"sae_type": "lorsa"}, "sae_type='lorsa'; only 'sae'"),
            ({"sae_type": "clt"}, "sae_type='clt'; only 'sae'"),
            ({"act_fn": "layertopk"}, "act_fn='layertopk'; only relu, jumprelu, topk, batchtopk"),
            ({"norm_activation": "token-wise"}, "norm_activation='token-wise'. Only 'dataset-wise' scaling"),
            ({"norm_activation": None}, "norm_activation=None"),
            ({"use_glu": True}, r"gated \(GLU\) encoder"),
            ({"hook_point_out": "blocks.1.hook_mlp_out"}, "writes blocks.1.hook_mlp_out: a transcoder"),
            ({"hook_point_in": None}, "should say hook_point_in"),
            ({"apply_decoder_bias_to_pre_encoder": True}, "cannot be read without guessing"),
            ({"d_model": 16}, "d_model=16, but sae_weights.safetensors says 12"),
            ({"expansion_factor": 8}, "expansion_factor x d_model=96, but sae_weights.safetensors says 40"),
            ({"act_fn": "topk", "top_k": None}, "should say top_k"),
        ],
    )
    def test_configurations(self, save, config, message):
        self.refused(save(**config), message)

    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            ({"W_E_glu": torch.zeros(12, 40)}, r"gated \(GLU\) encoder"),
            ({f"dataset_average_activation_norm.{HOOK}": None}, "neither its weights nor its configuration hold"),
            ({"activation_function.log_jumprelu_threshold": None}, "is a JumpReLU SAE, but neither"),
            ({"b_D": None}, r"lacks b_D; it holds W_D, W_E"),
            ({"W_D": torch.zeros(40, 2, 12)}, r"W_D of .* has shape \(40, 2, 12\); expected a matrix"),
            ({"b_E": torch.zeros(39)}, r"b_enc should be \(40,\), but is \(39,\)"),
        ],
    )
    def test_tensors(self, save, tensors, message):
        self.refused(save(tensors), message)

    def test_other_containers(self, save):
        folder = save()
        (folder / "sae_weights.safetensors").rename(folder / "sae_weights.dcp")
        assert openmoss.recognises(Files(folder))
        self.refused(folder, "holds sae_weights.dcp; of this library's forms only sae_weights.safetensors")

    def test_truncated_weights(self, save):
        path = save() / "sae_weights.safetensors"
        path.write_bytes(path.read_bytes()[:200])
        self.refused(path.parent, "200 bytes.* is no whole safetensors file")
