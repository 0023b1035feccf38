"""Known releases: their checkpoints load with the nesting that their authors state, and nothing else does."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from hf_msae import MatryoshkaSAE, convert
from hf_msae.formats.common import FormatError
from hf_msae.formats.known_releases import RELEASES, release_of

D = 3
STATED = [128, 512, 2048, 8192, 32768]
REPO = "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40"
FOLDER = "standard/blocks.12.hook_resid_post"


def tensors(num_latents: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"W_enc": (D, num_latents), "W_dec": (num_latents, D), "b_enc": (num_latents,), "b_dec": (D,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | {"threshold": torch.ones(num_latents)}


def config(num_latents: int, **more) -> dict:
    """As SAELens wrote them before version 6: it says what is computed, and no widths."""
    named = {"model_name": "gemma-2-2b", "hook_name": "blocks.12.hook_resid_post", "sae_lens_version": "5.6.1"}
    sizes = {"architecture": "jumprelu", "d_in": D, "d_sae": num_latents, "dtype": "float32"}
    return {**sizes, **named, "activation_fn_str": "relu", "apply_b_dec_to_input": True, "prepend_bos": True, **more}


def write(folder: Path, num_latents: int = STATED[-1], **more) -> Path:
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(config(num_latents, **more)))
    save_file(tensors(num_latents), folder / "sae_weights.safetensors")
    return folder


def publish(hub, repo: str, folder: str, num_latents: int = STATED[-1]) -> None:
    content = {
        "cfg.json": json.dumps(config(num_latents)).encode(),
        "sae_weights.safetensors": save(tensors(num_latents)),
    }
    hub.put(repo, {f"{folder}/{name}": data for name, data in content.items()})


def test_a_release_loads_with_the_widths_that_its_authors_state(hub, caplog):
    publish(hub, REPO, FOLDER)
    with caplog.at_level(logging.WARNING):
        sae = MatryoshkaSAE.from_pretrained(REPO, subfolder=FOLDER)
    assert (sae.config.prefix_sizes, sae.config.base_model, sae.config.site) == (
        STATED,
        "google/gemma-2-2b",
        "layers.12",
    )
    assert "nested at 128, 512, 2048, 8192, 32768, as its model card on the Hub says; its files do not" in caplog.text
    assert MatryoshkaSAE.from_pretrained(REPO, subfolder=FOLDER, prefix=512).config.prefix_sizes == [128, 512]


def test_given_sizes_win(hub):
    publish(hub, REPO, FOLDER)
    sae = MatryoshkaSAE.from_pretrained(REPO, subfolder=FOLDER, prefix_sizes=[64, 1024])
    assert sae.config.prefix_sizes == [64, 1024, 32768]


def test_another_width_is_refused_and_loads_with_sizes(hub):
    publish(hub, REPO, FOLDER, 4096)
    with pytest.raises(
        FormatError, match=r"has 4096 latents, but its model card on the Hub says .* 8192, 32768.* give prefix_sizes"
    ):
        MatryoshkaSAE.from_pretrained(REPO, subfolder=FOLDER)
    sizes = MatryoshkaSAE.from_pretrained(REPO, subfolder=FOLDER, prefix_sizes=[64, 4096]).config.prefix_sizes
    assert sizes == [64, 4096]


@pytest.mark.parametrize(
    ("repo", "folder"),
    [(REPO, "other/blocks.12.hook_resid_post"), (f"somebody/{REPO.split('/')[1]}", FOLDER), ("chanind/more", FOLDER)],
)
def test_what_is_not_of_the_release_is_left_as_it_is(hub, repo, folder):
    publish(hub, repo, folder, 96)
    assert MatryoshkaSAE.from_pretrained(repo, subfolder=folder).config.prefix_sizes == [96]


def test_a_download_is_known_by_the_folder_that_is_named_after_the_repo(tmp_path):
    download = tmp_path / REPO.split("/")[1]
    write(download / FOLDER)
    assert convert(download, tmp_path / "out", subfolder=FOLDER).config.prefix_sizes == STATED
    cache = tmp_path / f"models--{REPO.replace('/', '--')}" / "snapshots" / "0123abc"
    assert MatryoshkaSAE.from_pretrained(write(cache / FOLDER)).config.prefix_sizes == STATED
    assert MatryoshkaSAE.from_pretrained(write(tmp_path / "mine" / FOLDER, 96)).config.prefix_sizes == [96]


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk", "topk"])
def test_whatever_the_files_call_it(tmp_path, architecture):
    """Also where they call it a plain SAE."""
    folder = tmp_path / REPO.split("/")[1] / FOLDER
    metadata = {"sae_lens_version": "6.2.0", "training_architecture": architecture}
    write(folder, metadata=metadata)
    assert MatryoshkaSAE.from_pretrained(folder).config.prefix_sizes == STATED


def test_the_table_is_sound():
    for release in RELEASES:
        assert list(release.prefix_sizes) == sorted(set(release.prefix_sizes))
        assert release.source
        assert release_of(release.repo, "blocks.3.nothing") is None
    assert release_of(REPO.upper(), FOLDER) is RELEASES[0]
    assert release_of(REPO, "") is None
    assert len({release.repo for release in RELEASES}) == len(RELEASES)
