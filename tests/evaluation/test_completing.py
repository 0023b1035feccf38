"""What text tells about an SAE that came without its threshold, its site or its model's name."""

import pytest
import torch

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.errors import InputError
from hf_msae.evaluation import complete_on_text


def unfinished(**where: object) -> MatryoshkaSAE:
    torch.manual_seed(0)
    config = MatryoshkaSAEConfig(hidden_size=16, num_latents=32, prefix_sizes=[8, 32], k=4, context_length=16, **where)
    return MatryoshkaSAE(config)


def test_what_an_sae_lacks_is_recorded_in_it(lm, tokenizer, texts):
    sae = unfinished()
    found = complete_on_text(sae, lm, tokenizer, texts, site="layers.0", num_tokens=400)
    assert sae.config.site == "model.layers.0:output"
    assert found.levels[-1].l0 == pytest.approx(4, rel=0.2)
    assert 0 < sae.firing_rate.sum().item() == pytest.approx(found.levels[-1].l0, rel=1e-4)
    assert bool((sae.max_activation > 0).any())


def test_an_sae_that_does_not_fit_is_called_by_its_name(lm, tokenizer, texts):
    transcoder = unfinished(site="layers.0.mlp:input", hidden_size_out=16)
    with pytest.raises(InputError, match=r"^The SAE the one from yonder is a transcoder and does not record which"):
        complete_on_text(transcoder, lm, tokenizer, texts, called="the one from yonder")
    with pytest.raises(InputError, match=r"^The SAE the one from yonder .*site"):
        complete_on_text(unfinished(), lm, tokenizer, texts, called="the one from yonder")
