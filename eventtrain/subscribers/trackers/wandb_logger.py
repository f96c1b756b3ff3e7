"""``WandbLogger``: curves, histograms, images and text at Weights & Biases, online or in its offline files."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
from pydantic import Field, SecretStr

from eventtrain.errors import ConfigurationError
from eventtrain.events import EpochStarted, Event, RunFailed, StepsCompleted
from eventtrain.events.models import Number
from eventtrain.subscribers._shared.paths import directory_path, require_writable_folder
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.step_table import due_steps
from eventtrain.subscribers._shared.worker_thread import in_own_thread
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.trackers.curves import HyperparamCurveState, Points
from eventtrain.subscribers.trackers.media_tracker import MediaTracker, Record
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_number
from eventtrain.validation.optional_imports import import_optional, require_installed

if TYPE_CHECKING:
    from eventtrain.subscribers.trackers.wandb_run import WandbRun

wandb_run = import_optional("eventtrain.subscribers.trackers.wandb_run", extra="wandb", used_by="WandbLogger")

RowsByStep = dict[int, dict[str, Number]]
"""Step -> name -> value."""


class WandbLoggerState(SavedState):
    """State saved with checkpoints."""

    version: Literal[1] = 1
    wandb_id: str = Field(pattern=r"^[A-Za-z0-9_-]{0,64}$")  # it becomes part of paths
    curve: HyperparamCurveState
    evaluated_at: int
    configured: bool
    program_written: bool
    volatile: RowsByStep = Field(default_factory=RowsByStep)
    """Rows by step that W&B had in memory only."""


class WandbLogger(MediaTracker):
    """Logs a run to Weights & Biases; offline to files that ``wandb sync`` sends later.

    Args:
        project, entity, group, tags: as of ``wandb.init``.
        mode: "online", or "offline": nothing leaves the machine. By default as the variable WANDB_MODE says, else
            "online".
        directory: in which W&B creates its folder ``wandb``, relative to ``run_dir``; None: ``run_dir``.
        api_key: None: the one that ``wandb login`` saved, or WANDB_API_KEY. Never shown.
        base_url: of a server of your own, which W&B prints and writes to its files; None: W&B's settings.
        every: only steps that are a multiple of it have a row; a row costs some 0.2 ms of Python's time.
        hparams: of the run's config, besides the hyperparameters of the optimiser.
        histogram_every, histogram_every_epochs, arrays, record: as of ``TensorBoardLogger``.
        program: whether to save the jaxpr and the HLO of the compiled step as files of the run.
        init_timeout_s: how long W&B may take to begin the run, before that is repeated.
        finish_timeout_s: how long ``stop`` waits for rows that W&B has not taken, within the trainer's
            ``drain_timeout_s``.

    The names are those of ``TensorBoardLogger``: ``step/<metric>``, ``epoch/<metric>``, ``eval/<metric>``,
    ``hyperparams/<name>``, ``histograms/<array>``, and those of arrays of metrics; the run's name is ``run_id``. A
    thread of its own uses W&B. Rows that wait for it are bounded; what an outage costs is reported (``TrackerThread``).

    A resumed run continues W&B's run. Steps that W&B has already, or that an earlier attempt left in its files below
    ``directory``, are not logged again. Not promised: rows that W&B's own process had not written when the machine
    went down, and values of the very last of those steps that came after its row, such as the means of its epoch.

    Raises:
        ConfigurationError: wandb is not installed, or an argument is invalid.
    """

    @checked
    def __init__(
        self,
        project: str,
        *,
        entity: str | None = None,
        group: str | None = None,
        tags: tuple[str, ...] = (),
        mode: Literal["online", "offline"] | None = None,
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
        require_installed(wandb_run)
        if not project or set("/\\#?%:") & set(project):
            raise ConfigurationError(
                f"WandbLogger(project={project!r}): project must be a name without / \\ # ? % and :."
            )
        _require_open_url(base_url)
        chosen_mode = _checked_mode(mode)
        require_number("WandbLogger", "init_timeout_s", init_timeout_s, above=0)
        super().__init__(
            every=every,
            histogram_every=histogram_every,
            histogram_every_epochs=histogram_every_epochs,
            arrays=arrays,
            record=record,
            program=program,
            finish_timeout_s=finish_timeout_s,
        )
        folder = "." if directory is None else directory
        self._directory = directory_path(folder, "WandbLogger", may_be_run_dir=True)
        secret = SecretStr(api_key) if isinstance(api_key, str) else api_key
        self._new_run = partial(
            wandb_run.WandbRun, api_key=secret, base_url=base_url, init_timeout_s=init_timeout_s
        )
        self._arguments = {
            "mode": chosen_mode,
            "project": project,
            "entity": entity,
            "group": group,
            "tags": tags,
            "config": dict(hparams or {}),
        }
        self._base_url = base_url
        self._description = "W&B" if chosen_mode == "online" else "the files of W&B"
        self._needs_key = chosen_mode == "online" and secret is None
        self._id = ""
        self._configured = False
        self._newest_step = self._complete_step = -1
        """Newest step of all jobs so far, and of the windows among them."""
        self._unwritten: RowsByStep = {}
        self._saved_rows: RowsByStep = {}
        self._exit_code = 0
        self._wandb: WandbRun | None = None

    @property
    def wandb_id(self) -> str:
        """W&B's id of the run; "" before it began."""
        return self._id

    async def start(self, run: RunContext) -> None:
        """Starts the thread, which begins the run at W&B or continues it.

        Raises:
            ConfigurationError: online, and there is no API key; or its files cannot be written.
        """
        if self._needs_key:
            limiter = anyio.CapacityLimiter(1)
            await anyio.to_thread.run_sync(wandb_run.require_key, self._base_url, limiter=limiter)
        continues = bool(self._id) and (run.resumed or run.start_step > 0)
        if not continues:
            self._id = uuid.uuid4().hex[:16]
            self._configured = self._program_written = False
        self._exit_code = 0
        self._newest_step = self._complete_step = -1
        arguments = {**self._arguments, "name": run.run_id}
        folder = run.run_dir / self._directory
        await in_own_thread(partial(require_writable_folder, folder, self.name or "WandbLogger"))
        self._wandb = wandb = self._new_run(self._id, folder, resumes=continues, arguments=arguments)
        self._begin(run, wandb, self._description, first_job=wandb.open)
        rows, self._saved_rows = self._saved_rows, {}
        if continues and rows and self._thread is not None:
            self._newest_step = run.start_step
            self._thread.add(
                partial(wandb.log, rows), step=run.start_step, event_kind="start", rows=len(rows)
            )

    def _log(self, event: Event, points: list[Points]) -> None:
        run = self._wandb
        assert run is not None
        match event:
            case StepsCompleted():
                rows = max(len(due_steps(event, self._every)), len(points) > 0)
                if rows or self._newest_step > self._complete_step:
                    self._add(event, partial(run.log_window, event, self._every, points), rows=rows)
                self._complete_step = event.last_step
                return
            case EpochStarted() if not self._configured:
                self._configured = True
                self._add(event, partial(run.configure, dict(event.hyperparams)))
            case RunFailed():
                self._exit_code = 1
            case _:
                pass
        for point in points:
            self._add(event, partial(run.log, {point.step: point.named()}))

    def _add(self, event: Event, work: Callable[[], None], *, rows: int = 1) -> bool:
        self._newest_step = max(self._newest_step, event.step)
        return super()._add(event, work, rows=rows)

    def _last_job(self) -> Callable[[], None] | None:
        return partial(self._wandb.finish, self._exit_code) if self._wandb is not None else None

    async def flush(self) -> None:
        """Waits until W&B was given everything so far; a server that is away does not delay a checkpoint."""
        self._unwritten = {}
        run, thread = self._wandb, self._thread
        if run is not None and thread is not None:
            read: list[RowsByStep] = []
            thread.add(lambda: read.append(run.unwritten_rows()), step=0, event_kind="flush", rows=0)
            if await self._flushed() and read:
                self._unwritten = read[-1]

    def state_dict(self) -> dict[str, Any]:
        """Returns which run at W&B it is, and the rows that are in no file yet, as plain JSON data."""
        return WandbLoggerState(
            wandb_id=self._id,
            curve=self._curves.state,
            evaluated_at=self._curves.evaluated_at,
            configured=self._configured,
            program_written=self._program_written,
            volatile=self._unwritten,
        ).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a saved state: the next ``start`` continues that run.

        Raises:
            StateError: the state is of another version, or broken.
        """
        saved = WandbLoggerState.parse(self._owner, state)
        self._id = saved.wandb_id
        self._curves.state, self._curves.evaluated_at = saved.curve, saved.evaluated_at
        self._configured, self._program_written = saved.configured, saved.program_written
        self._saved_rows = saved.volatile


def _checked_mode(mode: str | None) -> str:
    """Returns ``mode``, or what WANDB_MODE says if it is None; raises ConfigurationError if that is neither."""
    given, source = mode, "mode"
    if mode is None:
        given, source = os.environ.get("WANDB_MODE") or "online", "WANDB_MODE"
        given = {"dryrun": "offline", "run": "online"}.get(given, given)
    if given not in ("online", "offline"):
        raise ConfigurationError(
            f'WandbLogger: {source} must be "online" or "offline", got {given!r}. To log nothing, leave it out.'
        )
    return given


def _require_open_url(base_url: str | None) -> None:
    """Raises ConfigurationError if there may be a secret in it: W&B prints it, and writes it to its files."""
    try:
        parts = urlsplit(base_url or "http://host")
        fits = parts.scheme in ("http", "https") and bool(parts.hostname)
        fits = fits and not (parts.username or parts.password or parts.query or parts.fragment)
    except ValueError:
        fits = False
    if not fits:
        raise ConfigurationError(
            "WandbLogger(base_url=...): base_url must begin with http:// or https://, name a host, and have no user, "
            "password, query nor fragment, since W&B prints it and writes it to its files. Pass the key as api_key=... "
            "or in WANDB_API_KEY."
        ) from None
