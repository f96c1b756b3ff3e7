"""``ProgressBar``: progress of a run on a terminal or in a notebook. Never drawn on the event loop's thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import monotonic

import anyio
import anyio.to_thread
from rich.console import Console

from eventtrain.bus.queues import KeepLatest
from eventtrain.errors import printable
from eventtrain.events import (
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointStarted,
    EpochCompleted,
    EpochStarted,
    Event,
    RunCompleted,
    RunFailed,
    StepsCompleted,
)
from eventtrain.events.models import Number
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.progress.display import RunDisplay, can_redraw
from eventtrain.subscribers.progress.notebook import NotebookDisplay, notebook_publisher
from eventtrain.subscribers.progress.summary_table import Summary
from eventtrain.subscribers.progress.text import Shown, compact, texts
from eventtrain.validation.annotations import checked

Display = RunDisplay | NotebookDisplay

BEHIND_S = 1.0
"""A subscriber whose oldest unhandled event is older is behind."""
LOOK_S = 0.5
"""Seconds between two looks at the subscribers."""


class ProgressBar(Subscriber):
    """A bar with epoch, steps, speed and the time left, the newest metrics, and a table when the run has ended.

    Below the bar are the newest metrics, as many as fit, then the hyperparameters, the newest checkpoint and the
    subscribers that are more than a second behind. Each finished epoch leaves a line. Where nothing can be redrawn (a
    pipe, a CI's log), there are only those lines. In a notebook the bar has small curves of the metrics, and the lines
    are below it.

    It gets only the newest window of steps (``KeepLatest``) and draws in a thread of its own, so a terminal that takes
    nothing (Ctrl-S) delays neither training nor other subscribers.

    Args:
        metrics: names to show; None: all.
        hyperparams: names to show.
        every_epochs: a line for every this many epochs.
        table: whether a table follows the run; None: if there was a bar.
        console: a ``rich.console.Console``; None: standard error, or the output of a notebook's cell.
    """

    events = (
        *(StepsCompleted, EpochStarted, EpochCompleted, RunCompleted, RunFailed),
        *(CheckpointStarted, CheckpointCommitted, CheckpointFailed),
    )
    queue = KeepLatest()

    @checked
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
        self._display: Display | None = None
        self._run: RunContext | None = None
        self._limiter: anyio.CapacityLimiter | None = None
        self._summary = Summary()
        self._newest: dict[str, Number] = {}
        self._checkpoint = ""
        self._behind = ""
        self._looked_s = 0.0

    async def start(self, run: RunContext) -> None:
        """Draws the empty bar."""
        self._run = run
        # One line at a time, independent of threads that others block.
        self._limiter = anyio.CapacityLimiter(1)
        self._summary, self._newest, self._checkpoint, self._behind = Summary(), {}, "", ""
        publisher = notebook_publisher() if self._console is None else None
        if publisher is not None:
            self._display = NotebookDisplay(publisher, run.total_steps, self._metrics)
        else:
            console = self._console or Console(stderr=True)
            live = can_redraw(console, given=self._console is not None)
            self._display = RunDisplay(console, run.total_steps, live=live)
        await self._in_thread(self._display.start)

    async def stop(self) -> None:
        """Removes the bar, and prints the table."""
        if self._display is None or self._run is None:
            return
        await self._in_thread(self._display.stop)
        if self._summary.ended and (not self._display.disable if self._table is None else self._table):
            loop, subscribers = self._run.loop_statistics(), self._run.statistics().values()
            table = partial(self._display.print_table, self._summary, loop, subscribers, self._metrics)
            await self._in_thread(table)

    async def handle(self, event: Event) -> None:
        """Updates the bar, and prints the lines that stay."""
        run, display, summary = self._run, self._display, self._summary
        if run is None or display is None:
            return
        match event:
            case StepsCompleted():
                names = event.metrics if self._metrics is None else self._metrics
                self._newest = {
                    name: event.metrics[name][-1].item() for name in names if name in event.metrics
                }
                if monotonic() >= self._looked_s + LOOK_S:
                    self._looked_s = monotonic()
                    self._behind = _behind(run)
                display.draw_steps(event)
                display.advance_to(event.last_step - run.start_step)
                self._show(run, display)
            case EpochStarted():
                display.epoch(event.epoch + 1, None if run.epochs is None else run.start_epoch + run.epochs)
            case EpochCompleted():
                summary.note_epoch(event)
                display.draw_epoch(event)
                if run.epochs is not None:
                    display.expect(run.epochs * event.steps)
                if event.is_multiple_of(self._every_epochs):
                    metrics, rates = texts(event.metrics, self._metrics), self._rates(event.hyperparams)
                    last = [*rates, f"({event.duration_s:.2f} s)"]
                    await self._print(display, f"epoch {event.epoch + 1}: ", metrics, last)
            case CheckpointStarted():
                self._checkpoint = f"checkpoint {event.step} ..."
                self._show(run, display)
            case CheckpointCommitted():
                summary.note_checkpoint(event)
                self._checkpoint = f"checkpoint {event.step}"
                self._show(run, display)
            case CheckpointFailed():
                summary.note_checkpoint(event)
                self._checkpoint = f"checkpoint {event.step} FAILED"
                self._show(run, display)
                await self._print(display, f"checkpoint of step {event.step} failed: {event.error}")
            case RunCompleted():
                summary.ended = event.reason
                await self._print(display, f"run completed at step {event.step}: {event.reason}")
            case RunFailed():
                summary.ended, summary.failed = event.error, True
                await self._print(display, f"run failed at step {event.step}: {event.error}")
            case _:
                pass

    def _show(self, run: RunContext, display: Display) -> None:
        state = [*self._rates(run.control.hyperparams), self._checkpoint, self._behind]
        display.show(Shown(self._newest, tuple(text for text in state if text)))

    def _rates(self, values: Mapping[str, Number]) -> list[str]:
        return [f"{printable(name)}={values[name]:.3g}" for name in self._hyperparams if name in values]

    async def _print(
        self, display: Display, line: str, parts: Sequence[str] = (), last: Sequence[str] = ()
    ) -> None:
        write = partial(display.print_line, printable(line), parts, last)
        if display.print_blocks:
            await self._in_thread(write)
        else:
            write()

    async def _in_thread(self, write: Callable[[], None]) -> None:
        await anyio.to_thread.run_sync(write, abandon_on_cancel=True, limiter=self._limiter)


def _behind(run: RunContext) -> str:
    late = [one for one in run.statistics().values() if one.pending and one.lag_s > BEHIND_S]
    if not late:
        return ""
    worst = max(late, key=lambda one: one.lag_s)
    more = f" +{len(late) - 1}" if len(late) > 1 else ""
    events = f"{compact(worst.pending)} events" if worst.pending > 1 else "1 event"
    return f"behind: {printable(worst.name)}{more} ({worst.lag_s:.0f} s, {events})"
