"""The training loop: the one place that dispatches to the device, and the one place that waits.

``step`` is the hot path. Everything that may happen between two steps happens in ``settle``, which ``step`` enters only
when something has arrived or is due. All of it runs on the training thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from time import monotonic, perf_counter
from typing import Any

import jax

from eventtrain.bus.bus import Activation, EventBus
from eventtrain.bus.subscription import Subscription
from eventtrain.control import POLL_S, CheckpointPlan, ControlRoom
from eventtrain.device.evaluate import CompiledEval
from eventtrain.device.fetch import Fetcher, Ring
from eventtrain.device.step import Carry, CompiledStep
from eventtrain.effects import Effects
from eventtrain.errors import BusClosed, SnapshotError
from eventtrain.evaluation import run_evaluation
from eventtrain.events import (
    EpochCompleted,
    EpochStarted,
    EvalCompleted,
    EvalStarted,
    EvalStepCompleted,
    Event,
    LoopStalled,
    StepCompleted,
    StepStarted,
)
from eventtrain.gates import NEVER, Gates
from eventtrain.stream import EpochEnd, TrainWindow

ROW_EVENTS = (StepCompleted, StepStarted)
CATCH_UP_S = 0.004
"""The longest wait for several steps at once; longer ones are cut, so that windows are flushed in time."""
STALL_REPORT_S = 0.1
"""How much waiting for one subscriber is worth a LoopStalled event."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How far the loop may run ahead, and how long a metric may wait in the ring."""

    flush_interval_s: float
    max_in_flight_steps: int


