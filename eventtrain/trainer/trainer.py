"""``Trainer``: the facade. It holds what is trained and how, and runs it on this thread or beside an event loop."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack

from eventtrain.bus.bus import EventBus, core_of
from eventtrain.bus.handlers import HandlerDecorator
from eventtrain.bus.options import SubscriptionOptions
from eventtrain.bus.subscription import Subscription
from eventtrain.control.control import Control
from eventtrain.control.requests import RunRequests
from eventtrain.control.run_state import ResumePoint
from eventtrain.device.extensions import StepExtension
from eventtrain.device.state import PyTree
from eventtrain.errors import AlreadyRunning, ConfigurationError, StateInUse
from eventtrain.events import Event
from eventtrain.events.models import Number
from eventtrain.loop.train_loop import Pace
from eventtrain.subscribers.base import Subscriber, subscribe
from eventtrain.subscribers.progress.display import shows_progress
from eventtrain.subscribers.progress.progress_bar import ProgressBar
from eventtrain.trainer.execution import Execution
from eventtrain.trainer.fit import train
from eventtrain.trainer.fit_result import FitResult
from eventtrain.trainer.inference import Inference
from eventtrain.trainer.model import Aim, Model, RunOptions
from eventtrain.trainer.resume import fingerprint
from eventtrain.trainer.resume_point import find_resumption
from eventtrain.trainer.session import Session
from eventtrain.trainer.signals import SignalGuard

if TYPE_CHECKING:
    from eventtrain.bus.options import EventTypesOf

E = TypeVar("E", bound=Event)


class Trainer:
    """Trains ``state`` with ``step_fn`` and publishes what happens on an event bus.

    Args:
        step_fn: ``(state, batch) -> (state, metrics)``; pure, traced once per batch shape. ``metrics`` is a flat
            dict of scalars of any real dtype; each keeps its exact value.
        state: any pytree of arrays (TrainState, Flax, Equinox, plain dict), sharded or not. It stays valid for its
            owner: it is copied once at the start, then donated from step to step. Leaves that are no arrays are static.
        eval_fn: ``(state, batch) -> metrics``, for ``eval_data`` and ``evaluate``.
        predict_fn: ``(state, batch) -> outputs``, a pytree of arrays, for ``predict``.
        params: lens ``state -> weights``; ``state.params`` or ``state["params"]`` if there, else the whole state.
        subscribers: ``Subscriber`` objects; functions subscribe with ``trainer.on``.
        step_extensions: run inside the jitted step (``EMA(0.999)``).
        bus: a running EventBus to share with a service, which stays its owner's; made if None.
        run_dir: where relative paths of subscribers lie; ``runs/<run_id>`` if None.
        run_id: stamped on every event; made if None.
        donate: whether each step may overwrite the state before it.
        steps_per_call: K > 1 runs up to K steps in one dispatch; events are still per step, effects still exact.
        flush_interval_s: the longest time a metric waits on the device while the loop runs.
        max_in_flight_steps: how far the loop may run ahead of the device.
        weight: name of the metric (say "examples") that weights the means of the others; its own mean is its sum.
        snapshot: how a snapshot survives: "keep" (the next step leaves the state alone), "copy" (a device copy),
            "host" (a copy in pinned host memory).
        backend, backend_options: event loop of the bus for ``fit``; ``fit_async`` uses the running one.
        drain_timeout_s: how long the end of a run waits for handlers.

    One run at a time. ``fit`` trains on the calling thread and serves the bus in another; ``fit_async`` trains in a
    thread and serves the bus on the running event loop.

    Raises:
        ConfigurationError, StateError: what cannot work, found before anything runs.
    """

    def __init__(
        self,
        step_fn: Callable[[PyTree, PyTree], tuple[PyTree, Mapping[str, Any]]],
        state: PyTree,
        eval_fn: Callable[[PyTree, PyTree], Mapping[str, Any]] | None = None,
        predict_fn: Callable[[PyTree, PyTree], PyTree] | None = None,
        params: Callable[[PyTree], PyTree] | None = None,
        subscribers: Sequence[Subscriber] = (),
        step_extensions: Sequence[StepExtension] = (),
        bus: EventBus | None = None,
        run_dir: str | Path | None = None,
        run_id: str | None = None,
        donate: bool = True,
        steps_per_call: int = 1,
        flush_interval_s: float = 0.05,
        max_in_flight_steps: int = 16,
        weight: str | None = None,
        snapshot: Literal["keep", "copy", "host"] = "keep",
        backend: str = "asyncio",
        backend_options: dict[str, Any] | None = None,
        drain_timeout_s: float = 30.0,
    ) -> None:
        _require_positive("steps_per_call", steps_per_call)
        _require_positive("max_in_flight_steps", max_in_flight_steps)
        if not flush_interval_s > 0:
            raise ConfigurationError(
                f"flush_interval_s={flush_interval_s!r}: needs a positive number of seconds."
            )
        if snapshot not in ("keep", "copy", "host"):
            raise ConfigurationError(f'snapshot={snapshot!r}: is none of "keep", "copy", "host".')
        self.run_id = run_id or uuid.uuid4().hex[:12]
        self.run_dir = (Path(run_dir) if run_dir is not None else Path("runs") / self.run_id).absolute()
        self.bus = bus if bus is not None else EventBus(run_id=self.run_id, drain_timeout_s=drain_timeout_s)
        self._model = model = Model.of(step_fn, state, eval_fn, predict_fn, params, step_extensions)
        self._options = RunOptions(
            run_id=self.run_id,
            run_dir=self.run_dir,
            run_dir_is_new=run_dir is None and run_id is None,
            donate=donate,
            steps_per_call=steps_per_call,
            pace=Pace(flush_interval_s, max(1, max_in_flight_steps // steps_per_call)),
            weight=weight,
            snapshot=snapshot,
            drain_timeout_s=drain_timeout_s,
            fingerprint=fingerprint(model.skeleton, model.leaves, steps_per_call, step_extensions),
        )
        self._core = core_of(self.bus)
        self._room = RunRequests(self._core)
        if self._core.control_source is None:
            self._core.control_source = self._room
        self._subscribers: tuple[Subscriber, ...] = ()
        for subscriber in subscribers:
            self._add(subscriber)
        self._inference = Inference(self._model, self._options, self._core)
        self._activity = Execution(self._model, self._room.inbox, self._core, backend, backend_options)
        self._session: Session | None = None

    # --- looking ----------------------------------------------------------------------------------------------

    @property
    def state(self) -> PyTree:
        """The state reached, on the device; it stays valid when training goes on.

        Raises:
            StateInUse: a run owns it now; ``control.snapshot(tag)`` keeps a copy of it.
        """
        if not self._model.leaves:
            raise StateInUse(
                f"trainer.state cannot be read while {self._activity.name or 'a run'} is in progress: the next step "
                "overwrites it. Use control.snapshot(tag) and await control.snapshots[tag].to_host()."
            )
        return self._model.skeleton.join(self._model.leaves)

    @property
    def step(self) -> int:
        """Updates completed; during a run, those dispatched."""
        return self._room.inbox.step if self._activity.busy else self._model.step

    @property
    def epoch(self) -> int:
        """Epochs completed; during a run, those whose steps are all dispatched."""
        session = self._session
        return session.epoch if session is not None else self._model.epoch

    @property
    def control(self) -> Control:
        """Commands without a cause, for services: they take effect as soon as they arrive. Any thread."""
        return Control(self._room.inbox)

    def on(
        self, event_type: EventTypesOf[E], **options: Unpack[SubscriptionOptions[E]]
    ) -> HandlerDecorator[E, Control]:
        """Subscribe the decorated function, which comes back unchanged; options as in ``EventBus.subscribe``."""
        return self.bus.on(event_type, **options)

    @property
    def subscribers(self) -> tuple[Subscriber, ...]:
        """The subscribers of the runs to come, in the order in which they are started."""
        return self._subscribers

    def subscribe(self, subscriber: Subscriber) -> Subscription:
        """Add a ``Subscriber`` for the runs to come, behind those that are there.

        Raises:
            AlreadyRunning: a run is in progress, so that it could not be started any more.
            ConfigurationError: it handles nothing, is there already, or its options cannot work.
        """
        if self._activity.busy:
            raise AlreadyRunning(
                f"subscribe({type(subscriber).__name__}) was called while {self._activity.name} is in progress, and a "
                "Subscriber starts with its run. Subscribe it before, or use trainer.on(...) for a function."
            )
        return self._add(subscriber)

    def _add(self, subscriber: Subscriber) -> Subscription:
        if any(other is subscriber for other in self._subscribers):
            raise ConfigurationError(
                f"This {type(subscriber).__name__} is a subscriber already, and would get every event twice. Make "
                "another one if two are meant."
            )
        subscription = subscribe(self.bus, subscriber)
        self._subscribers = (*self._subscribers, subscriber)
        return subscription

    def extension_states(self) -> dict[str, PyTree]:
        """The states of the step extensions by name, on the device. As ``state``: not while a run is in progress."""
        if not self._model.leaves:
            raise StateInUse(
                "The extensions' states cannot be read while a run is in progress. Read them after it."
            )
        compiled, leaves = self._model.compiled, self._model.ext_leaves
        return compiled.extension_states(leaves) if compiled is not None and leaves is not None else {}

    # --- training ---------------------------------------------------------------------------------------------

    def fit(
        self,
        data: Any,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        eval_data: Any = None,
        resume: bool | str | int | Path = False,
        progress: bool | None = None,
    ) -> FitResult:
        """Train for ``epochs`` epochs or ``steps`` steps more, on this thread; blocks until everything has settled.

        Ctrl-C stops at the next boundary, delivers what was published, and then raises KeyboardInterrupt; the state
        reached is in ``state``. SIGTERM does the same and raises SystemExit(143).

        Args:
            data: an iterable of batches, iterated anew each epoch; or a callable ``epoch -> iterable``, such as
                ``ArrayLoader``. NumPy batches are put on the device ahead of time.
            epochs, steps: of this call; one of them. The last epoch ends where its data or ``steps`` end.
            eval_data: like ``data``; evaluated at the end of each epoch. Needs ``eval_fn``.
            resume: go on from the newest checkpoint (True) of this trainer's Checkpointers, or from the one with this
                path, tag or step; ``epochs`` and ``steps`` are then those of the whole run. With nothing saved yet,
                True begins anew and says so. A run that has ended trains nothing more, unless the aim is higher.
            progress: show a progress display; by default on a terminal or in a notebook.

        Raises:
            ConfigurationError, DataError, StepError, StateError, MetricsError: bad input, by name.
            SubscriberError: a subscription with ``on_error="fail"`` failed.
            AlreadyRunning: a run of this trainer is in progress.
        """
        self._check_fit(epochs, steps, eval_data)
        extra = [ProgressBar()] if (shows_progress() if progress is None else progress) else []
        activity, inbox = self._activity, self._room.inbox
        with activity.claim("fit"), SignalGuard(inbox.ask_to_stop) as signals, activity.serving():
            result = self._fit(data, epochs, steps, eval_data, extra, resume)
        signals.raise_received()
        return result

    async def fit_async(
        self,
        data: Any,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        eval_data: Any = None,
        resume: bool | str | int | Path = False,
        progress: bool = False,
    ) -> FitResult:
        """Like ``fit``, in a thread of its own beside the running event loop, which stays free.

        step_fn is traced on this event loop's thread (where its JAX settings hold), so it pauses for that long; it is
        compiled elsewhere. Cancellation stops the run at the next boundary, delivers what was published within
        ``drain_timeout_s``, and then goes on; the state reached is in ``state``.
        """
        self._check_fit(epochs, steps, eval_data)
        extra = [ProgressBar()] if progress else []
        with self._activity.claim("fit_async"):
            return await self._activity.beside_loop(
                lambda: self._fit(data, epochs, steps, eval_data, extra, resume)
            )

    @contextmanager
    def session(self, *, eval_data: Any = None) -> Generator[Session]:
        """Keep your own loop: ``with trainer.session() as session: session.step(batch)``.

        Leaving the block settles the run as the end of ``fit`` does; an exception in it becomes RunFailed and goes on.
        The commands, events and waits are those of ``fit``. Ctrl-C makes ``step`` return False and raises at the end.
        """
        if eval_data is not None:
            self._need_eval_fn()
        activity, inbox = self._activity, self._room.inbox
        with activity.claim("session"), SignalGuard(inbox.ask_to_stop) as signals, activity.serving():
            session = self._new_session(Aim(), eval_data)
            with self._settling(session):
                yield session
        signals.raise_received()

    def _check_fit(self, epochs: int | None, steps: int | None, eval_data: Any) -> None:
        if (epochs is None) == (steps is None):
            raise ConfigurationError(
                f"fit(epochs={epochs!r}, steps={steps!r}): give exactly one, how many epochs or steps to train."
            )
        _require_positive("epochs", epochs)
        _require_positive("steps", steps)
        if eval_data is not None and self._model.eval_fn is None:
            raise ConfigurationError(
                "fit(eval_data=...) needs an eval_fn: Trainer(..., eval_fn=(state, batch) -> metrics)."
            )

    def _new_session(
        self,
        aim: Aim,
        eval_data: Any,
        extra: Sequence[Subscriber] = (),
        resumption: ResumePoint | None = None,
        *,
        restarts: bool = False,
    ) -> Session:
        subscribers = (*self._subscribers, *extra)
        return Session(
            self._model, self._options, self._core, self._room, subscribers,
            aim=aim, eval_data=eval_data, resumption=resumption, restarts=restarts,
        )  # fmt: skip

    @contextmanager
    def _settling(self, session: Session) -> Generator[None]:
        self._session = session
        try:
            with session.running():
                yield
        finally:
            self._session = None

    def _fit(
        self,
        data: Any,
        epochs: int | None,
        steps: int | None,
        eval_data: Any,
        extra: Sequence[Subscriber],
        resume: bool | str | int | Path,
    ) -> FitResult:
        model = self._model
        aim = Aim(epochs, steps, len(data) if hasattr(data, "__len__") else None)
        resumption, left = None, aim
        if resume is not False:
            resumption, left = find_resumption(
                resume, aim, model, self._options, self._room.inbox, self._subscribers
            )
        session = self._new_session(
            aim, eval_data, extra, resumption, restarts=resume is not False and resumption is None
        )
        temporary: list[Subscription] = [subscribe(self.bus, subscriber) for subscriber in extra]
        first_epoch = model.epoch
        try:
            with self._settling(session):
                train(session, data, left.epochs, left.steps, self._options.steps_per_call, resumption)
        except BaseException:
            if resumption is not None and not session.prepared:
                resumption.before.put_back()
            raise
        finally:
            for subscription in temporary:
                subscription.cancel()
        return FitResult(
            state=model.skeleton.join(model.leaves_for("final", model.leaves, model.ext_leaves)),
            step=model.step,
            epochs_completed=model.epoch - first_epoch,
            stop_reason=session.ended_by,
            history=session.history,
            undelivered=session.undelivered,
        )

    # --- evaluation and prediction ------------------------------------------------------------------------------

    def evaluate(self, data: Any) -> dict[str, Number]:
        """The means of eval_fn's metrics over ``data`` (weighted by ``weight``), in float64; blocks.

        Publishes EvalStarted, EvalStepCompleted and EvalCompleted.

        Raises:
            ConfigurationError: there is no eval_fn. DataError: no batch.
        """
        self._need_eval_fn()
        with self._activity.claim("evaluate"), self._activity.serving():
            return self._inference.evaluate(data)

    async def evaluate_async(self, data: Any) -> dict[str, Number]:
        """Like ``evaluate``, in a thread, beside the running event loop. Cancellation waits for it to end."""
        self._need_eval_fn()
        with self._activity.claim("evaluate_async"):
            return await self._activity.beside_loop(lambda: self._inference.evaluate(data))

    def predict(self, data: Any) -> PyTree:
        """predict_fn over ``data``: its outputs as NumPy arrays, joined along the first axis; blocks.

        Outputs of shape () are stacked. Publishes PredictStarted, PredictStepCompleted and PredictCompleted.

        Raises:
            ConfigurationError: there is no predict_fn. DataError: no batch.
        """
        self._need_predict_fn()
        with self._activity.claim("predict"), self._activity.serving():
            return self._inference.predict(data)

    async def predict_async(self, data: Any) -> PyTree:
        """Like ``predict``, in a thread, beside the running event loop. Cancellation waits for it to end."""
        self._need_predict_fn()
        with self._activity.claim("predict_async"):
            return await self._activity.beside_loop(lambda: self._inference.predict(data))

    def _need_eval_fn(self) -> None:
        if self._model.eval_fn is None:
            raise ConfigurationError(
                "evaluate() needs an eval_fn: Trainer(..., eval_fn=(state, batch) -> metrics)."
            )

    def _need_predict_fn(self) -> None:
        if self._model.predict_fn is None:
            raise ConfigurationError(
                "predict() needs a predict_fn: Trainer(..., predict_fn=(state, batch) -> outputs)."
            )


def _require_positive(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigurationError(f"{name}={value!r}: needs a whole number of at least 1.")
