"""One place says whether an SAE fits a site of a language model, whatever is done with the two."""

import pytest
from tiny_models import tiny

from hf_msae import MatryoshkaSAEConfig
from hf_msae.errors import InputError
from hf_msae.sites import Site, SiteError, check_width, find_site, recorded_site


def config(**options):
    return MatryoshkaSAEConfig(num_latents=32, prefix_sizes=[8, 32], k=2, **options)


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.mark.parametrize("given", ["layers.1", Site("model.layers.1")])
def test_the_site_that_is_given_goes_before_the_recorded_one(model, given):
    site = Site("model.layers.1")
    assert find_site(model, config(hidden_size=32, site="layers.0"), given) == site
    assert find_site(model, config(hidden_size=32, site="layers.1")) == site


def test_an_sae_of_another_width_is_refused_in_words(model):
    wrong = config(hidden_size=8, site="layers.0", base_model="someone/else")
    with pytest.raises(SiteError) as caught:
        find_site(model, wrong, "layers.1", called="wrong")
    assert str(caught.value) == (
        "The SAE wrong reads activations of 8 dimensions, but those at model.layers.1:output of the model have 32. It "
        "was made for layers.0 of someone/else: give these, or make an SAE with hidden_size=32."
    )
    with pytest.raises(InputError, match="It was made for an unrecorded site of an unrecorded model"):
        find_site(model, config(hidden_size=8), "layers.1")


def test_an_sae_without_a_site_is_asked_for_one(model):
    with pytest.raises(SiteError, match=r"The SAE mine records no site.*'layers\.12'"):
        find_site(model, config(hidden_size=32), called="mine")
    assert recorded_site(config(hidden_size=32, site="layers.0")) == "layers.0"


def test_the_kind_of_error_is_the_callers(model):
    class OtherError(InputError):
        pass

    with pytest.raises(OtherError):
        recorded_site(config(hidden_size=32), error=OtherError)
    with pytest.raises(OtherError):
        check_width(16, config(hidden_size=32), Site("model.layers.1"), model, error=OtherError)
    check_width(32, config(hidden_size=32), Site("model.layers.1"), model)
