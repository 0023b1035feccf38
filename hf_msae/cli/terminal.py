"""How commands show tables in the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Wider than any table here.
UNBOUNDED = 1000


def print_table(
    console: "Console", title: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str = ""
) -> None:
    """Print a heading, a table and what its columns mean.

    Columns of numbers stand at the right and are never cut or broken: where the terminal is too narrow for them, it
    breaks lines. What opens several rows in a column of words at the left is said once. Nothing is read as markup.

    Args:
        console: Where to.
        title: The heading; none where empty.
        header: Names of the columns.
        rows: Cells; where there are none, only heading and note are printed.
        note: What stands below.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if title:
        console.print(Text(f"\n{title}", style="bold"), soft_wrap=True)
    if rows:
        numbers = [all(map(_is_number, column)) for column in zip(*rows, strict=True)]
        table = Table()
        for name, is_number, cells in zip(header, numbers, zip(header, *rows, strict=True), strict=True):
            longest = max(cell_len(part) for cell in cells for part in ([cell] if is_number else cell.split() or [""]))
            table.add_column(
                Text(name), justify="right" if is_number else "left", no_wrap=is_number, min_width=longest
            )
        before = None
        for first, *others in rows:
            shown = "" if first == before and not numbers[0] else first
            table.add_row(*map(Text, [shown, *others]))
            before = first
        needed = console.measure(table, options=console.options.update(max_width=UNBOUNDED)).minimum
        Console(file=console.file, highlight=False, width=max(console.width, needed)).print(table)
    if note:
        console.print(Text(note, style="dim"))


def _is_number(cell: str) -> bool:
    """Whether a cell holds a number, perhaps with a unit, or the sign of one that is missing."""
    return cell in ("", "–") or cell.lstrip("+-−±<>~≤≥.∞")[:1].isdigit()
