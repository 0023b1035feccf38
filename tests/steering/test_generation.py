"""Whatever the way of generating, the same tokens are edited as in one forward over the whole text without a cache.

The reference knows nothing of steering: it adds the same vector to the tokens that a few plain loops name.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hf_msae.sites import replace, resolve_site
from hf_msae.steering import SteeringError, steer

pytestmark = pytest.mark.slow

SPECIAL = (0, 1, 2)  # padding, BOS, EOS
PROMPTS = torch.tensor([[0, 0, 1, 5, 9, 33, 8], [1, 17, 5, 9, 42, 5, 9]])
MASK = (PROMPTS != 0).long()
LENGTH = PROMPTS.shape[1]
STRENGTH, LATENT = 3.0, 1
POSITIONS = [
    "prompt",
    "generated",
    "all",
    slice(1, -1),
    slice(-2, None),
    torch.tensor([[0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1, 1]]).bool(),
]


@dataclass(frozen=True)
class Mode:
    """A way of generating. Given a model and one or more prompts with their mask, it makes the arguments.

    rows: which of the prompts. num_cached: how many tokens of each the arguments' cache holds, never steered.
    special: the tokens of the prompt that are never steered; embeddings do not tell theirs.
    """

    arguments: Callable[[PreTrainedModel, Tensor, Tensor], dict[str, Any]] = lambda model, ids, mask: {}
    rows: tuple[int, ...] = (0, 1)
    num_cached: int = 0
    special: tuple[int, ...] = SPECIAL


def with_options(**options: Any) -> Callable[..., dict[str, Any]]:
    return lambda model, ids, mask: dict(options)


def forward(model: PreTrainedModel, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    """A plain forward with the positions that `generate` gives to left-padded prompts."""
    if model.config.model_type != "mamba":
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **options)


def behind_cache(number: int, only_new: bool, **options: Any) -> Callable[..., dict[str, Any]]:
    def arguments(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        cache = DynamicCache(config=model.config)
        forward(model, ids[:, :number], mask[:, :number], past_key_values=cache)
        return {"past_key_values": cache, **({"input_ids": ids[:, number:]} if only_new else {}), **options}

    return arguments


def with_assistant(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """Another model, whose guesses are right now and then."""
    assistant = copy.deepcopy(model)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=noise))
    return {"assistant_model": assistant}


def as_embeddings(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    return {"inputs_embeds": model.get_input_embeddings()(ids).detach(), "input_ids": None}


ONE = (1,)
# An even number of beams for two prompts: with three, a mask that is repeated in the wrong order goes unnoticed.
MODES = {
    "greedy": Mode(),
    "no cache": Mode(with_options(use_cache=False)),
    "sampled": Mode(with_options(do_sample=True, num_return_sequences=3)),
    "beams": Mode(with_options(num_beams=4, num_return_sequences=2)),
    "sampled beams": Mode(with_options(num_beams=4, num_return_sequences=2, do_sample=True)),
    "beams without a cache": Mode(with_options(num_beams=4, num_return_sequences=2, use_cache=False)),
    "chunks": Mode(with_options(prefill_chunk_size=3)),
    "single tokens": Mode(with_options(prefill_chunk_size=1)),
    "chunks and beams": Mode(with_options(prefill_chunk_size=2, num_beams=2)),
    "static": Mode(with_options(cache_implementation="static")),
    "static and beams": Mode(with_options(cache_implementation="static", num_beams=4)),
    "static and chunks": Mode(with_options(cache_implementation="static", prefill_chunk_size=2)),
    "prompt lookup": Mode(with_options(prompt_lookup_num_tokens=3), ONE),
    "assistant": Mode(with_assistant, ONE),
    "early exit": Mode(with_options(assistant_early_exit=1), ONE),
    "filled cache": Mode(behind_cache(4, only_new=False), num_cached=4),
    "filled cache, new tokens": Mode(behind_cache(4, only_new=True), num_cached=4),
    "filled cache and chunks": Mode(behind_cache(3, only_new=False, prefill_chunk_size=2), num_cached=3),
    "embeddings": Mode(as_embeddings, special=()),
}
# Sliding windows shorter than the prompt, learned positions, a state instead of keys.
OTHERS = {
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "mistral": {"sliding_window": 4},
    "gpt2": {},
    "mamba": {},
}
FOR_OTHERS = ("greedy", "beams", "static", "chunks", "filled cache, new tokens")


def tokens_meant(mode: Mode, positions: Any, row: int, sequence: list[int], mask: list[int]) -> list[bool]:
    """Which tokens of a prompt and its continuation are steered; `row` is the prompt's number among PROMPTS."""
    real = [place for place in range(LENGTH) if mask[place]]
    meant = []
    for place, token in enumerate(sequence):
        in_prompt = place < LENGTH
        if (
            token in (mode.special if in_prompt else SPECIAL)
            or place < mode.num_cached
            or (in_prompt and not mask[place])
        ):
            meant.append(False)
        elif isinstance(positions, str):
            meant.append(positions == "all" or (positions == "prompt") == in_prompt)
        elif isinstance(positions, slice):
            meant.append(in_prompt and place in real[positions])
        else:
            meant.append(in_prompt and bool(positions[row, place]))
    return meant


