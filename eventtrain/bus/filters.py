"""Which events one subscription wants, and after how many steps its decisions count."""

from __future__ import annotations

from collections.abc import Mapping

from eventtrain.bus.clock import Clock
from eventtrain.bus.options import Options
from eventtrain.events import LOOP_EVENTS, Event


class EventFilter:
    """``every``, ``every_s``, ``where``, ``once`` and ``lag`` of one subscription.

    For one thread at a time: a holder of the bus' routing lock.
    """

    def __init__(self, types: tuple[type[Event], ...], options: Options, clock: Clock) -> None:
        self._options = options
        self._clock = clock
        self._last_s = -float("inf")
        self._lags: dict[type[Event], int | None] = {}
        self.spent = False
        """A subscription with ``once`` has got its event and wants nothing more."""
        self.filters = (
            options.every > 1 or options.every_s is not None or options.where is not None or options.once
        )
        """False: it wants every event of its types."""
        lag = options.lag
        kinds = lag if isinstance(lag, Mapping) else types
        self.decides = any(self.lag_for(kind) is not None for kind in kinds)
        """It has a finite lag for at least one class of events."""

    def lag_for(self, kind: type[Event]) -> int | None:
        """The lag that holds for events of class ``kind``; a mapping is searched along the MRO."""
        if kind not in self._lags:
            lag = self._options.lag
            if isinstance(lag, Mapping):
                lag = next((lag[base] for base in kind.__mro__ if base in lag), None)
            elif not issubclass(kind, LOOP_EVENTS):
                lag = None
            self._lags[kind] = lag
        return self._lags[kind]

    def is_due(self, event: Event) -> bool:
        """Whether ``every`` lets it through."""
        return self._options.every == 1 or event.is_multiple_of(self._options.every)

    def wants(self, event: Event) -> bool:
        """Whether the handler gets ``event``. What ``where`` raises comes out of here."""
        options = self._options
        if self.spent or not self.is_due(event):
            return False
        now_s = self._clock.now_s() if options.every_s is not None else 0.0
        if options.every_s is not None and now_s - self._last_s < options.every_s:
            return False
        if options.where is not None and not options.where(event):
            return False
        self._last_s = now_s
        self.spent = options.once
        return True

    def due_steps(self, steps: range) -> range:
        """The steps among these consecutive ones that ``every`` lets through."""
        every = self._options.every
        return steps if every == 1 else range(-(-steps.start // every) * every, steps.stop, every)
