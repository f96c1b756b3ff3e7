"""Tables and boxes of HTML for notebooks: every text is escaped, and colours suit light and dark pages. Pure.

There is no ``<style>`` and no script, since several notebook viewers remove both.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from eventtrain.errors import printable, shortened

LONGEST = 200
"""Characters of one text."""
CELL = "padding:1px 14px 1px 0;text-align:{side};vertical-align:top;overflow-wrap:anywhere"
SOFT = "opacity:.7"


def text(value: object) -> str:
    """Returns ``value`` as HTML text: one line, of at most ``LONGEST`` characters, which can be no markup."""
    return html.escape(plain(str(value)))


def plain(value: str) -> str:
    """Returns ``value`` as one line of at most ``LONGEST`` characters."""
    return printable(shortened(value, LONGEST))


def title(main: str, note: str = "") -> str:
    """Returns a heading, with a fainter note beside it."""
    beside = f' <span style="{SOFT}">{text(note)}</span>' if note else ""
    return f'<div style="margin:2px 0"><b>{text(main)}</b>{beside}</div>'


def note(line: str) -> str:
    """Returns a faint line; nothing if it is empty."""
    return f'<div style="{SOFT}">{text(line)}</div>' if line else ""


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Returns a table of names and values."""
    rows = "".join(
        f'<tr style="background:none">{_cell(name, style=SOFT)}{_cell(value)}</tr>' for name, value in pairs
    )
    return _table(rows)


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, most: int = 30) -> str:
    """Returns a table whose first column is text and whose other columns are numbers.

    Args:
        head: one heading a column.
        rows: of as many values.
        most: rows shown; the others are counted.
    """
    columns = range(len(head))
    sides = ["left" if column == 0 else "right" for column in columns]
    lines = ["".join(_cell(head[column], sides[column], SOFT) for column in columns)]
    lines += ["".join(_cell(row[column], sides[column]) for column in columns) for row in rows[:most]]
    if len(rows) > most:
        lines.append(_cell(f"{len(rows) - most} more", style=SOFT))
    return _table("".join(f'<tr style="background:none">{line}</tr>' for line in lines))


def box(*parts: str) -> str:
    """Returns the whole of what an object shows."""
    return f'<div style="max-width:900px;line-height:1.4">{"".join(part for part in parts if part)}</div>'


def row_of(parts: Sequence[str]) -> str:
    """Returns ``parts`` side by side, in as many lines as they need."""
    return f'<div style="display:flex;flex-wrap:wrap;gap:6px 18px;margin:4px 0">{"".join(parts)}</div>'


def _cell(value: object, side: str = "left", style: str = "") -> str:
    return f'<td style="{CELL.format(side=side)};{style}">{text(value)}</td>'


def _table(rows: str) -> str:
    return (
        f'<table style="border-collapse:collapse;margin:4px 0;font-size:90%">{rows}</table>' if rows else ""
    )
