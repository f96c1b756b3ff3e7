"""``TensorBoardLogger``: curves, histograms, images and text in TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.to_thread
from pydantic import Field

from eventtrain.control.snapshots import KeptSnapshot
from eventtrain.errors import ConfigurationError
from eventtrain.events import (
    CommandRejected,
    EpochCompleted,
    EpochStarted,
    Event,
    RunResumed,
    RunStarted,
    SnapshotTaken,
    StepsCompleted,
)
from eventtrain.subscribers._shared.paths import file_path
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.step_table import due_steps
from eventtrain.subscribers._shared.validation import require_count, require_number
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.trackers import tensorboard_file as event_file
from eventtrain.subscribers.trackers.curves import TrackedCurves
from eventtrain.subscribers.trackers.histograms import TrackedArrays
from eventtrain.subscribers.trackers.hyperparam_curve import HyperparamCurveState
from eventtrain.subscribers.trackers.recorded_values import Record, check_record
from eventtrain.subscribers.trackers.tensorboard_file import OWN_NAME, EventFile
from eventtrain.subscribers.trackers.tracker_thread import TrackerStatistics, TrackerThread

try:
    from eventtrain.subscribers.trackers import tensorboard_records as tensorboard_events
except ModuleNotFoundError:
    tensorboard_events = None

WATCHED = (*TrackedCurves.events, RunResumed, SnapshotTaken, CommandRejected)
SETTLE_S = 10.0
"""How long a checkpoint waits for rows to be written."""


class TensorBoardLoggerState(SavedState):
    """What survives a restart."""

    version: Literal[1] = 1
    directory: str
    file: str = Field(pattern=f"^({OWN_NAME.pattern})?$")
    offset: int | None
    """Bytes of the file at the cut; None where not everything was written."""
    curve: HyperparamCurveState
    evaluated_at: int
    hparams_written: bool
    program_written: bool


class TensorBoardLogger(Subscriber):
    """Writes what TensorBoard shows: ``tensorboard --logdir <run_dir>/tensorboard``.

    Args:
        directory: of the event files, relative to ``run_dir``.
        every: only steps that are a multiple of it have a point in the curves ``step/...``.
        hparams: of the run, for the HParams page (numbers, booleans, text), besides those of the optimiser.
        histogram_every, histogram_every_epochs: steps and epochs between two histograms of ``arrays``; None: none.
        arrays: patterns of names of arrays in the state, such as ``params/dense/*`` or ``opt_state/*``; None: the
            params.
        record: event class -> function that returns what to record of such an event, by name: a str is text, a number
            a point of a curve, ``[height, width]`` or ``[height, width, 1, 3 or 4]`` an image (uint8, or floats from 0
            to 1), bytes a PNG file, a figure of matplotlib's an image, a vector a histogram. It is called in the
            logger's thread.
        program: whether to show the jaxpr and the HLO of the compiled step as text.
        flush_interval_s: how often what was written is synced to the disk.
        finish_timeout_s: how long ``stop`` waits for what is not written, within the trainer's ``drain_timeout_s``.

    The curves are ``step/<metric>``, ``epoch/<metric>`` (with ``val_`` those of evaluation), ``eval/<metric>`` and
    ``hyperparams/<name>``, all over the step. A value of ``hyperparams`` stands at the first step computed with it, and
    at the last of each epoch.

    A thread of its own writes; what it has waiting is bounded, and what a full disk costs is said (``TrackerThread``).
    Histograms are made in that thread from a snapshot of the state, of which it asks for one at a time, so they may be
    of a step shortly after the one that was due.

    A run that resumes cuts off what was written after the checkpoint, keeps it beside (``events.out.cut. ...``) and
    writes it again: each curve has each step once, also in a TensorBoard that is open meanwhile. A new run in the same
    directory hides what an earlier one wrote of the same steps.

    Raises:
        ConfigurationError: tensorboardX is missing, or an argument cannot work.
    """

    disable_after = None

    def __init__(
        self,
        directory: str | Path = "tensorboard",
        *,
        every: int = 1,
        hparams: Mapping[str, bool | int | float | str] | None = None,
        histogram_every: int | None = None,
        histogram_every_epochs: int | None = None,
        arrays: tuple[str, ...] | None = None,
        record: Record | None = None,
        program: bool = False,
        flush_interval_s: float = 5.0,
        finish_timeout_s: float = 30.0,
    ) -> None:
        if tensorboard_events is None:
            raise ConfigurationError(
                "TensorBoardLogger needs tensorboardX. Install it: pip install 'eventtrain[tensorboard]'."
            )
        self._make = tensorboard_events
        require_count("TensorBoardLogger", "every", every, at_least=1)
        require_number("TensorBoardLogger", "flush_interval_s", flush_interval_s, above=0)
        require_number("TensorBoardLogger", "finish_timeout_s", finish_timeout_s, at_least=0)
        for name, value in (hparams or {}).items():
            if not isinstance(value, (bool, int, float, str)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigurationError(
                    f"TensorBoardLogger(hparams={{{name!r}: {value!r}}}): needs a number, a boolean or text."
                )
        self._directory = file_path(directory, "TensorBoardLogger")
        self._every = every
        self._hparams = dict(hparams or {})
        self._arrays = TrackedArrays("TensorBoardLogger", histogram_every, histogram_every_epochs, arrays)
        self._record = check_record("TensorBoardLogger", record)
        self._flush_interval_s = flush_interval_s
        self._finish_timeout_s = finish_timeout_s
        self.events = (*WATCHED, *self._record)
        self._curves = TrackedCurves()
        self._started_with: dict[str, float] = {}
        self._hparams_written = False
        self._program_written = not program
        self._run: RunContext | None = None
        self._file: EventFile | None = None
        self._thread: TrackerThread | None = None
        self._offset: int | None = None
        self._saved: TensorBoardLoggerState | None = None

    @property
    def statistics(self) -> TrackerStatistics:
        """What became of the rows of this run, or the last one."""
        return self._thread.statistics if self._thread is not None else TrackerStatistics()

    async def start(self, run: RunContext) -> None:
        """Open a new file, take away what the run repeats, start the thread. Raises OSError where that cannot be."""
        folder = run.run_dir / self._directory
        saved, self._saved = self._saved, None
        if saved is not None and saved.directory != str(self._directory):
            saved = None
        self._file = await anyio.to_thread.run_sync(
            _opened, folder, saved, run.restarts, limiter=anyio.CapacityLimiter(1)
        )
        name = self.name or "TensorBoardLogger"
        self._thread = TrackerThread(
            name,
            run.publish,
            target=str(folder),
            flush=self._file.sync,
            flush_interval_s=self._flush_interval_s,
        )
        self._run = run
        self._arrays.start(run, name)
        self._thread.start()

    async def handle(self, event: Event) -> None:
        """Have it written; returns at once."""
        for point in self._curves.points(event):
            self._add(event, partial(self._make.numbers, event, point.step, point.named()))
        if isinstance(event, StepsCompleted):
            self._on_steps(event)
        elif isinstance(event, EpochStarted):
            self._started_with = self._started_with or dict(event.hyperparams)
        elif isinstance(event, EpochCompleted):
            self._on_epoch(event)
        elif isinstance(event, (RunStarted, RunResumed)):
            self._arrays.done()  # of an attempt before
            self._add(event, partial(self._make.beginning, event), rows=0)
        elif isinstance(event, SnapshotTaken):
            self._on_snapshot(event)
        elif isinstance(event, CommandRejected):
            self._arrays.rejected(event)
        if isinstance(event, tuple(self._record)):
            self._add(event, partial(self._make.recorded_of, event, self._record))

    async def stop(self) -> None:
        """Wait for what is not written. Raises SubscriberError where that takes too long."""
        thread = self._thread
        try:
            if thread is not None and thread.is_alive():
                await thread.aclose(self._finish_timeout_s)
        finally:
            self._arrays.done()

    async def flush(self) -> None:
        """Have the disk hold everything so far; a disk that is full or slow holds no checkpoint up."""
        self._offset = None
        if self._thread is not None and self._file is not None and await self._thread.settle(SETTLE_S):
            self._offset = self._file.size_bytes

    def state_dict(self) -> dict[str, Any]:
        """Where the file ended at the last ``flush``, as plain JSON data."""
        return TensorBoardLoggerState(
            directory=str(self._directory),
            file=self._file.path.name if self._file is not None else "",
            offset=self._offset,
            curve=self._curves.state,
            evaluated_at=self._curves.evaluated_at,
            hparams_written=self._hparams_written,
            program_written=self._program_written,
        ).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """At the next ``start``, cut the files where they ended.

        Raises:
            StateError: another version, or broken.
        """
        self._saved = saved = TensorBoardLoggerState.parse(self.name or "TensorBoardLogger", state)
        self._curves.restore(saved.curve, saved.evaluated_at)
        self._hparams_written, self._program_written = saved.hparams_written, saved.program_written

    # --- of each kind of event ----------------------------------------------------------------------------------

    def _on_steps(self, event: StepsCompleted) -> None:
        if rows := len(due_steps(event, self._every)):
            self._add(event, partial(self._make.steps, event, self._every), rows=rows)
        self._arrays.steps(event)
        program = self._run.program() if self._run is not None and not self._program_written else None
        if program is not None:
            self._program_written = True
            self._add(event, partial(self._make.program, event, program))

    def _on_epoch(self, event: EpochCompleted) -> None:
        if not self._hparams_written:
            self._hparams_written = True
            values = {**(self._started_with or event.hyperparams), **self._hparams}
            self._add(event, partial(self._make.hparams, event, values))
        self._arrays.epoch(event)

    def _on_snapshot(self, event: SnapshotTaken) -> None:
        snapshot = self._arrays.taken(event)
        if snapshot is not None and not self._add(event, partial(self._histograms, event, snapshot)):
            self._arrays.done(snapshot)

    def _histograms(self, event: SnapshotTaken, snapshot: KeptSnapshot) -> Iterable[bytes]:
        step = snapshot.step
        return self._make.histograms(event, step, self._arrays.read(snapshot))

    # --- into the thread ----------------------------------------------------------------------------------------

    def _add(self, event: Event, made: Callable[[], Iterable[bytes]], *, rows: int = 1) -> bool:
        thread, file = self._thread, self._file
        if thread is None or file is None:
            return False
        kept: list[bytes] = []

        def write() -> None:
            if not kept:  # at the first of perhaps several tries
                kept.extend(made())
            file.append(kept)

        return thread.add(write, step=event.step, event_kind=event.kind, rows=rows)


def _opened(folder: Path, saved: TensorBoardLoggerState | None, restarts: bool) -> EventFile:
    if restarts:
        event_file.cut(folder, "", None)
    elif saved is not None:
        event_file.cut(folder, saved.file, saved.offset)
    return event_file.new_event_file(folder)
