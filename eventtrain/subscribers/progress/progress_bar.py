"""``ProgressBar``: what a person at a terminal sees of a run. Drawn with rich, and never by the event loop's thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import monotonic

import anyio
import anyio.to_thread
from rich.cells import cell_len
from rich.console import Console

from eventtrain.bus.queues import KeepLatest
from eventtrain.events import (
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointStarted,
    EpochCompleted,
    EpochStarted,
    RunCompleted,
    RunFailed,
    StepsCompleted,
)
from eventtrain.events.models import Number
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.progress.display import (
    RunDisplay,
    Shown,
    can_redraw,
    compact,
    fitted,
    printable,
    texts,
)
from eventtrain.subscribers.progress.summary_table import Summary

BEHIND_S = 1.0
"""A subscriber whose oldest unhandled event is older is behind."""
LOOK_S = 0.5
"""How often the subscribers are looked at."""
LINES = 3
"""How many lines of a terminal the metrics of an epoch may take."""


class ProgressBar(Subscriber):
    """A bar with epoch, steps, speed and the time left, what was measured last, and a table when the run has ended.

    Below the bar stand the newest metrics, as many as fit, then the hyperparameters, the newest checkpoint and the
    subscribers that are more than a second behind. Each finished epoch leaves a line. Where nothing can be drawn over
    (a pipe, a CI's log, a notebook without ipywidgets), those lines are all there is.

    It sees only the newest window of steps (``KeepLatest``), so it never holds anything up. A terminal that takes
    nothing (Ctrl-S) delays nobody else.

    Args:
        metrics: names to show; all if None.
        hyperparams: names to show.
        every_epochs: a line for each so many epochs.
        table: whether a table follows the run; if None, where there was a bar.
        console: a ``rich.console.Console``; standard error if None.
    """

    queue = KeepLatest()

    def __init__(
        self,
        metrics: tuple[str, ...] | None = None,
        *,
        hyperparams: tuple[str, ...] = ("learning_rate",),
        every_epochs: int = 1,
        table: bool | None = None,
        console: Console | None = None,
    ) -> None:
        self._metrics = metrics
        self._hyperparams = hyperparams
        self._every_epochs = every_epochs
        self._table = table
        self._console = console
        self._display: RunDisplay | None = None
        self._run: RunContext | None = None
        self._limiter: anyio.CapacityLimiter | None = None
        self._summary = Summary()
        self._newest: dict[str, Number] = {}
        self._checkpoint = ""
        self._behind = ""
        self._looked_s = 0.0

    async def start(self, run: RunContext) -> None:
        """Draw the empty bar."""
        self._run = run
        self._limiter = anyio.CapacityLimiter(1)  # one line at a time, and none of anybody else's threads
        self._summary, self._newest, self._checkpoint, self._behind = Summary(), {}, "", ""
        console = self._console or Console(stderr=True)
        live = can_redraw(console, given=self._console is not None)
        self._display = RunDisplay(console, run.total_steps, live=live)
        await self._in_thread(self._display.start)

    async def stop(self) -> None:
        """Take the bar away; the lines of the epochs stay, and the table follows."""
        if self._display is None or self._run is None:
            return
        await self._in_thread(self._display.stop)
        if self._summary.ended and (not self._display.disable if self._table is None else self._table):
            loop, subscribers = self._run.loop_statistics(), self._run.statistics().values()
            console = self._display.console
            table = self._summary.table(loop, subscribers, self._metrics, width=console.width)
            await self._in_thread(partial(console.print, table))

    async def on_epoch_started(self, event: EpochStarted) -> None:
        """Name the epoch."""
        if self._display is not None and self._run is not None:
            run = self._run
            self._display.epoch(event.epoch + 1, None if run.epochs is None else run.start_epoch + run.epochs)

    async def on_steps_completed(self, event: StepsCompleted) -> None:
        """Advance the bar and show the newest values."""
        if self._display is None or self._run is None:
            return
        names = event.metrics if self._metrics is None else self._metrics
        self._newest = {name: event.metrics[name][-1].item() for name in names if name in event.metrics}
        if monotonic() >= self._looked_s + LOOK_S:
            self._looked_s = monotonic()
            self._behind = self._who_is_behind(self._run)
        self._display.advance_to(event.last_step - self._run.start_step)
        self._show()

    async def on_checkpoint_started(self, event: CheckpointStarted) -> None:
        """Say that one is being written."""
        self._checkpoint = f"checkpoint {event.step} ..."
        self._show()

    async def on_checkpoint_committed(self, event: CheckpointCommitted) -> None:
        """Say of which step the newest one is."""
        self._summary.note_checkpoint(event)
        self._checkpoint = f"checkpoint {event.step}"
        self._show()

    async def on_checkpoint_failed(self, event: CheckpointFailed) -> None:
        """Say so, where it stays to be seen."""
        self._summary.note_checkpoint(event)
        self._checkpoint = f"checkpoint {event.step} FAILED"
        self._show()
        await self._print(f"checkpoint of step {event.step} failed: {event.error}")

    async def on_epoch_completed(self, event: EpochCompleted) -> None:
        """Leave a line with the epoch's means."""
        self._summary.note_epoch(event)
        if self._display is not None and self._run is not None and self._run.epochs is not None:
            self._display.expect(self._run.epochs * event.steps)
        if not event.is_multiple_of(self._every_epochs):
            return
        metrics, rates = texts(event.metrics, self._metrics), self._rates(event.hyperparams)
        await self._print(f"epoch {event.epoch + 1}: ", metrics, [*rates, f"({event.duration_s:.2f} s)"])

    async def on_run_completed(self, event: RunCompleted) -> None:
        """Say how it ended."""
        self._summary.ended = event.reason
        await self._print(f"run completed at step {event.step}: {event.reason}")

    async def on_run_failed(self, event: RunFailed) -> None:
        """Say how it ended."""
        self._summary.ended, self._summary.failed = event.error, True
        await self._print(f"run failed at step {event.step}: {event.error}")

    def _show(self) -> None:
        if self._display is None or self._run is None:
            return
        state = [*self._rates(self._run.control.hyperparams), self._checkpoint, self._behind]
        self._display.shown = Shown(self._newest, tuple(text for text in state if text))

    def _rates(self, values: Mapping[str, Number]) -> list[str]:
        return [f"{printable(name)}={values[name]:.3g}" for name in self._hyperparams if name in values]

    def _who_is_behind(self, run: RunContext) -> str:
        late = [s for s in run.statistics().values() if s.pending and s.lag_s > BEHIND_S]
        if not late:
            return ""
        worst = max(late, key=lambda figures: figures.lag_s)
        more = f" +{len(late) - 1}" if len(late) > 1 else ""
        events = f"{compact(worst.pending)} events" if worst.pending > 1 else "1 event"
        return f"behind: {printable(worst.name)}{more} ({worst.lag_s:.0f} s, {events})"

    async def _print(self, line: str, parts: Sequence[str] = (), last: Sequence[str] = ()) -> None:
        display = self._display
        if display is None:
            return
        if not display.disable:  # else a line is a line, as long as it may be: nobody looks at its end
            width = LINES * display.console.width - sum(cell_len(text) + 1 for text in (line, *last))
            parts = [fitted(parts, width, gap=" ")]
        line = printable(line) + " ".join([*parts, *last])
        # soft_wrap: a line is a line also where the console is a pipe of 80 columns.
        whole = display.disable
        write = partial(display.console.print, line, markup=False, highlight=False, soft_wrap=whole)
        await self._in_thread(write)

    async def _in_thread(self, write: Callable[[], None]) -> None:
        await anyio.to_thread.run_sync(write, abandon_on_cancel=True, limiter=self._limiter)
