"""Draws docs/tree.png: a sentence, the latents that are active on one of its tokens by level, the edges between them.

    python scripts/draw_picture.py      # of the SAE of `hf-msae quickstart`, which it trains where it is not there
    python scripts/draw_picture.py --sae DIR --text "..." --token angry --output picture.png

What is drawn is read from the SAE and its interpretation; nothing is named or placed by hand.
"""

import argparse
import logging
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from hf_msae import MatryoshkaSAE, capture, resolve_site
from hf_msae.interpret import Hierarchy, read_hierarchy
from hf_msae.language_models import load_language_model
from hf_msae.worlds import STORIES

ROOT = Path(__file__).resolve().parents[1]
TEXT = "Once there was a girl named Lily. Ben took her ball, and she was very angry."
# One colour a level, which reads on white and in grey.
COLOURS = ("#0b5d5b", "#2a8c82", "#7cc1b3")
MOST = 5  # active latents shown at each level, the strongest ones
BOX, BOX_WIDTH = 0.76, 1.72
WIDTH, HEIGHT = 11.0, 5.6
LEGEND = (
    "bar: how strongly it fires, beside its maximum        "
    "line: fires where the latent above fires, far more than by chance"
)


def make_sae(folder: Path) -> None:
    """What `hf-msae quickstart` trains and reads, before it prints its tree."""
    from hf_msae.cli.main import main

    try:
        main(["quickstart", "--output-dir", str(folder)])
    except SystemExit as end:
        if end.code:
            raise


def active_latents(sae: MatryoshkaSAE, text: str, word: str) -> tuple[list[str], int, dict[int, float]]:
    """The tokens of a text, the place of the last one that is `word`, and what is active there as shares of maxima."""
    model, tokenizer = load_language_model(STORIES)
    site = resolve_site(model, sae.config.site)
    inputs = tokenizer(text, return_tensors="pt")
    ids = inputs.input_ids[0].tolist()
    tokens = ["" if token in tokenizer.all_special_ids else tokenizer.decode([token]) for token in ids]
    places = [place for place, token in enumerate(tokens) if token.strip() == word]
    if not places:
        raise SystemExit(f"no token of {text!r} is {word!r}: they are {' | '.join(tokens)}")
    values = sae.encode(capture(model, [site], **inputs)[site])[0, places[-1]].detach()
    shares = (values / sae.max_activation.clamp_min(1e-6)).tolist()
    return tokens, places[-1], {latent: share for latent, share in enumerate(shares) if share > 0}


def shown_latents(hierarchy: Hierarchy, shares: dict[int, float]) -> list[list[int]]:
    """The strongest active latents of each level, in an order in which a child stands below its parent."""
    levels: list[list[int]] = []
    for level in range(len(hierarchy.prefix_sizes)):
        here = [latent for latent in shares if hierarchy.level(latent) == level]
        here = sorted(sorted(here, key=lambda latent: -shares[latent])[:MOST])
        above = {latent: place for row in levels for place, latent in enumerate(row)}

        def under(latent: int, above: dict[int, int] = above) -> float:
            places = [above[edge.parent] for edge in hierarchy.parents(latent) if edge.parent in above]
            return sum(places) / len(places) if places else len(above)

        levels.append(sorted(here, key=under))
    return levels


