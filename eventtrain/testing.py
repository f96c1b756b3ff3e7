"""Tools for tests of training code: a recording subscriber, a scripted step, a clock that the test advances.

::

    from eventtrain.testing import RecordingSubscriber, ScriptedStep

    script = ScriptedStep({"loss": [1.0, 0.5, 0.5, 0.5]}, learning_rate=0.1)
    recorder = RecordingSubscriber()
    trainer = et.Trainer(script.step_fn, script.state, subscribers=[my_policy, recorder])
    trainer.fit(script.data, epochs=4)
    assert recorder.of(et.HyperparamChanged)[0].step == 3
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import optax

from eventtrain.bus.bus import EventBus
from eventtrain.bus.clock import Clock
from eventtrain.bus.options import EventTypes, SubscriptionOptions, event_classes
from eventtrain.bus.subscription import Subscription
from eventtrain.bus.wakeup import CrossLoopCondition, LoopThread
from eventtrain.errors import ConfigurationError
from eventtrain.events import Event
from eventtrain.subscribers.base import Subscriber
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_count, require_number

if TYPE_CHECKING:
    from eventtrain.bus.options import EventTypesOf

__all__ = ["FakeClock", "RecordingSubscriber", "ScriptedStep"]

E = TypeVar("E", bound=Event)


class RecordingSubscriber(Subscriber):
    """Records every event it receives, in order. Pass it to a ``Trainer``, or ``attach`` it to a bus.

    Args:
        events: a class, a base class or a union; by default every event.
        name: as for any subscription.
    """

    @checked
    def __init__(self, events: EventTypes = Event, *, name: str | None = None) -> None:
        event_classes(events)
        self.events = events
        self.name = name
        self.recorded: list[Event] = []
        """The events so far, in the order of arrival."""
        self._arrived = CrossLoopCondition()

    def attach(self, bus: EventBus, **options: Unpack[SubscriptionOptions[Event]]) -> Subscription:
        """Subscribes to a bus that no trainer uses; ``options`` as for ``EventBus.subscribe``."""
        return bus.subscribe(event_classes(self.events or Event), self.handle, **options)

    async def handle(self, event: Event) -> None:
        """Records one event."""
        self.recorded.append(event)
        self._arrived.notify_all()

    def of(self, event_type: EventTypesOf[E]) -> list[E]:
        """Returns the recorded events of these classes or their subclasses, in order. Any thread."""
        types = event_classes(event_type)
        found: list[Any] = [event for event in list(self.recorded) if isinstance(event, types)]
        return found

    async def wait_for(
        self,
        event_type: EventTypesOf[E],
        *,
        where: Callable[[E], bool] | None = None,
        count: int = 1,
        timeout_s: float = 10.0,
    ) -> E:
        """Waits until ``count`` events of these classes (with ``where`` true) are recorded; returns the last of them.

        Unlike ``EventBus.wait_for`` it also finds events from before the call, so a test cannot be too late. Any event
        loop, also one that does not serve the bus.

        Raises:
            TimeoutError: there were fewer after ``timeout_s`` seconds of real time.
        """

        wanted = " or ".join(kind.__name__ for kind in event_classes(event_type))

        def found() -> list[E]:
            return [event for event in self.of(event_type) if where is None or where(event)]

        with anyio.move_on_after(timeout_s):
            await self._arrived.wait_until(lambda: len(found()) >= count)
        events = found()
        if len(events) < count:
            raise TimeoutError(
                f"{len(events)} of {count} {wanted} were recorded within {timeout_s:g} s, among "
                f"{len(self.recorded)} events."
            )
        return events[count - 1]


class ScriptedStep:
    """A training step without a model: its metrics follow a script, so that a policy sees exactly the values of a test.

    The script is part of the state, on the device, indexed by the number of steps taken; ``step_fn`` and ``eval_fn``
    are pure and can be jitted. After its end a script repeats its last value.

    Args:
        metrics: name -> one value per step.
        eval_metrics: name -> one value per epoch, which ``eval_fn`` returns for every batch.
        steps_per_epoch: the length of ``data``, and the number of steps after which ``eval_fn`` uses the next value.
        learning_rate: if given, the state holds an ``optax.inject_hyperparams`` state with this ``learning_rate`` for
            policies to change, and the metric ``learning_rate`` is the value that each step used.

    Attributes:
        step_fn, eval_fn: arguments of ``Trainer``.
        state: argument of ``Trainer``. ``state["params"]["weight"]`` counts the steps, so that a test sees from which
            step restored weights are.
        data, eval_data: empty batches, for one epoch and for one evaluation of one batch.
    """

    @checked
    def __init__(
        self,
        metrics: Mapping[str, Sequence[float]],
        *,
        eval_metrics: Mapping[str, Sequence[float]] | None = None,
        steps_per_epoch: int = 1,
        learning_rate: float | None = None,
    ) -> None:
        require_count("ScriptedStep", "steps_per_epoch", steps_per_epoch, at_least=1)
        require_number("ScriptedStep", "learning_rate", learning_rate, optional=True)
        self.steps_per_epoch = steps_per_epoch
        self.state: dict[str, Any] = {
            "step": jnp.zeros((), jnp.int32),
            "params": {"weight": jnp.zeros(())},
            "script": _script("metrics", metrics),
            "eval_script": _script("eval_metrics", eval_metrics or {}),
        }
        if learning_rate is not None:
            optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=float(learning_rate))
            self.state["opt_state"] = optimizer.init(self.state["params"])
        self.data = [np.zeros((), np.float32)] * steps_per_epoch
        self.eval_data = [np.zeros((), np.float32)]

    @staticmethod
    def step_fn(state: dict[str, Any], batch: Any) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """The training step. Returns the script's next value of each metric."""
        metrics = _values_at(state["script"], state["step"])
        if "opt_state" in state:
            metrics["learning_rate"] = state["opt_state"].hyperparams["learning_rate"]
        params = {"weight": state["params"]["weight"] + 1}
        return {**state, "step": state["step"] + 1, "params": params}, metrics

    def eval_fn(self, state: dict[str, Any], batch: Any) -> dict[str, jax.Array]:
        """The evaluation. Returns each metric's value for the epoch of the last step."""
        epoch = (jnp.maximum(state["step"], 1) - 1) // self.steps_per_epoch
        return _values_at(state["eval_script"], epoch)


