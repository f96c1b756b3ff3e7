"""``PlotCurves``: a picture of a run's metrics, at its end and during it."""

from __future__ import annotations

from collections import deque
from functools import partial
from pathlib import Path
from typing import Any, Literal

from eventtrain.errors import ConfigurationError, SubscriberError
from eventtrain.events import EpochCompleted, Event, RunCompleted, RunFailed, StepsCompleted, SubscriberFailed
from eventtrain.subscribers._shared.atomic_files import write_atomically
from eventtrain.subscribers._shared.paths import file_path, require_writable_file
from eventtrain.subscribers._shared.run_series import COLLECTED, MOST_PANELS, RunSeries
from eventtrain.subscribers._shared.worker_thread import WorkerThread, in_own_thread
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_choice, require_count, require_number
from eventtrain.validation.optional_imports import import_optional, require_installed

plotting = import_optional("eventtrain.subscribers.reports.plotting", extra="plots", used_by="PlotCurves")

SUFFIXES = (".png", ".svg", ".pdf")


class PlotCurves(Subscriber):
    """Draws the metrics of a run, each together with its ``val_`` metric, and the learning rate, with marked changes.

    Args:
        path: relative to ``run_dir``; its suffix determines the format: .png, .svg or .pdf.
        metrics: names of those to draw, in this order; None: all, up to 24.
        every_epochs: also draw after every so many epochs; None: only at the end.
        steps: also draw the values of the steps, behind the means of the epochs.
        hyperparams: names of those to draw below the metrics.
        scale: of the metrics; "auto": logarithmic if all values are positive and the highest is 100 times the lowest.
        theme: "light" or "dark".
        title: above the panels; the run's id if None.
        finish_timeout_s: how long ``stop`` waits for the picture, within the trainer's ``drain_timeout_s``.

    A thread draws, one picture at a time; meanwhile only the newest request waits. It writes the file atomically.
    SubscriberFailed reports a picture that cannot be written, and training continues. Values that are not finite leave
    gaps with a mark. A curve of more than 1,024 points is drawn as its mean in a band from the lowest to the highest
    value, so no spike is hidden, and takes 56 KiB. A run that resumes draws the whole run.

    Raises:
        ConfigurationError: matplotlib is missing, or an argument is invalid.
    """

    disable_after = None  # it draws again when a full disk has room

    @checked
    def __init__(
        self,
        path: str | Path = "curves.png",
        metrics: tuple[str, ...] | None = None,
        *,
        every_epochs: int | None = None,
        steps: bool = True,
        hyperparams: tuple[str, ...] = ("learning_rate",),
        scale: Literal["auto", "linear", "log"] = "auto",
        theme: Literal["light", "dark"] = "light",
        title: str | None = None,
        finish_timeout_s: float = 20.0,
    ) -> None:
        require_installed(plotting)
        require_count("PlotCurves", "every_epochs", every_epochs, at_least=1, optional=True)
        require_choice("PlotCurves", "scale", scale, ("auto", "linear", "log"))
        require_choice("PlotCurves", "theme", theme, ("light", "dark"))
        require_number("PlotCurves", "finish_timeout_s", finish_timeout_s, at_least=0)
        if isinstance(metrics, str) or isinstance(hyperparams, str):
            raise ConfigurationError(
                f"PlotCurves(metrics={metrics!r}, hyperparams={hyperparams!r}): both must be tuples of names, such as "
                "('loss',)."
            )
        self._path = file_path(path, "PlotCurves")
        if self._path.suffix.lower() not in SUFFIXES:
            raise ConfigurationError(
                f"PlotCurves({str(path)!r}): the suffix, which determines the format, must be one of "
                f"{', '.join(SUFFIXES)}."
            )
        self.output_paths = (self._path,)
        self.events = (*COLLECTED, RunCompleted, RunFailed, *((StepsCompleted,) if steps else ()))
        self._every_epochs = every_epochs
        self._hyperparams = tuple(hyperparams)
        self._title = title
        self._finish_timeout_s = finish_timeout_s
        self._render = partial(
            plotting.picture,
            kind=self._path.suffix.lower()[1:],
            colours=plotting.LIGHT if theme == "light" else plotting.DARK,
            scale=scale,
        )
        self._metrics = None if metrics is None else tuple(metrics)
        self._series = RunSeries(metrics=self._metrics)
        self._run: RunContext | None = None
        self._thread: WorkerThread | None = None
        self._due: deque[tuple[RunSeries, str, Event]] = deque(maxlen=1)
        self._end: Event | None = None

    async def start(self, run: RunContext) -> None:
        """Starts the thread that draws. Raises ConfigurationError if the picture cannot be written."""
        owner = self.name or "PlotCurves"
        await in_own_thread(partial(require_writable_file, run.run_dir / self._path, owner))
        if run.restarts:
            self._series = RunSeries(metrics=self._metrics)
        self._run = run
        self._end = None
        self._thread = WorkerThread(owner, run.publish)
        self._thread.start()

    async def handle(self, event: Event) -> None:
        """Adds an event to the curves; has a picture drawn if it is due."""
        if self._thread is None:  # an evaluation outside the run
            return
        if isinstance(event, (RunCompleted, RunFailed)):
            self._end = event
            return
        self._series.add(event)
        if (
            self._every_epochs is not None
            and isinstance(event, EpochCompleted)
            and event.is_multiple_of(self._every_epochs)
        ):
            self._due.append((self._series.copied(), f"so far, at step {event.step:,}", event))
            self._thread.put(self._draw_newest)

    async def stop(self) -> None:
        """Draws the whole run. Raises OSError if it cannot be written, SubscriberError if that takes too long."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._due.clear()
        failures: list[Exception] = []
        thread.put(partial(self._draw_last, self._series.copied(), failures))
        in_time = await thread.finish_within(self._finish_timeout_s)
        if failures:
            raise failures[0]
        if not in_time:
            raise SubscriberError(f"{self._path} was not drawn within {self._finish_timeout_s:g} s.")

    def state_dict(self) -> dict[str, Any]:
        """Returns the curves so far, as plain JSON data."""
        return self._series.to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the curves of a checkpoint. Raises StateError for another version or invalid data."""
        self._series = RunSeries.parse(self.name or "PlotCurves", state)
        self._series.metrics = self._metrics

    def _draw_newest(self) -> None:
        try:
            series, note, event = self._due.popleft()
        except IndexError:  # drawn already, in place of an older one
            return
        try:
            self._write(series, note)
        except Exception as error:
            thread = self._thread
            if thread is None:  # the run ends; if drawing fails again, stop reports it
                return
            thread.publish(
                SubscriberFailed(
                    step=event.step,
                    subscriber=self.name or "PlotCurves",
                    event_kind=event.kind,
                    error=f"{type(error).__name__}: {error}",
                )
            )

    def _draw_last(self, series: RunSeries, failures: list[Exception]) -> None:
        match self._end:
            case RunCompleted(reason=reason, step=step):
                note = f"step {step:,}: {reason}"
            case RunFailed(error=error, step=step):
                note = f"step {step:,}: failed, {error}"
            case _:
                note = "the run ended without an event"
        try:
            self._write(series, note)
        except Exception as error:
            failures.append(error)

    def _write(self, series: RunSeries, note: str) -> None:
        run = self._run
        assert run is not None
        panels = series.panels(self._hyperparams, most=MOST_PANELS)
        more = len(series.metric_names()) - MOST_PANELS
        if self._metrics is None and more > 0:
            note += f"; {more} more metrics are not drawn, name those you want"
        changes = [change for change in series.marked if change.name in self._hyperparams]
        title = run.run_id if self._title is None else self._title
        data = self._render(panels, changes, title=title, note=note)
        write_atomically(run.run_dir / self._path, data)
