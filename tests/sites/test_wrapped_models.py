"""A site that is recorded on a wrapped model is found on the bare one, and on every other wrapper."""

import copy

import peft
import pytest
import torch
from torch import nn

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.sites import Site, SiteError, capture, resolve_site
from hf_msae.training.preparation import resolve_sites

# Of peft itself.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
IDS = torch.tensor([[1, 5, 9, 33, 8]])


def bare(lm):
    return lm


def compiled(lm):
    return torch.compile(lm, backend="eager")


def compiled_layers(lm):
    for index, layer in enumerate(lm.model.layers):
        lm.model.layers[index] = torch.compile(layer, backend="eager")
    return lm


def with_adapter(lm):
    return peft.get_peft_model(lm, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2)).eval()


WRAPPERS = (bare, compiled, compiled_layers, with_adapter)
SITES = ["layers.1", "layers.-1.mlp", "layers.0.attn", "embeddings"]


@pytest.mark.parametrize("name", [*SITES, "model.layers.1:input"])
@pytest.mark.parametrize("recorded_on", WRAPPERS)
def test_a_recorded_site_is_found_on_every_wrapper(lm, recorded_on, name):
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(hidden_size=16, num_latents=32, k=4, site=name))
    resolve_sites(recorded_on(copy.deepcopy(lm)), {"sae": sae})
    assert sae.config.site == str(resolve_site(lm, name))
    expected = next(iter(capture(lm, [resolve_site(lm, name)], input_ids=IDS).values()))
    for wrapper in (bare, compiled, compiled_layers):
        model = wrapper(copy.deepcopy(lm))
        site = resolve_site(model, sae.config.site)
        assert torch.equal(capture(model, [site], input_ids=IDS)[site], expected)


@pytest.mark.parametrize("name", SITES)
def test_a_site_of_the_bare_model_is_found_beside_an_adapter(lm, name):
    model = with_adapter(copy.deepcopy(lm))
    site = resolve_site(model, resolve_site(lm, name))
    assert site.without_wrappers() == resolve_site(lm, name)
    assert capture(model, [site], input_ids=IDS)[site].shape == (1, 5, 16)


@pytest.mark.parametrize("wrapper", [*WRAPPERS, lambda lm: compiled(nn.DataParallel(with_adapter(lm)))])
@pytest.mark.parametrize("around", [bare, nn.DataParallel])
def test_paths_of_every_wrapper_are_those_of_the_bare_model(lm, wrapper, around):
    """Whatever wraps whatever: the bare model finds each of its modules under the names that wrappers give it."""
    wrapped = around(wrapper(copy.deepcopy(lm)))
    paths = {name for name, _ in wrapped.named_modules() if name}
    found = {Site(path).without_wrappers().path for path in paths}
    assert {name for name, _ in lm.named_modules() if name} <= found
    for path in paths:
        if path.endswith("layers.1"):
            assert resolve_site(lm, Site(path)) == Site("model.layers.1")


def test_a_model_inside_a_wrapper_for_several_devices_is_asked_for(lm):
    with pytest.raises(SiteError, match=r"DataParallel wraps the model .* give what is in it: model.module"):
        resolve_site(nn.DataParallel(lm), "layers.1")
