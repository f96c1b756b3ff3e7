"""What metrics are called in a table that has columns of its own. Pure."""

from __future__ import annotations

from collections.abc import Iterable

METRICS = "metrics."
HYPERPARAMS = "hyperparams."


def metric_column(name: str, own: Iterable[str]) -> str:
    """The column of the metric ``name``: that name, with ``metrics.`` before it where it would mean something else.

    No two metrics get one column, and none that of a hyperparameter or one of the table's ``own``.
    """
    plain = name = writable(name)
    while plain.startswith(METRICS):
        plain = plain.removeprefix(METRICS)
    return METRICS + name if plain in own or plain.startswith(HYPERPARAMS) else name


def writable(name: str) -> str:
    """``name``, in which half a surrogate pair, which no encoding takes, is written as ``\\udc80``."""
    return name.encode("utf-8", "backslashreplace").decode()
