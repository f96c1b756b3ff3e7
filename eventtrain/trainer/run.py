"""``Run``: one run of a trainer, from RunStarted to RunCompleted. ``Session`` and ``fit`` drive it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import jax

from eventtrain.bus.core import BusCore
from eventtrain.bus.training_stream import Activation
from eventtrain.control.command_queue import POLL_S
from eventtrain.control.control_plane import ControlPlane
from eventtrain.control.loop_statistics import LoopClock, LoopStatistics
from eventtrain.control.run_context import RunContext
from eventtrain.control.run_view import NONE
from eventtrain.data.batch_group import BatchGroup
from eventtrain.data.sources import shapes_of
from eventtrain.device.compiled_step import CompiledStep, StepProgram
from eventtrain.device.fetcher import Fetcher
from eventtrain.device.fused_step import first_batch
from eventtrain.device.hyperparams import find_hyperparams, values_of
from eventtrain.device.state import StateArray, replicated_sharding
from eventtrain.errors import BusClosed, ConfigurationError, PeerLost, StepError
from eventtrain.events import (
    CommandApplied,
    HyperparamChanged,
    RunCompleted,
    RunFailed,
    RunStarted,
)
from eventtrain.loop.agreement.agreement import Agreement
from eventtrain.loop.agreement.log import ApplyCommand, EndRun
from eventtrain.loop.boundary import require_served
from eventtrain.loop.evaluation import EvaluationSource
from eventtrain.loop.event_builder import Derivations, EventBuilder
from eventtrain.loop.lag_gates import LagGates
from eventtrain.loop.run_recorder import RunRecorder
from eventtrain.loop.run_resources import RunResources
from eventtrain.loop.run_status import RunStatus
from eventtrain.loop.train_loop import Pace, TrainingLoop
from eventtrain.trainer.checks import report_endless_epoch, trace_run
from eventtrain.trainer.failures import is_raised_by_jax, save_memory_profile
from eventtrain.trainer.resume import ResumePoint, resume_loop, resume_stream, take_over_extensions
from eventtrain.trainer.subscriber_lifecycle import RunSubscriber, SubscriberLifecycle

logger = logging.getLogger("eventtrain")


@dataclass(frozen=True)
class RunOptions:
    """How to run: the options of ``Trainer`` that concern every run.

    Attributes:
        run_dir_is_new: no run_dir and no run_id were given, so that the directory cannot hold anything yet.
    """

    run_id: str
    run_dir: Path
    run_dir_is_new: bool
    pace: Pace
    weight: str | None
    derive: Derivations
    drain_timeout_s: float


class Run:
    """One run. All methods belong to the training thread, unless stated otherwise.

    Args:
        source: the model, and what it is evaluated on.
        options: of the trainer.
        bus, plane: of the trainer.
        subscribers: to be started and stopped.
        recorder: has the aim, and what a checkpoint says of the beginning.
        agreement: with the other processes of the run.
        resume_point: where the run resumes.
        restarts: it should have resumed, and nothing was saved.
        changes: of hyperparameters, made before the first step.

    Attributes:
        loop: None until the step is compiled for the first batch.
        status: where the run is.
        ended_by: why the run ended; empty until its end.
        undelivered: after the end, subscription name -> events that were not handled within the drain timeout, and
            rows that were not written.
    """

    def __init__(
        self,
        source: EvaluationSource,
        options: RunOptions,
        bus: BusCore,
        plane: ControlPlane,
        subscribers: Sequence[RunSubscriber],
        *,
        recorder: RunRecorder,
        agreement: Agreement,
        resume_point: ResumePoint | None = None,
        restarts: bool = False,
        changes: Sequence[HyperparamChanged] = (),
    ) -> None:
        model = source.model
        self.source = source
        self.options = options
        self.recorder = recorder
        self.loop: TrainingLoop | None = None
        self.status = RunStatus(
            model.step, model.epoch, resume_point.record.loop.batch if resume_point else 0
        )
        self.ended_by = ""
        self.undelivered: dict[str, int] = {}
        self._model = model
        self._bus = bus
        self._plane = plane
        self._subscribers = subscribers
        self._lifecycle = SubscriberLifecycle(bus, subscribers)
        self._resume_point = resume_point
        self._restarts = restarts
        self._changes = changes
        self._first_step = model.step
        builder = EventBuilder(bus, plane.view, weight=options.weight, derive=options.derive)
        fetcher = Fetcher(builder.take, self._fetch_failed)
        self.resources = RunResources(bus, plane, LagGates(bus), builder, fetcher, LoopClock())
        self._agreement = agreement
        self._bus_failed = False
        self._ending = threading.Lock()
        self._ended_beside = False
        self._is_untouched = False
        self._agreed_stop: str | None = None
        self._agreed_end: EndRun | None = None

    # --- reading: any thread ----------------------------------------------------------------------------------

    def statistics(self) -> LoopStatistics:
        """Returns where the training thread's time went so far. Any thread; never blocks."""
        return self.resources.clock.read(self.status.step, self.status.step - self._first_step)

    def report(self) -> dict[str, Any]:
        """Returns where the run is, as JSON data, for those who steer it from outside. Any thread; never blocks."""
        status, aim, options = self.status, self.recorder.aim, self.options
        state = "starting" if self.loop is None else "paused" if status.paused else "running"
        return {
            "state": "ending" if status.stop_reason is not None else state,
            "run_id": options.run_id,
            "attempt": self.recorder.attempt,
            "pid": os.getpid(),
            "step": self._plane.view.step,
            "epoch": status.epoch,
            "epochs": aim.epochs,
            "steps": aim.steps,
            "hyperparams": dict(self._plane.control.hyperparams),
        }

    def program(self) -> StepProgram | None:
        """Returns what the step was compiled to; None before the first one. Any thread; never blocks."""
        compiled = self._model.compiled
        return compiled.program() if compiled is not None else None

    def arrays(self) -> list[StateArray]:
        """Returns what is known of each array of the state. Any thread; never blocks."""
        loop = self.loop
        return self._model.arrays(self._model.leaves if loop is None else loop.carry.leaves)

    @property
    def decides(self) -> bool:
        """Whether this process makes the decisions of the run."""
        return self._agreement.decides

    @property
    def grouped(self) -> bool:
        """Whether one dispatch runs several steps."""
        return self._model.options.steps_per_call > 1

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """Sharding to which batches of NumPy arrays are transferred."""
        return replicated_sharding(self.loop.carry.leaves if self.loop is not None else self._model.leaves)

    # --- steps and epochs -------------------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """The state after the steps dispatched so far. It stays valid: the next step leaves it alone."""
        loop, model = self.loop, self._model
        leaves = model.leaves if loop is None or self.ended_by else loop.lend_state()
        return model.structure.join(leaves)

    @state.setter
    def state(self, state: Any) -> None:
        self.require_open()
        loop, model = self.loop, self._model
        leaves = model.leaves_like(state, model.leaves if loop is None else loop.carry.leaves)
        if loop is None:
            model.leaves = leaves
            self.status.changes += 1
        else:
            loop.replace_state(leaves)

    def prepare(self, batch: Any) -> None:
        """Compile the step for ``batch`` (a tuple of ``steps_per_call`` batches if that is above 1); once per run.

        If an earlier run compiled the step, ``batch`` is not looked at.
        """
        if self.loop is not None:
            return
        model, point = self._model, self._resume_point
        if batch is not None:
            self.recorder.note_batch(shapes_of(first_batch(batch) if self.grouped else batch))
        compiled = model.prepare(batch)
        hyperparams = find_hyperparams(model.structure.join(model.leaves))
        if point is not None:
            model.ext_leaves = take_over_extensions(point, compiled.extension_types, self._plane.view)
        if point is None or point.ended is None:
            self._check(compiled, batch)
        states = self.resources.builder.epoch_states  # of the epoch in which the run resumes
        carry = compiled.initial(model.leaves, model.ext_leaves, step=model.step, states=states)
        self.loop = TrainingLoop(
            self.source,
            compiled,
            carry,
            hyperparams,
            status=self.status,
            resources=self.resources,
            recorder=self.recorder,
            agreement=self._agreement,
            pace=self.options.pace,
        )
        # The loop owns the state: a reference would keep its memory.
        model.leaves, model.ext_leaves = [], None
        if point is not None:
            resume_loop(point, self.loop)

    def _check(self, compiled: CompiledStep, batch: Any) -> None:
        """Fail now where the first evaluation would, or where a subscriber requested a check that fails."""
        aim, checks = self.recorder.aim, self._plane.requests.checks
        if not checks and self._model.predict_fn is None and not self.source.available:
            return
        traced = trace_run(
            self.source,
            compiled,
            first_batch(batch) if self.grouped and batch is not None else batch,
            epoch=self.status.epoch,
            derive=self.options.derive,
            may_evaluate_later=aim.epochs is None and aim.steps is None,
            waiter=self,
        )
        for check in checks:
            check(traced)

    def advance(self, batch: Any, count: int, group: BatchGroup | None = None) -> int:
        """Run the first ``count`` steps of a call. Returns how many were dispatched before the run had to end.

        Args:
            batch: what the compiled step is called with: as for ``prepare``.
            count: steps to run.
            group: has the batches one by one, and the states of the data's iterator after each; None if not known.
        """
        self.require_open()
        self.prepare(batch)
        loop = self.loop
        assert loop is not None
        if not self.status.in_epoch and not self.begin_epoch():
            return 0
        self.recorder.data.begin_group(self.status.batch, group, keeps=bool(self._plane.requests.checkpoints))
        if not self.grouped:
            return loop.step(batch)
        done = 0
        while done < count:
            dispatched = loop.step(batch, done, count)
            if not dispatched:
                break
            done += dispatched
        return done

    def begin_epoch(self) -> bool:
        """Publish EpochStarted. Returns False if the run has to end."""
        self.require_open()
        if self.loop is None:
            return True  # the first step compiles the loop, and begins the epoch then
        if self.status.in_epoch:
            raise ConfigurationError(
                "begin_epoch() was called in the middle of an epoch. Call end_epoch() first."
            )
        self.recorder.data.begin_epoch()
        return self.loop.begin_epoch()

    def end_epoch(self) -> bool:
        """Evaluate, and publish EpochCompleted. Returns False if the run has to end."""
        self.require_open()
        if self.loop is None or not self.status.in_epoch:
            return self.status.stop_reason is None
        return self.loop.end_epoch()

    def end_last_epoch(self) -> None:
        """End the epoch that the aim has cut short, if it was. A run with a higher aim continues before this."""
        self.require_open()
        if self.loop is not None and self.status.in_epoch:
            report_endless_epoch(self._bus, self._plane.requests, self.status, self.recorder.aim)
            self.loop.boundary.begin_phase()
            self.loop.boundary.settle()
            self.loop.checkpoints.begin_end()
        self.end_epoch()

    def wait(self, ready: Callable[[], object]) -> bool:
        """Wait until ``ready()``, serving commands. Returns False if the run has to end first."""
        if self.loop is not None:
            return self.loop.wait(ready)
        queue = self._plane.queue
        while not ready():
            known = len(queue.arrived)  # before the loop is made, only a stop can be served
            self._agreement.check()
            if self._early_stop() is not None:
                return False
            require_served(self._bus)
            queue.wait(ready, POLL_S, known)
        return True

    def _wait_for_future(self, future: Future[Any]) -> bool:
        future.add_done_callback(lambda _: self.wake())
        return self.wait(future.done)

    def wake(self) -> None:
        """Wake the training thread if it waits. Any thread."""
        self._plane.queue.wake()

    def require_open(self) -> None:
        """Raises ConfigurationError if the run has ended."""
        if self.ended_by:
            raise ConfigurationError(
                f"This session has ended ({self.ended_by}), and its state belongs to the trainer again. Open another."
            )

    # --- beginning and end ------------------------------------------------------------------------------------

    @contextmanager
    def running(self) -> Generator[None]:
        """Begin the run, and end it whatever happens. It has the bus to itself for the length of the block.

        Raises:
            AlreadyRunning: another run uses the bus.
            SubscriberError, StepError, BusClosed: the run failed because of a subscriber with ``on_error="fail"``, on
                the device, or because the bus was stopped. Not if the block raised.
        """
        self._bus.require_no_run()
        self._bus.progress.listener = self._on_progress
        try:
            try:
                self._begin()
                yield
            except BaseException as error:
                lost = self._lost_behind(error) if is_raised_by_jax(error) else None
                self._finish(lost or error)
                if lost is not None:
                    raise lost from error
                raise
            self._finish()
        finally:
            self._bus.progress.listener = None
            self._bus.failure = None

    def _begin(self) -> None:
        """Start subscribers and threads, and publish RunStarted. Blocks until every subscriber has started."""
        model, plane, gates, fetcher = self._model, self._plane, self.resources.gates, self.resources.fetcher
        plane.requests.clear()
        plane.queue.begin()
        self._bus.control_source = plane
        self._bus.run_id, self._bus.attempt = self.options.run_id, self.recorder.attempt
        hyperparams = tuple(find_hyperparams(model.structure.join(model.leaves)))
        plane.view.step = model.step
        plane.view.hyperparams = values_of(hyperparams, model.leaves)
        plane.view.scheduled = NONE
        aim, point = self.recorder.aim, self._resume_point
        context = RunContext(
            run_id=self.options.run_id,
            run_dir=self.options.run_dir,
            control=plane.control_of_run(),
            publish=self._bus.publish,
            start_step=self.recorder.start_step,
            epochs=aim.epochs,
            steps=aim.steps,
            steps_per_epoch=aim.steps_per_epoch,
            start_epoch=self.recorder.start_epoch,
            can_evaluate=self.source.available,
            attempt=self.recorder.attempt,
            resumed=point is not None,
            restarts=self._restarts,
            ended=point.ended if point is not None else None,
            params={} if model.unknown_params or not self._subscribers else model.params_paths(),
            unknown_params=model.unknown_params,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            exchange=self._agreement.exchange,
            _bus=self._bus,
            _figures=self,
            _hyperparams=hyperparams,
            _plane=plane,
        )
        self._lifecycle.start(context, self._wait_for_future)
        fetcher.start()
        plane.queue.open()
        for newcomer in gates.refresh(model.step):
            fetcher.put(Activation(newcomer))
        if point is not None:
            resume_stream(point, self.resources, model)
        else:
            gates.note(RunStarted, model.step)
            fetcher.put(self._started())
        for change in self._changes:
            self.status.changes += 1
            fetcher.put(change)

    def _started(self) -> RunStarted:
        model = self._model
        if not self._bus.has_subscribers(RunStarted):
            return RunStarted(step=model.step)
        arrays = self.arrays()
        return RunStarted(
            step=model.step,
            params_count=None if model.unknown_params else sum(one.count for one in arrays if one.is_param),
            state_bytes=sum(one.size_bytes for one in arrays),
        )

    def _finish(self, raised: BaseException | None = None) -> None:
        """Settle everything: the state, what is due, the last events, the subscribers.

        Args:
            raised: what ended the run, and is raised again afterwards; None if it ended by itself.

        Raises:
            SubscriberError, StepError, BusClosed: as ``running``. Not if ``raised`` is given.
        """
        deadline_s = monotonic() + self.options.drain_timeout_s
        plane, builder, clock = self._plane, self.resources.builder, self.resources.clock
        status, error = self.status, raised
        if raised is not None and (
            note := save_memory_profile(raised, self.options.run_dir, self.status.step)
        ):
            raised.add_note(note)
        begun = status.phase > 0 or status.step > self._first_step
        self._is_untouched = self._agreement.is_shared and not begun
        if self.loop is not None:
            self.loop.boundary.deadline_s = deadline_s
            for leave in (self._leave_loop, self._take_final):
                try:
                    leave(self.loop, deadline_s, raised)
                except Exception as failed:  # in an evaluation or a snapshot, or the bus was stopped
                    error = error or failed
        clock.stop()
        self._give_state_back()
        error = error or self._bus.failure or self._device_failure()
        early_stop = self._early_stop() if self.loop is None else None
        reason = status.stop_reason or early_stop or "completed"
        self.ended_by = reason = reason if error is None else "failed"
        left = plane.queue.close(_never_due(reason, error))
        self.resources.fetcher.close()
        # The fetch thread has ended: from here on this thread feeds the stream.
        for pending in left:  # not a fault: a lag may reach beyond the last step
            if (
                early_stop is not None
                and pending.command.kind == "stop"
                and pending.command.source is not None
            ):
                applied = CommandApplied(step=status.step, command=pending.command)
                builder.emit(applied)
                plane.queue.answer(pending, applied)
            else:
                plane.queue.reject(pending, _never_due(reason, error), builder, logging.INFO)
        try:
            # A handler that may fail the run has to be heard before the last event.
            self._lifecycle.drain(deadline_s)
        except BusClosed as closed:
            error = error or closed
        error = error or self._bus.failure or self._device_failure()
        by_time = status.cut_short or early_stop is not None or self.resources.gates.timed_out()
        deterministic = status.deterministic and not by_time
        try:
            deterministic = self._agree_on_end(deterministic, error, reason)
        except PeerLost as lost:
            error = lost
        if error is not None:
            self.ended_by = reason = "failed"
            plane.queue.close(_never_due(reason, error))
        with self._ending:
            if not self._ended_beside:
                if error is None:
                    builder.emit(RunCompleted(step=status.step, reason=reason, deterministic=deterministic))
                else:
                    builder.emit(RunFailed(step=status.step, error=f"{type(error).__name__}: {error}"))
                self.undelivered = self._lifecycle.stop(deadline_s, status.step)
        if self.undelivered:
            listing = ", ".join(f"{name}: {count}" for name, count in self.undelivered.items())
            logger.warning("Events were not handled within %.1f s: %s", self.options.drain_timeout_s, listing)
        for name, left in self._lifecycle.unwritten().items():
            self.undelivered[name] = self.undelivered.get(name, 0) + left
        if self.loop is not None:
            self.loop.compiled.close()
        plane.handover.release_all()  # not before: a Checkpointer may claim until its queue is empty
        for held in plane.held_states:
            held.clear()
        error = error or self._bus.failure
        if error is not None and raised is None:
            raise error

    def end_beside(self, lost: BaseException) -> None:
        """Publish RunFailed and stop the subscribers, beside a training thread that hangs. Another thread; blocks.

        Does nothing if that is done, or if the training thread is doing it.
        """
        if not self._ending.acquire(blocking=False):
            return
        try:
            if not self._ended_beside:
                self._ended_beside = True
                self._bus.notify(RunFailed(step=self.status.step, error=f"{type(lost).__name__}: {lost}"))
                self._lifecycle.stop(monotonic() + self.options.drain_timeout_s, self.status.step)
        finally:
            self._ending.release()

    def _leave_loop(self, loop: TrainingLoop, deadline_s: float, raised: BaseException | None) -> None:
        """Settle the last boundary, and send the last window."""
        loop.profiler.close()
        if raised is None and self._bus.failure is None and self.resources.fetcher.failure is None:
            if not self._agreement.decides:
                self._agreed_end = loop.follow_to_end()
                return
            loop.finish(deadline_s)
        if loop.windows.open:
            loop.windows.flush()
        if raised is None and not self.status.cut_short:
            if self._plane.requests.final_restores:
                loop.checkpoints.begin_end()
            loop.restore_at_end()

    def _agree_on_end(self, deterministic: bool, error: BaseException | None, reason: str) -> bool:
        """Leave the run as one of several processes. Returns whether it was deterministic, as process 0 says.

        Raises:
            PeerLost: another process has failed, so that this one has, too.
        """
        agreement = self._agreement
        if not agreement.is_shared:
            return deterministic
        if error is None and reason == "failed":
            agreement.wait_for_failure()
        if error is None:
            agreement.check()
        if agreement.decides and error is None:
            agreement.record(self.status, EndRun(deterministic=deterministic))
        elif self._agreed_end is not None:
            deterministic = self._agreed_end.deterministic
        for pending in agreement.end(error):
            self._plane.queue.reject(pending, _never_due(reason, error), self.resources.builder, logging.INFO)
        return deterministic

    def _take_final(self, loop: TrainingLoop, deadline_s: float, raised: BaseException | None) -> None:
        if self._is_untouched:
            return  # another process may not have its first batch yet, and so nothing to save
        if self.resources.fetcher.failure is None and self._agreement.decides:
            loop.checkpoints.take_final(loop.boundary)

    def _give_state_back(self) -> None:
        loop, model = self.loop, self._model
        if loop is not None:
            model.leaves, model.ext_leaves = loop.carry.leaves, loop.compiled.extension_leaves(loop.carry)
            model.step, model.epoch = self.status.step, self.status.epoch

    # --- failures ---------------------------------------------------------------------------------------------

    def _on_progress(self) -> None:
        if self._bus.failure is not None and not self._bus_failed:
            self._bus_failed = True
            self._plane.queue.ask_to_stop("failed")
        self.wake()

    def _fetch_failed(self, error: BaseException) -> None:
        self._plane.queue.ask_to_stop("failed")
        self.wake()

    def _device_failure(self) -> BaseException | None:
        fetcher = self.resources.fetcher
        failed = fetcher.failure
        if failed is not None and not isinstance(failed, (StepError, PeerLost)):
            note = save_memory_profile(failed, self.options.run_dir, self.status.step)
            failure = self._lost_behind(failed) or StepError(
                f"The device failed while computing a step: {type(failed).__name__}: {failed}. The state is lost. "
                f"Resume from a checkpoint. {note}".rstrip()
            )
            failure.__cause__ = failed
            fetcher.failure = failure
        return fetcher.failure

    def _lost_behind(self, error: BaseException) -> PeerLost | None:
        """Returns the loss of another process, if that is why a computation failed. Waits until it can be known."""
        agreement = self._agreement
        if not agreement.is_shared or isinstance(error, PeerLost):
            return None
        agreement.wait_for_failure()
        try:
            agreement.check()
        except PeerLost as lost:
            return lost
        return None

    def _early_stop(self) -> str | None:
        """The reason of a stop that arrived before the loop was made."""
        agreement, queue = self._agreement, self._plane.queue
        if self._agreed_stop is None and not agreement.decides:
            agreement.ask()
            if (order := agreement.early_stop(self.status)) is not None:
                self._agreed_stop, self.status.signal = order.command.reason, order.signal
        arrived = list(queue.arrived)
        stop = next((pending for pending in arrived if pending.command.kind == "stop"), None)
        if stop is not None and self._agreed_stop is None:
            self._agreed_stop, self.status.signal = stop.command.reason, stop.signal
            agreement.record(self.status, ApplyCommand(command=stop.command, signal=stop.signal))
        return self._agreed_stop


def _never_due(reason: str, error: BaseException | None) -> str:
    if error is None:
        return f"the run ended ({reason}) before it was due"
    return f"the run failed ({type(error).__name__}: {error})"
