"""``MaxTime``: end the run when its time is used up."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from datetime import timedelta
from time import monotonic
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from eventtrain.bus.options import Lag
from eventtrain.control.control import Control
from eventtrain.errors import ConfigurationError
from eventtrain.events import RunResumed, RunStarted
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.validation import require_number
from eventtrain.subscribers.base import RunContext, Subscriber


class Timer(Protocol):
    """What MaxTime needs of ``threading.Timer``."""

    daemon: bool

    def start(self) -> None:
        """Begin to wait."""
        ...

    def cancel(self) -> None:
        """Do nothing when the time has passed."""
        ...


class MaxTimeState(SavedState):
    """What survives a restart."""

    version: Literal[1] = 1
    elapsed_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MaxTime(Subscriber):
    """Stops the run when the time that it and its predecessors took is used up.

    Args:
        max_time: seconds, a ``timedelta``, or "DD:HH:MM:SS" as for Lightning's Timer.
        clock: gives seconds since some moment, and never goes back.
        timer: calls a function after so many seconds, on a thread of its own.

    The time counts from the start of the run; compiling, evaluations, pauses and waiting for data are part of it. When
    it is over the run stops at the next boundary, also while it waits for data or is paused; a step or a compilation
    that runs is finished first. That depends on the clock, so RunCompleted says ``deterministic=False``. Every ``fit``
    has the whole time, unless a saved state was loaded; where that leaves none, the run stops before its first step.
    With a larger ``max_time`` a run that this stopped goes on with ``fit(resume=True)``.

    Raises:
        ConfigurationError: a time that is not positive, or text of another form.
    """

    lag: Lag = {RunStarted: 0}  # noqa: RUF012  # read only

    def __init__(
        self,
        max_time: float | str | timedelta,
        *,
        clock: Callable[[], float] = monotonic,
        timer: Callable[[float, Callable[[], None]], Timer] = threading.Timer,
    ) -> None:
        self._max_s = _seconds(max_time)
        self._reason = f"max time: {self._max_s:g} s are used up"
        self._clock = clock
        self._make_timer = timer
        self._timer: Timer | None = None
        self._run: RunContext | None = None
        self._before_s = 0.0
        self._began_s: float | None = None
        self._loaded = False

    @property
    def elapsed_s(self) -> float:
        """Seconds used so far, by this run and those whose state was carried over. Any thread."""
        began_s = self._began_s
        return self._before_s + (self._clock() - began_s if began_s is not None else 0.0)

    async def start(self, run: RunContext) -> None:
        """The time begins; anew, unless a saved state was loaded."""
        self._run = run
        if not self._loaded:
            self._before_s = 0.0
        self._began_s = self._clock()

    async def on_run_started(self, event: RunStarted, control: Control) -> None:
        """Wait, on a thread of its own, until the rest of the time has passed."""
        self._begin(control)

    async def on_run_resumed(self, event: RunResumed, control: Control) -> None:
        """The same, in a run that goes on from a checkpoint."""
        self._begin(control)

    def _begin(self, control: Control) -> None:
        if self._timer is not None:
            return
        left_s = self._max_s - self.elapsed_s
        if left_s <= 0:
            control.stop(reason=self._reason, final=False)
            return
        self._timer = self._make_timer(min(left_s, threading.TIMEOUT_MAX), self._stop_run)
        self._timer.daemon = True
        self._timer.start()

    def _stop_run(self) -> None:
        assert self._run is not None
        self._run.control.stop(reason=self._reason, final=False)

    async def stop(self) -> None:
        """Count this run's time."""
        if self._timer is not None:
            self._timer.cancel()
        self._before_s, self._began_s, self._timer, self._loaded = self.elapsed_s, None, None, False

    def state_dict(self) -> dict[str, Any]:
        """The seconds used so far, as plain JSON data."""
        return MaxTimeState(elapsed_s=self.elapsed_s).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the seconds over; the run that follows has only the rest.

        Raises:
            StateError: another version, or broken.
        """
        self._before_s = MaxTimeState.parse(self.name or "MaxTime", state).elapsed_s
        self._loaded = True


def _seconds(max_time: float | str | timedelta) -> float:
    if isinstance(max_time, str):
        found = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", max_time, re.ASCII)
        if found is None:
            raise ConfigurationError(
                f'MaxTime(max_time={max_time!r}): text has the form "DD:HH:MM:SS", say "00:12:00:00" for 12 hours; '
                "a number means seconds."
            )
        days, hours, minutes, seconds = map(int, found.groups())
        max_time = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    seconds = max_time.total_seconds() if isinstance(max_time, timedelta) else max_time
    require_number("MaxTime", "max_time", seconds, above=0)
    return seconds
