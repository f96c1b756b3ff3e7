"""Decides which events one subscription receives, and with which lag."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from eventtrain.bus.clock import Clock
from eventtrain.events import LOOP_EVENTS, Event
from eventtrain.validation.callables import require_result


class EventFilter:
    """The options ``every``, ``every_s``, ``where``, ``once`` and ``lag`` of one subscription.

    One thread at a time: it must hold the bus' delivery lock.
    """

    def __init__(
        self,
        types: tuple[type[Event], ...],
        clock: Clock,
        *,
        every: int,
        every_s: float | None,
        where: Callable[[Any], bool] | None,
        once: bool,
        lag: int | Mapping[type[Event], int | None] | None,
    ) -> None:
        self._clock = clock
        self._every = every
        self._every_s = every_s
        self._where = where
        self._once = once
        self._lag = lag
        self._lags: dict[type[Event], int | None] = {}
        self._last_s = -float("inf")
        self.spent = False
        """Whether a subscription with ``once`` has received its event."""
        self.passes_all = every == 1 and every_s is None and where is None and not once
        """Whether the subscription receives every event of its classes."""
        lagged_types = lag if isinstance(lag, Mapping) else types
        self.decides = any(self.lag_for(event_type) is not None for event_type in lagged_types)
        """Whether the lag is finite for at least one class of events."""
        self.holds_the_loop = bool(lagged_types) and all(self.lag_for(t) == 0 for t in lagged_types)
        """Whether the lag is 0 for all of them, so that training waits for each event."""

    def lag_for(self, event_type: type[Event]) -> int | None:
        """Returns the lag for events of this class: None, or a number of steps. A mapping is searched by the MRO."""
        if event_type not in self._lags:
            lag = self._lag
            if isinstance(lag, Mapping):
                lag = next((lag[base] for base in event_type.__mro__ if base in lag), None)
            elif not issubclass(event_type, LOOP_EVENTS):
                lag = None
            self._lags[event_type] = lag
        return self._lags[event_type]

    def takes_whole_series(self) -> bool:
        """Whether nothing but ``every`` chooses among the steps of a window, and no lag counts them."""
        return self._every_s is None and self._where is None and not self._once and not self.decides

    def is_due(self, event: Event) -> bool:
        """Returns whether ``every`` lets ``event`` pass."""
        return self._every == 1 or event.is_multiple_of(self._every)

    def passes(self, event: Event) -> bool:
        """Returns whether the handler receives ``event``. Exceptions of ``where`` propagate."""
        if self.spent or not self.is_due(event):
            return False
        now_s = self._clock.now_s() if self._every_s is not None else 0.0
        if self._every_s is not None and now_s - self._last_s < self._every_s:
            return False
        if self._where is not None:
            passed = self._where(event)
            if passed is not True and passed is not False:
                require_result("where=", passed)
            if not passed:
                return False
        self._last_s = now_s
        self.spent = self._once
        return True

    def due_steps(self, steps: range) -> range:
        """Returns those of these consecutive steps that ``every`` lets pass."""
        every = self._every
        return steps if every == 1 else range(-(-steps.start // every) * every, steps.stop, every)
