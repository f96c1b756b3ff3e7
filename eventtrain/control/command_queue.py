"""Commands on their way to the training thread, which alone takes them out and waits here for them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from typing import Any, Protocol

from eventtrain.bus.barrier import Barrier
from eventtrain.bus.core import BusCore
from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.bus.wakeup import CrossLoopFuture
from eventtrain.control.run_state import LoopRecord, StreamRecord
from eventtrain.control.run_view import RunView
from eventtrain.errors import CommandRejectedError, is_logged
from eventtrain.events import CommandApplied, CommandRejected, Event
from eventtrain.events.commands import AnyCommand, Stop

logger = logging.getLogger("eventtrain")

POLL_S = 0.1
"""The longest time the training thread waits before it looks at ``arrived`` again: a signal handler adds a ``Stop``
without waking it."""


@dataclass
class RunPart:
    """The training side's part of a checkpoint, collected by a barrier beside the states of the subscriptions.

    Attributes:
        loop: the state of the loop; None until it was recorded.
        stream: the state of the training stream; None until the marker has passed the fetch thread.
        commands: commands that were not due, or arrived while the barrier was open.
        last_batch: reads the one trained on last, and may wait for the device; None if it is not known.
    """

    loop: LoopRecord | None = None
    stream: StreamRecord | None = None
    commands: list[PendingCommand] = field(default_factory=list["PendingCommand"])
    last_batch: Callable[[], Any] | None = None


class EventSink(Protocol):
    """Publishes one event."""

    def emit(self, event: Event) -> None:
        """Publish ``event``. Never blocks."""
        ...


@dataclass(slots=True)
class PendingCommand:
    """A command that was not applied yet, with its place among the commands due at the same boundary."""

    command: AnyCommand
    reply: CrossLoopFuture[CommandApplied]
    cause: Event | None = None
    subscription: SubscriptionCore | None = None
    issue: int = 0
    """Which of its handler's commands this is, from 0."""
    run: int | None = None
    """The run that it is meant for, by ``CommandQueue.run``; None: the one in progress."""
    ask: str | None = None
    """The number of the request by which another process of the run asked for it."""
    signal: int | None = None
    """The signal behind a ``Stop``, which a process of the run has received; None if there is none."""

    @property
    def rank(self) -> tuple[float, int, int, int]:
        """Sort key: step of the cause, its number in the stream, subscription, issue; those without a cause last."""
        if self.cause is None or self.subscription is None:
            return (float("inf"), 0, 0, self.issue)
        return (self.cause.step, self.cause.seq, self.subscription.index, self.issue)


