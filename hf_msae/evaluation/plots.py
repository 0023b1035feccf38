"""The plots of a report, as SVG that takes the colour of the page's text, so that it reads on light and dark pages."""

import io
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from hf_msae.evaluation.erasure import COUNTS
from hf_msae.evaluation.suite import Evaluation
from hf_msae.evaluation.tables import ABSORPTION, CORE, ERASURE, PROBING, PROGRESSIVE, STITCHING

# matplotlib wants a colour; in the SVG it becomes the page's own.
TEXT = "#010203"
# Hues that keep their contrast on white and on near-black (after Okabe and Ito).
COLOURS = ("#3f8fd6", "#e0812a", "#2aa876", "#c45fa0", "#9a7fdc", "#b8952a", "#5aa9b8", "#d1605e")
MARKERS = "osD^vPX*"
SHOWN_CELLS = 16
Point = tuple[float, float]


def draw_plots(result: Evaluation) -> dict[str, list[tuple[str, str]]]:
    """For the titles of tables, (caption, SVG) pairs of what was measured."""
    plots: dict[str, list[tuple[Callable[[Evaluation, Any], None], str]]] = {
        CORE: [
            (_fidelity, "Fidelity against sparsity: each point is a prefix, each line a method."),
            (
                _rate_distortion,
                f"As a code: bits per token, with {SHOWN_CELLS} values per latent, and what they explain.",
            ),
            (_density, "How often latents fire, by the level that adds them."),
        ]
    }
    if result.probing is not None:
        plots[PROBING] = [(_probing, "Probes on k latents by prefix; dashed lines are features without an SAE.")]
    if any(found.levels for found in result.absorption.values()):
        plots[ABSORPTION] = [
            (
                _absorption,
                "What other latents absorb, and how often a parent's best latent fires on its children, by prefix.",
            )
        ]
    if any(found.perturbation for found in result.erasure.values()):
        plots[ERASURE] = [(_erasure, "TPP by the number of latents ablated, whole dictionaries.")]
    if result.progressive is not None:
        plots[PROGRESSIVE] = [(_progressive, "FVE and RSA of prefixes, and importance by rank with its fitted law.")]
    plots[STITCHING] = [
        (
            partial(_stitching, item.curve),
            f"From {item.novelty.small} to {item.novelty.large}: novel latents are inserted, twins swapped, and at "
            "last the rest.",
        )
        for item in result.stitching
        if item.curve is not None
    ]
    return {title: [(caption, _draw(result, draw)) for draw, caption in drawings] for title, drawings in plots.items()}


def _draw(result: Evaluation, draw: Callable[[Evaluation, Any], None]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    options: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "hf_msae",
        "font.family": "sans-serif",
        "font.size": 10,
    }
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(9.4, 3.7), layout="constrained")
        FigureCanvasSVG(figure)  # draws without a display, and leaves the user's pyplot alone
        draw(result, figure)
        for axis in figure.axes:
            _style(axis)
        for legend in [*figure.legends, *(axis.get_legend() for axis in figure.axes)]:
            _style_legend(legend)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(TEXT, "currentColor")
    # Sizes in points would not shrink on a narrow page.
    return re.sub(r'(<svg[^>]*?) width="[^"]*"| height="[\d.]+pt"', r"\1", svg, count=2)


def _style(axis: Any) -> None:
    axis.tick_params(colors=TEXT)
    axis.grid(color=TEXT, alpha=0.14, linewidth=0.6)
    for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
        text.set_color(TEXT)
    for name, spine in axis.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(TEXT)


def _style_legend(legend: Any) -> None:
    if legend is not None:
        legend.get_frame().set_visible(False)
        for text in legend.get_texts():
            text.set_color(TEXT)


def _methods(result: Evaluation) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, method in result.methods.items():
        names.setdefault(method, []).append(name)
    return names


def _lines(axis: Any, result: Evaluation, points_of: Callable[[str], Sequence[Point]]) -> None:
    """A line for each method through the means of its SAEs' points."""
    for number, (method, names) in enumerate(_methods(result).items()):
        columns = list(zip(*map(points_of, names), strict=True))
        means = [tuple(statistics.fmean(values) for values in zip(*points, strict=True)) for points in columns]
        if means:
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axis.plot(
                *zip(*means, strict=True), marker=marker, markersize=5, linewidth=1.5, color=colour, label=method
            )


