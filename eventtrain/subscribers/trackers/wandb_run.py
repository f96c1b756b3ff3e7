"""``WandbRun``: one run of W&B's, spoken to by one thread. Everything blocks.

W&B's messages may quote the API key or parts of a URL, so only the kind of a failure is passed on.
"""

from __future__ import annotations

import html
import inspect
import io
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import wandb
from pydantic import SecretStr

from eventtrain.errors import ConfigurationError, StorageError
from eventtrain.events.models import Number
from eventtrain.subscribers.trackers.recorded_values import Array, Tracked, bin_edges
from eventtrain.subscribers.trackers.wandb_files import WrittenSteps, last_step

try:
    from PIL import Image
except ModuleNotFoundError:
    Image = None

Row = dict[str, Any]
"""Values by name, as W&B takes them."""
TOLD_LIMIT = 10_000
"""Rows that are remembered until W&B's process has written them, which it does once a second."""
HISTOGRAM_STEP = "histograms/step"
"""The axis of the histograms."""
TEMPORARY = (
    "CommError",
    "HTTPError",
    "ConnectionError",
    "ServiceStartTimeoutError",
    "Timeout",
    "TimeoutError",
)
"""Kinds of failures after which another try may work."""


@dataclass(frozen=True)
class WandbOptions:
    """What ``wandb.init`` is told; ``run_id`` is W&B's."""

    run_id: str
    folder: Path
    mode: Literal["online", "offline"]
    project: str
    entity: str | None
    name: str
    group: str | None
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    api_key: SecretStr | None
    base_url: str | None
    init_timeout_s: float
    resumes: bool


