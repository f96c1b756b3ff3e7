"""``WandbRun``: one run at W&B, used by one thread. Everything blocks.

W&B's messages may quote the API key or parts of a URL, so only the type of a failure is passed on.
"""

from __future__ import annotations

import html
import inspect
import io
import struct
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from pydantic import SecretStr
from wandb.proto import wandb_internal_pb2

from eventtrain.control.run_context import StepProgram
from eventtrain.errors import ConfigurationError, StorageError
from eventtrain.events import Event, StepsCompleted
from eventtrain.events.models import Number, escape_surrogates
from eventtrain.subscribers._shared.step_table import step_rows
from eventtrain.subscribers.trackers.curves import Points
from eventtrain.subscribers.trackers.histograms import Array, bin_edges, finite_values
from eventtrain.subscribers.trackers.media_tracker import RecordedValues
from eventtrain.validation.optional_imports import import_optional

Image = import_optional("PIL.Image", extra="wandb", used_by="WandbLogger, to log images,")

Row = dict[str, Any]
"""Values by name, as W&B takes them."""
REMEMBERED_ROWS = 10_000
"""Rows that are remembered until W&B's process has written them, which it does once a second."""
HISTOGRAM_STEP = "histograms/step"
"""The axis of the histograms."""
TEMPORARY_ERRORS = (
    "CommError",
    "HTTPError",
    "ConnectionError",
    "ServiceStartTimeoutError",
    "Timeout",
    "TimeoutError",
)
"""Types of failures after which another attempt may succeed."""

BLOCK_BYTES = 32 * 1024
HEADER = struct.Struct("<IHB")
"""Checksum, length, kind of a fragment: 1 whole, 2 first, 3 middle, 4 last."""
IDENTIFIER_BYTES = 7
# Protobuf makes its classes when it is imported, so no type checker knows them.
Record: Any = wandb_internal_pb2.Record  # pyright: ignore[reportAttributeAccessIssue]


