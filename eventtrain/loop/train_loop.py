"""The training loop: the one place that dispatches to the device.

``step`` is the hot path. What may happen between two steps happens in ``boundary.py``, which ``step`` enters only when
something has arrived or is due. All of it runs on the training thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import jax

from eventtrain.bus.core import BusCore
from eventtrain.control.loop_statistics import LoopClock
from eventtrain.control.requests import BoundaryRequest, RunRequests
from eventtrain.device.compiled_eval import CompiledEval
from eventtrain.device.compiled_step import Carry, CompiledStep
from eventtrain.device.fetcher import Fetcher
from eventtrain.errors import SnapshotError
from eventtrain.events import (
    EpochCompleted,
    EpochStarted,
    EvalCompleted,
    EvalStarted,
    EvalStepCompleted,
    StepStarted,
)
from eventtrain.events.run_records import LoopRecord
from eventtrain.loop.backpressure import Backpressure
from eventtrain.loop.boundary import Boundary
from eventtrain.loop.checkpoints import Checkpoints
from eventtrain.loop.command_executor import CommandExecutor
from eventtrain.loop.evaluation import run_evaluation
from eventtrain.loop.event_builder import EpochEnd
from eventtrain.loop.lag_gates import LagGates
from eventtrain.loop.metric_windows import MetricWindows, Position
from eventtrain.loop.profiling import Tracer
from eventtrain.loop.request_schedule import RequestSchedule

CATCH_UP_S = 0.004
"""The longest wait for several steps at once; longer ones are cut, so that windows are flushed in time."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How far the loop may run ahead, and how long a metric may wait in the ring."""

    flush_interval_s: float
    max_in_flight_calls: int


