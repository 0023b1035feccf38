"""Drawing for a report: SVG that takes the colour of the page's text, so that it reads on light and on dark pages."""

import io
import re
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hf_msae.evaluation.metric import Evaluation
from hf_msae.plot_style import style_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib wants a colour; in the SVG it becomes the page's own.
TEXT = "#010203"
# Hues that keep their contrast on white and on near-black (after Okabe and Ito).
COLOURS = ("#3f8fd6", "#e0812a", "#2aa876", "#c45fa0", "#9a7fdc", "#b8952a", "#5aa9b8", "#d1605e")
MARKERS = "osD^vPX*"
Point = tuple[float, float]


def draw_svg(draw: Callable[["Figure"], None]) -> str:
    """An `<svg>` element as wide as its place on the page.

    Args:
        draw: draws on an empty matplotlib figure.
    """
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
        draw(figure)
        for axis in figure.axes:
            style_axis(axis, TEXT, 0.14)
        for legend in [*figure.legends, *(axis.get_legend() for axis in figure.axes)]:
            _style_legend(legend)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(TEXT, "currentColor")
    # Sizes in points would not shrink on a narrow page.
    return re.sub(r'(<svg[^>]*?) width="[^"]*"| height="[\d.]+pt"', r"\1", svg, count=2)


def _style_legend(legend: Any) -> None:
    if legend is not None:
        legend.get_frame().set_visible(False)
        for text in legend.get_texts():
            text.set_color(TEXT)


def draw_lines(axis: "Axes", evaluation: Evaluation, points_of: Callable[[str], Sequence[Point]]) -> None:
    """A line for each method, through the means of its SAEs' points.

    Args:
        axis: a matplotlib axis.
        evaluation: whose methods are drawn.
        points_of: from an SAE's name its points, as many for each SAE of a method.
    """
    for number, (method, names) in enumerate(evaluation.names_by_method().items()):
        columns = list(zip(*map(points_of, names), strict=True))
        means = [tuple(statistics.fmean(values) for values in zip(*points, strict=True)) for points in columns]
        if means:
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axis.plot(
                *zip(*means, strict=True), marker=marker, markersize=5, linewidth=1.5, color=colour, label=method
            )


def log_axis(axis: "Axes", places: Sequence[float] = ()) -> None:
    """Make the horizontal axis logarithmic, with plain numbers.

    Args:
        axis: a matplotlib axis.
        places: where the numbers stand; by default at 1, 2, 5, 10, ...
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(places) if places else LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def mean_at(items: Sequence[Any], place: str, field: str) -> list[Point]:
    """Points of one SAE: at each value of one field the mean of another, over splits.

    Args:
        items: dataclasses.
        place: the field that is the horizontal coordinate.
        field: the field that is averaged.
    """
    places = sorted({vars(item)[place] for item in items})
    return [(at, statistics.fmean([vars(item)[field] for item in items if vars(item)[place] == at])) for at in places]


def legend_outside(axis: "Axes") -> None:
    """A legend beside the axis, where no line runs.

    Args:
        axis: a matplotlib axis.
    """
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
