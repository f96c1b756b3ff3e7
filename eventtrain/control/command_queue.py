"""Commands on their way to the training thread, which alone takes them out, and where that thread waits."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from eventtrain.bus.barrier import Barrier
from eventtrain.bus.core import BusCore
from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.bus.wakeup import CrossLoopFuture
from eventtrain.control.snapshots import KeptSnapshot
from eventtrain.errors import CommandRejectedError
from eventtrain.events import CommandApplied, CommandRejected, Event
from eventtrain.events.commands import AnyCommand, Stop
from eventtrain.events.models import Number
from eventtrain.events.run_records import LoopRecord, StreamRecord

logger = logging.getLogger("eventtrain")

POLL_S = 0.1
"""The longest time the training thread waits without looking at the signal flags, which cannot ring a bell."""


@dataclass(slots=True)
class PendingCommand:
    """One command on its way to the loop, with what decides its place among others due at the same boundary."""

    command: AnyCommand
    answer: CrossLoopFuture[CommandApplied]
    cause: Event | None = None
    subscription: SubscriptionCore | None = None
    issue: int = 0
    """Which of its handler's commands this is, from 0."""

    @property
    def rank(self) -> tuple[float, int, int, int]:
        """Commands due together are applied by the step of the cause, its number, subscription, issue."""
        if self.cause is None or self.subscription is None:
            return (float("inf"), 0, 0, self.issue)
        return (self.cause.step, self.cause.seq, self.subscription.index, self.issue)


@dataclass
class RunPart:
    """The training side's part of a checkpoint, collected beside the contributions of the subscriptions.

    Attributes:
        loop: the state of the loop; None until the loop has described it.
        stream: the state of its event stream; None until the marker was put into it.
        commands: commands that were not due, or arrived while the barrier was open.
    """

    loop: LoopRecord | None = None
    stream: StreamRecord | None = None
    commands: list[PendingCommand] = field(default_factory=list[PendingCommand])


class CommandQueue:
    """Where commands wait for the training thread, and where that thread waits for anything at all.

    ``post`` and ``ring`` are for any thread; ``take``, ``wait``, ``open`` and ``close`` for the training thread.
    """

    def __init__(self, bus: BusCore) -> None:
        self.bus = bus
        self.arrived: deque[PendingCommand] = deque()
        """Orders nobody has looked at yet; the loop tests its truth before every step."""
        self.due: list[PendingCommand] = []
        """Orders of finite lag that wait for their boundary."""
        self.hyperparams: Mapping[str, Number] = MappingProxyType({})
        """Values in effect, by label, as the loop last wrote them."""
        self.scheduled: Callable[[], Mapping[str, Number]] = dict
        """The hyperparameters that follow a schedule, as of the newest step fetched."""
        self.snapshots: dict[str | int, KeptSnapshot] = {}
        self.step = 0
        self._bell = threading.Event()
        self._cuts: list[Barrier[RunPart]] = []
        self._waiting = False
        self._closed: str | None = "no run is in progress"
        self._lock = threading.Lock()

    def post(self, orders: list[PendingCommand]) -> None:
        """Hand orders over, together and in order; rejected at once when no run is in progress."""
        with self._lock:
            reason = self._closed
            if (
                self._cuts
            ):  # also at the end of a run: the one that goes on from its last cut carries them out
                self._note_in_cuts(orders)
            if reason is None:
                self.arrived.extend(orders)
        if reason is None:
            self.ring()
            return
        for order in orders:
            self.reject(order, reason)

    def show(self, hyperparams: Mapping[str, Number]) -> None:
        """These values are in effect. Training thread."""
        self.hyperparams = MappingProxyType(dict(hyperparams))

    def open_cut(self, cut: Barrier[RunPart]) -> None:
        """Note in ``cut`` the orders that wait, and those that come while it is open. Training thread.

        A handler may be anywhere between the loop's boundary and the marker: what it asks for in between belongs to
        the cut as much as what it asked for before.
        """
        with self._lock:
            cut.run.commands += [*self.due, *self.arrived]
            self._cuts = [*(other for other in self._cuts if other.open), cut]

    def _note_in_cuts(self, orders: list[PendingCommand]) -> None:
        self._cuts = [cut for cut in self._cuts if cut.open]
        for cut in self._cuts:
            cut.run.commands += orders

    def kept(self) -> dict[str | int, KeptSnapshot]:
        """The snapshots taken by tag that were not released."""
        return {tag: kept for tag, kept in list(self.snapshots.items()) if not kept.device.released}

    def ask_to_stop(self, reason: str) -> None:
        """End the run at the next boundary. Any thread, and signal handlers: it takes no lock and rings no bell."""
        self.arrived.append(PendingCommand(Stop(reason=reason), CrossLoopFuture()))

    def reject(
        self,
        order: PendingCommand,
        reason: str,
        publish: Callable[[Event], None] | None = None,
        level: int = logging.WARNING,
    ) -> None:
        """Say no: to the one who awaits the result, by an event (through ``publish``), and in the log at ``level``."""
        logger.log(level, "Command %s was not carried out: %s", order.command.kind, reason)
        order.answer.set_exception(
            CommandRejectedError(
                f"The command {order.command.kind} was not carried out: {reason}", reason=reason
            )
        )
        (publish or self.bus.notify)(CommandRejected(step=self.step, command=order.command, reason=reason))

    def ring(self) -> None:
        """Wake the training thread if it waits. Not for signal handlers, which could meet its lock."""
        if self._waiting:
            self._bell.set()

    def wait(self, ready: Callable[[], object], timeout_s: float) -> None:
        """Sleep until rung, ``ready()`` or the timeout: the one place where the training thread waits for the bus."""
        self._waiting = True
        self._bell.clear()
        if not ready() and not self.arrived:
            self._bell.wait(timeout_s)
        self._waiting = False

    def open(self) -> None:
        """A run begins: commands are taken from now on."""
        with self._lock:
            self._closed = None

    def close(self, reason: str) -> list[PendingCommand]:
        """The run ends: later commands are rejected at once. Returns those still open."""
        with self._lock:
            self._closed = reason
            left = [*self.due, *self.arrived]
            self.due.clear()
            self.arrived.clear()
        return left
