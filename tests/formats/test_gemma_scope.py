"""Gemma Scope 1 and 2. Neither release is at hand here: both layouts are built by hand as they are documented, and
compared with the JumpReLU formula in float64.
"""

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from hf_msae.formats import gemma_scope
from hf_msae.formats.common import Files, FormatError
from hf_msae.sites import capture, resolve_site

FIRST = "gemma-scope-2b-pt-res/layer_1/width_16k/average_l0_17"
SECOND = "gemma-scope-2-1b-pt/resid_post/layer_1_width_16k_l0_small"
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


@pytest.fixture
def save_first(tmp_path, random_weights):
    def write(folder=FIRST, lower=False, **more):
        path = tmp_path / folder
        path.mkdir(parents=True)
        weights = random_weights()
        arrays = {name.replace("W_", "w_") if lower else name: weights[name].numpy() for name in NAMES}
        np.savez(path / "params.npz", **(arrays | more))
        return path

    return write


@pytest.fixture
def save_second(tmp_path, random_weights):
    def write(folder=SECOND, config=None, **more):
        path = tmp_path / folder
        path.mkdir(parents=True)
        weights = random_weights()
        save_file({name.lower(): weights[name] for name in NAMES} | more, path / "params.safetensors")
        if config is not None:
            (path / "config.json").write_text(json.dumps(config))
        return path

    return write


def jumprelu(weights):
    """x W_enc + b_enc where it exceeds the threshold; b_dec is not subtracted from the input."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    pre = w["x"] @ w["W_enc"] + w["b_enc"]
    latents = pre.clamp_min(0) * (pre > w["threshold"])
    return latents, latents @ w["W_dec"] + w["b_dec"]


class TestFirst:
    @pytest.mark.parametrize("lower", [False, True])
    def test_outputs(self, save_first, random_weights, imported, agrees, lower):
        weights = random_weights()
        sae = imported(save_first(lower=lower), "gemma_scope")
        agrees(sae, weights["x"], *jumprelu(weights))
        assert (sae.config.activation, sae.config.k, sae.config.prefix_sizes) == ("jumprelu", 17, [40])
        assert not sae.config.apply_b_dec_to_input

    @pytest.mark.parametrize(
        ("folder", "base_model", "site", "resolved"),
        [
            (FIRST, "google/gemma-2-2b", "layers.1:output", "model.layers.1:output"),
            (
                "models--google--gemma-scope-9b-pt-mlp/snapshots/0a/layer_0/width_131k/average_l0_9",
                "google/gemma-2-9b",
                "layers.0.post_feedforward_layernorm:output",
                "model.layers.0.post_feedforward_layernorm:output",
            ),
            (
                "gemma-scope-27b-pt-att/layer_1/width_16k/average_l0_9",
                "google/gemma-2-27b",
                "layers.1.self_attn.o_proj:input",
                "model.layers.1.self_attn.o_proj:input",
            ),
            ("gemma-scope-9b-it-res/layer_1/width_1m/average_l0_9", "google/gemma-2-9b-it", "layers.1:output", None),
        ],
    )
    def test_the_folders_names_say_model_and_site(self, save_first, folder, base_model, site, resolved):
        config = gemma_scope.read(Files(save_first(folder))).config
        assert (config["base_model"], config["site"]) == (base_model, site)
        if resolved is not None:
            tiny = {"hidden_size": 8, "intermediate_size": 8, "head_dim": 4, "num_hidden_layers": 2, "vocab_size": 9}
            lm = Gemma2ForCausalLM(Gemma2Config(num_attention_heads=2, num_key_value_heads=1, **tiny))
            assert str(resolve_site(lm, site)) == resolved

    def test_from_a_repo(self, save_first, tmp_path, random_weights, imported, agrees, hub):
        save_first()
        save_first(FIRST.replace("17", "40"))
        repo = f"{hub.user}/gemma-scope-2b-pt-res"
        HfApi().create_repo(repo)
        HfApi().upload_folder(repo_id=repo, folder_path=tmp_path / "gemma-scope-2b-pt-res")
        with pytest.raises(FormatError, match=f"{repo} holds 2 Gemma Scope checkpoint.*: layer_1/width_16k/average"):
            imported(repo, "gemma_scope")
        sae = imported(repo, "gemma_scope", subfolder="layer_1/width_16k/average_l0_17")
        agrees(sae, random_weights()["x"], *jumprelu(random_weights()))
        assert (sae.config.base_model, sae.config.site) == ("google/gemma-2-2b", "layers.1:output")

    def test_nothing_is_invented_for_a_folder_of_another_name(self, save_first):
        converted = gemma_scope.read(Files(save_first("mine")))
        assert (converted.config["base_model"], converted.config["site"], converted.config["k"]) == (None, None, 32)
        assert any("set config.base_model and config.site" in note for note in converted.notes)
        assert any("placeholder" in note for note in converted.notes)

    def test_nesting_is_said_to_be_unrecorded_unless_given(self, save_first):
        files = Files(save_first())
        assert any("do not record at which sizes" in note for note in gemma_scope.read(files).notes)
        given = gemma_scope.read(files, [10, 20])
        assert given.config["prefix_sizes"] == [10, 20, 40]
        assert not any("nested" in note for note in given.notes)

    def test_embedding_saes_read_the_first_layers_input_as_they_read_the_embedding(
        self, save_first, random_weights, imported
    ):
        """On what a real Gemma 2 hands to its first layer: latents as on rows of the embedding, output √d times it."""
        w = {name: tensor.double() for name, tensor in random_weights().items()}
        sae = imported(save_first("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"), "gemma_scope").double()
        assert (sae.config.site, sae.config.base_model) == ("layers.0:input", "google/gemma-2-2b")
        tiny = {"hidden_size": 12, "intermediate_size": 8, "head_dim": 6, "num_hidden_layers": 1, "vocab_size": 50}
        lm = Gemma2ForCausalLM(Gemma2Config(num_attention_heads=2, num_key_value_heads=1, **tiny)).double().eval()
        with torch.no_grad():
            lm.get_input_embeddings().weight.copy_(w["x"])
            site = resolve_site(lm, sae.config.site)
            x = capture(lm, [site], input_ids=torch.arange(50)[None])[site][0]
            latents, reconstruction = jumprelu(w)
            torch.testing.assert_close(sae.encode(x), latents, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(sae.decode(sae.encode(x)), reconstruction * 12**0.5, rtol=1e-5, atol=1e-5)

    def test_where_no_folder_says_which_layer_there_is_no_site(self, save_first):
        """Nor does one above the repo's."""
        converted = gemma_scope.read(Files(save_first("layer_3/gemma-scope-2b-pt-res/other/width_4k/average_l0_6")))
        assert converted.config["site"] is None
        assert any("No folder says which layer" in note for note in converted.notes)


