"""``ProgressBar``: what a person at a terminal sees of a run. Drawn with rich, on the bus' event loop's time."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eventtrain.bus.queues import KeepLatest
from eventtrain.events import EpochCompleted, EpochStarted, RunCompleted, RunFailed, StepsCompleted
from eventtrain.frozen import Number
from eventtrain.subscriber import RunContext, Subscriber


def shows_progress() -> bool:
    """Whether somebody is likely to look: standard error is a terminal, or this is a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class ProgressBar(Subscriber):
    """A bar with epoch, steps, the latest metrics and the time left; one line per finished epoch.

    It sees only the newest window of steps (``KeepLatest``), so it never holds anything up.

    Args:
        metrics: names to show; all if None.
        console: a ``rich.console.Console``; standard error if None.
    """

    queue = KeepLatest()

    def __init__(self, metrics: tuple[str, ...] | None = None, *, console: Console | None = None) -> None:
        self._metrics = metrics
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._run: RunContext | None = None

    async def start(self, run: RunContext) -> None:
        """Draw the empty bar."""
        self._run = run
        total = run.steps
        if total is None and run.epochs is not None and run.steps_per_epoch is not None:
            total = run.epochs * run.steps_per_epoch
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console or Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=total, shown="")
        self._progress.start()

    async def stop(self) -> None:
        """Take the bar away; the lines of the epochs stay."""
        if self._progress is not None:
            self._progress.stop()

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
        if self._progress is not None:
            rates = " ".join(f"{name}={value:.3g}" for name, value in event.hyperparams.items())
            self._progress.console.print(
                f"epoch {event.epoch + 1}: {self._text(event.metrics)}  {rates}  ({event.duration_s:.2f} s)", highlight=False
            )

    async def on_run_completed(self, event: RunCompleted) -> None:
        """Say how it ended."""
        if self._progress is not None:
            self._progress.console.print(f"run completed at step {event.step}: {event.reason}", highlight=False)

    async def on_run_failed(self, event: RunFailed) -> None:
        """Say how it ended."""
        if self._progress is not None:
            self._progress.console.print(f"run failed at step {event.step}: {event.error}", highlight=False)

    def _text(self, metrics: dict[str, Number]) -> str:
        shown = self._metrics if self._metrics is not None else tuple(metrics)
        return " ".join(f"{name}={metrics[name]:.4g}" for name in shown if name in metrics)
