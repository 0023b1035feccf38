"""`hf-msae meta`: what the latents of an SAE are made of."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hf_msae.cli import common_fields
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.parser import build_parser, parse
from hf_msae.errors import InputError

if TYPE_CHECKING:
    from rich.tree import Tree

    from hf_msae.modeling import MatryoshkaSAE
    from hf_msae.research.meta import Decomposition, MetaResult

DESCRIPTION = """\
Train a meta-SAE, an SAE on the decoder rows of SAE (a folder or a Hub repo), and print what latents are made of: each
one's meta-latents, and the other latents that share them. The folder gets the meta-SAE, its numbers, and
decompositions.html, in which all latents can be looked up. With --meta-sae, nothing is trained: the decompositions of
one that was are printed. Latents are named by the tokens on which they are most active in --dataset."""


@dataclass
class MetaArguments:
    """What is trained, and what is shown."""

    _argument_group_name = "meta-SAE"
    _positional = ("sae",)

    sae: str = field(metadata={"help": "The SAE to decompose: a folder or a Hub repo."})
    output_dir: str | None = field(
        default=None, metadata={"help": "The folder to make. Default: the SAE's name and -meta-sae."}
    )
    meta_sae: str | None = field(default=None, metadata={"help": "A meta-SAE of this SAE that is there already."})
    num_latents: int | None = field(
        default=None, metadata={"help": "Meta-latents. Default: a quarter of the latents that fire."}
    )
    k: float = field(default=4.0, metadata={"help": "Mean number of meta-latents per latent."})
    prefix_sizes: list[int] = field(
        default_factory=list, metadata={"help": "Nested sizes of the meta-SAE. Default: one level."}
    )
    max_steps: int = field(default=1500, metadata={"help": "Steps of up to 1,024 decoder rows."})
    learning_rate: float | None = field(default=None, metadata={"help": "Peak learning rate. Default: by the width."})
    seed: int = field(default=0, metadata={"help": "Fixes initialisation and order."})
    random_control: bool = field(
        default=True, metadata={"help": "Train another one on random directions, to compare with."}
    )
    latents: list[int] = field(
        default_factory=list,
        metadata={"help": "Latents to show. Default: those that are explained best."},
    )
    show: int = field(default=8, metadata={"help": "How many to show if none are named."})
    neighbours: int = field(default=5, metadata={"help": "Other latents to show for each meta-latent."})
    label_tokens: int = field(
        default=20_000, metadata={"help": "Tokens of text that give latents their names; 0 needs no language model."}
    )
    use_cpu: bool = common_fields.use_cpu()
    json: bool = common_fields.as_json()


def run(arguments: list[str]) -> None:
    """Parse, train or load, print."""
    sources, args = parse(build_parser("meta", DESCRIPTION, (SourceArguments, MetaArguments)), arguments)

    from rich.console import Console

    from hf_msae.cli.sources import choose_device
    from hf_msae.modeling import MatryoshkaSAE
    from hf_msae.research.meta_pipeline import (
        BROWSER_NAME,
        FACTS_NAME,
        check_output,
        choose_decompositions,
        load_meta_sae,
        make_meta_sae,
    )

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    choose_device(args.use_cpu)
    folder = Path(args.output_dir or f"{Path(args.sae).resolve().name}-meta-sae")
    if args.meta_sae is None:
        check_output(folder)  # before anything is loaded
    sae = MatryoshkaSAE.from_pretrained(args.sae).eval()
    if any(not 0 <= latent < sae.config.num_latents for latent in args.latents):
        raise InputError(f"--latents: there are latents 0 to {sae.config.num_latents - 1}; got {args.latents}.")
    labels = _name_latents(sources, sae, args) if args.label_tokens else []
    # With --json, what people would read is not printed at all.
    console = Console(highlight=False, quiet=args.json)
    if args.meta_sae is not None:
        meta = load_meta_sae(args.meta_sae)
    else:
        names = ("num_latents", "k", "prefix_sizes", "max_steps", "learning_rate", "seed", "random_control", "use_cpu")
        options = {name: getattr(args, name) for name in names}
        result = make_meta_sae(sae, folder, labels=labels, name=args.sae, **options)
        meta = result.sae
        console.print(_summary(result), soft_wrap=True)
    found = choose_decompositions(meta, sae, args.latents, most=args.show, neighbours=args.neighbours)
    for item in found:
        console.print(_tree(item, labels))
    if args.meta_sae is None:
        console.print(f"Saved to {folder}; look through all latents in {folder / BROWSER_NAME}", soft_wrap=True)
    if args.json:
        folder = Path(args.meta_sae or folder)
        facts = (
            json.loads((folder / FACTS_NAME).read_text(encoding="utf-8")) if (folder / FACTS_NAME).is_file() else {}
        )
        latents = [asdict(item) | {"name": labels[item.latent] if labels else None} for item in found]
        print(json.dumps({"folder": str(folder), **facts, "latents": latents}))


def _name_latents(sources: SourceArguments, sae: "MatryoshkaSAE", args: MetaArguments) -> list[str]:
    from hf_msae.cli.sources import load_language_model, load_text
    from hf_msae.research.meta_pipeline import name_latents
    from hf_msae.sites import recorded_site

    try:
        documents, _ = load_text(sources)
        recorded_site(sae.config, called=args.sae)
    except InputError as error:
        raise InputError(f"{error} Or leave latents without names: --label-tokens 0.") from error
    model, tokenizer = load_language_model(sources)
    return name_latents(model, tokenizer, sae, documents, num_tokens=args.label_tokens, called=args.sae)


def _tree(item: "Decomposition", labels: Sequence[str]) -> "Tree":
    from rich.markup import escape
    from rich.tree import Tree

    def name(latent: int) -> str:
        return f"{latent}" + (f" [dim]{escape(labels[latent])}[/dim]" if labels and labels[latent] else "")

    tree = Tree(f"[bold]latent {name(item.latent)}[/bold]  cosine {item.cosine:.2f}")
    for part in item.parts:
        branch = tree.add(f"meta-latent {part.meta_latent}  {part.activation:.2f}")
        for other, activation in part.shared_with:
            branch.add(f"{name(other)}  {activation:.2f}")
    return tree


def _summary(result: "MetaResult") -> str:
    floor = (
        "" if result.explained_random is None else f" (of as many random directions: {result.explained_random:.1%})"
    )
    return (
        f"{result.sae.config.num_latents:,} meta-latents, {result.l0:.2f} per latent, explain {result.explained:.1%} "
        f"of the variance of {len(result.rows):,} decoder rows{floor}. Unused meta-latents: {result.dead:.1%}."
    )
