"""``Frames``: what changed on a dashboard since a reader last looked, made once for all readers.

A frame is JSON text. A reader that has the frame before gets what changed since; any other, new or slow, gets
everything. So nothing is queued for a reader: however long it does not read, it costs the text that is being sent.

Frames are idempotent: a section replaces the one before, and a curve is cut at the bucket where the new ones begin. So
the full frame of a number may already contain what the next one brings.
"""

from __future__ import annotations

import base64
import json
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol

import numpy as np

from eventtrain.bus.subscription import SubscriptionStatistics
from eventtrain.control.loop_statistics import LoopStatistics
from eventtrain.events import Event, StepCompleted, StepsCompleted
from eventtrain.events.models import Number
from eventtrain.subscribers._shared.curve import Curve
from eventtrain.subscribers._shared.step_table import follows
from eventtrain.subscribers.dashboard.observed_run import SECTIONS, ObservedRun, Section

INTERVAL_S = 0.2
"""Between two frames, at least: a page shows the newest step within this time and that of a window."""
MOST_WINDOWS = 64
"""Events of a run in progress that wait for a frame, while no page is open."""
MOST_ROWS = 1000
"""The same of a run that is read from its log."""
FIGURES_S = 1.0
"""Between two readings of a run's statistics."""


class LiveRun(Protocol):
    """A run in progress, which is asked for what no event tells. Any thread; never blocks."""

    def hyperparams(self) -> Mapping[str, Number]:
        """The values in effect."""
        ...

    def sample_names(self) -> Sequence[str]:
        """The samples that can be requested."""
        ...

    def loop_statistics(self) -> LoopStatistics:
        """The training thread's time by what it was spent on."""
        ...

    def statistics(self) -> Mapping[str, SubscriptionStatistics]:
        """The figures of every subscription, by name."""
        ...


@dataclass
class ShownRun:
    """One run of a dashboard.

    Attributes:
        title: for people.
        observed: what its events told. Guarded by ``lock``; ``up_to_date`` takes it.
        live: None after the run has ended, and for a run that is read from files.
        can_control: whether commands may reach it.
    """

    title: str
    observed: ObservedRun
    live: LiveRun | None = None
    can_control: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    figures: dict[str, Any] = field(default_factory=dict[str, Any])
    """Sections made from the statistics of the live run; of an ended one, its last."""
    _waiting: deque[Event] = field(default_factory=deque[Event])
    _read_s: float = 0.0
    _before: tuple[float, dict[str, SubscriptionStatistics]] | None = None

    def add(self, event: Event) -> None:
        """Adds an event. Never waits: most are left for the next frame, which adds many windows as one."""
        self._waiting.append(event)
        if len(self._waiting) >= MOST_WINDOWS and self.lock.acquire(blocking=False):
            try:
                self._take_waiting()
            finally:
                self.lock.release()

    def put(self, event: Event) -> None:
        """Adds an event of a log. Blocks while a frame is being made."""
        self._waiting.append(event)
        if len(self._waiting) >= MOST_ROWS:
            with self.lock:
                self._take_waiting()

    @contextmanager
    def up_to_date(self) -> Generator[ObservedRun]:
        """Holds the lock, and gives what all events told that were added so far."""
        with self.lock:
            self._take_waiting()
            yield self.observed

    def _take_waiting(self) -> None:
        """Adds what waits; consecutive steps, or windows of them, together."""
        group: list[Any] = []
        while self._waiting:
            event = self._waiting.popleft()
            if group and not follows(event, group[-1]):
                self.observed.add_steps(group)
                group = []
            if isinstance(event, (StepCompleted, StepsCompleted)):
                group.append(event)
            else:
                self.observed.add(event)
        if group:
            self.observed.add_steps(group)

    def read_figures(self, *, at_once: bool = False) -> None:
        """Reads the statistics, if there is something to ask and it is time."""
        live, now_s = self.live, monotonic()
        if live is None or (now_s - self._read_s < FIGURES_S and not at_once):
            return
        self._read_s = now_s
        subscribers = dict(live.statistics())
        before_s, before = self._before or (now_s, {})
        self._before = (now_s, subscribers)
        self.figures = {
            "values": {name: _plain(value) for name, value in live.hyperparams().items()},
            "sample_names": list(live.sample_names()),
            "loop": _loop_row(live.loop_statistics()),
            "subscribers": [
                _subscriber_row(one, before.get(name), now_s - before_s) for name, one in subscribers.items()
            ],
        }


