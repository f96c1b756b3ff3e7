"""Columns of epochs and steps as HTML for notebooks: a small chart of each metric, and a table of its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eventtrain.notebook import html
from eventtrain.subscribers._shared.curve import Curve
from eventtrain.subscribers._shared.small_chart import MOST_CHARTS, small_chart

Column = np.ndarray[tuple[int], np.dtype[Any]]  # of booleans, integers or floats
Columns = Mapping[str, Column]

HEAD = ("metric", "last", "lowest", "highest")


def metrics_html(epochs: Columns, steps: Columns, own: Sequence[str] = ()) -> str:
    """Returns charts of the first metrics and a table of thirty; bounded in size for any number of rows.

    Args:
        epochs: columns with ``epoch``, ``step`` and metrics; those with ``val_`` are drawn into the same charts.
        steps: columns with ``step`` and metrics, drawn in place of their means over epochs.
        own: names of columns that are not metrics.
    """
    names = [name for name in epochs if name not in own]
    names += [name for name in steps if name not in own and name not in names]
    drawn = [name for name in names if not name.startswith("val_") or name.removeprefix("val_") not in names]
    charts = [
        small_chart(name, _curve(steps if name in steps else epochs, name), _curve(epochs, f"val_{name}"))
        for name in drawn[:MOST_CHARTS]
    ]
    paired = [one for name in drawn for one in (name, f"val_{name}") if one in epochs]
    rows = [_row(name, epochs["epoch"], epochs[name]) for name in paired]
    more = f"{len(drawn) - MOST_CHARTS} more metrics are not drawn" if len(drawn) > MOST_CHARTS else ""
    return html.row_of(charts) + html.note(more) + (html.table(HEAD, rows) if rows else "")


def newest(columns: Columns, own: Sequence[str] = (), most: int = 6) -> str:
    """Returns the last values of the first metrics as one line of plain text."""
    names = [name for name in columns if name not in own and len(columns[name])]
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"{html.plain(name)}={columns[name][-1]:.4g}" for name in names[:most]) + more


def _curve(columns: Columns, name: str) -> Curve | None:
    if name not in columns:
        return None
    curve = Curve()
    curve.add(columns["step"], columns[name])
    return curve


def _row(name: str, epochs: Column, column: Column) -> tuple[str, str, str, str]:
    finite = np.flatnonzero(np.isfinite(column))
    if not len(finite):
        return name, _number(column[-1]), "", ""
    low, high = finite[np.argmin(column[finite])], finite[np.argmax(column[finite])]
    best = [f"{_number(column[at])}  epoch {epochs[at] + 1}" for at in (low, high)]
    return name, _number(column[-1]), best[0], best[1]


def _number(value: Any) -> str:  # a NumPy scalar
    return f"{value:.4g}"
