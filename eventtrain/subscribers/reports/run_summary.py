"""``ReportFacts``: what a report tells of a run besides its curves, collected from events in bounded memory. Pure."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from eventtrain.events import (
    TO_BE_CONTINUED,
    AlertRaised,
    AlertResolved,
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointRestored,
    CheckpointSkipped,
    CheckpointUploaded,
    CheckpointUploadFailed,
    CommandApplied,
    CommandRejected,
    EpochCompleted,
    EvalCompleted,
    Event,
    LoopStalled,
    RunCompleted,
    RunFailed,
    RunResumed,
    RunStarted,
    StepsCompleted,
    SubscriberDisabled,
    SubscriberFailed,
    SubscriberLagged,
)
from eventtrain.events.commands import Command
from eventtrain.events.models import Number
from eventtrain.subscribers._shared.state import SavedState

ROWS_KEPT = 100
"""Of each list the newest; how many there were is counted."""
NAMES_KEPT = 200
TEXT_KEPT = 500

REPORTED = (
    RunStarted,
    RunResumed,
    RunCompleted,
    RunFailed,
    EpochCompleted,
    EvalCompleted,
    CommandApplied,
    CommandRejected,
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointSkipped,
    CheckpointRestored,
    CheckpointUploaded,
    CheckpointUploadFailed,
    AlertRaised,
    AlertResolved,
    SubscriberFailed,
    SubscriberLagged,
    SubscriberDisabled,
    LoopStalled,
)
"""What ``ReportFacts.take`` looks at, besides StepsCompleted."""


class Rows(BaseModel):
    """The newest rows of a table, oldest first, and how many there were."""

    model_config = ConfigDict(extra="forbid")

    total: int = 0
    rows: list[tuple[str, ...]] = Field(default_factory=list[tuple[str, ...]])

    def add(self, *cells: str) -> None:
        """One more row; long text is cut."""
        self.total += 1
        self.rows.append(tuple(_short(cell) for cell in cells))
        del self.rows[:-ROWS_KEPT]


class Extremes(BaseModel):
    """Of one metric: its last value, the least and the greatest finite one, each with its step."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    last: float
    last_step: int
    low: float | None = None
    low_step: int = 0
    high: float | None = None
    high_step: int = 0

    def take(self, value: float, step: int) -> None:
        """One more value."""
        self.last, self.last_step = value, step
        if not math.isfinite(value):
            return
        if self.low is None or value < self.low:
            self.low, self.low_step = value, step
        if self.high is None or value > self.high:
            self.high, self.high_step = value, step


class Tally(BaseModel):
    """How often somebody's commands of one kind took effect, and the last of them."""

    model_config = ConfigDict(extra="forbid")

    by: str
    kind: str
    count: int = 0
    last_step: int = 0
    last_reason: str = ""


