"""``HeldStates``: the states for one function of ``trainer.on(..., with_state=True)``."""

from __future__ import annotations

import inspect
import traceback
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, Protocol, TypeVar, overload

import jax

from eventtrain.bus.handlers import Handler, describe
from eventtrain.bus.queues import Lossless
from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.device.snapshot import Snapshot
from eventtrain.errors import ConfigurationError, SnapshotError
from eventtrain.events import EpochCompleted, EpochEvent, EpochStarted, Event, StepCompleted
from eventtrain.validation.annotations import shown
from eventtrain.validation.callables import is_async, is_generator

KINDS = (StepCompleted, EpochStarted, EpochCompleted)
"""Events that the loop can give with the state of exactly their step."""

E = TypeVar("E", bound=Event)
S = TypeVar("S")
ControlT = TypeVar("ControlT")
R = TypeVar("R")


class StateHandlerDecorator(Protocol[E, S, ControlT]):
    """Subscribes the decorated function to events of type ``E`` with the state, and returns it unchanged."""

    @overload
    def __call__(self, handler: Callable[[E, S], R], /) -> Callable[[E, S], R]: ...
    @overload
    def __call__(self, handler: Callable[[E, S, ControlT], R], /) -> Callable[[E, S, ControlT], R]: ...


class HeldStates:
    """The states on their way to one function, in the order of its events.

    The training thread adds one before the event can arrive. The function's call takes it and releases it at its end;
    neither copies an array.

    Attributes:
        subscription: of the function; set once.
    """

    subscription: SubscriptionCore

    def __init__(self) -> None:
        self._held: deque[tuple[type[Event], Snapshot]] = deque()

    def __len__(self) -> int:
        """How many are waiting or in use."""
        return len(self._held)

    def wants(self, kind: type[Event], step: int, epoch: int) -> bool:
        """Returns whether the function is given the event of class ``kind`` that is published now."""
        subscription = self.subscription
        position = epoch + 1 if issubclass(kind, EpochEvent) else step
        return (
            subscription.active
            and issubclass(kind, subscription.types)
            and position % subscription.options.every == 0
        )

    def add(self, kind: type[Event], snapshot: Snapshot) -> None:
        """Hold the state of the next event, of class ``kind``. Training thread."""
        self._held.append((kind, snapshot))

    def clear(self) -> None:
        """Release all of them: no more of the events will be handled."""
        held, self._held = self._held, deque()
        for _, snapshot in held:
            snapshot.release()

    def with_state(self, handler: Handler) -> Handler:
        """Returns ``handler``, of (event, state) or (event, state, control), as one of (event) or (event, control)."""
        signature = _without_state(handler)
        if is_async(handler):

            async def call_async(event: Event, *control: Any) -> None:
                with self._lent(event) as lent:
                    await handler(event, lent.pop(), *control)

            call: Any = call_async
        else:

            def call_plain(event: Event, *control: Any) -> Any:
                with self._lent(event) as lent:
                    return handler(event, lent.pop(), *control)

            call = call_plain
        call = wraps(handler)(call)
        call.__qualname__, call.__signature__ = describe(handler), signature
        return call

    @contextmanager
    def _lent(self, event: Event) -> Generator[list[Any]]:
        """Gives a list with the state, which the call takes out: no other frame may hold it."""
        held = self._held
        keys = [(kind, snapshot.step) for kind, snapshot in held]
        place = keys.index((type(event), event.step)) if (type(event), event.step) in keys else None
        for _ in range(place or 0):
            held.popleft()[1].release()  # of an event whose last attempt failed
        if place is None or held[0][1].released:
            raise SnapshotError(
                f"{self.subscription.name} is not called for {event.kind} of step {event.step}: its state could not be "
                "kept, because the device has no room for a second one, or the run has ended. Use a smaller batch, or "
                'Trainer(snapshot="host").'
            )
        try:
            yield [held[0][1].state]
        except BaseException as error:
            # A dead letter has the error, whose frames would keep the state.
            traceback.clear_frames(error.__traceback__)
            if self.subscription.options.on_error != "retry":
                held.popleft()[1].release()
            raise
        held.popleft()[1].release()


def require_state_options(
    handler: Handler, types: tuple[type[Event], ...], options: Mapping[str, Any]
) -> None:
    """Raises ConfigurationError if a function with these options cannot be given the state."""
    name = options.get("name") or describe(handler)
    wrong = [kind.__name__ for kind in types if kind not in KINDS]
    if wrong:
        raise ConfigurationError(
            f"Cannot subscribe {name} with_state=True to {', '.join(wrong)}: only StepCompleted, EpochStarted and "
            "EpochCompleted are published at a step whose state can be kept."
        )
    excluded = [
        option
        for option, default in (("every_s", None), ("where", None), ("once", False), ("per_host", False))
        if options.get(option, default) is not default
    ]
    if excluded:
        raise ConfigurationError(
            f"Cannot subscribe {name}: with_state=True and {excluded[0]}= exclude each other, because the state is "
            "kept before the event exists. Use every=, or return early in the function."
        )
    lag, queue = options.get("lag"), options.get("queue")
    lags = lag.values() if isinstance(lag, Mapping) else (lag,)
    if any(one not in (None, 0) for one in lags):
        raise ConfigurationError(
            f"Cannot subscribe {name}: with_state=True requires lag=None or lag=0, got {shown(lag)}. A longer lag "
            "would keep a state for each event on its way."
        )
    if options.get("concurrency", 1) != 1 or not isinstance(queue, Lossless | None):
        raise ConfigurationError(
            f"Cannot subscribe {name}: with_state=True requires concurrency=1 and a Lossless queue, because each state "
            "is kept for one event, in order."
        )
    if jax.process_count() > 1:
        raise ConfigurationError(
            f"Cannot subscribe {name} with_state=True in a run of several processes: they would keep other states. "
            "Return what you need as a metric, or let a Checkpointer write the state."
        )


def _without_state(handler: Handler) -> inspect.Signature:
    """Returns the signature of ``handler`` without its second parameter."""
    try:
        signature = inspect.signature(handler)
    except (ValueError, TypeError):
        signature = None
    parameters = list(signature.parameters.values()) if signature is not None else []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 or is_generator(handler):
        raise ConfigurationError(
            f"Cannot subscribe {describe(handler)}: with_state=True calls it with (event, state) or (event, state, "
            "control). Give it these parameters, and no yield."
        )
    parameters.remove(positional[1])
    return inspect.Signature(parameters)
