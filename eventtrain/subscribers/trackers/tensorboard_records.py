"""``RecordWriter``: a run as records of one of TensorBoard's event files, made with tensorboardX. Blocking.

Names are written as they are: TensorBoard shows separators, quotes, line ends and letters of any script. Only what is
not Unicode (a lone surrogate) is escaped. Numbers become float32, as TensorBoard stores them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import summary
from tensorboardX.proto import event_pb2, summary_pb2

from eventtrain.control.run_context import StepProgram
from eventtrain.errors import StorageError
from eventtrain.events import EpochCompleted, Event, RunResumed, RunStarted, StepsCompleted
from eventtrain.events.models import escape_surrogates
from eventtrain.subscribers._shared.step_table import step_rows
from eventtrain.subscribers.trackers.histograms import Array, bin_edges, finite_values
from eventtrain.subscribers.trackers.media_tracker import RecordedValues
from eventtrain.subscribers.trackers.tensorboard_file import EventFile

# Protobuf makes its classes when it is imported, so no type checker knows them.
Record: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
SessionLog: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]
Summary: Any = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]

PROGRAM_LIMIT = 2**20
"""Characters of the step's jaxpr, or HLO, that are shown; TensorBoard is not an editor."""


class RecordWriter:
    """Writes to one file. Any thread, one at a time; each method may be repeated.

    Each method writes all of its records or none, and raises StorageError if it could not.
    """

    def __init__(self, file: EventFile) -> None:
        self._file = file

    def begin(self, event: RunStarted | RunResumed) -> None:
        """Writes the first records of a file: readers then ignore the steps after ``event`` in other files."""
        time_s = event.time.timestamp()
        start = SessionLog(status=SessionLog.START)
        version = Record(wall_time=time_s, file_version="brain.Event:2")
        session = Record(wall_time=time_s, step=event.step + 1, session_log=start)
        self._file.append([version.SerializeToString(), session.SerializeToString()])

    def log_steps(self, event: StepsCompleted, every: int) -> None:
        """Writes points of the curves ``step/...``."""
        self._file.append(
            numbers(event, step, {f"step/{name}": value for name, value in metrics.items()})
            for step, metrics in step_rows(event, every)
        )

    def log_numbers(self, event: Event, step: int, values: Mapping[str, float]) -> None:
        """Writes one step's points of curves."""
        self._file.append([numbers(event, step, values)])

    def log_histograms(self, event: Event, step: int, arrays: Mapping[str, Array]) -> None:
        """Writes one histogram of each array."""
        self._file.append(
            record
            for name, array in arrays.items()
            for record in histogram(event, step, f"histograms/{name}", array)
        )

    def log_recorded(self, event: Event, values: RecordedValues) -> None:
        """Writes what the user's functions returned for ``event``."""
        self._file.append(_recorded(event, values))

    def log_hparams(self, event: EpochCompleted, values: Mapping[str, Any]) -> None:
        """Writes a row of the HParams page: what the run was started with, and the curves it is judged by."""
        safe = {
            tag(name): escape_surrogates(value) if isinstance(value, str) else value
            for name, value in values.items()
        }
        experiment, session, _ = summary.hparams(safe, {tag(f"epoch/{name}"): 0.0 for name in event.metrics})
        self._file.append([_record(event, 0, experiment), _record(event, 0, session)])

    def log_program(self, event: StepsCompleted, program: StepProgram) -> None:
        """Writes the jaxpr and the HLO of the compiled step as text."""
        records: list[bytes] = []
        for name, text in (("program/jaxpr", program.jaxpr), ("program/hlo", program.hlo)):
            more = f"\n({len(text):,} characters in all)" if len(text) > PROGRAM_LIMIT else ""
            records.append(_text(event, event.first_step, name, f"```\n{text[:PROGRAM_LIMIT]}{more}\n```"))
        self._file.append(records)


def numbers(event: Event, step: int, values: Mapping[str, float]) -> bytes:
    """Returns the record of one step's points of curves."""
    points = [Summary.Value(tag=tag(name), simple_value=float(value)) for name, value in values.items()]
    return _record(event, step, Summary(value=points))


def histogram(event: Event, step: int, name: str, array: Array) -> Iterator[bytes]:
    """Yields the distribution of the finite values, if there are any; ``<name>/nonfinite`` counts the others."""
    finite, others = finite_values(array)
    if others:
        yield numbers(event, step, {f"{name}/nonfinite": others})
    if finite.size:
        with np.errstate(over="ignore"):  # in the sum of squares
            yield _record(event, step, summary.histogram("histogram", finite, bin_edges(finite)), name)


def tag(name: str) -> str:
    """Returns ``name`` as that of a curve."""
    return escape_surrogates(name) or "_"


def _recorded(event: Event, values: RecordedValues) -> Iterator[bytes]:
    if values.numbers:
        yield numbers(event, event.step, values.numbers)
    for name, text in values.texts.items():
        yield _text(event, event.step, name, text)
    for name, image in values.images.items():
        yield _image(event, event.step, name, image)
    for name, array in values.arrays.items():
        yield from histogram(event, event.step, name, array)


def _text(event: Event, step: int, name: str, text: str) -> bytes:
    return _record(event, step, summary.text("text", escape_surrogates(text)), name)


def _image(event: Event, step: int, name: str, image: Array | bytes) -> bytes:
    if not isinstance(image, bytes):
        return _record(event, step, summary.image("image", image, dataformats="HWC"), name)
    try:
        with Image.open(io.BytesIO(image)) as opened:
            width, height = opened.size
    except OSError as error:
        raise StorageError(f"{name!r} cannot be recorded: it is not an image file ({error})") from None
    shown = Summary.Image(encoded_image_string=image, width=width, height=height, colorspace=3)
    return _record(event, step, Summary(value=[Summary.Value(image=shown)]), name)


def _record(event: Event, step: int, made: Any, name: str | None = None) -> bytes:
    if name is not None:
        made.value[0].tag = tag(name)  # tensorboardX would replace characters in it
    return Record(wall_time=event.time.timestamp(), step=step, summary=made).SerializeToString()