class Frames:
    """The frames of some runs. Any thread; ``after`` takes some milliseconds at most.

    Args:
        runs: returns those to show, in their order.
    """

    def __init__(self, runs: Callable[[], Iterable[ShownRun]]) -> None:
        self._runs = runs
        self._lock = threading.Lock()
        self._number = 0
        self._made_s = -INTERVAL_S
        self._change: str | None = None
        self._everything: tuple[int, str] | None = None
        self._sent: dict[str, _Sent] = {}

    def after(self, seen: int | None) -> tuple[int, str | None]:
        """Returns the number and the text of the next frame for a reader; None as text if it is up to date.

        Args:
            seen: number of its last frame; None for a new reader.
        """
        with self._lock:
            now_s = monotonic()
            if now_s - self._made_s >= INTERVAL_S:
                self._made_s = now_s
                self._make_change()
            if seen == self._number:
                return self._number, None
            if seen is not None and seen == self._number - 1:
                return self._number, self._change
            if self._everything is None or self._everything[0] != self._number:
                runs = {run.observed.run_id: _entry(run, _Sent()) for run in self._runs()}
                self._everything = self._number, _text({"full": True, "runs": runs})
            return self._everything

    def _make_change(self) -> None:
        """Counts another frame, if there is something new."""
        runs = {run.observed.run_id: run for run in self._runs()}
        gone = self._sent.keys() - runs.keys()
        changed: dict[str, Any] = {}
        for run_id, run in runs.items():
            run.read_figures()
            entry = _entry(run, self._sent.setdefault(run_id, _Sent()))
            if entry:
                changed[run_id] = entry
        for run_id in gone:
            del self._sent[run_id]
        if changed or gone:
            self._number += 1
            self._change = _text({"full": False, "runs": changed, "gone": sorted(gone)})


@dataclass
class _Sent:
    """Marks of everything of one run that the frames so far contained."""

    edits: dict[str, Any] = field(default_factory=dict[str, Any])
    marks: dict[tuple[str, str], tuple[int, int, int]] = field(
        default_factory=dict[tuple[str, str], tuple[int, int, int]]
    )


def _entry(run: ShownRun, sent: _Sent) -> dict[str, Any]:
    """Returns what of ``run`` was not sent, and notes it as sent."""
    entry: dict[str, Any] = {}
    with run.up_to_date() as observed:
        changed: list[Section] = [name for name in SECTIONS if sent.edits.get(name) != observed.edits(name)]
        if changed:
            for name in changed:
                sent.edits[name] = observed.edits(name)
            entry = json.loads(observed.model_dump_json(include=set(changed)))
        curves: dict[str, dict[str, Any]] = {}
        for kind, named in observed.curves().items():
            for name, curve in named.items():
                mark = sent.marks.get((kind, name), (0, 0, 0))
                if curve.mark != mark:
                    sent.marks[kind, name] = curve.mark
                    start = max(0, mark[1] - 1) if mark[0] == curve.width else 0
                    curves.setdefault(kind, {})[name] = encoded(curve, start)
    if curves:
        entry["curves"] = curves
    for name, figures in {**run.figures, "title": run.title, "can_control": run.can_control}.items():
        if name not in sent.edits or sent.edits[name] != figures:
            sent.edits[name] = entry[name] = figures
    return entry


def encoded(curve: Curve, start: int) -> list[Any]:
    """Returns ``[width, start, data]``: float64 in base64, which costs a hundredth of JSON numbers.

    ``data`` has the rows steps and values if each bucket holds one point (``width`` is 1); else steps, means, lows and
    highs.
    """
    points = curve.points(start)
    rows = (
        (points.steps, points.means)
        if points.exact
        else (points.steps, points.means, points.lows, points.highs)
    )
    data = np.stack(rows).astype("<f8").tobytes()
    return [curve.width, start, base64.b64encode(data).decode()]


def _loop_row(loop: LoopStatistics) -> dict[str, float]:
    names = ("duration_s", "data_wait_s", "dispatch_s", "device_wait_s", "observer_wait_s", "observing_s")
    return {"step": loop.step, **{name: round(getattr(loop, name), 3) for name in names}}


def _subscriber_row(
    one: SubscriptionStatistics, before: SubscriptionStatistics | None, passed_s: float
) -> dict[str, Any]:
    cpu = 0.0
    if before is not None and passed_s > 0:
        cpu = max(0.0, one.handler_cpu_s - before.handler_cpu_s) / passed_s
    return {
        "name": one.name,
        "state": one.state,
        "delivered": one.delivered,
        "errors": one.errors,
        "dropped": one.dropped,
        "pending": one.pending,
        "lag_s": round(one.lag_s, 3),
        "cpu": round(cpu, 4),
        "cpu_s": round(one.handler_cpu_s, 3),
        "longest_s": round(one.longest_slice_s, 4),
    }


def _plain(value: Number) -> Any:
    return value if isinstance(value, (bool, int)) or np.isfinite(value) else str(value)


def _text(frame: Any) -> str:
    return json.dumps(frame, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
