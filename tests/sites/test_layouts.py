"""Modules whose activations are laid out in every wrong way: refused, whatever the batch; and right ones are taken."""

from collections.abc import Callable
from copy import deepcopy
from itertools import permutations, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import DECODERS, GPT, HEAD_DIM, PLAIN, TOKENS, randomise, tiny
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

from hf_msae.data import TokenWindows
from hf_msae.data.stream import capture_counted
from hf_msae.sites import Site, SiteError, capture, replace, resolve_site, site_width
from hf_msae.sites.layouts import misplacement, probe_tokens

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
INSIDE = Site("model.layers.1.mlp.inside")


def by_first_channel(hidden: Tensor) -> Tensor:
    """The order in which a router might deal the tokens of a batch out."""
    return hidden.flatten(0, 1)[:, 0].argsort()


RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "batch, sequence": lambda hidden: hidden,
    "flattened": lambda hidden: hidden.flatten(0, 1),
}
WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "sequence, batch": lambda hidden: hidden.transpose(0, 1),
    "flattened sequence, batch": lambda hidden: hidden.transpose(0, 1).flatten(0, 1),
    "channels first": lambda hidden: hidden.transpose(1, 2),
    "heads": lambda hidden: hidden.unflatten(-1, (4, 8)),
    "heads before the sequence": lambda hidden: hidden.unflatten(-1, (4, 8)).transpose(1, 2).flatten(0, 1),
    "one row for all": lambda hidden: hidden[:1],
    "one vector for all": lambda hidden: hidden[:1, 0],
    "one vector a row": lambda hidden: hidden[:, -1],
    "rows turned": lambda hidden: hidden.flip(0),
    "rows turned and flattened": lambda hidden: hidden.flip(0).flatten(0, 1),
    "sequence turned": lambda hidden: hidden.flip(1),
    "dealt out": lambda hidden: hidden.flatten(0, 1)[by_first_channel(hidden)],
    "dealt out to rows": lambda hidden: hidden.flatten(0, 1)[by_first_channel(hidden)].view_as(hidden),
    "padded": lambda hidden: nn.functional.pad(hidden, (0, 0, 0, 3)),
    "split in two": lambda hidden: hidden.repeat(2, 1, 1),
    "whole numbers": lambda hidden: hidden.long(),
}


