"""Any two of the page's actions at once give what each gives alone.

Everybody shares one language model, hooks are on models, and some of torch's and transformers' settings are the
process's: whatever one action does with those must be nothing to another. The actions are those of the tabs and of the
background, on two SAEs of one model.
"""

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from msae_space import examples, latent_index, trials
from msae_space.generation import stream
from msae_space.latent_index import FAILED, NUM_TRIES, LatentIndex
from msae_space.library import Library
from msae_space.loaded_sae import Key, LoadedSAE
from msae_space.presets import by_promotion
from msae_space.reading import continuation_loss, read, read_levels

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.interpret.pipeline import interpret
from hf_msae.sites import capture, resolve_site
from hf_msae.steering import LatentEdit, SteeredPipeline, Steering
from hf_msae.worlds.stories import STORIES, StoryWorld, load_story_lm

pytestmark = pytest.mark.slow

TEXTS = ("There was a little owl.", "Lily went to the garden.")
PLACES = (
    "was there",
    "lay in the way",
    "fell down",
    "was at home",
    "was lost",
    "was in the box",
    "was on the table",
    "was in the forest",
    "was under the bed",
    "was very old",
    "was not big",
    "was by the river",
)
SITE, NUM_LATENTS, NUM_TOKENS = "layers.2", 24, 300
Action = Callable[[], Any]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Library, list[LoadedSAE]]:
    """Two small SAEs of the story model, whose latents are activations on words, each with an interpretation."""
    model, tokenizer = load_story_lm()
    site = resolve_site(model, SITE)
    stories = StoryWorld(seed=0).documents(4)
    x = torch.cat([capture(model, [site], **tokenizer(text, return_tensors="pt"))[site][0, 1:] for text in stories])
    sources = []
    for number in range(2):
        shape = {"hidden_size": 128, "num_latents": NUM_LATENTS, "prefix_sizes": [8, NUM_LATENTS], "k": 4}
        sae = MatryoshkaSAE(MatryoshkaSAEConfig(**shape, site=SITE, base_model=STORIES)).eval()
        rows = (x - x.mean(0))[number :: len(x) // NUM_LATENTS][:NUM_LATENTS]
        with torch.no_grad():
            sae.b_dec.copy_(x.mean(0))
            for weight in (sae.W_enc, sae.W_dec):
                weight.copy_(torch.nn.functional.normalize(rows, dim=-1))
            sae.calibrate_threshold([x])
            sae.max_activation.copy_(sae.encode(x).amax(0).clamp_min(0.1))
            sae.firing_rate.copy_((sae.encode(x) > 0).float().mean(0))
        folder = tmp_path_factory.mktemp("two")
        sae.save_pretrained(folder)
        interpret(model, tokenizer, sae, stories, folder / "interpretation", max_tokens=NUM_TOKENS)
        sources.append(str(folder))
    library = Library(tuple(sources))
    return library, [library.open(Key(source)) for source in sources]


def actions(library: Library, loaded: LoadedSAE, found: LatentIndex, folder: Path, text: str) -> dict[str, Action]:
    """What visitors and the background do with one SAE, each with a result to compare. Small, for there are many."""
    steering = Steering([LatentEdit(3, 1.5), LatentEdit(20, -1.0)])
    stories = StoryWorld(seed=1).documents(3)
    numbers = iter(range(10**6))
    assert found._found is not None

    def written() -> Any:
        *_, last = stream(loaded, text, steering, seed=3, temperature=0.7, max_new_tokens=3)
        return last

    def interpreted() -> Any:
        place = folder / str(next(numbers))
        made = interpret(found._model, loaded.tokenizer, loaded.sae, stories, place, max_tokens=NUM_TOKENS)
        return made.names, made.column("promoted")

    def reopened() -> Any:
        again = Library(library.own).open(loaded.key)
        return again.mean_norm, again.maxima

    def learnt() -> Any:
        again = LatentIndex(loaded)
        again.wait()
        return again.progress, again.name(7), [asdict(one) for one in again.presets()]

    what = examples.asked(*("\n".join(f"A {one} {place}." for place in PLACES) for one in ("owl", "lamp")), "owl", 2)

    def found_by_examples() -> Any:
        *_, finding = examples.search(loaded, what)
        return finding.to_dict()

    pipe = SteeredPipeline(found._model, loaded.tokenizer, loaded.sae, Steering())
    return {
        "open": reopened,
        "learn": learnt,
        "interpret": interpreted,
        "find": found_by_examples,
        "search": lambda: found.search("owl"),
        "explore": lambda: (read(loaded, text), found.page(12)),
        "levels": lambda: read_levels(loaded, text),
        "tree": lambda: (found.roots()[:9], found.children(3), found.parents(20)),
        "try out": lambda: trials.find_trials(loaded, found._model, [5, 9]),
        "measure": lambda: trials._loss(loaded, pipe, trials.Trial(5, text, (), (), 0.0), steering),
        "presets": lambda: [asdict(one) for one in by_promotion(loaded, found._found)],
        "steer": written,
        "continuation_loss": lambda: continuation_loss(loaded, text, " She was happy."),
    }


NAMES = (
    "open",
    "learn",
    "interpret",
    "find",
    "search",
    "explore",
    "levels",
    "tree",
    "try out",
    "measure",
    "presets",
    "steer",
    "continuation_loss",
)
PAIRS = [*itertools.combinations_with_replacement(NAMES, 2)]


@pytest.fixture(scope="module")
def sides(two, tmp_path_factory) -> Iterator[list[dict[str, Action]]]:
    """The actions of two visitors, each of whom has an SAE open; threads change often."""
    library, all_loaded = two
    interval = sys.getswitchinterval()
    less = {"NUM_STORIES": 2, "NUM_SEEDS": 2, "NUM_TRIED": 1, "NUM_CANDIDATES": 2, "NUM_TEXTS": 2, "NUM_NEW_TOKENS": 2}
    with pytest.MonkeyPatch.context() as patch:
        for name, number in less.items():
            patch.setattr(trials, name, number)
        for name, number in {"NUM_CANDIDATES": 1, "NEUTRAL_TOKENS": 20, "NUM_STORIES": 12}.items():
            patch.setattr(examples, name, number)
        # Presets that so little trying out finds, or does not find, are not those of other tests.
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        known = [library.companion(loaded, LatentIndex) for loaded in all_loaded]
        for one in known:
            one.wait()
            assert one.progress == ""
        sys.setswitchinterval(1e-4)
        yield [
            actions(library, loaded, one, tmp_path_factory.mktemp("made"), text)
            for loaded, one, text in zip(all_loaded, known, TEXTS, strict=True)
        ]
        sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def alone(sides) -> list[dict[str, Any]]:
    """What each action gives by itself."""
    return [{name: action() for name, action in side.items()} for side in sides]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=[f"{a} and {b}" for a, b in PAIRS])
