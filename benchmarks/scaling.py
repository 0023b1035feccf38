"""How the cost of one training step of ours grows with num_latents, k, the number of levels, and hidden_size.

    python benchmarks/scaling.py --threads 2 --json scaling.json --plot scaling.png

One of the four changes at a time, around the base point that the options give; the base point is part of each of the
four series. Steps are whole ones (see contenders.py) on the same kind of activations as in train_step.py. Beside each
stands the encoder's product of the same sizes, the one dense product of a step, so that what a step adds to it is
seen. All points of a series, and their products, take one step a round, in turn, so that a slow
moment of the machine falls on all; medians are reported, without the warm-up rounds.
"""

import argparse
import importlib.util
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from contenders import Setting, activations, bare_product, ours
from train_step import add_setting, check_rounds, interleaved, setting_of, where

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
HIDDEN_FACTORS = (0.5, 1.0, 2.0)
LEVELS = (1, 2, 3, 5, 8)


def series(base: Setting) -> dict[str, list[Setting]]:
    """The base point with each size changed alone; raises ValueError where that is impossible."""
    values: dict[str, list[Any]] = {
        "num_latents": _multiples(base.num_latents, FACTORS),
        "k": _multiples(base.k, FACTORS),
        "levels": sorted({*LEVELS, base.levels}),
        "hidden_size": _multiples(base.hidden_size, HIDDEN_FACTORS),
    }
    return {name: [replace(base, **{name: value}) for value in values[name]] for name in values}


def _multiples(value: int, factors: tuple[float, ...]) -> list[int]:
    return sorted({max(1, round(value * factor)) for factor in factors})


def measure(settings: list[Setting], warmup: int, repeats: int) -> list[dict[str, float]]:
    """Median seconds of a step and of the encoder's product at each setting."""
    contenders = []
    for setting in settings:
        batches = activations(setting, warmup + repeats)
        contenders += [(ours(setting, batches[0]), batches), (bare_product(setting, batches[0]), batches)]
    medians = [statistics.median(times) for times in interleaved(contenders, warmup)]
    return [
        {"seconds": step, "gemm_seconds": product} for step, product in zip(medians[::2], medians[1::2], strict=True)
    ]


def table(name: str, points: list[dict[str, Any]], base: Setting) -> None:
    reference = next(point["seconds"] for point in points if point["value"] == asdict(base)[name])
    print(f"\n{name:>12}{'s/step':>10}{'to base':>9}{'product s':>11}{'to product':>12}")
    for point in points:
        step, product = point["seconds"], point["gemm_seconds"]
        print(f"{point['value']:12,}{step:10.4f}{step / reference:9.2f}{product:11.4f}{step / product:12.2f}")


def plot(result: dict[str, Any], path: str) -> None:
    """One panel a size, both axes logarithmic: a straight line upwards is a power law."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(result["series"]), figsize=(16, 4), sharey=True, layout="constrained")
    for axis, (name, points) in zip(axes, result["series"].items(), strict=True):
        values = [point["value"] for point in points]
        axis.loglog(values, [point["seconds"] for point in points], "o-", label="training step")
        axis.loglog(values, [point["gemm_seconds"] for point in points], "s--", label="encoder product alone")
        axis.set_xticks(values, [f"{value:,}" for value in values], minor=False)
        axis.minorticks_off()
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend()
    figure.suptitle(f"One step of {result['base']['batch_size']:,} tokens, {result['where']}")
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--json", help="write the numbers here, too")
    parser.add_argument("--plot", help="draw them here (PNG; needs matplotlib)")
    options = parser.parse_args()
    check_rounds(parser, options)
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    base = setting_of(options)
    settings = series(base)
    drawn = options.plot is not None and importlib.util.find_spec("matplotlib") is not None
    if options.plot and not drawn:
        print("no plot: matplotlib is not installed")
    result: dict[str, Any] = {"where": where(options), "base": asdict(base), "series": {}}
    print(f"{result['where']}, {options.dtype}, {base}, medians of {options.repeats}")
    for name, points in settings.items():
        measured = measure(points, options.warmup, options.repeats)
        result["series"][name] = [
            {"value": asdict(point)[name]} | numbers for point, numbers in zip(points, measured, strict=True)
        ]
        table(name, result["series"][name], base)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2), encoding="utf-8")
    if drawn:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