class TestSecond:
    def test_outputs(self, save_second, random_weights, imported, agrees):
        weights = random_weights()
        sae = imported(save_second(), "gemma_scope")
        agrees(sae, weights["x"], *jumprelu(weights))
        assert (sae.config.base_model, sae.config.site) == ("google/gemma-3-1b-pt", "layers.1:output")

    @pytest.mark.parametrize(
        ("config", "base_model", "site"),
        [
            (
                {"model_name": "gemma-v3-1b-pt", "hf_hook_point_in": "model.layers.1.output", "l0": 22},
                "google/gemma-3-1b-pt",
                "layers.1:output",
            ),
            (
                {"model_name": "google/gemma-3-4b-it", "hf_hook_point_in": "model.layers.1.self_attn.o_proj.input"},
                "google/gemma-3-4b-it",
                "layers.1.self_attn.o_proj:input",
            ),
            (
                {
                    "model_name": "gemma-v3-270m-pt",
                    "hf_hook_point_in": "model.layers.0.post_feedforward_layernorm.output",
                },
                "google/gemma-3-270m",
                "layers.0.post_feedforward_layernorm:output",
            ),
        ],
    )
    def test_the_configuration_says_model_and_site(self, save_second, config, base_model, site):
        found = gemma_scope.read(Files(save_second(config={"architecture": "jump_relu"} | config))).config
        assert (found["base_model"], found["site"]) == (base_model, site)
        assert found["k"] == config.get("l0", 32)
        tiny = {"hidden_size": 8, "intermediate_size": 8, "head_dim": 4, "num_hidden_layers": 2, "vocab_size": 9}
        lm = Gemma3ForCausalLM(Gemma3TextConfig(num_attention_heads=2, num_key_value_heads=1, **tiny))
        assert str(resolve_site(lm, site)) == f"model.{site}"

    @pytest.mark.parametrize(
        ("folder", "site"),
        [
            ("gemma-scope-2-270m-it/attn_out_all/layer_5_width_16k_l0_big", "layers.5.self_attn.o_proj:input"),
            ("gemma-scope-2-270m-it/mlp_out/layer_9_width_65k_l0_big", "layers.9.post_feedforward_layernorm:output"),
        ],
    )
    def test_without_a_configuration_the_folders_names_do(self, save_second, folder, site):
        config = gemma_scope.read(Files(save_second(folder))).config
        assert (config["base_model"], config["site"]) == ("google/gemma-3-270m-it", site)


