"""``Subscriber``: a class that watches a run, with a life of its own and state worth saving."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import anyio

from eventtrain.bus.bus import EventBus
from eventtrain.bus.handlers import takes_control
from eventtrain.bus.options import EventTypes, Lag, OnError
from eventtrain.bus.queues import Queue
from eventtrain.bus.subscription import Subscription
from eventtrain.control import CheckpointPlan, Control, ControlRoom, KeptSnapshot
from eventtrain.errors import ConfigurationError, QueueFull
from eventtrain.events import BUILT_IN, Event, SnapshotTaken
from eventtrain.frozen import snake_case


@dataclass(frozen=True)
class RunContext:
    """What a subscriber learns when a run starts.

    Attributes:
        run_id: of the run.
        run_dir: where relative paths of subscribers lie; it exists.
        control: commands without a cause and without a lag; usable for the whole run, on any thread.
        publish: ``EventBus.publish``.
        start_step: steps completed before this run.
        epochs, steps: what this call of ``fit`` aims at; None where that is not known.
        steps_per_epoch: where the data has a length.
    """

    run_id: str
    run_dir: Path
    control: Control
    publish: Callable[[Event], None]
    start_step: int = 0
    epochs: int | None = None
    steps: int | None = None
    steps_per_epoch: int | None = None
    _room: ControlRoom | None = None

    async def publish_async(self, event: Event) -> None:
        """Like ``publish``, but waits while a Lossless queue is at its limit. On the bus' event loop."""
        while True:
            try:
                return self.publish(event)
            except QueueFull:
                await anyio.sleep(0.01)

    def schedule_checkpoints(
        self,
        owner: str,
        *,
        every: int | None = None,
        every_epochs: int | None = None,
        every_s: float | None = None,
    ) -> None:
        """Have the loop keep the state at exactly these boundaries and announce each by ``SnapshotTaken``.

        The event's ``requested_by`` is ``owner``; ``claim`` then gives the state.

        Raises:
            ConfigurationError: another subscriber of that name has done so.
        """
        assert self._room is not None
        if any(plan.owner == owner for plan in self._room.plans):
            raise ConfigurationError(
                f"Two subscribers named {owner!r} ask for checkpoints. Set the name of one of them."
            )
        self._room.plans.append(
            CheckpointPlan(owner, every, every_epochs, every_s, monotonic() + (every_s or 0.0))
        )

    def claim(self, event: SnapshotTaken) -> KeptSnapshot:
        """The state that ``event`` announced; to be released when written.

        Raises:
            SnapshotError: it was claimed before, or refused because the device had no room.
        """
        assert self._room is not None
        return self._room.claim_checkpoint(event.step, event.requested_by)


class Subscriber:
    """Base of all subscriber classes.

    Either set ``events`` and write ``async def handle(self, event, control)``, or write methods named after events:
    ``async def on_epoch_completed(self, event)`` or ``(self, event, control)``. All events of one subscriber arrive
    in one order, one at a time. The subscription options are attributes of the same names as the arguments of
    ``EventBus.subscribe``. ``event_types`` names event classes of your own that ``on_...`` methods mean.
    """

    events: EventTypes | None = None
    event_types: Iterable[type[Event]] = ()

    every: int = 1
    every_s: float | None = None
    where: Callable[[Any], bool] | None = None
    once: bool = False
    queue: Queue | None = None
    lag: Lag = None
    concurrency: int = 1
    on_error: OnError = "isolate"
    retries: int = 3
    retry_delay_s: float = 0.1
    disable_after: int | None = 100
    timeout_s: float | None = None
    name: str | None = None

    async def start(self, run: RunContext) -> None:
        """The run is about to begin; nothing was published yet. Runs on the bus' event loop. Raising fails the run."""

    async def stop(self) -> None:
        """The run has ended and everything was handled. Runs on the bus' event loop."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, as plain JSON data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""


def subscribe(bus: EventBus, subscriber: Subscriber) -> Subscription:
    """Subscribe one ``Subscriber`` to ``bus``.

    Raises:
        ConfigurationError: it handles nothing, or a method is named after an event that does not exist.
    """
    if not isinstance(subscriber, Subscriber):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError(
            f"{subscriber!r} is no Subscriber. Subclass eventtrain.Subscriber, or use trainer.on(...) for a function."
        )
    name = subscriber.name or type(subscriber).__name__
    event_type, handler = _routes(subscriber, name)
    return bus.subscribe(
        event_type,
        handler,
        every=subscriber.every,
        every_s=subscriber.every_s,
        where=subscriber.where,
        once=subscriber.once,
        queue=subscriber.queue,
        lag=subscriber.lag,
        concurrency=subscriber.concurrency,
        on_error=subscriber.on_error,
        retries=subscriber.retries,
        retry_delay_s=subscriber.retry_delay_s,
        disable_after=subscriber.disable_after,
        timeout_s=subscriber.timeout_s,
        name=name,
    )


def _routes(subscriber: Subscriber, name: str) -> tuple[EventTypes, Callable[..., Any]]:
    handle = getattr(subscriber, "handle", None)
    if handle is not None:
        if subscriber.events is None:
            raise ConfigurationError(
                f"{name} has a handle() but no `events`. Set events = et.EpochCompleted, or a union."
            )
        return subscriber.events, handle
    classes = {snake_case(kind.__name__): kind for kind in (*BUILT_IN, Event, *subscriber.event_types)}
    routes: dict[type[Event], tuple[Callable[..., Any], bool]] = {}
    for attribute in dir(subscriber):  # and not inspect.getmembers, which would evaluate every property
        if not attribute.startswith("on_") or not inspect.ismethod(method := getattr(subscriber, attribute)):
            continue
        kind = classes.get(attribute[3:])
        if kind is None:
            nearest = difflib.get_close_matches(attribute[3:], classes, n=1)
            hint = (
                f" Did you mean on_{nearest[0]}?"
                if nearest
                else " Name event classes of your own in `event_types`."
            )
            raise ConfigurationError(f"{name}.{attribute} is named after no event.{hint}")
        if not inspect.iscoroutinefunction(method):
            raise ConfigurationError(
                f"{name}.{attribute} must be written `async def`: it runs on the event loop."
            )
        routes[kind] = (method, takes_control(method))
    if not routes:
        raise ConfigurationError(
            f"{name} handles no event. Set `events` and write handle(event, control), or on_epoch_completed(event)."
        )
    if not any(control for _, control in routes.values()):

        async def observe(event: Event) -> None:
            await _find(routes, event)[0](event)

        return tuple(routes), observe

    async def decide(event: Event, control: Control) -> None:
        method, with_control = _find(routes, event)
        await (method(event, control) if with_control else method(event))

    return tuple(routes), decide


def _find(
    routes: dict[type[Event], tuple[Callable[..., Any], bool]], event: Event
) -> tuple[Callable[..., Any], bool]:
    return next(routes[kind] for kind in type(event).__mro__ if kind in routes)
