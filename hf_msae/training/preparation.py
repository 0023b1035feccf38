"""A run before its first step: its SAEs' names, sites, and the data that they get.

All that can be wrong with the arguments comes out here, before long work.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.adapters import has_adapter
from hf_msae.data import TOKEN_IDS, CachedActivations, as_documents
from hf_msae.data.cache import TrainingData
from hf_msae.data.documents import DocumentsLike
from hf_msae.data.lookups import check_lookup, record_tokenizer
from hf_msae.errors import InputError
from hf_msae.language_models import origin_of
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.quantization import quantization_of
from hf_msae.sites import Site, find_output_site, find_site, recorded_output_site, recorded_site
from hf_msae.training.held_out import HeldOut, HeldOutCache, HeldOutText
from hf_msae.training.loaders import (
    ActivationLoader,
    CacheLoader,
    TextLoader,
    TextSource,
    is_tensor_parallel,
    window_length,
)
from hf_msae.training.run import Run
from hf_msae.worlds.stories import STORIES

logger = logging.getLogger(__name__)


def named_saes(sae: MatryoshkaSAE | Sequence[MatryoshkaSAE] | Mapping[str, MatryoshkaSAE]) -> dict[str, MatryoshkaSAE]:
    """Name the SAEs by what a grid varies: site, width and k.

    Args:
        sae: One SAE, several, or a mapping from names, which stay.

    Returns:
        SAEs by name.

    Raises:
        InputError: Where there is none, or where two would get one name.
    """
    if isinstance(sae, Mapping):
        return dict(sae)
    saes = [sae] if isinstance(sae, MatryoshkaSAE) else list(sae)
    if not saes:
        raise InputError("There is no SAE to train: give one MatryoshkaSAE, a list or a mapping of them.")
    named: dict[str, MatryoshkaSAE] = {}
    for item in saes:
        site = (item.config.site or "site").replace(":", ".").replace(os.sep, ".")
        if item.config.is_transcoder:
            site += f"-to-{item.config.site_out or 'site'}".replace(":", ".").replace(os.sep, ".")
        name = f"{site}-{item.config.num_latents}-k{item.config.k:g}"
        if name in named:
            raise InputError(
                f"Two SAEs would be called {name!r}; give a mapping from names to SAEs instead of a list."
            )
        named[name] = item
    return named


def resolve_sites(model: PreTrainedModel | None, saes: Mapping[str, MatryoshkaSAE]) -> dict[str, Site]:
    """Find each SAE's site in the model, and write it into the SAE's configuration.

    Args:
        model: The language model; None where activations come from a cache.
        saes: SAEs by name.

    Returns:
        Sites by the SAEs' names.

    Raises:
        SiteError: Where an SAE has no site, the model has no such site, or another width there.
    """
    sites = {}
    for name, sae in saes.items():
        if model is None:
            sites[name] = Site.parse(recorded_site(sae.config, called=name))
            continue
        sites[name] = find_site(model.eval(), sae.config, called=name)
        if sae.config.k > sae.config.prefix_sizes[0] / 2:
            logger.warning(
                "%s: k=%g is more than half of the first prefix of %d latents, which leaves that level hardly "
                "sparse; make it larger, or k smaller.",
                name,
                sae.config.k,
                sae.config.prefix_sizes[0],
            )
        sae.config.site = str(sites[name].without_wrappers())
        _record_model(sae, model)
    return sites


def resolve_output_sites(
    model: PreTrainedModel | None, saes: Mapping[str, MatryoshkaSAE], sites: Mapping[str, Site]
) -> dict[str, Site]:
    """Find where what each SAE reconstructs comes from: its own site, or that of a transcoder, which is written down.

    Args:
        model: The language model; None where activations come from a cache.
        saes: SAEs by name.
        sites: Where they read.

    Returns:
        Sites by the SAEs' names.

    Raises:
        SiteError: Where a transcoder has no such site, the model none of that width, or comes to it before it comes to
            what the transcoder reads.
    """
    found = {}
    for name, sae in saes.items():
        if model is not None:
            found[name] = find_output_site(model, sae.config, sites[name], called=name)
        else:
            found[name] = Site.parse(recorded_output_site(sae.config, called=name))
        if sae.config.is_transcoder:
            sae.config.site_out = str(found[name].without_wrappers())
    return found


def prepare_lookups(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    saes: Mapping[str, MatryoshkaSAE],
    train_dataset: TrainingData,
) -> list[Site]:
    """Write into tokenized SAEs whose tokens they look up, and check those that know it already.

    Args:
        model: The language model; None where activations come from a cache.
        tokenizer: Its tokenizer.
        saes: SAEs by name.
        train_dataset: What is trained on.

    Returns:
        `TOKEN_IDS`, where batches are to hold them.

    Raises:
        InputError: The tokens are of another tokenizer, or the data holds none.
    """
    tokenized = {name: sae.config for name, sae in saes.items() if sae.config.is_tokenized}
    for name, config in tokenized.items():
        if isinstance(train_dataset, CachedActivations):
            raise InputError(
                f"{name} is tokenized: it adds a vector of each activation's token, and an activation cache holds no "
                "tokens. Train on the text itself, or leave --token-lookup (lookup_size) out."
            )
        if model is not None and tokenizer is not None:
            check_lookup(config, model, tokenizer, called=name)
            record_tokenizer(config, tokenizer)
            config.lookup_tokenizer = from_anywhere(config.lookup_tokenizer)
    return [TOKEN_IDS] if tokenized else []


def _record_model(sae: MatryoshkaSAE, model: PreTrainedModel) -> None:
    """Write into an SAE's configuration which language model it reads, and which adapter on it."""
    config, origin = sae.config, origin_of(model)
    config.base_model = from_anywhere(model.config.name_or_path) or None
    config.base_model_quantization = quantization_of(model)
    if origin is not None:
        config.base_model_revision = origin.revision
        config.adapter, config.adapter_revision = from_anywhere(origin.adapter), origin.adapter_revision
    elif not has_adapter(model):
        config.adapter = config.adapter_revision = None
    elif config.adapter is None:
        logger.warning(
            "The language model has a PEFT adapter whose name is not known. Set config.adapter of the SAE to its "
            "folder or repo, or load the model with hf_msae.language_models.load_language_model, so that the SAE "
            "finds it again."
        )


