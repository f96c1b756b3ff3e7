"""``RunSummary``: what a report shows of a run besides its curves, collected from events in bounded memory. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Literal

import numpy as np
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
    SampleTaken,
    StepsCompleted,
    SubscriberDisabled,
    SubscriberFailed,
    SubscriberLagged,
)
from eventtrain.events.base import LifecycleEvent
from eventtrain.events.models import Array, Number
from eventtrain.subscribers._shared.display_text import clipped, command_text, file_name, issuer, size_text
from eventtrain.subscribers._shared.shown_sample import ShownSample, with_sample
from eventtrain.subscribers._shared.state import SavedState

MOST_ROWS = 100
"""Of each list; the newest are kept, and all are counted."""
MOST_NAMES = 200
MOST_TEXT = 500
MOST_CELLS = 1024
"""Of an array that is shown; of a larger one only the shape is."""

REPORTED = (
    LifecycleEvent,
    EvalCompleted,
    CommandApplied,
    CommandRejected,
    SubscriberFailed,
    SubscriberLagged,
    SubscriberDisabled,
    LoopStalled,
    SampleTaken,
)
"""Events for ``RunSummary.add``, besides StepsCompleted."""


class Rows(BaseModel):
    """The newest rows of a table, oldest first, and the number of all."""

    model_config = ConfigDict(extra="forbid")

    total: int = 0
    rows: list[tuple[str, ...]] = Field(default_factory=list[tuple[str, ...]])

    def add(self, *cells: str) -> None:
        """Adds a row; long text is cut."""
        self.total += 1
        self.rows.append(tuple(_short(cell) for cell in cells))
        del self.rows[:-MOST_ROWS]


class Extremes(BaseModel):
    """The last value of a metric, and the lowest and the highest finite one, each with its step."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    last: float
    last_step: int
    low: float | None = None
    low_step: int = 0
    high: float | None = None
    high_step: int = 0

    def add(self, value: float, step: int) -> None:
        """Adds the next value."""
        self.last, self.last_step = value, step
        if not math.isfinite(value):
            return
        if self.low is None or value < self.low:
            self.low, self.low_step = value, step
        if self.high is None or value > self.high:
            self.high, self.high_step = value, step


