"""What the Space keeps open, within its memory, and what it refuses at the door."""

import gc
import re
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from msae_space.latent_index import LatentIndex
from msae_space.library import Library
from msae_space.loaded_sae import Key, LoadedSAE, SpaceError, tensor_bytes
from msae_space.reading import read, read_levels
from msae_space.smoke_test import sample_text
from patience import HANG_SECONDS
from transformers import LlamaConfig, LlamaForCausalLM

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.steering import LatentEdit, Steering
from hf_msae.worlds.stories import STORIES

pytestmark = pytest.mark.slow

NUM_FOLDERS = 5


def write_sae(folder: Path, **shape: object) -> Path:
    """A random SAE of the story model."""
    values = {"hidden_size": 128, "num_latents": 64, "k": 4, "site": "layers.1", "base_model": STORIES} | shape
    torch.manual_seed(0)
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(**({"prefix_sizes": [16, values["num_latents"]]} | values)))
    sae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, ...]:
    """SAEs of different sizes."""
    root = tmp_path_factory.mktemp("saes")
    return tuple(str(write_sae(root / str(size), num_latents=64 * 2**size)) for size in range(NUM_FOLDERS))


def opened(library: Library, source: str) -> LoadedSAE | None:
    try:
        return library.open(Key(source))
    except SpaceError as error:
        if "GiB" not in str(error):
            raise
        return None


@pytest.fixture(scope="module")
def sizes(folders) -> dict[str, int]:
    """Bytes of each SAE alone, with its language model."""
    found = {}
    for source in folders:
        library = Library((source,))
        loaded = library.open(Key(source))
        found[source] = library.num_bytes
        held = tensor_bytes(loaded.sae) + tensor_bytes(loaded.model)
        assert found[source] >= held, "less was counted than tensors are held"
    return found


STEPS = st.lists(st.tuples(st.integers(0, NUM_FOLDERS - 1), st.booleans()), min_size=3, max_size=6)


# Without shrinking, which would open hundreds of SAEs.
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(STEPS, st.floats(1.05, 2.5))
def test_what_is_open_fits_whatever_is_asked_for_and_what_is_used_stays(folders, sizes, steps, share):
    """Some of those opened are used on (held), the others are let go; no order brings more than there is room for."""
    library = Library(folders, budget=int(share * sizes[folders[3]]))
    used: list[LoadedSAE] = []
    loaded = None
    for place, is_kept in steps:
        del loaded  # which would be used still
        loaded = opened(library, folders[place])
        assert library.num_bytes <= library.budget
        for one in used:
            assert library.open(one.key).sae is one.sae, "what somebody used was closed"
        if loaded is not None and is_kept:
            used.append(loaded)
        fits_alone = sizes[folders[place]] <= library.budget
        assert loaded is not None or used or not fits_alone, "it had room and was refused"


def test_what_is_closed_is_gone_with_all_that_belongs_to_it(folders, sizes, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("msae_space.latent_index.NUM_STORIES", 12)
    monkeypatch.setattr("msae_space.latent_index.NUM_TOKENS", 300)
    monkeypatch.setattr("msae_space.trials.NUM_CANDIDATES", 2)
    library = Library(folders, budget=sizes[folders[-1]] + 1)
    loaded = library.open(Key(folders[0]))
    index = library.companion(loaded, LatentIndex)
    index.wait()
    assert index.progress == "", "an SAE without measured maxima is tried out, too"
    gone = [weakref.ref(one) for one in (loaded.sae, index)]
    del loaded, index
    last = library.open(Key(folders[-1]))
    gc.collect()
    assert [one() for one in gone] == [None, None]
    assert last.num_bytes < library.num_bytes <= library.budget


def test_what_reads_in_the_background_is_not_closed(folders, sizes, monkeypatch, tmp_path):
    go_on = threading.Event()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("msae_space.latent_index.NUM_STORIES", 12)
    monkeypatch.setattr("msae_space.latent_index.NUM_TOKENS", 300)
    monkeypatch.setattr("msae_space.trials.NUM_CANDIDATES", 2)
    monkeypatch.setattr("msae_space.latent_index.published", lambda loaded: go_on.wait(HANG_SECONDS) and [])
    library = Library(folders, budget=sizes[folders[-1]] + 1)
    index = library.companion(library.open(Key(folders[0])), LatentIndex)
    assert index.is_working
    assert opened(library, folders[-1]) is None
    go_on.set()
    index.wait()
    assert opened(library, folders[-1]) is not None


def test_models_are_shared_while_any_sae_of_theirs_is_open(folders):
    library = Library(folders)
    all_loaded = [library.open(Key(source)) for source in folders]
    assert all(loaded.language is all_loaded[0].language for loaded in all_loaded)
    alone = sum(loaded.num_bytes for loaded in all_loaded)
    assert library.num_bytes == alone + all_loaded[0].language.num_bytes


# At the door


def tiny_sites(lm) -> Iterator[tuple[str, int]]:
    """Every input and output of every module that the model runs, with its width (of the last dimension)."""
    seen: dict[str, int] = {}

    def watch(name: str):
        def hook(module, args, kwargs, output):
            first = args[0] if args else kwargs.get("hidden_states")
            for io, value in (("input", first), ("output", output[0] if isinstance(output, tuple) else output)):
                seen[f"{name}:{io}"] = value.shape[-1] if isinstance(value, torch.Tensor) else 16

        return hook

    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True) for name, module in lm.named_modules() if name
    ]
    with torch.no_grad():
        lm(input_ids=torch.arange(5, 12)[None], use_cache=False)
    for handle in handles:
        handle.remove()
    yield from seen.items()