class CommandQueue:
    """The queue of one trainer's commands, with the condition on which its training thread waits.

    ``post``, ``ask_to_stop`` and ``wake`` are for any thread; everything else is for the training thread.

    Attributes:
        arrived: commands that nothing has looked at yet. The training loop tests its truth before every step;
            appending and popping are atomic.
        due: commands of a finite lag that wait for their boundary. Training thread only.
        held: commands without a boundary that arrived where nothing could be decided. Training thread only.
        run: number of the run in progress, or of the last one.
    """

    def __init__(self, bus: BusCore, view: RunView) -> None:
        self.arrived: deque[PendingCommand] = deque()
        self.due: list[PendingCommand] = []
        self.held: list[PendingCommand] = []
        self.run = 0
        self._bus = bus
        self._view = view
        self._wakeup = threading.Event()
        self._waiting = False
        # The lock orders posting against the end of a run and against the barriers of checkpoints.
        self._lock = threading.Lock()
        self._barriers: list[Barrier[RunPart]] = []
        self._closed: str | None = "no run is in progress"
        # Of each issuer and kind. Counted without the lock, which a forked process may find locked for ever.
        self._rejections: dict[tuple[str | None, str], count[int]] = {}

    # --- any thread -------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether ``post`` accepts commands."""
        return self._closed is None

    def post(self, commands: list[PendingCommand]) -> None:
        """Add commands, together and in order. Rejects them at once if no run is in progress. Never blocks."""
        if self._bus.publish_queue.forked:
            for command in commands:
                self.reject(command, self._bus.publish_queue.close_reason)
            return
        with self._lock:
            reason = self._closed
            if any(command.run not in (None, self.run) for command in commands):
                reason = "it was issued in an earlier run of this trainer"
            elif self._barriers:
                # Also when the run has ended: one that resumes from its last barrier applies them.
                self._add_to_barriers(commands)
            if reason is None:
                self.arrived.extend(commands)
        if reason is None:
            self.wake()
            return
        for command in commands:
            self.reject(command, reason)

    def ask_to_stop(self, reason: str, signal: int | None = None) -> None:
        """Add a ``Stop``. Also for signal handlers: it takes no lock and wakes no thread."""
        self.arrived.append(PendingCommand(Stop(reason=reason), CrossLoopFuture(), signal=signal))

    def wake(self) -> None:
        """Wake the training thread if it waits. Not for signal handlers, which may interrupt the owner of the lock."""
        if self._waiting:
            self._wakeup.set()

    def reject(
        self,
        pending: PendingCommand,
        reason: str,
        sink: EventSink | None = None,
        level: int = logging.WARNING,
    ) -> None:
        """Reject one command: by its result, by an event (through ``sink``, or the bus) and in the log."""
        command, step = pending.command, self._view.step
        kind, issuer = command.kind, command.cause.subscriber if command.cause else command.source
        number = next(self._rejections.setdefault((issuer, kind), count(1)))
        if is_logged(number):
            logger.log(
                level, "Command %s%s was rejected at step %d%s: %s",
                kind, f" of {issuer}" if issuer else "", step, f" (no. {number})" if number > 1 else "", reason,
            )  # fmt: skip
        pending.reply.set_exception(
            CommandRejectedError(f"The command {kind} was rejected at step {step}: {reason}", reason=reason)
        )
        event = CommandRejected(step=step, command=command, reason=reason)
        emit = None if sink is None else sink.emit
        self._bus.notices.add((CommandRejected, kind), event, emit=emit)

    def answer(self, pending: PendingCommand, applied: CommandApplied) -> None:
        """Answers one command with a copy of ``applied``, stamped here: the bus will stamp the event itself later.

        The copy has no ``seq``, because the steps before the command may not be numbered yet. Waiting for that could
        make a handler wait for room in its own queue.
        """
        stamps = {"run_id": self._bus.run_id, "attempt": self._bus.attempt, "stream": "training"}
        pending.reply.set_result(applied.model_copy(update={**stamps, "time": datetime.now(UTC), "seq": 0}))

    # --- training thread --------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Count the next run, whose subscribers are about to start."""
        with self._lock:
            self.run += 1

    def open(self) -> None:
        """Accept commands from now on: the subscribers have started."""
        with self._lock:
            self._closed = None

    def close(self, reason: str) -> list[PendingCommand]:
        """Reject commands from now on: the run ends. Returns the commands that were not applied."""
        with self._lock:
            self._closed = reason
            left = [*self.due, *self.held, *self.arrived]
            for commands in (self.due, self.held, self.arrived):
                commands.clear()
        return left

    def open_barrier(self, barrier: Barrier[RunPart]) -> None:
        """Record in ``barrier`` the commands that wait, and those that are posted while it is open.

        A handler may be anywhere between the loop's boundary and the marker. A command that it issues in between
        belongs to the checkpoint as much as one that it issued before.
        """
        with self._lock:
            barrier.run.commands += [*self.due, *self.arrived]
            self._barriers = [*(other for other in self._barriers if other.open), barrier]

    def _add_to_barriers(self, commands: list[PendingCommand]) -> None:
        self._barriers = [barrier for barrier in self._barriers if barrier.open]
        for barrier in self._barriers:
            barrier.run.commands += commands

    def wait(self, ready: Callable[[], object], timeout_s: float = POLL_S, known: int = 0) -> None:
        """Sleep until woken, until ``ready()``, until a command arrives, or for ``timeout_s``.

        The first ``known`` commands in ``arrived`` do not count: they were seen, and cannot be served yet.

        ``_waiting`` is set before ``ready()`` is asked, and a waker changes what ``ready`` looks at before it reads
        ``_waiting``: whichever comes second sees the other, so no wake-up is lost.
        """
        self._waiting = True
        self._wakeup.clear()
        if not ready() and len(self.arrived) <= known:
            self._wakeup.wait(timeout_s)
        self._waiting = False
