"""Commands, paths, sizes and durations as text for people. Pure."""

from __future__ import annotations

from eventtrain.events.commands import Command


def command_text(command: Command) -> str:
    """Returns ``command`` as a call, such as ``scale_hyperparam(name=learning_rate, factor=0.5)``."""
    values = command.model_dump(exclude={"kind", "reason", "cause", "due", "path"})
    shown = ", ".join(
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values.items()
        if value is not None
    )
    return f"{command.kind}({shown})"


def issuer(command: Command) -> str:
    """Returns the subscriber that issued ``command``; empty if none did."""
    return command.cause.subscriber if command.cause is not None else ""


def file_name(path: str) -> str:
    """Returns the last part of a path, which does not identify the machine."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def size_text(size_bytes: int) -> str:
    """1234567 -> "1.2 MB"."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def duration_text(duration_s: float) -> str:
    """3725.2 -> "1 h 2 min 5 s"."""
    if duration_s < 60:
        return f"{duration_s:.1f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count)
