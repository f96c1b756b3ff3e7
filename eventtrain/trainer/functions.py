"""``Functions``: the functions that ``trainer.on`` has subscribed."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from eventtrain.bus.core import BusCore
from eventtrain.bus.handlers import Handler
from eventtrain.bus.options import event_classes
from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.control.control_plane import ControlPlane
from eventtrain.control.held_states import HeldStates, require_state_options
from eventtrain.errors import AlreadyRunning


class Functions:
    """Subscribes functions, and has them receive events while their trainer does something.

    Args:
        bus, plane: of the trainer.
    """

    def __init__(self, bus: BusCore, plane: ControlPlane) -> None:
        self._bus = bus
        self._plane = plane
        self._subscriptions: list[SubscriptionCore] = []
        self._doing = ""
        """Name of the trainer's method in progress; empty if there is none."""

    @property
    def subscriptions(self) -> tuple[SubscriptionCore, ...]:
        """All of them. Any thread."""
        return tuple(self._subscriptions)

    def subscribe(
        self, event_type: Any, handler: Handler, options: Mapping[str, Any], *, with_state: bool
    ) -> None:
        """Subscribe one function; arguments as of ``Trainer.on``, and errors. Any thread."""
        held = HeldStates() if with_state else None
        if held is not None:
            if self._doing:
                raise AlreadyRunning(
                    f"Cannot subscribe a function with_state=True while {self._doing} is in progress, which would not "
                    "keep its states. Subscribe it before."
                )
            require_state_options(handler, event_classes(event_type), options)
            handler = held.with_state(handler)
        subscription = self._bus.subscribe(event_type, handler, options, attach=False, owner=self)
        if held is not None:
            held.subscription = subscription
            known = self._plane.held_states
            known[:] = [*(other for other in known if other.subscription.active), held]
        self._subscriptions.append(subscription)
        if self._doing:
            self._attach(subscription)

    @contextmanager
    def receiving(self, name: str) -> Generator[None]:
        """Route events to them for the length of the block, in which the trainer's method ``name`` is in progress."""
        self._doing = name
        self._subscriptions = [one for one in self._subscriptions if one.state != "cancelled"]
        try:
            for subscription in self._subscriptions:
                self._attach(subscription)
            yield
        finally:
            for subscription in self._subscriptions:
                self._bus.detach(subscription)
            self._doing = ""

    def cancel(self) -> None:
        """End the subscriptions, for good."""
        for subscription in self._subscriptions:
            subscription.cancel()

    def _attach(self, subscription: SubscriptionCore) -> None:
        if jax.process_index() > 0 and not subscription.options.per_host:
            return
        self._bus.attach(subscription)
        self._bus.start_worker(subscription)
