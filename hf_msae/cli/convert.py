"""`hf-msae convert`: another library's checkpoint into ours, or ours into another library's form."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console

from hf_msae.cli.parser import Collect, build_parser, parse
from hf_msae.hub.exchange import FORMATS, WRITABLE, load_foreign, write_foreign
from hf_msae.hub.formats.common import written_whole
from hf_msae.modeling import MatryoshkaSAE

DESCRIPTION = f"""\
Convert SRC, a folder or a Hub repo, into the folder DEST. SRC is a checkpoint of {", ".join(FORMATS[:-1])} or
{FORMATS[-1]}, which is recognised by its files; or, with --to, one of ours, which is written for
{" or ".join(WRITABLE)}."""


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
        metadata={"action": Collect, "help": "The nested sizes, where the files do not record them."},
    )
    prefix: int | None = field(default=None, metadata={"help": "Convert only the first N latents."})
    subfolder: str = field(default="", metadata={"help": "Folder within SRC."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub repo."})


def run(arguments: list[str]) -> None:
    """Parse, convert, say what came out."""
    (args,) = parse(build_parser("convert", DESCRIPTION, (ConvertArguments,)), arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    destination = Path(args.dest)
    if destination.exists():
        raise ValueError(f"{destination} exists already; give a folder that does not, or delete it.")
    sae = _load(args)
    if args.to == "hf_msae":
        with written_whole(destination) as draft:
            sae.save_pretrained(draft)
    else:
        write_foreign(sae, destination, args.to)
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
    if args.format is not None:
        sae = load_foreign(MatryoshkaSAE, args.src, args.format, sizes, **hub)
        return sae if args.prefix is None else sae.truncate(args.prefix)
    options = {} if sizes is None else {"prefix_sizes": sizes}
    return MatryoshkaSAE.from_pretrained(args.src, prefix=args.prefix, **hub, **options)
