"""``MediaTracker``: base of the trackers that take curves, histograms, images and text."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Protocol

import numpy as np

from eventtrain.control.run_context import StepProgram
from eventtrain.errors import ConfigurationError, StorageError
from eventtrain.events import EpochCompleted, EvalCompleted, Event, RunFailed, SampleTaken, StepsCompleted
from eventtrain.subscribers._shared.display_text import table_text
from eventtrain.subscribers._shared.images import is_image, pixels
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.trackers.curves import Points, TrackedCurves
from eventtrain.subscribers.trackers.histograms import Array, HistogramSnapshots
from eventtrain.subscribers.trackers.tracker import Tracker
from eventtrain.validation.arguments import require_count

Record = Mapping[type[Event], Callable[[Any], Mapping[str, Any]]]
"""Event class -> function that returns what to record of such an event, by name."""

SMALLEST_IMAGE = 256
"""Pixels; a smaller matrix is enlarged."""


@dataclass
class RecordedValues:
    """Values by name. Images are uint8[height, width, 1, 3 or 4], or PNG files; arrays become histograms."""

    numbers: dict[str, float] = field(default_factory=dict[str, float])
    texts: dict[str, str] = field(default_factory=dict[str, str])
    images: dict[str, Array | bytes] = field(default_factory=dict[str, "Array | bytes"])
    arrays: dict[str, Array] = field(default_factory=dict[str, Array])

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RecordedValues:
        """Sorts values by what they are.

        A str is text; a number is a point of a curve; a vector is a histogram; a matrix, or an array of 3 dimensions
        whose last has 1, 3 or 4 entries, is an image (floats from 0 to 1); bytes are a PNG file; a figure of
        matplotlib is an image.

        Raises:
            StorageError: a value is none of these; the message names it.
        """
        found = cls()
        for name, value in values.items():
            if isinstance(value, str):
                found.texts[name] = value
            elif isinstance(value, bytes):
                found.images[name] = value
            elif hasattr(value, "savefig"):
                buffer = io.BytesIO()
                value.savefig(buffer, format="png")
                found.images[name] = buffer.getvalue()
            else:
                found._add_array(name, np.asarray(value))
        return found

    def _add_array(self, name: str, array: Array) -> None:
        if array.dtype.kind not in "biuf":
            raise StorageError(
                f"{name!r} cannot be recorded: expected a number, text, image or vector, got "
                f"{array.dtype.name}{list(array.shape)}"
            )
        if array.ndim == 0:
            self.numbers[name] = float(array)
        elif array.ndim == 1:
            self.arrays[name] = array
        elif is_image(array):
            self.images[name] = pixels(array)
        else:
            raise StorageError(
                f"{name!r} cannot be recorded: an image is [height, width] or [height, width, 1, 3 or 4], not "
                f"{list(array.shape)}"
            )


class MediaTarget(Protocol):
    """The tracker's side. Methods are called in the thread; they block, may be repeated, and raise StorageError."""

    def log_histograms(self, event: Event, step: int, arrays: Mapping[str, Array]) -> None:
        """Logs the arrays of the state after ``step``, by name."""

    def log_recorded(self, event: Event, values: RecordedValues) -> None:
        """Logs the values that the user's functions returned for ``event``."""

    def log_program(self, event: StepsCompleted, program: StepProgram) -> None:
        """Logs the compiled step."""


class MediaTracker(Tracker):
    """Abstract. A subclass calls ``_begin`` in ``start``, and logs steps and points in ``_log``.

    Arguments are as of ``TensorBoardLogger``.
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
        for kind, function in (record or {}).items():
            if not (isinstance(kind, type) and issubclass(kind, Event)) or not callable(function):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigurationError(
                    f"{owner}(record={{{kind!r}: {function!r}}}): record must map event classes to functions that take "
                    "such an event and return a dict of values by name."
                )
        self._record: dict[type[Event], Callable[[Any], Mapping[str, Any]]] = {
            SampleTaken: _sampled,
            **(record or {}),
        }
        self._curves = TrackedCurves()
        self.events = (*TrackedCurves.events, *HistogramSnapshots.events, RunFailed, *self._record)
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
        run, target = self._run, self._target
        if run is None or target is None:
            return
        self._log(event, self._curves.points(event))
        if isinstance(event, StepsCompleted) and self._program and not self._program_written:
            program = run.program()
            if program is not None:
                self._program_written = True
                self._add(event, partial(target.log_program, event, program))
        snapshot = self._histograms.handle(event)
        if snapshot is not None:
            arrays = cache(partial(self._histograms.read, snapshot))
            if not self._add(event, lambda: target.log_histograms(event, snapshot.step, arrays())):
                self._histograms.release(snapshot)
        if isinstance(event, (EvalCompleted, EpochCompleted)) and event.arrays:
            group = "eval" if isinstance(event, EvalCompleted) else "epoch"
            self._add(event, partial(target.log_recorded, event, computed_arrays(group, event.arrays)))
        if isinstance(event, tuple(self._record)):
            values = cache(partial(self._recorded, event))  # called once, however often it is written
            self._add(event, lambda: target.log_recorded(event, values()))

    async def stop(self) -> None:
        """Waits for rows that are not written, and releases snapshots; raises as ``Tracker.stop``."""
        try:
            await super().stop()
        finally:
            self._histograms.release()

    def _recorded(self, event: Event) -> RecordedValues:
        values: dict[str, Any] = {}
        for kind, function in self._record.items():
            if isinstance(event, kind):
                try:
                    values.update(function(event))
                except Exception as error:
                    raise StorageError(
                        f"record[{kind.__name__}] raised {type(error).__name__}: {error}"
                    ) from error
        return RecordedValues.of(values)


def computed_arrays(group: str, arrays: Mapping[str, Array]) -> RecordedValues:
    """Returns arrays of metrics for a tracker: vectors as histograms, matrices as images; others are not shown."""
    found = RecordedValues()
    for name, array in arrays.items():
        if array.ndim == 1:
            found.arrays[f"{group}/{name}"] = array
        elif array.ndim == 2 and array.size:
            found.images[f"{group}/{name}"] = _shades(array)
    return found


def _shades(matrix: Array) -> Array:
    """Returns a matrix as shades of grey, from black at its lowest value to white at its highest."""
    with np.errstate(invalid="ignore", over="ignore"):
        values = matrix.astype(np.float64)
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
        shades = pixels((np.clip(values, low, high) - low)[:, :, None] / ((high - low) or 1.0))
    size = max(1, SMALLEST_IMAGE // max(matrix.shape))  # a cell of one pixel could not be seen
    return shades.repeat(size, axis=0).repeat(size, axis=1)


def _sampled(event: SampleTaken) -> dict[str, Any]:
    """Returns what to record of a sample: tables as text, and arrays as histograms."""
    value = event.value
    if event.media == "table":
        value = table_text(value)
    elif event.media == "array" and value.ndim > 1:
        value = value.ravel()
    return {f"samples/{event.name}": value}