class WandbRun:
    """Opened by the first job that works; a step that was written before is not written again.

    W&B takes nothing for a step behind the newest one that it was told of. So what is of a step waits here until
    ``complete`` says that no earlier step is still to come.

    Args:
        options: of the run.
    """

    def __init__(self, options: WandbOptions) -> None:
        self._options = options
        self._run: Any = None
        self._step = -1
        self._told: dict[int, dict[str, Number]] = {}
        """Numbers of the newest steps, which W&B may have in memory only: all of the last one, some of those before."""
        self._written: WrittenSteps | None = None
        self._complete = -1
        self._early: dict[int, Row] = {}
        self._present = -1
        self.skipped = 0
        """Rows left out, since an attempt before wrote them."""

    def open(self) -> None:
        """Begin, or go on with, the run. Raises StorageError."""
        options = self._options
        with _told():
            options.folder.mkdir(parents=True, exist_ok=True)
            if options.resumes:
                self._present = last_step(options.folder, options.run_id)
            self._run = wandb.init(
                project=options.project,
                entity=options.entity,
                name=options.name,
                id=options.run_id,
                group=options.group,
                tags=options.tags,
                config=dict(options.config),
                dir=str(options.folder),
                mode=options.mode,
                resume="allow" if options.mode == "online" else None,
                reinit="create_new",  # the program may have a run of its own
                settings=_settings(options),
            )
            if options.resumes and options.mode == "online":
                self._present = max(self._present, int(self._run.step) - 1)
            self._written = WrittenSteps(Path(self._run.dir).parent / f"run-{options.run_id}.wandb")
            self._run.define_metric("histograms/*", step_metric=HISTOGRAM_STEP)

    def log(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Rows by step; what belongs to one step becomes one row. Raises StorageError."""
        with _told(self._run):
            for step, values in rows.items():
                if step <= self._present:
                    self.skipped += 1
                elif values:
                    self._log(values, step)

    def complete(self, step: int) -> None:
        """What is still to come of steps up to ``step`` cannot have a row before theirs. Raises StorageError."""
        due = sorted(early for early in self._early if early <= step)
        try:
            with _told(self._run):
                for early in due:
                    self._write(self._early[early], early)
                    del self._early[early]
                self._complete = max(self._complete, step)
        except StorageError as error:
            for early in due if not error.may_pass else ():
                self._early.pop(early, None)
            raise

    def volatile(self) -> dict[int, dict[str, Number]]:
        """The numbers, by step, that are in no file yet."""
        self._forget_written()
        rows = {step: dict(row) for step, row in self._told.items()}
        for step, row in self._early.items():
            rows.setdefault(step, {}).update(_numbers(row))
        return {step: row for step, row in rows.items() if row}

    def log_histograms(self, step: int, arrays: Mapping[str, Array]) -> None:
        """Of the state after ``step``, which may be some steps ago: they have an axis of their own."""
        with _told(self._run):
            if step > self._present:
                made = {
                    f"histograms/{name}": value
                    for name, array in arrays.items()
                    for value in _histogram(array)
                }
                self._log({**made, HISTOGRAM_STEP: step}, step)

    def log_tracked(self, step: int, values: Tracked) -> None:
        """What functions of the user's gave. Raises StorageError."""
        with _told(self._run):
            if step <= self._present:
                self.skipped += 1
                return
            made: dict[str, Any] = dict(values.numbers)
            made |= {
                name: wandb.Html(f"<pre>{html.escape(text)}</pre>") for name, text in values.texts.items()
            }
            made |= {name: _image(picture) for name, picture in values.images.items()}
            made |= {name: value for name, array in values.arrays.items() for value in _histogram(array)}
            self._log(made, step)

    def configure(self, values: Mapping[str, Any]) -> None:
        """Add to the run's config."""
        with _told(self._run):
            self._run.config.update(
                {_key(name): value for name, value in values.items()}, allow_val_change=True
            )

    def save_text(self, name: str, make: Callable[[], str]) -> None:
        """A file of the run's."""
        with _told(self._run):
            path = Path(self._run.dir) / name
            path.write_text(make(), encoding="utf-8")
            self._run.save(str(path), base_path=self._run.dir, policy="now")

    def finish(self, exit_code: int) -> None:
        """The run has ended; W&B sends what it has not sent yet. Raises StorageError."""
        if self._run is not None:
            try:
                self.complete(max(self._early, default=-1))
            finally:
                with _told(self._run):
                    self._run.finish(exit_code=exit_code)

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        row = {_key(name): value for name, value in values.items()}
        if step > self._complete:
            self._early.setdefault(step, {}).update(row)
        else:
            self._write(row, step)

    def _write(self, row: Row, step: int) -> None:
        self._step = max(self._step, step)
        self._run.log(row, step=self._step)
        self._told.setdefault(self._step, {}).update(_numbers(row))
        if len(self._told) > TOLD_LIMIT:
            self._forget_written()
            for old in list(self._told)[: -(TOLD_LIMIT // 2)]:
                del self._told[old]

    def _forget_written(self) -> None:
        last = self._written.last() if self._written is not None else -1
        self._told = {step: row for step, row in self._told.items() if step > last}


def require_key(base_url: str | None) -> None:
    """Make sure that W&B can be logged in to without asking anybody. Blocks.

    Raises:
        ConfigurationError: nothing says a key.
    """
    if "prompt" not in inspect.signature(wandb.login).parameters:
        return  # an older version could only be asked by having it ask the user
    with _told():
        known = wandb.login(host=base_url, prompt=False, verify=False)
    if not known:
        raise ConfigurationError(
            "WandbLogger has no API key. Give api_key=..., set WANDB_API_KEY, run `wandb login`, or use "
            'mode="offline".'
        )


def _settings(options: WandbOptions) -> wandb.Settings:
    given: dict[str, Any] = {
        "console": "off",  # what the program prints is the program's
        "silent": True,
        "disable_git": True,
        "disable_code": True,
        "disable_job_creation": True,
        "x_disable_stats": True,
        "x_save_requirements": False,
        "x_transaction_log_flush_interval": 1.0,
        "init_timeout": options.init_timeout_s,
    }
    if options.api_key is not None:
        given["api_key"] = options.api_key.get_secret_value()
    if options.base_url is not None:
        given["base_url"] = options.base_url
    known = wandb.Settings.model_fields
    return wandb.Settings(**{name: value for name, value in given.items() if name in known})


def _histogram(array: Array) -> Generator[Any]:
    values = np.asarray(array, np.float64).ravel()
    finite = values[np.isfinite(values)]
    if finite.size:
        edges = bin_edges(finite)
        yield wandb.Histogram(np_histogram=(np.histogram(finite, edges)[0].tolist(), edges.tolist()))


def _image(picture: Array | bytes) -> Any:
    if Image is None:
        raise StorageError("images need Pillow; install it: pip install 'eventtrain[wandb]'")
    if isinstance(picture, bytes):
        return wandb.Image(Image.open(io.BytesIO(picture)))
    return wandb.Image(Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture))


def _numbers(row: Row) -> dict[str, Number]:
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, (bool, int, float)) and name != HISTOGRAM_STEP
    }


def _key(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode() or "_"


@contextmanager
def _told(run: Any = True) -> Generator[None]:
    """Turns what W&B raises into a StorageError that quotes nothing of it."""
    if run is None:
        raise StorageError("no run of W&B's could be opened")
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise StorageError(f"W&B failed: {kind}", may_pass=kind in TEMPORARY) from None
