"""The card of a data set of latents; its metadata tell `datasets` and the Hub's viewer which files are data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from hf_msae.corpora.encoded_files import SHARDS
from hf_msae.hub.card import dataset_name, hub_dataset, is_hub_id, public_name
from hf_msae.hub.card_parts import fingerprint_parts
from hf_msae.hub.data_sets import size_category

TEMPLATE = Path(__file__).with_name("latents_card.md")
TAGS = ["hf_msae", "sparse-autoencoder", "sae-latents", "mechanistic-interpretability"]


def render_card(index: Mapping[str, Any], source: str | Path) -> str:
    """The card, metadata and text.

    Args:
        index: of the data set.
        source: what a reader gives to `load_dataset`: a repo or a folder.
    """
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    body = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        index=index,
        source=source,
        dataset=dataset_name(index["dataset"]),
        base_model=public_name(index["base_model"]) if index["base_model"] else "a language model",
        sae=public_name(index["sae"]) if index["sae"] else "an SAE",
    )
    return fingerprint_parts(_metadata(index), body)


def _metadata(index: Mapping[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"tags": TAGS}
    if is_hub_id(index["base_model"]):
        metadata["base_model"] = index["base_model"]
    text = hub_dataset(index["dataset"])
    if text is not None:
        metadata["source_datasets"] = [text]
    metadata["size_categories"] = [size_category(sum(shard["num_rows"] for shard in index["shards"]))]
    files = [{"split": "train", "path": SHARDS}]
    return metadata | {"configs": [{"config_name": "default", "data_files": files}]}
