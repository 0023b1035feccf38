"""From what a scan collected to rows, and from rows to Parquet files, a few thousand latents at a time."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_msae.atomic_files import atomic_folder
from hf_msae.interpret.contexts import NO_TOKEN, Contexts
from hf_msae.interpret.effects import LogitEffects, decode_tokens, nearest_latents
from hf_msae.interpret.hierarchy import Hierarchy
from hf_msae.interpret.scan import Scan
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.process_wide import no_datasets_bars

if TYPE_CHECKING:
    from datasets import Features

FOLDER_NAME = "interpretation"
INDEX_NAME = "interpretation.json"
HIERARCHY_NAME = "hierarchy.json"
LABELS_NAME = "labels.json"
VERSION = 1
LATENTS_PER_FILE = 4096
NUM_TOKENS_SHOWN = 12
NUM_NEAREST = 8


@dataclass(frozen=True)
class Source:
    """What was interpreted, on what.

    Args:
        num_latents: of the SAE.
        prefix_sizes: of the SAE.
        num_tokens: that were read.
        context_length: tokens per window.
        dataset: its description.
        base_model: the language model that the SAE names.
        site: that the SAE names.
        norm_limit: beyond which tokens were left out; 0 for no limit, None where a version wrote it that had none.
        num_outliers: tokens that were left out.
        version: of the files.
    """

    num_latents: int
    prefix_sizes: list[int]
    num_tokens: int
    context_length: int
    dataset: str
    base_model: str | None = None
    site: str | None = None
    norm_limit: float | None = None
    num_outliers: int = 0
    version: int = VERSION


def write_interpretation(
    folder: str | Path,
    scan: Scan,
    sae: MatryoshkaSAE,
    tokenizer: PreTrainedTokenizerBase,
    effects: LogitEffects | None,
    hierarchy: Hierarchy | None = None,
) -> Path:
    """Write a folder that `Interpretation.load` reads: Parquet files with a row a latent, and JSON beside them.

    The folder appears when everything is written.

    Args:
        folder: absent or empty.
        scan: what one pass collected.
        sae: that was scanned.
        tokenizer: of the language model.
        effects: None for a model that writes no tokens.
        hierarchy: None where none was found.

    Raises:
        OutputExistsError: the folder holds something.
    """
    folder, config = Path(folder), sae.config
    source = Source(
        num_latents=config.num_latents,
        prefix_sizes=list(config.prefix_sizes),
        num_tokens=scan.num_tokens,
        context_length=scan.context_length,
        dataset=scan.description,
        base_model=config.base_model,
        site=config.site,
        norm_limit=scan.norm_limit,
        num_outliers=scan.num_outliers,
    )
    with atomic_folder(folder) as draft:
        _write_rows(draft, _Rows(scan, sae, tokenizer, effects), config.num_latents)
        (draft / INDEX_NAME).write_text(json.dumps(source.__dict__, indent=2) + "\n", encoding="utf-8")
        if hierarchy is not None:
            hierarchy.save(draft / HIERARCHY_NAME)
    return folder


def _write_rows(folder: Path, rows: "_Rows", num_latents: int) -> None:
    from datasets import Dataset

    with no_datasets_bars():
        starts = range(0, num_latents, LATENTS_PER_FILE)
        for number, start in enumerate(starts):
            part = [rows.row(latent) for latent in range(start, min(start + LATENTS_PER_FILE, num_latents))]
            columns = {name: [row[name] for row in part] for name in part[0]}
            name = f"latents-{number:05d}-of-{len(starts):05d}.parquet"
            Dataset.from_dict(columns, features=row_features()).to_parquet(folder / name)


def row_features() -> "Features":
    """The columns of the Parquet files."""
    from datasets import Features, Value

    effect = {"token": Value("string"), "id": Value("int32"), "effect": Value("float32")}
    context = {
        "tokens": [Value("string")],
        "activations": [Value("float32")],
        "position": Value("int32"),
        "quantile": Value("float32"),
    }
    return Features(
        {
            "latent": Value("int32"),
            "level": Value("int32"),
            "density": Value("float64"),
            "mean_activation": Value("float64"),
            "max_activation": Value("float64"),
            "histogram": [Value("int64")],
            "histogram_range": Value("float64"),
            "peak_tokens": [Value("string")],
            "promoted": [effect],
            "suppressed": [effect],
            "nearest": [{"latent": Value("int32"), "cosine": Value("float32")}],
            "top": [context],
            "sampled": [context],
        }
    )


class _Rows:
    """The row of any latent."""

    def __init__(
        self, scan: Scan, sae: MatryoshkaSAE, tokenizer: PreTrainedTokenizerBase, effects: LogitEffects | None
    ) -> None:
        self.scan, self.sizes = scan, sae.config.prefix_sizes
        self.firing_rate, self.mean = scan.statistics.firing_rate.tolist(), scan.statistics.mean.tolist()
        self.extremes = None if effects is None else effects.extremes(NUM_TOKENS_SHOWN)
        self.nearest = nearest_latents(sae.W_dec.detach(), NUM_NEAREST)
        self.texts = _texts(tokenizer, _shown_ids(scan, self.extremes))

    def row(self, latent: int) -> Mapping[str, Any]:
        statistics = self.scan.statistics
        top = self._contexts(self.scan.top.of(latent), sampled=False)
        return {
            "latent": latent,
            "level": next(level for level, size in enumerate(self.sizes) if latent < size),
            "density": self.firing_rate[latent],
            "mean_activation": self.mean[latent],
            "max_activation": statistics.maximum[latent].item(),
            "histogram": statistics.histogram[latent].tolist(),
            "histogram_range": 2.0 ** int(statistics.exponent[latent]) if statistics.count[latent] else 0.0,
            "peak_tokens": [
                token for token, _ in Counter(context["tokens"][context["position"]] for context in top).most_common()
            ],
            "promoted": self._effects(latent, 0),
            "suppressed": self._effects(latent, 2),
            "nearest": [
                {"latent": other, "cosine": cosine}
                for other, cosine in zip(*(part[latent].tolist() for part in self.nearest), strict=True)
            ],
            "top": top,
            "sampled": self._contexts(self.scan.sampled.of(latent), sampled=True),
        }

    def _effects(self, latent: int, first: int) -> list[dict[str, Any]]:
        if self.extremes is None:
            return []
        ids, values = self.extremes[first][latent].tolist(), self.extremes[first + 1][latent].tolist()
        return [
            {"token": self.texts[index], "id": index, "effect": value}
            for index, value in zip(ids, values, strict=True)
        ]

    def _contexts(self, contexts: Contexts, sampled: bool) -> list[dict[str, Any]]:
        peaks = contexts.activations.gather(1, contexts.position.unsqueeze(1))[:, 0]
        order = peaks.argsort(descending=True, stable=True).tolist() if sampled else range(len(peaks))
        rows = []
        for rank, index in enumerate(order):
            ids = [token for token in contexts.token_ids[index].tolist() if token != NO_TOKEN]
            rows.append(
                {
                    "tokens": [self.texts[token] for token in ids],
                    "activations": contexts.activations[index, : len(ids)].tolist(),
                    "position": int(contexts.position[index]),
                    "quantile": 1 - (rank + 0.5) / len(peaks) if sampled else None,
                }
            )
        return rows


def _shown_ids(scan: Scan, extremes: tuple[Tensor, ...] | None) -> Tensor:
    """The ids of all tokens that some row shows."""
    of_contexts = [part.contexts.token_ids.flatten().unique().long() for part in (scan.top, scan.sampled)]
    of_effects = [] if extremes is None else [extremes[0].flatten().unique(), extremes[2].flatten().unique()]
    ids = torch.cat([*of_contexts, *of_effects]).unique()
    return ids[ids != NO_TOKEN]


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> dict[int, str]:
    return dict(zip(ids.tolist(), decode_tokens(tokenizer, ids.tolist()), strict=True))


def shards(folder: Path) -> Iterator[Path]:
    """The Parquet files of a folder, in the order of the latents.

    Args:
        folder: of an interpretation.
    """
    return iter(sorted(folder.glob("latents-*.parquet")))
