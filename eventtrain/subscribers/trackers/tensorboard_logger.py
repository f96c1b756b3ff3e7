"""``TensorBoardLogger``: curves, histograms, images and text in TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.to_thread
from pydantic import Field

from eventtrain.errors import ConfigurationError
from eventtrain.events import EpochCompleted, EpochStarted, Event, RunResumed, RunStarted, StepsCompleted
from eventtrain.subscribers._shared.paths import directory_path, require_writable_folder
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.step_table import due_steps
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.trackers.curves import HyperparamCurveState, Points
from eventtrain.subscribers.trackers.media_tracker import MediaTracker, Record
from eventtrain.subscribers.trackers.tensorboard_file import OWN_NAME, EventFile, cut, new_event_file
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_number
from eventtrain.validation.optional_imports import import_optional, require_installed

if TYPE_CHECKING:
    from eventtrain.subscribers.trackers.tensorboard_records import RecordWriter

tensorboard_records = import_optional(
    "eventtrain.subscribers.trackers.tensorboard_records", extra="tensorboard", used_by="TensorBoardLogger"
)


class TensorBoardLoggerState(SavedState):
    """State saved with checkpoints."""

    version: Literal[1] = 1
    directory: str
    file: str = Field(pattern=f"^({OWN_NAME.pattern})?$")
    offset: int | None
    """Size of the file in bytes at the checkpoint; None if not everything was written."""
    curve: HyperparamCurveState
    evaluated_at: int
    hparams_written: bool
    program_written: bool


class TensorBoardLogger(MediaTracker):
    """Writes a run for TensorBoard: ``tensorboard --logdir <run_dir>/tensorboard`` shows it.

    Args:
        directory: of the event files, relative to ``run_dir``.
        every: only steps that are a multiple of it have a point in the curves ``step/...``.
        hparams: of the run, for the HParams page (numbers, booleans, text), besides those of the optimiser.
        histogram_every, histogram_every_epochs: steps and epochs between two histograms of ``arrays``; None: none.
        arrays: patterns of names of arrays in the state, such as ``params/dense/*`` or ``opt_state/*``; None: the
            params.
        record: event class -> function that returns what to record of such an event, by name: a str is text, a number
            a point of a curve, ``[height, width]`` or ``[height, width, 1, 3 or 4]`` an image (uint8, or floats from 0
            to 1), bytes a PNG file, a figure of matplotlib an image, a vector a histogram. It is called in the
            logger's thread.
        program: whether to show the jaxpr and the HLO of the compiled step as text.
        flush_interval_s: how often the file is synced to the disk.
        finish_timeout_s: how long ``stop`` waits for rows that are not written, within the trainer's
            ``drain_timeout_s``.

    The curves are ``step/<metric>``, ``epoch/<metric>`` (those of evaluation with ``val_``), ``eval/<metric>`` and
    ``hyperparams/<name>``, all over the step. A value of ``hyperparams`` is shown at the first step computed with it,
    and at the last of each epoch. The arrays of an evaluation or an epoch are ``eval/<name>``, ``epoch/<name>``:
    vectors as histograms, matrices as images from black (the lowest value) to white.

    A thread of its own writes. Rows that wait for it are bounded; what a full disk costs is reported
    (``TrackerThread``). Histograms are made in that thread from a snapshot of the state. It requests one at a time, so
    they may be of a step shortly after the one that was due.

    A resumed run cuts off what was written after the checkpoint, keeps it in ``events.out.cut. ...`` and writes it
    again: each curve has each step once, also in a TensorBoard that is open meanwhile. A new run in the same directory
    hides what an earlier one wrote of the same steps.

    Raises:
        ConfigurationError: tensorboardX is not installed, or an argument is invalid.
    """

    @checked
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
        require_installed(tensorboard_records)
        super().__init__(
            every=every,
            histogram_every=histogram_every,
            histogram_every_epochs=histogram_every_epochs,
            arrays=arrays,
            record=record,
            program=program,
            finish_timeout_s=finish_timeout_s,
        )
        require_number("TensorBoardLogger", "flush_interval_s", flush_interval_s, above=0)
        for name, value in (hparams or {}).items():
            if not isinstance(value, (bool, int, float, str)):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigurationError(
                    f"TensorBoardLogger(hparams={{{name!r}: {value!r}}}): a value must be a number, a boolean or text."
                )
        self._directory = directory_path(directory, "TensorBoardLogger")
        self.output_paths = (self._directory,)
        self._hparams = dict(hparams or {})
        self._flush_interval_s = flush_interval_s
        self._started_with: dict[str, float] = {}
        self._hparams_written = False
        self._file: EventFile | None = None
        self._writer: RecordWriter | None = None
        self._offset: int | None = None
        self._saved: TensorBoardLoggerState | None = None

    async def start(self, run: RunContext) -> None:
        """Moves away what the run will write again, opens a new file, and starts the thread.

        Raises:
            ConfigurationError: the directory cannot be written.
        """
        folder = run.run_dir / self._directory
        saved, self._saved = self._saved, None
        if saved is not None and saved.directory != str(self._directory):
            saved = None

        def open_file() -> EventFile:
            require_writable_folder(folder, self.name or "TensorBoardLogger")
            if run.restarts:
                cut(folder, "", None)
            elif saved is not None:
                cut(folder, saved.file, saved.offset)
            return new_event_file(folder)

        self._file = await anyio.to_thread.run_sync(open_file, limiter=anyio.CapacityLimiter(1))
        self._writer = writer = tensorboard_records.RecordWriter(self._file)
        self._begin(
            run,
            writer,
            str(folder),
            flush=self._file.sync,
            flush_interval_s=self._flush_interval_s,
        )

    def _log(self, event: Event, points: list[Points]) -> None:
        writer = self._writer
        assert writer is not None
        for point in points:
            self._add(event, partial(writer.log_numbers, event, point.step, point.named()))
        match event:
            case StepsCompleted():
                if rows := len(due_steps(event, self._every)):
                    self._add(event, partial(writer.log_steps, event, self._every), rows=rows)
            case EpochStarted():
                self._started_with = self._started_with or dict(event.hyperparams)
            case EpochCompleted() if not self._hparams_written:
                self._hparams_written = True
                values = {**(self._started_with or event.hyperparams), **self._hparams}
                self._add(event, partial(writer.log_hparams, event, values))
            case RunStarted() | RunResumed():
                self._add(event, partial(writer.begin, event), rows=0)
            case _:
                pass

    async def flush(self) -> None:
        """Waits until everything so far is on the disk; a disk that is full or slow does not delay a checkpoint."""
        self._offset = None
        if self._file is not None and await self._flushed():
            self._offset = self._file.size_bytes

    def state_dict(self) -> dict[str, Any]:
        """Returns where the file ended at the last ``flush``, as plain JSON data."""
        return TensorBoardLoggerState(
            directory=str(self._directory),
            file=self._file.path.name if self._file is not None else "",
            offset=self._offset,
            curve=self._curves.state,
            evaluated_at=self._curves.evaluated_at,
            hparams_written=self._hparams_written,
            program_written=self._program_written or not self._program,
        ).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a saved state: the next ``start`` cuts the files where they ended.

        Raises:
            StateError: the state is of another version, or broken.
        """
        self._saved = saved = TensorBoardLoggerState.parse(self._owner, state)
        self._curves.state, self._curves.evaluated_at = saved.curve, saved.evaluated_at
        self._hparams_written, self._program_written = saved.hparams_written, saved.program_written
