"""`--model` and `--dataset`: what they name, loaded, with errors in words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import __version__ as transformers_version
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from hf_msae import language_models
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.free_cores import take_free_cores
from hf_msae.data import CachedActivations, Documents, as_documents, load_documents
from hf_msae.devices import move_language_model, stays_on_cpu
from hf_msae.errors import InputError
from hf_msae.language_models import model_of, model_to_load
from hf_msae.modeling import MatryoshkaSAE, MatryoshkaSAEConfig
from hf_msae.quantization import quantization_to_be_had, quantization_to_load
from hf_msae.shared_caches import is_cache_source, load_activation_cache
from hf_msae.worlds.stories import STORIES, StoryWorld

# Bars are for what takes time. The weights of an SAE, or of a small model on disk, are there before one could be read.
BAR_DELAY = 3.0

# As many stories as `hf-msae train` reads when no dataset is given: about 1.6 million tokens.
STORY_DOCUMENTS = 15_000


def _late_bar(bar: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A bar of transformers; that of weights appears where loading takes long."""
    return bar(*args, **({"delay": BAR_DELAY} if options.get("desc") == "Loading weights" else {}), **options)


# For the process, which is a command's: as long as it runs, nothing else shows bars of transformers.
transformers_logging.set_tqdm_hook(_late_bar)


