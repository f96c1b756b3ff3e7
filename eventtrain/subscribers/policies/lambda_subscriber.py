"""``Lambda``: a subscriber made of functions, one for each event."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from eventtrain.bus.options import Lag, OnError
from eventtrain.errors import ConfigurationError
from eventtrain.events import Event
from eventtrain.subscribers.base import Subscriber, event_routes
from eventtrain.validation.annotations import checked


class Lambda(Subscriber):
    """Calls a function of yours for each event of a type, all in one order, one at a time.

    ::

        async def report(event: et.EpochCompleted) -> None: ...
        async def decide(event: et.StepCompleted, control: et.Control) -> None: ...

        subs.Lambda(on_epoch_completed=report, on_step_completed=decide, lag={et.StepCompleted: 64})

    Args:
        lag: when decisions take effect, for all of the events or by class; as in ``EventBus.subscribe``.
        name: as in ``EventBus.subscribe``.
        on_error: as in ``EventBus.subscribe``.
        event_types: event classes of your own, for functions named after them.
        handlers: coroutine functions of (event) or (event, control), named ``on_`` and the event. Each event is given
            to one, that of its class or else of the nearest base class: ``on_event`` gets all others.

    One function for one event needs no class: ``@trainer.on(et.EpochCompleted)``. Functions cannot be written in a
    configuration file, so this cannot be loaded from one.

    Raises:
        ConfigurationError: there is no handler, or one is not named after an event, or is not a coroutine function of
            these arguments.
    """

    @checked
    def __init__(
        self,
        *,
        lag: Lag = None,
        name: str | None = None,
        on_error: OnError = "isolate",
        event_types: Iterable[type[Event]] = (),
        **handlers: Callable[..., Coroutine[Any, Any, None]],
    ) -> None:
        if not handlers:
            raise ConfigurationError(
                "Lambda() handles no event. Give it functions, as in Lambda(on_epoch_completed=report). They cannot "
                "come from a configuration file; build it in Python: Trainer(subscribers=[...])."
            )
        for event_name, handler in handlers.items():
            if not event_name.startswith("on_"):
                raise ConfigurationError(
                    f"Lambda({event_name}=...): handlers must be named on_ and the event, such as on_epoch_completed."
                )
            if not callable(handler):
                raise ConfigurationError(
                    f"Lambda({event_name}={handler!r}): {event_name} must be a coroutine function of (event) or "
                    "(event, control)."
                )
        self.lag = lag
        self.name = name
        self.on_error = on_error
        self.event_types = tuple(event_types)
        vars(self).update(handlers)
        event_routes(self, name or "Lambda")  # raises now instead of when the run starts
