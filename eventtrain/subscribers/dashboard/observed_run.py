"""``ObservedRun``: what a dashboard shows of one run, collected from its events in bounded memory. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from eventtrain.events import (
    TO_BE_CONTINUED,
    ActionRequested,
    AlertRaised,
    AlertResolved,
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointRestored,
    CheckpointSkipped,
    CheckpointStarted,
    CheckpointUploaded,
    CheckpointUploadFailed,
    CommandApplied,
    CommandConflict,
    CommandRejected,
    EpochCompleted,
    EpochStarted,
    EvalCompleted,
    Event,
    HyperparamChanged,
    LoopStalled,
    MachineMeasured,
    PeerLost,
    ProfileCaptured,
    RunCompleted,
    RunFailed,
    RunResumed,
    RunStarted,
    SampleTaken,
    StepCompleted,
    StepsCompleted,
    SubscriberDisabled,
    SubscriberFailed,
    SubscriberLagged,
)
from eventtrain.events.base import LifecycleEvent
from eventtrain.events.commands import (
    AnyCommand,
    Profile,
    Restore,
    SaveCheckpoint,
    ScaleHyperparam,
    SetHyperparam,
    TakeSample,
)
from eventtrain.events.models import Number, escape_surrogates
from eventtrain.subscribers._shared.curve import Curve, StateCurve
from eventtrain.subscribers._shared.display_text import clipped, file_name, issuer
from eventtrain.subscribers._shared.run_series import RunSeries
from eventtrain.subscribers._shared.shown_sample import ShownSample, with_sample
from eventtrain.subscribers._shared.state import SavedState

MOST_ROWS = 200
"""Of each list; the newest are kept."""
MOST_MACHINE_CURVES = 64
MOST_TEXT = 500
RATE_S = 20.0
"""Steps per second are those of at least this long, if the run is that old."""

OBSERVED = (
    LifecycleEvent,
    StepsCompleted,
    EvalCompleted,
    HyperparamChanged,
    CommandApplied,
    CommandRejected,
    CommandConflict,
    SubscriberFailed,
    SubscriberLagged,
    SubscriberDisabled,
    LoopStalled,
    MachineMeasured,
    SampleTaken,
)
"""Events for ``ObservedRun.add``."""

State = Literal["starting", "running", "paused", "completed", "stopped", "interrupted", "failed"]
ENDED: tuple[State, ...] = ("completed", "stopped", "interrupted", "failed")
Section = Literal[
    "status", "hyperparams", "changes", "alerts", "checkpoints", "commands", "notices", "machine", "samples"
]
SECTIONS: tuple[Section, ...] = (
    "status", "hyperparams", "changes", "alerts", "checkpoints", "commands", "notices", "machine", "samples",
)  # fmt: skip
CURVES = ("steps", "epochs", "evaluations", "hyperparams", "machine")
"""Kinds of curves."""


class Row(BaseModel):
    """One row of a list: when it happened, in steps and in seconds since 1970."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    step: int
    time: float


class ChangeRow(Row):
    """A hyperparameter changed: steps after ``step`` are computed with ``new``."""

    name: str
    old: Number
    new: Number
    by: str
    reason: str


class CommandRow(Row):
    """A command took effect at the boundary ``step``, or was ``rejected`` for that reason."""

    text: str
    by: str
    reason: str
    rejected: str | None = None


class AlertRow(Row):
    """An alert; ``resolved`` is the step at which its condition was no longer met."""

    name: str
    severity: str
    message: str
    metric: str = ""
    resolved: int | None = None


class CheckpointRow(Row):
    """A checkpoint, by the name of its file."""

    name: str
    tag: str
    state: str
    detail: str = ""
    size_bytes: int | None = None
    duration_s: float | None = None


class NoticeRow(Row):
    """Something about a subscriber, or about the run as a whole."""

    subject: str
    text: str


