"""One run: everything between RunStarted and RunCompleted. ``fit`` is written on it, and so may your own loop be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

import jax

from eventtrain.bus.core import BusCore
from eventtrain.bus.training_stream import Activation
from eventtrain.control.command_queue import POLL_S
from eventtrain.control.control import Control
from eventtrain.control.loop_statistics import LoopClock, LoopStatistics
from eventtrain.control.requests import RunRequests
from eventtrain.control.run_state import ResumePoint
from eventtrain.data.epoch_iterator import EpochIterator
from eventtrain.device.fetcher import Fetcher
from eventtrain.device.host_memory import to_pinned_host
from eventtrain.device.hyperparams import Hyperparam, find_hyperparams, values_of
from eventtrain.device.program import StepProgram
from eventtrain.device.state import replicated_sharding
from eventtrain.errors import AlreadyRunning, BusClosed, ConfigurationError, StepError
from eventtrain.events import EpochCompleted, RunCompleted, RunFailed, RunStarted
from eventtrain.loop.command_executor import CommandExecutor
from eventtrain.loop.event_builder import EventBuilder
from eventtrain.loop.lag_gates import LagGates
from eventtrain.loop.metric_windows import MetricWindows, Position
from eventtrain.loop.train_loop import TrainingLoop
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.trainer.model import Aim, Model, RunOptions
from eventtrain.trainer.resume import resume_loop, resume_stream, take_over_extensions
from eventtrain.trainer.run_recorder import RunRecorder
from eventtrain.trainer.subscriber_lifecycle import SubscriberLifecycle

logger = logging.getLogger("eventtrain")


class Session:
    """A run in progress. Made by ``trainer.session()``; all methods belong to the thread that entered it.

    ::

        with trainer.session() as session:
            for batch in batches:
                session.step(batch)
    """

    def __init__(
        self,
        model: Model,
        options: RunOptions,
        bus: BusCore,
        room: RunRequests,
        subscribers: Sequence[Subscriber],
        *,
        aim: Aim,
        eval_data: Any = None,
        resumption: ResumePoint | None = None,
        restarts: bool = False,
    ) -> None:
        self._model = model
        self._options = options
        self._bus = bus
        self._room = room
        self._inbox = room.inbox
        self._subscribers = subscribers
        self._participants = SubscriberLifecycle(bus, subscribers)
        self._aim = aim
        self._eval_data = eval_data
        self._resumption = resumption
        self._restarts = restarts
        self._whereabouts = RunRecorder(model, aim, options.fingerprint, resumption)
        self._data = self._whereabouts.data
        self._loop: TrainingLoop | None = None
        self._gates = LagGates(bus)
        self.clock = LoopClock()
        """Where this thread's time goes."""
        self._first_step = model.step
        self._narrator = EventBuilder(bus, weight=options.weight)
        self._fetcher = Fetcher(self._narrator.tell, self._fetch_failed)
        self._grouped = options.steps_per_call > 1
        self._bus_failed = False
        self.ended_by = ""
        """Why the run ended, after its end."""
        self.undelivered: dict[str, int] = {}
        """After the end: subscription name -> events that were not handled within the drain timeout."""

    # --- for the user ---------------------------------------------------------------------------------------

    @property
    def control(self) -> Control:
        """Commands without a cause, as a service issues them."""
        return Control(self._inbox)

    @property
    def step_count(self) -> int:
        """Steps completed, counting those still on the device."""
        return self._loop.position.step if self._loop is not None else self._model.step

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self._loop.position.epoch if self._loop is not None else self._model.epoch

    @property
    def in_epoch(self) -> bool:
        """Whether an epoch has begun and not ended."""
        return self._loop is not None and self._loop.position.in_epoch

    @property
    def stop_reason(self) -> str | None:
        """Why the run has to end; None while it may go on."""
        return self._loop.effects.stop_reason if self._loop is not None else None

    @property
    def history(self) -> list[EpochCompleted]:
        """The EpochCompleted events so far; complete after the end."""
        return self._narrator.history

    def step(self, batch: Any) -> bool:
        """Dispatch one step and return at once; False, and nothing is done, once the run has to end.

        Raises:
            StepError, StateError, MetricsError, DataError: what step_fn or the batch did wrong, at its first call.
        """
        if self._loop is not None and self._loop.position.in_epoch and not (self._grouped or self.ended_by):
            return self._loop.step(batch) == 1
        return self.advance((batch,) * self._options.steps_per_call, 1) == 1

    def begin_epoch(self) -> bool:
        """Begin an epoch, and say EpochStarted. False: the run has to end.

        The first ``step`` does it if you do not.
        """
        self._require_open()
        if self._loop is None:
            return True  # the first step prepares the loop, and begins the epoch then
        if self.in_epoch:
            raise ConfigurationError(
                "begin_epoch() was called in the middle of an epoch. Call end_epoch() first."
            )
        self._data.begin_epoch()
        return self._loop.begin_epoch()

    def end_epoch(self, eval_data: Any = None) -> bool:
        """End the epoch: evaluate on ``eval_data`` if given, then EpochCompleted. False: the run has to end."""
        self._require_open()
        if eval_data is not None and self._model.eval_fn is None:
            raise ConfigurationError("end_epoch(eval_data=...) needs an eval_fn: Trainer(..., eval_fn=...).")
        if self._loop is None or not self.in_epoch:
            return self.stop_reason is None
        if eval_data is not None:
            self._eval_data = eval_data
        return self._loop.end_epoch()

    def statistics(self) -> LoopStatistics:
        """Where the training thread's time went so far. Any thread; never blocks."""
        step = self.step_count
        return self.clock.read(step, step - self._first_step)

    def program(self) -> StepProgram | None:
        """What the step was compiled to; None before the first one. Any thread; never blocks."""
        compiled = self._model.compiled
        return compiled.program() if compiled is not None else None

    def flush(self) -> None:
        """Send the metrics of all steps dispatched so far on their way to the subscribers."""
        if self._loop is not None:
            self._loop.windows.flush()

    def block_until_ready(self) -> None:
        """Wait until the device has finished every step dispatched so far."""
        if self._loop is not None:
            self._loop.carry.cursor.block_until_ready()
            jax.block_until_ready(self._loop.carry.leaves)

    def idle(self, seconds: float) -> bool:
        """Do nothing for so long but serve commands and flush in time. False: the run has to end."""
        end_s = monotonic() + seconds
        return self.wait(lambda: monotonic() >= end_s)

    # --- for fit --------------------------------------------------------------------------------------------

    @property
    def prepared(self) -> bool:
        """Whether the loop has taken over the state."""
        return self._loop is not None

    @property
    def compiled(self) -> bool:
        """Whether the step is compiled, by an earlier run, so that ``prepare`` needs no batch."""
        return self._model.compiled is not None

    def prepare(self, batch: Any) -> None:
        """Compile the step for ``batch`` (a tuple of ``steps_per_call`` where that is above 1); once per run."""
        if self._loop is not None:
            return
        model, options = self._model, self._options
        hyperparams = find_hyperparams(model.skeleton.join(model.leaves))
        compiled = model.compiled_for(batch, hyperparams, options)
        params = model.params_indices()
        resumption = self._resumption
        if resumption is not None:
            model.ext_leaves = take_over_extensions(resumption, compiled.extension_types, self._inbox)
        carry = compiled.initial(model.leaves, model.ext_leaves, step=model.step)
        effects = CommandExecutor(
            carry,
            model.skeleton,
            hyperparams,
            params,
            self._room,
            self._emit,
            self._can_evaluate,
            to_pinned_host if options.snapshot == "host" else None,
            tuple(compiled.extension_types),
        )
        self._narrator.watch(effects.watched)
        position = Position(
            model.step, model.epoch, resumption.facts.loop.batch if resumption is not None else 0
        )
        windows = MetricWindows(
            compiled, carry, self._fetcher, self._gates, position, self.clock, options.pace.flush_interval_s
        )
        self._loop = loop = TrainingLoop(
            compiled,
            carry,
            position=position,
            windows=windows,
            gates=self._gates,
            effects=effects,
            clock=self.clock,
            bus=self._bus,
            room=self._room,
            fetcher=self._fetcher,
            pace=options.pace,
            evaluate=self._evaluate,
            describe=lambda: self._whereabouts.facts(loop, self._gates),
        )
        # The loop owns the state: a reference would keep its memory.
        model.leaves, model.ext_leaves = [], None
        if resumption is not None:
            resume_loop(resumption, loop)

    def advance(self, batches: tuple[Any, ...], count: int, positions: Sequence[Any] = ()) -> int:
        """Run the first ``count`` steps of a group; returns how many were dispatched before the run had to end.

        ``positions`` are the states of the data's iterator after each batch.
        """
        self._require_open()
        if self._loop is None:
            self.prepare(batches if self._grouped else batches[0])
        loop = self._loop
        assert loop is not None
        if not self.in_epoch and not self.begin_epoch():
            return 0
        self._data.begin_group(loop.position.batch, positions)
        if not self._grouped:
            return loop.step(batches[0])
        done = 0
        while done < count:
            dispatched = loop.step(batches, done, count)
            if not dispatched:
                break
            done += dispatched
        return done

    def wait(self, ready: Callable[[], object]) -> bool:
        """Wait until ``ready()``, serving commands; False if the run has to end first."""
        if self._loop is not None:
            return self._loop.wait(ready)
        while not ready():
            if any(order.command.kind == "stop" for order in list(self._inbox.arrived)):
                return False
            self._inbox.wait(ready, POLL_S)
        return True

    def ring(self) -> None:
        """Wake the training thread if it waits. Any thread."""
        self._inbox.ring()

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """Where batches that come as NumPy arrays are put."""
        leaves = self._loop.carry.leaves if self._loop is not None else self._model.leaves
        return replicated_sharding(leaves)

    @contextmanager
    def running(self) -> Generator[None]:
        """Begin the run, and end it whatever happens. The bus is its own for the length of the block.

        Raises:
            AlreadyRunning: another run uses the bus.
            SubscriberError, StepError, BusClosed: the run failed by a subscriber with ``on_error="fail"``, on the
                device, or because the bus was stopped. Not where the block raised.
        """
        if self._bus.progress.listener is not None:
            raise AlreadyRunning(
                "Another trainer's run uses this bus. One bus serves one run at a time: wait for it, or give each "
                "trainer a bus of its own."
            )
        self._bus.progress.listener = self._on_progress
        try:
            try:
                self._begin()
                yield
            except BaseException as error:
                self._finish(error)
                raise
            self._finish()
        finally:
            self._bus.progress.listener = None
            self._bus.failure = None

    def _begin(self) -> None:
        """Start subscribers and threads, and say RunStarted. Blocks until every subscriber has started."""
        options = self._options
        if self._subscribers:
            options.run_dir.mkdir(parents=True, exist_ok=True)
        self._room.clear_plans()
        self._bus.control_source = self._room
        self._bus.run_id = options.run_id
        self._inbox.step = self._model.step
        self._inbox.scheduled = lambda: self._narrator.watched
        hyperparams = find_hyperparams(self._model.skeleton.join(self._model.leaves))
        self._inbox.show(values_of(hyperparams, self._model.leaves))
        self._participants.start(self._context(tuple(hyperparams)))
        self._fetcher.start()
        self._inbox.open()
        for newcomer in self._gates.refresh(self._model.step):
            self._fetcher.put(Activation(newcomer))
        if self._resumption is not None:
            resume_stream(
                self._resumption, self._bus, self._gates, self._inbox, self._narrator, self._fetcher.put
            )
        else:
            self._gates.note(RunStarted, self._model.step)
            self._fetcher.put(RunStarted(step=self._model.step))

    def _context(self, hyperparams: tuple[Hyperparam, ...]) -> RunContext:
        """What subscribers are told when they start."""
        return RunContext(
            self._options.run_id,
            self._options.run_dir,
            self.control,
            self._bus.publish,
            self._whereabouts.start_step,
            self._aim.epochs,
            self._aim.steps,
            self._aim.steps_per_epoch,
            self._whereabouts.start_epoch,
            self._can_evaluate(),
            self._resumption is not None,
            self._restarts,
            self._resumption.ended if self._resumption is not None else None,
            self._model.params_paths() if self._subscribers else {},
            hyperparams,
            self._room,
            self._bus.statistics,
            self.statistics,
            self.program,
        )

    def _finish(self, raised: BaseException | None = None) -> None:
        """Settle everything: the state, what is due, the last events, the subscribers.

        Args:
            raised: what ended the run and will go on after this; None where it ended by itself.

        Raises:
            SubscriberError, StepError, BusClosed: the run failed by a subscriber with ``on_error="fail"``, on the
                device, or because the bus was stopped. Not where ``raised`` is given.
        """
        deadline_s = monotonic() + self._options.drain_timeout_s
        loop, error = self._loop, raised
        if loop is not None:
            try:
                self._leave_loop(loop, deadline_s, raised)
            except Exception as failed:  # an evaluation or a snapshot there, or the bus was stopped
                error = error or failed
        self.clock.stop()
        self._give_state_back()
        reason = (loop.effects.stop_reason if loop is not None else self._early_stop()) or "completed"
        self.ended_by = reason
        never_due = f"the run ended ({reason}) before it was due"
        left = self._inbox.close(never_due)
        self._fetcher.close()
        # The fetch thread has ended: from here on this thread is the one that feeds the stream.
        for order in left:  # no fault of anybody's: a lag may reach beyond the last step
            self._inbox.reject(order, never_due, self._narrator.tell, logging.INFO)
        try:
            # A handler that may fail the run has to have its say before the last event.
            self._participants.drain(deadline_s)
        except BusClosed as closed:
            error = error or closed
        error = error or self._bus.failure or self._device_failure()
        deterministic = not self._gates.timed_out() and (
            loop is None or (loop.effects.deterministic and not loop.effects.cut_short)
        )
        if error is None:
            self._narrator.tell(
                RunCompleted(step=self.step_count, reason=reason, deterministic=deterministic)
            )
        else:
            self._narrator.tell(RunFailed(step=self.step_count, error=f"{type(error).__name__}: {error}"))
        self.undelivered = self._participants.settle(deadline_s, self.step_count)
        if self.undelivered:
            listing = ", ".join(f"{name}: {count}" for name, count in self.undelivered.items())
            logger.warning(
                "Not everything published was handled within %.1f s; left over: %s",
                self._options.drain_timeout_s, listing,
            )  # fmt: skip
        if loop is not None:
            loop.compiled.close()
        self._room.release_all()  # not before: a Checkpointer may claim until its queue is empty
        error = error or self._bus.failure
        if error is not None and raised is None:
            raise error

    def _leave_loop(self, loop: TrainingLoop, deadline_s: float, raised: BaseException | None) -> None:
        """What is due at the last boundary, the last window, and the state for those who save the last one."""
        loop.tracer.close()
        if raised is None and self._healthy():
            loop.finish(deadline_s)
        if loop.windows.open:
            loop.windows.flush()
        if raised is None and not loop.effects.cut_short:
            loop.restore_finally()
        if self._fetcher.failure is None and self._bus.running:
            loop.keeper.take_final(unchanged=self._whereabouts.unchanged(loop))

    # --- inside ---------------------------------------------------------------------------------------------

    def _require_open(self) -> None:
        if self.ended_by:
            raise ConfigurationError(
                f"This session has ended ({self.ended_by}), and its state belongs to the trainer again. Open another."
            )

    def _can_evaluate(self) -> bool:
        return self._model.eval_fn is not None and self._eval_data is not None

    def _emit(self, event: Any) -> None:
        assert self._loop is not None
        self._loop.windows.emit(event)

    def _evaluate(self) -> None:
        model, loop = self._model, self._loop
        if loop is None or not self._can_evaluate():
            return
        evaluation = model.evaluation(loop.carry.leaves)
        leaves = model.leaves_for("eval", loop.carry.leaves, loop.carry.ext_leaves)
        feed = EpochIterator(
            self._eval_data,
            loop.position.epoch,
            steps_per_call=1,
            sharding=self.sharding,
            wait=loop.boundary.wait,
            on_ready=self.ring,
        )
        try:
            loop.run_evaluation(evaluation, leaves, feed.batches())
        finally:
            feed.close()

    def _on_progress(self) -> None:
        if self._bus.failure is not None and not self._bus_failed:
            self._bus_failed = True
            self._inbox.ask_to_stop("failed")
        self._inbox.ring()

    def _fetch_failed(self, error: BaseException) -> None:
        self._inbox.ask_to_stop("failed")
        self._inbox.ring()

    def _healthy(self) -> bool:
        return self._bus.failure is None and self._fetcher.failure is None

    def _device_failure(self) -> BaseException | None:
        failure = self._fetcher.failure
        if failure is None or isinstance(failure, StepError):
            return failure
        self._fetcher.failure = StepError(
            f"The device failed while computing a step: {type(failure).__name__}: {failure}. The state is lost; go on "
            "from a checkpoint."
        )
        self._fetcher.failure.__cause__ = failure
        return self._fetcher.failure

    def _early_stop(self) -> str | None:
        return next((o.command.reason for o in self._inbox.arrived if o.command.kind == "stop"), None)

    def _give_state_back(self) -> None:
        loop, model = self._loop, self._model
        if loop is not None:
            model.leaves, model.ext_leaves = loop.carry.leaves, loop.carry.ext_leaves
            model.step, model.epoch = loop.position.step, loop.position.epoch
