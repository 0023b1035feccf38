"""All of it at once: read, find the hierarchy, take the effects on the output, write."""

import logging
import random
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data import TokenWindows, as_documents, pad_id, vocabulary
from hf_msae.data.documents import DocumentsLike
from hf_msae.errors import OutputExistsError
from hf_msae.interpret.edges import find_hierarchy
from hf_msae.interpret.effects import LogitEffects
from hf_msae.interpret.hierarchy import HierarchySettings
from hf_msae.interpret.labels import LabelError, Labeller
from hf_msae.interpret.later_layers import mean_jacobian
from hf_msae.interpret.pages import Label
from hf_msae.interpret.scan import Scan, scan
from hf_msae.interpret.store import Interpretation
from hf_msae.interpret.writing import write_interpretation
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.sites import find_output_site, find_site

logger = logging.getLogger(__name__)

# Pages whose contexts stand for "not this latent" in the tests of a label.
NUM_OTHERS = 12
# Of a window over which effects through later layers are averaged.
LATER_TOKENS = 32


def interpret(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: MatryoshkaSAE,
    documents: DocumentsLike,
    folder: str | Path,
    *,
    max_tokens: int,
    settings: HierarchySettings | None = None,
    later_windows: int = 0,
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
        later_windows: windows of 32 tokens over which effects on the output are averaged through the later layers; 0
            for the direct effect alone, which costs nothing.
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
    jacobian = None
    if later_windows and model.get_output_embeddings() is not None:
        jacobian = later_effects(model, tokenizer, sae, documents, later_windows, options.get("site"))
    effects = logit_effects(model, sae, collected, jacobian)
    return Interpretation(write_interpretation(folder, collected, sae, tokenizer, effects, hierarchy))


def later_effects(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: MatryoshkaSAE,
    documents: DocumentsLike,
    num_windows: int,
    site: str | None = None,
) -> Tensor:
    """The mean derivative of the output through the later layers, as [`LogitEffects`] takes it.

    Args:
        model: in evaluation mode, with an unembedding.
        tokenizer: its own.
        sae: whose decoder's site it is.
        documents: as [`scan`] takes them.
        num_windows: of `LATER_TOKENS` tokens.
        site: where the SAE reads; by default what its configuration records.
    """
    place = find_output_site(model, sae.config, find_site(model, sae.config, site))
    rows = vocabulary(model)
    reader = TokenWindows(as_documents(documents).shuffle(0), tokenizer, context_length=LATER_TOKENS, vocab_size=rows)
    limit = sae.config.norm_limit_out if sae.config.is_transcoder else sae.config.norm_limit
    windows = list(islice(reader, num_windows))
    return mean_jacobian(model, place, windows, pad_id=pad_id(tokenizer, rows), norm_limit=limit)


def logit_effects(
    model: PreTrainedModel, sae: MatryoshkaSAE, collected: Scan, jacobian: Tensor | None = None
) -> LogitEffects | None:
    """Effects on the model's output.

    Args:
        model: the language model.
        sae: that was scanned.
        collected: what the scan collected.
        jacobian: through the later layers, from `later_effects`; by default effects are direct.

    Returns:
        None where the model has no unembedding or the site is not in the residual stream.
    """
    width = collected.references.shape[-1]
    if model.get_output_embeddings() is None or (jacobian is None and width != sae.config.output_size):
        return None
    return LogitEffects(model, sae.W_dec.to(collected.references.device), collected.references, jacobian)


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
