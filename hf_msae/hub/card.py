"""The model card: what an SAE is, how well it does at each level, how to use it, what it cannot do.

The text is in `model_card.md` (one SAE) and `collection_card.md` (a repo of several), the table and snippet of a
collection in `collection_part.md`, because a repo may hold one SAE at its root and others in folders. Whatever lies
between the marks in them is ours to bring up to date at the next push; see `card_parts`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from hf_msae.hub.card_parts import fingerprint_parts
from hf_msae.hub.curves import NAME as CURVES_NAME
from hf_msae.hub.index import SAEEntry
from hf_msae.metrics import LevelMetrics, Measurement, table_rows
from hf_msae.modeling import MatryoshkaSAEConfig
from hf_msae.worlds.stories import STORIES

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DATA_SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
TEMPLATE = Path(__file__).with_name("model_card.md")
COLLECTION_TEMPLATE = Path(__file__).with_name("collection_card.md")
PART_TEMPLATE = Path(__file__).with_name("collection_part.md")
TAGS = ["hf_msae", "sparse-autoencoder", "matryoshka-sae", "mechanistic-interpretability"]
# A latent that is active more often than this means too little to show what steering is.
RARE = 0.05


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from.

    Args:
        source: what a reader gives to `from_pretrained`: a repo id or a folder.
        subfolder: the SAE's folder in it.
        measurement: its numbers by level, None where nobody measured it.
        training: facts of the run: `dataset`, `training_tokens`, `steps`, `learning_rate`, `tokens_per_second`; empty
            where it was not trained by hf_msae.
        arguments: the run's arguments.
        versions: `torch` and `transformers` of the run.
        latent: the latent that the snippet steers with, as `choose_latent` gives it.
        has_curves: whether `curves.png` lies beside the card.
        origin: where a converted checkpoint came from.
        others: other SAEs in the same repo.
        prefix_of: the larger SAE whose first latents these are.
    """

    config: MatryoshkaSAEConfig
    source: str
    subfolder: str = ""
    measurement: Measurement | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    latent: int | None = None
    has_curves: bool = False
    origin: str | None = None
    others: Sequence[SAEEntry] = ()
    prefix_of: str | None = None


def render_model_card(facts: CardFacts) -> str:
    """The card of one SAE."""
    config = facts.config
    header, rows = ((), []) if facts.measurement is None else table_rows(facts.measurement)
    body = _render(
        TEMPLATE,
        facts=facts,
        config=config,
        measurement=facts.measurement,
        base_model_name=_reader_name(config.base_model, config.adapter),
        base_model_source=_loadable_name(config.adapter or config.base_model, facts.source),
        header=header,
        rows=rows,
        weights=[round(weight, 3) for weight in config.normalized_level_weights],
        dataset=dataset_name(facts.training.get("dataset")),
        curves=CURVES_NAME,
        entries=facts.others,
        source=facts.source,
    )
    return fingerprint_parts(_metadata(facts), body)


def render_collection_card(entries: Sequence[SAEEntry], source: str) -> str:
    """The card at the root of a repo that holds SAEs in folders."""
    names = list(dict.fromkeys(_reader_name(entry.base_model) for entry in entries))
    ids = list(dict.fromkeys(e.base_model for e in entries if e.base_model and is_hub_id(e.base_model)))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=[*TAGS],
        base_model=ids[0] if len(ids) == 1 else ids or None,
        base_model_relation="adapter" if ids else None,
    )
    return fingerprint_parts(data.to_dict(), _render(COLLECTION_TEMPLATE, entries=entries, names=names, source=source))


def render_collection_part(entries: Sequence[SAEEntry], source: str) -> str:
    """Only the part of a card that lists SAEs in folders, to update the card of an SAE at the root."""
    return fingerprint_parts({}, _render(PART_TEMPLATE, entries=entries, source=source))


def write_model_card(
    path: Path,
    config: MatryoshkaSAEConfig,
    measurement: Measurement | None,
    training: Mapping[str, Any],
    versions: Mapping[str, str],
    **more: Any,
) -> None:
    """Render the card into a file, for a reader of that folder; `more` are other fields of `CardFacts`."""
    more = {"source": str(path.parent), **more}
    facts = CardFacts(config, measurement=measurement, training=training, versions=versions, **more)
    path.write_text(render_model_card(facts), encoding="utf-8")