def draw(
    hierarchy: Hierarchy, names: list[str], tokens: list[str], place: int, shares: dict[int, float], path: Path
) -> None:
    """The sentence above, a band for every level below it, and edges between latents that are shown."""
    figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="white")
    FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, WIDTH)
    axis.set_ylim(0, HEIGHT)
    axis.axis("off")
    token_x = draw_sentence(figure, axis, tokens, place)
    axis.text(WIDTH / 2, 0.17, LEGEND, fontsize=8.5, color="#666666", ha="center", va="center")
    sizes = hierarchy.prefix_sizes
    band = (HEIGHT - 1.3) / len(sizes)
    centres: dict[int, tuple[float, float]] = {}
    for level, latents in enumerate(shown_latents(hierarchy, shares)):
        middle = HEIGHT - 0.95 - band * (level + 0.5)
        corner = (0.2, middle - band / 2 + 0.07)
        shape = {"boxstyle": "round,pad=0,rounding_size=0.1", "facecolor": COLOURS[level % 3], "edgecolor": "none"}
        axis.add_patch(FancyBboxPatch(corner, WIDTH - 0.4, band - 0.14, alpha=0.08, **shape))
        which = f"the first {sizes[0]:,}" if level == 0 else f"up to {sizes[level]:,}"
        axis.text(0.4, middle, f"level {level}\n{which}", va="center", fontsize=10, color="#333333")
        step = (WIDTH - 2.2) / max(len(latents), 1)
        centres |= {latent: (1.9 + step * (number + 0.5), middle) for number, latent in enumerate(latents)}
    for edge in hierarchy.reduced().edges:
        if edge.parent in centres and edge.child in centres:
            (x, y), (below_x, below_y) = centres[edge.parent], centres[edge.child]
            ends = [y - BOX / 2, below_y + BOX / 2]
            axis.plot([x, below_x], ends, color="#777777", lw=1 + 2 * edge.score, zorder=1)
    for latent, centre in centres.items():
        if hierarchy.level(latent) == 0:
            ends = [HEIGHT - 0.68, centre[1] + BOX / 2]
            axis.plot([token_x, centre[0]], ends, color="#bbbbbb", lw=1, ls=":", zorder=1)
        draw_latent(axis, hierarchy.level(latent), latent, names[latent], shares[latent], centre)
    figure.savefig(path, dpi=150)


def draw_sentence(figure: Figure, axis: Axes, tokens: list[str], place: int) -> float:
    """Print the sentence, its token in a box; returns where the token's middle is."""
    x, middle = 0.4, 0.0
    for number, token in enumerate(tokens):
        chosen = number == place
        x += 0.18 if chosen else 0.0
        look = {"weight": "bold", "color": "white"} if chosen else {"color": "#222222"}
        box = {"facecolor": COLOURS[0], "edgecolor": "none", "boxstyle": "round,pad=0.25"} if chosen else None
        text = axis.text(
            x, HEIGHT - 0.45, token.strip() if chosen else token, fontsize=13, va="center", bbox=box, **look
        )
        extent = text.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
        left, right = extent.transformed(axis.transData.inverted()).intervalx
        middle = (left + right) / 2 if chosen else middle
        x = right + (0.1 if chosen else 0.0)
    return float(middle)


def draw_latent(axis: Axes, level: int, latent: int, name: str, share: float, centre: tuple[float, float]) -> None:
    """A box with a latent's number and names, and a bar of how strongly it fires beside its maximum."""
    x, y = centre
    left, width, colour = x - BOX_WIDTH / 2, BOX_WIDTH, COLOURS[level % 3]
    shape = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": "white", "edgecolor": colour}
    axis.add_patch(FancyBboxPatch((left, y - BOX / 2), width, BOX, linewidth=1.4, zorder=2, **shape))
    words = name.split(", ")
    lines = [", ".join(words[:2]), ", ".join(words[2:4])]
    axis.text(x, y + 0.25, str(latent), fontsize=8, color="#777777", ha="center", va="center", zorder=3)
    axis.text(x, y, "\n".join(filter(None, lines)), fontsize=9.5, ha="center", va="center", zorder=3, color="#222222")
    ends = [left + 0.1, left + 0.1 + (width - 0.2) * min(share, 1)]
    axis.plot(ends, [y - 0.28] * 2, color=colour, lw=3.5, zorder=3, solid_capstyle="butt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--token", default="angry")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "tree.png")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if not (options.sae / "interpretation").is_dir():
        make_sae(options.sae)
    sae = MatryoshkaSAE.from_pretrained(options.sae)
    tokens, place, shares = active_latents(sae, options.text, options.token)
    found = read_hierarchy(options.sae)
    assert found is not None  # its interpretation is there
    draw(found[0], list(found[1]), tokens, place, shares, options.output)
    print(f"Wrote {options.output}")


if __name__ == "__main__":
    main()