class WandbRun:
    """Logs rows; a step that an earlier attempt wrote is not written again. ``open`` it first.

    W&B takes nothing for a step before the newest one that it was given. So the values of a step wait here until
    ``complete`` says that no earlier step will follow. All methods but ``unwritten_rows`` raise StorageError.

    Args:
        run_id: W&B's.
        folder: in which W&B creates its folder.
        resumes: the run exists.
        arguments: others of ``wandb.init``.
        api_key, base_url, init_timeout_s: of ``wandb.Settings``.
    """

    def __init__(
        self,
        run_id: str,
        folder: Path,
        *,
        resumes: bool,
        arguments: Mapping[str, Any],
        api_key: SecretStr | None,
        base_url: str | None,
        init_timeout_s: float,
    ) -> None:
        self._id = run_id
        self._folder = folder
        self._resumes = resumes
        self._arguments = arguments
        self._api_key = api_key
        self._base_url = base_url
        self._init_timeout_s = init_timeout_s
        self._run: Any = None
        self._log: TransactionLog | None = None
        self._present_step = -1
        """The last step that an earlier attempt wrote."""
        self._complete_step = -1
        self._newest_step = -1
        self._early: dict[int, Row] = {}
        """Rows of steps after ``_complete_step``."""
        self._logged: dict[int, dict[str, Number]] = {}
        """Numbers of the newest steps, which W&B may have in memory only: all of the last one, some of those before."""

    def open(self) -> None:
        """Begins the run at W&B, or continues it."""
        with _without_text():
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._resumes:
                self._present_step = last_step(self._folder, self._id)
            is_online = self._arguments["mode"] == "online"
            self._run = wandb.init(
                **self._arguments,
                id=self._id,
                dir=str(self._folder),
                resume="allow" if is_online else None,
                reinit="create_new",  # the program may have a run of its own
                settings=self._settings(),
            )
            if self._resumes and is_online:
                self._present_step = max(self._present_step, int(self._run.step) - 1)
            self._log = TransactionLog(Path(self._run.dir).parent / f"run-{self._id}.wandb")
            self._run.define_metric("histograms/*", step_metric=HISTOGRAM_STEP)

    def _settings(self) -> wandb.Settings:
        given: dict[str, Any] = {
            "console": "off",  # what the program prints is the program's
            "silent": True,
            "disable_git": True,
            "disable_code": True,
            "disable_job_creation": True,
            "x_disable_stats": True,
            "x_save_requirements": False,
            "x_transaction_log_flush_interval": 1.0,
            "init_timeout": self._init_timeout_s,
            "api_key": self._api_key.get_secret_value() if self._api_key is not None else None,
            "base_url": self._base_url,
        }
        known = wandb.Settings.model_fields
        return wandb.Settings(
            **{key: value for key, value in given.items() if key in known and value is not None}
        )

    def log(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Logs rows by step; the values of one step become one row."""
        with _without_text(self._run):
            for step, values in rows.items():
                if step > self._present_step and values:
                    self._add(values, step)

    def log_window(self, event: StepsCompleted, every: int, points: list[Points]) -> None:
        """Logs the steps that are a multiple of ``every``, with points of curves; no earlier step will follow."""
        rows: dict[int, Row] = {}
        for point in points:
            rows.setdefault(point.step, {}).update(point.named())
        for step, metrics in step_rows(event, every):
            rows.setdefault(step, {}).update({f"step/{name}": value for name, value in metrics.items()})
        self.log(rows)
        self.complete(event.last_step)

    def complete(self, step: int) -> None:
        """Writes the rows up to ``step`` that wait, since no row of an earlier step will follow."""
        due = sorted(early for early in self._early if early <= step)
        try:
            with _without_text(self._run):
                for early in due:
                    self._write(self._early[early], early)
                    del self._early[early]
                self._complete_step = max(self._complete_step, step)
        except StorageError as error:
            for early in due if not error.may_pass else ():
                self._early.pop(early, None)
            raise

    def unwritten_rows(self) -> dict[int, dict[str, Number]]:
        """Returns the numbers, by step, that are in no file yet."""
        self._forget_written()
        rows = {step: dict(row) for step, row in self._logged.items()}
        for step, row in self._early.items():
            rows.setdefault(step, {}).update(_numbers(row))
        return {step: row for step, row in rows.items() if row}

    def log_histograms(self, event: Event, step: int, arrays: Mapping[str, Array]) -> None:
        """Logs one histogram of each array of the state after ``step``, which may be over: they have their own axis."""
        with _without_text(self._run):
            if step > self._present_step:
                named = {f"histograms/{name}": array for name, array in arrays.items()}
                self._add({**_histograms(named), HISTOGRAM_STEP: step}, step)

    def log_recorded(self, event: Event, values: RecordedValues) -> None:
        """Logs what the user's functions returned for ``event``."""
        with _without_text(self._run):
            if event.step <= self._present_step:
                return
            row: Row = {**values.numbers, **_histograms(values.arrays)}
            for name, text in values.texts.items():
                row[name] = wandb.Html(f"<pre>{html.escape(text)}</pre>")
            for name, image in values.images.items():
                row[name] = _image(image)
            self._add(row, event.step)

    def log_program(self, event: StepsCompleted, program: StepProgram) -> None:
        """Saves the jaxpr and the HLO of the compiled step as files of the run."""
        with _without_text(self._run):
            for name, text in (("program-jaxpr.txt", program.jaxpr), ("program-hlo.txt", program.hlo)):
                path = Path(self._run.dir) / name
                path.write_text(text, encoding="utf-8")
                self._run.save(str(path), base_path=self._run.dir, policy="now")

    def configure(self, values: Mapping[str, Any]) -> None:
        """Adds to the run's config."""
        with _without_text(self._run):
            named = {_key(name): value for name, value in values.items()}
            self._run.config.update(named, allow_val_change=True)

    def finish(self, exit_code: int) -> None:
        """Ends the run; W&B sends what it has not sent yet."""
        if self._run is not None:
            try:
                self.complete(max(self._early, default=-1))
            finally:
                with _without_text(self._run):
                    self._run.finish(exit_code=exit_code)

    def _add(self, values: Mapping[str, Any], step: int) -> None:
        row = {_key(name): value for name, value in values.items()}
        if step > self._complete_step:
            self._early.setdefault(step, {}).update(row)
        else:
            self._write(row, step)

    def _write(self, row: Row, step: int) -> None:
        self._newest_step = max(self._newest_step, step)
        self._run.log(row, step=self._newest_step)
        self._logged.setdefault(self._newest_step, {}).update(_numbers(row))
        if len(self._logged) > REMEMBERED_ROWS:
            self._forget_written()
            for old in list(self._logged)[: -(REMEMBERED_ROWS // 2)]:
                del self._logged[old]

    def _forget_written(self) -> None:
        last = self._log.last_step() if self._log is not None else -1
        self._logged = {step: row for step, row in self._logged.items() if step > last}


def require_key(base_url: str | None) -> None:
    """Checks that W&B knows an API key without asking the user. Blocks.

    Raises:
        ConfigurationError: there is none.
    """
    if "prompt" not in inspect.signature(wandb.login).parameters:
        return  # an older version can only be asked by letting it ask the user
    with _without_text():
        known = wandb.login(host=base_url, prompt=False, verify=False)
    if not known:
        raise ConfigurationError(
            "WandbLogger has no API key. Give api_key=..., set WANDB_API_KEY, run `wandb login`, or use "
            'mode="offline".'
        )


def _histograms(arrays: Mapping[str, Array]) -> Row:
    """Returns a histogram of the finite values of each array that has any."""
    made: Row = {}
    for name, array in arrays.items():
        finite, _ = finite_values(array)
        if finite.size:
            edges = bin_edges(finite)
            counts = np.histogram(finite, edges)[0]
            made[name] = wandb.Histogram(np_histogram=(counts.tolist(), edges.tolist()))
    return made


def _image(image: Array | bytes) -> Any:
    try:
        if isinstance(image, bytes):
            return wandb.Image(Image.open(io.BytesIO(image)))
        return wandb.Image(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image))
    except ConfigurationError as error:  # Pillow is not installed
        raise StorageError(str(error)) from None


def _numbers(row: Row) -> dict[str, Number]:
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, (bool, int, float)) and name != HISTOGRAM_STEP
    }