def _log_axis(axis: Any, places: Sequence[float] = ()) -> None:
    """A logarithmic horizontal axis with plain numbers, at these places or at 1, 2, 5, 10, ..."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(places) if places else LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _prefixes(result: Evaluation) -> list[int]:
    """Those of the SAE that is evaluated."""
    return [level.prefix for level in next(iter(result.core.values())).measurement.levels]


def _outside_legend(axis: Any) -> None:
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)


def _fidelity(result: Evaluation, figure: Any) -> None:
    spliced = next(iter(result.core.values())).measurement.ce_clean is not None
    left, *others = figure.subplots(1, 1 + spliced, squeeze=False)[0]
    _lines(left, result, lambda name: [(level.l0, level.fve) for level in result.core[name].measurement.levels])
    left.set(xlabel="L0", ylabel="FVE")
    _log_axis(left)
    left.set_ylim(top=1.02, bottom=max(-0.1, left.get_ylim()[0]))

    def recovered(name: str) -> list[Point]:
        levels = result.core[name].measurement.levels
        return [(level.l0, level.ce_recovered_mean) for level in levels if level.ce_recovered_mean is not None]

    for right in others:
        _lines(right, result, recovered)
        right.set(xlabel="L0", ylabel="CE recovered (against mean)")
        _log_axis(right)
        right.set_ylim(top=1.02, bottom=max(-0.5, right.get_ylim()[0]))
    _outside_legend(figure.axes[-1])


def _rate_distortion(result: Evaluation, figure: Any) -> None:
    axis = figure.subplots()

    def points(name: str) -> list[Point]:
        return [(p.bits, p.fve) for p in result.core[name].rate_distortion if p.cells == SHOWN_CELLS]

    _lines(axis, result, points)
    axis.set(xlabel="bits per token", ylabel="FVE")
    _log_axis(axis)
    axis.set_ylim(top=1.02, bottom=max(-0.1, axis.get_ylim()[0]))
    _outside_legend(axis)


def _density(result: Evaluation, figure: Any) -> None:
    from matplotlib import colormaps

    axis = figure.subplots()
    name, core = next(iter(result.core.items()))
    edges, bottom, sizes = core.density.edges, [0] * (len(core.density.edges) - 1), _prefixes(result)
    centres = [(low + high) / 2 for low, high in pairwise(edges)]
    for group, (counts, size) in enumerate(zip(core.density.counts, sizes, strict=True)):
        # The ends of the colormap would vanish on a dark or on a white page.
        colour = colormaps["plasma"](0.35 + 0.45 * group / max(1, len(sizes) - 1))
        label = f"up to {size:,} ({core.density.dead[group]} dead)"
        axis.bar(centres, counts, width=0.46, bottom=bottom, color=colour, label=label)
        bottom = [below + count for below, count in zip(bottom, counts, strict=True)]
    axis.set(xlabel=f"share of tokens on which a latent of {name} fires", ylabel="latents")
    ticks = [edge for edge in edges if edge == int(edge)]
    axis.set_xticks(ticks, [f"{100 * 10**tick:g}%" for tick in ticks])
    _outside_legend(axis)


def _probing(result: Evaluation, figure: Any) -> None:
    scores = result.probing.scores if result.probing is not None else []
    ks = sorted({score.k for score in scores if score.features in result.methods})
    chosen = [ks[0], ks[-1]]
    for k, axis in zip(chosen, figure.subplots(1, 2, sharey=True), strict=True):

        def points(name: str, k: int = k) -> list[Point]:
            of = [score for score in scores if (score.features, score.k) == (name, k)]
            sizes = sorted({score.prefix for score in of})
            return [(size, statistics.fmean([s.accuracy for s in of if s.prefix == size])) for size in sizes]

        _lines(axis, result, points)
        references = dict.fromkeys(score.features for score in scores if score.features not in result.methods)
        for number, name in enumerate(references):
            of = [s.accuracy for s in scores if s.features == name and s.k in (k, s.prefix)]
            if of:
                dashes = (0, (4 + 2 * number, 2 + number))
                axis.axhline(statistics.fmean(of), color=TEXT, alpha=0.7, linewidth=1, linestyle=dashes, label=name)
        axis.set(xlabel="prefix", title=f"k = {k}")
        _log_axis(axis, _prefixes(result))
    figure.axes[0].set_ylabel("balanced accuracy")
    _outside_legend(figure.axes[1])


def _absorption(result: Evaluation, figure: Any) -> None:
    fields = ("fraction", "child_recall") if _has_children(result) else ("fraction", "full")
    titles = {
        "fraction": "absorbed fraction (lower is better)",
        "full": "fully absorbed",
        "child_recall": "fires on children",
    }
    for field, axis in zip(fields, figure.subplots(1, 2), strict=True):

        def points(name: str, field: str = field) -> list[Point]:
            of = result.absorption[name].levels
            sizes = sorted({level.prefix for level in of})
            return [(size, statistics.fmean([vars(s)[field] for s in of if s.prefix == size])) for size in sizes]

        _lines(axis, result, points)
        axis.set(xlabel="prefix", title=titles[field])
        _log_axis(axis, _prefixes(result))
        axis.set_ylim(0, 1 if field == "child_recall" else None)
    _outside_legend(figure.axes[1])


def _has_children(result: Evaluation) -> bool:
    return all(level.child_recall is not None for found in result.absorption.values() for level in found.levels)


def _erasure(result: Evaluation, figure: Any) -> None:
    axis = figure.subplots()

    def points(name: str) -> list[Point]:
        widest = result.core[name].measurement.levels[-1].prefix
        of = [score for score in result.erasure[name].perturbation if score.prefix == widest]
        counts = sorted({score.count for score in of})
        return [(count, statistics.fmean([s.score for s in of if s.count == count])) for count in counts]

    _lines(axis, result, points)
    axis.set(xlabel="latents ablated per class", ylabel="TPP")
    _log_axis(axis, COUNTS)
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    _outside_legend(axis)


def _stitching(curve: Any, _: Evaluation, figure: Any) -> None:
    from hf_msae.research.stitching import draw_stitching

    draw_stitching(curve, figure)


def _progressive(result: Evaluation, figure: Any) -> None:
    """Of one SAE of each method: more lines could not be told apart."""
    from hf_msae.research.progressive import draw_progressive

    progressive = result.progressive
    if progressive is None:
        return
    firsts = {names[0] for names in _methods(result).values()} & set(progressive.importances)
    importances = {name: found for name, found in progressive.importances.items() if name in firsts}
    draw_progressive(replace(progressive, importances=importances), figure)
