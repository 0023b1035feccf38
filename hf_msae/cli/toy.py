"""`hf-msae toy`: train SAEs where the truth is known, and see what each of them does to a hierarchy."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_msae.atomic_files import atomic_file
from hf_msae.cli import common_fields
from hf_msae.cli.free_cores import take_free_cores
from hf_msae.cli.parser import build_parser, parse
from hf_msae.research.toys.arguments import SHUFFLED, UNTRAINED, ToyArguments

if TYPE_CHECKING:
    from rich.table import Table

    from hf_msae.research.toys.experiment import ToyResults

DESCRIPTION = """\
Train SAEs on activations made of known features in a known hierarchy, and print how well each variant recovers them:
vanilla (one level), fixed prefixes, Pareto-sampled prefixes, balanced levels, detached prefixes. Pictures and numbers
go into the output directory. docs/toys.md explains every column."""

TABLE_WIDTH = 100


def make_table(args: ToyArguments, results: "ToyResults") -> "Table":
    """What every variant and control reached, a column each."""
    from rich import box
    from rich.table import Table

    from hf_msae.research.toys.experiment import make_rows

    title = f"{args.world}, {args.activation}, {args.steps:,} steps, {args.init} start; mean ± SD of {args.seeds} runs"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in results.recoveries:
        table.add_column(name, justify="right", no_wrap=True, style="dim" if name in (UNTRAINED, SHUFFLED) else None)
    for column, cells in make_rows(results.recoveries).items():
        table.add_row(column, *cells.values())
    return table


@dataclass
class PrintArguments:
    """How the result is printed."""

    _argument_group_name = "output"

    json: bool = common_fields.as_json()


def run(arguments: list[str]) -> None:
    """Parse, train, print the table, write numbers and pictures."""
    args, printing = parse(build_parser("toy", DESCRIPTION, (ToyArguments, PrintArguments)), arguments)

    from rich.console import Console

    from hf_msae.research.heatmaps import draw_heatmaps
    from hf_msae.research.toys.experiment import run_toy, to_json

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    take_free_cores()
    args = replace(args, variants=list(dict.fromkeys(args.variants)))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = run_toy(args)
    with atomic_file(folder / "recovery.json") as draft:
        draft.write_text(to_json(args, results), encoding="utf-8")
    with atomic_file(folder / "heatmaps.png") as draft:
        draft.write_bytes(draw_heatmaps(results.toy.world, results.saes))
    if printing.json:
        print(to_json(args, results))
        return
    # Where a terminal is narrower, wrapped lines still hold every number; cut cells would not.
    console = Console(highlight=False, width=max(TABLE_WIDTH, Console().width))
    console.print(make_table(args, results))
    console.print(
        f"{UNTRAINED} and {SHUFFLED} are controls: what chance gives, and what the hierarchy's rows give where the "
        "hierarchy is wrong.",
        soft_wrap=True,
    )
    console.print(f"Saved to {folder}", soft_wrap=True)
