"""What a run checks and opens before it begins: names, sites, window length, data, number of steps.

All that can be wrong with the arguments comes out here, before long work.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_msae.data import CachedActivations, Documents, as_documents
from hf_msae.errors import InputError
from hf_msae.hub import STORIES
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.sites import Site, resolve_site, site_width
from hf_msae.training.arguments import SAETrainingArguments
from hf_msae.training.collectives import ranks_of
from hf_msae.training.feeds import CacheFeed, Feed, TextFeed
from hf_msae.training.held_out import HeldOut, HeldOutCache, HeldOutText
from hf_msae.training.learner import Learner
from hf_msae.training.resuming import Length
from hf_msae.training.sharded import ShardedSAE

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT_LENGTH = 512


def named_saes(sae: MatryoshkaSAE | Sequence[MatryoshkaSAE] | Mapping[str, MatryoshkaSAE]) -> dict[str, MatryoshkaSAE]:
    """SAEs by name; a name says site, width and k, which is what a grid varies."""
    if isinstance(sae, Mapping):
        return dict(sae)
    saes = [sae] if isinstance(sae, MatryoshkaSAE) else list(sae)
    if not saes:
        raise InputError("There is no SAE to train: give one MatryoshkaSAE, a list or a mapping of them.")
    named: dict[str, MatryoshkaSAE] = {}
    for item in saes:
        site = (item.config.site or "site").replace(":", ".").replace(os.sep, ".")
        name = f"{site}-{item.config.num_latents}-k{item.config.k:g}"
        if name in named:
            raise InputError(
                f"Two SAEs would be called {name!r}; give a mapping from names to SAEs instead of a list."
            )
        named[name] = item
    return named


def resolve_sites(model: PreTrainedModel | None, saes: Mapping[str, MatryoshkaSAE]) -> dict[str, Site]:
    """Each SAE's site, checked against the model's width there and written into its configuration."""
    sites = {}
    for name, sae in saes.items():
        if sae.config.site is None:
            raise InputError(f"The SAE {name!r} has no site. Set config.site, for example to 'layers.12'.")
        if model is None:
            sites[name] = Site.parse(sae.config.site)
            continue
        sites[name] = resolve_site(model, sae.config.site)
        width = site_width(model.eval(), sites[name])
        if width != sae.config.hidden_size:
            raise InputError(
                f"The activations at {sites[name]} have {width} dimensions, but the SAE {name!r} was made for "
                f"hidden_size={sae.config.hidden_size}. Make it with hidden_size={width}."
            )
        if sae.config.k > sae.config.prefix_sizes[0] / 2:
            logger.warning(
                "%s: k=%g is more than half of the first prefix of %d latents, which leaves that level hardly "
                "sparse; make it larger, or k smaller.",
                name,
                sae.config.k,
                sae.config.prefix_sizes[0],
            )
        sae.config.site = str(sites[name].without_wrappers())
        sae.config.base_model = from_anywhere(model.config.name_or_path) or None
    return sites


def from_anywhere(name: str | None) -> str | None:
    """The name of a model or an SAE; of a folder its whole path, which also tells it from a repo on the Hub."""
    is_folder = name is not None and name not in ("", STORIES) and Path(name).is_dir()
    return os.path.abspath(name) if is_folder and name else name


def window_length(model: PreTrainedModel, args: SAETrainingArguments) -> int:
    """Tokens per window; refuses more than the model's positions."""
    config = model.config.get_text_config().to_dict()
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    limit = next((config[name] for name in names if config.get(name)), None)
    if limit is not None:
        limit -= _unused_positions(model)
    if args.context_length is None:
        return min(DEFAULT_CONTEXT_LENGTH, limit or DEFAULT_CONTEXT_LENGTH)
    if limit is not None and args.context_length > limit:
        raise InputError(
            f"context_length={args.context_length} is more than the {limit} positions of "
            f"{model.config.name_or_path or 'the model'}."
        )
    return args.context_length


