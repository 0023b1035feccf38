"""How axes look in the pictures of model cards and reports, which lie on white pages and on dark ones."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def style_axis(axis: "Axes", colour: str, grid_alpha: float) -> None:
    """Draw everything around the data in one colour: a faint grid, and lines on the left and at the bottom only.

    Args:
        axis: a matplotlib axis.
        colour: one that reads on the page.
        grid_alpha: opacity of the grid, from 0 to 1.
    """
    axis.tick_params(colors=colour)
    axis.grid(color=colour, alpha=grid_alpha, linewidth=0.6)
    for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
        text.set_color(colour)
    for name, spine in axis.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(colour)
