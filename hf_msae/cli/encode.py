"""`hf-msae encode`: the active latents of every token or document of some text, as a data set."""

import json
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from hf_msae import reading_fields
from hf_msae.cli import common_fields
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.parser import build_parser, parse
from hf_msae.reading_fields import WITHOUT_A_LIMIT

if TYPE_CHECKING:
    from hf_msae.corpora import EncodedLatents

DESCRIPTION = """\
Write which latents of SAE (a folder or a Hub repo) are active on each token of DATASET, or in each document with
--pool, as Parquet with a card, which `datasets.load_dataset` reads. An interrupted run goes on with the same
command."""


@dataclass
class EncodeArguments:
    """What is written."""

    _argument_group_name = "latents"
    _positional = ("sae",)

    sae: str = field(metadata={"help": common_fields.SAE_HELP})
    output_dir: str = field(metadata={"help": "The folder to make."})
    subfolder: str = common_fields.subfolder()
    prefix: int | None = common_fields.prefix()
    pool: Literal["max", "mean", "sum"] | None = field(
        default=None, metadata={"help": "A row a document, pooled over its tokens. Default: a row a token."}
    )
    by_level: bool = field(default=False, metadata={"help": "A row of its own for the latents that each level adds."})
    dtype: Literal["float32", "float16"] = field(default="float32", metadata={"help": "Of the values."})
    max_tokens: int | None = field(
        default=None, metadata={"help": "Stop at the end of the document that reaches so many. Default: all."}
    )
    shard_tokens: int = field(
        default=262_144, metadata={"help": "Tokens per file, about; what a killed run writes again at most."}
    )
    site: str | None = common_fields.site()
    context_length: int | None = field(
        default=None,
        metadata={"help": "Tokens per window; longer documents go on in the next one. Default: the SAE's."},
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Several documents in a window, as in training: sooner done where they are short, but later ones "
            "then see earlier ones."
        },
    )
    lm_batch_size: int = reading_fields.lm_batch_size()
    norm_outlier_multiple: float | None = reading_fields.norm_outlier_multiple(where=WITHOUT_A_LIMIT)
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Publish it as this data set of the Hub, OWNER/NAME."}
    )
    hub_private: bool = field(default=False, metadata={"help": "Make a new data set on the Hub private."})
    use_cpu: bool = common_fields.use_cpu()
    json: bool = common_fields.as_json()


@dataclass
class EncodeSourceArguments(SourceArguments):
    """Which text is read by which model; the SAE names its model."""

    _positional = ("dataset",)

    model: str = field(default="", metadata={"help": "The language model. Default: the one that the SAE names."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "A Hub dataset (streamed), a .txt, .jsonl or .parquet file or a folder of them, or a dataset "
            "saved to disk. Default: the story world with the story model."
        },
    )


def run(arguments: list[str]) -> None:
    """Parse, load, write, publish, say where."""
    args, sources = parse(build_parser("encode", DESCRIPTION, (EncodeArguments, EncodeSourceArguments)), arguments)

    from hf_msae.cli.sources import choose_device, complete_model, load_language_model, load_sae_prefix, load_text
    from hf_msae.corpora import encode_dataset
    from hf_msae.hub.data_sets import prepare_data_repo

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    choose_device(args.use_cpu)
    sae = load_sae_prefix(args.sae, args.subfolder, args.prefix)
    complete_model(sources, sae.config, args.sae)
    documents, _ = load_text(sources)
    if args.push_to_hub is not None:
        args.push_to_hub = prepare_data_repo(args.push_to_hub, private=args.hub_private or None)
    model, tokenizer = load_language_model(sources)
    found = encode_dataset(
        model,
        tokenizer,
        sae,
        documents,
        args.output_dir,
        pool=args.pool,
        by_level=args.by_level,
        dtype=args.dtype,
        max_tokens=args.max_tokens,
        site=args.site,
        context_length=args.context_length,
        packing=args.packing,
        lm_batch_size=args.lm_batch_size,
        norm_outlier_multiple=args.norm_outlier_multiple,
        shard_tokens=args.shard_tokens,
    )
    url = None if args.push_to_hub is None else found.push(args.push_to_hub)
    if args.json:
        print(json.dumps({"folder": str(found.folder), "pushed": url, **found.index}))
    else:
        _show(found, args.push_to_hub, url)


def _show(found: "EncodedLatents", repo: str | None, url: str | None) -> None:
    index = found.index
    rows = sum(shard["num_rows"] for shard in index["shards"])
    unreadable = f"; {index['num_unreadable']:,} more could not be read" if index["num_unreadable"] else ""
    outliers = f", {index['num_outliers']:,} of them outliers that have no row" if index["num_outliers"] else ""
    print(
        f"Wrote {rows:,} rows to {found.folder}: {index['num_tokens']:,} tokens{outliers}, of "
        f"{index['num_documents']:,} documents{unreadable}."
    )
    if url is not None:
        print(f"Pushed: {url}")
    print(f'Read them with: datasets.load_dataset("{repo or found.folder}", split="train")')
