"""``OverheadMeter``: the share of time that observing a run takes, with a warning if that is too much."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

import numpy as np

from eventtrain.bus.subscription import SubscriptionStatistics
from eventtrain.control.loop_statistics import LoopStatistics
from eventtrain.events import (
    AlertRaised,
    AlertResolved,
    EpochCompleted,
    EpochStarted,
    EvalCompleted,
    MachineMeasured,
    RunCompleted,
    StepsCompleted,
)
from eventtrain.events.models import Number
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_number

logger = logging.getLogger("eventtrain")

WINDOWS_KEPT = 1_000
"""The median pace is that of this many of the newest windows at most."""
NAMED = 3
"""Number of subscribers that a warning names: those whose handlers took most time."""


class OverheadState(SavedState):
    """State saved with checkpoints."""

    version: Literal[1] = 1
    alarmed: bool
    began_s: float | None = None
    """When the run first began, in seconds since 1970."""
    productive_s: float = 0.0
    """Time of the steps up to the checkpoint, at their median pace."""


class Goodput:
    """The share of a run's time that its steps take at their median pace. ``began_s``: seconds since 1970."""

    def __init__(self, began_s: float, productive_s: float = 0.0) -> None:
        self.began_s = began_s
        self._before_s = productive_s
        self._steps = 0
        self._windows: deque[tuple[float, int]] = deque(maxlen=WINDOWS_KEPT)
        self._last: datetime | None = None

    def add(self, event: StepsCompleted) -> None:
        """Counts the steps of a window, and their pace if it follows another one."""
        last, self._last = self._last, event.time
        steps = event.last_step - event.first_step + 1
        self._steps += steps
        if last is not None:
            self._windows.append((max(0.0, (event.time - last).total_seconds()) / steps, steps))

    def skip(self, until: datetime) -> None:
        """The time up to ``until`` is not one of steps."""
        self._last = until

    @property
    def productive_s(self) -> float:
        """Time of the steps so far, those of earlier attempts included, at the median pace of each attempt."""
        if not self._windows:
            return self._before_s
        step_s, weights = zip(*self._windows, strict=True)
        median_s = float(np.quantile(step_s, 0.5, weights=weights, method="inverted_cdf"))
        return self._before_s + self._steps * median_s

    def share(self, now_s: float) -> float:
        """Returns the share up to ``now_s``, in seconds since 1970; at most 1."""
        elapsed_s = now_s - self.began_s
        return min(1.0, self.productive_s / elapsed_s) if elapsed_s > 0 else 0.0