def _key(name: str) -> str:
    return escape_surrogates(name) or "_"


@contextmanager
def _without_text(run: Any = True) -> Generator[None]:
    """Turns an error of W&B into a StorageError that quotes nothing of it."""
    if run is None:
        raise StorageError("no run could be opened at W&B")
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise StorageError(f"W&B failed: {kind}", may_pass=kind in TEMPORARY_ERRORS) from None


class TransactionLog:
    """W&B's file ``.wandb`` of a run, which may still be written or not exist yet; each call reads what is new.

    W&B's public API does not report which steps its process has written, and resumes nothing offline, but a resumed
    run must log each step exactly once. The file is a log in LevelDB's format (blocks of 32 KiB, records in one or
    several fragments) of Protobuf messages. Only the steps are read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = IDENTIFIER_BYTES
        self._last_step = -1

    def last_step(self) -> int:
        """Returns the last step in the file; -1 if there is none."""
        if self._path.exists():
            for end, record in records(self._path, self._offset):
                self._offset = end
                if record.WhichOneof("record_type") == "history":
                    self._last_step = max(self._last_step, record.history.step.num)
        return self._last_step


def last_step(folder: Path, run_id: str) -> int:
    """Returns the last step in the files of all attempts of a run below ``folder``; -1 if there is none."""
    paths = folder.glob(f"wandb/*run-*-{run_id}*/run-{run_id}.wandb")
    return max((TransactionLog(path).last_step() for path in paths), default=-1)


def records(path: Path, start: int = IDENTIFIER_BYTES) -> Iterator[tuple[int, Any]]:
    """Yields the complete records from byte ``start`` on, each after the offset where it ends; omits a torn tail."""
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    at, end = start, start + len(data)
    message = b""
    while at + HEADER.size <= end:
        if BLOCK_BYTES - at % BLOCK_BYTES < HEADER.size:
            at += BLOCK_BYTES - at % BLOCK_BYTES  # the rest of a block is too small for a header
            continue
        _, length, kind = HEADER.unpack_from(data, at - start)
        at += HEADER.size
        if at + length > end or not kind:
            return
        fragment = data[at - start : at - start + length]
        message = fragment if kind in (1, 2) else message + fragment
        at += length
        if kind in (1, 4):
            record = Record()
            try:
                record.ParseFromString(message)
            except Exception:  # torn in a place that only Protobuf notices
                return
            yield at, record
