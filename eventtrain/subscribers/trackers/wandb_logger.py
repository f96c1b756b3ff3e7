"""``WandbLogger``: curves, histograms, images and text at Weights & Biases, online or in its offline files."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
from pydantic import Field, SecretStr

from eventtrain.control.snapshots import KeptSnapshot
from eventtrain.errors import ConfigurationError, StateError
from eventtrain.events import (
    CommandRejected,
    EpochCompleted,
    EpochStarted,
    Event,
    RunFailed,
    RunResumed,
    RunStarted,
    SnapshotTaken,
    StepsCompleted,
)
from eventtrain.events.models import Number
from eventtrain.subscribers._shared.paths import file_path
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.step_table import due_steps, step_rows
from eventtrain.subscribers._shared.validation import require_choice, require_count, require_number
from eventtrain.subscribers.base import RunContext, StepProgram, Subscriber
from eventtrain.subscribers.trackers.curves import Points, TrackedCurves
from eventtrain.subscribers.trackers.histograms import TrackedArrays
from eventtrain.subscribers.trackers.hyperparam_curve import HyperparamCurveState
from eventtrain.subscribers.trackers.recorded_values import Record, check_record, recorded
from eventtrain.subscribers.trackers.tracker_thread import TrackerStatistics, TrackerThread

try:
    from eventtrain.subscribers.trackers import wandb_files, wandb_run
    from eventtrain.subscribers.trackers.wandb_run import WandbRun
except ModuleNotFoundError:
    wandb_files = wandb_run = None

WATCHED = (*TrackedCurves.events, RunResumed, RunFailed, SnapshotTaken, CommandRejected)
SETTLE_S = 10.0
"""How long a checkpoint waits for rows to be handed over."""
RowsByStep = dict[int, dict[str, Number]]
"""Step -> name -> value."""


class WandbLoggerState(SavedState):
    """What survives a restart."""

    version: Literal[1] = 1
    wandb_id: str
    curve: HyperparamCurveState
    evaluated_at: int
    configured: bool
    program_written: bool
    volatile: RowsByStep = Field(default_factory=RowsByStep)
    """Rows by step that W&B had in memory only."""


class WandbLogger(Subscriber):
    """Logs a run to Weights & Biases; offline into files that ``wandb sync`` sends later.

    Args:
        project, entity, group, tags: as of ``wandb.init``.
        mode: "online", or "offline": nothing leaves the machine.
        directory: in which W&B makes its folder ``wandb``, relative to ``run_dir``; None: ``run_dir``.
        api_key: None: what ``wandb login`` saved, or WANDB_API_KEY. Never shown.
        base_url: of a server of one's own, which W&B prints and writes to its files; None: W&B's settings.
        every: only steps that are a multiple of it have a row; a row costs some 0.2 ms of Python's time.
        hparams: of the run's config, besides the hyperparameters of the optimiser.
        histogram_every, histogram_every_epochs, arrays, record: as of ``TensorBoardLogger``.
        program: whether to save the jaxpr and the HLO of the compiled step as files of the run.
        init_timeout_s: how long W&B may take to begin the run, before that is tried again.
        finish_timeout_s: how long ``stop`` waits for what W&B has not taken, within the trainer's ``drain_timeout_s``.

    The names are those of ``TensorBoardLogger``: ``step/<metric>``, ``epoch/<metric>``, ``eval/<metric>``,
    ``hyperparams/<name>``, ``histograms/<array>``; the run's name is ``run_id``. W&B is spoken to in a thread of its
    own; what that has waiting is bounded, and what an outage costs is said (``TrackerThread``).

    A run that resumes goes on with W&B's run. Steps that W&B has already, or that an earlier attempt left in its files
    below ``directory``, are not logged again. Not promised: what W&B's own process had not written when the machine
    went, and what belongs to the very last of those steps but came after its row, such as the means of its epoch.

    Raises:
        ConfigurationError: wandb is missing, or an argument cannot work.
    """

    disable_after = None

    def __init__(
        self,
        project: str,
        *,
        entity: str | None = None,
        group: str | None = None,
        tags: tuple[str, ...] = (),
        mode: Literal["online", "offline"] = "online",
        directory: str | Path | None = None,
        api_key: str | SecretStr | None = None,
        base_url: str | None = None,
        every: int = 1,
        hparams: Mapping[str, bool | int | float | str] | None = None,
        histogram_every: int | None = None,
        histogram_every_epochs: int | None = None,
        arrays: tuple[str, ...] | None = None,
        record: Record | None = None,
        program: bool = False,
        init_timeout_s: float = 60.0,
        finish_timeout_s: float = 60.0,
    ) -> None:
        if wandb_run is None:
            raise ConfigurationError("WandbLogger needs wandb. Install it: pip install 'eventtrain[wandb]'.")
        if not project or set("/\\#?%:") & set(project):
            raise ConfigurationError(
                f"WandbLogger(project={project!r}): W&B takes names without / \\ # ? % and :."
            )
        _require_open_url(base_url)
        require_choice("WandbLogger", "mode", mode, ("online", "offline"))
        require_count("WandbLogger", "every", every, at_least=1)
        require_number("WandbLogger", "init_timeout_s", init_timeout_s, above=0)
        require_number("WandbLogger", "finish_timeout_s", finish_timeout_s, at_least=0)
        self._directory = file_path(directory, "WandbLogger") if directory is not None else Path()
        secret = SecretStr(api_key) if isinstance(api_key, str) else api_key
        self._options = partial(
            wandb_run.WandbOptions,
            mode=mode,
            project=project,
            entity=entity,
            group=group,
            tags=tags,
            config=dict(hparams or {}),
            api_key=secret,
            base_url=base_url,
            init_timeout_s=init_timeout_s,
        )
        self._base_url = base_url
        self._target = "W&B" if mode == "online" else "the files of W&B"
        self._needs_key = mode == "online" and secret is None
        self._every = every
        self._arrays = TrackedArrays("WandbLogger", histogram_every, histogram_every_epochs, arrays)
        self._record = check_record("WandbLogger", record)
        self._finish_timeout_s = finish_timeout_s
        self.events = (*WATCHED, *self._record)
        self._id = ""
        self._curves = TrackedCurves()
        self._configured = False
        self._program = program
        self._program_written = False
        self._newest_step = -1
        self._ahead = False
        """Something was added of a step that is later than ``_newest_step``."""
        self._volatile: RowsByStep = {}
        self._saved_rows: RowsByStep = {}
        self._exit_code = 0
        self._run: RunContext | None = None
        self._thread: TrackerThread | None = None
        self._wandb: WandbRun | None = None

    @property
    def statistics(self) -> TrackerStatistics:
        """What became of the rows of this run, or the last one; what W&B had already is counted as written."""
        return self._thread.statistics if self._thread is not None else TrackerStatistics()

    @property
    def wandb_id(self) -> str:
        """W&B's id of the run; "" before it began."""
        return self._id

    async def start(self, run: RunContext) -> None:
        """Start the thread, which begins the run at W&B, or goes on with it.

        Raises:
            ConfigurationError: online, and nothing says an API key.
        """
        assert wandb_run is not None
        if self._needs_key:
            await anyio.to_thread.run_sync(
                wandb_run.require_key, self._base_url, limiter=anyio.CapacityLimiter(1)
            )
        goes_on = bool(self._id) and (run.resumed or run.start_step > 0)
        if not goes_on:
            self._id = uuid.uuid4().hex[:16]
            self._configured = self._program_written = False
        name = self.name or "WandbLogger"
        options = self._options(
            run_id=self._id, folder=run.run_dir / self._directory, name=run.run_id, resumes=goes_on
        )
        self._wandb = wandb_run.WandbRun(options)
        self._thread = TrackerThread(name, run.publish, target=self._target)
        self._run = run
        self._exit_code = 0
        self._arrays.start(run, name)
        self._thread.start()
        self._newest_step, self._ahead = -1, False
        self._thread.add(self._wandb.open, step=run.start_step, event_kind="start", rows=0)
        rows, self._saved_rows = self._saved_rows, {}
        if goes_on and rows:
            self._ahead = True
            self._thread.add(
                partial(self._wandb.log, rows), step=run.start_step, event_kind="start", rows=len(rows)
            )

    async def handle(self, event: Event) -> None:
        """Have it logged; returns at once."""
        points = self._curves.points(event)
        if isinstance(event, StepsCompleted):
            self._on_steps(event, points)
        elif self._wandb is not None:
            for point in points:
                self._add(event, partial(self._wandb.log, {point.step: point.named()}))
        if isinstance(event, EpochStarted):
            if not self._configured and self._wandb is not None:
                self._configured = True
                self._add(event, partial(self._wandb.configure, dict(event.hyperparams)))
        elif isinstance(event, EpochCompleted):
            self._arrays.epoch(event)
        elif isinstance(event, (RunStarted, RunResumed)):
            self._arrays.done()  # of an attempt before
        elif isinstance(event, RunFailed):
            self._exit_code = 1
        elif isinstance(event, SnapshotTaken):
            self._on_snapshot(event)
        elif isinstance(event, CommandRejected):
            self._arrays.rejected(event)
        if isinstance(event, tuple(self._record)) and self._wandb is not None:
            self._add(event, partial(_log_recorded, self._wandb, self._record, event))

    async def stop(self) -> None:
        """Wait for what is not logged. Raises SubscriberError where that takes too long."""
        thread, run = self._thread, self._wandb
        try:
            if thread is not None and run is not None and thread.is_alive():
                thread.add(partial(run.finish, self._exit_code), step=0, event_kind="stop", rows=0)
                await thread.aclose(self._finish_timeout_s)
        finally:
            self._arrays.done()

    async def flush(self) -> None:
        """Have W&B be told everything so far; a server that is away holds no checkpoint up."""
        self._volatile = {}
        if self._thread is not None and self._wandb is not None:
            read: list[RowsByStep] = []
            run = self._wandb
            self._thread.add(lambda: read.append(run.volatile()), step=0, event_kind="flush", rows=0)
            if await self._thread.settle(SETTLE_S) and read:
                self._volatile = read[-1]

    def state_dict(self) -> dict[str, Any]:
        """Which run of W&B's it is, as plain JSON data."""
        return WandbLoggerState(
            wandb_id=self._id,
            curve=self._curves.state,
            evaluated_at=self._curves.evaluated_at,
            configured=self._configured,
            program_written=self._program_written,
            volatile=self._volatile,
        ).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """At the next ``start``, go on with that run.

        Raises:
            StateError: another version, or broken.
        """
        name = self.name or "WandbLogger"
        saved = WandbLoggerState.parse(name, state)
        if saved.wandb_id and wandb_files is not None and not wandb_files.is_id(saved.wandb_id):
            raise StateError(f"{name} cannot take over its state: {saved.wandb_id!r} is no id of W&B's.")
        self._id = saved.wandb_id
        self._curves.restore(saved.curve, saved.evaluated_at)
        self._configured, self._program_written = saved.configured, saved.program_written
        self._saved_rows = saved.volatile

    # --- of each kind of event ----------------------------------------------------------------------------------

    def _on_steps(self, event: StepsCompleted, points: list[Points]) -> None:
        rows = len(due_steps(event, self._every))
        if (rows or points or self._ahead) and self._wandb is not None:
            work = partial(_log_steps, self._wandb, event, self._every, points)
            self._add(event, work, rows=max(rows, len(points) > 0))
        self._newest_step, self._ahead = event.last_step, False
        self._arrays.steps(event)
        if self._program and not self._program_written and self._run is not None:
            program = self._run.program()
            if program is not None and self._wandb is not None:
                self._program_written = True
                self._add(event, partial(_save_program, self._wandb, program))

    def _on_snapshot(self, event: SnapshotTaken) -> None:
        snapshot = self._arrays.taken(event)
        if snapshot is None or self._wandb is None:
            return
        if not self._add(event, partial(_log_histograms, self._wandb, self._arrays, snapshot)):
            self._arrays.done(snapshot)

    # --- into the thread ----------------------------------------------------------------------------------------

    def _add(self, event: Event, work: Callable[[], None], *, rows: int = 1) -> bool:
        if self._thread is None:
            return False
        self._ahead = self._ahead or event.step > self._newest_step
        return self._thread.add(work, step=event.step, event_kind=event.kind, rows=rows)