class TrainingLoop:
    """One run's loop, from the first dispatch to the last flush.

    Args:
        compiled: the prepared step.
        carry: the state to start from; the loop owns it from now on.
        step, epoch: completed so far.
        bus, room, fetcher, gates: where events go and commands come from.
        effects: carries out commands on ``carry``.
        pace: how far to run ahead.
        evaluate: evaluates at the present boundary by ``run_evaluation``; None where there is nothing to evaluate on.
    """

    def __init__(
        self,
        compiled: CompiledStep,
        carry: Carry,
        *,
        step: int,
        epoch: int,
        bus: EventBus,
        room: ControlRoom,
        fetcher: Fetcher,
        gates: Gates,
        effects: Effects,
        pace: Pace,
        evaluate: Callable[[TrainingLoop], None] | None = None,
    ) -> None:
        self.compiled = compiled
        self.carry = carry
        self.step_count = step
        self.epoch = epoch
        self.effects = effects
        self.gates = gates
        self._bus = bus
        self._room = room
        self._inbox = room.inbox
        self._fetcher = fetcher
        self._pace = pace
        self._evaluate = evaluate
        self._notes: list[Event] = []
        self._batch = 0
        self._epoch_step = step
        self._epoch_began_s = perf_counter()
        self._window_batch = 0
        self._attention = 0  # the step at which ``settle`` has something to do
        self._flush_at = 0.0
        self._rows_before = bus.rows_routed
        self._rows = 0
        self._tokens: deque[jax.Array] = deque()
        self._catch_up_steps = 1
        self._stalled: dict[str, float] = {}
        self._checkpointed = step

    # --- the hot path -----------------------------------------------------------------------------------------

    def step(self, batch: Any, start: int = 0, stop: int = 1) -> int:
        """Dispatch one step and return 1; or, of a group, steps from ``start`` on, and return how many.

        That is ``stop - start``, or fewer where something is due at a boundary between; 0 once the run has to end.
        Waits for nothing but: the device, when it is ``max_in_flight_steps`` behind; a due decision of a subscription
        with a finite lag; a pause; a Lossless queue at its limit.
        """
        if (
            self._inbox.arrived or self.step_count >= self._attention or self.gates.stale
        ) and not self._settle_before_step():
            return 0
        if stop - start > 1:
            stop = min(stop, start + self._steps_until_due())
        tokens = self._tokens
        if len(tokens) >= self._pace.max_in_flight_steps:
            self._let_device_catch_up()
        if self.effects.pinned:
            self._dispatch_keeping(batch, start, stop)
        else:
            self.compiled(self.carry, batch, start, stop)
        tokens.append(self.carry.cursor)
        count = stop - start
        self._batch += count
        self._rows += count
        self.step_count = step = self.step_count + count
        self._inbox.step = step
        gates = self.gates
        if step >= gates.next_step_event:
            gates.note_step(step)
            self._attention = min(self._attention, gates.next_due)
        if (
            self.carry.rows >= self.compiled.capacity
            or monotonic() >= self._flush_at
            or step >= gates.flush_by
        ):
            self.flush()
        return count

    def _dispatch_keeping(self, batch: Any, start: int, stop: int) -> None:
        """A step that leaves the state before it alone, because someone else refers to it."""
        try:
            self.compiled(self.carry, batch, start, stop, keep=True)
        except SnapshotError as error:
            if not self.effects.refuse_snapshots(error):
                raise
            self.compiled(self.carry, batch, start, stop)
        else:
            self.effects.survived()

    def _let_device_catch_up(self) -> None:
        """Wait for the oldest steps in flight: for one where steps are long, for up to half of them where they are short.

        A wake-up costs some 20 us. Waiting for each single step of 60 us made the loop 1.3 times as long as the bare one
        (median of 9 pairs, 2-core CPU), waiting for 8 of 16 at a time 1.0 times; the device never idles meanwhile.
        """
        tokens = self._tokens
        began_s = perf_counter()
        for _ in range(min(self._catch_up_steps, len(tokens)) - 1):
            tokens.popleft()
        tokens.popleft().block_until_ready()
        waited_s = perf_counter() - began_s
        if waited_s > CATCH_UP_S:
            self._catch_up_steps = max(1, self._catch_up_steps // 2)
        elif waited_s < CATCH_UP_S / 4:
            self._catch_up_steps = min(max(1, self._pace.max_in_flight_steps // 2), self._catch_up_steps * 2)

    def _steps_until_due(self) -> int:
        """How many steps may go in one dispatch: up to the next boundary where anything can be due; at least 1."""
        gates, step = self.gates, self.step_count
        until_due = min(self._attention, gates.next_step_event, max(gates.flush_by, step + 1)) - step
        return max(1, min(until_due, self.compiled.capacity - self.carry.rows))

    def flush(self) -> None:
        """Send the ring to the fetch thread, with what was said meanwhile, and go on with a fresh one."""
        if self.carry.rows:
            notes, self._notes = tuple(self._notes), []
            ring, rows = self.compiled.take_ring(self.carry)
            first_step = self.step_count - rows + 1
            window = TrainWindow(
                first_step, self.epoch, self._window_batch, notes, self.gates.announces_steps
            )
            self._fetcher.put(Ring(ring, rows, self.compiled.layout, window))
        self._window_batch = self._batch
        self._flush_at = monotonic() + self._pace.flush_interval_s
        self.gates.flushed()
        if any(plan.every_s is not None for plan in self._room.plans):
            self._attention = self.step_count  # what is due by the clock is looked at once per window

    def emit(self, event: Event) -> None:
        """Say something in the training stream, behind the steps dispatched so far."""
        self.gates.note(type(event), event.step, getattr(event, "epoch", 0))
        self._attention = min(self._attention, self.gates.next_due)
        if self.carry.rows:
            self._notes.append(event)
        else:
            self._fetcher.put(event)

    # --- between two steps --------------------------------------------------------------------------------------

    def _settle_before_step(self) -> bool:
        if not self.settle() or not self._make_room():
            return False
        self._take_due_checkpoints()
        if self.gates.announces_steps:
            self.emit(StepStarted(step=self.step_count, epoch=self.epoch, batch=self._batch))
            if not self.settle():
                return False
        if self.gates.announces_steps:
            self._attention = self.step_count
        else:
            self._attention = min(
                self.gates.next_due,
                self._next_order_due(),
                self._next_planned(),
                self.step_count + self._free_rows(),
            )
        return True

    def settle(self) -> bool:
        """Do all that is due at this boundary: decisions, commands, a pause. False once the run has to end."""
        if self.gates.stale:
            for newcomer in self.gates.refresh(self.step_count):
                self._put_behind(Activation(newcomer))
        self._carry_out_arrived()
        while True:
            if self.gates.next_due <= self.step_count:
                self._pass_gate()
            self._carry_out_due()
            if self.effects.paused and self.effects.stop_reason is None:
                self.flush()
                self.wait(lambda: not self.effects.paused)
            elif self.effects.evaluations_asked and self.effects.stop_reason is None:
                self.effects.evaluations_asked = 0
                self.evaluate()
            elif self.effects.stop_reason is not None:
                self._attention = 0  # every later step comes here and is refused
                return False
            elif self.gates.next_due > self.step_count:
                return True

    def _put_behind(self, item: Any) -> None:
        if self.carry.rows:
            self.flush()
        self._fetcher.put(item)

    def _pass_gate(self) -> None:
        """Wait until every decider is through with what this boundary depends on."""
        step = self.step_count
        if self.gates.blocking(step) is not None:
            if self.carry.rows:
                self.flush()
            self.wait(lambda: self.gates.blocking(step) is None)

    def _carry_out_arrived(self) -> None:
        """Carry out what has no boundary to wait for; what arrived together, in the order of cause and subscription."""
        inbox = self._inbox
        while inbox.arrived:
            orders = [inbox.arrived.popleft() for _ in range(len(inbox.arrived))]
            inbox.due += [order for order in orders if order.command.due is not None]
            for order in sorted((o for o in orders if o.command.due is None), key=lambda order: order.rank):
                self.effects.carry_out(order, self.step_count, self.epoch)

    def _carry_out_due(self) -> None:
        self._carry_out_arrived()
        inbox, step = self._inbox, self.step_count
        ready = [order for order in inbox.due if order.command.due is not None and order.command.due <= step]
        if ready:
            inbox.due = [order for order in inbox.due if order not in ready]
            for order in sorted(ready, key=lambda order: order.rank):
                self.effects.carry_out(order, step, self.epoch)
        self._attention = min(self._attention, self._next_order_due())

    def _next_order_due(self) -> int:
        return min((order.command.due or 0 for order in self._inbox.due), default=NEVER)

    def wait(self, ready: Callable[[], object]) -> bool:
        """The one waiting place: until ``ready()``, serving commands meanwhile. False if the run has to end first.

        Raises:
            BusClosed: nobody serves the bus any more, so that what is waited for would never come.
        """
        while not ready():
            if self.effects.stop_reason is not None:
                return False
            if not self._bus.running:
                raise BusClosed(
                    "Training cannot go on: the event bus was stopped while the loop was waiting for it."
                )
            now_s = monotonic()
            if self.carry.rows and now_s >= self._flush_at:
                self.flush()
            timeout_s = min(POLL_S, max(0.0, self._flush_at - now_s)) if self.carry.rows else POLL_S
            self._inbox.wait(ready, timeout_s)
            self._carry_out_arrived()
        return True

    # --- backpressure -------------------------------------------------------------------------------------------

    def _free_rows(self) -> int:
        """How many steps may be dispatched before some Lossless queue could overflow."""
        return self._bus.rows_allowed(ROW_EVENTS) - self._rows_before - self._rows

    def _make_room(self) -> bool:
        """At a Lossless limit training runs at that subscriber's pace, and says so. False if the run has to end."""
        while self._free_rows() <= 0:
            self.flush()
            slowest = self._bus.tightest(ROW_EVENTS)
            began_s = monotonic()
            if slowest is None:  # the event loop itself is behind
                if not self.wait(lambda: self._free_rows() > 0):
                    return False
                continue
            handled, deadline_s = slowest.handled, began_s + slowest.stall_timeout_s
            if not self.wait(partial(self._has_moved, slowest, handled, deadline_s)):
                return False
            self._report_stall(slowest.name, monotonic() - began_s)
            if monotonic() >= deadline_s and slowest.handled == handled:
                slowest.stall(monotonic() - began_s)
        return True

    def _has_moved(self, slowest: Subscription, handled: int, deadline_s: float) -> bool:
        return self._free_rows() > 0 or slowest.handled != handled or monotonic() >= deadline_s

    def _report_stall(self, name: str, waited_s: float) -> None:
        waited_s += self._stalled.get(name, 0.0)
        if waited_s >= STALL_REPORT_S:
            self._bus.notify(LoopStalled(step=self.step_count, subscriber=name, waited_s=waited_s))
            waited_s = 0.0
        self._stalled[name] = waited_s

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _next_planned(self) -> int:
        step = self.step_count
        return min(
            ((step // p.every + 1) * p.every for p in self._room.plans if p.every is not None), default=NEVER
        )

    def _take_due_checkpoints(self) -> None:
        step, now_s = self.step_count, monotonic()
        for plan in self._room.plans:
            by_step = plan.every is not None and step % plan.every == 0 and step > self._checkpointed
            by_time = plan.every_s is not None and now_s >= plan.next_s
            if by_step or by_time:
                self._checkpoint(plan)
        self._checkpointed = max(step, self._checkpointed)

    def _take_epoch_checkpoints(self) -> None:
        for plan in self._room.plans:
            already = plan.every is not None and self.step_count % plan.every == 0
            if plan.every_epochs is not None and self.epoch % plan.every_epochs == 0 and not already:
                self._checkpoint(plan)

    def _checkpoint(self, plan: CheckpointPlan) -> None:
        if plan.every_s is not None:
            plan.next_s = monotonic() + plan.every_s
        self.emit(self.effects.take_checkpoint(self.step_count, self.epoch, None, plan.owner))
        self.compiled.request_keeping()

    # --- epochs and evaluation ----------------------------------------------------------------------------------

    def begin_epoch(self) -> bool:
        """Say EpochStarted and let it be decided on; False if the run has to end."""
        if self._inbox.arrived and not self.settle():
            return False
        self._batch = self._window_batch = 0
        self._epoch_step = self.step_count
        if self.gates.stale:
            self.settle()
        self.emit(
            EpochStarted(step=self.step_count, epoch=self.epoch, hyperparams=dict(self._inbox.hyperparams))
        )
        self._epoch_began_s = perf_counter()
        return True

    def end_epoch(self, *, evaluate: bool) -> bool:
        """Evaluate, say EpochCompleted, carry out what was decided on it. False if the run has to end."""
        going_on = self.settle()
        if going_on and evaluate:
            self.evaluate()
            going_on = self.effects.stop_reason is None
        self.flush()
        self.gates.note(EpochCompleted, self.step_count, self.epoch)
        self._fetcher.put(
            EpochEnd(
                self.step_count,
                self.epoch,
                self.step_count - self._epoch_step,
                self._epoch_began_s,
                self._inbox.hyperparams,
            )
        )
        self.epoch += 1
        self._batch = self._window_batch = 0
        going_on = self.settle() and going_on
        self._take_epoch_checkpoints()
        return going_on

    def evaluate(self) -> None:
        """Evaluate at this boundary, if the run has anything to evaluate on; waits for no result."""
        if self._evaluate is not None:
            self.flush()
            self._evaluate(self)

    def run_evaluation(self, evaluation: CompiledEval, batches: Iterable[Any]) -> None:
        """Evaluate the present state on ``batches``; ends early, without EvalCompleted, when the run has to end."""
        step = self.step_count

        def before_batch() -> bool:
            self._carry_out_arrived()
            if len(self._tokens) >= self._pace.max_in_flight_steps:
                self._let_device_catch_up()
            return self.effects.stop_reason is None

        def dispatched(token: jax.Array) -> None:
            self._tokens.append(token)
            self.gates.note(EvalStepCompleted, step)

        self.gates.note(EvalStarted, step)
        if run_evaluation(
            evaluation,
            self.carry.leaves,
            batches,
            step,
            self.epoch,
            self._fetcher.put,
            before_batch,
            dispatched,
        ):
            self.gates.note(EvalCompleted, step)

    # --- the end --------------------------------------------------------------------------------------------------

    def finish(self, deadline_s: float) -> None:
        """Take what is due at the last boundary, wait for the deciders, and send the last ring off.

        ``deadline_s`` is in ``monotonic`` time. What deciders ask after this is rejected, the same in every rerun.
        """
        self._take_due_checkpoints()
        self.flush()
        while self.gates.blocking(NEVER - 1) is not None and monotonic() < deadline_s and self._bus.running:
            self._inbox.wait(lambda: self.gates.blocking(NEVER - 1) is None, POLL_S)
            while self._inbox.arrived:
                self._inbox.due.append(self._inbox.arrived.popleft())