class LaidOut(nn.Module):
    """An MLP that shows a module of its own the activation in some layout, and computes what it did before."""

    def __init__(self, mlp: nn.Module, layout: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mlp, self.layout, self.inside = mlp, layout, nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        self.inside(self.layout(hidden))
        return self.mlp(hidden)


def laid_out(layout: Callable[[Tensor], Tensor], name: str = "llama") -> PreTrainedModel:
    model: Any = deepcopy(tiny(name))
    model.model.layers[1].mlp = LaidOut(model.model.layers[1].mlp, layout)
    return model


def tokens(batch: int, length: int) -> Tensor:
    return torch.arange(3, 3 + batch * length).view(batch, length) % 64


USES: dict[str, Callable[[PreTrainedModel, Site, Tensor], Any]] = {
    "capture": lambda model, site, ids: capture(model, [site], input_ids=ids),
    "site_width": lambda model, site, ids: site_width(model, site),
    "replace": lambda model, site, ids: replace(model, {site: lambda hidden: hidden}).__enter__(),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("layout", WRONG)
@given(batch=st.integers(1, 5), length=st.integers(1, 5))
@settings(max_examples=4, deadline=None)
def test_a_wrong_layout_is_refused_whatever_the_batch(use: str, layout: str, batch: int, length: int):
    with pytest.raises(SiteError, match=r"model\.layers\.1\.mlp\.inside") as error:
        USES[use](laid_out(WRONG[layout]), INSIDE, tokens(batch, length))
    assert "name another module" in str(error.value)


@pytest.mark.parametrize("layout", RIGHT)
@given(batch=st.integers(1, 5), length=st.integers(1, 5))
@settings(max_examples=12, deadline=None)
def test_a_right_layout_gives_each_token_its_own_vector(layout: str, batch: int, length: int):
    model, ids = laid_out(RIGHT[layout]), tokens(batch, length)
    expected = capture(tiny("llama"), [Site("model.layers.1.mlp", "input")], input_ids=ids)
    (found,) = capture(model, [INSIDE], input_ids=ids).values()
    assert torch.equal(found, *expected.values())
    for row, hidden in zip(ids, found, strict=True):
        (alone,) = capture(model, [INSIDE], input_ids=row[None]).values()
        torch.testing.assert_close(hidden[None], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", WRONG)
def test_training_takes_no_rows_of_a_wrong_layout(layout: str, texts, tokenizer):
    model: Any = laid_out(WRONG[layout])
    model.resize_token_embeddings(len(tokenizer))
    randomise(model)
    windows = list(TokenWindows(texts[:4], tokenizer, context_length=6))[:6]
    with pytest.raises(SiteError, match="name another module"):
        capture_counted(model, [INSIDE], windows, 0)


def test_what_the_probe_can_tell_apart():
    """Of all orders of six vectors that each know their own token only, those pass that keep rows and last tokens."""
    plain, other, changed = (batch.flatten()[:, None] * torch.ones(4) for batch in probe_tokens(640, 3, CPU, 0))
    passed = set()
    for order in permutations(range(6)):
        found = [batch[list(order)].unflatten(0, (2, 3)) for batch in (plain, other, changed)]
        if misplacement(found[0], found[1], found[2]) is None:
            passed.add(order)
    assert passed == {(*first, *second, 5) for first, second in product(permutations(range(3)), permutations([3, 4]))}


@given(st.integers(10, 300), st.integers(3, 4), st.integers(0, 2))
@settings(max_examples=50, deadline=None)
def test_the_tokens_of_a_probe_are_of_the_vocabulary_and_differ_where_they_should(vocab_size, length, draw):
    plain, other, changed = probe_tokens(vocab_size, length, CPU, draw)
    seen = torch.stack([plain, other, changed])
    assert seen.min() >= 0
    assert seen.max() < vocab_size
    differs = [[False] * length, [True] * length], [[False] * length, [False] * (length - 1) + [True]]
    assert [(plain != batch).tolist() for batch in (other, changed)] == list(differs)


def test_dropout_is_not_taken_for_a_wrong_layout_and_goes_on_as_if_nothing_had_been():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **GPT)).train()
    site = resolve_site(model, "layers.1")
    state = torch.get_rng_state()
    assert site_width(model, site) == 32
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_a_site_is_probed_outside_of_the_edits_that_are_open():
    model, ids = laid_out(RIGHT["flattened"]), tokens(2, 5)
    embeddings = resolve_site(model, "embeddings")
    plain = capture(model, [INSIDE], input_ids=ids)[INSIDE]
    again, seen = laid_out(RIGHT["flattened"]), []
    kept = torch.zeros(2, 5, 32)
    # An edit for one batch only would fail in a probe.
    with replace(again, {embeddings: lambda hidden: seen.append(hidden.shape) or kept}):
        edited = capture(again, [INSIDE], input_ids=ids)[INSIDE]
    assert seen == [(2, 5, 32)]
    assert not torch.allclose(edited, plain)


# Models as they are


def seq2seq(name: str, **options: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(name, **TOKENS, decoder_start_token_id=0, **options)
    return randomise(AutoModelForSeq2SeqLM.from_config(config))


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
SPARSE = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
BART = {
    **dict.fromkeys(["encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 48),
    "d_model": 32,
}


def build(name: str) -> PreTrainedModel:
    if name in ("t5", "switch_transformers"):
        return seq2seq(name, **T5, **(SPARSE if name != "t5" else {}))
    if name == "bart":
        return seq2seq(name, **BART)
    if name == "fsmt":
        return seq2seq(name, **BART, langs=["a", "b"], src_vocab_size=64, tgt_vocab_size=64)
    if name == "gemma3":
        vision = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
        config = AutoConfig.for_model(
            "gemma3",
            text_config={**HEAD_DIM, "model_type": "gemma3_text"},
            vision_config={**vision, "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=4,
            image_token_index=63,
        )
        return randomise(AutoModelForCausalLM.from_config(config))
    options: dict[str, dict] = {
        "xlnet": {**TOKENS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        "longformer": {**PLAIN, "attention_window": 8},
        "granitemoe": {**PLAIN, "num_local_experts": 4},
        "qwen2_moe": {**PLAIN, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    }
    if name not in options:
        return tiny(name)
    auto = AutoModelForMaskedLM if name == "longformer" else AutoModelForCausalLM
    return randomise(auto.from_config(AutoConfig.for_model(name, **options[name])))


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("gpt2", "transformer.wpe", r"shape \(1, 4, 32\), where the model was called with .* \(2, 4\)"),
        ("xlnet", "transformer.layer.1", r"shape \(4, 2, 32\), where the model was called with .* \(2, 4\)"),
        ("xlnet", "transformer.layer.0.ff.layer_1", r"shape \(4, 2, 48\)"),
        ("xlnet", "transformer.word_embedding", r"shape \(4, 2, 32\)"),
        ("fsmt", "model.encoder.layers.0", r"shape \(4, 2, 32\), where .* \(2, 4\) and \(2, 5\)"),
        ("fsmt", "model.decoder.layers.0.fc1", r"shape \(5, 2, 48\)"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.k", r"shape \(2, 4, 32\), where .* \(2, 5\)"),
        ("bart", "model.decoder.layers.1.encoder_attn.k_proj", r"shape \(2, 4, 32\), where .* \(2, 5\)"),
        ("longformer", "longformer.encoder.layer.1", r"shape \(2, 8, 32\), where .* \(2, 4\)"),
        ("longformer", "longformer.encoder.layer.1.attention.self.query", r"shape \(8, 2, 32\)"),
        ("granitemoe", "model.layers.1.block_sparse_moe.experts.act_fn", r"shape \(16, 48\)"),
        ("qwen2_moe", "model.layers.1.mlp.experts.act_fn", r"shape \(32, 16\)"),
        ("llama4_text", "model.layers.1.feed_forward.experts", r"shape \(16, 32\)"),
        ("gemma3", "model.vision_tower.encoder.layers.1", r"did not run model\.vision_tower"),
    ],
)
def test_real_modules_without_a_vector_for_each_token_in_its_place_are_refused(name: str, path: str, message: str):
    model = build(name)
    site = resolve_site(model, path)
    for batch, length in ((1, 4), (2, 3), (4, 4), (2, 6)):
        ids = tokens(batch, length)
        inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        with pytest.raises(SiteError, match=message):
            capture(model, [site], input_ids=ids, **inputs)
    with pytest.raises(SiteError, match=message):
        site_width(model, site)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_experts_that_are_modules_of_their_own_are_refused(stack: str):
    """Each sees the tokens that the router dealt out to it, which may by chance be as many as there are."""
    model = build("switch_transformers")
    paths = [path for path, _ in model.named_modules() if path.startswith(stack) and path.split(".")[-1] == "wi"]
    experts = [path for path in paths if "expert_" in path]
    assert len(experts) >= 4
    for path in experts:
        with pytest.raises(SiteError, match=r"shape \(\d, 48\), where|did not run|in the order of the tokens"):
            site_width(model, Site(path))


@pytest.mark.parametrize(
    ("name", "path", "io"),
    [
        ("mixtral", "model.layers.1.mlp.gate", "output"),
        ("mixtral", "model.layers.1.mlp.experts", "input"),
        ("granitemoe", "model.layers.1.block_sparse_moe.router", "input"),
        ("qwen2_moe", "model.layers.1.mlp.gate", "output"),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert.gate_proj", "output"),
        ("gpt_oss", "model.layers.1.mlp.router", "output"),
        ("llama4_text", "model.layers.1.feed_forward.router", "output"),
        ("opt", "model.decoder.layers.1.fc1", "output"),
        ("gemma3", "model.language_model.layers.1.mlp", "output"),
        ("bart", "model.encoder.layers.1", "output"),
        ("bart", "model.decoder.layers.1", "output"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.q", "output"),
    ],
)
def test_real_modules_with_a_vector_for_each_token_give_a_row_what_it_has_alone(name: str, path: str, io: str):
    model, site = build(name), Site(path, io)
    for batch, length in ((1, 4), (2, 3), (4, 4)):
        ids = tokens(batch, length)

        def found(ids: Tensor) -> Tensor:
            # Of another length than the encoder's.
            inputs = {"decoder_input_ids": ids[:, 1:]} if model.config.is_encoder_decoder else {}
            return capture(model, [site], input_ids=ids, **inputs)[site]

        for row, hidden in zip(ids, found(ids), strict=True):
            torch.testing.assert_close(hidden, found(row[None])[0], rtol=1e-3, atol=1e-3)


class Tuned(LlamaForCausalLM):
    """Puts four virtual tokens before each prompt, as prompt tuning does."""

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        given = self.model.embed_tokens(input_ids)
        return super().forward(inputs_embeds=torch.cat([torch.zeros_like(given[:, :1].expand(-1, 4, -1)), given], 1))


def test_virtual_tokens_shift_no_rows_and_can_be_edited():
    model: Any = deepcopy(tiny("llama"))
    model.__class__ = Tuned
    site, ids = resolve_site(model, "layers.1"), tokens(2, 6)
    for batch in (ids, ids[:1]):
        with pytest.raises(
            SiteError, match=r"output of model\.layers\.1 .* \(\d, 10\), and the .* tokens for \(\d, 6\)"
        ):
            capture(model, [site], input_ids=batch)
    with pytest.raises(SiteError, match=r"= \(2, 8\), and the inputs have tokens for \(2, 4\)"):
        site_width(model, site)
    seen = []
    with torch.no_grad(), replace(model, {site: lambda hidden: seen.append(hidden.shape) or hidden}):
        model(ids)
    assert seen == [(2, 10, 32)]


def test_embeddings_in_place_of_ids_are_tokens_too():
    model, ids = tiny("llama"), tokens(2, 6)
    site = resolve_site(model, "layers.1")
    embeds = model.get_input_embeddings()(ids).detach()
    assert torch.equal(capture(model, [site], inputs_embeds=embeds)[site], capture(model, [site], input_ids=ids)[site])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_layers_that_run_again_in_the_backward_pass_are_edited_again():
    """Gradient checkpointing runs layers outside of any call of the model; OPT flattens its tokens inside of them."""
    ids, found = tokens(2, 5), []
    for again in (False, True):
        config = AutoConfig.for_model("opt", **DECODERS["opt"], dropout=0.0)
        model: Any = randomise(AutoModelForCausalLM.from_config(config))
        if again:
            model.gradient_checkpointing_enable()
            model.train()
        vector, seen = torch.zeros(48, requires_grad=True), []
        edit = {
            resolve_site(model, "layers.1.fc1"): lambda hidden, v=vector, s=seen: s.append(hidden.shape) or hidden + v
        }
        with replace(model, edit):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert seen == [(2, 5, 48)] * (2 if again else 1)
        found.append(vector.grad)
    torch.testing.assert_close(*found)
