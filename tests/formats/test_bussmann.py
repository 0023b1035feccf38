"""The original Matryoshka code's checkpoints. None is at hand here: the layout is built by hand as it is documented,
and compared with the formula in float64.
"""

import json
import os

import pytest
import torch

from hf_msae.formats import bussmann
from hf_msae.formats.common import Files, FormatError
from hf_msae.sites import resolve_site

CONFIG = {
    "seed": 49,
    "sae_type": "global-matryoshka-topk",
    "model_name": "gpt2-small",
    "site": "resid_pre",
    "layer": 8,
    "hook_point": "blocks.8.hook_resid_pre",
    "act_size": 12,
    "dict_size": 40,
    "group_sizes": [5, 15, 20],
    "top_k": 6,
    "input_unit_norm": False,
    "dtype": torch.float32,
    "seq_len": 128,
    "device": "cuda:0",
}


@pytest.fixture
def save(tmp_path, random_weights):
    """Writes `sae.pt` and a configuration with every value turned into a string; None leaves a key out."""

    def write(state=None, name="run_100", **config):
        folder = tmp_path / name
        folder.mkdir()
        weights = random_weights()
        tensors = {key: weights[key] for key in ("W_enc", "W_dec", "b_enc", "b_dec")}
        torch.save(tensors | {"threshold": torch.tensor(0.4)} | (state or {}), folder / "sae.pt")
        values = {key: str(value) for key, value in (CONFIG | config).items() if value is not None}
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return write


def test_outputs_ignore_the_encoder_bias_as_the_original_does(save, random_weights, imported, agrees):
    w = {name: tensor.double() for name, tensor in random_weights().items()}
    acts = ((w["x"] - w["b_dec"]) @ w["W_enc"]).clamp_min(0)
    latents = acts * (acts > 0.4)
    sae = imported(save(), "bussmann")
    agrees(sae, w["x"].float(), latents, latents @ w["W_dec"] + w["b_dec"])
    for size, level in zip([5, 20, 40], sae.decode_levels(sae.encode(w["x"].float())), strict=True):
        expected = latents[:, :size] @ w["W_dec"][:size] + w["b_dec"]
        torch.testing.assert_close(level, expected.float(), atol=1e-5, rtol=1e-5)


def test_the_strings_of_the_configuration_are_read(save, imported):
    config = imported(save(), "bussmann").config
    assert config.prefix_sizes == [5, 20, 40]
    assert (config.k, config.activation, config.apply_b_dec_to_input) == (6, "batch_topk", True)
    assert (config.base_model, config.site, config.context_length) == ("gpt2", "layers.8:input", 128)
    assert config.converted_from == "matryoshka_sae"


@pytest.mark.parametrize(
    ("place", "site"),
    [
        ({"hook_point": "blocks.1.hook_resid_post"}, "layers.1"),
        ({"hook_point": None, "site": "mlp_out", "layer": 1}, "layers.1.mlp"),
        ({"hook_point": "blocks.1.hook_nothing"}, None),
    ],
)
def test_sites(save, lm, place, site):
    converted = bussmann.read(Files(save(**place)))
    assert converted.config["site"] == site
    assert any("set config.site" in note for note in converted.notes) == (site is None)
    if site is not None:
        assert str(resolve_site(lm, site)).startswith("model.layers.1")


def test_notes_say_what_a_reader_must_know(save):
    notes = " ".join(bussmann.read(Files(save())).notes)
    assert "encoder bias is not zero" in notes
    assert "mean subtracted first" in notes
    assert "calibrate_threshold" not in notes
    untrained = {"threshold": torch.tensor(0.0), "b_enc": torch.zeros(40)}
    notes = " ".join(bussmann.read(Files(save(untrained, "untrained"))).notes)
    assert "calibrate_threshold" in notes
    assert "encoder bias" not in notes


