"""dictionary_learning's checkpoints: real ones, ones its own classes write, and layouts built here by hand.

Where the package is installed, its classes write the files and give the expected outputs. Elsewhere the documented
layouts are built by hand and compared with the formulas in float64.
"""

import json
import os

import pytest
import torch

from hf_msae.formats import dictionary_learning
from hf_msae.formats.common import Files, FormatError


@pytest.fixture
def save(tmp_path):
    """Writes `ae.pt` and, unless `trainer` is None, `config.json` into a new folder."""

    def write(state, trainer, buffer=None):
        folder = tmp_path / f"trainer_{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        torch.save(state, folder / "ae.pt")
        if trainer is not None:
            config = {"trainer": trainer} | ({"buffer": buffer} if buffer else {})
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


def plain(weights, **more):
    """The tensors of the classes that keep plain matrices."""
    return {name: weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")} | more


def linear(weights, b_dec="b_dec", **more):
    """The tensors of the classes that keep nn.Linear layers."""
    return {
        "encoder.weight": weights["W_enc"].T.contiguous(),
        "encoder.bias": weights["b_enc"],
        "decoder.weight": weights["W_dec"].T.contiguous(),
        b_dec: weights["b_dec"],
    } | more


def dense(weights, keep, subtract=True):
    """Latents and reconstruction in float64; `keep` selects from the positive part of the pre-activations."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    pre = (w["x"] - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"]
    latents = keep(pre.clamp_min(0))
    return latents, latents @ w["W_dec"] + w["b_dec"]


def above(threshold):
    return lambda acts: acts * (acts > threshold)


def largest(k):
    def keep(acts):
        values, places = acts.topk(k, dim=-1)
        return torch.zeros_like(acts).scatter(-1, places, values)

    return keep


GROUPS = torch.tensor([5, 15, 20])


def matryoshka(weights, threshold=0.4):
    return plain(weights, k=torch.tensor(4, dtype=torch.int), threshold=torch.tensor(threshold), group_sizes=GROUPS)


def test_the_real_checkpoint_gives_its_own_outputs(library_checkpoints, imported, reproduces):
    folder = library_checkpoints / "dictionary_learning_matryoshka"
    sae = imported(folder, "dictionary_learning")
    reproduces(sae, folder / "expected.safetensors")
    assert sae.config.prefix_sizes == [64, 128, 256, 512, 1024]
    assert (sae.config.k, sae.config.activation, sae.config.inference) == (8, "batch_topk", "threshold")
    assert sae.config.converted_from == "dictionary_learning"
    assert sae.config.context_length == 256
    # It says layer 3 and no submodule, and is of the third layer, counted from one: a layer alone is no site.
    assert sae.config.site is None


def test_the_real_checkpoints_prefixes_are_its_first_latents(library_checkpoints, imported):
    folder = library_checkpoints / "dictionary_learning_matryoshka"
    sae = imported(folder, "dictionary_learning")
    weights = torch.load(folder / "ae.pt", weights_only=True)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    acts = torch.relu((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    acts = acts * (acts > weights["threshold"])
    with torch.no_grad():
        levels = sae.decode_levels(sae.encode(x))
    for size, level in zip([64, 128, 256, 512, 1024], levels, strict=True):
        torch.testing.assert_close(
            level, acts[:, :size] @ weights["W_dec"][:size] + weights["b_dec"], atol=1e-5, rtol=1e-5
        )


class TestLayoutsBuiltByHand:
    def test_matryoshka(self, save, random_weights, imported, agrees):
        weights = random_weights()
        trainer = {
            "dict_class": "MatryoshkaBatchTopKSAE",
            "activation_dim": 12,
            "dict_size": 40,
            "k": 4,
            "group_sizes": [5, 15, 20],
            "lm_name": "google/gemma-2-2b",
            "layer": 12,
            "submodule_name": "resid_post_layer_12",
        }
        folder = save(matryoshka(weights), trainer, {"io": "out", "ctx_len": 128})
        sae = imported(folder, "dictionary_learning")
        agrees(sae, weights["x"], *dense(weights, above(0.4)))
        assert sae.config.prefix_sizes == [5, 20, 40]
        assert (sae.config.base_model, sae.config.site) == ("google/gemma-2-2b", "layers.12")
        assert sae.config.context_length == 128

    def test_matryoshka_is_known_by_its_tensors_alone(self, save, random_weights, imported, agrees):
        weights = random_weights()
        sae = imported(save(matryoshka(weights), None), "dictionary_learning")
        agrees(sae, weights["x"], *dense(weights, above(0.4)))
        assert sae.config.prefix_sizes == [5, 20, 40]

    @pytest.mark.parametrize("threshold", [0.35, -1.0])
    def test_batch_topk(self, save, random_weights, imported, agrees, threshold):
        weights = random_weights()
        state = linear(weights, k=torch.tensor(6, dtype=torch.int), threshold=torch.tensor(threshold))
        folder = save(state, {"dict_class": "BatchTopKSAE", "k": 6})
        sae = imported(folder, "dictionary_learning")
        agrees(sae, weights["x"], *dense(weights, above(threshold)))
        assert (sae.config.activation, sae.config.k, sae.config.prefix_sizes) == ("batch_topk", 6, [40])
        notes = " ".join(dictionary_learning.read(Files(folder)).notes)
        assert ("threshold was never estimated" in notes) == (threshold < 0)
        assert "one level" in notes

    @pytest.mark.parametrize("more", [{}, {"k": torch.tensor(6), "threshold": torch.tensor(-1.0)}])
    def test_topk_goes_by_rank(self, save, random_weights, imported, agrees, more):
        """Releases before 0.1 keep k in the configuration only."""
        weights = random_weights()
        sae = imported(save(linear(weights, **more), {"dict_class": "AutoEncoderTopK", "k": 6}), "dictionary_learning")
        agrees(sae, weights["x"], *dense(weights, largest(6)))
        assert (sae.config.activation, sae.config.inference, sae.config.k) == ("topk", "topk", 6)

    def test_jumprelu_does_not_subtract_b_dec(self, save, random_weights, imported, agrees):
        weights = random_weights()
        state = plain(weights, threshold=weights["threshold"])
        sae = imported(save(state, {"dict_class": "JumpReluAutoEncoder", "target_l0": 20}), "dictionary_learning")
        agrees(sae, weights["x"], *dense(weights, above(weights["threshold"].double()), subtract=False))
        assert (sae.config.activation, sae.config.k) == ("jumprelu", 20)

    def test_standard_gets_unit_decoder_rows_as_its_loader_gives_them(self, save, random_weights, imported, agrees):
        weights = random_weights()
        folder = save(linear(weights, "bias"), {"dict_class": "AutoEncoder", "trainer_class": "PAnnealTrainer"})
        sae = imported(folder, "dictionary_learning")
        latents, reconstruction = dense(weights, lambda acts: acts)
        agrees(sae, weights["x"], latents * weights["W_dec"].double().norm(dim=1), reconstruction)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
        assert sae.config.activation == "relu"
        assert any("norm 1" in note for note in dictionary_learning.read(Files(folder)).notes)

    def test_april_update_class(self, save, random_weights, imported, agrees):
        weights = random_weights()
        sae = imported(save(linear(weights, "decoder.bias"), {"dict_class": "AutoEncoderNew"}), "dictionary_learning")
        agrees(sae, weights["x"], *dense(weights, lambda acts: acts, subtract=False))

    def test_backup_folds_the_norm_factor(self, save, random_weights, imported, agrees):
        """A backup sees activations divided by norm_factor; in their own units everything is norm_factor larger."""
        weights = random_weights()
        factor = 7.5
        backup = {
            "step": 300,
            "ae": matryoshka(weights),
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
            "config": {"dict_class": "MatryoshkaBatchTopKSAE", "k": 4, "lm_name": "gpt2"},
            "norm_factor": factor,
        }
        folder = save(backup, None)
        sae = imported(folder, "dictionary_learning")
        latents, reconstruction = dense(weights, above(0.4))
        agrees(sae, weights["x"] * factor, latents * factor, reconstruction * factor)
        assert sae.config.base_model == "gpt2"
        assert any("step 300" in note for note in dictionary_learning.read(Files(folder)).notes)


@pytest.mark.parametrize(
    ("submodule", "io", "site"),
    [
        ("resid_post_layer_12", "out", "layers.12"),
        ("resid_pre_layer_3", "out", "layers.3:input"),
        ("mlp_layer_7", "out", "layers.7.mlp"),
        ("mlp_layer_7", "in", "layers.7.mlp:input"),
        ("attn_out_layer_0", "out", "layers.0.attn"),
        ("attention_5", "out", "layers.5.attn"),
        ("somewhere", "out", None),
        (None, "out", None),
    ],
)
def test_sites(save, random_weights, submodule, io, site):
    state = linear(random_weights(), k=torch.tensor(6), threshold=torch.tensor(0.1))
    trainer = {"dict_class": "BatchTopKSAE", "submodule_name": submodule}
    converted = dictionary_learning.read(Files(save(state, trainer, {"io": io})))
    assert converted.config["site"] == site
    assert any("set config.site" in note for note in converted.notes) == (site is None)


class TestRefusals:
    def refused(self, folder, message, prefix_sizes=None):
        with pytest.raises(FormatError, match=message):
            dictionary_learning.read(Files(folder), prefix_sizes)

    def test_gated(self, save, random_weights):
        weights = random_weights()
        state = {"r_mag": torch.zeros(40), "encoder.weight": weights["W_enc"].T}
        self.refused(save(state, {"dict_class": "GatedAutoEncoder"}), "is a gated SAE")

    def test_transcoder(self, save, random_weights):
        folder = save(matryoshka(random_weights()), {}, {"io": "in_and_out"})
        self.refused(folder, "is a transcoder")

    def test_a_pickle_with_code_is_never_run(self, save, tmp_path):
        class Touch:
            def __reduce__(self):
                return (os.system, (f"touch {tmp_path / 'executed'}",))

        folder = save({"W_enc": Touch()}, {"dict_class": "MatryoshkaBatchTopKSAE"})
        self.refused(folder, "would run .*system")
        assert not (tmp_path / "executed").exists()

    def test_topk_and_batch_topk_cannot_be_told_apart_without_the_configuration(self, save, random_weights):
        state = linear(random_weights(), k=torch.tensor(6), threshold=torch.tensor(0.1))
        self.refused(save(state, None), "BatchTopKSAE or AutoEncoderTopK, which only config.json can tell")

    @pytest.mark.parametrize(
        ("trainer", "message"),
        [
            ({"dict_class": "AutoEncoder"}, r"dict_class='AutoEncoder', but ae.pt holds .* MatryoshkaBatchTopKSAE"),
            ({"dict_size": 41}, r"dict_size=41, but ae.pt says 40"),
            ({"activation_dim": 16}, r"activation_dim=16, but ae.pt says 12"),
            ({"k": 5}, r"k=5, but ae.pt says 4"),
            ({"group_sizes": [20, 20]}, r"group_sizes=\[20, 20\], but ae.pt says \[5, 15, 20\]"),
            ({"layer": 3, "submodule_name": "resid_post_layer_4"}, r"layer=3, but submodule_name says 4"),
            ({"dict_class": "CrossCoder"}, r"dict_class='CrossCoder' and the tensors W_dec, W_enc.* can be read"),
        ],
    )
    def test_configuration_and_weights_that_disagree(self, save, random_weights, trainer, message):
        self.refused(save(matryoshka(random_weights()), trainer), message)

    def test_groups_that_do_not_fill_the_dictionary(self, save, random_weights):
        state = matryoshka(random_weights()) | {"group_sizes": torch.tensor([5, 15])}
        self.refused(save(state, {}), r"group_sizes=\[5, 15\] should be positive and sum to the 40 latents")

    def test_prefix_sizes_that_contradict_the_file(self, save, random_weights):
        self.refused(save(matryoshka(random_weights()), {}), r"records the prefix sizes \[5, 20, 40\]", [10, 40])

    def test_tensors_that_do_not_belong_together(self, save, random_weights):
        state = matryoshka(random_weights()) | {"W_dec": torch.zeros(39, 12)}
        self.refused(save(state, {}), r"W_dec should be \(40, 12\), but is \(39, 12\)")

    def test_a_truncated_file(self, save, random_weights):
        folder = save(matryoshka(random_weights()), {})
        content = (folder / "ae.pt").read_bytes()
        (folder / "ae.pt").write_bytes(content[: len(content) // 2])
        self.refused(folder, "no whole PyTorch file")

    def test_a_broken_configuration(self, save, random_weights):
        folder = save(matryoshka(random_weights()), {})
        (folder / "config.json").write_text('{"trainer": ')
        self.refused(folder, "config.json of .* is no JSON that can be read")

    def test_a_folder_of_many_trainers(self, save, random_weights, imported):
        first = save(matryoshka(random_weights()), {})
        save(matryoshka(random_weights(seed=1)), {})
        self.refused(first.parent, "holds 2 dictionary_learning checkpoint.*subfolder=: trainer_0, trainer_1")
        assert imported(first.parent, "dictionary_learning", subfolder="trainer_1").config.num_latents == 40


@pytest.mark.peer
class TestPeer:
    """Files that the library's own classes write, beside what these classes compute."""

    @pytest.fixture
    def peer(self):
        return pytest.importorskip("dictionary_learning", reason="needs the package dictionary-learning")

    def compare(self, peer_sae, trainer, save, random_weights, imported, agrees, **encode):
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in peer_sae.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        folder = save(peer_sae.state_dict(), trainer)
        if trainer["dict_class"] == "AutoEncoder":
            peer_sae = type(peer_sae).from_pretrained(folder / "ae.pt")
        x = random_weights()["x"]
        with torch.no_grad():
            latents = peer_sae.encode(x, **encode)
            agrees(imported(folder, "dictionary_learning"), x, latents, peer_sae.decode(latents))

    def test_matryoshka(self, peer, save, random_weights, imported, agrees):
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE

        sae = MatryoshkaBatchTopKSAE(12, 40, k=4, group_sizes=[5, 15, 20])
        sae.threshold.fill_(0.5)
        self.compare(sae, {"dict_class": "MatryoshkaBatchTopKSAE"}, save, random_weights, imported, agrees)

    @pytest.mark.parametrize("threshold", [0.5, -1.0])
    def test_batch_topk(self, peer, save, random_weights, imported, agrees, threshold):
        from dictionary_learning.trainers.batch_top_k import BatchTopKSAE

        sae = BatchTopKSAE(12, 40, k=4)
        sae.threshold.fill_(threshold)
        self.compare(sae, {"dict_class": "BatchTopKSAE"}, save, random_weights, imported, agrees)

    def test_topk(self, peer, save, random_weights, imported, agrees):
        from dictionary_learning.trainers.top_k import AutoEncoderTopK

        self.compare(
            AutoEncoderTopK(12, 40, k=4), {"dict_class": "AutoEncoderTopK"}, save, random_weights, imported, agrees
        )

    @pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderNew", "JumpReluAutoEncoder"])
    def test_classes_without_k(self, peer, save, random_weights, imported, agrees, name, capsys):
        from dictionary_learning import dictionary

        self.compare(getattr(dictionary, name)(12, 40), {"dict_class": name}, save, random_weights, imported, agrees)

    def test_a_trained_sae_from_the_librarys_own_training_loop(self, peer, tmp_path, random_weights, imported, agrees):
        """Activations scaled by the library while it trains, and folded by it when it saves."""
        from dictionary_learning.trainers.matryoshka_batch_top_k import (
            MatryoshkaBatchTopKSAE,
            MatryoshkaBatchTopKTrainer,
        )
        from dictionary_learning.training import trainSAE

        generator = torch.Generator().manual_seed(0)
        batches = (torch.randn(64, 12, generator=generator) * 5 + 3 for _ in range(400))
        trainer = {
            "trainer": MatryoshkaBatchTopKTrainer,
            "steps": 60,
            "activation_dim": 12,
            "dict_size": 40,
            "k": 4,
            "layer": 2,
            "lm_name": "gpt2",
            "submodule_name": "resid_post_layer_2",
            "group_fractions": [0.25, 0.75],
            "warmup_steps": 2,
            "decay_start": 40,
            "threshold_start_step": 10,
            "device": "cpu",
        }
        trainSAE(batches, [trainer], steps=60, save_dir=str(tmp_path), normalize_activations=True, device="cpu")
        sae = imported(tmp_path / "trainer_0", "dictionary_learning")
        peer_sae = MatryoshkaBatchTopKSAE.from_pretrained(tmp_path / "trainer_0" / "ae.pt")
        x = torch.randn(50, 12, generator=generator) * 5 + 3
        with torch.no_grad():
            latents = peer_sae.encode(x)
            agrees(sae, x, latents, peer_sae.decode(latents))
        assert sae.config.prefix_sizes == [10, 40]
        assert (sae.config.base_model, sae.config.site) == ("gpt2", "layers.2")