def reference(model: PreTrainedModel, sae: Any, sequences: Tensor, mask: Tensor, meant: Tensor) -> Tensor:
    """Logits (n, tokens, vocabulary) of whole texts (n, tokens), the steering's vector added where it is meant."""
    site = resolve_site(model, sae.config.site)
    shift = STRENGTH * sae.max_activation[LATENT] * sae.W_dec[LATENT]
    whole = nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
    with replace(model, {site: lambda hidden: hidden + meant.unsqueeze(-1) * shift.detach()}):
        return forward(model, sequences, whole, use_cache=False).logits


def run(model: PreTrainedModel, mode: Mode, ids: Tensor, mask: Tensor, arguments: dict[str, Any]) -> tuple:
    """Whole texts (n, tokens) and the model's logits for each of their generated tokens (n, steps, vocabulary)."""
    torch.manual_seed(0)
    options = {"do_sample": False, **arguments}
    given = options.pop("input_ids", ids)
    output = model.generate(
        input_ids=given,
        attention_mask=mask,
        max_new_tokens=5,
        min_new_tokens=5,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    generated = output.sequences if given is None else output.sequences[:, given.shape[1] :]
    steps = torch.stack(list(output.logits), 1)
    each = len(generated) // len(ids)
    if options.get("num_beams", 1) > 1:
        steps = torch.stack([steps[rows[:5], range(5)] for rows in output.beam_indices])
    return torch.cat([ids.repeat_interleave(each, 0), generated], 1), steps


def check(model: PreTrainedModel, sae: Any, mode: Mode, positions: Any) -> None:
    """Steered generation edits the tokens that are meant, wherever transformers' own generation can be relied on."""
    try:
        check_steered(model, sae, mode, positions)
    except (AssertionError, SteeringError):
        if not is_right_unsteered(model, sae, mode):
            pytest.skip(f"transformers {transformers.__version__} generates otherwise this way than without a cache")
        raise


def is_right_unsteered(model: PreTrainedModel, sae: Any, mode: Mode) -> bool:
    """Whether plain generation gives the logits that the model has for the same text in one pass."""
    ids, mask = PROMPTS[list(mode.rows)], MASK[list(mode.rows)]
    sequences, steps = run(model, mode, ids, mask, mode.arguments(model, ids, mask))
    masks = mask.repeat_interleave(len(sequences) // len(ids), 0)
    plain = reference(model, sae, sequences, masks, torch.zeros(sequences.shape, dtype=torch.bool))
    return torch.allclose(steps, plain[:, LENGTH - 1 : -1], rtol=1e-3, atol=1e-3)


def check_steered(model: PreTrainedModel, sae: Any, mode: Mode, positions: Any) -> None:
    ids, mask = PROMPTS[list(mode.rows)], MASK[list(mode.rows)]
    chosen = positions[list(mode.rows)] if isinstance(positions, Tensor) else positions
    arguments = mode.arguments(model, ids, mask)
    with steer(model, sae, {LATENT: STRENGTH}, positions=chosen):
        sequences, steps = run(model, mode, ids, mask, arguments)
    each = len(sequences) // len(ids)
    masks = mask.repeat_interleave(each, 0)
    meant = torch.tensor(
        [
            tokens_meant(mode, positions, mode.rows[row // each], sequence.tolist(), masks[row].tolist())
            for row, sequence in enumerate(sequences)
        ]
    )
    expected = reference(model, sae, sequences, masks, meant)[:, LENGTH - 1 : -1]
    torch.testing.assert_close(steps, expected, rtol=1e-3, atol=1e-3)
    plain = reference(model, sae, sequences, masks, torch.zeros_like(meant))[:, LENGTH - 1 : -1]
    assert meant.any(1).all()
    assert not torch.isclose(steps, plain, atol=1e-1).all(-1).all(-1).any()


@pytest.mark.parametrize("name", MODES)
def test_every_way_of_generating_edits_the_same_tokens(llama, sae, name):
    for positions in POSITIONS:
        check(llama, sae, MODES[name], positions)


def variant(name: str, decoder: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """A tiny model of an architecture with its options, the weights wide."""
    config = copy.deepcopy(decoder(name).config)
    for key, value in OTHERS[name].items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(decoder(name).state_dict())
    return model


@pytest.mark.parametrize("mode", FOR_OTHERS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_too(decoder, make_sae, name, mode):
    if name == "mamba" and mode not in ("greedy", "beams"):
        pytest.skip("a state-space model has no such cache")
    model = variant(name, decoder)
    sae = make_sae(model)
    for positions in POSITIONS:
        check(model, sae, MODES[mode], positions)


def test_a_cache_filled_in_the_steering_is_steered_like_one_text(llama, sae):
    """As in a chat that keeps its cache: each part is a prompt where it is put in."""
    with steer(llama, sae, {LATENT: STRENGTH}, positions="prompt"):
        cache = DynamicCache(config=llama.config)
        forward(llama, PROMPTS[:, :4], MASK[:, :4], past_key_values=cache)
        steps = run(llama, Mode(), PROMPTS, MASK, {"past_key_values": cache})[1]
        assert torch.equal(steps.argmax(-1), run(llama, Mode(), PROMPTS, MASK, {})[1].argmax(-1))
        torch.testing.assert_close(steps, run(llama, Mode(), PROMPTS, MASK, {})[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("positions", ["prompt", slice(1, 3), "generated"])
def test_a_loop_of_ones_own_is_steered_like_generate(llama, sae, positions):
    """With the cache that the model makes, and with one of one's own."""
    with steer(llama, sae, {LATENT: STRENGTH}, positions=positions):
        sequences, expected = run(llama, Mode(), PROMPTS, MASK, {})
        for cache in (None, DynamicCache(config=llama.config)):
            mask, output = MASK, forward(llama, PROMPTS, MASK, past_key_values=cache, use_cache=True)
            found = [output.logits[:, -1]]
            for place in range(LENGTH, LENGTH + 4):
                mask = nn.functional.pad(mask, (0, 1), value=1)
                position = mask.sum(-1, keepdim=True) - 1
                with torch.no_grad():
                    output = llama(
                        input_ids=sequences[:, place : place + 1],
                        attention_mask=mask,
                        position_ids=position,
                        past_key_values=output.past_key_values,
                    )
                found.append(output.logits[:, -1])
            torch.testing.assert_close(torch.stack(found, 1), expected, rtol=1e-3, atol=1e-3)


def test_every_text_without_a_cache_is_a_prompt_of_its_own(llama, sae):
    """Also one that begins like the last: a forward outside of `generate` does not guess."""
    with steer(llama, sae, {LATENT: STRENGTH}, positions="prompt"):
        whole = forward(llama, PROMPTS, MASK).logits
        forward(llama, PROMPTS[:, :-1], MASK[:, :-1])
        assert torch.equal(forward(llama, PROMPTS, MASK).logits, whole)


# What cannot be known is refused


def cut_off(model: PreTrainedModel) -> None:
    """A prompt in two parts, by hand."""
    cache = forward(model, PROMPTS[:, :4], MASK[:, :4], use_cache=True).past_key_values
    with torch.no_grad():
        model(input_ids=PROMPTS[:, 4:], attention_mask=MASK, past_key_values=cache)


def unknown_cache(model: PreTrainedModel, cache: DynamicCache) -> None:
    with torch.no_grad():
        model(input_ids=PROMPTS[:, 4:5], attention_mask=MASK[:, :5], past_key_values=cache)


def second_text(model: PreTrainedModel) -> None:
    run(model, Mode(), PROMPTS, MASK, {"guidance_scale": 1.5})


def in_another_thread(model: PreTrainedModel) -> None:
    model.generate_batch(PROMPTS.tolist())


@pytest.mark.parametrize("positions", ["prompt", "generated", slice(1, 3), torch.ones(7).bool()])
def test_a_text_whose_prompt_is_not_known_is_refused(llama, sae, positions):
    cache = DynamicCache(config=llama.config)
    forward(llama, PROMPTS[:, :4], MASK[:, :4], past_key_values=cache)
    with steer(llama, sae, {LATENT: STRENGTH}, positions=positions):
        with pytest.raises(SteeringError, match="with 1 tokens behind a cache of 4, so whether they are"):
            unknown_cache(llama, copy.deepcopy(cache))
        if not isinstance(positions, Tensor):
            with pytest.raises(SteeringError, match="with 3 tokens behind a cache of 4, so whether they are"):
                cut_off(llama)
        with pytest.raises(SteeringError, match="generate ran the model on a second text"):
            second_text(llama)
        with pytest.raises(SteeringError, match="runs the model in a thread of its own"):
            in_another_thread(llama)
    with steer(llama, sae, {LATENT: STRENGTH}):  # all tokens, whichever they are
        unknown_cache(llama, copy.deepcopy(cache))
        cut_off(llama)
        second_text(llama)


def test_a_learned_prompt_in_the_cache_stands_before_the_prompt(llama, sae, monkeypatch):
    """As PEFT's prefix tuning puts it there, with the first inputs that are prepared."""
    prepare, number = llama.prepare_inputs_for_generation, 3
    virtual = DynamicCache(config=llama.config)
    forward(llama, torch.tensor([[7, 11, 13]] * 2), torch.ones(2, number, dtype=torch.long), past_key_values=virtual)

    def with_prefix(*args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(*args, **kwargs)
        if not inputs["past_key_values"].get_seq_length():
            inputs["past_key_values"] = copy.deepcopy(virtual)
        inputs["attention_mask"] = nn.functional.pad(kwargs["attention_mask"], (number, 0), value=1)
        inputs["position_ids"] = inputs["position_ids"] + number
        return inputs

    monkeypatch.setattr(llama, "prepare_inputs_for_generation", with_prefix)
    for positions in POSITIONS:
        with steer(llama, sae, {LATENT: STRENGTH}, positions=positions):
            sequences, steps = run(llama, Mode(), PROMPTS, MASK, {})
        meant = torch.tensor(
            [
                tokens_meant(Mode(), positions, row, sequence.tolist(), MASK[row].tolist())
                for row, sequence in enumerate(sequences)
            ]
        )
        mask = nn.functional.pad(nn.functional.pad(MASK, (number, 0), value=1), (0, 5), value=1)
        added = meant.unsqueeze(-1) * STRENGTH * sae.max_activation[LATENT] * sae.W_dec[LATENT].detach()
        edit = {resolve_site(llama, sae.config.site): lambda hidden, added=added: hidden + added}
        with replace(llama, edit), torch.no_grad():
            expected = llama(
                input_ids=sequences,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1)[:, number:],
                past_key_values=copy.deepcopy(virtual),
            ).logits[:, LENGTH - 1 : -1]
        torch.testing.assert_close(steps, expected, rtol=1e-3, atol=1e-3)


def test_a_mask_of_tokens_by_tokens_says_what_is_padding(llama, sae):
    """Boolean, or added to the scores, or one for each kind of layer."""
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    seen = (causal & MASK[:, None, :].bool())[:, None]
    seen = seen | torch.eye(LENGTH).bool() & MASK[:, None, None, :].bool()
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for positions in [*POSITIONS[:1], slice(1, 3), slice(-2, None), slice(None, None, 2)]:
        with steer(llama, sae, {LATENT: STRENGTH}, positions=positions, special_ids=()):
            expected = forward(llama, PROMPTS, MASK).logits
            for mask in (seen, added):
                with torch.no_grad():
                    found = llama(
                        input_ids=PROMPTS, attention_mask=mask, position_ids=(MASK.cumsum(-1) - 1).clamp_min(0)
                    ).logits
                real = MASK.bool()
                torch.testing.assert_close(found[real], expected[real], rtol=1e-3, atol=1e-3)


def test_padding_is_what_generate_takes_for_it_where_no_mask_is_given(llama, sae):
    for options in ({}, {"prefill_chunk_size": 1}, {"cache_implementation": "static"}):
        with steer(llama, sae, {LATENT: STRENGTH}, positions=slice(1, 3), special_ids=()):
            expected = run(llama, Mode(), PROMPTS, MASK, {})[1]
            found = run(llama, Mode(), PROMPTS, None, {"pad_token_id": 0, **options})[1]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_generate_is_as_it_was_when_the_last_steering_is_left(llama, sae):
    def own(*args: Any, **kwargs: Any) -> str:
        return "own"

    model = copy.deepcopy(llama)
    first, second = (steer(model, sae, {LATENT: STRENGTH}) for _ in range(2))
    first.__enter__()
    second.__enter__()
    twin = copy.deepcopy(model)
    first.__exit__(None, None, None)
    assert "generate" in vars(model)
    second.__exit__(None, None, None)
    assert "generate" not in vars(model)
    assert twin.generate.__self__ is twin
    torch.testing.assert_close(run(twin, Mode(), PROMPTS, MASK, {}), run(llama, Mode(), PROMPTS, MASK, {}))
    model.generate = own
    with steer(model, sae, {LATENT: STRENGTH}):
        assert model.generate() == "own"
    assert vars(model)["generate"] is own
