"""A whole decomposition: names for latents, a meta-SAE trained and saved with its browser, the latents worth a look.

What is measured, and after which paper, stands in `hf_msae.research.meta`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.atomic_files import atomic_folder
from hf_msae.data.documents import DocumentsLike
from hf_msae.errors import InputError, OutputExistsError
from hf_msae.evaluation.activations import collect
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.research.meta import Decomposition, MetaResult, decompose, is_meta_sae, train_meta_sae, unit_rows
from hf_msae.research.meta_browser import render_browser, token_labels
from hf_msae.sites import find_site

BROWSER_NAME, FACTS_NAME = "decompositions.html", "meta_sae.json"
DEFAULT_CONTEXT_LENGTH = 256


def name_latents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sae: MatryoshkaSAE,
    documents: DocumentsLike,
    *,
    num_tokens: int = 20_000,
    called: str = "",
) -> list[str]:
    """Name the latents of an SAE by the tokens on which they are most active.

    Args:
        model: the language model that the SAE reads.
        tokenizer: its own.
        sae: in evaluation mode.
        documents: `Documents`, or what `as_documents` takes.
        num_tokens: how many tokens to read.
        called: the SAE's name in errors.

    Returns:
        A name for each latent, empty for one that never fires in this text.

    Raises:
        SiteError: the SAE records no site, or does not fit it.
        DatasetError: the documents have fewer tokens.
    """
    site = find_site(model, sae.config, called=called)
    length = sae.config.context_length or DEFAULT_CONTEXT_LENGTH
    text = collect(model, tokenizer, site, documents, num_tokens=num_tokens, context_length=length)
    return token_labels(text, tokenizer, sae)


def make_meta_sae(
    sae: MatryoshkaSAE,
    folder: str | Path,
    *,
    labels: Sequence[str] = (),
    name: str | None = None,
    k: float = 4.0,
    max_steps: int = 1500,
    seed: int = 0,
    **options: Any,
) -> MetaResult:
    """Train a meta-SAE and save it, its numbers, and a page in which all latents can be looked up.

    Args:
        sae: whose decoder rows are decomposed.
        folder: to make: the meta-SAE, `meta_sae.json` and `decompositions.html`.
        labels: the latents' names for the page, from [`name_latents`].
        name: of the SAE, which the meta-SAE records.
        k: mean number of meta-latents per latent.
        max_steps: of training.
        seed: fixes initialisation and order.
        options: what else [`train_meta_sae`] takes.

    Returns:
        The meta-SAE and how much it explains.

    Raises:
        OutputExistsError: the folder exists.
        InputError: as [`train_meta_sae`] raises it.
    """
    folder = Path(folder)
    check_output(folder)
    result = train_meta_sae(sae, k=k, max_steps=max_steps, seed=seed, name=name, **options)
    facts = {
        "SAE": name or sae.config.name_or_path,
        "rows": len(result.rows),
        "meta-latents": result.sae.config.num_latents,
        "k": k,
        "L0": round(result.l0, 3),
        "explained": round(result.explained, 4),
        "explained of random rows": None if result.explained_random is None else round(result.explained_random, 4),
        "unused": round(result.dead, 4),
        "steps": max_steps,
        "seed": seed,
    }
    with atomic_folder(folder) as draft:
        result.sae.save_pretrained(draft)
        (draft / FACTS_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        page = render_browser(result.sae, sae.to(result.sae.device), facts, labels)  # type: ignore[arg-type]
        (draft / BROWSER_NAME).write_text(page, encoding="utf-8")
    return result


def check_output(folder: Path) -> None:
    """Check that a meta-SAE may be written.

    Args:
        folder: where to.

    Raises:
        OutputExistsError: the folder exists.
    """
    if folder.exists():
        raise OutputExistsError(
            f"{folder} exists already; give another --output-dir, or show it with --meta-sae {folder}."
        )


def load_meta_sae(source: str | Path) -> MatryoshkaSAE:
    """A meta-SAE that is there already, in evaluation mode.

    Args:
        source: a folder or a repo of the Hub.

    Raises:
        InputError: it is an SAE of activations.
    """
    meta = MatryoshkaSAE.from_pretrained(source).eval()
    if not is_meta_sae(meta):
        raise InputError(f"{source} is an SAE of activations, not a meta-SAE; make one without --meta-sae.")
    return meta


def choose_decompositions(
    meta: MatryoshkaSAE, sae: MatryoshkaSAE, latents: Sequence[int] = (), *, most: int = 8, neighbours: int = 5
) -> list[Decomposition]:
    """What some latents are made of: those asked for, or those of at least two parts that are explained best.

    Args:
        meta: the meta-SAE.
        sae: that it was trained on.
        latents: of the SAE.
        most: how many to choose where none are asked for.
        neighbours: other latents to give for each meta-latent.
    """
    sae = sae.to(meta.device)  # type: ignore[arg-type]
    if not latents:
        found = decompose(meta, sae, unit_rows(sae)[0].tolist(), neighbours=0)
        composed = sorted((item for item in found if len(item.parts) > 1), key=lambda item: -item.cosine)
        latents = [item.latent for item in composed[:most]]
    return decompose(meta, sae, latents, neighbours=neighbours)