class TrainingLoop:
    """One run's loop, from the first dispatch to the last flush.

    Args:
        compiled: the prepared step.
        carry: the state to start from; the loop owns it from now on.
        position: steps and epochs completed so far.
        windows, gates, effects, clock: of this run.
        bus, room, fetcher: where events go and commands come from.
        pace: how far to run ahead.
        evaluate: evaluates at the present boundary by ``run_evaluation``, where there is something to evaluate on.
        describe: says where the run is, for a checkpoint.
    """

    def __init__(
        self,
        compiled: CompiledStep,
        carry: Carry,
        *,
        position: Position,
        windows: MetricWindows,
        gates: LagGates,
        effects: CommandExecutor,
        clock: LoopClock,
        bus: BusCore,
        room: RunRequests,
        fetcher: Fetcher,
        pace: Pace,
        evaluate: Callable[[], None],
        describe: Callable[[], LoopRecord],
    ) -> None:
        self.compiled = compiled
        self.carry = carry
        self.position = position
        self.windows = windows
        self.effects = effects
        self.clock = clock
        self.keeper = Checkpoints(
            room,
            effects,
            windows,
            position,
            bus,
            lambda ready: self.boundary.wait_for_observers(ready),
            describe,
        )
        self.boundary = Boundary(
            position, windows, gates, effects, clock, bus, room.inbox, self.evaluate, self.keeper.take_asked
        )
        self._gates = gates
        self._inbox = room.inbox
        self._fetcher = fetcher
        self._evaluate = evaluate
        self._backpressure = Backpressure(bus, windows, position, self.boundary.wait_for_observers)
        self._checkpoints = self.keeper.schedule
        self._evaluations = RequestSchedule(room.evaluations, position, self._ask_to_evaluate)
        self.tracer = Tracer(
            room.traces,
            position,
            effects,
            bus,
            lambda: self.carry.cursor.block_until_ready(),
            marks_steps=not compiled.grouped,
        )
        self._max_in_flight = pace.max_in_flight_calls
        self._tokens: deque[jax.Array] = deque()  # of the dispatches that may still be running, oldest first
        self._catch_up = 1
        self._attention = 0  # the step at which something is due
        self._announced = -1  # the step whose StepStarted was said last, for deciders
        self.epoch_first_step = position.step
        """Steps completed before the epoch in progress."""
        self._epoch_began_s = perf_counter()
        self._evaluated_at: tuple[int, int] | None = (
            None  # step, and how often the state was changed between steps
        )
        self.evaluated_batches: int | None = None
        """Of the evaluation that was cut short at this boundary."""

    # --- the hot path -----------------------------------------------------------------------------------------

    def step(self, batch: Any, start: int = 0, stop: int = 1) -> int:
        """Dispatch one step and return 1; or, of a group, steps from ``start`` on, and return how many.

        That is ``stop - start``, or fewer where something is due at a boundary between; 0 once the run has to end.
        Waits for nothing but: the device, when it is ``max_in_flight_steps`` behind; a due decision of a subscription
        with a finite lag; a pause; a Lossless queue at its limit.
        """
        position, gates = self.position, self._gates
        if (self._inbox.arrived or position.step >= self._attention) and not self._settle():
            return 0
        if stop - start > 1:
            stop = min(stop, start + self._steps_until_due())
        if len(self._tokens) >= self._max_in_flight:
            self._let_device_catch_up()
        began_s = perf_counter()
        if self.effects.pinned:
            self._dispatch_keeping(batch, start, stop)
        else:
            self.compiled(self.carry, batch, start, stop)
        now_s = perf_counter()
        self.clock.dispatch_s += now_s - began_s
        self._tokens.append(self.carry.cursor)
        count = stop - start
        position.batch += count
        position.step = self._inbox.step = step = position.step + count
        if step >= gates.next_step_event:
            gates.note_step(step)
            self._attention = min(self._attention, gates.next_due)
            self.clock.observing_s += perf_counter() - now_s
        if (
            self.carry.rows >= self.compiled.capacity
            or now_s >= self.windows.flush_at_s
            or step >= gates.flush_by
        ):
            self._flush()
        return count

    def _settle(self) -> bool:
        """Do what is due before the next step, and find out when to look again. False: the run has to end."""
        position = self.position
        self._attention = 0
        self._evaluations.take_due()
        if not self._backpressure.make_room() or not self.boundary.settle():
            return False
        if self._checkpoints.take_due() and not self.boundary.settle():
            return False  # it waited for a writer, and the run was stopped or paused meanwhile
        if self._gates.announces_steps:
            if not self.step_started:
                self._announced = position.step
                self.windows.emit(StepStarted(step=position.step, epoch=position.epoch, batch=position.batch))
            if not self.boundary.settle():
                return False
            self.tracer.before_step()
            return True  # and look again before every step
        self.tracer.before_step()
        free_steps = self._backpressure.free_steps()
        self._attention = min(
            self.boundary.next_due(),
            self._checkpoints.next_step(),
            self._evaluations.next_step(),
            self.tracer.next_step(),
            position.step + free_steps,
        )
        return True

    def _steps_until_due(self) -> int:
        """How many steps may go in one dispatch: up to the next boundary where anything can be due; at least 1."""
        gates, step = self._gates, self.position.step
        until_due = min(self._attention, gates.next_step_event, max(gates.flush_by, step + 1)) - step
        return max(1, min(until_due, self.compiled.capacity - self.carry.rows))

    def _let_device_catch_up(self) -> None:
        """Wait for the oldest steps in flight: for one where steps are long, for up to half of them where short.

        A wake-up costs some 20 us. Waiting for each single step of 60 us made the loop 1.3 times as long as the bare
        one (median of 9 pairs, 2-core CPU), waiting for 8 of 16 at a time 1.0 times; the device never idles meanwhile.
        """
        began_s = perf_counter()
        for _ in range(min(self._catch_up, len(self._tokens)) - 1):
            self._tokens.popleft()
        self._tokens.popleft().block_until_ready()
        waited_s = perf_counter() - began_s
        self.clock.device_wait_s += waited_s
        if waited_s > CATCH_UP_S:
            self._catch_up = max(1, self._catch_up // 2)
        elif waited_s < CATCH_UP_S / 4:
            self._catch_up = min(max(1, self._max_in_flight // 2), self._catch_up * 2)

    def _dispatch_keeping(self, batch: Any, start: int, stop: int) -> None:
        """A step that leaves the state before it alone, because someone else refers to it."""
        try:
            self.compiled(self.carry, batch, start, stop, keep=True)
        except SnapshotError as error:
            if not self.effects.refuse_snapshots(error):
                raise
            self.compiled(self.carry, batch, start, stop)
        else:
            if self.effects.survived():
                self.compiled.request_keeping()  # the next snapshot needs no copy

    def wait(self, ready: Callable[[], object]) -> bool:
        """Wait between two steps until ``ready()``, serving commands. False: the run has to end first."""
        going_on = self.boundary.settle() and self.boundary.wait(ready)
        self._attention = 0  # what was carried out meanwhile, a pause say, holds before the next step
        return going_on

    def _flush(self) -> None:
        self.windows.flush()
        if self._checkpoints.by_clock or self._evaluations.by_clock or self._gates.stale:
            self._attention = (
                0  # the clock, and subscriptions that came or went, are looked at once per window
            )

    # --- epochs and evaluation ----------------------------------------------------------------------------------

    def begin_epoch(self) -> bool:
        """Say EpochStarted, to be decided on before the first step. False: the run has to end."""
        position = self.position
        if (self._inbox.arrived or self.effects.stop_reason is not None) and not self.boundary.settle():
            return False
        self.boundary.admit_deciders()
        self.windows.begin_epoch()
        self.epoch_first_step = position.step
        position.in_epoch = True
        hyperparams = dict(self._inbox.hyperparams)
        self.windows.emit(EpochStarted(step=position.step, epoch=position.epoch, hyperparams=hyperparams))
        self._attention = 0
        self._epoch_began_s = perf_counter()
        return True

    def end_epoch(self) -> bool:
        """Evaluate, say EpochCompleted, carry out what was decided on it. False: the run has to end."""
        position = self.position
        self.tracer.end_due()
        self._evaluations.take_due()
        self._evaluations.take_epoch(position.epoch + 1)
        if not self._evaluations:
            self._ask_to_evaluate()
        going_on = self.boundary.settle()
        self.effects.evaluations_asked = 0
        if self.effects.cut_short:
            return False  # the run that goes on from here says EpochCompleted
        steps = position.step - self.epoch_first_step
        self._gates.note(EpochCompleted, position.step, position.epoch)
        self.windows.put(
            EpochEnd(position.step, position.epoch, steps, self._epoch_began_s, self._inbox.hyperparams)
        )
        position.epoch += 1
        position.in_epoch = False
        self.windows.begin_epoch()
        going_on = self.boundary.settle() and going_on
        self._checkpoints.take_epoch(position.epoch)
        self._attention = 0
        return going_on

    def resume_epoch(self, facts: LoopRecord) -> None:
        """Go on in the middle of an epoch, and perhaps of an evaluation."""
        self.boundary.admit_deciders()
        self.position.in_epoch = True
        self.epoch_first_step = facts.epoch_first_step
        self.evaluated_batches = facts.evaluated_batches
        self._announced = self.position.step if facts.step_started else -1
        self.effects.evaluations_asked = 1 if facts.evaluation == "pending" else 0
        if facts.evaluation == "done":
            self._evaluated_at = (self.position.step, self.effects.changes)
        self._epoch_began_s = perf_counter()

    def _ask_to_evaluate(self, plan: BoundaryRequest | None = None) -> None:
        """Unless the very state of this boundary was evaluated already, as a command may have asked."""
        if self._evaluated_at == (self.position.step, self.effects.changes):
            return
        self.effects.evaluations_asked += 1
        if plan is not None and plan.every_s is not None:
            self.effects.deterministic = False

    @property
    def step_started(self) -> bool:
        """Whether StepStarted of the next step was said already: the run was cut behind it."""
        return self._announced == self.position.step

    @property
    def evaluation_here(self) -> Literal["none", "pending", "done"]:
        """How far the evaluation of this boundary is."""
        if self.effects.evaluations_asked or self.evaluated_batches is not None or self._evaluations.is_due():
            return "pending"
        return "done" if self._evaluated_at == (self.position.step, self.effects.changes) else "none"

    def evaluate(self) -> None:
        """Evaluate at this boundary, if the run has anything to evaluate on; waits for no result."""
        self.tracer.end_due()
        self.windows.flush()
        self._evaluate()

    def run_evaluation(
        self, evaluation: CompiledEval, leaves: Sequence[jax.Array], batches: Iterable[Any]
    ) -> None:
        """Evaluate ``leaves`` on ``batches``; ends early, without EvalCompleted, when the run has to end."""
        step, gates = self.position.step, self._gates

        def before_batch() -> bool:
            self.boundary.carry_out_arrived()
            if len(self._tokens) >= self._max_in_flight:
                self._let_device_catch_up()
            return self.effects.stop_reason is None

        def dispatched(token: jax.Array) -> None:
            self._tokens.append(token)
            gates.note(EvalStepCompleted, step)

        done, epoch = self.evaluated_batches, self.position.epoch
        if done is None:
            gates.note(EvalStarted, step)
        self.boundary.whole = False
        try:
            self.evaluated_batches = run_evaluation(
                evaluation, leaves, batches, step, epoch, self._fetcher.put, before_batch, dispatched, done
            )
        finally:
            self.boundary.whole = True
        if self.evaluated_batches is None:
            self._evaluated_at = (step, self.effects.changes)
            gates.note(EvalCompleted, step)

    def finish(self, deadline_s: float) -> None:
        """Take what is due at the last boundary, send the last ring off, and wait for the deciders.

        ``deadline_s`` is in ``monotonic`` time.
        """
        if self.effects.stop_reason is None:
            self.boundary.settle()
        self.keeper.no_step_follows = True
        self._checkpoints.take_due()
        self.windows.flush()
        if (
            not self.effects.cut_short
        ):  # else the run that goes on from here gives them their events once more
            self.boundary.wait_for_deciders(deadline_s)

    def restore_finally(self) -> None:
        """After ``finish``, in a run that has ended by itself: put back what subscribers planned to have at its end."""
        self.effects.restore_finally(self.position.step)
