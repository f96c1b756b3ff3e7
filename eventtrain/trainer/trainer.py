"""``Trainer``: what is trained and how. It runs on the calling thread, or beside a running event loop."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, Unpack, overload

import jax

from eventtrain.bus.bus import EventBus, core_of
from eventtrain.bus.handlers import Handler, HandlerDecorator
from eventtrain.bus.options import SubscriptionOptions, event_classes
from eventtrain.bus.subscription import Subscription, SubscriptionCore
from eventtrain.control.control import Control
from eventtrain.control.control_plane import ControlPlane
from eventtrain.control.held_states import StateHandlerDecorator
from eventtrain.control.run_state import SavedRun
from eventtrain.data.epoch_iterator import Leftovers
from eventtrain.data.sources import describe, evaluation_sets, length_of
from eventtrain.device.extensions import StepExtension
from eventtrain.device.fused_step import StepOptions
from eventtrain.device.hyperparams import Hyperparam, find_hyperparams, labels, read
from eventtrain.device.model import Model
from eventtrain.device.state import PyTree
from eventtrain.errors import AlreadyRunning, ConfigurationError, PeerLost, StateInUse
from eventtrain.events import EpochCompleted, Event, HyperparamChanged
from eventtrain.events.models import Number
from eventtrain.loop.agreement.agreement import Agreement
from eventtrain.loop.evaluation import EvaluationSource
from eventtrain.loop.run_recorder import Aim, RunRecorder
from eventtrain.loop.train_loop import Pace
from eventtrain.notebook import html
from eventtrain.subscribers._shared.paths import local_path
from eventtrain.subscribers.base import Subscriber, subscribe
from eventtrain.subscribers.progress.display import shows_progress
from eventtrain.subscribers.progress.progress_bar import ProgressBar
from eventtrain.trainer.arguments import checked_derivations, checked_run_id, require_aim, require_start
from eventtrain.trainer.execution import Execution
from eventtrain.trainer.fit import train
from eventtrain.trainer.fit_result import FitResult
from eventtrain.trainer.functions import Functions
from eventtrain.trainer.inference import Inference
from eventtrain.trainer.processes import Opening, joined
from eventtrain.trainer.remote_control import RemoteControl
from eventtrain.trainer.resume import (
    ResumePoint,
    find_saved_run,
    fingerprint,
    is_beyond,
    logger,
    remaining,
    take_over,
)
from eventtrain.trainer.run import Run, RunOptions
from eventtrain.trainer.run_directory import next_attempt, run_directory
from eventtrain.trainer.session import Session, session_of
from eventtrain.trainer.shared_paths import MARK, check_paths, marked
from eventtrain.trainer.signals import SignalGuard, checked_signals, raise_signal
from eventtrain.trainer.subscriber_lifecycle import RunSubscriber
from eventtrain.trainer.tracebacks import UserFrames
from eventtrain.validation.annotations import checked, fits, shown
from eventtrain.validation.arguments import require_choice, require_count, require_number

if TYPE_CHECKING:
    from eventtrain.bus.options import EventTypesOf

E = TypeVar("E", bound=Event)
S = TypeVar("S")


class Trainer(Generic[S]):
    """Trains ``state`` with ``step_fn`` and publishes what happens on an event bus.

    Args:
        step_fn: ``(state, batch) -> (state, metrics)``. Pure; traced once per batch shape. ``metrics`` is a flat dict
            of scalars of any real dtype; each keeps its exact value. ``Mean``, ``Sum``, ``Max`` and ``Last`` around one
            say what the epoch has of it; by default its mean.
        state: any pytree of arrays (TrainState, Flax, Equinox, plain dict), sharded or not. It stays valid for its
            owner: it is copied once at the start, and the copy is donated from step to step. Leaves that are not
            arrays are static; a Python number that step_fn changes becomes an array, as under ``jax.jit``.
        eval_fn: ``(state, batch) -> metrics``, for ``eval_data`` and ``evaluate``. It, and step_fn, may also return
            metrics with state: pytrees with ``merge(other)`` and ``compute()``, which are merged on the device over all
            batches (clu.metrics, metrax, metrics of Flax NNX).
        predict_fn: ``(state, batch) -> outputs``, a pytree of arrays, for ``predict``.
        params: lens ``state -> weights``, any tree of arrays of the state. By default ``state.params`` or
            ``state["params"]``, parts named so further inside, the ``nnx.Param`` variables of Flax NNX, or what is
            beside an optax state. If these do not tell, everything that needs the weights is refused.
        subscribers: ``Subscriber`` objects. Functions subscribe with ``trainer.on``.
        step_extensions: run inside the jitted step, for example ``EMA(0.999)``.
        bus: a running EventBus to share with a service, which stays its owner. None: the trainer makes one.
        run_dir: where relative paths of subscribers are. None: ``runs/<run_id>``. One run at a time may use it.
        run_id: stamped on every event: letters, digits and ``_ . -``. None: a random one.
        donate: whether each step may overwrite the state before it.
        steps_per_call: K > 1 runs up to K steps in one dispatch. There is still an event per step, and commands still
            take effect at exactly their boundary.
        flush_interval_s: the longest time a metric waits on the device while the loop runs.
        max_in_flight_steps: how far the loop may run ahead of the device.
        weight: name of the metric, for example "examples", that weights the means of the others; its own mean is its
            sum.
        snapshot: how a snapshot survives: "keep" (the next step does not donate the state), "copy" (a copy on the
            device), "host" (a copy in pinned host memory).
        batch_sharding: of each batch, for training, evaluation and prediction: a ``NamedSharding``, such as
            ``NamedSharding(mesh, PartitionSpec("data"))``, or a pytree of them, like the batch or a prefix of it. Each
            device gets its part of NumPy arrays, and of JAX arrays that are not committed to devices; without it, each
            gets all of a NumPy batch. A state that is not committed goes to the same mesh. In one process: several
            need ``ArrayLoader(sharding=...)``.
        backend, backend_options: event loop of the bus for ``fit``. ``fit_async`` uses the running one.
        drain_timeout_s: how long the end of a run waits for handlers.
        debug: run ``step_fn`` uncompiled before each step too, so that ``print`` and ``breakpoint()`` in it see values
            and a NaN raises FloatingPointError at its operation. Slow. Requires ``steps_per_call=1``. Tracebacks keep
            the frames of eventtrain and JAX.
        preempt_on: signals that end a run as SIGTERM does, for example ``[signal.SIGUSR1]`` under Slurm.
        remote_control: serve ``run_dir/control.sock`` during each run that has subscribers, for ``eventtrain ctl``, and
            look for the files STOP and CHECKPOINT in run_dir. Only the user of the run may connect.
        derive: name -> function of the means (and of what comes before it), for epochs and evaluations alike:
            ``{"perplexity": lambda means: math.exp(means["loss"])}``. One that asks for a metric that is not there is
            left out. Runs on another thread.

    One run at a time. ``fit`` trains on the calling thread and serves the bus in another; ``fit_async`` trains in a
    thread and serves the bus on the running event loop.

    Raises:
        ConfigurationError, StateError: an argument is invalid.
    """

    @checked
    def __init__(
        self,
        step_fn: Callable[[S, Any], tuple[S, Mapping[str, Any]]],
        state: S,
        eval_fn: Callable[[S, Any], Any] | None = None,
        predict_fn: Callable[[S, Any], PyTree] | None = None,
        params: Callable[[S], PyTree] | None = None,
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
        batch_sharding: Any = None,
        backend: str = "asyncio",
        backend_options: dict[str, Any] | None = None,
        drain_timeout_s: float = 30.0,
        debug: bool = False,
        remote_control: bool = True,
        derive: Mapping[str, Callable[[Mapping[str, Number]], Number]] | None = None,
        preempt_on: Sequence[int] = (),
    ) -> None:
        require_count("Trainer", "steps_per_call", steps_per_call, at_least=1)
        require_count("Trainer", "max_in_flight_steps", max_in_flight_steps, at_least=1)
        require_number("Trainer", "flush_interval_s", flush_interval_s, above=0)
        require_number("Trainer", "drain_timeout_s", drain_timeout_s, at_least=0)
        require_choice("Trainer", "snapshot", snapshot, ("keep", "copy", "host"))
        require_choice("Trainer", "backend", backend, ("asyncio", "trio"))
        if debug and steps_per_call > 1:
            raise ConfigurationError(
                f"Trainer(debug=True, steps_per_call={steps_per_call}): debug runs one step at a time. Use "
                "steps_per_call=1."
            )
        self._attempt = 0
        self.run_id = uuid.uuid4().hex[:12] if run_id is None else checked_run_id(run_id)
        folder = (
            Path("runs") / self.run_id if run_dir is None else local_path(run_dir, "Trainer(run_dir=...)")
        )
        self.run_dir = folder.absolute()
        self.bus = bus if bus is not None else EventBus(run_id=self.run_id, drain_timeout_s=drain_timeout_s)
        self._model = Model(
            step_fn,
            state,
            eval_fn=eval_fn,
            predict_fn=predict_fn,
            params=params,
            extensions=step_extensions,
            options=StepOptions(donate=donate, steps_per_call=steps_per_call, snapshot=snapshot, debug=debug),
            batch_sharding=batch_sharding,
        )
        self._options = RunOptions(
            run_id=self.run_id,
            run_dir=self.run_dir,
            run_dir_is_new=run_dir is None and run_id is None,
            pace=Pace(flush_interval_s, max(1, max_in_flight_steps // steps_per_call)),
            weight=weight,
            derive=checked_derivations(derive or {}),
            drain_timeout_s=drain_timeout_s,
        )
        self._remote_control = remote_control
        self._preempt_on = checked_signals(preempt_on)
        self._fingerprint = fingerprint(self._model)
        self._core = core_of(self.bus)
        self._plane = ControlPlane(self._core)
        if self._core.control_source is None:
            self._core.control_source = self._plane
        self._members: tuple[RunSubscriber, ...] = ()
        for subscriber in subscribers:
            self._add(subscriber)
        self._inference = Inference(self._model, self._options, self._core, self._plane)
        self._functions = Functions(self._core, self._plane)
        self._execution = Execution(
            self._model, self._plane.queue, self._core, self._functions, backend, backend_options
        )
        self._run: Run | None = None
        self._signal: int | None = None
        self._leftovers = Leftovers()
        self._user_frames = UserFrames(everything=debug)

    def __enter__(self) -> Self:
        return self

    def __repr__(self) -> str:
        return f"<Trainer {self.run_id!r} {self._position()}, {len(self.subscribers)} subscribers>"

    def _repr_html_(self) -> str:
        leaves = self._model.leaves
        size = f"{sum(leaf.size for leaf in leaves):,} numbers, {sum(leaf.nbytes for leaf in leaves):,} bytes"
        facts = [
            ("run_dir", self.run_dir),
            ("state", f"{len(leaves):,} arrays: {size}" if leaves else "in use by the run"),
            *self.control.hyperparams.items(),
        ]
        statistics = [one.statistics() for one in self._subscriptions()]
        rows = [
            (one.name, one.delivered, one.pending, one.errors, one.dropped, one.state) for one in statistics
        ]
        head = ("subscriber", "handled", "pending", "failures", "dropped", "state")
        table = html.table(head, rows) if rows else ""
        return html.box(html.title(f"Trainer {self.run_id}", self._position()), html.facts(facts[:30]), table)

    def _position(self) -> str:
        doing = "closed" if self._execution.closed else self._execution.name
        return f"at step {self.step:,}, epoch {self.epoch:,}" + (f", {doing}" if doing else "")

    def _subscriptions(self) -> list[SubscriptionCore]:
        subscriptions = [*(member.subscription for member in self._members), *self._functions.subscriptions]
        return [one for one in subscriptions if one.state != "cancelled"]

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """End the subscriptions of this trainer: its names are free again on a shared bus. Idempotent.

        Its state can still be read. Between runs its subscriptions receive nothing anyway, and they end with the
        trainer when nothing refers to that any more.

        Raises:
            AlreadyRunning: a run is in progress.
        """
        if self._execution.busy:
            raise AlreadyRunning(f"Cannot close the trainer while {self._execution.name} is in progress.")
        self._execution.closed = True
        for member in self._members:
            member.subscription.cancel()
        self._functions.cancel()
        if self._core.control_source is self._plane:
            self._core.control_source = None

    # --- reading ----------------------------------------------------------------------------------------------

    @property
    def state(self) -> S:
        """The state reached, on the device. It stays valid when training continues.

        Raises:
            StateInUse: a run owns it now. ``control.snapshot(tag)`` keeps it.
        """
        if not self._model.leaves:
            raise StateInUse(
                f"trainer.state cannot be read while {self._execution.name or 'a run'} is in progress: the next step "
                "overwrites it. Use control.snapshot(tag) and await control.snapshots[tag].to_host()."
            )
        return self._model.structure.join(self._model.leaves)

    @property
    def step(self) -> int:
        """Updates completed; during a run, those dispatched."""
        return self._plane.view.step if self._execution.busy else self._model.step

    @property
    def epoch(self) -> int:
        """Epochs completed; during a run, those whose steps are all dispatched."""
        run = self._run
        return run.status.epoch if run is not None else self._model.epoch

    @property
    def control(self) -> Control:
        """Commands without a cause, for services: they take effect as soon as they arrive. Any thread."""
        return self._plane.control

    @overload
    def on(
        self,
        event_type: EventTypesOf[E],
        *,
        with_state: Literal[True],
        **options: Unpack[SubscriptionOptions[E]],
    ) -> StateHandlerDecorator[E, S, Control]: ...
    @overload
    def on(
        self,
        event_type: EventTypesOf[E],
        *,
        with_state: Literal[False] = False,
        **options: Unpack[SubscriptionOptions[E]],
    ) -> HandlerDecorator[E, Control]: ...
    def on(
        self, event_type: Any, *, with_state: bool = False, **options: Unpack[SubscriptionOptions[Any]]
    ) -> Any:
        """Subscribe the decorated function, and return it unchanged. Options as in ``EventBus.subscribe``.

        It receives events while this trainer trains, evaluates or predicts. For those in between use ``bus.on``.

        Args:
            event_type: a class, a base class or a union.
            with_state: call it with ``(event, state)`` or ``(event, state, control)``. ``state`` is the training state
                after exactly ``event.step``, on the device (with ``snapshot="host"`` in pinned host memory), not a
                copy; it is released when the function returns. Do not donate it. Training continues with one more state
                in memory, and waits at the next such event until the function has returned. For StepCompleted,
                EpochStarted and EpochCompleted, with ``lag`` None or 0.

        Raises:
            ConfigurationError: an option is invalid.
            AlreadyRunning: ``with_state`` while a run is in progress.
        """
        event_classes(event_type)  # @trainer.on without arguments would subscribe nothing: refused now

        def subscribe_function(handler: Handler) -> Handler:
            self._functions.subscribe(event_type, handler, options, with_state=with_state)
            return handler

        return subscribe_function

    @property
    def subscribers(self) -> tuple[Subscriber, ...]:
        """The subscribers of the next runs, in the order in which they are started."""
        return tuple(member.subscriber for member in self._members)

    def subscribe(self, subscriber: Subscriber) -> Subscription:
        """Add a ``Subscriber`` for the next runs, behind the others.

        Raises:
            AlreadyRunning: a run is in progress, and subscribers start with their run.
            ConfigurationError: it handles nothing, was added before, or has invalid options.
        """
        if self._execution.busy:
            raise AlreadyRunning(
                f"Cannot subscribe {type(subscriber).__name__} while {self._execution.name} is in progress: a "
                "Subscriber starts with its run. Subscribe it before, or use trainer.on(...) for a function."
            )
        return Subscription(self._add(subscriber))

    def _add(self, subscriber: Subscriber) -> SubscriptionCore:
        if any(subscriber is other for other in self.subscribers):
            raise ConfigurationError(
                f"This {type(subscriber).__name__} is subscribed already and would get every event twice. Make a "
                "second one if you want two."
            )
        subscription = subscribe(self._core, subscriber)
        self._members = (*self._members, RunSubscriber(subscriber, subscription))
        return subscription

    def extension_states(self) -> dict[str, PyTree]:
        """Returns the states of the step extensions by name, on the device. Raises StateInUse as ``state`` does."""
        if not self._model.leaves:
            raise StateInUse(
                "The states of the step extensions cannot be read while a run is in progress. Read them after it."
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
        hyperparams: Mapping[str, Number] | None = None,
        progress: bool | None = None,
    ) -> FitResult[S]:
        """Train for ``epochs`` epochs or ``steps`` steps more, on this thread. Blocks until everything has settled.

        Ctrl-C stops at the next boundary, delivers what was published, and then raises KeyboardInterrupt; the state
        reached is in ``state``. SIGTERM does the same and raises SystemExit(143). In a run of several processes every
        one of them raises it, whichever got the signal.

        Args:
            data: an iterable of batches, iterated again in each epoch; or a callable ``epoch -> iterable``, such as
                ``ArrayLoader``. Large NumPy batches are put on the device ahead of time.
            epochs, steps: of this call; exactly one of them. The last epoch ends where its data or ``steps`` end.
            eval_data: like ``data``; evaluated at the end of each epoch. Requires ``eval_fn``. Several sets by name,
                ``{"clean": ..., "noisy": ...}``, are evaluated one after the other, as one evaluation: their metrics
                are ``clean_loss`` and so on, in epochs ``val_clean_loss``.
            resume: continue from the newest checkpoint (True) of this trainer's Checkpointers, or from the one with
                this path, tag or step. ``epochs`` and ``steps`` are then those of the whole run. If nothing is saved
                yet, True starts from scratch and logs that. A run that has ended trains nothing more, unless the aim
                is higher.
            hyperparams: name (or path, where several have one name) -> value, set before the first step, whether the
                run resumes or not, and published as HyperparamChanged. A script that resumes again and again
                (``resume=True``) with the same values sets them once: the checkpoints remember it.
            progress: show a progress display. By default if standard error is a terminal, and in a notebook. True: also
                in a pipe or a file (nohup, Slurm), as one line for each epoch.

        Raises:
            ConfigurationError, DataError, StepError, StateError, MetricsError: invalid input, by name.
            HyperparamError: one of ``hyperparams`` does not exist, follows a schedule, or cannot have that value.
            SubscriberError: a subscription with ``on_error="fail"`` failed.
            AlreadyRunning: a run of this trainer is in progress.
        """
        with self._user_frames:
            self._check_fit(epochs, steps, eval_data, resume, hyperparams, progress)
            extra = [ProgressBar()] if (shows_progress() if progress is None else progress) else []
            with self._on_this_thread("fit"):
                return self._fit(data, epochs, steps, eval_data, extra, resume, hyperparams or {})

    async def fit_async(
        self,
        data: Any,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        eval_data: Any = None,
        resume: bool | str | int | Path = False,
        hyperparams: Mapping[str, Number] | None = None,
        progress: bool = False,
    ) -> FitResult[S]:
        """Like ``fit``, in a thread of its own beside the running event loop, which stays free.

        step_fn is traced on the thread of this event loop, where its JAX settings apply; the loop is blocked for that
        long. It is compiled in the other thread. Cancellation stops the run at the next boundary and delivers what
        was published within ``drain_timeout_s`` before it is raised; the state reached is in ``state``.
        """
        with self._user_frames, self._execution.claim("fit_async"):
            self._check_fit(epochs, steps, eval_data, resume, hyperparams, progress)
            extra = [ProgressBar()] if progress else []
            return await self._execution.beside_loop(
                lambda: self._fit(data, epochs, steps, eval_data, extra, resume, hyperparams or {})
            )

    @contextmanager
    def session(
        self,
        *,
        eval_data: Any = None,
        resume: bool | str | int | Path = False,
        hyperparams: Mapping[str, Number] | None = None,
    ) -> Generator[Session[S]]:
        """Drive the run from your own loop: ``with trainer.session() as session: session.step(batch)``.

        Leaving the block settles the run as the end of ``fit`` does. An exception in it is published as RunFailed and
        raised again. Commands, events and waits are those of ``fit``. Ctrl-C makes ``step`` return False and raises at
        the end of the block.

        Args:
            eval_data: for ``control.evaluate()`` and the end of epochs. Requires ``eval_fn``.
            resume: as for ``fit``. Your loop continues at ``session.step_count``, or at ``session.epoch`` and
                ``session.batch``. In a run that was stopped for good, ``step`` returns False at once.
            hyperparams: as for ``fit``.

        Raises:
            ConfigurationError: there is no eval_fn, or no Checkpointer to resume from.
            HyperparamError: one of ``hyperparams`` does not exist, follows a schedule, or cannot have that value.
            SnapshotError: there is no such checkpoint.
        """
        require_start("session", resume, hyperparams)
        if eval_data is not None:
            self._require_eval_fn("session(eval_data=...)")
            evaluation_sets(eval_data)
        with (
            self._on_this_thread("session"),
            self._begun("session", Aim(), None, eval_data, resume, hyperparams or {}) as begun,
        ):
            assert begun is not None  # no checkpoint is beyond an aim that is open
            yield session_of(begun[0], self._plane.control)

    @contextmanager
    def _on_this_thread(self, name: str) -> Generator[None]:
        """Claim the trainer, handle signals, and have the bus served, for the length of the block."""
        execution, queue, self._signal = self._execution, self._plane.queue, None
        guard = SignalGuard(queue.ask_to_stop, self._preempt_on)
        with execution.claim(name), guard as signals, execution.serving():
            yield
        signals.raise_received(self._signal)

    def _check_fit(
        self,
        epochs: object,
        steps: object,
        eval_data: Any,
        resume: object,
        hyperparams: object,
        progress: object,
    ) -> None:
        require_start("fit", resume, hyperparams)
        require_aim(epochs, steps)
        if not fits(progress, bool | None):
            raise ConfigurationError(f"fit: progress must be True, False or None, got {shown(progress)}.")
        if eval_data is not None:
            self._require_eval_fn("fit(eval_data=...)")
            evaluation_sets(eval_data)

    def _subscribers_here(self) -> tuple[Subscriber, ...]:
        """The subscribers that run in this process: all in process 0, those ``per_host`` in the others."""
        return tuple(one for one in self.subscribers if one.per_host or jax.process_index() == 0)

    def _new_run(
        self,
        aim: Aim,
        eval_data: Any,
        extra: Sequence[RunSubscriber] = (),
        point: ResumePoint | None = None,
        *,
        agreement: Agreement,
        restarts: bool = False,
        data: Any = None,
        given: Mapping[str, Number] | None = None,
        changes: Sequence[HyperparamChanged] = (),
    ) -> Run:
        model = self._model
        return Run(
            EvaluationSource(model, eval_data),
            self._options,
            self._core,
            self._plane,
            (
                *(
                    member
                    for member in self._members
                    if member.subscription.state != "cancelled"
                    and (agreement.decides or member.subscriber.per_host)
                ),
                *extra,
            ),
            recorder=RunRecorder(
                model.step,
                model.epoch,
                aim,
                {**self._fingerprint, "data": describe(data)},
                point.record.loop if point is not None else None,
                attempt=self._attempt if agreement.is_shared else self._begin_attempt(point),
                given=given,
            ),
            agreement=agreement,
            resume_point=point,
            restarts=restarts,
            changes=changes,
        )

    def _begin_attempt(self, point: ResumePoint | None) -> int:
        """Returns the number of the attempt that begins: higher than any of this run before, in other processes too."""
        known = max(self._attempt, point.record.loop.attempt if point is not None else 0)
        self._attempt = next_attempt(self.run_dir, known) if self.subscribers else known + 1
        return self._attempt

    @contextmanager
    def _running(self, run: Run) -> Generator[None]:
        self._run, remote = run, None
        try:
            with run.running():
                if self._remote_control and run.decides and self._subscribers_here():
                    remote = RemoteControl(self.run_dir, self._plane.control_of_run(), run.report)
                    remote.start()
                yield
        finally:
            if remote is not None:  # not before: until the run has settled, commands are answered
                remote.close()
            self._run, self._signal = None, run.status.signal

    def _fit(
        self,
        data: Any,
        epochs: int | None,
        steps: int | None,
        eval_data: Any,
        extra: Sequence[Subscriber],
        resume: bool | str | int | Path,
        hyperparams: Mapping[str, Number],
    ) -> FitResult[S]:
        model = self._model
        aim = Aim(epochs, steps, length_of(data))
        with self._begun("fit", aim, data, eval_data, resume, hyperparams, extra) as begun:
            if begun is None:
                return self._result(0, "completed", [], {})
            run, point, left = begun
            first_epoch = model.epoch
            train(run, data, left, self._leftovers, point)
        return self._result(
            model.epoch - first_epoch, run.ended_by, list(run.resources.builder.history), run.undelivered
        )

    @contextmanager
    def _begun(
        self,
        what: str,
        aim: Aim,
        data: Any,
        eval_data: Any,
        resume: bool | str | int | Path,
        hyperparams: Mapping[str, Number],
        extra: Sequence[Subscriber] = (),
    ) -> Generator[tuple[Run, ResumePoint | None, Aim] | None]:
        """Begin a run, from a checkpoint or not, and end it after the block.

        Gives the run, the checkpoint that it resumes from, and what is left of ``aim``; None if the checkpoint is
        beyond that. Arguments as of ``fit``, and ``what`` is the method that was called.
        """
        wanted = self._model.new_hyperparams(hyperparams)
        given = {one.path: read(leaf) for one, leaf in wanted.items()}
        with (
            self._joined() as agreement,
            self._run_directory(agreement),
        ):
            saved = self._find_saved(resume) if resume is not False and agreement.decides else None
            saved = self._begin(agreement, saved)
            point, left = None, aim
            if saved:
                point, left = self._resume(saved, aim, data, named=resume is not True, given=given)
            if point is not None and is_beyond(point.record.loop, aim):
                point.backup.discard()
                yield None
                return
            restarts = resume is not False and point is None
            known = point is not None and (
                point.ended is not None or (resume is True and point.record.loop.given == given)
            )
            changes = [] if known else self._set_hyperparams(wanted, given, what)
            temporary = [
                RunSubscriber(one, subscribe(self._core, one)) for one in (extra if agreement.decides else ())
            ]
            run = self._new_run(
                aim,
                eval_data,
                temporary,
                point,
                restarts=restarts,
                data=data,
                agreement=agreement,
                given=given,
                changes=changes,
            )
            try:
                with _restored_if_unused(run, point), self._running(run):
                    yield run, point, left
            finally:
                for member in temporary:
                    member.subscription.cancel()

    def _set_hyperparams(
        self, wanted: Mapping[Hyperparam, jax.Array], values: Mapping[str, Number], what: str
    ) -> list[HyperparamChanged]:
        """Sets what ``fit`` or ``session`` was given. Returns the events of what has changed."""
        return [
            HyperparamChanged(
                step=self._model.step,
                name=one.name,
                path=one.path,
                old=old,
                new=values[one.path],
                reason=f"{what}(hyperparams=...)",
            )
            for one, old in self._model.set_hyperparams(wanted).items()
            if old != values[one.path]
        ]

    def _result(
        self, epochs: int, reason: str, history: list[EpochCompleted], undelivered: Mapping[str, int]
    ) -> FitResult[S]:
        model = self._model
        return FitResult(
            state=model.structure.join(model.leaves_for("final", model.leaves, model.ext_leaves)),
            step=model.step,
            epochs_completed=epochs,
            stop_reason=reason,
            history=history,
            undelivered=undelivered,
        )

    def _joined(self) -> AbstractContextManager[Agreement]:
        """Join the other processes, if there are any, for the length of one run."""
        return joined(self._core, self._plane, self._end_events)

    def _end_events(self, lost: PeerLost) -> None:
        """Publish the end of the run, and deliver everything, beside a training thread that hangs."""
        run = self._run
        if run is not None:
            run.end_beside(lost)

    def _run_directory(self, agreement: Agreement) -> AbstractContextManager[None]:
        """Create and lock run_dir, where this process decides."""
        members = self._subscribers_here() if agreement.decides else ()
        return run_directory(self.run_dir, self.run_id, members, is_new=self._options.run_dir_is_new)

    def _begin(self, agreement: Agreement, saved: SavedRun | None) -> SavedRun | None:
        """Agree on the run_id, the attempt, and the checkpoint to resume from. Returns that.

        Raises:
            ConfigurationError: the processes do not share a directory, or write to one path.
        """
        if not agreement.is_shared:
            return saved
        path, known = None, self._attempt
        if agreement.decides:
            if saved is not None and saved.facts is not None:
                known = max(known, saved.facts.loop.attempt)
            known = next_attempt(self.run_dir, known) if self.subscribers else known + 1
        if saved is not None:
            inside = saved.path.is_relative_to(self.run_dir)
            path = saved.path.relative_to(self.run_dir) if inside else saved.path
        mark, here = f"{MARK}{uuid.uuid4().hex[:12]}", self._subscribers_here()
        with marked(self.run_dir, here if agreement.decides else (), mark):
            mine = Opening(run_id=self.run_id, attempt=known, resume=path, mark=mark)
            try:
                opening = Opening.model_validate_json(agreement.begin(mine.model_dump_json()))
            except PeerLost:
                for stop in self._plane.queue.arrived:
                    if stop.signal is not None:
                        raise_signal(stop.signal)
                raise
            self._attempt = opening.attempt
            if opening.run_id != self.run_id:
                folder = Path("runs") / opening.run_id if self._options.run_dir_is_new else self.run_dir
                self.run_id, self.run_dir = opening.run_id, folder.absolute()
                self._options = replace(self._options, run_id=self.run_id, run_dir=self.run_dir)
            check_paths(agreement, self._plane.queue, self.run_dir, here, opening.mark)
        if opening.resume is None or agreement.decides:
            return saved
        return find_saved_run(self.run_dir / opening.resume, self.run_dir, self.subscribers)

    def _find_saved(self, resume: bool | str | int | Path) -> SavedRun | None:
        """Return the checkpoint that ``resume`` names; None if there is none yet."""
        saved = find_saved_run(resume, self.run_dir, self.subscribers)
        if saved is None:
            hint = ""
            if self._options.run_dir_is_new:
                hint = " Pass Trainer(run_dir=...): without it, each trainer has a new directory."
            logger.warning(
                "No checkpoint is in %s yet, so the run starts from scratch.%s", self.run_dir, hint
            )
        return saved

    def _resume(
        self, saved: SavedRun, aim: Aim, data: Any, *, named: bool, given: Mapping[str, Number]
    ) -> tuple[ResumePoint, Aim]:
        """Take over ``saved``. Returns it, and what is left of ``aim``.

        Args:
            given: path -> value, of the hyperparameters that ``fit`` was given, for which nothing is warned of.
        """
        run_dir, model = self.run_dir, self._model
        names = labels(find_hyperparams(model.structure.join(model.leaves)))
        built = self._fingerprint["hyperparams"]
        kept = {name: built[name] for path, name in names.items() if path not in given and name in built}
        now = {**self._fingerprint, "hyperparams": kept, "data": describe(data)}
        point = take_over(saved, model, self._plane.view, self._subscribers_here(), now, aim, named=named)
        record, ended = point.record.loop, point.ended
        if ended is not None:
            logger.warning(
                "The run in %s has ended at step %d (%s), so nothing more is trained. Raise epochs or steps, or name "
                "the checkpoint to continue from: fit(resume=%d).",
                run_dir, record.step, ended, record.step,
            )  # fmt: skip
        return point, remaining(record, aim)

    # --- evaluation and prediction ----------------------------------------------------------------------------

    def evaluate(self, data: Any) -> dict[str, Number]:
        """Return the means of eval_fn's metrics over ``data`` (weighted by ``weight``), in float64. Blocks.

        Metrics with state have what they compute, if that is a scalar; arrays are in EvalCompleted only. ``data`` may
        be several sets by name, as for ``fit``. Publishes EvalStarted, EvalStepCompleted and EvalCompleted.

        Raises:
            ConfigurationError: there is no eval_fn. DataError: there is no batch.
        """
        self._require_eval_fn("evaluate()")
        with self._user_frames, self._execution.claim("evaluate"), self._execution.serving():
            return self._inference.evaluate(data)

    async def evaluate_async(self, data: Any) -> dict[str, Number]:
        """Like ``evaluate``, in a thread beside the running event loop. Cancellation waits for it to end."""
        self._require_eval_fn("evaluate_async()")
        with self._user_frames, self._execution.claim("evaluate_async"):
            return await self._execution.beside_loop(lambda: self._inference.evaluate(data))

    def predict(self, data: Any) -> PyTree:
        """Return the outputs of predict_fn over ``data`` as NumPy arrays, joined along the first axis. Blocks.

        Outputs of shape () are stacked. In a run of several processes each of them gets all rows: outputs that are
        sharded over processes are gathered. Publishes PredictStarted, PredictStepCompleted and PredictCompleted.

        Raises:
            ConfigurationError: there is no predict_fn. DataError: there is no batch.
        """
        self._require_predict_fn()
        with self._user_frames, self._execution.claim("predict"), self._execution.serving():
            return self._inference.predict(data)

    async def predict_async(self, data: Any) -> PyTree:
        """Like ``predict``, in a thread beside the running event loop. Cancellation waits for it to end."""
        self._require_predict_fn()
        with self._user_frames, self._execution.claim("predict_async"):
            return await self._execution.beside_loop(lambda: self._inference.predict(data))

    def _require_eval_fn(self, what: str) -> None:
        if self._model.eval_fn is None:
            raise ConfigurationError(
                f"{what} requires an eval_fn: Trainer(..., eval_fn=(state, batch) -> metrics)."
            )

    def _require_predict_fn(self) -> None:
        if self._model.predict_fn is None:
            raise ConfigurationError(
                "predict() requires a predict_fn: Trainer(..., predict_fn=(state, batch) -> outputs)."
            )


@contextmanager
def _restored_if_unused(run: Run, point: ResumePoint | None) -> Generator[None]:
    """Give the trainer back what it was if the block raises before the run has continued from ``point``."""
    try:
        yield
    except BaseException:
        if point is not None and run.loop is None:
            point.backup.restore()
        raise
