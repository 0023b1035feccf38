"""`hf-msae tree`: which later latents refine which earlier ones, as a tree in the terminal."""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hf_msae.cli import common_fields
from hf_msae.cli.arguments import SourceArguments
from hf_msae.cli.parser import build_parser, parse
from hf_msae.errors import InputError

if TYPE_CHECKING:
    from rich.tree import Tree

    from hf_msae.interpret import Hierarchy

DESCRIPTION = """\
Print the hierarchy between the levels of SAE (a folder or a Hub repo): children fire where their parent fires, far
more often than by chance. Those that make up most of their parent come first, with the share of the parent's firings
on which they fire, too. It is read from the SAE's interpretation where there is one (`hf-msae interpret`) and no
--dataset is given; else some text is read. A child may have several parents and then stands under each of them; an
edge that a longer path implies is not printed."""


@dataclass
class TreeArguments:
    """What is shown, and from how much text."""

    _argument_group_name = "tree"
    _positional = ("sae",)

    sae: str = field(metadata={"help": common_fields.SAE_HELP})
    subfolder: str = common_fields.subfolder()
    site: str | None = common_fields.site()
    root: int | None = field(default=None, metadata={"help": "Show only what is below this latent."})
    depth: int = field(default=3, metadata={"help": "Levels of children to show."})
    min_score: float = field(default=0.5, metadata={"help": "Least score of an edge: 0 is chance, 1 is always."})
    max_children: int = field(default=8, metadata={"help": "Roots, and children of one latent, to show."})
    max_tokens: int = field(default=200_000, metadata={"help": "Tokens to read."})
    use_cpu: bool = common_fields.use_cpu()
    output: str | None = field(
        default=None, metadata={"help": "Write all edges to this file, too: .json, or .dot for Graphviz."}
    )
    json: bool = common_fields.as_json()


def run(arguments: list[str], brief: bool = False) -> None:
    """Parse, find or read the edges, print; `brief`, the trees alone."""
    args, sources = parse(build_parser("tree", DESCRIPTION, (TreeArguments, SourceArguments)), arguments)

    from rich.console import Console

    from hf_msae.cli.sources import check_sae_place
    from hf_msae.interpret import read_hierarchy

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if args.depth < 1 or args.max_children < 1:
        raise InputError(f"--depth and --max-children must be at least 1, got {args.depth} and {args.max_children}.")
    if args.output is not None and Path(args.output).suffix not in (".json", ".dot", ".gv"):
        raise InputError(f"--output {args.output} must end in .json, .dot or .gv.")
    check_sae_place(args.sae)
    found = None if sources.dataset is not None else read_hierarchy(args.sae, args.subfolder or None)
    hierarchy, names = _measure(args, sources) if found is None else found
    if args.root is not None and not 0 <= args.root < hierarchy.prefix_sizes[-1]:
        raise InputError(f"--root {args.root} is no latent; they are 0 to {hierarchy.prefix_sizes[-1] - 1:,}.")
    shown = hierarchy.at_least(args.min_score)
    if args.json:
        print(json.dumps({**json.loads(shown.to_json()), "names": list(names)}))
    else:
        for line in [] if brief else summary(shown):
            Console(highlight=False).print(line)
        for tree in draw(shown, names, args.root, args.depth, args.max_children):
            Console(highlight=False).print(tree)
    if args.output is not None:
        path = Path(args.output)
        text = shown.to_json() if path.suffix == ".json" else shown.to_graphviz(dict(enumerate(names)))
        path.write_text(text, encoding="utf-8")
        print(f"Wrote {len(shown.edges):,} edges to {path}", file=sys.stderr if args.json else sys.stdout)


def _measure(args: TreeArguments, sources: SourceArguments) -> "tuple[Hierarchy, Sequence[str]]":
    from hf_msae.cli.sources import choose_device, load_language_model, load_sae, load_text
    from hf_msae.interpret.trees import check_levels, measure_hierarchy

    choose_device(args.use_cpu)
    sae = load_sae(args.sae, args.subfolder, sources)
    check_levels(sae, args.sae)  # before anything else is loaded
    documents, _ = load_text(sources)
    model, tokenizer = load_language_model(sources)
    return measure_hierarchy(
        model, tokenizer, sae, documents, max_tokens=args.max_tokens, site=args.site, called=args.sae
    )


def summary(hierarchy: "Hierarchy") -> list[str]:
    """What was looked at, and what the filters left."""
    steps = " → ".join(f"{number:,} {name}" for name, number in hierarchy.survivors.items())
    lines = [
        f"{hierarchy.num_tokens:,} tokens; pairs left by each filter: {steps}",
        f"{len(hierarchy.edges):,} edges among {len({e.child for e in hierarchy.edges}):,} children and "
        f"{len({e.parent for e in hierarchy.edges}):,} parents. Shares below are of the latent above.",
    ]
    if hierarchy.super_parents:
        listed = ", ".join(map(str, hierarchy.super_parents))
        lines.append(f"Parents of much of what is below them, to be read with care: {listed}")
    return lines


def draw(
    hierarchy: "Hierarchy", names: Sequence[str], root: int | None, depth: int, max_children: int
) -> "list[Tree]":
    """The trees below one latent, or below all roots, the easiest to understand first."""
    from rich.markup import escape
    from rich.tree import Tree

    roots = hierarchy.roots(names) if root is None else [root]
    direct = hierarchy.reduced()

    def grow(tree: Tree, latent: int, left: int) -> None:
        edges = direct.children(latent)
        if not left:
            return
        for edge in edges[:max_children]:
            split = ", a split" if hierarchy.is_split(edge, names) else ""
            grow(tree.add(line(edge.child, f"{hierarchy.share(edge):.0%}{split}")), edge.child, left - 1)
        if len(edges) > max_children:
            tree.add(f"… and {len(edges) - max_children:,} more")

    def line(latent: int, more: str) -> str:
        flag = "  [red]super-parent[/red]" if latent in hierarchy.super_parents else ""
        return f"[bold]{latent}[/bold] {escape(names[latent])}[dim]  {more}[/dim]{flag}"

    trees = []
    for latent in roots[:max_children]:
        density = hierarchy.counts[latent] / hierarchy.num_tokens
        tree = Tree(line(latent, f"fires on {density:.1%} of tokens"))
        grow(tree, latent, depth)
        trees.append(tree)
    if len(roots) > max_children:
        trees.append(Tree(f"… and {len(roots) - max_children:,} more roots"))
    return trees
