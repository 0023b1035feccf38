"""`hf-msae diff`: the latents that one corpus's documents have more of than another's."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hf_msae import reading_fields
from hf_msae.cli import common_fields
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.parser import build_parser, parse
from hf_msae.cli.terminal import print_table
from hf_msae.errors import InputError
from hf_msae.reading_fields import WITHOUT_A_LIMIT

if TYPE_CHECKING:
    from hf_msae.corpora import CorpusDiff, EncodedLatents
    from hf_msae.data import Documents

DESCRIPTION = """\
Compare two corpora by the latents of SAE (a folder or a Hub repo): which of them documents of B have more of than
those of A, or less, how large each difference is, and texts that show it, level by level. A and B are text (files,
folders, Hub datasets), or what `hf-msae encode` wrote, which needs no language model."""

# Findings of each level in the terminal.
NUM_SHOWN = 8


@dataclass
class DiffArguments:
    """What is compared, and how."""

    _argument_group_name = "comparison"
    _positional = ("sae", "a", "b")

    sae: str = field(metadata={"help": common_fields.SAE_HELP})
    a: str = field(metadata={"help": "One corpus: text, or latents that encode wrote."})
    b: str = field(metadata={"help": "The other corpus."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the report. Default: none is written."})
    subfolder: str = common_fields.subfolder()
    prefix: int | None = common_fields.prefix()
    pool: Literal["max", "mean", "sum"] | None = field(
        default=None,
        metadata={"help": "What a latent is worth in a document. Default: as encoded corpora are pooled, else mean."},
    )
    fdr: float = field(default=0.05, metadata={"help": "Expected share of the findings that are none, at most."})
    max_documents: int = field(default=5000, metadata={"help": "Of each corpus, from all parts of it."})
    document_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of each document that count, from its beginning. Default: all."}
    )
    split: str = field(default="train", metadata={"help": "Split of the corpora."})
    split_b: str | None = field(default=None, metadata={"help": "Split of B. Default: that of A."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration of Hub datasets."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    messages_column: str | None = field(
        default=None, metadata={"help": "Column with chats; they go through the tokenizer's chat template."}
    )
    separator: str | None = field(
        default=None,
        metadata={
            "help": "What separates documents in .txt files, such as '\\n'. Default: <|endoftext|> or blank lines."
        },
    )
    model: str = field(default="", metadata={"help": "The language model. Default: the one that the SAE names."})
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Precision in which the language model runs."}
    )
    device_map: str | None = field(
        default=None, metadata={"help": "'auto' splits a language model that is too large over all devices."}
    )
    trust_remote_code: bool = common_fields.trust_remote_code()
    site: str | None = common_fields.site()
    context_length: int | None = field(default=None, metadata={"help": "Tokens per window. Default: the SAE's."})
    lm_batch_size: int = reading_fields.lm_batch_size()
    norm_outlier_multiple: float | None = reading_fields.norm_outlier_multiple(where=WITHOUT_A_LIMIT)
    use_cpu: bool = common_fields.use_cpu()
    seed: int = field(default=0, metadata={"help": "Of the choice of documents."})
    json: bool = common_fields.as_json()


def run(arguments: list[str]) -> None:
    """Parse, load, compare, write, print."""
    (args,) = parse(build_parser("diff", DESCRIPTION, (DiffArguments,)), arguments)

    from hf_msae.cli.sources import choose_device, complete_model, load_language_model, load_sae_prefix
    from hf_msae.corpora import EncodedLatents, diff_corpora, write_diff_report
    from hf_msae.language_models import load_tokenizer

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    choose_device(args.use_cpu)
    if args.a == args.b and (args.split_b or args.split) == args.split:
        raise InputError(f"A and B are both {args.a}; give two corpora, or two splits of one with --split-b.")
    sae = load_sae_prefix(args.sae, args.subfolder, args.prefix)
    a, b = (_open(place, split, args) for place, split in ((args.a, args.split), (args.b, args.split_b or args.split)))
    model, tokenizer = None, None
    encoded = [side for side in (a, b) if isinstance(side, EncodedLatents)]
    if len(encoded) < 2 or any(side.pool is None for side in encoded):
        source = SourceArguments(
            model=args.model,
            model_dtype=args.model_dtype,
            device_map=args.device_map,
            trust_remote_code=args.trust_remote_code,
        )
        complete_model(source, sae.config, args.sae)
        if len(encoded) == 2:
            hub = {"revision": source.model_revision, "trust_remote_code": source.trust_remote_code}
            tokenizer = load_tokenizer(source.model, **hub)
        else:
            model, tokenizer = load_language_model(source)
    found = diff_corpora(
        model,
        tokenizer,
        sae,
        a,
        b,
        names=_names(args),
        pool=args.pool,
        fdr=args.fdr,
        max_documents=args.max_documents,
        document_tokens=args.document_tokens,
        site=args.site,
        context_length=args.context_length,
        lm_batch_size=args.lm_batch_size,
        norm_outlier_multiple=args.norm_outlier_multiple,
        seed=args.seed,
    )
    if args.output_dir is not None:
        write_diff_report(found, args.output_dir, f"{args.a} and {args.b}")
    if args.json:
        print(json.dumps(found.to_dict()))
        return
    _show(found)
    if args.output_dir is not None:
        print(f"Wrote {Path(args.output_dir) / 'report.html'}")


def _open(place: str, split: str, args: DiffArguments) -> "EncodedLatents | Documents":
    """A corpus. Raises InputError for one without text or latents."""
    from hf_msae.cli.sources import load_text
    from hf_msae.corpora import EncodedLatents
    from hf_msae.corpora.encoded import is_encoded_source
    from hf_msae.shared_caches import is_cache_source

    if is_encoded_source(place):
        return EncodedLatents.load(place)
    if is_cache_source(place):
        raise InputError(
            f"{place} is an activation cache and holds no text; give text, or latents that `hf-msae encode` wrote."
        )
    source = SourceArguments(
        dataset=place,
        dataset_name=args.config_name,
        dataset_split=split,
        text_column=args.text_column,
        messages_column=args.messages_column,
        separator=args.separator,
    )
    return load_text(source)[0]


def _names(args: DiffArguments) -> list[str] | None:
    """Of all latents, where the SAE has an interpretation."""
    from hf_msae.interpret import Interpretation
    from hf_msae.interpret.store import InterpretationError

    try:
        return Interpretation.load(args.sae, subfolder=args.subfolder or None).names
    except InterpretationError:
        return None


def _show(found: "CorpusDiff") -> None:
    from rich.console import Console

    from hf_msae.corpora.diff_report import finding_table, level_table

    console = Console(highlight=False)
    facts = found.facts
    for name in "ab":
        console.print(
            f"{name.upper()}: {facts[f'documents_{name}']:,} documents of {facts[name]}, "
            f"{facts[f'tokens_{name}']:,} tokens",
            markup=False,
        )
    tables = [level_table(found), *(finding_table(found, level.level, NUM_SHOWN) for level in found.levels)]
    for table in tables:
        if table.rows:
            print_table(console, table.title, table.header, table.rows, table.note)
    for warning in found.warnings:
        console.print(f"Note: {warning}", markup=False)