class OverheadMeter(Subscriber):
    """Publishes what share of the training thread's time went to subscribers, and warns if it exceeds ``budget``.

    The share is the time of transferring metrics and of waiting for subscribers (``LoopStatistics``), as a part of all
    time. The warning is a line in the log and an ``AlertRaised`` named "overhead"; ``AlertResolved`` follows when it is
    within the budget again. Each measurement is a ``MachineMeasured`` with ``overhead_share``, ``observing_s``,
    ``observer_wait_s``, ``duration_s`` and, for each subscriber, ``handler_cpu_s/NAME`` and ``handler_wall_s/NAME``, of
    the time since the one before. Handlers run beside training: their time is not overhead unless training waits.

    ``goodput_share`` is of the whole run: the time that its steps take at their median pace, as a part of the time
    since the run first began. Compiling, evaluating, waiting, the time between two attempts, and steps that an attempt
    had to repeat all lower it. In a run that resumes it continues from the checkpoint.

    Args:
        budget: the share up to which there is no warning.
        every_s: seconds between two measurements, at least; the last one is at the end of the run.

    Raises:
        ConfigurationError: an argument is invalid.
    """

    events = (EpochStarted, EvalCompleted, StepsCompleted, EpochCompleted, RunCompleted)

    @checked
    def __init__(self, budget: float = 0.05, *, every_s: float = 10.0) -> None:
        require_number("OverheadMeter", "budget", budget, at_least=0)
        require_number("OverheadMeter", "every_s", every_s, above=0)
        self._budget = budget
        self._interval_s = every_s
        self._run: RunContext | None = None
        self._loop = LoopStatistics()
        self._subscribers: Mapping[str, SubscriptionStatistics] = {}
        self._alarmed = False
        self._loaded: OverheadState | None = None
        self._goodput = Goodput(time.time())

    async def start(self, run: RunContext) -> None:
        """Begins to count."""
        self._run, loaded, self._loaded = run, self._loaded, None
        self._alarmed = loaded is not None and loaded.alarmed
        began_s, productive_s = (loaded.began_s, loaded.productive_s) if loaded is not None else (None, 0.0)
        self._goodput = Goodput(time.time() if began_s is None else began_s, productive_s)
        self._loop, self._subscribers = LoopStatistics(), run.statistics()

    def state_dict(self) -> dict[str, Any]:
        """Returns whether the alert is raised, and what ``goodput_share`` continues from, as plain JSON data."""
        began_s, productive_s = self._goodput.began_s, self._goodput.productive_s
        return OverheadState(alarmed=self._alarmed, began_s=began_s, productive_s=productive_s).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a saved state, so that an alert that the run raised before is resolved. Raises StateError."""
        self._loaded = OverheadState.parse(self.name or "OverheadMeter", state)

    async def handle(
        self, event: EpochStarted | EvalCompleted | StepsCompleted | EpochCompleted | RunCompleted
    ) -> None:
        """Measures if it is time, and at the end of the run."""
        if isinstance(event, StepsCompleted):
            self._goodput.add(event)
        elif isinstance(event, (EpochStarted, EvalCompleted)):
            self._goodput.skip(event.time)
            return
        step, at_least_s = event.step, 0.0 if isinstance(event, RunCompleted) else self._interval_s
        run = self._run
        if run is None:
            return
        loop = run.loop_statistics()
        duration_s = loop.duration_s - self._loop.duration_s
        if duration_s <= at_least_s or loop.steps == self._loop.steps:
            return
        subscribers = run.statistics()
        observing_s = loop.observing_s - self._loop.observing_s
        waited_s = loop.observer_wait_s - self._loop.observer_wait_s
        share = (observing_s + waited_s) / duration_s
        wall_s: dict[str, float] = {}
        metrics: dict[str, Number] = {
            "overhead_share": share,
            "observing_s": observing_s,
            "observer_wait_s": waited_s,
            "duration_s": duration_s,
            "goodput_share": self._goodput.share(time.time()),
        }
        for name, now in subscribers.items():
            before = self._subscribers.get(name)
            wall_s[name] = now.handler_wall_s - (before.handler_wall_s if before else 0.0)
            metrics[f"handler_wall_s/{name}"] = wall_s[name]
            metrics[f"handler_cpu_s/{name}"] = now.handler_cpu_s - (before.handler_cpu_s if before else 0.0)
        first = self._loop.steps == 0
        self._loop, self._subscribers = loop, subscribers
        source = self.name or "OverheadMeter"
        await run.publish_async(MachineMeasured(step=step, source=source, metrics=metrics))
        if first or duration_s >= self._interval_s / 2:  # the last moments of a run mean little
            text = f"{share:.1%} of the last {duration_s:.3g} s went to subscribers"
            text += f", {waited_s:.3g} s to waiting for them"
            await self._judge(run, step, share, text, wall_s)

    async def _judge(
        self, run: RunContext, step: int, share: float, text: str, wall_s: Mapping[str, float]
    ) -> None:
        if (share > self._budget) == self._alarmed:
            return
        self._alarmed = not self._alarmed
        if not self._alarmed:
            logger.info("Overhead is within its budget again: %s", text)
            await run.publish_async(AlertResolved(step=step, name="overhead", message=text))
            return
        busiest = sorted(wall_s, key=lambda name: wall_s[name], reverse=True)[:NAMED]
        handlers = ", ".join(f"{name} {wall_s[name]:.3g} s" for name in busiest if wall_s[name])
        text += f" (budget {self._budget:.1%}); the handlers that took most time: {handlers or 'none'}"
        logger.warning("Overhead: %s", text)
        alert = AlertRaised(step=step, name="overhead", message=text, metric="overhead_share", value=share)
        await run.publish_async(alert)
