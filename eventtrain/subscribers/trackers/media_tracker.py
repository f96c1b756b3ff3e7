"""``MediaTracker``: base of the trackers that take curves, histograms, images and text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, Protocol

from eventtrain.control.run_context import StepProgram
from eventtrain.events import (
    Event,
    RunFailed,
    StepsCompleted,
)
from eventtrain.subscribers._shared.validation import require_count
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.trackers.curves import Points, TrackedCurves
from eventtrain.subscribers.trackers.histograms import HistogramSnapshots
from eventtrain.subscribers.trackers.recorded_values import (
    Array,
    Record,
    RecordedValues,
    check_record,
    recorded_values,
)
from eventtrain.subscribers.trackers.tracker import Tracker


class MediaTarget(Protocol):
    """The tracker's side. Methods are called in the thread; they block, may be repeated, and raise StorageError."""

    def log_histograms(self, event: Event, step: int, arrays: Mapping[str, Array]) -> None:
        """Logs the arrays of the state after ``step``, by name."""
        ...

    def log_recorded(self, event: Event, values: RecordedValues) -> None:
        """Logs the values that the user's functions returned for ``event``."""
        ...

    def log_program(self, event: StepsCompleted, program: StepProgram) -> None:
        """Logs the compiled step."""
        ...


class MediaTracker(Tracker):
    """Abstract. A subclass calls ``_begin`` in ``start``, and logs steps and points in ``_log``.

    Args:
        every: only steps that are a multiple of it are logged.
        histogram_every, histogram_every_epochs, arrays: as of ``HistogramSnapshots``.
        record: event class -> function that returns what to record of such an event.
        program: whether to log the compiled step.
        finish_timeout_s: as of ``Tracker``.

    Raises:
        ConfigurationError: an argument is invalid.
    """

    def __init__(
        self,
        *,
        every: int,
        histogram_every: int | None,
        histogram_every_epochs: int | None,
        arrays: tuple[str, ...] | None,
        record: Record | None,
        program: bool,
        finish_timeout_s: float,
    ) -> None:
        super().__init__(finish_timeout_s)
        owner = type(self).__name__
        require_count(owner, "every", every, at_least=1)
        self._every = every
        self._histograms = HistogramSnapshots(owner, histogram_every, histogram_every_epochs, arrays)
        self._record = check_record(owner, record)
        self._recorded_types = tuple(self._record)
        self._curves = TrackedCurves()
        self.events = (*TrackedCurves.events, *HistogramSnapshots.events, RunFailed, *self._recorded_types)
        self._program = program
        self._program_written = False
        self._run: RunContext | None = None
        self._target: MediaTarget | None = None

    def _begin(self, run: RunContext, target: MediaTarget, description: str, **options: Any) -> None:
        """Starts the thread that writes ``run`` to ``target``; ``options`` are those of ``_start_thread``."""
        self._run, self._target = run, target
        self._histograms.start(run, self._owner)
        self._start_thread(run, description, **options)

    @abstractmethod
    def _log(self, event: Event, points: list[Points]) -> None:
        """Adds the jobs that log the steps of ``event`` and the points of curves that it made due."""

    async def handle(self, event: Event) -> None:
        """Has the event logged; returns at once."""
        target = self._target
        if target is None:
            return
        self._log(event, self._curves.points(event))
        if (
            isinstance(event, StepsCompleted)
            and self._program
            and not self._program_written
            and self._run is not None
        ):
            program = self._run.program()
            if program is not None:
                self._program_written = True
                self._add(event, partial(target.log_program, event, program))
        snapshot = self._histograms.handle(event)
        if snapshot is not None:
            arrays = cache(partial(self._histograms.read, snapshot))
            if not self._add(event, lambda: target.log_histograms(event, snapshot.step, arrays())):
                self._histograms.release(snapshot)
        if isinstance(event, self._recorded_types):
            values = cache(
                partial(recorded_values, self._record, event)
            )  # called once, however often it is written
            self._add(event, lambda: target.log_recorded(event, values()))

    async def stop(self) -> None:
        """Waits for rows that are not written, and releases snapshots.

        Raises:
            SubscriberError: that took longer than ``finish_timeout_s``.
        """
        try:
            await super().stop()
        finally:
            self._histograms.release()
