"""All of it at once: read, find the hierarchy, take the effects on the output, write."""

import logging
import random
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data.documents import DocumentsLike
from hf_msae.errors import OutputExistsError
from hf_msae.interpret.edges import find_hierarchy
from hf_msae.interpret.effects import LogitEffects
from hf_msae.interpret.hierarchy import HierarchySettings
from hf_msae.interpret.labels import LabelError, Labeller
from hf_msae.interpret.pages import Label
from hf_msae.interpret.scan import Scan, scan
from hf_msae.interpret.store import Interpretation
from hf_msae.interpret.writing import write_interpretation
from hf_msae.modeling import MatryoshkaSAE

logger = logging.getLogger(__name__)

# Pages whose contexts stand for "not this latent" in the tests of a label.
NUM_OTHERS = 12


def interpret(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: MatryoshkaSAE,
    documents: DocumentsLike,
    folder: str | Path,
    *,
    max_tokens: int,
    settings: HierarchySettings | None = None,
    **options: Any,
) -> Interpretation:
    """Make the pages of all latents and write them into a new folder.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        sae: in evaluation mode.
        documents: as [`scan`] takes them.
        folder: absent or empty.
        max_tokens: how many tokens to read.
        settings: thresholds of the hierarchy; the defaults, where none are given.
        **options: further arguments of [`scan`].

    Returns:
        The interpretation, read from the folder.

    Raises:
        OutputExistsError: the folder holds something; nothing was read then.
        HfMsaeError: as [`scan`] raises it.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError(f"{folder} exists and is not an empty folder; name another, or remove it first.")
    collected = scan(model, tokenizer, sae, documents, max_tokens=max_tokens, **options)
    several = len(sae.config.prefix_sizes) > 1
    hierarchy = find_hierarchy(sae, collected.firings, settings) if several and collected.firings.num_tokens else None
    effects = logit_effects(model, sae, collected)
    return Interpretation(write_interpretation(folder, collected, sae, tokenizer, effects, hierarchy))


def logit_effects(model: PreTrainedModel, sae: MatryoshkaSAE, collected: Scan) -> LogitEffects | None:
    """Effects on the model's output.

    Args:
        model: the language model.
        sae: that was scanned.
        collected: what the scan collected.

    Returns:
        None where the model has no unembedding or the site is not in the residual stream.
    """
    width = collected.references.shape[-1]
    if model.get_output_embeddings() is None or width != sae.config.output_size:
        return None
    return LogitEffects(model, sae.W_dec.to(collected.references.device), collected.references)


def write_labels(labeller: Labeller, interpretation: Interpretation, num_labels: int = 100) -> None:
    """Name the first latents that fire, test the names, and keep both with the interpretation.

    Names so far are kept if it is interrupted. A latent for which the model finds no name is said to have none.

    Args:
        labeller: the chat model that names and is tested.
        interpretation: with the pages; it is written to.
        num_labels: how many latents are named.
    """
    density = interpretation.column("density")
    firing = [latent for latent, share in enumerate(density) if share > 0]
    chosen = random.Random(labeller.seed).sample(firing, min(NUM_OTHERS, len(firing)))
    others = [interpretation.page(latent) for latent in chosen]
    for latent in firing[:num_labels]:
        page = interpretation.page(latent)
        try:
            label: Label = labeller.label_and_score(page, others)
        except LabelError as error:
            logger.warning("Latent %d stays without a label: %s", latent, error)
            continue
        interpretation.save_labels({latent: label})