def test_an_sae_that_opens_works_in_every_tab_and_any_other_is_refused(hub, lm, tokenizer, tmp_path):
    """At every site of a model there is, with an SAE of its width and one of another."""
    from msae_space.generation import stream

    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(**{**lm.config.to_dict(), "num_hidden_layers": 1})).eval()
    lm.push_to_hub("tester/lm")
    tokenizer.push_to_hub("tester/lm")
    folders = {
        (site, other): write_sae(
            tmp_path / f"{number}-{other}",
            hidden_size=width + other,
            num_latents=32,
            prefix_sizes=[8, 32],
            k=2,
            site=site,
            base_model="tester/lm",
        )
        for number, (site, width) in enumerate(tiny_sites(lm))
        for other in (0, 8)
    }
    library, opens, refusals = Library(tuple(map(str, folders.values()))), {}, []
    kept = library.open(Key(str(folders["model.layers.0:output", 0])))  # so that its model is loaded once for all
    for (site, _), folder in folders.items():
        try:
            loaded = library.open(Key(str(folder)))
        except SpaceError as error:
            refusals.append(str(error))
            continue
        opens[site] = opens.get(site, 0) + 1
        text = sample_text(loaded)
        assert any(read(loaded, text).active)
        assert len(read_levels(loaded, text)[1]) == 2
        *_, last = stream(
            loaded, text, Steering([LatentEdit(3, 1.0, units="norm")]), seed=1, temperature=0.7, max_new_tokens=2
        )
        assert last.done
    assert kept.language is loaded.language
    assert {"model.layers.0:output", "model.layers.0.mlp:output", "model.layers.0:input"} <= opens.keys()
    assert not any(site.startswith("lm_head:output") for site in opens)
    assert set(opens.values()) == {1}, "an SAE of another width was opened"
    assert all(re.fullmatch(r"This page cannot work with an SAE at .{10,}", words) for words in refusals), refusals


@pytest.mark.parametrize("what", ["W_dec", "b_dec", "W_enc"])
def test_an_sae_that_gives_no_numbers_is_refused(tmp_path, what):
    folder = write_sae(tmp_path / "sae")
    sae = MatryoshkaSAE.from_pretrained(folder)
    with torch.no_grad():
        getattr(sae, what).fill_(float("nan"))
    sae.save_pretrained(folder)
    with pytest.raises(SpaceError, match="sae"):
        Library((str(folder),)).open(Key(str(folder)))


@pytest.mark.parametrize("damage", ["cut", "text", "no weights", "config", "shape"])
def test_a_damaged_sae_is_told_in_a_sentence(tmp_path, damage):
    folder = write_sae(tmp_path / "sae")
    (weights,) = folder.glob("*.safetensors")
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "text":
        weights.write_text("not tensors at all")
    elif damage == "no weights":
        weights.unlink()
    elif damage == "config":
        (folder / "config.json").write_text('{"model_type": "matryoshka_sae", "num_latents": "many"}')
    else:
        other = write_sae(tmp_path / "other", num_latents=128)
        (folder / "config.json").write_bytes((other / "config.json").read_bytes())
    with pytest.raises((SpaceError, ValueError), match=r"\w+ \w+ .*\w") as caught:
        Library((str(folder),)).open(Key(str(folder)))
    assert type(caught.value).__name__ in ("SpaceError", "NoSAEError")


def test_a_transcoder_is_refused_in_words(tmp_path):
    """The page reconstructs what it reads; what a transcoder writes is at another place."""
    places = {"site": "layers.1.mlp:input", "site_out": "layers.1.mlp", "hidden_size_out": 128}
    source = str(write_sae(tmp_path / "transcoder", **places))
    with pytest.raises(SpaceError, match=r"is a transcoder, which reconstructs another place .* hf-msae steer"):
        Library(source).open(Key(source))


def test_a_tokenized_sae_is_refused_in_words(tmp_path):
    source = str(write_sae(tmp_path / "tokenized", lookup_size=500))
    with pytest.raises(SpaceError, match=r"is tokenized: a vector of each token is a part .* hf-msae steer"):
        Library(source).open(Key(source))
