"""An SAE of the story model, trained for seconds, with an interpretation beside it; and the Space's own modules.

The Space's modules lie beside its `app.py`, where a script finds them; here their folder is put on the path.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from made_once import made_once

from hf_msae import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.hub import cache_folder
from hf_msae.hub.spaces import space_folder
from hf_msae.interpret.pipeline import interpret
from hf_msae.training import SAETrainer, SAETrainingArguments
from hf_msae.worlds.stories import STORIES, StoryWorld, load_story_lm

sys.path[:0] = [str(space_folder()), str(Path(__file__).parent)]

if TYPE_CHECKING:
    from msae_space.latent_index import LatentIndex
    from msae_space.library import Library
    from msae_space.loaded_sae import LoadedSAE
    from space_server import Server


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the tests' own, for this process and those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def story_sae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an SAE of 256 latents in three levels, a copy of one that is trained once a session."""
    trained = made_once(tmp_path_factory, "story-sae", _train_story_sae)
    return shutil.copytree(trained, tmp_path_factory.mktemp("space") / "story-sae")


def _train_story_sae(folder: Path) -> None:
    model, tokenizer = load_story_lm()
    model.config.name_or_path = STORIES  # what the SAE records as its model
    sae = MatryoshkaSAE(
        MatryoshkaSAEConfig(hidden_size=128, num_latents=256, prefix_sizes=[32, 128, 256], k=12, site="layers.2")
    )
    args = SAETrainingArguments(
        output_dir=str(folder),
        max_steps=40,
        per_device_train_batch_size=1024,
        eval_tokens=2_000,
        calibration_tokens=2_000,
        ce_tokens=500,
        save_steps=0,
        seed=0,
    )
    stories = StoryWorld(seed=0).documents(600)
    SAETrainer(model, sae, args, stories, processing_class=tokenizer).train()
    saved = MatryoshkaSAE.from_pretrained(folder).eval()
    interpret(model, tokenizer, saved, stories, folder / "interpretation", max_tokens=15_000)


@pytest.fixture(scope="session")
def library(story_sae: Path) -> "Library":
    from msae_space.library import Library

    return Library((str(story_sae),))


@pytest.fixture(scope="session")
def loaded(library: "Library", story_sae: Path) -> "LoadedSAE":
    from msae_space.loaded_sae import Key

    return library.open(Key(str(story_sae)))


@pytest.fixture(scope="session")
def index(loaded: "LoadedSAE", tmp_path_factory: pytest.TempPathFactory) -> "LatentIndex":
    """What is known of its latents, with presets that were tried out once a session."""
    from msae_space.latent_index import LatentIndex

    kept = made_once(tmp_path_factory, "story-presets", lambda folder: _try_presets(loaded, folder))
    shutil.copytree(kept, cache_folder() / "presets", dirs_exist_ok=True)
    found = LatentIndex(loaded)
    found.wait()
    assert found.progress == ""
    return found


def _try_presets(loaded: "LoadedSAE", folder: Path) -> None:
    from msae_space.latent_index import LatentIndex

    LatentIndex(loaded).wait()
    shutil.copytree(cache_folder() / "presets", folder)


@pytest.fixture(scope="session")
def server(story_sae: Path, index: "LatentIndex") -> "Iterator[Server]":
    """The page of the story SAE, which runs in this process and finds the presets that were tried out for `index`."""
    pytest.importorskip("gradio", reason="needs Gradio (pip install 'hf-msae[space]')")
    from space_server import serving

    with serving(str(story_sae)) as running:
        yield running
