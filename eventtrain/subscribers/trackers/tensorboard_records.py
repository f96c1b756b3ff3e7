"""Records of TensorBoard's event files, made with tensorboardX. Pure; any thread.

Names are written as they are: TensorBoard shows separators, quotes, line ends and letters of any script. Only what is
no Unicode (a lone surrogate) is escaped. Numbers become float32, as TensorBoard has them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import summary
from tensorboardX.proto import event_pb2, summary_pb2

from eventtrain.errors import StorageError
from eventtrain.events import EpochCompleted, RunResumed, RunStarted, StepsCompleted
from eventtrain.events import Event as Said
from eventtrain.subscribers._shared.step_table import step_rows
from eventtrain.subscribers.base import StepProgram
from eventtrain.subscribers.trackers.recorded_values import Array, Record, bin_edges, recorded

# Protobuf makes its classes when it is imported, so no checker of types knows them.
Event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
SessionLog: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]
Summary: Any = summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]

PROGRAM_LIMIT = 2**20
"""Characters of the step's jaxpr, or HLO, that are shown; TensorBoard is no editor."""


def beginning(event: RunStarted | RunResumed) -> Iterator[bytes]:
    """The first records of a file: readers forget what others say of the steps that follow ``event``."""
    time_s = event.time.timestamp()
    start = SessionLog(status=SessionLog.START)
    yield Event(wall_time=time_s, file_version="brain.Event:2").SerializeToString()
    yield Event(wall_time=time_s, step=event.step + 1, session_log=start).SerializeToString()


def steps(event: StepsCompleted, every: int) -> Iterator[bytes]:
    """Points of the curves ``step/...``."""
    for step, metrics in step_rows(event, every):
        yield from numbers(event, step, {f"step/{name}": value for name, value in metrics.items()})


def numbers(event: Said, step: int, values: Mapping[str, float]) -> Iterator[bytes]:
    """One step's points of curves."""
    points = [Summary.Value(tag=tag(name), simple_value=float(value)) for name, value in values.items()]
    yield _record(event, step, Summary(value=points))


def text(event: Said, step: int, name: str, words: str) -> bytes:
    """Text, in Markdown."""
    return _record(event, step, summary.text("text", _unicode(words)), name)


def image(event: Said, step: int, name: str, picture: Array | bytes) -> bytes:
    """An image, as ``Tracked`` has it. Raises StorageError where it is none."""
    if not isinstance(picture, bytes):
        return _record(event, step, summary.image("image", picture, dataformats="HWC"), name)
    try:
        with Image.open(io.BytesIO(picture)) as opened:
            width, height = opened.size
    except OSError as error:
        raise StorageError(f"{name!r} cannot be recorded: it is no image file ({error})") from None
    shown = Summary.Image(encoded_image_string=picture, width=width, height=height, colorspace=3)
    return _record(event, step, Summary(value=[Summary.Value(image=shown)]), name)


def histogram(event: Said, step: int, name: str, array: Array) -> Iterator[bytes]:
    """The distribution of the finite values, if there are any; ``<name>/nonfinite`` counts the others, if any."""
    values = np.asarray(array, np.float64).ravel()
    finite = values[np.isfinite(values)]
    if finite.size < values.size:
        yield from numbers(event, step, {f"{name}/nonfinite": values.size - finite.size})
    if finite.size:
        with np.errstate(over="ignore"):  # in the sum of squares
            yield _record(event, step, summary.histogram("histogram", finite, bin_edges(finite)), name)


def histograms(event: Said, step: int, arrays: Mapping[str, Array]) -> Iterator[bytes]:
    """One of each array, under its name."""
    for name, array in arrays.items():
        yield from histogram(event, step, f"histograms/{name}", array)


def recorded_of(event: Said, record: Record) -> Iterator[bytes]:
    """What the user's functions give for ``event``. Raises StorageError."""
    values = recorded(record, event)
    if values.numbers:
        yield from numbers(event, event.step, values.numbers)
    for name, words in values.texts.items():
        yield text(event, event.step, name, words)
    for name, picture in values.images.items():
        yield image(event, event.step, name, picture)
    for name, array in values.arrays.items():
        yield from histogram(event, event.step, name, array)


def hparams(event: EpochCompleted, values: Mapping[str, Any]) -> Iterator[bytes]:
    """A row of the HParams page: what the run was started with, and the curves it is judged by."""
    safe = {tag(name): _unicode(value) if isinstance(value, str) else value for name, value in values.items()}
    experiment, session, _ = summary.hparams(safe, {tag(f"epoch/{name}"): 0.0 for name in event.metrics})
    yield _record(event, 0, experiment)
    yield _record(event, 0, session)


def program(event: StepsCompleted, program: StepProgram) -> Iterator[bytes]:
    """What the step was compiled to, as text."""
    for name, words in (("program/jaxpr", program.jaxpr), ("program/hlo", program.hlo)):
        more = f"\n({len(words):,} characters in all)" if len(words) > PROGRAM_LIMIT else ""
        yield text(event, event.first_step, name, f"```\n{words[:PROGRAM_LIMIT]}{more}\n```")


def tag(name: str) -> str:
    """``name`` as a curve's."""
    return _unicode(name) or "_"


def _record(event: Said, step: int, made: Any, name: str | None = None) -> bytes:
    if name is not None:
        made.value[0].tag = tag(name)  # tensorboardX would replace letters in it
    return Event(wall_time=event.time.timestamp(), step=step, summary=made).SerializeToString()


def _unicode(words: str) -> str:
    return words.encode("utf-8", "backslashreplace").decode()
