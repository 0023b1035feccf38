"""An interpretation in Neuronpedia's import form: what its own tools write, and its importer reads.

Neuronpedia calls an SAE a source ("12-my-set": the layer and the set that it belongs to), its latents neurons or
features, and reads a folder `<model>/<source>` with one line of JSON each for release, model, source set and source,
and gzipped lines of JSON in batches for features, activations (contexts) and explanations (labels). The fields are
those of the records in its repository (`utils/neuronpedia-utils`, `db_models` and `export-data.py`, 2025); a record's
`index` is text there, as in its database.

What Neuronpedia shows and an interpretation does not have stays empty: the histogram of all logits, alignment with
neurons, and correlations. Vectors are left out, as for other SAEs: Neuronpedia steers by the SAE's weights, from the
Hub.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_msae.atomic_files import atomic_folder
from hf_msae.errors import InputError

if TYPE_CHECKING:
    from hf_msae.interpret import Interpretation, LatentPage

BATCH = 1024
# What Neuronpedia's tools truncate to.
DECIMALS = 4
# The account that Neuronpedia's public exports belong to, and that its importer replaces by its own.
CREATOR_ID = "clkht01d40000jv08hvalcvly"
# Their records must name how an explanation came about; this is the name for a way that they do not know.
EXPLANATION_TYPE = "unknown"
# Columns of theirs for which an interpretation has nothing.
EMPTY = (
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1"),
    *("correlated_features_indices", "correlated_features_pearson", "correlated_features_l1"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist", "vector"),
)
# Sampled contexts are grouped there by intervals of activations; ours are drawn one by one. The rest belongs to
# attention heads and to other ways of finding contexts.
UNKNOWN = (
    *("binMin", "binMax", "binContains", "dataIndex", "dataSource"),
    *("dfaTargetIndex", "dfaMaxValue", "logitContributions"),
)
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]*")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)(?:\.|:|$)")


@dataclass(frozen=True)
class NeuronpediaNames:
    """What Neuronpedia calls the SAE and those who made it.

    model: its name of the language model ("gemma-2-2b"). layer: the SAE's. source_set: the set that the SAE is one of
    ("someone-res-16k"), without the layer. creator: who made it. release, release_title: the publication that the set
    belongs to. url: of that. hf_repo, hf_folder: where the weights are on the Hub.
    """

    model: str
    layer: int
    source_set: str
    creator: str
    release: str
    release_title: str
    url: str = ""
    hf_repo: str | None = None
    hf_folder: str | None = None
    creator_id: str = CREATOR_ID

    def __post_init__(self) -> None:
        for what, name in (("model", self.model), ("source set", self.source_set), ("release", self.release)):
            if not _NAME.fullmatch(name):
                raise InputError(
                    f"{name!r} cannot be the name of a {what} on Neuronpedia: it becomes a part of addresses and "
                    "may have only letters, digits, dashes, dots and underscores."
                )

    @property
    def source(self) -> str:
        """The SAE's own name: layer and set."""
        return f"{self.layer}-{self.source_set}"


def layer_of(site: str | None) -> int | None:
    """The layer that a site lies in; None where its path does not say."""
    found = _LAYER.search(site or "")
    return int(found[1]) if found else None


def write_neuronpedia(interpretation: "Interpretation", names: NeuronpediaNames, folder: str | Path) -> Path:
    """Write an interpretation for Neuronpedia's importer into `folder/<model>/<source>`, and return that folder.

    It appears when everything is written. Raises `FileExistsError` where it holds something already.
    """
    created = datetime.now(UTC).replace(tzinfo=None).isoformat()
    stamp = {"creatorId": names.creator_id, "createdAt": created}
    place = Path(folder) / names.model / names.source
    with atomic_folder(place) as draft:
        for name, record in _headers(interpretation, names).items():
            _write_lines(draft / f"{name}.jsonl", [record | stamp])
        for number, start in enumerate(range(0, len(interpretation), BATCH)):
            latents = range(start, min(start + BATCH, len(interpretation)))
            pages = [interpretation.page(latent) for latent in latents]
            _write_batch(draft / "features", number, (_feature(page, names) | stamp for page in pages))
            contexts = (line | stamp for page in pages for line in _activations(page, names))
            _write_batch(draft / "activations", number, contexts)
            labels = [line | {"createdAt": created} for page in pages for line in _explanations(page, names)]
            if labels:
                _write_batch(draft / "explanations", number, labels)
    return place


