"""Pieces of HTML. Whatever comes from a visitor, a model or a repo goes through `text`, and nothing else makes HTML.

The pieces are handed to `gr.HTML` as a value, which the page inserts as it is. They must never become part of its
template: Gradio evaluates a filled template as JavaScript, so that a token `${...}` would run.
"""

from collections.abc import Iterable, Sequence
from html import escape

# The element that a visitor chose, told to Python as (action, id); see `on_click`.
ON_CLICK = """
element.addEventListener('click', (event) => {
  const chosen = event.target.closest('[data-do]');
  if (chosen) trigger('click', {action: chosen.dataset.do, id: Number(chosen.dataset.id)});
});
"""


def text(value: object) -> str:
    """Escaped, for content and for attributes in double quotes."""
    return escape(str(value), quote=True)


def visible(piece: str) -> str:
    """A token with its white space made visible where it would vanish."""
    return text(piece.replace("\n", "↵").replace("\t", "⇥")) or "∅"


def note(words: str, kind: str = "note") -> str:
    """A line of explanation; `kind` is "note" or "problem"."""
    role = ' role="alert"' if kind == "problem" else ""
    return f'<p class="msae-{kind}"{role}>{text(words)}</p>'


def tokens(
    pieces: Sequence[str],
    strengths: Sequence[float],
    *,
    hue: int | Sequence[int] = 0,
    marked: int | None = None,
    titles: Sequence[str] | None = None,
    special: Sequence[bool] | None = None,
    clickable: bool = True,
) -> str:
    """A text whose tokens are coloured.

    Args:
        pieces: The tokens as text.
        strengths: How strongly each is coloured, 0 … 1.
        hue: Index into the palette of levels, of all tokens or of each.
        marked: The token that is underlined.
        titles: What is said of each on hovering.
        special: Which are special tokens.
        clickable: Whether each is a button.
    """
    parts = []
    for position, (piece, strength) in enumerate(zip(pieces, strengths, strict=True)):
        # Outside of the token, so that a line does not begin with it.
        space = " " if piece.startswith(" ") and piece.strip() else ""
        shown = visible(piece.lstrip(" ") if space else piece)
        title = f' title="{text(titles[position])}"' if titles else ""
        look = "msae-token" + (" msae-special" if special and special[position] else "")
        look += "" if isinstance(hue, int) else f" msae-hue-{hue[position] % 6}"
        style = f'style="--a:{min(max(strength, 0.0), 1.0):.3f}"{title}'
        if clickable:
            does = f'data-do="token" data-id="{position}" aria-pressed="{"true" if position == marked else "false"}"'
            parts.append(f'{space}<button type="button" class="{look}" {does} {style}>{shown}</button>')
        else:
            mark = " msae-marked" if position == marked else ""
            parts.append(f'{space}<span class="{look}{mark}" {style}>{shown}</span>')
        if piece.endswith("\n"):
            parts.append("<br>")
    of_all = f" msae-hue-{hue % 6}" if isinstance(hue, int) else ""
    return f'<div class="msae-tokens{of_all}">{"".join(parts)}</div>'


def latent_button(
    latent: int, name: str, level: int, *, extra: str = "", action: str | None = "latent", with_level: bool = True
) -> str:
    """A latent to choose: its level, number and name, and something beside it. Without an action it is only shown."""
    where = f'<span class="msae-level">level {level}</span>' if with_level else ""
    beside = f'<span class="msae-extra">{text(extra)}</span>' if extra else ""
    inside = f'{where}<span class="msae-number">#{latent}</span><span class="msae-name">{text(name)}</span>{beside}'
    look = f'class="msae-latent msae-hue-{level % 6}"'
    if action is None:
        return f"<div {look}>{inside}</div>"
    return f'<button type="button" {look} data-do="{action}" data-id="{latent}">{inside}</button>'


def button(label: str, action: str, number: int, *, primary: bool = False, title: str = "") -> str:
    """A button inside a piece of HTML, and what is said of it on hovering."""
    kind = "msae-button msae-primary" if primary else "msae-button"
    said = f' title="{text(title)}"' if title else ""
    return f'<button type="button" class="{kind}" data-do="{action}" data-id="{number}"{said}>{text(label)}</button>'


def listing(items: Iterable[str], empty: str) -> str:
    """A list of pieces, or a note where there are none."""
    rows = "".join(f"<li>{item}</li>" for item in items)
    return f'<ul class="msae-list">{rows}</ul>' if rows else note(empty)


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], chosen: int | None = None, *, of_words: bool = False
) -> str:
    """Rows of text under a header, the first column a heading of its row.

    Args:
        header: Of each column.
        rows: Of as many cells each.
        chosen: The row that is marked.
        of_words: All but the last column hold words rather than numbers.
    """
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    body = ""
    for index, row in enumerate(rows):
        cells = f'<th scope="row">{text(row[0])}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in row[1:])
        current = ' aria-current="true"' if index == chosen else ""
        body += f"<tr{current}>{cells}</tr>"
    kind = "msae-table msae-words-table" if of_words else "msae-table"
    inside = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="msae-scroll" tabindex="0"><table class="{kind}">{inside}</table></div>'


def bars(counts: Sequence[float], low: str, high: str, label: str) -> str:
    """A histogram, with what its ends mean."""
    top = max(counts, default=0) or 1
    width = 100 / max(1, len(counts))
    drawn = "".join(
        f'<rect x="{index * width:.3f}" y="{40 - 40 * count / top:.3f}" width="{width * 0.9:.3f}" '
        f'height="{40 * count / top:.3f}"/>'
        for index, count in enumerate(counts)
    )
    return (
        '<figure class="msae-bars"><svg viewBox="0 0 100 40" preserveAspectRatio="none" role="img" '
        f'aria-label="{text(label)}">{drawn}</svg><figcaption><span>{text(low)}</span><span>{text(label)}</span>'
        f"<span>{text(high)}</span></figcaption></figure>"
    )


def columns(left: str, right: str) -> str:
    """Two pieces beside each other, above each other on a phone."""
    return f'<div class="msae-columns"><div>{left}</div><div>{right}</div></div>'


def section(title: str, body: str) -> str:
    """A part with a heading."""
    return f'<section class="msae-section"><h3>{text(title)}</h3>{body}</section>'
