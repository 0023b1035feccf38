"""An SAE of ours that was written for another library and read again is the same SAE: what it computes, where its
activations come from, and the units in which it is steered.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig, steer
from hf_msae.formats.common import FormatError
from hf_msae.formats.conversion import WRITABLE, write_library_checkpoint
from hf_msae.formats.round_trip import KEY

D, F = 6, 12
# The file that holds a configuration in each format, and where in it our key stands.
CONFIGS: dict[str, tuple[str, Callable[[dict], dict]]] = {
    "saelens": ("cfg.json", lambda content: content["metadata"]),
    "sparsify": ("cfg.json", lambda content: content),
}
# What a format's own reader forbids to come back, and why.
FORBIDDEN = {
    ("sparsify", "apply_b_dec_to_input"): "sparsify always subtracts b_dec, so the difference goes into the biases",
}
# SAEs that a format does not take, and why.
REFUSED = {
    ("sparsify", "batch_topk"): "sparsify can only rank",
    ("sparsify", "jumprelu"): "sparsify can only rank",
    ("sparsify", "relu"): "sparsify can only rank",
}


def fields(config: MatryoshkaSAEConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in MatryoshkaSAEConfig.__annotations__}


# circuit-tracer's form holds transcoders alone, and is not read back: test_transcoders.py computes what it says.
OF_SAES = [library for library in WRITABLE if library != "circuit_tracer"]
configurations = st.fixed_dictionaries(
    {
        "k": st.sampled_from([1, 3, 2.5, F]),
        "prefix_sizes": st.sampled_from([[F], [3, F], [1, 2, 7, F]]),
        "apply_b_dec_to_input": st.booleans(),
        "base_model": st.sampled_from([None, "google/gemma-2-2b", "openai-community/gpt2", "me/tiny", "my-model"]),
        "base_model_revision": st.sampled_from([None, "0123abcd"]),
        "site": st.sampled_from(
            [None, "model.layers.3:output", "model.layers.1.mlp:output", "model.embed_tokens:output", "h.2.attn:input"]
        ),
        "prepend_bos": st.booleans(),
        "context_length": st.sampled_from([None, 256]),
        "norm_limit": st.sampled_from([None, 0, 12.5]),
        "converted_from": st.sampled_from([None, "dictionary_learning"]),
        "detach_prefixes": st.booleans(),
        "aligned": st.booleans(),
        "log_loss": st.booleans(),
        "pareto_alpha": st.sampled_from([0.5, 1]),
        "num_aux_latents": st.sampled_from([None, 3]),
        "sparsity_weight": st.sampled_from([0.01, 0.3]),
    }
)
KINDS = [("batch_topk", "threshold"), ("topk", "threshold"), ("topk", "topk"), ("jumprelu", "threshold")]
KINDS += [("relu", "threshold")]
WEIGHINGS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "size": {"level_weights": "size"},
    "balance": {"balance": 0.75},
    "custom": {},
    "pareto": {"prefix_sampling": "pareto"},
}


def make_sae(
    values: dict[str, Any], weighing: str = "uniform", dtype: torch.dtype = torch.float32, measured: bool = True
) -> MatryoshkaSAE:
    levels = len(values["prefix_sizes"])
    more = dict(WEIGHINGS[weighing])
    if weighing == "custom":
        more = {"level_weights": [1 + level / 3 for level in range(levels)]}
    if measured:
        more["measured"] = {"tokens": 4096, "l0": [1.1 * level for level in range(levels)], "fve": [0.1] * levels}
    config = MatryoshkaSAEConfig(hidden_size=D, num_latents=F, **values, **more)
    generator = torch.Generator().manual_seed(0)
    sae = MatryoshkaSAE(config).eval()
    with torch.no_grad():
        for weights in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
            weights.copy_(torch.randn(weights.shape, generator=generator))
        sae.to(dtype)
        for statistic in (sae.threshold, sae.max_activation, sae.firing_rate):
            statistic.data = torch.rand(F, generator=generator) * (0.4 if measured else 0)
    return sae


@pytest.mark.parametrize("library", OF_SAES)
@given(
    values=configurations,
    kind=st.sampled_from(KINDS),
    weighing=st.sampled_from(list(WEIGHINGS)),
    half=st.booleans(),
    measured=st.booleans(),
)
@settings(max_examples=60)
def test_the_same_sae_comes_back(tmp_path_factory, library, values, kind, weighing, half, measured):
    values = values | dict(zip(("activation", "inference"), kind, strict=True))
    if kind[0] == "topk":
        values["k"] = int(values["k"])
    sae = make_sae(values, weighing, torch.bfloat16 if half else torch.float32, measured)
    folder = tmp_path_factory.mktemp("export") / "sae"
    if (library, values["activation"]) in REFUSED:
        with pytest.raises(ValueError, match="Export it to SAELens"):
            write_library_checkpoint(sae, folder, library)
        return
    write_library_checkpoint(sae, folder, library)
    back = MatryoshkaSAE.from_pretrained(folder)
    kept = {name: value for name, value in fields(sae.config).items() if (library, name) not in FORBIDDEN}
    assert {name: value for name, value in fields(back.config).items() if name in kept} == kept
    assert back.dtype == sae.dtype
    for name in ("max_activation", "firing_rate"):
        assert torch.equal(back.get_buffer(name), sae.get_buffer(name)), name
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(1)).to(sae.dtype)
    with torch.no_grad():
        latents, expected = back.encode(x), sae.encode(x)
        if library == "sparsify" and not sae.config.apply_b_dec_to_input:
            # The biases were rounded where the difference went into them, so a rank or a threshold may fall otherwise.
            close = torch.isclose(latents, expected, atol=0.1 if half else 1e-5)
            assert close.float().mean() > (0.9 if half else 0.999)
            return
        assert torch.equal(latents, expected)
        assert torch.equal(back.decode_levels(latents), sae.decode_levels(expected))


ORIGIN = {
    "k": 3,
    "prefix_sizes": [3, F],
    "activation": "topk",
    "inference": "topk",
    "site": "model.layers.0:output",
    "norm_limit": 12.5,
}


def exported(folder: Path, library: str, change: Callable[[dict], None]) -> Path:
    """An export whose configuration somebody changed; `change` gets the object in which our key stands."""
    write_library_checkpoint(make_sae(ORIGIN), folder, library)
    name, place = CONFIGS[library]
    content = json.loads((folder / name).read_text())
    change(place(content))
    (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("library", OF_SAES)
class TestWhatOthersChanged:
    def test_other_weights_lose_what_was_measured_and_a_note_says_so(self, tmp_path, library, caplog):
        def change(block: dict) -> None:
            block[KEY]["norms"]["W_dec"] *= 1.01

        back = MatryoshkaSAE.from_pretrained(exported(tmp_path / "sae", library, change))
        assert not back.max_activation.any()
        assert back.config.measured is None
        assert back.config.norm_limit == 12.5
        assert "`hf-msae convert --measure` measures them anew" in caplog.text

    def test_without_the_key_it_is_what_the_library_says(self, tmp_path, library):
        back = MatryoshkaSAE.from_pretrained(exported(tmp_path / "sae", library, lambda block: block.pop(KEY)))
        assert back.config.norm_limit is None
        assert back.config.converted_from is not None
        x = torch.randn(9, D)
        assert torch.equal(back.encode(x), make_sae(ORIGIN).encode(x))

    @pytest.mark.parametrize(
        "facts",
        [
            7,
            {},
            {"version": "1", "config": {}, "norms": {}},
            {"version": 1, "config": {"norm_limit": float("inf")}, "norms": {}},
            {"version": 1, "config": {"context_length": "long"}, "norms": {}},
            {"version": 1, "config": {"prepend_bos": 3}, "norms": {"W_enc": 1.0, "W_dec": 1.0}},
            {"version": 1, "config": {}, "norms": {"W_enc": "one", "W_dec": 1.0}},
            {"version": 1, "config": {}, "norms": {"W_enc": 1.0, "W_dec": 1.0}, "max_activation": [float("nan")] * F},
            {"version": 1, "config": {}, "norms": {"W_enc": 1.0, "W_dec": 1.0}, "max_activation": [-1.0] * F},
            {"version": 1, "config": {}, "norms": {"W_enc": 1.0, "W_dec": 1.0}, "firing_rate": ["often"] * F},
            {"version": 1, "config": {}, "norms": {"W_enc": 1.0, "W_dec": 1.0}, "firing_rate": []},
        ],
    )
    def test_nonsense_is_one_sentence(self, tmp_path, library, facts):
        folder = exported(tmp_path / "sae", library, lambda block: block.update({KEY: facts}))
        with pytest.raises(FormatError, match=f"'{KEY}' in .* is not as hf_msae writes it .*Export the SAE again"):
            MatryoshkaSAE.from_pretrained(folder)

    def test_keys_that_are_no_fields_mean_nothing(self, tmp_path, library):
        def change(block: dict) -> None:
            block[KEY]["config"] |= {"auto_map": {"AutoModel": "evil.py"}, "unknown": 3}

        back = MatryoshkaSAE.from_pretrained(exported(tmp_path / "sae", library, change))
        assert back.config.norm_limit == 12.5

    def test_a_later_version_is_left_alone(self, tmp_path, library, caplog):
        back = MatryoshkaSAE.from_pretrained(
            exported(tmp_path / "sae", library, lambda block: block[KEY].update(version=2))
        )
        assert back.config.norm_limit is None
        assert "update hf_msae" in caplog.text


@pytest.mark.parametrize("library", OF_SAES)
def test_steering_in_units_of_the_maximum_is_the_same(tmp_path, lm: LlamaForCausalLM, library):
    width = lm.config.hidden_size
    config = MatryoshkaSAEConfig(
        **ORIGIN | {"prefix_sizes": [16, 64], "k": 4}, hidden_size=width, num_latents=64, base_model="me/tiny"
    )
    torch.manual_seed(0)
    sae = MatryoshkaSAE(config).eval()
    tokens = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        sae.max_activation.copy_(torch.rand(64) + 0.5)
        write_library_checkpoint(sae, tmp_path / "sae", library)
        back = MatryoshkaSAE.from_pretrained(tmp_path / "sae")
        plain, steered = lm(tokens).logits, []
        for one in (sae, back):
            with steer(lm, one, {5: 2.0}, units="max"):
                steered.append(lm(tokens).logits)
    assert not torch.allclose(plain, steered[0])
    assert torch.equal(*steered)


def through_saelens(folder: Path, out: Path, **options: Any) -> None:
    saelens = pytest.importorskip("sae_lens", reason="needs SAELens, which CI installs in an environment of its own")
    saelens.SAE.load_from_disk(folder, **options).save_model(out)


@pytest.mark.peer
class TestThroughSAELensItself:
    """Loaded and saved by SAELens in between."""

    @pytest.mark.parametrize("activation", ["batch_topk", "topk", "jumprelu", "relu"])
    def test_everything_is_kept(self, tmp_path, activation):
        sae = make_sae(ORIGIN | {"activation": activation, "inference": "threshold"})
        sae.to_saelens(tmp_path / "ours")
        through_saelens(tmp_path / "ours", tmp_path / "theirs")
        back = MatryoshkaSAE.from_pretrained(tmp_path / "theirs")
        assert fields(back.config) == fields(sae.config)
        assert torch.equal(back.max_activation, sae.max_activation)
        assert torch.equal(back.firing_rate, sae.firing_rate)

    def test_maxima_are_left_out_where_it_changed_the_units_of_latents(self, tmp_path):
        sae = make_sae(ORIGIN | {"activation": "batch_topk", "inference": "threshold"})
        sae.to_saelens(tmp_path / "ours")
        through_saelens(tmp_path / "ours", tmp_path / "theirs", fold_W_dec_norm=True)
        assert not MatryoshkaSAE.from_pretrained(tmp_path / "theirs").max_activation.any()


@pytest.mark.peer
@pytest.mark.parametrize("subtract", [True, False])
def test_sparsify_itself_reads_what_we_write(tmp_path, subtract):
    sparsify = pytest.importorskip("sparsify", reason="needs the package eai-sparsify")
    make_sae(ORIGIN | {"apply_b_dec_to_input": subtract}).to_sparsify(tmp_path / "sae")
    assert sparsify.SparseCoder.load_from_disk(tmp_path / "sae").cfg.k == 3
