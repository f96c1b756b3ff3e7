"""Routing table: the subscriptions of one bus, and which of them receive a class of events."""

from __future__ import annotations

import threading

from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.events import Event


class RoutingTable:
    """The subscriptions of one bus. Any thread.

    Copy on write: the tuples are replaced under ``_lock``, never changed. Readers take no lock and see one of them.
    """

    def __init__(self) -> None:
        self.delivery_lock = threading.RLock()
        """Held while events move into the queues of subscriptions: by the event loop, or by a publisher that makes
        room. Reentrant, because a ``where`` may publish."""
        self.active: tuple[SubscriptionCore, ...] = ()
        self.disabled: tuple[SubscriptionCore, ...] = ()
        """Disabled after failures; kept for their statistics and dead letters."""
        self.deciders: tuple[SubscriptionCore, ...] = ()
        """The active ones with a finite lag. Replaced only if they change, so that identity shows a change."""
        self.bounded: tuple[SubscriptionCore, ...] = ()
        """The active ones whose queue refuses events at its limit."""
        self.finished: set[str] = set()
        """Names of subscriptions with ``once`` that have received their event."""
        self._lock = threading.Lock()
        self._routes: dict[type[Event], tuple[SubscriptionCore, ...]] = {}
        self._last_index = 0
        self._names: set[str] = set()
        self._ended: set[str] = set()

    def reserve(self, name: str) -> tuple[str, int]:
        """Returns a unique name (``report``, ``report-2`` ...) and the next index, for a new subscription."""
        with self._lock:
            unique, number = name, 1
            while unique in self._names:
                number += 1
                unique = f"{name}-{number}"
            self._names.add(unique)
            self.finished.discard(unique)
            self._ended.discard(unique)
            self._last_index += 1
            return unique, self._last_index

    def has_ended(self, name: str) -> bool:
        """Whether a subscription of this name has ended and no newer one has its name."""
        return name in self._ended

    def join(self, subscription: SubscriptionCore) -> None:
        """Adds a subscription, unless it has ended already. It receives events from now on."""
        with self._lock:
            if subscription.state == "active":
                self._replace((*self.active, subscription))

    def leave(self, subscription: SubscriptionCore) -> None:
        """Removes a subscription that has ended."""
        with self._lock:
            if subscription.state == "disabled":
                self.disabled = (*self.disabled, subscription)
            else:
                self._names.discard(subscription.name)
            self._ended.add(subscription.name)
            if subscription.state == "finished":
                self.finished.add(subscription.name)
            self._replace(tuple(other for other in self.active if other is not subscription))

    def _replace(self, active: tuple[SubscriptionCore, ...]) -> None:
        self.active = active
        self.bounded = tuple(s for s in active if s.queue.room() is not None)
        deciders = tuple(s for s in active if s.filter.decides)
        if deciders != self.deciders:
            self.deciders = deciders
        # After `active`: a reader that sees the new, empty dict fills it from the new tuple.
        self._routes = {}

    def route(self, event_type: type[Event]) -> tuple[SubscriptionCore, ...]:
        """Returns the active subscriptions to ``event_type`` or one of its bases; cached per concrete class."""
        routes = self._routes
        found = routes.get(event_type)
        if found is None:
            found = routes[event_type] = tuple(s for s in self.active if issubclass(event_type, s.types))
        return found