def _render(template: Path, **names: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(**names)


def choose_latent(max_activation: Tensor, firing_rate: Tensor) -> int | None:
    """The latent that is strongest where it is active, among those that are rare but alive if there are any.

    Both are (num_latents,), and zero where nothing was measured: then there is none to choose.
    """
    alive = max_activation > 0
    rare = alive & (firing_rate > 0) & (firing_rate <= RARE)
    candidates = rare if rare.any() else alive
    if not candidates.any():
        return None
    return int(torch.where(candidates, max_activation, -math.inf).argmax())


# Names


def is_hub_id(name: str) -> bool:
    """Whether a model's name is a repo of the Hub: a path of somebody's disk is no name for others."""
    return name != STORIES and HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def public_name(name: str) -> str:
    """The name of a model or an SAE for others: of a folder on somebody's disk, its own name only."""
    return name if name == STORIES or is_hub_id(name) else f"path/to/{Path(name).name}"


def hub_dataset(description: str | None) -> str | None:
    """The Hub id at the beginning of a dataset's description, if there is one."""
    first = (description or "").split(" ")[0]
    is_file = first.endswith(DATA_SUFFIXES) or Path(first).exists()
    return first if DATASET_ID.fullmatch(first) and not is_file else None


def dataset_name(description: str | None) -> str | None:
    """What a reader calls a dataset: without the folders of somebody's disk."""
    if description is None or hub_dataset(description) is not None:
        return description
    return " ".join(Path(word).name if "/" in word else word for word in description.split(" "))


def _reader_name(base_model: str | None, adapter: str | None = None) -> str:
    """What a reader calls the language model, and the adapter that was on it."""
    if adapter is not None:
        return f"{_reader_name(base_model)} with the adapter {adapter if is_hub_id(adapter) else Path(adapter).name}"
    if base_model is None:
        return "a language model"
    if base_model == STORIES:
        return "the story model of hf_msae"
    return base_model if is_hub_id(base_model) else Path(base_model).name


def _loadable_name(base_model: str | None, source: str) -> str:
    """What `from_pretrained` of the language model takes. A path is of use only beside the SAE on the same disk."""
    if base_model is None:
        return "the/language/model"
    is_path = base_model != STORIES and not is_hub_id(base_model)
    return f"path/to/{Path(base_model).name}" if is_path and not Path(source).exists() else base_model


# Metadata


def _metadata(facts: CardFacts) -> dict[str, Any]:
    on_hub = [name for name in (facts.config.base_model, facts.config.adapter) if name and is_hub_id(name)]
    dataset = hub_dataset(facts.training.get("dataset"))
    results = _eval_results(facts)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=[*TAGS],
        base_model=on_hub[0] if len(on_hub) == 1 else on_hub or None,
        base_model_relation="adapter" if on_hub else None,
        datasets=[dataset] if dataset else None,
        # What others trained and we converted is under a licence of theirs, which their files do not say.
        license=None if facts.config.converted_from else "apache-2.0",
        model_name="/".join(part for part in (Path(facts.source).name, facts.subfolder) if part) if results else None,
        eval_results=results or None,
    )
    return data.to_dict()


def _whole(facts: CardFacts) -> LevelMetrics | None:
    """The numbers of the whole dictionary."""
    levels = facts.measurement.levels if facts.measurement is not None else []
    return next((level for level in levels if level.prefix == facts.config.num_latents), None)


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    whole = _whole(facts)
    if whole is None:
        return []
    description = facts.training.get("dataset")
    model = _reader_name(facts.config.base_model, facts.config.adapter)
    metrics = [
        ("fve", "fraction of variance explained", whole.fve, 4),
        ("l0", "mean active latents per token (L0)", whole.l0, 2),
        ("ce_recovered", "cross-entropy recovered", whole.ce_recovered, 4),
    ]
    return [
        EvalResult(
            task_type="feature-extraction",
            task_name=f"Reconstruction of {model} at {facts.config.site}",
            dataset_type=hub_dataset(description) or "text",
            dataset_name=dataset_name(description) or "held-out tokens",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, digits),
        )
        for kind, name, value, digits in metrics
        if value is not None and math.isfinite(value)
    ]
