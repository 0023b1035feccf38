"""The hierarchy between an SAE's levels with names for its latents: read from an interpretation, or measured."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data.documents import DocumentsLike
from hf_msae.errors import InputError
from hf_msae.interpret.edges import find_hierarchy
from hf_msae.interpret.effects import decode_tokens
from hf_msae.interpret.hierarchy import Hierarchy
from hf_msae.interpret.pages import name_of
from hf_msae.interpret.scan import Scan, scan
from hf_msae.interpret.store import Interpretation, InterpretationError
from hf_msae.modeling import MatryoshkaSAE


def read_hierarchy(source: str | Path, subfolder: str | None = None) -> tuple[Hierarchy, Sequence[str]] | None:
    """The hierarchy of an SAE that was interpreted, and its latents' names.

    Args:
        source: a folder or a Hub repo with the SAE.
        subfolder: of the SAE within it.

    Returns:
        None where there is no interpretation, or it has no hierarchy.
    """
    try:
        interpretation = Interpretation.load(source, subfolder=subfolder)
    except InterpretationError:
        return None
    return None if interpretation.hierarchy is None else (interpretation.hierarchy, interpretation.names)


def measure_hierarchy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: MatryoshkaSAE,
    documents: DocumentsLike,
    *,
    max_tokens: int = 200_000,
    site: str | None = None,
    called: str = "The SAE",
) -> tuple[Hierarchy, list[str]]:
    """Find which later latents refine which earlier ones on some text, and name the latents.

    Args:
        model: the language model.
        tokenizer: its own.
        sae: in evaluation mode; it is moved to the model's device.
        documents: `Documents`, or what `as_documents` takes.
        max_tokens: how many tokens to read.
        site: where in the model, if the SAE does not say.
        called: the SAE's name in errors.

    Returns:
        The hierarchy, and for every latent the tokens on which it is most active.

    Raises:
        InputError: the SAE has one level only, or does not fit the site.
    """
    check_levels(sae, called)
    found = scan(
        model,
        tokenizer,
        sae,
        documents,
        max_tokens=max_tokens,
        record_tokens=max_tokens,
        site=site,
        sampled_contexts=0,
    )
    texts = [decode_tokens(tokenizer, _peak_ids(found, latent)) for latent in range(sae.config.num_latents)]
    names = [name_of(list(dict.fromkeys(tokens))) for tokens in texts]
    return find_hierarchy(sae, found.firings), names


def check_levels(sae: MatryoshkaSAE, called: str = "The SAE") -> None:
    """Check that an SAE has levels between which there can be a hierarchy.

    Args:
        sae: the SAE.
        called: its name in the error.

    Raises:
        InputError: it has one level only.
    """
    if len(sae.config.prefix_sizes) < 2:
        raise InputError(f"{called} has one level only, and a tree needs two: it is a plain SAE.")


def _peak_ids(found: Scan, latent: int) -> list[int]:
    contexts = found.top.of(latent)
    ids: list[int] = contexts.token_ids.gather(1, contexts.position.unsqueeze(1))[:, 0].tolist()
    return ids
