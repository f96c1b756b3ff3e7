"""``Summary``: the table at the end of a run, with its end, speed, metrics and failures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eventtrain.bus.subscription import SubscriptionStatistics
from eventtrain.control.loop_statistics import LoopStatistics
from eventtrain.errors import printable
from eventtrain.events import CheckpointCommitted, CheckpointFailed, EpochCompleted
from eventtrain.events.models import Number
from eventtrain.subscribers._shared.display_text import duration_text
from eventtrain.subscribers.progress.text import compact

MOST_METRICS = 20
"""Rows of the table of metrics; more are counted."""
HEAD = ("metric", "last", "lowest", "highest")
NARROW = 60
"""Consoles with fewer columns do not show in which epoch a value was the lowest or highest."""


@dataclass
class _Metric:
    last: Number
    lowest: tuple[Number, int]
    highest: tuple[Number, int]


@dataclass
class Summary:
    """Facts of a run so far. On the bus' event loop."""

    epochs: int = 0
    committed: int = 0
    last_checkpoint: int | None = None
    failed_checkpoints: int = 0
    ended: str = ""
    """Why the run ended."""
    failed: bool = False
    _metrics: dict[str, _Metric] = field(default_factory=dict[str, _Metric])

    def note_epoch(self, event: EpochCompleted) -> None:
        """Adds the means of an epoch."""
        self.epochs += 1
        number = event.epoch + 1
        for name, value in event.metrics.items():
            known = self._metrics.setdefault(name, _Metric(value, (value, number), (value, number)))
            known.last = value
            if value < known.lowest[0] or math.isnan(known.lowest[0]):
                known.lowest = (value, number)
            if value > known.highest[0] or math.isnan(known.highest[0]):
                known.highest = (value, number)

    def note_checkpoint(self, event: CheckpointCommitted | CheckpointFailed) -> None:
        """Counts a checkpoint."""
        if isinstance(event, CheckpointFailed):
            self.failed_checkpoints += 1
        else:
            self.committed += 1
            self.last_checkpoint = event.step

    def facts(
        self, loop: LoopStatistics, subscribers: Iterable[SubscriptionStatistics]
    ) -> list[tuple[str, str, str]]:
        """Returns the name, the text and the colour of each fact about the run."""
        rate = (
            f", {compact(loop.steps / loop.duration_s)} steps/s in all"
            if loop.steps and loop.duration_s
            else ""
        )
        now = f" ({loop.steps} of them now)" if loop.steps < loop.step else ""
        facts = [
            ("ended", printable(self.ended), "red" if self.failed else "green"),
            ("steps", f"{loop.step}{now}", "none"),
            ("epochs", str(self.epochs), "none"),
            ("duration", f"{duration_text(loop.duration_s)}{rate}", "none"),
        ]
        if self.committed or self.failed_checkpoints:
            facts.append(("checkpoints", self._checkpoints(), "red" if self.failed_checkpoints else "none"))
        faults = [(one.name, text) for one in subscribers if (text := _faults(one))]
        return [*facts, *(("subscriber", f"{printable(name)}: {text}", "yellow") for name, text in faults)]

    def rows(self, names: Iterable[str] | None = None) -> list[tuple[str, str, str, str]]:
        """Returns name, last, lowest and highest value of the metrics ``names``, or of all."""
        shown = [name for name in (self._metrics if names is None else names) if name in self._metrics]
        metrics = [(name, self._metrics[name]) for name in shown]
        return [(name, f"{one.last:.4g}", _at(*one.lowest), _at(*one.highest)) for name, one in metrics]

    def table(
        self,
        loop: LoopStatistics,
        subscribers: Iterable[SubscriptionStatistics],
        names: Iterable[str] | None = None,
        *,
        width: int,
    ) -> RenderableType:
        """Returns the table, with the metrics ``names`` or all, for a console of ``width`` columns."""
        facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column(overflow="fold")
        for name, text, style in self.facts(loop, subscribers):
            facts.add_row(name, Text(text, style=style))
        rows = self.rows(names)
        return Group(facts, _metrics_table(rows, epochs=width >= NARROW)) if rows else facts

    def _checkpoints(self) -> str:
        last = "" if self.last_checkpoint is None else f", the last of step {self.last_checkpoint}"
        failed = f", {self.failed_checkpoints} failed" if self.failed_checkpoints else ""
        return f"{self.committed} committed{last}{failed}"


def _metrics_table(rows: Sequence[tuple[str, str, str, str]], *, epochs: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric", overflow="fold", min_width=8)  # else long values leave no room for it
    for heading in HEAD[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, last, *best in rows[:MOST_METRICS]:
        parts = [value.partition("  ") for value in best]
        texts = [
            Text.assemble(value, (gap + epoch, "dim")) if epochs else value for value, gap, epoch in parts
        ]
        table.add_row(Text(printable(name)), last, *texts)
    more = len(rows) - MOST_METRICS
    if more > 0:
        table.add_row(Text(f"{more} more", style="dim"))
    return table


def _at(value: Number, epoch: int) -> str:
    return f"{value:.4g}  epoch {epoch}"


def _faults(subscriber: SubscriptionStatistics) -> str:
    parts = [
        f"{subscriber.errors} failures" if subscriber.errors else "",
        f"{subscriber.dropped} events dropped" if subscriber.dropped and subscriber.errors else "",
        "disabled" if subscriber.state == "disabled" else "",
    ]
    return ", ".join(filter(None, parts))
