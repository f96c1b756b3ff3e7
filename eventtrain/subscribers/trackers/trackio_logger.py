"""``TrackioLogger``: the curves of a run in Trackio: on this machine, in a Space of Hugging Face, or on a server."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any, Literal

from pydantic import Field, SecretStr

from eventtrain.errors import ConfigurationError, StorageError
from eventtrain.events import Event, StepsCompleted
from eventtrain.events.models import Number, escape_surrogates
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.step_table import due_steps, step_rows
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.trackers.curves import HyperparamCurveState, Points, TrackedCurves
from eventtrain.subscribers.trackers.tracker import Tracker
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count
from eventtrain.validation.optional_imports import import_optional, require_installed

trackio = import_optional("trackio", extra="trackio", used_by="TrackioLogger")

WRITE_S = 2.0
"""After this time Trackio, which writes twice a second, has written a row."""
MOST_RECENT = 10_000
"""Rows in a checkpoint."""

Row = tuple[int, dict[str, Number]]
"""Step, and values by name."""


class TrackioLoggerState(SavedState):
    """State saved with checkpoints."""

    version: Literal[1] = 1
    run_name: str
    curve: HyperparamCurveState
    evaluated_at: int
    recent: list[Row] = Field(default_factory=list[Row])
    """Rows that Trackio may have had in memory only."""


class TrackioLogger(Tracker):
    """Logs the curves of a run to Trackio.

    Args:
        project: as of ``trackio.init``.
        group: likewise.
        space_id: of a Space at Hugging Face, such as ``user/space``; Trackio creates it if it is missing.
        server_url: of a Trackio server of your own, with its write token. Never shown. Without both the run is stored
            on this machine, in the folder TRACKIO_DIR, unless Trackio's own variables say otherwise.
        every: only steps that are a multiple of it have a row.
        hparams: of the run's config, besides the hyperparameters of the optimiser at the start.
        finish_timeout_s: how long ``stop`` waits for rows that Trackio has not taken, within the trainer's
            ``drain_timeout_s``.

    The names are those of ``TensorBoardLogger``: ``step/<metric>``, ``epoch/<metric>``, ``eval/<metric>`` and
    ``hyperparams/<name>``; the run's name is ``run_id``. A thread of its own uses Trackio. Rows that wait for it are
    bounded; what an outage costs is reported (``TrackerThread``), as far as Trackio tells: it warns of most failures,
    and raises few.

    A resumed run continues Trackio's run of the same name. Steps that Trackio has already are not logged again.

    Raises:
        ConfigurationError: trackio is not installed, or an argument is invalid.
    """

    events = TrackedCurves.events

    @checked
    def __init__(
        self,
        project: str,
        *,
        group: str | None = None,
        space_id: str | None = None,
        server_url: str | SecretStr | None = None,
        every: int = 1,
        hparams: Mapping[str, bool | int | float | str] | None = None,
        finish_timeout_s: float = 60.0,
    ) -> None:
        require_installed(trackio)
        super().__init__(finish_timeout_s)
        require_count("TrackioLogger", "every", every, at_least=1)
        if not project:
            raise ConfigurationError("TrackioLogger(project=''): project must be a name.")
        if space_id is not None and server_url is not None:
            raise ConfigurationError(
                "TrackioLogger: space_id and server_url exclude each other. Give the place where the run is stored."
            )
        self._arguments = {"project": project, "group": group, "space_id": space_id}
        self._server_url = SecretStr(server_url) if isinstance(server_url, str) else server_url
        self._every = every
        self._hparams = dict(hparams or {})
        self._curves = TrackedCurves()
        self._run_name = ""
        self._saved_rows: list[Row] = []
        self._recent: list[Row] = []
        self._trackio: TrackioRun | None = None

    @property
    def run_name(self) -> str:
        """Name of the run in Trackio; "" before it began."""
        return self._run_name

    async def start(self, run: RunContext) -> None:
        """Starts the thread, which begins the run in Trackio or continues it."""
        continues = bool(self._run_name) and (run.resumed or run.start_step > 0)
        if not continues:
            self._run_name = run.run_id
        config = {**run.control.hyperparams, **self._hparams}
        url = self._server_url
        self._trackio = trackio_run = TrackioRun(
            {
                **self._arguments,
                "server_url": url.get_secret_value() if url is not None else None,
                "name": self._run_name,
                "config": {_key(name).lstrip("_") or "x": value for name, value in config.items()},
            },
            resumes=continues,
        )
        self._start_thread(run, "Trackio", trackio_run.open)
        rows, self._saved_rows = self._saved_rows, []
        if continues and rows and self._thread is not None:
            log = partial(trackio_run.log, rows)
            self._thread.add(log, step=run.start_step, event_kind="start", rows=len(rows))

    async def handle(self, event: Event) -> None:
        """Has the event's values logged; returns at once."""
        run = self._trackio
        if run is None:
            return
        points = self._curves.points(event)
        if points:
            self._add(event, partial(run.log, _rows_of(points)), rows=len(points))
        if isinstance(event, StepsCompleted) and (rows := len(due_steps(event, self._every))):
            self._add(event, partial(run.log_window, event, self._every), rows=rows)

    def _last_job(self) -> Callable[[], None] | None:
        return self._trackio.finish if self._trackio is not None else None

    async def flush(self) -> None:
        """Waits until Trackio was given everything so far; a server that is away does not delay a checkpoint."""
        self._recent = []
        run = self._trackio
        if run is not None and await self._flushed():
            self._recent = run.recent_rows()

    def state_dict(self) -> dict[str, Any]:
        """Returns which run in Trackio it is, and the newest rows, as plain JSON data."""
        return TrackioLoggerState(
            run_name=self._run_name,
            curve=self._curves.state,
            evaluated_at=self._curves.evaluated_at,
            recent=self._recent,
        ).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a saved state: the next ``start`` continues that run.

        Raises:
            StateError: the state is of another version, or broken.
        """
        saved = TrackioLoggerState.parse(self._owner, state)
        self._run_name, self._saved_rows = saved.run_name, saved.recent
        self._curves.state, self._curves.evaluated_at = saved.curve, saved.evaluated_at


class TrackioRun:
    """A run in Trackio. All methods but ``recent_rows`` are for one thread; they block, and raise StorageError.

    Args:
        arguments: of ``trackio.init``.
        resumes: the run exists.
    """

    def __init__(self, arguments: Mapping[str, Any], *, resumes: bool) -> None:
        self._arguments = arguments
        self._resumes = resumes
        self._run: Any = None
        self._present_step = -1
        """The last step that an earlier attempt wrote."""
        self._recent: deque[tuple[float, Row]] = deque(maxlen=MOST_RECENT)

    def open(self) -> None:
        """Begins the run in Trackio, or continues it. Trackio keeps it in a variable of this thread's context."""
        with _without_text():
            self._run = trackio.init(
                **self._arguments,
                resume="allow" if self._resumes else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
            if self._resumes:
                self._present_step = self._run._next_step - 1  # no public name tells it of all three places

    def log(self, rows: Iterable[Row]) -> None:
        """Logs rows, except those of steps that an earlier attempt wrote."""
        if self._run is None:
            raise StorageError("no run could be opened in Trackio")
        with _without_text():
            for step, values in rows:
                if step > self._present_step:
                    row = {_key(name): value for name, value in values.items()}
                    self._run.log(row, step=step)
                    self._recent.append((monotonic(), (step, row)))

    def log_window(self, event: StepsCompleted, every: int) -> None:
        """Logs the steps that are a multiple of ``every``."""
        self.log(
            (step, {f"step/{name}": value for name, value in metrics.items()})
            for step, metrics in step_rows(event, every)
        )

    def recent_rows(self) -> list[Row]:
        """Returns the rows that Trackio may not have written yet. Any thread, while no job runs."""
        start_s = monotonic() - WRITE_S
        return [row for at_s, row in self._recent if at_s >= start_s]

    def finish(self) -> None:
        """Ends the run; Trackio writes what it has not written yet."""
        if self._run is not None:
            with _without_text():
                self._run.finish()


def _rows_of(points: Iterable[Points]) -> list[Row]:
    return [(point.step, point.named()) for point in points]


def _key(name: str) -> str:
    return escape_surrogates(name) or "_"


@contextmanager
def _without_text() -> Generator[None]:
    """Turns an error of Trackio, which may quote its URL with the token, into a StorageError that quotes nothing."""
    try:
        yield
    except Exception as error:
        raise StorageError(f"Trackio failed: {type(error).__name__}") from None