@pytest.mark.parametrize("groups", [[5, 15, 20], [3, 4], None])
@pytest.mark.parametrize("kind", ["batch-topk", "topk", "vanilla"])
def test_the_class_is_what_sae_type_says_whatever_group_sizes_the_configuration_holds(save, groups, kind):
    converted = bussmann.read(Files(save(sae_type=kind, group_sizes=groups)))
    assert converted.config["prefix_sizes"] == [40]
    assert converted.config["activation"] == {"batch-topk": "batch_topk", "topk": "topk", "vanilla": "relu"}[kind]


def test_unrecorded_groups_are_asked_for_and_taken(save):
    files = Files(save(group_sizes=None))
    with pytest.raises(FormatError, match=r"Matryoshka SAE of 40 latents, but its files do not say .*--prefix-sizes"):
        bussmann.read(files)
    assert bussmann.read(files, [8, 40]).config["prefix_sizes"] == [8, 40]


class TestRefusals:
    def refused(self, folder, message, prefix_sizes=None):
        with pytest.raises(FormatError, match=message):
            bussmann.read(Files(folder), prefix_sizes)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"input_unit_norm": True}, "input_unit_norm=True: each token is normalised .* No weights can take"),
            ({"input_unit_norm": None}, "input_unit_norm=None"),
            (
                {"sae_type": "jumprelu"},
                "sae_type='jumprelu'; of this code's SAEs, the Matryoshka classes and batch-topk",
            ),
            ({"sae_type": None}, "sae_type=None; of this code's"),
            ({"tied_weights": True}, "tied_weights=True, so its decoder is not the W_dec"),
            ({"activation": "gelu"}, "activation='gelu'; only 'relu'"),
            ({"sae_type": "batch-topk", "dict_size": 99}, "dict_size=99, but sae.pt says 40"),
            ({"group_sizes": [5, 15]}, r"group_sizes=\[5, 15\] sum to 20, but sae.pt has 40 latents"),
            ({"group_sizes": "__import__('os').getcwd()"}, 'group_sizes="__import__.*expected a list'),
            ({"group_sizes": [40, 0]}, r"group_sizes=\[40, 0\]; expected a list"),
            ({"act_size": 768}, "act_size=768, but sae.pt says 12"),
            ({"top_k": None}, "should say top_k"),
        ],
    )
    def test_configurations(self, save, config, message):
        self.refused(save(**config), message)

    def test_prefix_sizes_that_contradict_the_file(self, save):
        self.refused(save(), r"records the prefix sizes \[5, 20, 40\]", [10, 40])

    def test_missing_configuration(self, save):
        folder = save()
        (folder / "config.json").unlink()
        self.refused(folder, "no config.json beside it")

    def test_a_folder_of_many_checkpoints(self, save, tmp_path):
        save(name="run_100")
        save(name="run_200")
        self.refused(tmp_path, "holds 2 matryoshka_sae checkpoint.*subfolder=: run_100, run_200")

    def test_a_pickle_with_code_is_never_run(self, save, tmp_path):
        class Touch:
            def __reduce__(self):
                return (os.system, (f"touch {tmp_path / 'executed'}",))

        self.refused(save({"more": Touch()}), "would run .*system")
        assert not (tmp_path / "executed").exists()

    def test_missing_and_unfitting_tensors(self, save, tmp_path):
        self.refused(save({"b_dec": torch.zeros(11)}, "unfitting"), r"b_dec should be \(12,\), but is \(11,\)")
        folder = save(name="missing")
        torch.save({"W_enc": torch.zeros(2, 3)}, folder / "sae.pt")
        self.refused(folder, "lacks W_dec, b_enc, b_dec, threshold; it holds W_enc")

    def test_a_truncated_file(self, save):
        path = save() / "sae.pt"
        path.write_bytes(path.read_bytes()[:1000])
        self.refused(path.parent, "sae.pt of .*1,000 bytes.* no whole PyTorch file")