def _require_open_url(base_url: str | None) -> None:
    """Refuse one with a secret in it: W&B prints it, and writes it to its files."""
    try:
        parts = urlsplit(base_url or "http://host")
        fits = parts.scheme in ("http", "https") and bool(parts.hostname)
        fits = fits and not (parts.username or parts.password or parts.query or parts.fragment)
    except ValueError:
        fits = False
    if not fits:
        raise ConfigurationError(
            "WandbLogger(base_url=...): needs http:// or https://, a host, and neither user, password, query nor "
            "fragment, since W&B prints it and writes it to its files. Give the key as api_key=... or in WANDB_API_KEY."
        ) from None


# --- in the thread ----------------------------------------------------------------------------------------------


def _log_steps(run: WandbRun, event: StepsCompleted, every: int, points: list[Points]) -> None:
    rows: dict[int, dict[str, Any]] = {}
    for point in points:
        rows.setdefault(point.step, {}).update(point.named())
    for step, metrics in step_rows(event, every):
        rows.setdefault(step, {}).update({f"step/{name}": value for name, value in metrics.items()})
    run.log(rows)
    run.complete(event.last_step)


def _log_recorded(run: WandbRun, record: Record, event: Event) -> None:
    run.log_tracked(event.step, recorded(record, event))


def _log_histograms(run: WandbRun, arrays: TrackedArrays, snapshot: KeptSnapshot) -> None:
    run.log_histograms(snapshot.step, arrays.read(snapshot))


def _save_program(run: WandbRun, program: StepProgram) -> None:
    run.save_text("program-jaxpr.txt", lambda: program.jaxpr)
    run.save_text("program-hlo.txt", lambda: program.hlo)
