"""A comparison of corpora on disk, in the form of every evaluation: `evaluation.json` and one HTML page."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined

from hf_msae.atomic_files import atomic_file
from hf_msae.corpora.diff import NUM_WITH_EXAMPLES, CorpusDiff
from hf_msae.evaluation.metric import Table
from hf_msae.evaluation.plots import COLOURS, draw_svg, legend_outside
from hf_msae.evaluation.report import HTML_NAME, JSON_NAME, TEMPLATE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DETAILS = Path(__file__).with_name("differences.html")
CAPTION = (
    "In which share of A's documents and of B's each latent fires. Grey are those that do not differ beyond chance; "
    "findings on the diagonal fire as often in both, and more strongly in one."
)


def level_table(diff: CorpusDiff) -> Table:
    """A row for each level.

    Args:
        diff: the comparison.
    """
    rows = [
        [str(one.level), *(f"{count:,}" for count in (one.prefix, one.tested, one.more_in_a, one.more_in_b))]
        for one in diff.levels
    ]
    note = (
        f"Latents that one corpus's documents have more of: ranks of the {diff.facts['pool']} activation in a "
        f"document, a false discovery rate of {diff.facts['fdr']:g} over all levels. Tested are the latents that each "
        "level adds and that fire in enough documents."
    )
    return Table("What differs, by level", note, ["level", "prefix", "tested", "more in A", "more in B"], rows)


def finding_table(diff: CorpusDiff, level: int, most: int) -> Table:
    """The largest differences of a level.

    Args:
        diff: the comparison.
        level: its index.
        most: how many rows.
    """
    findings = diff.of_level(level)
    rows = [
        [
            str(one.latent),
            one.name,
            f"{one.delta:+.2f}",
            f"{one.share_a:.0%}",
            f"{one.share_b:.0%}",
            f"{one.q:.1e}",
        ]
        for one in findings[:most]
    ]
    more = f"{len(findings) - most:,} more differ less." if len(findings) > most else ""
    header = ["latent", "name", "delta", "fires in A", "fires in B", "q"]
    return Table(f"Level {level}, prefix {diff.levels[level].prefix:,}", more, header, rows)


def draw_shares(figure: "Figure", diff: CorpusDiff) -> None:
    """The share of documents in which each latent fires, of one corpus against the other.

    Args:
        figure: of matplotlib, empty.
        diff: the comparison.
    """
    axis = figure.subplots()
    tests = diff.tests
    found = tests.q <= diff.facts["fdr"]
    quiet = tests.tested & ~found
    axis.plot([0, 1], [0, 1], linewidth=1, color="#888888", alpha=0.5)
    shares = [share.numpy() for share in (diff.share_a, diff.share_b)]
    axis.plot(*(share[quiet.numpy()] for share in shares), "o", markersize=2, color="#888888", alpha=0.5)
    for level in diff.levels:
        rows = diff.of_level(level.level)
        points = [one.share_a for one in rows], [one.share_b for one in rows]
        colour = COLOURS[level.level % len(COLOURS)]
        axis.plot(*points, "o", markersize=4, color=colour, label=f"level {level.level}")
    axis.set_xlabel("fires in this share of A's documents")
    axis.set_ylabel("of B's")
    legend_outside(axis)


def write_diff_report(diff: CorpusDiff, folder: str | Path, title: str) -> None:
    """Write both files, each whole or not at all.

    Args:
        diff: what is written.
        folder: where to; it is made where it is missing.
        title: of the page.
    """
    facts = diff.facts
    shown = [
        (name.upper(), f"{facts[name]}: {facts[f'documents_{name}']:,} documents, {facts[f'tokens_{name}']:,} tokens")
        for name in "ab"
    ]
    shown += [("note", warning) for warning in diff.warnings]
    # What texts say is shown as it is, and is no part of the page.
    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=False)
    levels = [(level, diff.of_level(level.level)[:NUM_WITH_EXAMPLES]) for level in diff.levels]
    most_shown = any(len(diff.of_level(level.level)) > NUM_WITH_EXAMPLES for level in diff.levels)
    details = environment.from_string(DETAILS.read_text(encoding="utf-8")).render(
        levels=levels, most_shown=most_shown, shown=NUM_WITH_EXAMPLES, marked=_marked
    )
    svg = draw_svg(lambda figure: draw_shares(figure, diff))
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        facts=shown,
        tables=[(level_table(diff), [(CAPTION, svg)])],
        details=[("latents", "The latents that differ", details)],
    )
    contents = {HTML_NAME: page, JSON_NAME: json.dumps(diff.to_dict(), indent=1) + "\n"}
    for name, text in contents.items():
        with atomic_file(Path(folder) / name) as draft:
            draft.write_text(text, encoding="utf-8")


def _marked(text: str) -> list[str]:
    """What stands before the marked token of an example, the token, and what stands behind it."""
    return re.split("<<(.+?)>>", text, maxsplit=1, flags=re.DOTALL)
