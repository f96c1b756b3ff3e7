"""Between two steps: decisions, commands, a pause. And the one place where the training thread waits for others."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, perf_counter

from eventtrain.bus.core import BusCore
from eventtrain.bus.training_stream import Activation
from eventtrain.control.command_queue import POLL_S, CommandQueue
from eventtrain.control.loop_statistics import LoopClock
from eventtrain.errors import BusClosed
from eventtrain.loop.command_executor import CommandExecutor
from eventtrain.loop.lag_gates import NEVER, LagGates
from eventtrain.loop.metric_windows import MetricWindows, Position


class Boundary:
    """Settles what is due between step ``position.step`` and the next one. Training thread only.

    Args:
        position, windows, gates, effects, clock: of the run.
        bus: whose death ends every wait.
        inbox: where commands arrive, and whose bell wakes this thread.
        evaluate: evaluates at this boundary.
        take_checkpoints: keeps the state of this boundary where commands asked for that.
    """

    def __init__(
        self,
        position: Position,
        windows: MetricWindows,
        gates: LagGates,
        effects: CommandExecutor,
        clock: LoopClock,
        bus: BusCore,
        inbox: CommandQueue,
        evaluate: Callable[[], None],
        take_checkpoints: Callable[[], None],
    ) -> None:
        self._position = position
        self._windows = windows
        self._gates = gates
        self._effects = effects
        self._clock = clock
        self._bus = bus
        self._inbox = inbox
        self._evaluate = evaluate
        self._take_checkpoints = take_checkpoints
        self.whole = True
        """False in the middle of an evaluation, of which a cut would hold one half."""

    def settle(self) -> bool:
        """Pass the gate, carry out what is due and what has arrived, hold while paused. False: the run has to end."""
        gates, effects, step = self._gates, self._effects, self._position.step
        self.admit_deciders()
        while True:
            self.carry_out_arrived()
            if gates.next_due <= step and not self._pass_gate(step):
                if effects.checkpoints_asked:
                    self._take_checkpoints()
                return False  # what is due here waits for a slower decider, in the run that goes on from here
            self._carry_out_due(step)
            if effects.checkpoints_asked:
                self._take_checkpoints()
            if effects.stop_reason is not None:
                return False
            if effects.paused:
                self._windows.flush()
                self.wait(lambda: not effects.paused)
            elif effects.evaluations_asked:
                effects.evaluations_asked = 0
                self._evaluate()
            elif gates.next_due > step:
                return True

    def admit_deciders(self) -> None:
        """Begin to count the events of subscriptions with a finite lag that came since the last look."""
        if self._gates.stale:
            self._windows.flush()  # the open window was announced by those who decided until now
            for newcomer in self._gates.refresh(self._position.step):
                self._windows.put(Activation(newcomer))

    def next_due(self) -> int:
        """The next boundary where a decider or a command is due; NEVER if none is."""
        orders = min((order.command.due or 0 for order in self._inbox.due), default=NEVER)
        return min(self._gates.next_due, orders)

    def _pass_gate(self, step: int) -> bool:
        """Wait until every decider is through with what this boundary depends on. False: the run has to end first."""
        if self._gates.blocking(step) is None:
            return True
        self._windows.flush()
        return self.wait_for_observers(lambda: self._gates.blocking(step) is None)

    def carry_out_arrived(self) -> None:
        """Carry out what has no boundary to wait for; what arrived together, by cause and subscription."""
        inbox, position = self._inbox, self._position
        while inbox.arrived:
            orders = [inbox.arrived.popleft() for _ in range(len(inbox.arrived))]
            inbox.due += [order for order in orders if order.command.due is not None]
            for order in sorted((o for o in orders if o.command.due is None), key=lambda order: order.rank):
                self._effects.carry_out(order, position.step, position.epoch)

    def _carry_out_due(self, step: int) -> None:
        self.carry_out_arrived()
        inbox = self._inbox
        ready = [order for order in inbox.due if order.command.due is not None and order.command.due <= step]
        if ready:
            inbox.due = [order for order in inbox.due if (order.command.due or 0) > step]
            for order in sorted(ready, key=lambda order: order.rank):
                self._effects.carry_out(order, step, self._position.epoch)

    def wait(self, ready: Callable[[], object]) -> bool:
        """The one waiting place: until ``ready()``, serving commands meanwhile. False: the run has to end first.

        Raises:
            BusClosed: nobody serves the bus any more, so that what is waited for would never come.
        """
        windows = self._windows
        while not ready():
            if self._effects.stop_reason is not None:
                return False
            self._require_bus()
            now_s = perf_counter()
            if windows.open and now_s >= windows.flush_at_s:
                windows.flush()
            timeout_s = min(POLL_S, max(0.0, windows.flush_at_s - now_s)) if windows.open else POLL_S
            self._inbox.wait(ready, timeout_s)
            self.carry_out_arrived()
            if self._effects.checkpoints_asked and self.whole:
                self._take_checkpoints()
        return True

    def wait_for_observers(self, ready: Callable[[], object]) -> bool:
        """As ``wait``, for something that a subscriber has to do."""
        return self._clock.for_observers(lambda: self.wait(ready))

    def _require_bus(self) -> None:
        if not self._bus.running:
            raise BusClosed(
                "Training cannot go on: the event bus was stopped while the loop was waiting for it. Keep it running "
                "until fit returns."
            )

    def wait_for_deciders(self, deadline_s: float) -> None:
        """At the end of a run: until every decider is through with everything, or ``monotonic`` time ``deadline_s``.

        What they ask for is kept among the orders due, to be rejected: the same in every rerun. A stop that arrives
        meanwhile (a signal, say) ends the waiting.
        """
        self._clock.for_observers(lambda: self._wait_for_deciders(deadline_s))

    def _wait_for_deciders(self, deadline_s: float) -> None:
        last = NEVER - 1
        while self._gates.blocking(last) is not None and monotonic() < deadline_s and self._bus.running:
            self._inbox.wait(lambda: self._gates.blocking(last) is None, POLL_S)
            while self._inbox.arrived:
                order = self._inbox.arrived.popleft()
                self._inbox.due.append(order)
                if order.command.kind == "stop" and order.command.due is None:
                    return
