"""Who is subscribed, and who of them wants which class of event."""

from __future__ import annotations

import threading

from eventtrain.bus.subscription import Subscription
from eventtrain.events import Event


class RoutingTable:
    """The subscriptions of one bus. Any thread.

    Copy on write: readers see one consistent tuple and take no lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.active: tuple[Subscription, ...] = ()
        self.disabled: tuple[Subscription, ...] = ()
        """Switched off after failures, kept for their statistics and dead letters."""
        self.deciders: tuple[Subscription, ...] = ()
        """Active ones with a finite lag; replaced, never changed, so that identity tells of a change."""
        self.bounded: tuple[Subscription, ...] = ()
        """Active ones whose queue has a limit at which publishing is refused."""
        self.routes: dict[type[Event], tuple[Subscription, ...]] = {}
        """For each concrete class met so far who gets it; ask ``route`` for the others."""
        self._next_index = 0
        self._names: set[str] = set()
        self._ended: set[str] = set()
        self.finished: set[str] = set()
        """Names of those with ``once`` that have had their event."""

    def next_index(self) -> int:
        """A number that no other subscription of this bus has; it grows in the order of asking."""
        with self._lock:
            self._next_index += 1
            return self._next_index

    def name(self, subscription: Subscription) -> None:
        """Make its name unique, so that statistics and failures can be told apart: ``report``, ``report-2`` ..."""
        with self._lock:
            name, number = subscription.name, 1
            while subscription.name in self._names:
                number += 1
                subscription.name = f"{name}-{number}"
            self._names.add(subscription.name)
            self.finished.discard(subscription.name)
            self._ended.discard(subscription.name)

    def has_ended(self, name: str) -> bool:
        """Whether a subscription of this name has ended, and no other has its name now."""
        return name in self._ended

    def join(self, subscription: Subscription) -> None:
        """From now on it gets what it wants, unless it has ended meanwhile."""
        with self._lock:
            if subscription.state == "active":
                self._replace((*self.active, subscription))

    def leave(self, subscription: Subscription) -> None:
        """It ended; idempotent."""
        with self._lock:
            if subscription.state == "disabled":
                self.disabled = (*self.disabled, subscription)
            else:
                self._names.discard(subscription.name)
            self._ended.add(subscription.name)
            if subscription.state == "finished":
                self.finished.add(subscription.name)
            self._replace(tuple(s for s in self.active if s is not subscription))

    def _replace(self, active: tuple[Subscription, ...]) -> None:
        self.active = active
        self.bounded = tuple(s for s in active if s.queue.room() is not None)
        deciders = tuple(s for s in active if s.selection.decides)
        if deciders != self.deciders:
            self.deciders = deciders
        # After `active`: who meets the new, empty dict fills it from the new tuple.
        self.routes = {}

    def route(self, kind: type[Event]) -> tuple[Subscription, ...]:
        """Who gets events of class ``kind``, by its bases; remembered per concrete class."""
        routes = self.routes
        found = routes.get(kind)
        if found is None:
            found = routes[kind] = tuple(s for s in self.active if issubclass(kind, s.types))
        return found
