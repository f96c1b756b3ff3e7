"""``ProgressBar``: what a person at a terminal sees of a run. Drawn with rich, and never by the event loop's thread."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial

import anyio
import anyio.to_thread
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from eventtrain.bus.queues import KeepLatest
from eventtrain.events import EpochCompleted, EpochStarted, RunCompleted, RunFailed, StepsCompleted
from eventtrain.frozen import Number
from eventtrain.subscriber import RunContext, Subscriber


def shows_progress() -> bool:
    """Whether somebody is likely to look: standard error is a terminal, or this is a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class ProgressBar(Subscriber):
    """A bar with epoch, steps, the latest metrics and the time left; one line per finished epoch.

    It sees only the newest window of steps (``KeepLatest``), so it never holds anything up. Where the console is no
    terminal, the lines of the epochs are all there is. A terminal that takes nothing (Ctrl-S) delays nobody else.

    Args:
        metrics: names to show; all if None.
        hyperparams: names to show.
        every_epochs: a line for each so many epochs.
        console: a ``rich.console.Console``; standard error if None.
    """

    queue = KeepLatest()

    def __init__(
        self,
        metrics: tuple[str, ...] | None = None,
        *,
        hyperparams: tuple[str, ...] = ("learning_rate",),
        every_epochs: int = 1,
        console: Console | None = None,
    ) -> None:
        self._metrics = metrics
        self._hyperparams = hyperparams
        self._every_epochs = every_epochs
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._run: RunContext | None = None
        self._limiter: anyio.CapacityLimiter | None = None

    async def start(self, run: RunContext) -> None:
        """Draw the empty bar."""
        self._run = run
        self._limiter = anyio.CapacityLimiter(1)  # one line at a time, and none of anybody else's threads
        total = run.steps
        if total is None and run.epochs is not None and run.steps_per_epoch is not None:
            total = run.epochs * run.steps_per_epoch
        console = self._console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (console.is_terminal or console.is_jupyter),
        )
        self._task = self._progress.add_task("starting", total=total, shown="")
        await self._in_thread(self._progress.start)

    async def stop(self) -> None:
        """Take the bar away; the lines of the epochs stay."""
        if self._progress is not None:
            await self._in_thread(self._progress.stop)

    async def on_epoch_started(self, event: EpochStarted) -> None:
        """Name the epoch."""
        if self._progress is not None and self._task is not None:
            of = f"/{self._run.epochs}" if self._run is not None and self._run.epochs else ""
            self._progress.update(self._task, description=f"epoch {event.epoch + 1}{of}")

    async def on_steps_completed(self, event: StepsCompleted) -> None:
        """Advance the bar and show the newest values."""
        if self._progress is not None and self._task is not None and self._run is not None:
            newest: dict[str, Number] = {name: column[-1].item() for name, column in event.metrics.items()}
            self._progress.update(
                self._task, completed=event.last_step - self._run.start_step, shown=self._text(newest)
            )

    async def on_epoch_completed(self, event: EpochCompleted) -> None:
        """Leave a line with the epoch's means."""
        if not event.is_multiple_of(self._every_epochs):
            return
        rates = "".join(
            f" {n}={event.hyperparams[n]:.3g}" for n in self._hyperparams if n in event.hyperparams
        )
        await self._print(
            f"epoch {event.epoch + 1}: {self._text(event.metrics)}{rates} ({event.duration_s:.2f} s)"
        )

    async def on_run_completed(self, event: RunCompleted) -> None:
        """Say how it ended."""
        await self._print(f"run completed at step {event.step}: {event.reason}")

    async def on_run_failed(self, event: RunFailed) -> None:
        """Say how it ended."""
        await self._print(f"run failed at step {event.step}: {event.error}")

    async def _print(self, line: str) -> None:
        if self._progress is not None:
            # soft_wrap: a line is a line also where the console is a pipe of 80 columns.
            await self._in_thread(
                partial(self._progress.console.print, line, markup=False, highlight=False, soft_wrap=True)
            )

    async def _in_thread(self, write: Callable[[], None]) -> None:
        await anyio.to_thread.run_sync(write, abandon_on_cancel=True, limiter=self._limiter)

    def _text(self, metrics: Mapping[str, Number]) -> str:
        shown = self._metrics if self._metrics is not None else tuple(metrics)
        return " ".join(f"{name}={metrics[name]:.4g}" for name in shown if name in metrics)