class ReportFacts(SavedState):
    """What is known so far; also what survives a restart."""

    model_config = ConfigDict(extra="forbid", frozen=False, ser_json_inf_nan="strings")

    version: Literal[1] = 1
    first_step: int | None = None
    step: int = 0
    epochs: int = 0
    started: datetime | None = None
    began: datetime | None = None
    """Of this attempt."""
    now: datetime | None = None
    """The time of the newest event."""
    earlier_s: float = 0.0
    """How long the attempts before took, as far as they were saved."""
    outcome: str = "unknown"
    """Or "completed", "stopped", "interrupted", "failed"."""
    reason: str = "the run ended, and nobody said how"
    deterministic: bool = True
    metrics: dict[str, Extremes] = Field(default_factory=dict[str, Extremes])
    step_metrics: dict[str, Extremes] = Field(default_factory=dict[str, Extremes])
    """Of the last step of each window: what is known before the first epoch has ended."""
    tallies: list[Tally] = Field(default_factory=list[Tally])
    commands: Rows = Field(default_factory=Rows)
    checkpoints: Rows = Field(default_factory=Rows)
    committed: int = 0
    checkpoints_failed: int = 0
    uploaded: int = 0
    alerts: Rows = Field(default_factory=Rows)
    open_alerts: list[str] = Field(default_factory=list[str])
    failures: Rows = Field(default_factory=Rows)
    resumed: Rows = Field(default_factory=Rows)

    @property
    def duration_s(self) -> float:
        """Of all attempts, between their events."""
        here = (self.now - self.began).total_seconds() if self.now and self.began else 0.0
        return self.earlier_s + max(0.0, here)

    def take(self, event: Event) -> None:
        """Take in what an event says."""
        if self.began is None:
            self.began = event.time
            self.started = self.started or event.time
        self.now = event.time
        self.step = max(self.step, event.step)
        match event:
            case StepsCompleted():
                if not self.epochs:
                    last = {name: column[-1].item() for name, column in event.metrics.items()}
                    self._measure(self.step_metrics, last, event.step)
            case EpochCompleted():
                self.epochs += 1
                means = {name: v for name, v in event.metrics.items() if not name.startswith("val_")}
                self._measure(self.metrics, means, event.step)
            case EvalCompleted():
                means = {f"val_{name}": value for name, value in event.metrics.items()}
                self._measure(self.metrics, means, event.step)
            case CommandApplied():
                self._applied(event)
            case CommandRejected():
                by = event.command.cause.subscriber if event.command.cause else ""
                self.commands.add(f"{event.step:,}", by, told(event.command), f"rejected: {event.reason}")
            case AlertRaised():
                self.alerts.add(f"{event.step:,}", event.severity, event.name, event.message)
                if event.name not in self.open_alerts:
                    self.open_alerts = [*self.open_alerts, event.name][-ROWS_KEPT:]
            case AlertResolved():
                self.alerts.add(f"{event.step:,}", "resolved", event.name, event.message)
                self.open_alerts = [name for name in self.open_alerts if name != event.name]
            case SubscriberFailed():
                self.failures.add(
                    f"{event.step:,}", event.subscriber, f"failed on {event.event_kind}: {event.error}"
                )
            case SubscriberLagged():
                self.failures.add(f"{event.step:,}", event.subscriber, f"{event.dropped:,} events dropped")
            case SubscriberDisabled():
                self.failures.add(f"{event.step:,}", event.subscriber, f"switched off: {event.reason}")
            case LoopStalled():
                self.failures.add(
                    f"{event.step:,}", event.subscriber, f"training waited {event.waited_s:.1f} s for it"
                )
            case _:
                self._of_run_or_checkpoint(event)

    def resume(self) -> None:
        """Go on from a cut, in another attempt."""
        self.earlier_s, self.began, self.now = self.duration_s, None, None

    def _of_run_or_checkpoint(self, event: Event) -> None:
        step = f"{event.step:,}"
        match event:
            case RunStarted():
                self.first_step = event.step
            case RunResumed():
                self.resumed.add(step, file_name(event.path))
            case RunCompleted():
                self.reason, self.deterministic = event.reason, event.deterministic
                ended = {"completed": "completed", **dict.fromkeys(TO_BE_CONTINUED, "interrupted")}
                self.outcome = ended.get(event.reason, "stopped")
            case RunFailed():
                self.reason, self.outcome = _short(event.error), "failed"
            case CheckpointCommitted():
                self.committed += 1
                took = f"{size_text(event.size_bytes)} in {event.duration_s:.2f} s"
                self.checkpoints.add(step, "committed", file_name(event.path), took)
            case CheckpointFailed():
                self.checkpoints_failed += 1
                self.checkpoints.add(step, "failed", file_name(event.path) or event.tag or "", event.error)
            case CheckpointSkipped():
                waiting = f"{event.in_flight} were still being written"
                self.checkpoints.add(step, "skipped", event.tag or "", waiting)
            case CheckpointRestored():
                what = "state" if event.part == "all" else "weights"
                put_back = f"{what} of step {event.restored_step:,}"
                self.checkpoints.add(step, "restored", event.tag or file_name(event.path), put_back)
            case CheckpointUploaded():
                self.uploaded += 1
            case CheckpointUploadFailed():
                self.checkpoints.add(step, "upload failed", file_name(event.path), event.error)
            case _:
                pass

    def _applied(self, event: CommandApplied) -> None:
        command = event.command
        by = command.cause.subscriber if command.cause is not None else ""
        tally = next((one for one in self.tallies if (one.by, one.kind) == (by, command.kind)), None)
        if tally is None and len(self.tallies) < NAMES_KEPT:
            self.tallies.append(tally := Tally(by=by, kind=command.kind))
        if tally is not None:
            tally.count += 1
            tally.last_step, tally.last_reason = event.step, _short(command.reason)
        if command.kind != "take_snapshot":  # of which policies make many, and which change nothing
            self.commands.add(f"{event.step:,}", by, told(command), command.reason)

    @staticmethod
    def _measure(measured: dict[str, Extremes], values: dict[str, Number], step: int) -> None:
        for name, value in values.items():
            if name in measured:
                measured[name].take(float(value), step)
            elif len(measured) < NAMES_KEPT:
                measured[name] = Extremes(last=math.nan, last_step=step)
                measured[name].take(float(value), step)


def told(command: Command) -> str:
    """What a command asked for, in words."""
    values = {
        name: value
        for name, value in command.model_dump(exclude={"kind", "reason", "cause", "due", "path"}).items()
        if value is not None
    }
    shown = ", ".join(
        f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in values.items()
    )
    return f"{command.kind}({shown})"


def file_name(path: str) -> str:
    """The last part of a path, which says nothing of the machine."""
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def size_text(size_bytes: int) -> str:
    """1234567 -> "1.2 MB"."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def duration_text(duration_s: float) -> str:
    """3725.2 -> "1 h 2 min 5 s"."""
    if duration_s < 60:
        return f"{duration_s:.1f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count)


def _short(text: str) -> str:
    return text if len(text) <= TEXT_KEPT else f"{text[: TEXT_KEPT - 1]}…"
