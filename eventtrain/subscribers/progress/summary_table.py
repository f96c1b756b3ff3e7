"""``Summary``: the table at the end of a run, with its end, speed, metrics and failures."""

from __future__ import annotations

import math
from collections.abc import Iterable
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
from eventtrain.subscribers.progress.display import compact

MOST_METRICS = 20
"""Rows of the table of metrics; more are counted."""
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
        rate = (
            f", {compact(loop.steps / loop.duration_s)} steps/s in all"
            if loop.steps and loop.duration_s
            else ""
        )
        now = f" ({loop.steps} of them now)" if loop.steps < loop.step else ""
        facts.add_row("ended", Text(printable(self.ended), style="red" if self.failed else "green"))
        facts.add_row("steps", f"{loop.step}{now}")
        facts.add_row("epochs", str(self.epochs))
        facts.add_row("duration", f"{_duration(loop.duration_s)}{rate}")
        if self.committed or self.failed_checkpoints:
            facts.add_row("checkpoints", self._checkpoints())
        for one in subscribers:
            if faults := _faults(one):
                facts.add_row("subscriber", Text(f"{printable(one.name)}: {faults}", style="yellow"))
        shown = [name for name in (self._metrics if names is None else names) if name in self._metrics]
        return Group(facts, self._metrics_table(shown, epochs=width >= NARROW)) if shown else facts

    def _checkpoints(self) -> Text:
        text = Text(f"{self.committed} committed")
        if self.last_checkpoint is not None:
            text.append(f", the last of step {self.last_checkpoint}")
        if self.failed_checkpoints:
            text.append(f", {self.failed_checkpoints} failed", style="red")
        return text

    def _metrics_table(self, names: list[str], *, epochs: bool) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("metric", overflow="fold", min_width=8)  # else long values leave no room for it
        for heading in ("last", "lowest", "highest"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name in names[:MOST_METRICS]:
            metric = self._metrics[name]
            best = [_at(*found) if epochs else f"{found[0]:.4g}" for found in (metric.lowest, metric.highest)]
            table.add_row(Text(printable(name)), f"{metric.last:.4g}", *best)
        more = len(names) - MOST_METRICS
        if more > 0:
            table.add_row(Text(f"{more} more", style="dim"))
        return table


def _at(value: Number, epoch: int) -> Text:
    return Text.assemble(f"{value:.4g}", (f"  epoch {epoch}", "dim"))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _faults(subscriber: SubscriptionStatistics) -> str:
    parts = [
        f"{subscriber.errors} failures" if subscriber.errors else "",
        f"{subscriber.dropped} events dropped" if subscriber.dropped and subscriber.errors else "",
        "disabled" if subscriber.state == "disabled" else "",
    ]
    return ", ".join(filter(None, parts))
