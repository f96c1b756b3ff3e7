"""``summarise``: where a run is and how it ended, from its folder. Blocking."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any, Literal

from pydantic_core import from_json

from eventtrain.errors import ConfigurationError
from eventtrain.events import Event
from eventtrain.events.models import Number
from eventtrain.runs.finding import find_log
from eventtrain.runs.journal import JSONLJournal
from eventtrain.runs.owner import ATTEMPTS, LOCK, owner_of
from eventtrain.runs.reading import read_events
from eventtrain.runs.rows import Wanted, identity_of, wanted

State = Literal["running", "finished", "stopped", "failed", "killed", "unknown"]
LAST_BYTES = 1 << 18
"""Of a log, in which its last events are looked for."""
DEPTH = 3
"""Number of folder levels that are searched for runs."""
SEEN = (
    "run_started",
    "run_completed",
    "run_failed",
    "epoch_started",
    "epoch_completed",
    "hyperparam_changed",
)


@dataclass(frozen=True)
class Extremes:
    """The least and the greatest value of a metric over the epochs, with their steps."""

    minimum: Number
    minimum_step: int
    maximum: Number
    maximum_step: int


@dataclass
class RunSummary:
    """Facts that the folder of a run tells.

    Attributes:
        path: of the run_dir.
        state: "killed" if the run is not in progress and its log does not end; "unknown" if there is no log in JSONL.
        reason: why it was stopped or failed; else empty.
        started, updated: time of the first and of the newest event.
        between_attempts_s: seconds from the last event of an attempt to the first of the next, of all attempts.
        metrics: of the newest epoch, and of the newest step.
        best: metric of epochs -> its extremes; empty unless ``thorough``.
        hyperparams: newest values that the log has.
        problem: why the log cannot be read; else empty.
    """

    path: Path
    state: State = "unknown"
    run_id: str = ""
    attempt: int = 0
    reason: str = ""
    step: int = 0
    epoch: int | None = None
    started: datetime | None = None
    updated: datetime | None = None
    between_attempts_s: float = 0.0
    metrics: dict[str, Number] = field(default_factory=dict[str, Number])
    best: dict[str, Extremes] = field(default_factory=dict[str, Extremes])
    hyperparams: dict[str, Number] = field(default_factory=dict[str, Number])
    log: Path | None = None
    problem: str = ""

    @property
    def duration_s(self) -> float | None:
        """From the first event to the newest one, or to the present while it runs, without ``between_attempts_s``."""
        if self.started is None or self.updated is None:
            return None
        end = datetime.now(UTC) if self.state == "running" else self.updated
        return (end - self.started).total_seconds() - self.between_attempts_s


def find_runs(folder: Path) -> Iterator[Path]:
    """Yields the folders of runs in ``folder``, itself included, in the order of their names."""
    for depth in range(DEPTH + 1):
        pattern = "/".join(["*"] * depth)
        for path in sorted(folder.glob(pattern)) if pattern else (folder,):
            if (path / ATTEMPTS).is_file() or (path / LOCK).is_file():
                yield path


def summarise(run_dir: Path, *, thorough: bool = False) -> RunSummary:
    """Returns what the folder of a run tells.

    Args:
        run_dir: of the run.
        thorough: read the whole log, for ``best`` and all hyperparameters; otherwise only its beginning and its end.
    """
    summary = RunSummary(run_dir)
    owner = owner_of(run_dir)
    is_running = owner is not None and owner.may_run
    if owner is not None:
        summary.run_id, summary.started, summary.updated = owner.run_id, owner.since, owner.since
        summary.state = "running" if is_running else "killed"
    try:
        summary.log = find_log(run_dir)
        if summary.log.suffix == ".jsonl":
            _read_journal(summary, summary.log, thorough)
            ended = summary.state in ("finished", "stopped", "failed")
            summary.state = "running" if is_running else summary.state if ended else "killed"
        else:
            for event in read_events(summary.log):
                _take(summary, event.model_dump(), has_time=False)
    except (ConfigurationError, OSError, ValueError) as error:
        summary.problem = str(error)
    return summary


def _read_journal(summary: RunSummary, log: Path, thorough: bool) -> None:
    journal = JSONLJournal(log, wanted(SEEN, None, ()) if thorough else Wanted())
    first = next(JSONLJournal(log, Wanted()).lines(), None)
    if first is not None:
        summary.started = _time(from_json(first))
    if thorough:
        for line in journal.lines():
            _take(summary, from_json(line))
    last = JSONLJournal(log, Wanted())
    last.skip_near_end(LAST_BYTES)
    for line in last.lines():
        _take(summary, from_json(line))
    if first is not None:
        summary.between_attempts_s = _between_attempts_s(log, identity_of(first).attempt, summary.attempt)


def _between_attempts_s(log: Path, first: int, last: int) -> float:
    """Returns the seconds between the attempts. Rows are in the order of attempts, so a search reads few of them."""
    with log.open("rb") as file:

        def rows_at(offset: int) -> tuple[bytes, bytes]:
            """Returns the rest of the row at ``offset``, and the row after it."""
            file.seek(offset)
            return file.readline(), file.readline()

        def attempt_after(offset: int) -> float:
            row = rows_at(offset)[1]
            return identity_of(row).attempt if row.endswith(b"\n") else inf  # the end, or a torn row

        size = file.seek(0, os.SEEK_END)
        # The lowest offset whose next row is of an attempt is the beginning of the row before that. Attempts without
        # rows, which a resumed run has cut off, lead to the same offset.
        offsets = {
            bisect_left(range(size), attempt, key=attempt_after) for attempt in range(first + 1, last + 1)
        }
        pairs = [rows_at(offset) for offset in offsets]
    return sum(
        (_time(from_json(after)) - _time(from_json(before))).total_seconds() for before, after in pairs
    )


def _take(summary: RunSummary, event: dict[str, Any], *, has_time: bool = True) -> None:
    kind, step = event["kind"], event["step"]
    if has_time:
        summary.updated = _time(event)
        summary.run_id, summary.attempt = event["run_id"], event["attempt"]
    summary.step = max(summary.step, step) if kind != "run_started" else step
    match kind:
        case "run_completed":
            summary.state = "finished" if event["reason"] == "completed" else "stopped"
            summary.reason = "" if event["reason"] == "completed" else event["reason"]
        case "run_failed":
            summary.state, summary.reason = "failed", event["error"]
        case "step_completed":
            summary.metrics |= _numbers(event["metrics"])
            summary.state, summary.reason = "unknown", ""
        case "epoch_started":
            summary.hyperparams |= _numbers(event["hyperparams"])
        case "epoch_completed":
            summary.epoch = event["epoch"] + 1
            summary.metrics |= _numbers(event["metrics"])
            summary.hyperparams |= _numbers(event["hyperparams"])
            _widen(summary, _numbers(event["metrics"]), step)
        case "hyperparam_changed":
            summary.hyperparams[event["name"]] = _numbers({"new": event["new"]})["new"]
        case _:
            pass


def _widen(summary: RunSummary, metrics: dict[str, Number], step: int) -> None:
    for name, value in metrics.items():
        known = summary.best.get(name) or Extremes(value, step, value, step)
        low, at_low = min((known.minimum, known.minimum_step), (value, step))
        high, at_high = max((known.maximum, -known.maximum_step), (value, -step))
        if value == value:  # NaN is not an extreme
            summary.best[name] = Extremes(low, at_low, high, -at_high)


def _numbers(values: dict[str, Any]) -> dict[str, Number]:
    """Returns numbers as they were: JSON has NaN and infinities as text."""
    return {name: float(value) if isinstance(value, str) else value for name, value in values.items()}


def _time(event: dict[str, Any]) -> datetime:
    return Event.model_validate({"time": event["time"]}).time