def _script(argument: str, values: Mapping[str, Sequence[float]]) -> dict[str, jax.Array]:
    script = {name: jnp.asarray(np.asarray(column)) for name, column in values.items()}
    for name, column in script.items():
        if column.ndim != 1 or not column.size:
            raise ConfigurationError(
                f"ScriptedStep: {argument}[{name!r}] must be a flat sequence of at least one number."
            )
    return script


def _values_at(script: dict[str, jax.Array], index: jax.Array) -> dict[str, jax.Array]:
    return {name: column[jnp.minimum(index, column.size - 1)] for name, column in script.items()}


class FakeClock(Clock):
    """A clock for ``EventBus(clock=...)`` that stands still until a test advances it.

    It governs ``every_s``, the delays of ``on_error="retry"``, ``timeout_s`` of handlers, of ``wait_for`` and of
    ``drain``, and the reports of dropped events. ``anyio.sleep`` in handlers and the training loop take real time.

    ::

        clock = FakeClock()
        async with et.EventBus(clock=clock) as bus:
            bus.subscribe(Ping, flaky, on_error="retry", retry_delay_s=60)
            bus.publish(Ping())
            await clock.advance(60)
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        self._lock = threading.Lock()
        self._timers: list[tuple[float, int, LoopThread, Callable[[], object]]] = []
        self._ties = count()

    def now_s(self) -> float:
        """Returns the seconds advanced so far."""
        return self._now_s

    async def advance(self, duration_s: float) -> None:
        """Advances by ``duration_s`` seconds, with a stop at every moment at which a timer is due.

        Before each stop it waits until every other task of the calling event loop is blocked, so that tasks reach their
        next wait in the order of real time. It does not wait for worker threads.
        """
        end_s = self._now_s + duration_s
        while True:
            await anyio.wait_all_tasks_blocked()
            with self._lock:
                if not self._timers or self._timers[0][0] > end_s:
                    self._now_s = end_s
                    return
                due_s, _, loop, wake = heapq.heappop(self._timers)
                self._now_s = max(self._now_s, due_s)
            loop.run_soon(wake)

    async def sleep(self, duration_s: float) -> None:
        """Sleeps until the clock was advanced by ``duration_s`` seconds."""
        woken = anyio.Event()
        with self._timer(duration_s, woken.set):
            await woken.wait()

    @contextmanager
    def timeout(self, duration_s: float | None) -> Generator[anyio.CancelScope]:
        """Returns a scope that is cancelled once the clock was advanced by ``duration_s`` seconds (None: never)."""
        with anyio.CancelScope() as scope, self._timer(duration_s, scope.cancel):
            yield scope

    @contextmanager
    def _timer(self, duration_s: float | None, wake: Callable[[], object]) -> Generator[None]:
        if duration_s is None:
            yield
            return
        timer = (self._now_s + duration_s, next(self._ties), LoopThread(), wake)
        with self._lock:
            heapq.heappush(self._timers, timer)
        try:
            yield
        finally:
            with self._lock:
                if timer in self._timers:
                    self._timers.remove(timer)
                    heapq.heapify(self._timers)
