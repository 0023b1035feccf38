"""`hf-msae convert`: another library's checkpoint into ours, or ours into another library's form."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from accelerate import PartialState
from rich.console import Console

from hf_msae.atomic_files import atomic_folder
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.parser import build_parser, parse
from hf_msae.cli.sources import load_language_model, load_training_data
from hf_msae.data import CachedActivations
from hf_msae.errors import InputError
from hf_msae.evaluation.activations import collect
from hf_msae.evaluation.completing import complete
from hf_msae.formats.conversion import (
    FORMATS,
    WRITABLE,
    load_library_checkpoint,
    locate,
    recognise,
    write_library_checkpoint,
)
from hf_msae.language_models import model_of
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.sites import find_site
from hf_msae.training import SAETrainingArguments
from hf_msae.training.loaders import window_length

DESCRIPTION = f"""\
Convert SRC, a folder or a Hub repo, into the folder DEST. SRC is a checkpoint of {", ".join(FORMATS[:-1])} or
{FORMATS[-1]}, which is recognised by its files; or, with --to, one of ours, which is written for
{" or ".join(WRITABLE)}. With --measure, the language model reads text, and what no file records is written into the
SAE: each latent's largest activation, in which people steer, its firing rate, and a threshold where there is none."""


@dataclass
class ConvertArguments:
    """What is converted, and into what."""

    _argument_group_name = "conversion"

    _positional = ("src", "dest")

    src: str = field(metadata={"help": "A folder or a Hub repo."})
    dest: str = field(metadata={"help": "A folder, which must not exist yet."})
    to: Literal["hf_msae", "saelens", "sparsify"] = field(default="hf_msae", metadata={"help": "Form to write."})
    format: str | None = field(
        default=None, metadata={"help": f"Form of SRC if not recognised: {', '.join(FORMATS)}."}
    )
    prefix_sizes: list[int] = field(
        default_factory=list,
        metadata={"help": "The nested sizes, where the files do not record them."},
    )
    prefix: int | None = field(default=None, metadata={"help": "Convert only the first N latents."})
    subfolder: str = field(default="", metadata={"help": "Folder within SRC."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub repo."})
    measure: bool = field(default=False, metadata={"help": "Record what only text can tell; see below."})
    measure_tokens: int = field(default=200_000, metadata={"help": "Tokens to measure on."})
    site: str | None = field(default=None, metadata={"help": "Where in the model, if SRC does not say."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU even where an accelerator is present."})

    def __post_init__(self) -> None:
        if self.measure_tokens < 2:
            raise InputError(f"measure_tokens must be at least 2, got {self.measure_tokens}.")


@dataclass
class MeasuringSourceArguments(SourceArguments):
    """With --measure: where tokens come from and which model reads them."""

    _argument_group_name = "model and data, with --measure"

    model: str = field(default="", metadata={"help": "The language model. Default: the one that SRC names."})


def run(arguments: list[str]) -> None:
    """Parse, convert, say what came out."""
    parser = build_parser("convert", DESCRIPTION, (ConvertArguments, MeasuringSourceArguments))
    args, sources = parse(parser, arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    destination = Path(args.dest)
    if destination.exists():
        raise InputError(f"{destination} exists already; give a folder that does not, or delete it.")
    sae = _load(args)
    if args.measure:
        _measure(sae, args, sources)
    if args.to == "hf_msae":
        with atomic_folder(destination) as draft:
            sae.save_pretrained(draft)
    else:
        write_library_checkpoint(sae, destination, args.to)
    config = sae.config
    Console(highlight=False).print(
        f"{config.num_latents:,} latents of width {config.hidden_size}, prefixes "
        f"{', '.join(map(str, config.prefix_sizes))}, at {config.site or 'an unrecorded site'} of "
        f"{config.base_model or 'an unrecorded model'}\nSaved to {destination}",
        soft_wrap=True,
    )


def _load(args: ConvertArguments) -> MatryoshkaSAE:
    sizes = args.prefix_sizes or None
    hub = {"subfolder": args.subfolder, "revision": args.revision}
    if args.format is not None or (args.measure and recognise(locate(args.src, **hub)) is not None):
        sae = load_library_checkpoint(MatryoshkaSAE, args.src, args.format, sizes, calibrating=args.measure, **hub)
        return sae if args.prefix is None else sae.truncate(args.prefix)
    options = {} if sizes is None else {"prefix_sizes": sizes}
    return MatryoshkaSAE.from_pretrained(args.src, prefix=args.prefix, **hub, **options)


def _measure(sae: MatryoshkaSAE, args: ConvertArguments, sources: SourceArguments) -> None:
    """Read text and record in the SAE what it tells. Raises ValueError where model, site or text are not known."""
    config = sae.config
    sources.model = sources.model or model_of(config)[0] or ""
    if not sources.model:
        raise InputError(f"{args.src} does not say which language model it is of; give --model.")
    place = args.site or config.site
    if place is None:
        raise InputError(f"{args.src} does not say where in the model it is from; give --site, such as layers.12.")
    PartialState(cpu=args.use_cpu)
    documents, eval_documents = load_training_data(sources)
    if isinstance(documents, CachedActivations):
        raise InputError(f"--dataset {sources.dataset} is an activation cache; give text.")
    model, tokenizer = load_language_model(sources)
    site = find_site(model, config, place, called=args.src)
    length = window_length(model, SAETrainingArguments(context_length=config.context_length))
    source = documents if eval_documents is None else eval_documents
    text = collect(model, tokenizer, site, source, num_tokens=args.measure_tokens, context_length=length)
    complete(sae.to(PartialState().device).eval(), text)  # type: ignore[arg-type]
    config.site = config.site or str(site)
    config.base_model = config.base_model or model.config.name_or_path or None