def from_anywhere(name: str | None) -> str | None:
    """The name of a model or an SAE; of a folder its whole path, which also tells it from a repo on the Hub."""
    is_folder = name is not None and name not in ("", STORIES) and Path(name).is_dir()
    return os.path.abspath(name) if is_folder and name else name


def open_data(
    run: Run,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    saes: Mapping[str, MatryoshkaSAE],
    sites: Sequence[Site],
    train_dataset: TrainingData,
    eval_dataset: "DocumentsLike | None",
) -> tuple[HeldOut, ActivationLoader]:
    """Open what the run trains and measures on; the windows' form is written into the SAEs' configurations.

    Args:
        run: The run.
        model: The language model; None where all activations come from a cache.
        tokenizer: Its tokenizer.
        saes: SAEs by name.
        sites: Where activations are taken.
        train_dataset: As [`SAETrainer`] takes it.
        eval_dataset: As [`SAETrainer`] takes it; None to hold out some of what is trained on.

    Returns:
        What is held out, and this process's training data.

    Raises:
        DatasetError: For data that cannot be used.
        InputError: Where the language model is missing, or does not fit the arguments.
    """
    held_out: HeldOut | None = None
    source: TextSource | None = None
    if model is not None and tokenizer is not None:
        together = is_tensor_parallel(model, run.num_processes)
        source = TextSource(model, tokenizer, sites, window_length(model, run.args), together)
        if eval_dataset is not None:
            held_out = HeldOutText(source, as_documents(eval_dataset), run.args)
    if isinstance(train_dataset, CachedActivations):
        train_dataset = _same_everywhere(run, train_dataset)
        _check_cache(saes, sites, model, train_dataset)
        _record_quantization(saes, model, train_dataset)
        if held_out is not None:
            return held_out, CacheLoader(run, train_dataset, sites, skip_rows=0)
        first_rows = HeldOutCache(train_dataset, run.args)
        return first_rows, CacheLoader(run, train_dataset, sites, first_rows.num_rows)
    if source is None:
        raise InputError("Training on text needs the language model and its tokenizer (processing_class).")
    documents = as_documents(train_dataset)
    if held_out is None:
        held_out = HeldOutText(source, documents, run.args)
        documents = documents.without(held_out.split)
    for sae in saes.values():
        sae.config.context_length = source.context_length
        sae.config.prepend_bos = source.tokenizer.bos_token_id is not None
    return held_out, TextLoader(run, source, documents)


