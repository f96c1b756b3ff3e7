"""Commands, paths, sizes and durations as text for people. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eventtrain.events import HyperparamChanged
from eventtrain.events.commands import Command


def command_text(command: Command) -> str:
    """Returns ``command`` as a call, such as ``scale_hyperparam(name=learning_rate, factor=0.5)``."""
    values = command.model_dump(exclude={"kind", "reason", "cause", "due", "source", "path"})
    shown = ", ".join(
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values.items()
        if value is not None
    )
    return f"{command.kind}({shown})"


def issuer(command: Command | HyperparamChanged) -> str:
    """Returns the subscriber that issued a command, or the way by which it came from outside; empty for the program."""
    return command.cause.subscriber if command.cause is not None else command.source or ""


def table_text(table: Mapping[str, Sequence[Any]]) -> str:
    """Returns the columns of a table, by name, as a table in Markdown."""
    rows = [tuple(table), *zip(*table.values(), strict=True)]
    lines = [f"| {' | '.join(map(_cell_text, row))} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(table), *lines[1:]])


def _cell_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", "<br>")


def file_name(path: str) -> str:
    """Returns the last part of a path, which does not identify the machine."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def clipped(text: str, most: int) -> str:
    """Returns ``text`` with at most ``most`` characters; an ellipsis stands for the rest."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def size_text(size_bytes: int) -> str:
    """1234567 -> "1.2 MB"."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def duration_text(duration_s: float) -> str:
    """12.34 -> "12.3 s"; 3725.2 -> "1:02:05"."""
    if duration_s < 60:
        return f"{duration_s:.1f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
