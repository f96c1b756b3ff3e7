"""``MaxTime``: stops the run when its time is used up."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from datetime import timedelta
from time import monotonic
from typing import Annotated, Any, Literal

from pydantic import Field

from eventtrain.bus.options import Lag
from eventtrain.errors import ConfigurationError
from eventtrain.events import RunResumed, RunStarted
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers.base import RunContext
from eventtrain.subscribers.policies.policy import Policy
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_number


class MaxTimeState(SavedState):
    """State of a ``MaxTime``."""

    version: Literal[1] = 1
    elapsed_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MaxTime(Policy[MaxTimeState]):
    """Stops the run when the time that it and its predecessors took is used up.

    Args:
        max_time: seconds, a ``timedelta``, or "DD:HH:MM:SS" as for Lightning's Timer.
        clock: returns seconds since some moment, never decreasing.
        timer: ``threading.Timer``, or a fake of it: calls a function after a number of seconds, on its own thread.

    The time counts from the start of the run; compiling, evaluations, pauses and waiting for data are part of it. When
    it is over the run stops at the next boundary, also while it waits for data or is paused; a step or a compilation
    under way is finished first. That depends on the clock, so RunCompleted has ``deterministic=False``. Every ``fit``
    has the whole time, unless a saved state was loaded; if that leaves none, the run stops before its first step. With
    a larger ``max_time``, ``fit(resume=True)`` continues a run that this stopped.

    Raises:
        ConfigurationError: the time is not positive, or text of another form.
    """

    _initial = MaxTimeState(elapsed_s=0.0)
    events = (RunStarted, RunResumed)
    lag: Lag = {RunStarted: 0}  # noqa: RUF012  # read only

    @checked
    def __init__(
        self,
        max_time: float | str | timedelta,
        *,
        clock: Callable[[], float] = monotonic,
        timer: Callable[[float, Callable[[], None]], Any] = threading.Timer,  # Any: or a fake of it
    ) -> None:
        self._max_s = _seconds(max_time)
        self._reason = f"max time: {self._max_s:g} s are used up"
        self._clock = clock
        self._make_timer = timer
        self._timer: Any = None
        self._run: RunContext | None = None
        self._before_s = 0.0
        self._began_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds used so far, by this run and those before it whose state was loaded. Any thread."""
        began_s = self._began_s
        return self._before_s + (self._clock() - began_s if began_s is not None else 0.0)

    async def start(self, run: RunContext) -> None:
        """Starts the time, from 0 unless a state was loaded."""
        await super().start(run)
        self._run = run
        self._began_s = self._clock()

    async def handle(self, event: RunStarted | RunResumed) -> None:
        """Starts the timer, for the rest of the time."""
        if self._timer is not None:
            return
        left_s = self._max_s - self.elapsed_s
        if left_s <= 0:
            self._stop_run()
            return
        self._timer = self._make_timer(min(left_s, threading.TIMEOUT_MAX), self._stop_run)
        self._timer.daemon = True
        self._timer.start()

    def _stop_run(self) -> None:
        assert self._run is not None
        self._run.control.stop(reason=self._reason, final=False)

    async def stop(self) -> None:
        """Adds this run's time to the time used."""
        await super().stop()
        if self._timer is not None:
            self._timer.cancel()
        self._before_s, self._began_s, self._timer = self.elapsed_s, None, None

    def _get_state(self) -> MaxTimeState:
        return MaxTimeState(elapsed_s=self.elapsed_s)

    def _set_state(self, state: MaxTimeState) -> None:
        self._before_s = state.elapsed_s


def _seconds(max_time: float | str | timedelta) -> float:
    if isinstance(max_time, str):
        found = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", max_time, re.ASCII)
        if found is None:
            raise ConfigurationError(
                f'MaxTime(max_time={max_time!r}): text must have the form "DD:HH:MM:SS", for example "00:12:00:00" for '
                "12 hours; a number means seconds."
            )
        days, hours, minutes, seconds = map(int, found.groups())
        max_time = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    seconds = max_time.total_seconds() if isinstance(max_time, timedelta) else max_time
    require_number("MaxTime", "max_time", seconds, above=0)
    return seconds
