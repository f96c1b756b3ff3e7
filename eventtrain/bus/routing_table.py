"""Routing table: the subscriptions of one bus, and which of them receive a class of events."""

from __future__ import annotations

import threading
from collections.abc import Callable
from weakref import WeakValueDictionary

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
        self._bounded_routes: dict[type[Event], tuple[SubscriptionCore, ...]] = {}
        self._last_index = 0
        # Weak, so that the subscriptions of a trainer that is gone are gone too.
        self._named: WeakValueDictionary[str, SubscriptionCore] = WeakValueDictionary()
        self._ended: set[str] = set()

    def create(self, name: str, make: Callable[[str, int], SubscriptionCore]) -> SubscriptionCore:
        """Makes a subscription with a unique name (``report``, ``report-2`` ...) and the next index."""
        with self._lock:
            unique, number = name, 1
            while unique in self._named:
                number += 1
                unique = f"{name}-{number}"
            self.finished.discard(unique)
            self._ended.discard(unique)
            self._last_index += 1
            subscription = self._named[unique] = make(unique, self._last_index)
            return subscription

    @property
    def detached(self) -> tuple[SubscriptionCore, ...]:
        """Those of trainers that do not run now, in the order in which they were made."""
        with self._lock:
            waiting = [s for s in self._named.values() if not s.attached and s.state != "cancelled"]
        return tuple(sorted(waiting, key=lambda s: s.index))

    def has_ended(self, name: str) -> bool:
        """Returns whether a subscription of this name has ended and no newer one has its name."""
        return name in self._ended

    def join(self, subscription: SubscriptionCore) -> None:
        """Adds a subscription. It receives events from now on, unless it has ended already."""
        with self._lock:
            subscription.attached = True
            if subscription.state == "active":
                self._replace((*self.active, subscription))
            elif subscription.state == "disabled":
                self.disabled = (*self.disabled, subscription)
            elif subscription.state == "finished":
                self.finished.add(subscription.name)

    def remove(self, subscription: SubscriptionCore) -> None:
        """Removes a subscription that may join again."""
        with self._lock:
            subscription.attached = False
            self.disabled = tuple(other for other in self.disabled if other is not subscription)
            self.finished.discard(subscription.name)
            self._replace(tuple(other for other in self.active if other is not subscription))

    def leave(self, subscription: SubscriptionCore) -> None:
        """Removes a subscription that has ended."""
        with self._lock:
            if subscription.state == "disabled":
                self.disabled = (*self.disabled, subscription)
            elif self._named.get(subscription.name) is subscription:
                del self._named[subscription.name]
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
        # After the tuples: a reader that sees a new, empty dict fills it from the new tuple.
        self._routes, self._bounded_routes = {}, {}

    def route(self, event_type: type[Event]) -> tuple[SubscriptionCore, ...]:
        """Returns the active subscriptions to ``event_type`` or one of its bases; cached per concrete class."""
        routes = self._routes
        found = routes.get(event_type)
        if found is None:
            found = routes[event_type] = tuple(s for s in self.active if issubclass(event_type, s.types))
        return found

    def bounded_route(self, event_type: type[Event]) -> tuple[SubscriptionCore, ...]:
        """Returns those of ``route(event_type)`` whose queue refuses events at its limit; cached too."""
        routes = self._bounded_routes
        found = routes.get(event_type)
        if found is None:
            found = routes[event_type] = tuple(s for s in self.bounded if issubclass(event_type, s.types))
        return found