class TestRefusals:
    def refused(self, folder, message):
        with pytest.raises(FormatError, match=message):
            gemma_scope.read(Files(folder))

    def test_a_repo_of_many(self, save_first, tmp_path):
        save_first()
        save_first(FIRST.replace("17", "40"))
        names = ", ".join(f"layer_1/width_16k/average_l0_{n}" for n in (17, 40))
        self.refused(tmp_path / "gemma-scope-2b-pt-res", f"holds 2 Gemma Scope checkpoint.*subfolder=: {names}")

    @pytest.mark.parametrize(
        "folder",
        ["somewhere/clt/layer_1", "somewhere/crosscoder_all/layer_1"],
    )
    def test_other_kinds_by_their_folder(self, save_first, folder):
        self.refused(save_first(folder), "is a crosscoder or cross-layer transcoder, which reads or writes several")

    def test_other_kinds_by_their_tensors(self, save_second, tmp_path):
        self.refused(
            save_second("a", affine_skip_connection=torch.zeros(12, 12)), "affine_skip_connection, which no SAE of one"
        )
        self.refused(save_second("b", w_dec=torch.zeros(40, 3, 12)), r"w_dec of shape \(40, 3, 12\)")

    def test_other_kinds_by_their_configuration(self, save_second):
        self.refused(save_second("b", {"architecture": "topk"}), "architecture='topk'; Gemma Scope 2's SAEs are")

    def test_pickled_arrays_are_never_run(self, save_first, tmp_path):
        class Touch:
            def __reduce__(self):
                return (open, (str(tmp_path / "executed"), "w"))

        folder = save_first(extra=np.array([Touch()], dtype=object))
        self.refused(folder, r"params\.npz of .* no whole archive of plain numpy arrays.*never read")
        (folder / "params.npz").write_bytes(pickle.dumps(Touch()))
        self.refused(folder, "pickled objects are never read")
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize("keep", [0, 1, 50, 3000])
    def test_truncated_arrays(self, save_first, keep):
        path = save_first() / "params.npz"
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(path.parent, f"params.npz of .*{keep:,} bytes.* no whole archive")

    def test_a_corrupt_array(self, save_first):
        path = save_first() / "params.npz"
        with zipfile.ZipFile(path) as archive:
            start = archive.getinfo("W_dec.npy").header_offset + 400
        content = bytearray(path.read_bytes())
        content[start : start + 8] = b"\xff" * 8
        path.write_bytes(content)
        self.refused(path.parent, "no whole archive of plain numpy arrays.*CRC")

    def test_truncated_tensors(self, save_second):
        path = save_second() / "params.safetensors"
        path.write_bytes(path.read_bytes()[:500])
        self.refused(path.parent, "params.safetensors of .* is no whole safetensors file")

    def test_tensors_that_do_not_belong_together(self, save_first):
        folder = save_first(threshold=np.zeros(39, dtype=np.float32))
        self.refused(folder, r"threshold should be \(40,\), but is \(39,\)")

    def test_missing_arrays(self, tmp_path):
        np.savez(tmp_path / "params.npz", W_enc=np.zeros((2, 3)))
        self.refused(tmp_path, "lacks w_dec, b_enc, b_dec, threshold; it holds w_enc")


@pytest.mark.parametrize(
    ("place", "site", "num_latents"),
    [
        ("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", "layers.12:output", 2**14),
        ("gemma-scope-9b-pt-mlp/layer_3/width_131k/average_l0_9", "layers.3.post_feedforward_layernorm:output", 2**17),
        ("gemma-scope-2-1b-it/resid_post_all/layer_7_width_65k_l0_big", "layers.7:output", 2**16),
        ("gemma-scope-2-270m-pt/resid_post/layer_5_width_262k_l0_small", "layers.5:output", 2**18),
        ("gemma-scope-2-4b-pt/attn_out/layer_9_width_1m_l0_medium", "layers.9.self_attn.o_proj:input", 2**20),
    ],
)
def test_names_outline_an_sae(tmp_path, place, site, num_latents):
    """Hundreds of them are listed without a file being fetched."""
    folder = tmp_path / place
    folder.mkdir(parents=True)
    (folder / ("params.safetensors" if "scope-2-" in place else "params.npz")).touch()
    outline = gemma_scope.outline(Files(folder))
    assert (outline.site, outline.num_latents, outline.prefix_sizes) == (site, num_latents, [num_latents])
    assert outline.base_model.startswith("google/gemma-3-" if "scope-2-" in place else "google/gemma-2-")
