"""`hf-msae meta`: what the latents of an SAE are made of."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from hf_msae.atomic_files import atomic_folder
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.parser import build_parser, parse
from hf_msae.cli.sources import load_language_model, load_training_data
from hf_msae.data import CachedActivations
from hf_msae.errors import InputError
from hf_msae.evaluation.activations import collect
from hf_msae.modeling import MatryoshkaSAE
from hf_msae.research.meta import Decomposition, MetaResult, decompose, is_meta_sae, train_meta_sae, unit_rows
from hf_msae.research.meta_browser import render_browser, token_labels
from hf_msae.sites import find_site

BROWSER_NAME, FACTS_NAME = "decompositions.html", "meta_sae.json"
DEFAULT_CONTEXT_LENGTH = 256

DESCRIPTION = f"""\
Train a meta-SAE, an SAE on the decoder rows of SAE (a folder or a Hub repo), and print what latents are made of: each
one's meta-latents, and the other latents that share them. The folder gets the meta-SAE, its numbers, and
{BROWSER_NAME}, in which all latents can be looked up. With --meta-sae, nothing is trained: the decompositions of one
that was are printed. Latents are named by the tokens on which they are most active in --dataset."""


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
    use_cpu: bool = field(default=False, metadata={"help": "Train on the CPU even where an accelerator is present."})


def run(arguments: list[str]) -> None:
    """Parse, train or load, print, save."""
    sources, args = parse(build_parser("meta", DESCRIPTION, (SourceArguments, MetaArguments)), arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    folder = Path(args.output_dir or f"{Path(args.sae).resolve().name}-meta-sae")
    if args.meta_sae is None and folder.exists():
        raise InputError(f"{folder} exists already; give another --output-dir, or show it with --meta-sae {folder}.")
    sae = MatryoshkaSAE.from_pretrained(args.sae).eval()
    _check_latents(sae, args.latents)
    labels = _labels(sources, sae, args) if args.label_tokens else []
    console = Console(highlight=False)
    if args.meta_sae is not None:
        meta = MatryoshkaSAE.from_pretrained(args.meta_sae).eval()
        if not is_meta_sae(meta):
            raise InputError(f"{args.meta_sae} is an SAE of activations, not a meta-SAE; make one without --meta-sae.")
    else:
        result = train_meta_sae(
            sae,
            num_latents=args.num_latents,
            k=args.k,
            prefix_sizes=args.prefix_sizes,
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            seed=args.seed,
            name=args.sae,
            random_control=args.random_control,
            use_cpu=args.use_cpu,
        )
        meta = result.sae
        console.print(_summary(result), soft_wrap=True)
    sae = sae.to(meta.device)
    for item in _chosen(meta, sae, args):
        console.print(_tree(item, labels))
    if args.meta_sae is None:
        _save(folder, result, sae, _facts(result, args), labels)
        console.print(f"Saved to {folder}; look through all latents in {folder / BROWSER_NAME}", soft_wrap=True)


def _check_latents(sae: MatryoshkaSAE, latents: Sequence[int]) -> None:
    if any(not 0 <= latent < sae.config.num_latents for latent in latents):
        raise InputError(f"--latents: there are latents 0 to {sae.config.num_latents - 1}; got {list(latents)}.")


def _labels(sources: SourceArguments, sae: MatryoshkaSAE, args: MetaArguments) -> list[str]:
    documents, _ = load_training_data(sources)
    if isinstance(documents, CachedActivations):
        raise InputError(
            f"--dataset {sources.dataset} is an activation cache, which has no tokens to name latents by; give text, "
            "or --label-tokens 0."
        )
    if sae.config.site is None:
        raise InputError(f"{args.sae} does not say which site it reads, so latents cannot be named: --label-tokens 0.")
    model, tokenizer = load_language_model(sources)
    site = find_site(model, sae.config, called=args.sae)
    text = collect(
        model,
        tokenizer,
        site,
        documents,
        num_tokens=args.label_tokens,
        context_length=sae.config.context_length or DEFAULT_CONTEXT_LENGTH,
    )
    return token_labels(text, tokenizer, sae)


def _chosen(meta: MatryoshkaSAE, sae: MatryoshkaSAE, args: MetaArguments) -> list[Decomposition]:
    """The latents asked for, or those of at least two parts that are explained best."""
    if args.latents:
        return decompose(meta, sae, args.latents, neighbours=args.neighbours)
    found = decompose(meta, sae, unit_rows(sae)[0].tolist(), neighbours=0)
    composed = sorted((item for item in found if len(item.parts) > 1), key=lambda item: -item.cosine)
    return decompose(meta, sae, [item.latent for item in composed[: args.show]], neighbours=args.neighbours)


def _tree(item: Decomposition, labels: Sequence[str]) -> Tree:
    def name(latent: int) -> str:
        return f"{latent}" + (f" [dim]{escape(labels[latent])}[/dim]" if labels and labels[latent] else "")

    tree = Tree(f"[bold]latent {name(item.latent)}[/bold]  cosine {item.cosine:.2f}")
    for part in item.parts:
        branch = tree.add(f"meta-latent {part.meta_latent}  {part.activation:.2f}")
        for other, activation in part.shared_with:
            branch.add(f"{name(other)}  {activation:.2f}")
    return tree


def _summary(result: MetaResult) -> str:
    floor = (
        "" if result.explained_random is None else f" (of as many random directions: {result.explained_random:.1%})"
    )
    return (
        f"{result.sae.config.num_latents:,} meta-latents, {result.l0:.2f} per latent, explain {result.explained:.1%} "
        f"of the variance of {len(result.rows):,} decoder rows{floor}. Unused meta-latents: {result.dead:.1%}."
    )


def _facts(result: MetaResult, args: MetaArguments) -> dict[str, Any]:
    return {
        "SAE": args.sae,
        "rows": len(result.rows),
        "meta-latents": result.sae.config.num_latents,
        "k": args.k,
        "L0": round(result.l0, 3),
        "explained": round(result.explained, 4),
        "explained of random rows": None if result.explained_random is None else round(result.explained_random, 4),
        "unused": round(result.dead, 4),
        "steps": args.max_steps,
        "seed": args.seed,
    }


def _save(folder: Path, result: MetaResult, sae: MatryoshkaSAE, facts: dict[str, Any], labels: Sequence[str]) -> None:
    with atomic_folder(folder) as draft:
        result.sae.save_pretrained(draft)
        (draft / FACTS_NAME).write_text(json.dumps(facts, indent=2) + "\n")
        page = render_browser(result.sae, sae, facts, labels)
        (draft / BROWSER_NAME).write_text(page, encoding="utf-8")
