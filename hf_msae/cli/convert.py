"""`hf-msae convert`: another library's checkpoint into ours, or ours into another library's form."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_msae.cli import common_fields
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.parser import build_parser, parse
from hf_msae.errors import InputError
from hf_msae.formats import FORMATS, WRITABLE

if TYPE_CHECKING:
    from hf_msae.modeling import MatryoshkaSAE

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
    to: Literal["hf_msae", "saelens", "sparsify", "circuit_tracer"] = field(
        default="hf_msae", metadata={"help": "Form to write."}
    )
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
    use_cpu: bool = common_fields.use_cpu()

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

    from rich.console import Console

    from hf_msae.formats import convert

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    sae = convert(
        args.src,
        args.dest,
        to=args.to,
        name=args.format,
        prefix_sizes=args.prefix_sizes or None,
        prefix=args.prefix,
        complete=(lambda sae: _measure(sae, args, sources)) if args.measure else None,
        subfolder=args.subfolder,
        revision=args.revision,
    )
    config = sae.config
    Console(highlight=False).print(
        f"{config.num_latents:,} latents of width {config.hidden_size}, prefixes "
        f"{', '.join(map(str, config.prefix_sizes))}, at {config.site or 'an unrecorded site'} of "
        f"{config.base_model or 'an unrecorded model'}\nSaved to {Path(args.dest)}",
        soft_wrap=True,
    )


def _measure(sae: "MatryoshkaSAE", args: ConvertArguments, sources: SourceArguments) -> None:
    """Have the language model read text, and record in the SAE what that tells."""
    from hf_msae.cli.sources import choose_device, complete_model, load_language_model, load_text
    from hf_msae.evaluation import complete_on_text
    from hf_msae.sites import recorded_site

    complete_model(sources, sae.config, args.src)
    site = args.site or recorded_site(sae.config, called=args.src)
    choose_device(args.use_cpu)
    documents, eval_documents = load_text(sources)
    model, tokenizer = load_language_model(sources)
    source = documents if eval_documents is None else eval_documents
    complete_on_text(sae, model, tokenizer, source, site=site, num_tokens=args.measure_tokens, called=args.src)
