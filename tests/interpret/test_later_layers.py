"""The mean derivative through the later layers is that of differences, and of the final norm where there are none."""

import copy

import pytest
import torch

from hf_msae.data.windows import DocumentEncoder
from hf_msae.interpret import interpret
from hf_msae.interpret.effects import LogitEffects, final_norm_jacobian
from hf_msae.interpret.later_layers import mean_jacobian
from hf_msae.interpret.pipeline import later_effects
from hf_msae.sites import capture, resolve_site
from hf_msae.steering import Direction, steer_direction


@pytest.fixture(scope="module")
def windows(tokenizer, texts):
    encoder = DocumentEncoder(tokenizer, 80)
    return [encoder.window(ids[: 4 + place]) for place, ids in enumerate(encoder.encode(texts[:6]))]


@pytest.mark.parametrize("site", ["embeddings", "layers.0"])
def test_it_is_the_derivative_of_the_logits_under_steering(lm, windows, site):
    """Against differences in float64, text by text, through the context that users open."""
    exact = copy.deepcopy(lm).double()
    direction = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    place = resolve_site(lm, site)

    def mean_logits(strength: float) -> torch.Tensor:
        parts = []
        for window in windows:
            with torch.no_grad(), steer_direction(exact, Direction(str(place), direction), strength):
                parts.append(exact(window.input_ids[None]).logits[0, window.keep])
        return torch.cat(parts).mean(0)

    expected = (mean_logits(1e-4) - mean_logits(-1e-4)) / 2e-4
    jacobian = mean_jacobian(lm, place, windows, pad_id=0, lm_batch_size=4)
    unit = (direction / direction.norm()).float()
    found = unit @ jacobian @ lm.get_output_embeddings().weight.detach().T
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


def test_behind_the_last_layer_it_is_the_final_norm(lm, windows):
    last = resolve_site(lm, "layers.-1")
    references = torch.cat(
        [capture(lm, [last], input_ids=window.input_ids[None])[last][0, window.keep] for window in windows]
    )
    expected = final_norm_jacobian(lm, lm.get_output_embeddings(), references)
    torch.testing.assert_close(mean_jacobian(lm, last, windows, pad_id=0), expected, rtol=1e-4, atol=1e-5)


def test_effects_take_it_in_the_place_of_the_norm(lm, windows):
    jacobian = mean_jacobian(lm, resolve_site(lm, "layers.0"), windows, pad_id=0)
    directions, references = torch.randn(5, 16), torch.randn(3, 16)
    effects = LogitEffects(lm, directions, references, jacobian)
    logits = directions @ jacobian @ lm.get_output_embeddings().weight.detach().T
    expected = logits - logits.mean(-1, keepdim=True)
    torch.testing.assert_close(effects.of_latents(torch.arange(5)), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, LogitEffects(lm, directions, references).of_latents(torch.arange(5)))


def test_the_model_is_left_without_gradients(lm, windows):
    mean_jacobian(lm, resolve_site(lm, "layers.0"), windows[:1], pad_id=0)
    assert all(weight.grad is None for weight in lm.parameters())


def test_pages_promote_what_the_later_layers_make_of_a_latent(known, tmp_path):
    given = (known.model, known.tokenizer, known.sae, known.texts)
    pages = interpret(*given, tmp_path / "later", max_tokens=300, later_windows=3)
    direct = interpret(*given, tmp_path / "direct", max_tokens=300)
    jacobian = later_effects(known.model, known.tokenizer, known.sae, known.texts, 3)
    logits = known.sae.W_dec[4].detach() @ jacobian @ known.model.lm_head.weight.detach().T
    values, ids = (logits - logits.mean()).topk(3)
    promoted = pages.page(4).promoted[:3]
    assert [effect.token for effect in promoted] == known.tokenizer.batch_decode(ids[:, None])
    assert [effect.effect for effect in promoted] == pytest.approx(values.tolist(), rel=1e-3)
    assert pages.page(4).promoted != direct.page(4).promoted
