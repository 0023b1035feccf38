"""`hf-msae interpret`: a page for every latent of an SAE, written as Parquet beside it."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hf_msae import reading_fields
from hf_msae.cli import common_fields
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.parser import build_parser, parse
from hf_msae.cli.terminal import print_table
from hf_msae.errors import InputError
from hf_msae.reading_fields import WITHOUT_A_LIMIT

if TYPE_CHECKING:
    from hf_msae.interpret import Interpretation, Labeller

DESCRIPTION = """\
Read text once and write what each latent of SAE (a folder or a Hub repo) reacts to and says: contexts from the top and
from all quantiles, density, histogram, promoted tokens, nearest latents, parents and children. The model and the site
are those that the SAE was trained on, unless given."""

NUM_SHOWN = 6


@dataclass
class InterpretArguments:
    """What is written, and from how much text."""

    _argument_group_name = "interpretation"
    _positional = ("sae",)

    sae: str = field(metadata={"help": common_fields.SAE_HELP})
    subfolder: str = common_fields.subfolder()
    site: str | None = common_fields.site()
    max_tokens: int = field(default=500_000, metadata={"help": "Tokens to read."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder to make. Default: interpretation in the SAE's folder."}
    )
    context_length: int | None = field(default=None, metadata={"help": "Tokens per window. Default: the SAE's."})
    packing: bool = reading_fields.packing()
    lm_batch_size: int = reading_fields.lm_batch_size()
    norm_outlier_multiple: float | None = reading_fields.norm_outlier_multiple(where=WITHOUT_A_LIMIT)
    later_windows: int = field(
        default=0,
        metadata={
            "help": "Windows of 32 tokens over which promoted tokens are found through the later layers; 0 stops at "
            "the final norm. A window costs a backward pass for every dimension of the model."
        },
    )
    labels_model: str | None = field(
        default=None, metadata={"help": "A chat model that names latents, and is tested on its names."}
    )
    use_cpu: bool = common_fields.use_cpu()
    num_labels: int = field(default=100, metadata={"help": "How many latents are named, the first ones that fire."})
    json: bool = common_fields.as_json()


def run(arguments: list[str], brief: bool = False) -> None:
    """Parse, read, write, show a few pages."""
    parser = build_parser("interpret", DESCRIPTION, (InterpretArguments, SourceArguments))
    args, sources = parse(parser, arguments)

    from hf_msae.cli.sources import check_sae_place, choose_device, load_language_model, load_sae, load_text
    from hf_msae.interpret import interpret, write_labels

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    choose_device(args.use_cpu)
    check_sae_place(args.sae)
    folder = _output_folder(args)
    labeller = None if args.labels_model is None else load_labeller(args.labels_model)
    sae = load_sae(args.sae, args.subfolder, sources)
    documents, _ = load_text(sources)
    model, tokenizer = load_language_model(sources)
    interpretation = interpret(
        model,
        tokenizer,
        sae,
        documents,
        folder,
        max_tokens=args.max_tokens,
        site=args.site,
        context_length=args.context_length,
        packing=args.packing,
        lm_batch_size=args.lm_batch_size,
        norm_outlier_multiple=args.norm_outlier_multiple,
        later_windows=args.later_windows,
    )
    if labeller is not None:
        write_labels(labeller, interpretation, args.num_labels)
    if args.json:
        print(as_json(interpretation))
    else:
        _show(interpretation, args.sae, brief)


def as_json(interpretation: "Interpretation") -> str:
    """Where the pages are, what was read, and how often each latent fires; the pages themselves are Parquet."""
    facts = {"folder": str(interpretation.folder), "num_tokens": interpretation.source.num_tokens}
    facts |= {"dataset": str(interpretation.source.dataset), "names": interpretation.names}
    return json.dumps(facts | {"density": interpretation.column("density")})


def load_labeller(name: str) -> "Labeller":
    """A chat model from the Hub or a folder. Raises ValueError where it cannot be loaded or is none."""
    from accelerate import PartialState

    from hf_msae import language_models
    from hf_msae.interpret import Labeller

    try:
        model, tokenizer = language_models.load_language_model(name, needs_head=True)
        model.to(PartialState().device)  # type: ignore[arg-type]
    except InputError as error:
        raise InputError(f"--labels-model {name}: {error}") from error
    return Labeller(model, tokenizer)


def _output_folder(args: InterpretArguments) -> Path:
    from hf_msae.interpret.writing import FOLDER_NAME
    from hf_msae.modeling.untrusted import inside

    if args.output_dir is None and not Path(args.sae).is_dir():
        raise InputError(f"{args.sae} is a Hub repo; say where to write with --output-dir.")
    folder = Path(args.output_dir) if args.output_dir else Path(args.sae) / inside(args.subfolder) / FOLDER_NAME
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; give another --output-dir, or delete it.")
    return folder


def _show(interpretation: "Interpretation", sae: str, brief: bool) -> None:
    """A few latents of each level, and what to do next; `brief`, only how many never fired."""
    from rich.console import Console

    source = interpretation.source
    left_out = f" ({source.num_outliers:,} with outlying norms left out)" if source.num_outliers else ""
    console = Console(highlight=False)
    if not brief:
        pages = map(interpretation.page, _spread(source.prefix_sizes))
        print_table(
            console,
            f"{source.num_tokens:,} tokens of {source.dataset}{left_out}",
            ("latent", "level", "density", "reacts to", "promotes"),
            [
                (
                    str(page.latent),
                    str(page.level),
                    f"{page.firing_rate:.2%}",
                    page.name,
                    ", ".join(effect.token.strip() for effect in page.promoted[:4]),
                )
                for page in pages
            ],
        )
    dead = sum(share == 0 for share in interpretation.column("density"))
    console.print(f"{dead:,} of {len(interpretation):,} latents never fired.")
    if not brief:
        console.print(f"Saved to {interpretation.folder}\nNext: hf-msae tree {sae}")


def _spread(sizes: Sequence[int]) -> list[int]:
    """Some latents of every level."""
    starts = [0, *sizes[:-1]]
    each = max(1, NUM_SHOWN * 2 // len(sizes))
    return [latent for start, size in zip(starts, sizes, strict=True) for latent in range(start, size)[:each]]
