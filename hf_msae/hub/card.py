"""The model card: what an SAE is, how well it does at each level, how to use it, what it cannot do."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_msae.metrics import Measurement, table_rows
from hf_msae.modeling import MatryoshkaSAEConfig

TEMPLATE = Path(__file__).with_name("model_card.md")


def render_model_card(
    config: MatryoshkaSAEConfig, measurement: Measurement, extra: dict[str, Any], versions: dict[str, str]
) -> ModelCard:
    """The card of one SAE.

    `extra` holds facts of the run: `dataset`, `training_tokens`, `steps`, `learning_rate`, `tokens_per_second`.
    """
    base_model = config.base_model
    # A path of somebody's disk is no name for others, and the Hub's metadata takes only repo ids.
    on_hub = base_model is not None and base_model.count("/") == 1 and not base_model.startswith((".", "/"))
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
        base_model_name=base_model if on_hub else (Path(base_model).name if base_model else "a language model"),
        header=header,
        rows=rows,
        measurement=measurement,
        extra=extra,
        versions=versions,
        weights=[round(weight, 3) for weight in config.normalized_level_weights],
    )


def write_model_card(
    path: Path,
    config: MatryoshkaSAEConfig,
    measurement: Measurement,
    extra: dict[str, Any],
    versions: dict[str, str],
) -> None:
    """Render the card into a file."""
    render_model_card(config, measurement, extra, versions).save(path)