def _unused_positions(model: PreTrainedModel) -> int:
    """Rows of the embedding of positions that no token gets: RoBERTa and its kin count from behind the padding's."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, torch.nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def runs_together(model: PreTrainedModel, world_size: int) -> bool:
    """Whether the model is one tensor-parallel copy that all processes run, on the same tokens. Raises `ValueError`
    where only some of them do.
    """
    parts = model.tp_size or 1
    if parts not in (1, world_size):
        raise InputError(
            f"The language model is split over {parts} processes, and the run has {world_size}. Tensor parallel "
            "models must be split over all processes of the run."
        )
    return parts > 1


def open_data(
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    saes: Mapping[str, MatryoshkaSAE],
    sites: Sequence[Site],
    args: SAETrainingArguments,
    train_dataset: Any,
    eval_dataset: Any,
    rank: int,
    world_size: int,
) -> tuple[HeldOut, Feed, Documents | None]:
    """What is held out, what is trained on, and its documents where it has any; the windows' form is written into the
    SAEs' configurations.
    """
    held_out: HeldOut | None = None
    together = model is not None and runs_together(model, world_size)
    if model is not None and tokenizer is not None:
        context_length = window_length(model, args)
        if eval_dataset is not None:
            documents = as_documents(eval_dataset)
            held_out = HeldOutText(model, tokenizer, sites, documents, args, context_length, together)
    if isinstance(train_dataset, CachedActivations):
        skip_rows = 0
        if held_out is None:
            held_out = HeldOutCache(train_dataset, args)
            skip_rows = held_out.num_rows
        return held_out, CacheFeed(train_dataset, sites, args, skip_rows, rank, world_size), None
    if model is None or tokenizer is None:
        raise InputError("Training on text needs the language model and its tokenizer (processing_class).")
    documents = as_documents(train_dataset)
    if held_out is None:
        held_out = HeldOutText(model, tokenizer, sites, documents, args, context_length, together)
        documents = documents.without(held_out.split)
    for sae in saes.values():
        sae.config.context_length = context_length
        sae.config.prepend_bos = tokenizer.bos_token_id is not None
    feed = TextFeed(model, tokenizer, sites, documents, args, context_length, rank, world_size, together)
    return held_out, feed, documents


def set_norm_limits(
    saes: Mapping[str, MatryoshkaSAE],
    sites: Mapping[str, Site],
    feed: Feed,
    held_out: HeldOut,
    resumed: Mapping[str, MatryoshkaSAEConfig],
) -> None:
    """Say which activations are outliers, to the feed and in every SAE's configuration: as in the checkpoint that the
    run goes on from (`resumed`, the configurations in it), else as the main process finds it.
    """
    limits: dict[Site, float | None]
    if resumed:
        limits = {sites[name]: config.norm_limit for name, config in resumed.items()}
    else:
        # All processes look, for they may run one language model together. What they find differs by rounding.
        limits = broadcast_object_list([feed.find_norm_limits(held_out)])[0]
    feed.norm_limits = limits
    for name, sae in saes.items():
        sae.config.norm_limit = limits.get(sites[name])


def make_learners(
    saes: Mapping[str, MatryoshkaSAE],
    sites: Mapping[str, Site],
    args: SAETrainingArguments,
    length: Length,
    accelerator: Accelerator,
) -> list[Learner]:
    """A learner for each SAE, on this process's device: of all its latents, or of some where they are sharded."""
    learners = []
    for name, sae in saes.items():
        model = _rows_here(sae, args, accelerator) if args.shard_latents else sae.to(accelerator.device)
        learners.append(Learner(name, model, sites[name], args, length.first, accelerator))
        learners[-1].extensions = length.extensions
    return learners


def _rows_here(sae: MatryoshkaSAE, args: SAETrainingArguments, accelerator: Accelerator) -> ShardedSAE:
    part = ShardedSAE(sae.config, ranks_of(accelerator), accelerator.device)
    if args.init_from is not None:
        part.take_rows(sae)
    return part


def count_steps(args: SAETrainingArguments, feed: Feed, num_processes: int) -> int:
    """Steps of the run: as asked for, else what `max_tokens` or one pass over the data gives."""
    if args.max_steps > 0:
        return args.max_steps
    per_step = args.tokens_per_step(num_processes)
    tokens = args.max_tokens if args.max_tokens is not None else feed.tokens_per_pass()
    if tokens < per_step:
        raise InputError(
            f"There are {tokens:,} tokens to train on, fewer than one step of {per_step:,}. Use more data, a smaller "
            "per_device_train_batch_size, or hold out fewer tokens (eval_tokens, calibration_tokens)."
        )
    return tokens // per_step
