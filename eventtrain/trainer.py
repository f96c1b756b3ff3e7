"""``Trainer``: the facade. It holds what is trained and how, and runs it on this thread or beside an event loop."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
import jax
from anyio.from_thread import start_blocking_portal

from eventtrain.bus.bus import EventBus
from eventtrain.bus.handlers import Handler
from eventtrain.bus.options import EventTypes
from eventtrain.bus.subscription import Subscription
from eventtrain.control import Control
from eventtrain.control_room import ControlRoom
from eventtrain.device.extensions import StepExtension
from eventtrain.device.state import PyTree, place, split_state
from eventtrain.device.x64 import sixty_four_bit
from eventtrain.errors import AlreadyRunning, ConfigurationError, SnapshotError, StateInUse
from eventtrain.events import (
    EpochCompleted,
)
from eventtrain.fitting import train
from eventtrain.frozen import Number
from eventtrain.inference import Inference
from eventtrain.loop import Pace
from eventtrain.model import Aim, CallOnCaller, Model, RunOptions
from eventtrain.progress import ProgressBar
from eventtrain.progress_display import shows_progress
from eventtrain.resuming import fingerprint, remaining, take_over, why_ended
from eventtrain.saved_run import Resumption, SavedRun
from eventtrain.session import Session
from eventtrain.signals import SignalGuard
from eventtrain.subscriber import Subscriber, subscribe

logger = logging.getLogger("eventtrain")

T = TypeVar("T")


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` returns.

    Attributes:
        state: the state reached, on the device; valid until the caller gives it away. With a step extension whose
            ``use_for`` has "final", its weights stand in it; ``trainer.state`` has those that training goes on with.
        step: updates completed over the trainer's life.
        epochs_completed: of this call.
        stop_reason: "completed", or the reason given to ``control.stop``, "interrupted", "preempted", "cancelled".
        history: the EpochCompleted events of this call.
        undelivered: subscription name -> events not handled within ``drain_timeout_s``; empty if all were.
    """

    state: PyTree
    step: int
    epochs_completed: int
    stop_reason: str
    history: list[EpochCompleted]
    undelivered: Mapping[str, int]


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
        _require_callable("step_fn", step_fn, "(state, batch) -> (state, metrics)")
        for name, function in (("eval_fn", eval_fn), ("predict_fn", predict_fn), ("params", params)):
            if function is not None:
                _require_callable(
                    name, function, "a function of (state, batch)" if name != "params" else "state -> weights"
                )
        _require_positive("steps_per_call", steps_per_call)
        _require_positive("max_in_flight_steps", max_in_flight_steps)
        if not flush_interval_s > 0:
            raise ConfigurationError(
                f"flush_interval_s={flush_interval_s!r}: needs a positive number of seconds."
            )
        if snapshot not in ("keep", "copy", "host"):
            raise ConfigurationError(f'snapshot={snapshot!r}: is none of "keep", "copy", "host".')
        leaves, skeleton = split_state(state)
        self.run_id = run_id or uuid.uuid4().hex[:12]
        self._run_dir_given = run_dir is not None or run_id is not None
        self.run_dir = (Path(run_dir) if run_dir is not None else Path("runs") / self.run_id).absolute()
        self.bus = bus if bus is not None else EventBus(run_id=self.run_id, drain_timeout_s=drain_timeout_s)
        self._model = Model(
            step_fn,
            eval_fn,
            predict_fn,
            params or _default_params,
            tuple(step_extensions),
            skeleton,
            place(leaves),
        )
        self._options = RunOptions(
            run_id=self.run_id,
            run_dir=self.run_dir,
            donate=donate,
            steps_per_call=steps_per_call,
            pace=Pace(flush_interval_s, max(1, max_in_flight_steps // steps_per_call)),
            weight=weight,
            snapshot=snapshot,
            drain_timeout_s=drain_timeout_s,
            fingerprint=fingerprint(skeleton, self._model.leaves, steps_per_call, step_extensions),
        )
        self._backend = (backend, backend_options)
        self._room = ControlRoom(self.bus)
        if not self.bus.has_control:
            self.bus.attach_control(self._room)
        self._subscribers = tuple(subscribers)
        for subscriber in self._subscribers:
            subscribe(self.bus, subscriber)
        self._inference = Inference(self._model, self._options, self.bus)
        self._busy = threading.Lock()
        self._activity = ""
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
                f"trainer.state cannot be read while {self._activity or 'a run'} is in progress: the next step "
                "overwrites it. Use control.snapshot(tag) and await control.snapshots[tag].to_host()."
            )
        return self._model.skeleton.join(self._model.leaves)

    @property
    def step(self) -> int:
        """Updates completed; during a run, those dispatched."""
        return self._room.inbox.step if self._busy.locked() else self._model.step

    @property
    def epoch(self) -> int:
        """Epochs completed; during a run, those whose steps are all dispatched."""
        session = self._session
        return session.epoch if session is not None else self._model.epoch

    @property
    def control(self) -> Control:
        """Commands without a cause, for services: they take effect as soon as they arrive. Any thread."""
        return Control(self._room.inbox)

    def on(self, event_type: EventTypes, **options: Any) -> Callable[[Handler], Handler]:
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
            ConfigurationError: it handles nothing, or its options cannot work.
        """
        if self._busy.locked():
            raise AlreadyRunning(
                f"subscribe({type(subscriber).__name__}) was called while {self._activity} is in progress, and a "
                "Subscriber starts with its run. Subscribe it before, or use trainer.on(...) for a function."
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
        with self._claim("fit"), SignalGuard(self._room.inbox.ask_to_stop) as signals:
            result = self._with_bus(lambda: self._fit(data, epochs, steps, eval_data, extra, resume))
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
        with self._claim("fit_async"):
            return await self._beside_loop(lambda: self._fit(data, epochs, steps, eval_data, extra, resume))

    @contextmanager
    def session(self, *, eval_data: Any = None) -> Generator[Session]:
        """Keep your own loop: ``with trainer.session() as session: session.step(batch)``.

        Leaving the block settles the run as the end of ``fit`` does; an exception in it becomes RunFailed and goes on.
        The commands, events and waits are those of ``fit``. Ctrl-C makes ``step`` return False and raises at the end.
        """
        if eval_data is not None:
            self._need_eval_fn()
        with self._claim("session"), SignalGuard(self._room.inbox.ask_to_stop) as signals, self._serving():
            session = self._open_session(Aim(), eval_data, ())
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

    def _open_session(
        self,
        aim: Aim,
        eval_data: Any,
        extra: Sequence[Subscriber],
        resumption: Resumption | None = None,
        *,
        restarts: bool = False,
    ) -> Session:
        return Session(
            self._model,
            self._options,
            self.bus,
            self._room,
            (*self._subscribers, *extra),
            aim=aim,
            eval_data=eval_data,
            resumption=resumption,
            restarts=restarts,
        )

    @contextmanager
    def _settling(self, session: Session) -> Generator[None]:
        """Begin the run, and end it whatever happens."""
        session.claim_bus()
        self._session = session
        try:
            try:
                session.begin()
                yield
            except BaseException as error:
                session.finish(error)
                raise
            session.finish()
        finally:
            session.release_bus()
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
        length = len(data) if hasattr(data, "__len__") else None
        aim = Aim(epochs, steps, length)
        resumption = self._find_resumption(resume)
        if resumption is not None:
            epochs, steps = remaining(resumption.facts.loop, epochs, steps)
            resumption = self._said_if_ended(resumption, aim, epochs, steps, named=resume is not True)
        session = self._open_session(
            aim, eval_data, extra, resumption, restarts=resume is not False and resumption is None
        )
        temporary: list[Subscription] = [subscribe(self.bus, subscriber) for subscriber in extra]
        first_epoch = self._model.epoch
        try:
            with self._settling(session):
                train(session, data, epochs, steps, self._options.steps_per_call, resumption)
        except BaseException:
            if resumption is not None and not session.prepared:
                resumption.before.put_back()
            raise
        finally:
            for subscription in temporary:
                subscription.cancel()
        model = self._model
        return FitResult(
            state=model.skeleton.join(model.leaves_for("final", model.leaves, model.ext_leaves)),
            step=self._model.step,
            epochs_completed=self._model.epoch - first_epoch,
            stop_reason=session.ended_by,
            history=session.history,
            undelivered=session.undelivered,
        )

    def _find_resumption(self, resume: bool | str | int | Path) -> Resumption | None:
        """The checkpoint to go on from, after the model and the subscribers have taken it over."""
        if resume is False:
            return None
        finders = [subscriber for subscriber in self._subscribers if subscriber.resumes_runs]
        if not finders:
            raise ConfigurationError(
                f"fit(resume={resume!r}) needs somebody who keeps checkpoints: "
                "Trainer(subscribers=[subs.Checkpointer(...)])."
            )
        found: list[SavedRun] = []
        missing: list[SnapshotError] = []
        for subscriber in finders:
            try:
                saved = subscriber.saved_run(self.run_dir, resume)
            except SnapshotError as error:  # another one may have it
                missing.append(error)
            else:
                found += [saved] if saved is not None else []
        if not found and missing:
            raise missing[0]
        if not found:
            hint = (
                ""
                if self._run_dir_given
                else " Give Trainer(run_dir=...): without it each trainer has a new folder."
            )
            logger.warning("Nothing is saved in %s yet, so the run begins anew.%s", self.run_dir, hint)
            return None
        saved = max(found, key=lambda saved: (saved.facts is not None, saved.time, saved.step))
        return take_over(saved, self._model, self._room.inbox, self._subscribers, self._options.fingerprint)

    def _said_if_ended(
        self, resumption: Resumption, aim: Aim, epochs: int | None, steps: int | None, *, named: bool
    ) -> Resumption:
        """``resumption``, with the reason why its run had reached its end if it had; that is said."""
        ended = why_ended(resumption.facts.loop, aim, epochs, steps, named=named)
        if ended is None:
            return resumption
        logger.warning(
            "The run of %s has ended at step %d (%s), so nothing more is trained. Aim higher, or name a checkpoint to "
            "go on from, as in fit(resume=%d).",
            self.run_dir, resumption.facts.loop.step, ended, resumption.facts.loop.step,
        )  # fmt: skip
        return replace(resumption, ended=ended)

    # --- evaluation and prediction ------------------------------------------------------------------------------

    def evaluate(self, data: Any) -> dict[str, Number]:
        """The means of eval_fn's metrics over ``data`` (weighted by ``weight``), in float64; blocks.

        Publishes EvalStarted, EvalStepCompleted and EvalCompleted.

        Raises:
            ConfigurationError: there is no eval_fn. DataError: no batch.
        """
        self._need_eval_fn()
        with self._claim("evaluate"):
            return self._with_bus(lambda: self._inference.evaluate(data))

    async def evaluate_async(self, data: Any) -> dict[str, Number]:
        """Like ``evaluate``, in a thread, beside the running event loop. Cancellation waits for it to end."""
        self._need_eval_fn()
        with self._claim("evaluate_async"):
            return await self._beside_loop(lambda: self._inference.evaluate(data))

    def predict(self, data: Any) -> PyTree:
        """predict_fn over ``data``: its outputs as NumPy arrays, joined along the first axis; blocks.

        Outputs of shape () are stacked. Publishes PredictStarted, PredictStepCompleted and PredictCompleted.

        Raises:
            ConfigurationError: there is no predict_fn. DataError: no batch.
        """
        self._need_predict_fn()
        with self._claim("predict"):
            return self._with_bus(lambda: self._inference.predict(data))

    async def predict_async(self, data: Any) -> PyTree:
        """Like ``predict``, in a thread, beside the running event loop. Cancellation waits for it to end."""
        self._need_predict_fn()
        with self._claim("predict_async"):
            return await self._beside_loop(lambda: self._inference.predict(data))

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

    # --- where things run -----------------------------------------------------------------------------------------

    @contextmanager
    def _claim(self, activity: str) -> Generator[None]:
        if not self._busy.acquire(blocking=False):
            raise AlreadyRunning(
                f"{activity} was called while {self._activity} of the same trainer is in progress. Wait for it, "
                "stop it with control.stop(), or use another Trainer."
            )
        self._activity = activity
        self._room.inbox.arrived.clear()  # a stop that came too late for the last run is none for this one
        try:
            yield
        finally:
            self._activity = ""
            self._model.compile_on_caller = _here
            self._busy.release()

    @contextmanager
    def _serving(self) -> Generator[None]:
        """Have the bus served: by its owner's event loop if that runs, else by one in a thread of our own."""
        if self.bus.served_here:
            raise ConfigurationError(
                f"{self._activity}() blocks, and was called on the event loop that serves its bus: it would wait for "
                f"itself. Await fit_async, evaluate_async or predict_async there, or call {self._activity} in a thread."
            )
        if self.bus.running:
            yield
            return
        backend, options = self._backend
        with (
            start_blocking_portal(backend, options) as portal,
            portal.wrap_async_context_manager(self.bus.serve()),
        ):
            yield

    def _with_bus(self, work: Callable[[], T]) -> T:
        with self._serving():
            return work()

    async def _beside_loop(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread while this event loop serves the bus, to the end even when cancelled."""
        outcome: list[T] = []
        failure: list[BaseException] = []
        finished = anyio.Event()
        on_caller: CallOnCaller = anyio.from_thread.run_sync
        self._model.compile_on_caller = on_caller
        x64 = bool(
            jax.config.read("jax_enable_x64")
        )  # a setting of each thread: handed on to the training thread

        def work_in_thread() -> T:
            with sixty_four_bit(x64):
                return work()

        async def run_thread() -> None:
            try:
                outcome.append(
                    await anyio.to_thread.run_sync(work_in_thread, limiter=anyio.CapacityLimiter(1))
                )
            except BaseException as error:
                failure.append(error)

        async def serve_and_run() -> None:
            try:
                with anyio.CancelScope(shield=True):
                    if self.bus.running:
                        await run_thread()
                    else:
                        async with self.bus.serve():
                            await run_thread()
            except Exception as error:
                failure.append(error)
            finally:
                finished.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve_and_run)
            try:
                await finished.wait()
            except anyio.get_cancelled_exc_class():
                self._room.inbox.ask_to_stop("cancelled")
                self._room.inbox.ring()
                raise
        if failure:
            raise failure[0]
        return outcome[0]


def _here(function: Callable[[], Any]) -> Any:
    return function()


def _default_params(state: PyTree) -> PyTree:
    if isinstance(state, Mapping):
        return state.get("params", state)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    return getattr(state, "params", state)


def _require_callable(name: str, function: object, shape: str) -> None:
    if not callable(function):
        raise ConfigurationError(f"{name} must be a function ({shape}), not {type(function).__name__}.")


def _require_positive(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigurationError(f"{name}={value!r}: needs a whole number of at least 1.")