class LastArray(BaseModel):
    """The last value of an array that metrics with state computed; None if it is too large to be shown."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

    step: int
    type: str
    value: Array | None


class Tally(BaseModel):
    """How often commands of one kind from one subscriber took effect, and the last of them."""

    model_config = ConfigDict(extra="forbid")

    by: str
    kind: str
    count: int = 0
    last_step: int = 0
    last_reason: str = ""


class RunSummary(SavedState):
    """The summary so far; also the state in a checkpoint.

    Attributes:
        began: when this attempt began.
        now: time of the newest event.
        earlier_s: duration of the attempts before, as far as they were saved.
        outcome: "unknown", "completed", "stopped", "interrupted" or "failed".
        step_metrics: of the last step of each window, for a run that ends before its first epoch does.
    """

    model_config = ConfigDict(extra="forbid", frozen=False, ser_json_inf_nan="strings")

    version: Literal[1] = 1
    first_step: int | None = None
    step: int = 0
    epochs: int = 0
    started: datetime | None = None
    began: datetime | None = None
    now: datetime | None = None
    earlier_s: float = 0.0
    outcome: str = "unknown"
    reason: str = "the run ended without an event"
    deterministic: bool = True
    metrics: dict[str, Extremes] = Field(default_factory=dict[str, Extremes])
    arrays: dict[str, LastArray] = Field(default_factory=dict[str, LastArray])
    step_metrics: dict[str, Extremes] = Field(default_factory=dict[str, Extremes])
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
    samples: list[ShownSample] = Field(default_factory=list[ShownSample])

    @property
    def duration_s(self) -> float:
        """Duration of all attempts, from the first to the last event of each."""
        here = (self.now - self.began).total_seconds() if self.now and self.began else 0.0
        return self.earlier_s + max(0.0, here)

    def resume(self) -> None:
        """Begins another attempt."""
        self.earlier_s, self.began, self.now = self.duration_s, None, None

    def add(self, event: Event) -> None:
        """Adds an event."""
        if self.began is None:
            self.began = event.time
            self.started = self.started or event.time
        self.now = event.time
        self.step = max(self.step, event.step)
        self._add_progress(event)
        self._add_checkpoint(event)
        self._add_message(event)

    def _add_progress(self, event: Event) -> None:
        match event:
            case StepsCompleted():
                if not self.epochs:
                    last = {name: column[-1].item() for name, column in event.metrics.items()}
                    _measure(self.step_metrics, last, event.step)
            case EpochCompleted():
                self.epochs += 1
                means = {name: mean for name, mean in event.metrics.items() if not name.startswith("val_")}
                _measure(self.metrics, means, event.step)
                self._keep(event.arrays, event.step)
            case EvalCompleted():
                values = {f"val_{name}": value for name, value in event.metrics.items()}
                _measure(self.metrics, values, event.step)
                self._keep({f"val_{name}": array for name, array in event.arrays.items()}, event.step)
            case RunStarted():
                self.first_step = event.step
            case RunResumed():
                self.resumed.add(f"{event.step:,}", file_name(event.path))
            case RunCompleted():
                self.reason, self.deterministic = event.reason, event.deterministic
                outcomes = {"completed": "completed", **dict.fromkeys(TO_BE_CONTINUED, "interrupted")}
                self.outcome = outcomes.get(event.reason, "stopped")
            case RunFailed():
                self.reason, self.outcome = _short(event.error), "failed"
            case _:
                pass

    def _keep(self, arrays: Mapping[str, np.ndarray], step: int) -> None:
        for name, array in arrays.items():
            if name in self.arrays or len(self.arrays) < MOST_ROWS:
                value = array if array.size <= MOST_CELLS else None
                self.arrays[name] = LastArray(
                    step=step, type=f"{array.dtype}{list(array.shape)}", value=value
                )

    def _add_checkpoint(self, event: Event) -> None:
        step = f"{event.step:,}"
        match event:
            case CheckpointCommitted():
                self.committed += 1
                size = f"{size_text(event.size_bytes)} in {event.duration_s:.2f} s"
                self.checkpoints.add(step, "committed", file_name(event.path), size)
            case CheckpointFailed():
                self.checkpoints_failed += 1
                self.checkpoints.add(step, "failed", file_name(event.path) or event.tag or "", event.error)
            case CheckpointSkipped():
                reason = f"{event.in_flight} were still being written"
                self.checkpoints.add(step, "skipped", event.tag or "", reason)
            case CheckpointRestored():
                part = "state" if event.part == "all" else "weights"
                restored = f"{part} of step {event.restored_step:,}"
                self.checkpoints.add(step, "restored", event.tag or file_name(event.path), restored)
            case CheckpointUploaded():
                self.uploaded += 1
            case CheckpointUploadFailed():
                self.checkpoints.add(step, "upload failed", file_name(event.path), event.error)
            case _:
                pass

    def _add_message(self, event: Event) -> None:
        step = f"{event.step:,}"
        match event:
            case CommandApplied():
                self._count(event)
                if event.command.kind != "take_snapshot":  # policies take many, and they change nothing
                    command = event.command
                    self.commands.add(step, issuer(command), command_text(command), command.reason)
            case CommandRejected():
                command = event.command
                rejected = f"rejected: {event.reason}"
                self.commands.add(step, issuer(command), command_text(command), rejected)
            case AlertRaised():
                self.alerts.add(step, event.severity, event.name, event.message)
                if event.name not in self.open_alerts:
                    self.open_alerts = [*self.open_alerts, event.name][-MOST_ROWS:]
            case AlertResolved():
                self.alerts.add(step, "resolved", event.name, event.message)
                self.open_alerts = [name for name in self.open_alerts if name != event.name]
            case SubscriberFailed():
                times = f" ({event.count:,} times)" if event.count > 1 else ""
                self.failures.add(
                    step, event.subscriber, f"failed on {event.event_kind}{times}: {event.error}"
                )
            case SubscriberLagged():
                self.failures.add(step, event.subscriber, f"{event.dropped:,} events dropped")
            case SubscriberDisabled():
                self.failures.add(step, event.subscriber, f"disabled: {event.reason}")
            case LoopStalled():
                self.failures.add(step, event.subscriber, f"training waited {event.waited_s:.1f} s for it")
            case SampleTaken():
                self.samples = with_sample(self.samples, event)
            case _:
                pass

    def _count(self, event: CommandApplied) -> None:
        by, kind = issuer(event.command), event.command.kind
        tally = next((one for one in self.tallies if (one.by, one.kind) == (by, kind)), None)
        if tally is None and len(self.tallies) < MOST_NAMES:
            self.tallies.append(tally := Tally(by=by, kind=kind))
        if tally is not None:
            tally.count += 1
            tally.last_step, tally.last_reason = event.step, _short(event.command.reason)


def _measure(measured: dict[str, Extremes], values: dict[str, Number], step: int) -> None:
    for name, value in values.items():
        if name not in measured and len(measured) < MOST_NAMES:
            measured[name] = Extremes(last=math.nan, last_step=step)
        if name in measured:
            measured[name].add(float(value), step)


def _short(text: str) -> str:
    return clipped(text, MOST_TEXT)
