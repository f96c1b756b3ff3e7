"""``Subscriber``: a class that watches a run, with a life of its own and state worth saving."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import anyio

from eventtrain.bus.bus import EventBus, core_of
from eventtrain.bus.handlers import is_async, takes_control
from eventtrain.bus.options import OPTION_NAMES, EventTypes, Lag, OnError
from eventtrain.bus.queues import Queue
from eventtrain.bus.subscription import Subscription, SubscriptionStatistics
from eventtrain.control.checkpoint_handover import ClaimedSnapshot
from eventtrain.control.control import Control
from eventtrain.control.control_plane import ControlPlane
from eventtrain.control.loop_statistics import LoopStatistics
from eventtrain.control.requests import (
    CheckpointRequest,
    FinalRestore,
    PeriodicRequest,
    TraceRequest,
    WhenFull,
)
from eventtrain.control.run_state import SavedRun
from eventtrain.device.hyperparams import Hyperparam, labels, resolve
from eventtrain.device.program import StepProgram
from eventtrain.errors import ConfigurationError, QueueFull
from eventtrain.events import BUILT_IN, Event, SnapshotTaken
from eventtrain.events.models import snake_case


@dataclass(frozen=True)
class RunContext:
    """What a subscriber learns when a run starts.

    Attributes:
        run_id: of the run.
        run_dir: where relative paths of subscribers lie; it exists.
        control: commands without a cause and without a lag; usable for the whole run, on any thread.
        publish: ``EventBus.publish``.
        start_step: steps completed before this run; of one that resumes, before it began at first.
        epochs, steps: what this call of ``fit`` aims at; None where that is not known. Of a run that resumes: in all.
        steps_per_epoch: where the data has a length.
        start_epoch: epochs completed before this run.
        can_evaluate: whether the run has an eval_fn and eval_data.
        resumed: the run goes on from a checkpoint; RunResumed is said instead of RunStarted.
        ended: of a run that resumes: why it had reached its end, so that nothing is trained; None where it goes on.
        restarts: it was to resume, and nothing was saved: what an attempt before it wrote will be written again.
        params: path of each array that the lens ``params`` gives -> its path in the state; None if it is no leaf of it.
    """

    run_id: str
    run_dir: Path
    control: Control
    publish: Callable[[Event], None]
    start_step: int = 0
    epochs: int | None = None
    steps: int | None = None
    steps_per_epoch: int | None = None
    start_epoch: int = 0
    can_evaluate: bool = False
    resumed: bool = False
    restarts: bool = False
    ended: str | None = None
    params: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    _hyperparams: tuple[Hyperparam, ...] = ()
    _plane: ControlPlane | None = None
    _statistics: Callable[[], dict[str, SubscriptionStatistics]] = dict
    _loop_statistics: Callable[[], LoopStatistics] = LoopStatistics
    _program: Callable[[], StepProgram | None] = lambda: None

    @property
    def total_steps(self) -> int | None:
        """Steps that this call of ``fit`` aims at, also where it counts epochs; None where that is not known."""
        if self.epochs is None or self.steps_per_epoch is None:
            return self.steps
        return self.epochs * self.steps_per_epoch

    def statistics(self) -> dict[str, SubscriptionStatistics]:
        """The figures of every subscription of the bus, by name. Any thread; never blocks."""
        return self._statistics()

    def loop_statistics(self) -> LoopStatistics:
        """Where the training thread's time went so far. Any thread; never blocks."""
        return self._loop_statistics()

    def program(self) -> StepProgram | None:
        """What the step was compiled to; None before the first step. Any thread; never blocks."""
        return self._program()

    async def publish_async(self, event: Event) -> None:
        """Like ``publish``, but waits while a Lossless queue is at its limit. On the bus' event loop."""
        while True:
            try:
                return self.publish(event)
            except QueueFull:
                await anyio.sleep(0.01)

    def require_hyperparam(self, name: str, path: str | None = None) -> str:
        """Make sure that ``control.set_hyperparam(name, ..., path=path)`` can work in this run.

        Returns:
            The key under which ``EpochCompleted.hyperparams`` and ``control.hyperparams`` show it.

        Raises:
            UnknownHyperparam, AmbiguousHyperparam, ScheduledHyperparam: it cannot; the message says how to build the
                optimiser.
        """
        return labels(self._hyperparams)[resolve(self._hyperparams, name, path).path]

    def restore_at_end(
        self,
        tag: str,
        part: Literal["all", "params"] = "params",
        *,
        where: Callable[[], bool] = lambda: True,
    ) -> None:
        """Have the snapshot kept under ``tag`` put back when the run ends by itself, and released.

        By itself: its aim was reached, or a command stopped it. A run that was interrupted, preempted or cancelled
        keeps its state and the snapshot, so that another run can go on. Without a snapshot of that tag nothing happens.
        Whole states are put back before params.

        Args:
            where: asked on the training thread when all deciders are through; False: it is only released.
        """
        assert self._plane is not None
        self._plane.requests.final_restores.append(FinalRestore(tag, part, where))

    def schedule_evaluations(
        self,
        owner: str,
        *,
        every: int | None = None,
        every_epochs: int | None = None,
        every_s: float | None = None,
    ) -> None:
        """Have the loop evaluate at exactly these boundaries, instead of at the end of each epoch.

        At the end of an epoch that is before EpochCompleted. ``every_s`` depends on timing: the run then says
        ``deterministic=False``.

        Raises:
            ConfigurationError: the run has nothing to evaluate on.
        """
        assert self._plane is not None
        if not self.can_evaluate:
            raise ConfigurationError(
                f"{owner} wants evaluations, and this run has nothing to evaluate on. Give Trainer(eval_fn=...) and "
                "fit(eval_data=...)."
            )
        self._plane.requests.evaluations.append(PeriodicRequest(owner, every, every_epochs, every_s))

    def schedule_traces(
        self, owner: str, folder: Path, ranges: Sequence[tuple[int, int]] = (), *, python: bool = False
    ) -> None:
        """Have the loop trace exactly these steps with JAX's profiler, each range to a folder of its own in ``folder``.

        ``control.profile`` works in a run where somebody did this. ``ProfileCaptured`` follows each trace, or a
        SubscriberFailed of ``owner``.

        Args:
            owner: name of the subscriber.
            folder: where traces go; made if need be.
            ranges: first and last step of each; both are traced.
            python: also trace the calls of Python functions, which makes the steps slower and the trace larger.
        """
        assert self._plane is not None
        self._plane.requests.traces.append(TraceRequest(owner, folder, tuple(ranges), python))

    def schedule_checkpoints(
        self,
        owner: str,
        *,
        every: int | None = None,
        every_epochs: int | None = None,
        every_s: float | None = None,
        at_start: bool = False,
        at_end: bool = False,
        on_command: bool = True,
        max_in_flight: int = 2,
        when_full: WhenFull = "wait",
    ) -> None:
        """Have the loop keep the state at exactly these boundaries and announce each by ``SnapshotTaken``.

        The event's ``requested_by`` is ``owner``; ``claim`` then gives the state.

        Args:
            owner: name of the subscriber.
            every, every_epochs, every_s: steps, epochs, seconds.
            at_start: also before the next step.
            at_end: also after the last step, however the run ends.
            on_command: also where a command without an addressee asks for one, if anybody else does not.
            max_in_flight: how many that were claimed and not finished there may be, each of which holds a state.
            when_full: what becomes of one more.

        Raises:
            ConfigurationError: another subscriber of that name has done so.
        """
        assert self._plane is not None
        requests = self._plane.requests.checkpoints
        if any(request.owner == owner for request in requests):
            raise ConfigurationError(
                f"Two subscribers named {owner!r} ask for checkpoints. Set the name of one of them."
            )
        requests.append(
            CheckpointRequest(
                owner,
                every,
                every_epochs,
                every_s,
                at_start,
                at_end=at_end,
                on_command=on_command,
                max_in_flight=max_in_flight,
                when_full=when_full,
            )
        )

    def claim(self, owner: str, event: SnapshotTaken) -> ClaimedSnapshot | None:
        """What ``event`` announced, for ``owner``; to be finished when written or given up.

        None where nothing is held for it: others have asked for it, it was claimed before, or ``owner`` had too many in
        flight, which the loop has said. Where the device had no room for it, its snapshot is released.
        """
        assert self._plane is not None
        return self._plane.handover.claim(owner, event.step, event.requested_by)


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

    async def finish(self) -> None:
        """The run has ended: end what is under way, and publish what came of it.

        Runs before anybody's ``stop``, on the bus' event loop; cancelled when the run's drain timeout is over.
        """

    async def stop(self) -> None:
        """The run has ended and everything was handled. Runs on the bus' event loop; cancelled as ``finish`` is."""

    async def flush(self) -> None:
        """Make durable what was handled so far. Runs before ``state_dict`` where a checkpoint is taken."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, as plain JSON data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""

    resumes_runs: bool = False
    """Whether ``saved_run`` finds checkpoints."""

    def saved_run(self, run_dir: Path, which: bool | str | int | Path) -> SavedRun | None:
        """The checkpoint to resume from; None where ``which`` is True and there is none yet.

        Args:
            run_dir: of the run.
            which: True for the newest; else a path, a tag or a step.

        Blocks; any thread. Raises SnapshotError where there is no such checkpoint.
        """


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
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError(f"{type(subscriber).__name__}.name = {name!r}: a name is text, or None.")
    event_type, handler = event_routes(subscriber, name)
    stateful = type(subscriber).state_dict is not Subscriber.state_dict
    if stateful and subscriber.concurrency > 1:
        raise ConfigurationError(
            f"{name} has state_dict and concurrency={subscriber.concurrency}: what it saves would depend on which of "
            "its handlers was faster. Use concurrency=1."
        )

    async def save() -> dict[str, Any]:
        await subscriber.flush()
        return subscriber.state_dict()

    options = {**{option: getattr(subscriber, option) for option in OPTION_NAMES}, "name": name}
    subscription = core_of(bus).subscribe(event_type, handler, options, save=save if stateful else None)
    if subscription.name != name:
        subscriber.name = subscription.name
    return Subscription(subscription)


def event_routes(subscriber: Subscriber, name: str) -> tuple[EventTypes, Callable[..., Any]]:
    """What ``subscriber``, called ``name`` in messages, handles, and with what.

    Raises:
        ConfigurationError: nothing; or a method is named after no event, is no coroutine function, or takes other
            arguments.
    """
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
        if not attribute.startswith("on_") or not callable(method := getattr(subscriber, attribute)):
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
        if not is_async(method):
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