class Status(BaseModel):
    """How far the run is.

    ``total_steps``, ``total_epochs``: its aim, counted from step 0, if it is known. ``rate``: steps per second of late.
    ``left_s``: seconds until the aim at this rate.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    state: State = "starting"
    step: int = 0
    first_step: int = 0
    epoch: int = 0
    epochs_completed: int = 0
    attempt: int = 1
    total_steps: int | None = None
    total_epochs: int | None = None
    started: float | None = None
    updated: float | None = None
    reason: str = ""
    rate: float | None = None
    left_s: float | None = None


class ObservedRun(SavedState):
    """One run so far; also the state in a checkpoint. One thread at a time.

    Attributes:
        series: curves of metrics and hyperparameters over steps.
        machine_curves: of ``MachineMeasured``, over seconds since the run began.
        hyperparams: the values in effect, as far as events tell.
        machine: source -> its newest measurement.
    """

    model_config = ConfigDict(extra="forbid", frozen=False, ser_json_inf_nan="strings")

    version: Literal[1] = 1
    run_id: str = ""
    status: Status = Field(default_factory=Status)
    series: RunSeries = Field(default_factory=RunSeries)
    machine_curves: dict[str, StateCurve] = Field(default_factory=dict[str, Curve])
    hyperparams: dict[str, Number] = Field(default_factory=dict[str, Number])
    machine: dict[str, dict[str, Number]] = Field(default_factory=dict[str, dict[str, Number]])
    changes: list[ChangeRow] = Field(default_factory=list[ChangeRow])
    commands: list[CommandRow] = Field(default_factory=list[CommandRow])
    alerts: list[AlertRow] = Field(default_factory=list[AlertRow])
    checkpoints: list[CheckpointRow] = Field(default_factory=list[CheckpointRow])
    notices: list[NoticeRow] = Field(default_factory=list[NoticeRow])
    samples: list[ShownSample] = Field(default_factory=list[ShownSample])
    _edits: dict[str, int] = PrivateAttr(default_factory=lambda: dict.fromkeys(SECTIONS, 0))
    _progress: deque[tuple[float, int]] = PrivateAttr(
        default_factory=lambda: deque[tuple[float, int]](maxlen=512)
    )

    def edits(self, section: Section) -> int:
        """Returns a number that has grown whenever the section has changed."""
        return self._edits[section]

    def curves(self) -> Mapping[str, Mapping[str, Curve]]:
        """Returns kind -> name -> curve."""
        series = self.series
        return {
            "steps": series.steps,
            "epochs": series.epochs,
            "evaluations": series.evaluations,
            "hyperparams": series.hyperparams,
            "machine": self.machine_curves,
        }

    def begin(
        self, *, first_step: int, attempt: int, target_step: int | None, target_epoch: int | None
    ) -> None:
        """Begins an attempt, or another call of ``fit``, which ends at ``target_step`` or after ``target_epoch``."""
        status = self.status
        status.state, status.reason, status.left_s = "starting", "", None
        status.attempt, status.total_steps, status.total_epochs = attempt, target_step, target_epoch
        status.step, status.first_step = max(status.step, first_step), first_step
        self._progress.clear()
        self._edit("status")

    def add(self, event: Event) -> None:
        """Adds an event."""
        self._note_time(event)
        self._add_progress(event)
        self._add_checkpoint(event)
        self._add_message(event)

    def set_state(self, state: State, reason: str = "") -> None:
        """Notes what is known of the run otherwise than by an event."""
        if self.status.state != state:
            self.status.state, self.status.reason, self.status.left_s = state, reason, None
            self._edit("status")

    def add_steps(self, events: Sequence[StepCompleted] | Sequence[StepsCompleted]) -> None:
        """Adds steps, or windows of them, each of which ``follows`` the one before. It costs little more than one."""
        first, last = events[0], events[-1]
        begin = first.first_step if isinstance(first, StepsCompleted) else first.step
        for name in first.metrics:
            columns = [event.metrics[name] for event in events]
            values = (
                np.concatenate(columns)
                if isinstance(first, StepsCompleted)
                else np.asarray(columns, np.float64)
            )
            self.series.add_column(name, range(begin, last.step + 1), values)
        self._note_time(last)
        self._advance(last.step, last.epoch)

    def _note_time(self, event: Event) -> None:
        status, time = self.status, event.time.timestamp()
        if time > 0:  # tables have no time
            status.updated = time
            status.started = time if status.started is None else status.started
        self._edit("status")

    def _add_progress(self, event: Event) -> None:
        status = self.status
        match event:
            case StepsCompleted():
                self.add_steps([event])
            case StepCompleted():
                self.add_steps([event])
            case RunStarted() | RunResumed():
                status.state, status.reason = "running", ""
                status.step, status.attempt = event.step, max(1, event.attempt)
                if isinstance(event, RunResumed):
                    self._notice(event, "run", f"resumed from {file_name(event.path)}")
            case EpochStarted():
                self.series.add(event)
                status.epoch = event.epoch
                self._set_hyperparams(event.hyperparams)
            case EpochCompleted():
                self.series.add(event)
                status.epochs_completed = event.epoch + 1
                if status.total_steps is None and status.total_epochs is not None:
                    status.total_steps = event.step + (status.total_epochs - event.epoch - 1) * event.steps
                self._set_hyperparams(event.hyperparams)
            case EvalCompleted():
                self.series.add(event)
            case HyperparamChanged():
                self.series.add(event)
                name = event.path if event.path in self.hyperparams else event.name
                self._set_hyperparams({name: event.new})
                row = ChangeRow(
                    **_when(event),
                    name=_short(name),
                    old=event.old,
                    new=event.new,
                    by=_short(issuer(event)),
                    reason=_short(event.reason),
                )
                self._append("changes", self.changes, row)
            case RunCompleted():
                interrupted = event.reason in TO_BE_CONTINUED
                completed = event.reason == "completed"
                status.state = "completed" if completed else "interrupted" if interrupted else "stopped"
                status.reason, status.left_s = _short(event.reason), None
            case RunFailed():
                status.state, status.reason, status.left_s = "failed", _short(event.error), None
            case MachineMeasured():
                self._measure(event)
            case _:
                pass

    def _advance(self, step: int, epoch: int) -> None:
        """Notes how far the run is, and how fast."""
        status = self.status
        if status.state == "starting":
            status.state = "running"
        status.step, status.epoch = max(status.step, step), epoch
        now = status.updated or 0.0
        self._progress.append((now, step))
        while len(self._progress) > 2 and self._progress[1][0] < now - RATE_S:
            self._progress.popleft()
        began, first = self._progress[0]
        if now > began:
            status.rate = (step - first) / (now - began)
            if status.total_steps is not None and status.rate > 0:
                status.left_s = max(0, status.total_steps - status.step) / status.rate
        self._edit("status")

    def _set_hyperparams(self, values: Mapping[str, Number]) -> None:
        if any(
            name not in self.hyperparams or self.hyperparams[name] != value for name, value in values.items()
        ):
            self.hyperparams = {**self.hyperparams, **values}
            self._edit("hyperparams")

    def _measure(self, event: MachineMeasured) -> None:
        source = event.source if event.process is None else f"{event.source} of process {event.process}"
        self.machine = {**self.machine, source: dict(event.metrics)}
        self._edit("machine")
        seconds = event.time.timestamp() - (self.status.started or 0.0)
        for name, value in event.metrics.items():
            key = f"{source}/{name}"
            if key not in self.machine_curves and len(self.machine_curves) >= MOST_MACHINE_CURVES:
                continue
            self.machine_curves.setdefault(key, Curve()).put(seconds, float(value))

    def _add_checkpoint(self, event: Event) -> None:
        match event:
            case CheckpointStarted():
                self._put_checkpoint(event, "writing")
            case CheckpointCommitted():
                self._put_checkpoint(
                    event, "committed", size_bytes=event.size_bytes, duration_s=event.duration_s
                )
            case CheckpointFailed():
                self._put_checkpoint(event, "failed", detail=_short(event.error))
            case CheckpointSkipped():
                row = CheckpointRow(
                    **_when(event),
                    name="",
                    tag=_short(event.tag or ""),
                    state="skipped",
                    detail=f"{event.in_flight} were still being written",
                )
                self._append("checkpoints", self.checkpoints, row)
            case CheckpointUploaded():
                self._put_checkpoint(event, "uploaded")
            case CheckpointUploadFailed():
                self._put_checkpoint(event, "upload failed", detail=_short(event.error))
            case CheckpointRestored():
                source = event.tag or file_name(event.path)
                part = "state" if event.part == "all" else "weights"
                self._notice(event, "run", f"restored the {part} of step {event.restored_step} ({source})")
            case _:
                pass

    def _put_checkpoint(
        self,
        event: CheckpointStarted
        | CheckpointCommitted
        | CheckpointFailed
        | CheckpointUploaded
        | CheckpointUploadFailed,
        state: str,
        **facts: Any,
    ) -> None:
        """Adds a row, or brings that of the same file up to date."""
        name = _short(file_name(event.path))
        for index in range(len(self.checkpoints) - 1, -1, -1):
            row = self.checkpoints[index]
            if name and row.name == name and row.step == event.step:
                update = {**facts, "state": state, "time": event.time.timestamp()}
                self.checkpoints[index] = row.model_copy(update=update)
                self._edit("checkpoints")
                return
        row = CheckpointRow(**_when(event), name=name, tag=_short(event.tag or ""), state=state, **facts)
        self._append("checkpoints", self.checkpoints, row)

    def _add_message(self, event: Event) -> None:
        match event:
            case CommandApplied():
                self._add_command(event, None)
                if event.command.kind in ("pause", "resume"):
                    self.status.state = "paused" if event.command.kind == "pause" else "running"
                    self.status.left_s = None
                    self._progress.clear()
            case CommandRejected():
                self._add_command(event, _short(event.reason))
            case AlertRaised():
                row = AlertRow(
                    **_when(event),
                    name=_short(event.name),
                    severity=event.severity,
                    message=_short(event.message),
                    metric=_short(event.metric or ""),
                )
                self._append("alerts", self.alerts, row)
            case AlertResolved():
                self.alerts = [
                    row.model_copy(update={"resolved": event.step})
                    if row.name == _short(event.name) and row.resolved is None
                    else row
                    for row in self.alerts
                ]
                self._edit("alerts")
            case SubscriberFailed():
                times = f" ({event.count} times)" if event.count > 1 else ""
                self._notice(event, event.subscriber, f"failed on {event.event_kind}{times}: {event.error}")
            case SubscriberLagged():
                self._notice(event, event.subscriber, f"{event.dropped} events were dropped")
            case SubscriberDisabled():
                self._notice(event, event.subscriber, f"disabled: {event.reason}")
            case LoopStalled():
                self._notice(event, event.subscriber, f"training waited {event.waited_s:.1f} s for it")
            case CommandConflict():
                names = " and ".join(event.subscribers)
                self._notice(
                    event, "conflict", f"{names} set {event.name} at one boundary; the last one holds"
                )
            case PeerLost():
                self._notice(event, "run", f"process {event.process} is lost: {event.error}")
            case ProfileCaptured():
                steps = f"steps {event.first_step} to {event.last_step}"
                self._notice(event, "profile", f"{steps} traced into {file_name(event.path)}")
            case SampleTaken():
                self.samples = with_sample(self.samples, event)
                self._edit("samples")
            case ActionRequested():
                self._notice(event, "action", event.name)
            case _:
                pass

    def _add_command(self, event: CommandApplied | CommandRejected, rejected: str | None) -> None:
        command = event.command
        if command.kind == "take_snapshot" and rejected is None:
            return  # policies take many, and they change nothing
        row = CommandRow(
            **_when(event),
            text=_short(_words(command)),
            by=_short(issuer(command)),
            reason=_short(command.reason),
            rejected=rejected,
        )
        self._append("commands", self.commands, row)

    def _notice(self, event: Event, subject: str, text: str) -> None:
        row = NoticeRow(**_when(event), subject=_short(subject), text=_short(text))
        self._append("notices", self.notices, row)

    def _append(self, section: Section, rows: list[Any], row: Row) -> None:
        rows.append(row)
        del rows[:-MOST_ROWS]
        self._edit(section)

    def _edit(self, section: Section) -> None:
        self._edits[section] += 1


def _when(event: Event) -> dict[str, Any]:
    return {"step": event.step, "time": event.time.timestamp()}


def _words(command: AnyCommand) -> str:
    """Returns a command as people read it, such as ``learning_rate x 0.5``."""
    match command:
        case SetHyperparam():
            return f"{command.path or command.name} = {command.value:g}"
        case ScaleHyperparam():
            return f"{command.path or command.name} × {command.factor:g}"
        case SaveCheckpoint():
            return f"checkpoint {command.tag}" if command.tag else "checkpoint"
        case Restore():
            return f"restore {command.target}" + (" (weights)" if command.part == "params" else "")
        case Profile():
            return f"profile {command.steps} steps"
        case TakeSample():
            return f"sample {command.name}"
        case _:
            return command.kind


def _short(text: str) -> str:
    return clipped(escape_surrogates(text), MOST_TEXT)
