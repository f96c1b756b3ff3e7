"""Names of metrics in a table that has columns of its own. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from eventtrain.events.models import escape_surrogates

METRICS = "metrics."
HYPERPARAMS = "hyperparams."


def metric_column(name: str, own: Iterable[str]) -> str:
    """Returns the column of the metric ``name``: the name itself, or with ``metrics.`` before it if it is taken.

    No two metrics get one column, nor the column of a hyperparameter or one of the table's ``own``.
    """
    plain = name = escape_surrogates(name)
    while plain.startswith(METRICS):
        plain = plain.removeprefix(METRICS)
    return METRICS + name if plain in own or plain.startswith(HYPERPARAMS) else name


def metric_of(column: str, own: Iterable[str]) -> str:
    """Returns the name of the metric that ``metric_column`` gave this column."""
    plain = column
    while plain.startswith(METRICS):
        plain = plain.removeprefix(METRICS)
    return column.removeprefix(METRICS) if plain in own or plain.startswith(HYPERPARAMS) else column
