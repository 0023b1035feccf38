"""Direct effects on the output, against forward passes of the model itself."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from hf_msae.interpret.effects import LogitEffects, final_norm_jacobian, nearest_latents
from hf_msae.sites import replace, resolve_site

NUM_DIRECTIONS = 7


def gpt2() -> GPT2LMHeadModel:
    """A layer norm with a bias, and tied embeddings."""
    torch.manual_seed(2)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    torch.nn.init.normal_(model.transformer.ln_f.weight)
    torch.nn.init.normal_(model.transformer.ln_f.bias)
    return model


def logits_at(model, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (n, vocabulary) that follow from activations (n, width) behind the last layer, by a forward pass."""
    last = resolve_site(model, "layers.-1")
    with replace(model, {last: lambda _: hidden.unsqueeze(1)}), torch.no_grad():
        return model(input_ids=torch.zeros(len(hidden), 1, dtype=torch.long), use_cache=False).logits[:, 0]


def centred(effects: torch.Tensor) -> torch.Tensor:
    return effects - effects.mean(-1, keepdim=True)


def test_where_the_output_is_linear_effects_are_differences_of_forward_passes(lm):
    linear = copy.deepcopy(lm)
    linear.model.norm = torch.nn.Identity()
    torch.manual_seed(0)
    directions, references = torch.randn(NUM_DIRECTIONS, 16), torch.randn(4, 16)
    effects = LogitEffects(linear, directions, references)
    for latent in range(NUM_DIRECTIONS):
        for reference in references:
            pair = logits_at(linear, torch.stack([reference + directions[latent], reference]))
            expected = centred(pair[0] - pair[1])
            torch.testing.assert_close(effects.of_latents(torch.tensor([latent]))[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [gpt2, None], ids=["layer norm", "RMS norm"])
def test_through_a_norm_effects_are_mean_derivatives_of_the_logits(make, lm):
    model = copy.deepcopy(make() if make else lm).double()
    torch.manual_seed(1)
    directions, references = torch.randn(NUM_DIRECTIONS, 16).double(), torch.randn(5, 16).double()
    effects = LogitEffects(model, directions, references)
    step = 1e-3
    for latent in range(NUM_DIRECTIONS):
        up, down = (logits_at(model, references + sign * step * directions[latent]) for sign in (1, -1))
        expected = centred(((up - down) / (2 * step)).mean(0)).float()
        found = effects.of_latents(torch.tensor([latent]))[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert effects.on_token(11)[latent].item() == pytest.approx(expected[11].item(), rel=1e-3, abs=1e-5)


def test_half_precision_keeps_the_derivative(lm):
    references = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    exact = final_norm_jacobian(lm, lm.get_output_embeddings(), references)
    half = copy.deepcopy(lm).bfloat16()
    found = final_norm_jacobian(half, half.get_output_embeddings(), references.bfloat16())
    # 2^-8 is bfloat16's own precision; differences of outputs would be off by half.
    assert ((found - exact).norm() / exact.norm()).item() < 0.01


def test_extremes_are_the_ends_of_all_effects(lm):
    torch.manual_seed(3)
    effects = LogitEffects(lm, torch.randn(NUM_DIRECTIONS, 16), torch.randn(3, 16))
    promoted, up, suppressed, down = effects.extremes(5)
    everything = effects.of_latents(torch.arange(NUM_DIRECTIONS))
    order = everything.argsort(descending=True)
    assert torch.equal(promoted, order[:, :5])
    assert torch.equal(suppressed, order.flip(1)[:, :5])
    torch.testing.assert_close(up, everything.gather(1, promoted))
    torch.testing.assert_close(down, everything.gather(1, suppressed))
    assert [part.shape for part in effects.extremes(500)] == [(NUM_DIRECTIONS, 80)] * 4


def test_what_has_no_direct_effect_is_refused(lm):
    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    with pytest.raises(ValueError, match="BertModel has no unembedding"):
        LogitEffects(bert.eval(), torch.randn(2, 8), torch.randn(2, 8))
    with pytest.raises(ValueError, match="width 24 are not in a residual stream of width 16"):
        LogitEffects(lm, torch.randn(2, 24), torch.randn(2, 16))


def test_the_model_is_left_as_it_was(lm):
    def hooks() -> list[int]:
        return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in lm.modules()]

    before = hooks()  # transformers leaves some of its own
    LogitEffects(lm, torch.randn(2, 16), torch.randn(2, 16))
    assert hooks() == before


def test_a_real_model_promotes_what_its_unembedding_says(shared_data):
    """The unembedding row of a token, as a direction, promotes that token most."""
    model = AutoModelForCausalLM.from_pretrained(shared_data / "stories260K").eval()
    ids = torch.tensor([263, 300, 411])
    rows = model.get_output_embeddings().weight[ids].detach()
    effects = LogitEffects(model, torch.nn.functional.normalize(rows, dim=-1), torch.randn(8, rows.shape[1]))
    promoted, _, _, _ = effects.extremes(3)
    assert all(token in found for token, found in zip(ids.tolist(), promoted.tolist(), strict=True))


def test_nearest_latents_are_those_with_the_largest_cosine():
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    rows[7] = 3 * rows[4] + 0.01
    found, cosines = nearest_latents(rows, 4)
    for latent in range(30):
        every = torch.nn.functional.cosine_similarity(rows[latent], rows)
        every[latent] = -2
        assert torch.equal(found[latent], every.topk(4).indices)
        torch.testing.assert_close(cosines[latent], every.topk(4).values)
    assert found[7, 0] == 4
    assert nearest_latents(rows[:3], 8)[0].shape == (3, 2)
