"""Publishing an activation cache: its shards, its index, and a card that says what they are of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from hf_msae.data.cache_files import read_index
from hf_msae.data.unfinished import INDEX
from hf_msae.hub.card import dataset_name, hub_dataset, is_hub_id, public_name
from hf_msae.hub.card_parts import fingerprint_parts
from hf_msae.hub.data_sets import public_index, push_data, size_category
from hf_msae.sites import Site

TEMPLATE = Path(__file__).with_name("cache_card.md")
TAGS = ["hf_msae", "activations", "sparse-autoencoder", "mechanistic-interpretability"]
SHARDS = "activations-*.safetensors"


def push_activation_cache(
    folder: str | Path, repo_id: str, *, private: bool | None = None, token: str | bool | None = None
) -> str:
    """Publish an activation cache as a data set, in one commit; training then streams it from there.

    Args:
        folder: what `cache_activations` wrote.
        repo_id: owner/name; made where it is not there.
        private: whether a repo that is made is private. A public one that is there is refused with True.
        token: one that may write; the one that is logged in by default.

    Returns:
        The commit's address.

    Raises:
        CacheError: there is no complete cache, or it is damaged.
        PublishError: the Hub refuses, or cannot be reached.
    """
    folder = Path(folder)
    index = read_index(folder)
    return push_data(
        folder,
        [INDEX, *(shard["file"] for shard in index["shards"])],
        render_card(index, repo_id),
        repo_id,
        stale=SHARDS,
        written={INDEX: public_index(index)},
        private=private,
        commit_message="Upload activations",
        token=token,
    )


def render_card(index: Mapping[str, Any], repo_id: str) -> str:
    """The card, metadata and text.

    Args:
        index: of the cache.
        repo_id: where it goes.
    """
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = index.get("dataset")
    body = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        index=index,
        repo=repo_id,
        dataset=dataset_name(text) or "some text",
        base_model=public_name(index["base_model"]) if index.get("base_model") else "a language model",
        sites={str(Site.parse(site).without_wrappers()): site for site in index["hidden_sizes"]},
        tokens=num_tokens(index),
        gigabytes=num_bytes(index) / 1e9,
    )
    return fingerprint_parts(_metadata(index), body)


def num_tokens(index: Mapping[str, Any]) -> int:
    """Tokens of a cache."""
    return sum(shard["num_tokens"] for shard in index["shards"])


def num_bytes(index: Mapping[str, Any]) -> int:
    """Bytes of a cache's activations."""
    sizes = {"float32": 4, "float64": 8}
    widths = ((width, index["dtypes"].get(site)) for site, width in index["hidden_sizes"].items())
    return num_tokens(index) * sum(width * sizes.get(dtype, 2) for width, dtype in widths)


def _metadata(index: Mapping[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"tags": TAGS}
    if index.get("base_model") and is_hub_id(index["base_model"]):
        metadata["base_model"] = index["base_model"]
    text = hub_dataset(index.get("dataset"))
    if text is not None:
        metadata["source_datasets"] = [text]
    return metadata | {"size_categories": [size_category(num_tokens(index))]}
