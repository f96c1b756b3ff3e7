"""Between two steps: decisions, commands, a pause. The one place where the training thread waits for other threads.

In a run of several processes it also waits for process 0, and carries out its orders; see ``agreement``.

Every wait serves the command queue, and ends when the run has to end or the bus is no longer served. The answers to
commands do not pass through event queues. So a handler may await the result of a command while the loop waits for
that handler, and neither blocks the other for ever.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic, perf_counter

from eventtrain.bus.core import BusCore
from eventtrain.bus.training_stream import Activation
from eventtrain.bus.wakeup import CrossLoopFuture
from eventtrain.control.command_queue import POLL_S, PendingCommand
from eventtrain.errors import BusClosed
from eventtrain.events import LoopStalled, StepStarted
from eventtrain.loop.agreement.agreement import Agreement
from eventtrain.loop.agreement.log import (
    AnnounceStep,
    ApplyCommand,
    BeginEnd,
    EndRun,
    MakeSample,
    Order,
    ReleaseSnapshots,
    RestoreSnapshot,
    RunEvaluation,
    TakeCheckpoint,
)
from eventtrain.loop.checkpoints import Checkpoints
from eventtrain.loop.command_executor import CommandExecutor
from eventtrain.loop.evaluation import Evaluations
from eventtrain.loop.lag_gates import NEVER
from eventtrain.loop.metric_windows import MetricWindows
from eventtrain.loop.run_resources import RunResources
from eventtrain.loop.run_status import RunStatus
from eventtrain.loop.samples import Samples

logger = logging.getLogger("eventtrain")

GATE_REPORT_S = 10.0
"""A wait for one decider is reported when it has taken this long, and whenever it has doubled."""


@dataclass(eq=False, kw_only=True)
class Boundary:
    """Settles what is due between step ``status.step`` and the next one. Training thread only, except ``wake``.

    Attributes:
        deadline_s: when every wait has to end (``monotonic``), since the run does.
    """

    status: RunStatus
    resources: RunResources
    windows: MetricWindows
    executor: CommandExecutor
    checkpoints: Checkpoints
    evaluations: Evaluations
    samples: Samples
    agreement: Agreement
    deadline_s: float = math.inf

    def __post_init__(self) -> None:
        self._gates = self.resources.gates
        self._queue = self.resources.plane.queue
        self._replayed = self.resources.plane.requests.replayed
        # A step, and how many commands of a finite lag were applied at its boundary.
        self._applied_due = 0, 0
        self.end: EndRun | None = None

    def settle(self) -> bool:
        """Wait for due deciders, apply commands, hold while paused. Returns False if the run has to end."""
        if not self.agreement.decides:
            return self._follow()
        gates, status = self._gates, self.status
        self.agreement.check()
        self.admit_deciders()
        while True:
            self.apply_arrived()
            if gates.next_due <= status.step and not self._pass_gate():
                self._take_requested_checkpoints()
                return False  # what is due here waits for a slower decider, in the run that resumes from here
            self._apply_due()
            self._take_requested_checkpoints()
            if status.stop_reason is not None:
                return False
            if status.paused:
                self.windows.flush()
                self.wait(lambda: not status.paused)
            elif self.evaluations.requested:
                self.evaluations.run(self)
            elif gates.next_due > status.step:
                return True

    def admit_deciders(self) -> None:
        """Count the events of subscriptions with a finite lag that came since the last look."""
        if self._gates.stale and self.agreement.is_open(self.status):
            self.windows.flush()  # the open window was announced by the deciders known until now
            announced = self._gates.announces_steps
            for newcomer in self._gates.refresh(self.status.step):
                self.windows.put(Activation(newcomer))
            if announced and not self._gates.announces_steps:
                self.agreement.record(self.status, AnnounceStep(active=False))

    def announce_step(self) -> None:
        """Publish StepStarted of the next step, if that was not done yet."""
        status = self.status
        if status.announced_step != status.step:
            status.announced_step = status.step
            self.agreement.record(status, AnnounceStep())
            self.windows.emit(StepStarted(step=status.step, epoch=status.epoch, batch=status.batch))

    def next_due(self) -> int:
        """Returns the next boundary at which a decider or a command is due; NEVER if none is."""
        commands = min((pending.command.due or 0 for pending in self._queue.due), default=NEVER)
        replayed = self._replayed[0].command.due or 0 if self._replayed else NEVER
        return min(self._gates.next_due, commands, replayed)

    def _pass_gate(self) -> bool:
        """Wait for every decider on which this boundary depends. Returns False if the run has to end first."""
        gates, step = self._gates, self.status.step
        if gates.blocking(step) is None:
            return True
        self.windows.flush()
        began_s = monotonic()
        report_s = began_s + GATE_REPORT_S

        def is_open_or_late() -> bool:
            return gates.blocking(step) is None or monotonic() >= report_s

        while self.wait_for_observers(is_open_or_late):
            decider = gates.blocking(step)
            if decider is None:
                return True
            waited_s = monotonic() - began_s
            logger.warning(
                "Training has waited %.0f s at step %d for %s, whose lag is finite: it has not handled its event. Give "
                "it a timeout_s, or a lag of None.",
                waited_s, step, decider.name,
            )  # fmt: skip
            self.resources.bus.notify(LoopStalled(step=step, subscriber=decider.name, waited_s=waited_s))
            report_s = began_s + 2 * waited_s
        return False

    def _take_requested_checkpoints(self) -> None:
        if self.checkpoints.requested:
            self.checkpoints.take_requested(self)

    # --- commands ---------------------------------------------------------------------------------------------

    def apply_arrived(self) -> None:
        """Apply the commands that have no boundary to wait for. Those that arrived together are ordered by rank.

        Not those that arrive meanwhile: a service that issues them without end must not hold up the loop, nor the
        events of the open window. At a moment that was promised to other processes they are held until the next one
        that was not.
        """
        queue, agreement = self._queue, self.agreement
        if not agreement.decides:
            self._take_orders()
            return
        if not (queue.arrived or queue.held):
            return
        arrived = [queue.arrived.popleft() for _ in range(len(queue.arrived))]
        queue.due += [pending for pending in arrived if pending.command.due is not None]
        at_once = [pending for pending in arrived if pending.command.due is None]
        queue.held += sorted(at_once, key=lambda pending: pending.rank)
        if agreement.is_open(self.status):
            commands, queue.held = queue.held, []
            for pending in commands:
                self.executor.apply(pending)

    def _apply_due(self) -> None:
        self.apply_arrived()
        queue, step = self._queue, self.status.step
        due = [pending for pending in queue.due if (pending.command.due or 0) <= step]
        if due:
            queue.due = [pending for pending in queue.due if (pending.command.due or 0) > step]
        for pending in sorted(due, key=lambda pending: pending.rank):
            self._replay()
            if self.executor.apply(pending):
                at_step, count = self._applied_due
                self._applied_due = step, count + 1 if at_step == step else 1
        self._replay()

    def _replay(self, *, late: bool = False) -> bool:
        """Apply the commands of another run whose turn it is; ``late``: every one that is due. Returns if it did."""
        at_step, count = self._applied_due
        step, did = self.status.step, False
        while self._replayed and (due := self._replayed[0].command.due or 0) <= step:
            passed = count if at_step == step else 0
            if not (late or due < step or self._replayed[0].after <= passed):
                break
            self.executor.apply(PendingCommand(self._replayed.popleft().command, CrossLoopFuture()))
            did = True
        return did

    def replay_late(self) -> bool:
        """Apply what another run had at this boundary, and this one not yet. Returns False if the run has to end."""
        return not self._replay(late=True) or self.settle()

    # --- other processes --------------------------------------------------------------------------------------

    def begin_phase(self) -> None:
        """Begin the next phase of the run, behind every order of the one that ends."""
        if not self.agreement.decides:
            self._await_promise()
        self.status.begin_phase()

    def promise(self, until: int) -> int:
        """Let the other processes pass this boundary, before a step is dispatched. Returns the step to look again.

        Args:
            until: the last step after which nothing is due.
        """
        status, agreement = self.status, self.agreement
        if not agreement.is_shared:
            return NEVER
        if agreement.decides:
            if agreement.is_open(status):
                self.executor.announce_released()
            by_clock = self.checkpoints.schedule.waits() or self.evaluations.schedule.waits()
            if self._queue.held or self._gates.stale or by_clock:
                until = status.step  # they need a moment that is not promised
        return agreement.promise(status, max(status.step, until))

    def steps_of_call(self, most: int, left: int) -> int:
        """Agree with the other processes on how many steps the call at this boundary runs, which is settled.

        Args:
            most: until something may be due, as far as this process knows.
            left: in the group of batches of the call.
        """
        status, agreement = self.status, self.agreement
        if agreement.is_open(status):
            self.executor.announce_released()
        while (steps := agreement.steps_of_call(status, most, left)) is None:
            self._take_orders()
            self._wait_for_process_0(lambda: agreement.steps_of_call(status, most, left) is not None)
        return steps

    def agree(self) -> bool:
        """Agree that a batch of an evaluation is dispatched now. Returns False if the run has to end."""
        self.apply_arrived()
        if self.agreement.is_shared and self.status.stop_reason is None:
            if self.agreement.decides:
                self.agreement.promise(self.status, self.status.step if self._queue.held else NEVER)
            else:
                self._await_promise()
        return self.status.stop_reason is None

    def follow_to_end(self) -> EndRun:
        """Carry out the orders of process 0 until the one that ends the run, and return that."""
        while self.end is None:
            self._take_orders(at_end=True)
            self._queue.wait(lambda: self.agreement.has_order, POLL_S)
            require_served(self.resources.bus)
        return self.end

    def _follow(self) -> bool:
        """``settle``, where another process decides."""
        status = self.status
        while True:
            self._await_promise()
            if status.stop_reason is not None:
                return False
            if not self.evaluations.requested:
                return True
            self.evaluations.run(self)

    def _await_promise(self) -> None:
        """Carry out every order of the present moment. Waits until process 0 has passed it."""
        agreement, status = self.agreement, self.status
        while True:
            is_promised = agreement.is_promised(status)
            self._take_orders()
            if is_promised or status.stop_reason is not None:
                return
            self._wait_for_process_0(lambda: agreement.is_promised(status))

    def _wait_for_process_0(self, ready: Callable[[], object]) -> None:
        """Wait for a record that makes ``ready()`` true, for a short time."""
        if self.windows.open and perf_counter() >= self.windows.flush_at_s:
            self.windows.flush()
        self._queue.wait(ready, POLL_S)
        require_served(self.resources.bus)

    def _take_orders(self, *, at_end: bool = False) -> None:
        """Send the commands that arrived here to process 0, and carry out its orders for the present moment.

        Once the run has to end, orders are carried out as they come: nothing is dispatched between them.
        """
        agreement = self.agreement
        agreement.check()
        agreement.ask()
        while (
            order := agreement.next_order(self.status, at_end=at_end or self.status.stop_reason is not None)
        ) is not None:
            self._carry_out(order)

    def _carry_out(self, order: Order) -> None:
        match order:
            case ApplyCommand():
                asked = self.agreement.asked(order.ask)
                pending = asked or PendingCommand(order.command, CrossLoopFuture(), signal=order.signal)
                self.executor.apply(pending)
            case TakeCheckpoint():
                self.checkpoints.take_ordered(order)
            case MakeSample():
                self.samples.make_ordered(order)
            case RunEvaluation():
                self.evaluations.request_ordered(order)
            case AnnounceStep():
                if self._gates.announces_steps != order.active:
                    self.windows.flush()
                    self._gates.announces_steps = order.active
                if order.active:
                    self.announce_step()
            case BeginEnd():
                self.checkpoints.begin_end(order)
            case RestoreSnapshot():
                self.executor.restore_ordered(order)
            case ReleaseSnapshots():
                self.executor.release(order.tags)
            case EndRun():
                self.end = order
            case _:  # the agreement has carried it out (a rejection), or the loop does (the end of a group)
                pass

    # --- waiting ----------------------------------------------------------------------------------------------

    def wait(self, ready: Callable[[], object]) -> bool:
        """Wait until ``ready()``, serving commands. Returns False if the run has to end first.

        Raises:
            BusClosed: the bus is no longer served, so that ``ready`` would never be true.
        """
        windows = self.windows
        while not ready():
            if self.status.stop_reason is not None or monotonic() >= self.deadline_s:
                return False
            require_served(self.resources.bus)
            self.agreement.check()
            now_s = perf_counter()
            if windows.open and now_s >= windows.flush_at_s:
                windows.flush()
            timeout_s = min(POLL_S, max(0.0, windows.flush_at_s - now_s)) if windows.open else POLL_S
            self._queue.wait(ready, timeout_s)
            self.apply_arrived()
            if not self.evaluations.in_progress:
                self._take_requested_checkpoints()
        return True

    def wait_for_observers(self, ready: Callable[[], object]) -> bool:
        """As ``wait``, for something that a subscriber has to do: the time is charged to observers."""
        return self.resources.clock.for_observers(lambda: self.wait(ready))

    def wake(self) -> None:
        """Make ``wait`` ask ``ready`` again. Any thread."""
        self._queue.wake()

    def wait_for_deciders(self, deadline_s: float) -> None:
        """Wait, at the end of a run, until every decider has handled everything, or until ``deadline_s`` (monotonic).

        Their commands are kept as due, to be rejected: the same in every rerun. A stop that arrives meanwhile, for
        example from a signal, ends the wait.
        """
        self.resources.clock.for_observers(lambda: self._wait_for_deciders(deadline_s))

    def _wait_for_deciders(self, deadline_s: float) -> None:
        gates, queue, last = self._gates, self._queue, NEVER - 1
        while gates.blocking(last) is not None and monotonic() < deadline_s and self.resources.bus.running:
            queue.wait(lambda: gates.blocking(last) is None)
            for _ in range(len(queue.arrived)):
                pending = queue.arrived.popleft()
                queue.due.append(pending)
                if pending.command.kind == "stop" and pending.command.due is None:
                    return


def require_served(bus: BusCore) -> None:
    """Raises BusClosed unless the bus is served."""
    if not bus.running:
        raise BusClosed(
            "Training cannot continue: the event bus was stopped while the loop was waiting for it. Keep it "
            "running until fit returns."
        )
