"""What the loop owes to subscriptions with a finite lag: when to flush, and where to wait for whom.

For every event that such a subscription will examine, the loop counts one up and remembers the boundary by which the
subscription must be through with so many. The subscription counts the same events from its side (``passed``).
"""

from __future__ import annotations

import heapq

from eventtrain.bus.core import BusCore
from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.events import EpochEvent, EvalStepCompleted, Event, RunEvent, StepCompleted, StepStarted

NEVER = 1 << 62


class LagGates:
    """The obligations of one run. Training thread only; nothing here blocks."""

    def __init__(self, bus: BusCore) -> None:
        self._bus = bus
        self._known: tuple[SubscriptionCore, ...] = ()
        self._expected: dict[SubscriptionCore, int] = {}
        self._counts_from: dict[
            SubscriptionCore, int
        ] = {}  # the value of ``run`` from which ``passed`` is of this run
        self._obligations: list[tuple[int, int, int, SubscriptionCore]] = []
        self._tie = 0
        self.flush_by = NEVER
        """The step at which what is in the ring must be on its way: half the lag after the oldest event in it."""
        self.next_step_event = NEVER
        """The next step whose StepCompleted some decider will examine."""
        self.announces_steps = False
        """Some decider examines StepStarted, so the loop must say it before each dispatch."""

    @property
    def stale(self) -> bool:
        """Whether subscriptions with a finite lag came or went since ``refresh``."""
        return self._bus.deciders is not self._known

    def refresh(self, step: int) -> list[SubscriptionCore]:
        """Take note of who decides now; returns the newcomers, which the stream must activate at this very point."""
        self._known = self._bus.deciders
        newcomers = [s for s in self._known if s not in self._expected]
        for subscription in newcomers:
            self._expected[subscription] = 0
            self._counts_from[subscription] = subscription.run + 1
        self.announces_steps = any(_lag(s, StepStarted) is not None for s in self._known)
        self._plan_step_event(step)
        return newcomers

    def _plan_step_event(self, step: int) -> None:
        steps = [
            (step // s.options.every + 1) * s.options.every
            for s in self._known
            if _lag(s, StepCompleted) is not None
        ]
        self.next_step_event = min(steps, default=NEVER)

    def note_step(self, step: int) -> None:
        """Step ``step`` was dispatched, and ``step >= next_step_event``."""
        self.note(StepCompleted, step)
        self._plan_step_event(step)

    def note(self, kind: type[Event], step: int, epoch: int = 0) -> None:
        """The loop publishes an event of class ``kind`` at ``step``, or will out of the ring."""
        for subscription in self._known:
            lag = _lag(subscription, kind)
            if lag is None:
                continue
            position = epoch + 1 if issubclass(kind, EpochEvent) else step
            if position % subscription.options.every and not issubclass(kind, RunEvent):
                continue
            self._expect(subscription, step + lag)
            if issubclass(kind, (StepCompleted, EvalStepCompleted)):
                self.flush_by = min(self.flush_by, step + lag // 2)

    def owe(self, subscription: SubscriptionCore, kind: type[Event], step: int) -> None:
        """A run resumes: ``subscription`` had an event of ``step`` before it that it is not through with."""
        lag = _lag(subscription, kind)
        if lag is not None and subscription in self._expected:
            self._expect(subscription, step + lag)

    def _expect(self, subscription: SubscriptionCore, due: int) -> None:
        self._expected[subscription] += 1
        self._tie += 1
        heapq.heappush(self._obligations, (due, self._tie, self._expected[subscription], subscription))

    def flushed(self) -> None:
        """The ring is on its way."""
        self.flush_by = NEVER

    @property
    def next_due(self) -> int:
        """The next boundary at which some decider must be through; NEVER if none."""
        return self._obligations[0][0] if self._obligations else NEVER

    def blocking(self, step: int) -> SubscriptionCore | None:
        """The decider that boundary ``step`` still has to wait for; None when the gate is open."""
        while self._obligations and self._obligations[0][0] <= step:
            _, _, expected, subscription = self._obligations[0]
            # Until the stream has brought its activation, ``passed`` is what an earlier run left.
            counting = subscription.run >= self._counts_from[subscription]
            if subscription.state == "active" and not (counting and subscription.passed >= expected):
                return subscription
            heapq.heappop(self._obligations)
        return None

    def timed_out(self) -> bool:
        """Whether any decider ever exceeded its ``timeout_s``."""
        return any(subscription.failures.timed_out for subscription in self._expected)


def _lag(subscription: SubscriptionCore, kind: type[Event]) -> int | None:
    return (
        subscription.filter.lag_for(kind)
        if subscription.state == "active" and issubclass(kind, subscription.types)
        else None
    )