def _same_everywhere(run: Run, cache: CachedActivations) -> CachedActivations:
    """The cache as the main process found it: a push may have come between one process and the next."""
    files = cache.files.at_commit(run.broadcast(cache.files.commit))
    return cache if files is cache.files else CachedActivations(files, batch_size=1)


def _check_cache(
    saes: Mapping[str, MatryoshkaSAE],
    sites: Sequence[Site],
    model: PreTrainedModel | None,
    cache: CachedActivations,
) -> None:
    """Refuse activations of another width than an SAE's; where another model's name is on them, a warning says so."""
    widths = {str(site.without_wrappers()): cache.index["hidden_sizes"].get(str(site)) for site in sites}
    for name, sae in saes.items():
        config = sae.config
        ends = [("reads", config.site, config.hidden_size), ("reconstructs", config.site_out, config.output_size)]
        for does, place, width in ends:
            there = None if place is None else widths.get(str(Site.parse(place).without_wrappers()))
            if there is not None and there != width:
                raise InputError(
                    f"The SAE {name} {does} activations of {width} dimensions, but {cache.files.description}, of "
                    f"{cache.index.get('base_model') or 'an unrecorded model'}, has {there} at {place}. Make an SAE "
                    "of that width, or give a cache of the other model."
                )
    made_with = cache.index.get("base_model")
    if model is not None and made_with and Path(made_with).name != Path(model.config.name_or_path or "").name:
        logger.warning(
            "%s has activations of %s, and the language model given is %s. The SAEs record the latter, which measures "
            "cross-entropy.",
            cache.files.description,
            made_with,
            model.config.name_or_path or "an unnamed one",
        )


def _record_quantization(
    saes: Mapping[str, MatryoshkaSAE], model: PreTrainedModel | None, cache: CachedActivations
) -> None:
    """Write into the SAEs' configurations how the language model of a cache was quantized, where the cache says so."""
    if "quantization" not in cache.index:
        return
    quantization = cache.index["quantization"]
    if model is not None and quantization_of(model) != quantization:
        logger.warning(
            "%s has activations of %s %s, and the language model given is %s: cross-entropy is measured with another "
            "model than the SAEs are trained on.",
            cache.files.description,
            cache.index.get("base_model"),
            f"in {quantization}" if quantization else "as it was saved",
            f"in {quantization_of(model)}" if quantization_of(model) else "as it was saved",
        )
    for sae in saes.values():
        sae.config.base_model_quantization = quantization


def set_norm_limits(
    run: Run,
    saes: Mapping[str, MatryoshkaSAE],
    sites: Mapping[str, Site],
    loader: ActivationLoader,
    held_out: HeldOut,
    resumed: Mapping[str, MatryoshkaSAEConfig],
    output_sites: Mapping[str, Site] | None = None,
) -> None:
    """Say which activations are outliers (attention sinks), to the loader and in every SAE's configuration.

    A run that goes on keeps the limits that it began with, and a cache those by which it was written. Else they are
    found on held-out text, as the main process finds them.

    Args:
        run: The run.
        saes: SAEs by name.
        sites: Sites by the SAEs' names.
        loader: What is trained on.
        held_out: What limits are found on.
        resumed: The configurations in the checkpoint that the run goes on from, by the SAEs' names.
        output_sites: Where what they reconstruct comes from; by default `sites`.
    """
    limits: dict[Site, float | None] | None
    if resumed:
        limits = {sites[name]: config.norm_limit for name, config in resumed.items()}
        if output_sites is not None:
            written = {name: config for name, config in resumed.items() if config.is_transcoder}
            limits |= {output_sites[name]: config.norm_limit_out for name, config in written.items()}
    else:
        limits = loader.recorded_norm_limits()
    if limits is None:
        if not isinstance(held_out, HeldOutText):
            raise TypeError(f"No limits are recorded, and none can be found on {type(held_out).__name__}.")
        # All processes look, for they may run one language model together. What they find differs by rounding.
        limits = run.broadcast(held_out.find_norm_limits())
    loader.norm_limits = limits
    for name, sae in saes.items():
        sae.config.norm_limit = limits.get(sites[name])
        if output_sites is not None and sae.config.is_transcoder:
            sae.config.norm_limit_out = limits.get(output_sites[name])
