"""The model card: what an SAE is, how well it does at each level, how to use it, what it cannot do."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_msae.metrics import Measurement, table_rows
from hf_msae.modeling import MatryoshkaSAEConfig

# The story model that ships with the package goes by this name wherever a model is named.
STORIES = "stories"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TEMPLATE = Path(__file__).with_name("model_card.md")


def render_model_card(
    config: MatryoshkaSAEConfig, measurement: Measurement, extra: dict[str, Any], versions: dict[str, str]
) -> ModelCard:
    """The card of one SAE.

    `extra` holds facts of the run: `dataset`, `training_tokens`, `steps`, `learning_rate`, `tokens_per_second`.
    """
    base_model = config.base_model
    on_hub = base_model is not None and is_hub_id(base_model)
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="feature-extraction",
        base_model=base_model if on_hub else None,
        tags=["hf_msae", "sparse-autoencoder", "matryoshka-sae", "mechanistic-interpretability"],
        license="apache-2.0",
    )
    header, rows = table_rows(measurement)
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        config=config,
        base_model_name=_reader_name(base_model, on_hub),
        header=header,
        rows=rows,
        measurement=measurement,
        extra=extra,
        versions=versions,
        weights=[round(weight, 3) for weight in config.normalized_level_weights],
    )


def _reader_name(base_model: str | None, on_hub: bool) -> str:
    """What a reader calls the language model."""
    if base_model is None:
        return "a language model"
    if base_model == STORIES:
        return "the story model of hf_msae"
    return base_model if on_hub else Path(base_model).name


def is_hub_id(name: str) -> bool:
    """Whether a model's name is a repo of the Hub: a path of somebody's disk is no name for others."""
    return name != STORIES and HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def write_model_card(
    path: Path,
    config: MatryoshkaSAEConfig,
    measurement: Measurement,
    extra: dict[str, Any],
    versions: dict[str, str],
) -> None:
    """Render the card into a file."""
    render_model_card(config, measurement, extra, versions).save(path)
