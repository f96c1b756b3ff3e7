"""Between two steps: decisions, commands, a pause. The one place where the training thread waits for other threads.

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
from eventtrain.control.command_queue import POLL_S
from eventtrain.errors import BusClosed
from eventtrain.events import LoopStalled
from eventtrain.loop.checkpoints import Checkpoints
from eventtrain.loop.command_executor import CommandExecutor
from eventtrain.loop.evaluation import Evaluations
from eventtrain.loop.lag_gates import NEVER
from eventtrain.loop.metric_windows import MetricWindows
from eventtrain.loop.run_resources import RunResources
from eventtrain.loop.run_status import RunStatus

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
    deadline_s: float = math.inf

    def __post_init__(self) -> None:
        self._gates = self.resources.gates
        self._queue = self.resources.plane.queue

    def settle(self) -> bool:
        """Wait for due deciders, apply commands, hold while paused. Returns False if the run has to end."""
        gates, status = self._gates, self.status
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
        if self._gates.stale:
            self.windows.flush()  # the open window was announced by the deciders known until now
            for newcomer in self._gates.refresh(self.status.step):
                self.windows.put(Activation(newcomer))

    def next_due(self) -> int:
        """Returns the next boundary at which a decider or a command is due; NEVER if none is."""
        commands = min((pending.command.due or 0 for pending in self._queue.due), default=NEVER)
        return min(self._gates.next_due, commands)

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
        """Apply the commands that have no boundary to wait for. Those that arrived together are ordered by rank."""
        queue = self._queue
        while queue.arrived:
            arrived = [queue.arrived.popleft() for _ in range(len(queue.arrived))]
            queue.due += [pending for pending in arrived if pending.command.due is not None]
            at_once = [pending for pending in arrived if pending.command.due is None]
            for pending in sorted(at_once, key=lambda pending: pending.rank):
                self.executor.apply(pending)

    def _apply_due(self) -> None:
        self.apply_arrived()
        queue, step = self._queue, self.status.step
        due = [pending for pending in queue.due if (pending.command.due or 0) <= step]
        if due:
            queue.due = [pending for pending in queue.due if (pending.command.due or 0) > step]
            for pending in sorted(due, key=lambda pending: pending.rank):
                self.executor.apply(pending)

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
            while queue.arrived:
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
