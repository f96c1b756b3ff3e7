"""Numbers and lines of text, as the progress bar shows them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len, set_cell_size

from eventtrain.errors import printable
from eventtrain.events.models import Number


@dataclass(frozen=True)
class Shown:
    """The lines below the bar. Replaced as a whole, since a thread of its own draws them."""

    metrics: Mapping[str, Number] = field(default_factory=dict[str, Number])
    state: tuple[str, ...] = ()
    """Hyperparameters, the newest checkpoint, the subscribers that are behind."""


def texts(numbers: Mapping[str, Number], names: Iterable[str] | None = None) -> list[str]:
    """Returns ``name=value`` of each, or of those of ``names`` that exist; without characters that move a cursor."""
    shown = numbers if names is None else [name for name in names if name in numbers]
    return [f"{printable(name)}={numbers[name]:.4g}" for name in shown]


def fitted(parts: Sequence[str], width: int, gap: str = "  ") -> str:
    """Returns as many whole ``parts`` as fit into ``width`` cells, and the number of the others."""
    line = ""
    for index, part in enumerate(parts):
        longer = f"{line}{gap}{part}" if line else part
        left = len(parts) - index - 1
        if cell_len(longer) + (len(f"{gap}+{left}") if left else 0) > width:
            if line:
                return f"{line}{gap}+{len(parts) - index}"
            return set_cell_size(part, max(0, width - 1)).rstrip() + "…"
        line = longer
    return line


def compact(value: float) -> str:
    """Returns three digits, with k or M for large numbers."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"