def _write_batch(folder: Path, number: int, records: Iterable[Mapping[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    _write_lines(folder / f"batch-{number}.jsonl.gz", records)


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    # Without a time in the gzip header, the same pages give the same bytes.
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def _headers(interpretation: "Interpretation", names: NeuronpediaNames) -> dict[str, dict[str, Any]]:
    """Release, model, source set and source."""
    of, urls = interpretation.source, [names.url] if names.url else []
    sizes = ", ".join(f"{size:,}" for size in of.prefix_sizes)
    return {
        "release": {
            "name": names.release,
            "description": names.release_title,
            "descriptionShort": names.release_title,
            "urls": urls,
            "creatorName": names.creator,
            "creatorNameShort": names.creator,
            "visibility": "PUBLIC",
        },
        "model": {
            "id": names.model,
            "instruct": names.model.endswith("-it"),
            "displayName": names.model,
            "displayNameShort": names.model,
            "visibility": "PUBLIC",
        },
        "sourceset": {
            "modelId": names.model,
            "name": names.source_set,
            "description": f"Matryoshka SAE, levels of {sizes} latents",
            "creatorName": names.creator,
            "releaseName": names.release,
            "urls": urls,
            "hasDashboards": True,
            "visibility": "PUBLIC",
        },
        "source": {
            "id": names.source,
            "modelId": names.model,
            "setName": names.source_set,
            "dataset": of.dataset,
            "num_prompts": of.num_tokens // max(1, of.context_length),
            "num_tokens_in_prompt": of.context_length,
            "hfRepoId": names.hf_repo,
            "hfFolderId": names.hf_folder,
            "hasDashboards": True,
            "visibility": "PUBLIC",
            "notes": f"Matryoshka prefixes: {sizes}",
        },
    }


def _place(page: "LatentPage", names: NeuronpediaNames) -> dict[str, Any]:
    return {"modelId": names.model, "layer": names.source, "index": str(page.latent)}


def _feature(page: "LatentPage", names: NeuronpediaNames) -> dict[str, Any]:
    width = page.histogram_range / max(1, len(page.histogram))
    bars = [number for number, count in enumerate(page.histogram) if count]
    return {
        **_place(page, names),
        "maxActApprox": _short(page.max_activation),
        "frac_nonzero": page.firing_rate,
        "pos_str": [effect.token for effect in page.promoted],
        "pos_values": [_short(effect.effect) for effect in page.promoted],
        "neg_str": [effect.token for effect in page.suppressed],
        "neg_values": [_short(effect.effect) for effect in page.suppressed],
        "topkCosSimIndices": [other.latent for other in page.nearest],
        "topkCosSimValues": [_short(other.cosine) for other in page.nearest],
        # Only bars that are there, each at its middle.
        "freq_hist_data_bar_heights": [page.histogram[number] for number in bars],
        "freq_hist_data_bar_values": [_short((number + 0.5) * width) for number in bars],
        **{name: [] for name in EMPTY},
        "hasVector": False,
        "vectorLabel": None,
        "hookName": None,
    }


def _activations(page: "LatentPage", names: NeuronpediaNames) -> Iterator[dict[str, Any]]:
    """The contexts, the strongest first, and then those sampled evenly."""
    for number, context in enumerate([*page.top, *page.sampled]):
        values = [_short(value) for value in context.activations]
        yield {
            "id": _id(names, page.latent, number, "a"),
            **_place(page, names),
            "tokens": list(context.tokens),
            "values": values,
            "maxValue": max(values),
            "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values),
            "qualifyingTokenIndex": context.position,
            "dfaValues": [],
            "lossValues": [],
            **dict.fromkeys(UNKNOWN),
        }


def _explanations(page: "LatentPage", names: NeuronpediaNames) -> Iterator[dict[str, Any]]:
    if page.label is not None:
        yield {
            "id": _id(names, page.latent, 0, "e"),
            **_place(page, names),
            "authorId": names.creator_id,
            "description": page.label.text,
            "typeName": EXPLANATION_TYPE,
            "explanationModelName": "unknown",
            "embedding": None,
            "triggeredById": None,
            "notes": None,
        }


def _id(names: NeuronpediaNames, latent: int, number: int, kind: str) -> str:
    """A key of the form that their database has, 25 characters; the same record always gets the same."""
    words = "\0".join((names.model, names.source, names.creator_id, kind, str(latent), str(number)))
    return "c" + hashlib.sha256(words.encode()).hexdigest()[:24]


def _short(value: float) -> float:
    return round(value, DECIMALS)