def test_two_actions_at_once_give_what_each_gives_alone(sides, alone, first, second):
    """The second at once on the same SAE and on another of the same model."""
    assert tuple(sides[0]) == NAMES
    doing = [(0, first), (0, second), (1, second)]
    start, got = threading.Barrier(len(doing)), {}

    def act(place: int, side: int, name: str) -> None:
        start.wait()
        try:
            got[place] = sides[side][name]()
        except Exception as error:
            got[place] = error

    threads = [threading.Thread(target=act, args=(place, *one)) for place, one in enumerate(doing)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, (side, name) in enumerate(doing):
        assert got[place] == alone[side][name]


# What fails in the background


def test_a_task_that_fails_once_is_done_all_the_same(loaded, monkeypatch):
    calls = []

    def failing(loaded: LoadedSAE) -> list:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("the disk was busy")
        return []

    monkeypatch.setattr(latent_index, "published", failing)
    found = LatentIndex(loaded)
    found.wait()
    assert len(calls) == 2
    assert found.progress == ""
    assert found.has_pages


def test_a_task_that_keeps_failing_says_what_to_do_and_is_tried_for_the_next_visitor(loaded, monkeypatch):
    calls = []

    def failing(loaded: LoadedSAE) -> list:
        calls.append(1)
        if len(calls) <= NUM_TRIES:
            raise RuntimeError("the disk is full\nand more")
        return []

    monkeypatch.setattr(latent_index, "published", failing)
    monkeypatch.setattr(latent_index, "REST_SECONDS", 0.0)
    found = LatentIndex(loaded)
    found.wait()
    assert found.progress == FAILED.format("the disk is full.")
    assert "Reload" in found.progress
    assert not found.is_learning
    found.try_again()
    found.wait()
    assert found.progress == ""
    assert found.has_pages
    found.try_again()  # which has nothing to do
    assert len(calls) == NUM_TRIES + 1
