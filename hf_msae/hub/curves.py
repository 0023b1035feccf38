"""The curves of a training run as one picture for its model card.

The picture is transparent and its text a middle grey, so that it reads on a white page and on a dark one.
"""

import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hf_msae.plot_style import style_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "curves.png"
GREY = "#7f8791"
LINE = "#3f8fd6"
Entry = dict[str, Any]


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_curves(log: Sequence[Entry], prefix_sizes: Sequence[int]) -> bytes | None:
    """A PNG of loss, FVE per level, L0 and the share of dead latents over training tokens.

    log: the entries of `training_log.jsonl`, in order. Returns None where it has fewer than two points to connect.
    Raises `ImportError` where matplotlib is not installed.
    """
    steps = [entry for entry in log if "loss" in entry]
    if len(steps) < 2:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves the user's pyplot alone
    axes = list(figure.subplots(2, 2).flat)
    tokens = [entry["tokens"] for entry in steps]
    _draw_line(axes[0], "loss", tokens, [entry["loss"] for entry in steps])
    _draw_levels(axes[1], log, prefix_sizes)
    _draw_line(axes[2], "L0: mean active latents", tokens, [entry["l0"] for entry in steps])
    _draw_line(axes[3], "dead latents, %", tokens, [100 * entry["dead"] for entry in steps])
    for axis in axes[2:4]:
        axis.set_ylim(bottom=0)
    for axis in axes:
        _style(axis)
    file = io.BytesIO()
    figure.savefig(file, format="png", transparent=True, metadata={"Software": None})
    return file.getvalue()


def fve_by_level(log: Sequence[Entry], prefix_sizes: Sequence[int]) -> tuple[list[int], list[list[float]]]:
    """Collect tokens, and for each of them the FVE of every prefix.

    It is that of training batches where the log has every level's error there, else (sampled prefixes) as it was
    measured on held-out tokens in passing.
    """
    batches = [entry for entry in log if len(entry.get("level_losses", ())) == len(prefix_sizes)]
    if batches:
        return [entry["tokens"] for entry in batches], [[1 - e for e in entry["level_losses"]] for entry in batches]
    measured = [entry for entry in log if len(entry.get("eval_levels", ())) == len(prefix_sizes)]
    return [entry["tokens"] for entry in measured], [[level["fve"] for level in e["eval_levels"]] for e in measured]


def _draw_line(axis: "Axes", title: str, tokens: Sequence[int], values: Sequence[float]) -> None:
    axis.plot(tokens, values, color=LINE, linewidth=1.6)
    axis.set_title(title)


def _draw_levels(axis: "Axes", log: Sequence[Entry], prefix_sizes: Sequence[int]) -> None:
    from matplotlib import colormaps

    tokens, rows = fve_by_level(log, prefix_sizes)
    for level, size in enumerate(prefix_sizes if rows else ()):
        # The ends of the colormap would vanish on a dark or on a white page.
        color = colormaps["plasma"](0.35 + 0.4 * level / max(1, len(prefix_sizes) - 1))
        axis.plot(tokens, [row[level] for row in rows], color=color, linewidth=1.6, label=f"{size:,}")
    axis.set_title("FVE by prefix")
    # Early batches can be below zero by far, and would flatten everything after them.
    axis.set_ylim(bottom=max(0, min((min(row) for row in rows), default=0)), top=1)
    if rows:
        # Beside the curves, which may run anywhere; the widest dictionary on top, as its curve is.
        axis.legend(
            frameon=False,
            labelcolor=GREY,
            fontsize="small",
            reverse=True,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
        )


def _style(axis: "Axes") -> None:
    from matplotlib.ticker import EngFormatter

    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel("tokens")
    style_axis(axis, GREY, 0.25)