def load_language_model(
    args: SourceArguments, tensor_parallel: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode, and its tokenizer.

    It is on this process's device, or split by `device_map` or over all processes.
    """
    hub: dict[str, Any] = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    quantization = None if args.quantization == "none" else args.quantization
    if tensor_parallel:
        places = _tensor_parallel(args, language_models.load_language_model_config(args.model, **hub))
    elif quantization is not None and args.device_map is None:
        # What is quantized is not moved afterwards.
        places = {"device_map": {"": PartialState().device}}
    else:
        places = {"device_map": args.device_map}
    dtype = args.model_dtype if args.model_dtype == "auto" else getattr(torch, args.model_dtype)
    model, tokenizer = language_models.load_language_model(
        args.model, dtype=dtype, quantization=quantization, **places, **hub
    )
    if args.device_map is None and not tensor_parallel:
        move_language_model(model, PartialState().device)  # type: ignore[arg-type]
    return model, tokenizer


def choose_device(use_cpu: bool, **process_group: Any) -> None:
    """Have this process use the accelerator, if there is one, or those cores that are free.

    To be called before anything is loaded. Several processes must round alike, so each takes the threads it is given.
    """
    state = PartialState(cpu=stays_on_cpu(use_cpu), **process_group)
    if state.device.type == "cpu" and state.num_processes == 1:
        take_free_cores()


def _tensor_parallel(args: SourceArguments, config: PreTrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` must be told to split the model over all processes."""
    processes = PartialState().num_processes
    if processes == 1:
        raise InputError(
            "--tensor-parallel splits the language model over the processes of the run, and there is one. Launch "
            "several: torchrun --nproc_per_node 8 -m hf_msae.cli train ..."
        )
    if args.device_map is not None:
        raise InputError("--tensor-parallel and --device-map are two ways to split a language model; choose one.")
    if not config.get_text_config().base_model_tp_plan:
        raise InputError(
            f"transformers has no tensor parallel plan for {config.model_type}, so --tensor-parallel cannot split "
            f"{args.model!r}. --device-map auto splits any model, with a single process."
        )
    if tuple(int(part) for part in transformers_version.split(".")[:2]) < (5, 14):
        return {"tp_plan": "auto"}
    return {"distributed_config": DistributedConfig(tp_size=processes)}


def check_sae_place(name: str) -> None:
    """Raises ValueError for what can only be meant as a folder, and is none, before the Hub is asked for it."""
    place = Path(name).expanduser()
    in_a_folder = place.parent != Path() and place.parent.is_dir()
    if not place.is_dir() and (name.startswith((".", "/", "~")) or in_a_folder):
        raise InputError(f"There is no folder {name}. Give a folder that holds an SAE, or a Hub repo.")


def load_sae(name: str, subfolder: str, args: SourceArguments) -> MatryoshkaSAE:
    """The SAE in evaluation mode; `args` gets the model that it was trained on where none was asked for."""
    check_sae_place(name)
    sae = MatryoshkaSAE.from_pretrained(name, subfolder=subfolder).eval()
    model_name, revision = model_of(sae.config)
    if args.model == STORIES and model_name is not None:
        args.model, args.model_revision = model_name, args.model_revision or revision
        args.quantization = args.quantization or quantization_to_load(sae.config)  # type: ignore[assignment]
    return sae


def load_sae_prefix(name: str, subfolder: str, prefix: int | None) -> MatryoshkaSAE:
    """The SAE in evaluation mode, cut to one of its levels where that is asked for.

    Raises InputError for a prefix that is none of its levels.
    """
    check_sae_place(name)
    sae = MatryoshkaSAE.from_pretrained(name, subfolder=subfolder).eval()
    if prefix is None:
        return sae
    if prefix not in sae.config.prefix_sizes:
        known = ", ".join(f"{size:,}" for size in sae.config.prefix_sizes)
        raise InputError(f"--prefix {prefix}: the prefixes of {name} are {known}.")
    return sae.truncate(prefix)


def load_training_data(args: SourceArguments) -> tuple[Documents | CachedActivations, Documents | None]:
    """What `SAETrainer` takes as `train_dataset` and `eval_dataset`."""
    if args.dataset is None:
        if args.model != STORIES:
            raise InputError(f"--model {args.model} needs a --dataset. (Only the story model has one by default.)")
        stories = as_documents(StoryWorld(seed=0).documents(STORY_DOCUMENTS))
        stories.description = f"{STORY_DOCUMENTS:,} stories of hf_msae.worlds.stories"
        return stories, _eval_data(args)
    if is_cache_source(args.dataset, revision=args.dataset_revision):
        return _open_cache(args, args.dataset), _eval_data(args)
    documents = load_documents(
        args.dataset,
        name=args.dataset_name,
        split=args.dataset_split,
        revision=args.dataset_revision,
        text_column=args.text_column,
        messages_column=args.messages_column,
        separator=_unescaped(args.separator),
    )
    return documents, _eval_data(args)


def _open_cache(args: SourceArguments, source: str) -> CachedActivations:
    """An activation cache; `args` gets the quantization of the model that it was made with, if none was asked for."""
    cache = load_activation_cache(source, revision=args.dataset_revision)
    args.quantization = args.quantization or quantization_to_be_had(  # type: ignore[assignment]
        cache.index.get("quantization"),
        f"{cache.files.description} was made with {cache.index.get('base_model')}",
        "cross-entropy is that of another model",
    )
    return cache


def load_text(args: SourceArguments) -> tuple[Documents, Documents | None]:
    """The documents, and those to measure on. Raises InputError for an activation cache, which has no text."""
    documents, eval_documents = load_training_data(args)
    if isinstance(documents, CachedActivations):
        raise InputError(f"--dataset {args.dataset} is an activation cache and holds no text; give text.")
    return documents, eval_documents


def load_text_files(place: str, separator: str | None, text_column: str) -> Documents:
    """Documents of a file, a folder or a Hub dataset, where a command takes several.

    Args:
        place: which.
        separator: between documents in .txt files, as a shell hands it over.
        text_column: of other files.
    """
    return load_documents(place, text_column=text_column, separator=_unescaped(separator))


def complete_model(args: SourceArguments, config: MatryoshkaSAEConfig, called: str) -> None:
    """Where no language model is asked for, it is the one that an SAE reads.

    Raises InputError where the SAE does not say which that is.
    """
    if args.model:
        return
    name, revision = model_to_load(config, called)
    args.model, args.model_revision = name, args.model_revision or revision
    args.quantization = args.quantization or quantization_to_load(config)  # type: ignore[assignment]


def _unescaped(separator: str | None) -> str | None:
    r"""A shell hands over `\n` as two characters; a line's end is what they mean."""
    if separator is None:
        return None
    for written, meant in (("\\n", "\n"), ("\\r", "\r"), ("\\t", "\t"), ("\\f", "\f")):
        separator = separator.replace(written, meant)
    if not separator:
        raise InputError("--separator is empty; give what stands between documents, or leave it out.")
    return separator


def _eval_data(args: SourceArguments) -> Documents | None:
    if args.eval_dataset is None and args.eval_split is None:
        return None
    source = args.eval_dataset or args.dataset
    if source is None:
        raise InputError("--eval-split needs a --dataset or an --eval-dataset that has that split.")
    same = args.eval_dataset is None
    if same and Path(source).is_file():
        raise InputError(
            f"--eval-split {args.eval_split}: {source} is a single file without splits. Give --eval-dataset, or "
            "nothing: some of its documents are then held out."
        )
    return load_documents(
        source,
        name=args.dataset_name if same else None,
        split=args.eval_split or "train",
        revision=args.dataset_revision if same else None,
        text_column=args.text_column,
        messages_column=args.messages_column,
        separator=_unescaped(args.separator),
    )
