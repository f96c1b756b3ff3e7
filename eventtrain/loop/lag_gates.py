"""Tracks which subscriptions with a finite lag must have handled which events before each step boundary.

Such a subscription is a *decider*: a command caused by the event of step k takes effect at boundary k + lag, so the
loop may not pass that boundary before the decider has handled the event. For every event that a decider will be
given, the loop counts one up and remembers the boundary by which the decider must have handled that many. The decider
counts the same events from its side (``Subscription.passed``).
"""

from __future__ import annotations

import heapq

from eventtrain.bus.core import BusCore
from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.events import EpochEvent, EvalStepCompleted, Event, RunEvent, StepCompleted, StepStarted

NEVER = 1 << 62


class LagGates:
    """The gates of one run: a gate is open when every decider has handled what a boundary depends on.

    Training thread only; never blocks.

    Attributes:
        flush_by: the step at which the open window must be sent: half the lag after the oldest event in it.
        next_step_event: the next step whose StepCompleted a decider will be given.
        announces_steps: whether a decider is given StepStarted, so that the loop publishes it before each dispatch.
        also_every: ``next_step_event`` counts the multiples of these, too.
    """

    def __init__(self, bus: BusCore) -> None:
        self._bus = bus
        self._known: tuple[SubscriptionCore, ...] = ()
        self._expected: dict[SubscriptionCore, int] = {}
        # The value of ``Subscription.run`` from which ``passed`` counts the events of this run.
        self._counts_from: dict[SubscriptionCore, int] = {}
        self._gates: list[tuple[int, int, int, SubscriptionCore]] = []
        self._tie = 0
        self.flush_by = NEVER
        self.next_step_event = NEVER
        self.announces_steps = False
        self.also_every: tuple[int, ...] = ()

    @property
    def stale(self) -> bool:
        """Whether deciders came or went since ``refresh``."""
        return self._bus.deciders is not self._known

    def refresh(self, step: int) -> list[SubscriptionCore]:
        """Look at the deciders again. Returns the new ones, which the stream must activate at this very point."""
        self._known = self._bus.deciders
        newcomers = [s for s in self._known if s not in self._expected]
        for subscription in newcomers:
            self._expected[subscription] = 0
            self._counts_from[subscription] = subscription.run + 1
        self.announces_steps = any(_lag(s, StepStarted) is not None for s in self._known)
        self.plan_step_event(step)
        return newcomers

    def plan_step_event(self, step: int) -> None:
        """Find ``next_step_event`` behind ``step``."""
        deciders = [s.options.every for s in self._known if _lag(s, StepCompleted) is not None]
        steps = [(step // every + 1) * every for every in (*deciders, *self.also_every)]
        self.next_step_event = min(steps, default=NEVER)

    def note_step(self, step: int) -> None:
        """Count StepCompleted of ``step``, which was dispatched; ``step >= next_step_event``."""
        self.note(StepCompleted, step)
        self.plan_step_event(step)

    def note(self, kind: type[Event], step: int, epoch: int = 0) -> None:
        """Count an event of class ``kind`` that the loop publishes at ``step``, now or from the ring."""
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
        """Count an event of ``step`` that ``subscription`` had not handled at the checkpoint: the run resumes."""
        lag = _lag(subscription, kind)
        if lag is not None and subscription in self._expected:
            self._expect(subscription, step + lag)

    def _expect(self, subscription: SubscriptionCore, due: int) -> None:
        self._expected[subscription] += 1
        self._tie += 1
        heapq.heappush(self._gates, (due, self._tie, self._expected[subscription], subscription))

    def flushed(self) -> None:
        """Record that the open window was sent."""
        self.flush_by = NEVER

    @property
    def next_due(self) -> int:
        """The next boundary that depends on a decider; NEVER if none does."""
        return self._gates[0][0] if self._gates else NEVER

    def next_undecided(self, step: int) -> int:
        """Returns the next boundary that can depend on a step that is not dispatched at ``step``; NEVER if none can."""
        if self.announces_steps:
            return step + 1
        due = [
            (step // s.options.every + 1) * s.options.every + lag
            for s in self._known
            if (lag := _lag(s, StepCompleted)) is not None
        ]
        return min(due, default=NEVER)

    def blocking(self, step: int) -> SubscriptionCore | None:
        """Returns the decider for which boundary ``step`` has to wait; None if the gate is open.

        What was handled before it is due is forgotten, so that ``next_due`` is not at every step.
        """
        while self._gates:
            due, _, expected, subscription = self._gates[0]
            # Until the stream delivers its activation, ``passed`` is the count of an earlier run.
            counting = subscription.run >= self._counts_from[subscription]
            if subscription.state == "active" and not (counting and subscription.passed >= expected):
                return subscription if due <= step else None
            heapq.heappop(self._gates)
        return None

    def timed_out(self) -> bool:
        """Returns whether any decider ever exceeded its ``timeout_s``."""
        return any(subscription.failures.timed_out for subscription in self._expected)


def _lag(subscription: SubscriptionCore, kind: type[Event]) -> int | None:
    return (
        subscription.filter.lag_for(kind)
        if subscription.state == "active" and issubclass(kind, subscription.types)
        else None
    )
