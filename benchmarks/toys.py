"""The published toy hierarchies, over several seeds: what each variant recovers, beside what its source reports.

    python benchmarks/toys.py --json toys.json --markdown toys.md

Trains what `hf-msae toy` trains, on each setting below, and writes the tables of docs/toys.md. A setting starts at
random or at the truth: the hedging paper's notebook starts there, to ask which solutions are stable, because from a
random start the toy with as many latents as features often misses some.
"""

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path

from hf_msae.atomic_files import atomic_file
from hf_msae.research.heatmaps import draw_heatmaps
from hf_msae.research.recovery import Recovery
from hf_msae.research.toys.experiment import ToyArguments, format_cell, make_rows, run_toy, to_json

SETTINGS = {
    "tree": ToyArguments(world="tree"),
    "hedging-truth": ToyArguments(world="hedging", init="truth"),
    "absorption-truth": ToyArguments(world="absorption", init="truth"),
    "parent": ToyArguments(world="parent"),
    "hedging": ToyArguments(world="hedging"),
    "tree-truth": ToyArguments(world="tree", init="truth"),
    "tree-batch_topk": ToyArguments(world="tree", activation="batch_topk"),
    "random": ToyArguments(world="random"),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of every run; default: as in `hf-msae toy`")
    parser.add_argument("--json", help="write all numbers here")
    parser.add_argument("--markdown", help="write the tables here")
    parser.add_argument("--pictures", help="write heatmaps into this folder")
    return parser.parse_args()


def write(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with atomic_file(path) as draft:
        draft.write_bytes(content)


def table(name: str, args: ToyArguments, recoveries: dict[str, list[Recovery]]) -> str:
    """A setting's means ± standard deviations, as markdown."""
    lines = [
        f"### {name}: {args.activation}, {args.init} start, {args.steps:,} steps of {args.batch_size}, "
        f"{args.seeds} seeds",
        "",
        "| | " + " | ".join(recoveries) + " |",
        "|---" * (len(recoveries) + 1) + "|",
    ]
    rows = make_rows(recoveries) | {
        "decoder child→sibling": {
            key: format_cell([run.decoder.child_to_sibling for run in runs], signed=True)
            for key, runs in recoveries.items()
        }
    }
    lines += [f"| {column} | " + " | ".join(cells.values()) + " |" for column, cells in rows.items()]
    return "\n".join(lines)


def main() -> None:
    options = parse()
    results, tables = {}, []
    for name in options.settings:
        args = replace(SETTINGS[name], seeds=options.seeds, steps=options.steps or SETTINGS[name].steps)
        start = time.perf_counter()
        outcome = run_toy(args)
        seconds = time.perf_counter() - start
        results[name] = json.loads(to_json(args, outcome)) | {"seconds": seconds}
        tables.append(table(name, args, outcome.recoveries))
        print(f"{tables[-1]}\n\n{seconds:.0f} s\n", flush=True)
        # Written after every setting, so that a run that is stopped leaves what it has.
        if options.json:
            content = {"python": platform.python_version(), "processor": platform.machine(), "settings": results}
            write(Path(options.json), json.dumps(content, indent=2).encode())
        if options.markdown:
            write(Path(options.markdown), ("\n\n".join(tables) + "\n").encode())
        if options.pictures:
            Path(options.pictures).mkdir(parents=True, exist_ok=True)
            picture = draw_heatmaps(outcome.toy.world, outcome.saes)
            write(Path(options.pictures) / f"{name}.png", picture)


if __name__ == "__main__":
    main()
