"""Answers the training loop before it decides: alone, as the process that decides, or as one that follows.

With one process nothing is recorded or waited for. With several, process 0 records each decision in the log, and
promises moments ahead; the others wait for the promise of the moment they are at, and carry out its orders.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from time import monotonic

from pydantic import TypeAdapter

from eventtrain.bus.wakeup import CrossLoopFuture
from eventtrain.control.command_queue import CommandQueue, PendingCommand
from eventtrain.control.control_plane import ControlPlane
from eventtrain.control.run_context import Exchange
from eventtrain.errors import PeerLost
from eventtrain.events import Event
from eventtrain.events.commands import AnyCommand
from eventtrain.events.models import Frozen
from eventtrain.loop.agreement.channel import Channel, coordinator_host
from eventtrain.loop.agreement.forwarding import Forwarded, Outbox, publish_forwarded
from eventtrain.loop.agreement.log import (
    END,
    NOTHING,
    RECORD,
    ApplyCommand,
    FollowerLog,
    LeaderLog,
    Moment,
    Order,
    Promise,
    RejectCommand,
)
from eventtrain.loop.agreement.peers import READ_S, Loss, Peers
from eventtrain.loop.agreement.promise_stream import PromiseReceiver, PromiseSender
from eventtrain.loop.lag_gates import NEVER
from eventtrain.loop.run_status import RunStatus

AHEAD_S = 0.02
"""How far process 0 promises ahead, in steps of the present length. A command without a cause waits that long."""
MOST_AHEAD = 64
BEGIN_S = 5.0
"""How long a process that was stopped waits for process 0 to begin the run, so that both end it alike."""


class Agreement(ABC):
    """The part of one process in the decisions of a run. Training thread only.

    What a process that decides does not need (it asks for nothing, and follows no order) is defined here.

    Attributes:
        decides: whether this process makes the decisions.
        is_shared: whether there are other processes.
        ended: every decision was made, or the run has failed: nothing is dispatched any more.
    """

    decides: bool = True
    is_shared: bool = True
    ended: bool = False

    @property
    def exchange(self) -> Exchange | None:
        """Keys and values for what other threads agree on, such as the parts of a checkpoint; None if alone."""
        return None

    @abstractmethod
    def is_open(self, status: RunStatus) -> bool:
        """Returns whether a decision may be made at the present moment."""

    @abstractmethod
    def record(self, status: RunStatus, order: Order) -> None:
        """Has every other process carry out ``order``, as this one does. The present moment must be open."""

    @abstractmethod
    def promise(self, status: RunStatus, until: int) -> int:
        """Promises the present moment, before something is dispatched, and perhaps some after it.

        Args:
            until: the last step after which nothing is due.

        Returns:
            The step at which to ask again.
        """

    def steps_of_call(self, status: RunStatus, most: int, left: int) -> int | None:
        """Agrees on a call of several steps, before it is dispatched at the present moment.

        Args:
            status: of the run.
            most: how many it may run, as far as this process knows.
            left: how many are left in its group of batches.

        Returns:
            How many it runs on every process; None if that is not known yet.
        """
        return most

    def ask(self) -> None:
        """Has process 0 apply the commands that have arrived here. Never for the process that decides."""
        raise NotImplementedError

    def is_promised(self, status: RunStatus) -> bool:
        """Returns whether ``next_order`` has every order of the present moment."""
        return True

    def early_stop(self, status: RunStatus) -> ApplyCommand | None:
        """Returns the stop by which process 0 ends the run before this process has its first batch, if it does."""
        return None

    def next_order(self, status: RunStatus, *, at_end: bool = False) -> Order | None:
        """Returns the next order to be carried out at the present moment; None if there is none (yet).

        Args:
            status: of the run.
            at_end: nothing more is dispatched, so any order may be carried out.
        """
        return None

    @property
    def has_order(self) -> bool:
        """Whether an order has arrived that was not carried out."""
        return False

    def asked(self, number: str | None) -> PendingCommand | None:
        """Returns the command that this process asked for by that number, once."""
        return None

    @abstractmethod
    def check(self) -> None:
        """Raises PeerLost if another process has failed or is gone."""

    @abstractmethod
    def wait_for_failure(self) -> None:
        """Waits until the other process that failed has said why. Blocks for seconds at most."""

    @abstractmethod
    def begin(self, opening: str) -> str:
        """Returns the ``opening`` of process 0: what all have to know before the run begins. May block.

        Raises PeerLost, also if this process is stopped and process 0 does not begin the run.
        """

    @abstractmethod
    def end(self, error: BaseException | None = None) -> list[PendingCommand]:
        """Makes no more decisions, because of ``error`` or at the end. Returns the commands asked for, not answered."""

    @abstractmethod
    def leave(self, error: BaseException | None = None) -> None:
        """Leaves the run, because of ``error`` or at its end. Blocks until the other processes can know. Idempotent."""


class _RunExchange:
    """Keys and values of one run. A wait ends when a process is lost; see ``Exchange``."""

    def __init__(self, channel: Channel, peers: Peers) -> None:
        self._channel = channel
        self._peers = peers

    def set(self, key: str, value: str) -> None:
        """Sets a key, once."""
        self._channel.set(key, value)

    def wait_for(self, key: str, timeout_s: float) -> str | None:
        """Returns the value of a key, once it has one; None after ``timeout_s`` seconds. Raises PeerLost."""
        found = self._channel.wait_for(key, timeout_s)
        if found is None and self._peers.lost is not None:
            raise self._peers.lost
        return found

    def delete(self, key: str) -> None:
        """Deletes a key, or all that begin with it and a slash."""
        self._channel.delete(key)


class Alone(Agreement):
    """The only process: it decides when it likes."""

    is_shared = False

    def is_open(self, status: RunStatus) -> bool:
        """Returns True."""
        return True

    def record(self, status: RunStatus, order: Order) -> None:
        """Does nothing."""

    def promise(self, status: RunStatus, until: int) -> int:
        """Returns ``NEVER``."""
        return NEVER

    def check(self) -> None:
        """Does nothing."""

    def wait_for_failure(self) -> None:
        """Does nothing."""

    def begin(self, opening: str) -> str:
        """Returns ``opening``."""
        return opening

    def leave(self, error: BaseException | None = None) -> None:
        """Does nothing."""

    def end(self, error: BaseException | None = None) -> list[PendingCommand]:
        """Returns nothing."""
        return []


class _Ask(Frozen):
    """A request of another process to process 0: to apply a command, or to release a snapshot."""

    number: str = ""
    command: AnyCommand | None = None
    signal: int | None = None
    release: tuple[str, int] | None = None


_MESSAGE: TypeAdapter[_Ask | Forwarded] = TypeAdapter(_Ask | Forwarded)


class _Several(Agreement):
    """Base of process 0 and the others.

    Args:
        channel: of the run.
        peers: of the run, which are started here.
    """

    def __init__(self, channel: Channel, peers: Peers) -> None:
        self._channel = channel
        self._peers = peers
        peers.start()

    @property
    def exchange(self) -> Exchange:
        """Keys and values for what other threads agree on."""
        return _RunExchange(self._channel.below("exchange"), self._peers)

    def check(self) -> None:
        """Raises PeerLost if another process has failed or is gone."""
        if self._peers.lost is not None:
            raise self._peers.lost

    def wait_for_failure(self) -> None:
        """Waits until the other process that failed has said why. Blocks for seconds at most."""
        self._peers.wait_for_failure()

    def leave(self, error: BaseException | None = None) -> None:
        """Leaves the run."""
        self._peers.leave("" if error is None else f"{type(error).__name__}: {error}")


class Pace:
    """How many steps, or batches of an evaluation, take ``AHEAD_S``. Training thread only."""

    def __init__(self) -> None:
        self._since: tuple[Moment, float] = NOTHING, 0.0
        self._last = self._before = 0

    def steps_ahead(self, moment: Moment, now_s: float) -> int:
        """Returns how many; 0 until it is known, ``MOST_AHEAD`` at most.

        The smaller of the last two measurements: a loop that may run ahead of the device again dispatches several
        steps in no time.
        """
        begun, then_s = self._since
        took_s = now_s - then_s
        if begun.phase != moment.phase:
            self._since = moment, now_s
        elif took_s >= AHEAD_S:
            self._since = moment, now_s
            self._before, self._last = self._last, int(AHEAD_S * (moment.count - begun.count) / took_s)
        return min(self._before, self._last, MOST_AHEAD)


class Leader(_Several):
    """Process 0 of several: it decides, and writes the log.

    Args:
        channel: of the run.
        processes: how many there are.
        plane: gets the commands that other processes ask for.
        on_lost: as for ``Peers``.
        publish: gets the events of other processes, on a thread of ``Peers``; must not block.
    """

    def __init__(
        self,
        channel: Channel,
        processes: int,
        plane: ControlPlane,
        on_lost: Callable[[PeerLost, Loss], None],
        publish: Callable[[Event], None],
    ) -> None:
        self._log = LeaderLog()
        self._plane = plane
        self._publish = publish
        self._pace = Pace()
        self._stream = PromiseSender(channel, processes - 1, coordinator_host())
        self._records = 0
        self._is_streamed = self._repeats = False
        peers = Peers(
            channel,
            0,
            processes,
            next_message=self._next_record,
            take=self._take_ask,
            on_lost=on_lost,
            on_beat=self._repeat_streamed,
        )
        super().__init__(channel, peers)

    def is_open(self, status: RunStatus) -> bool:
        """Returns whether the present moment is not promised."""
        return self._log.is_open(status.moment)

    def record(self, status: RunStatus, order: Order) -> None:
        """Writes ``order`` to the log."""
        self._log.add(status.moment, order, status.phase_step)
        self._peers.wake()

    def promise(self, status: RunStatus, until: int) -> int:
        """Promises as many steps ahead as take ``AHEAD_S``; see ``Agreement``."""
        moment = status.moment
        ahead = max(0, min(self._pace.steps_ahead(moment, monotonic()), until - status.step))
        promised = Moment(moment.phase, moment.count + ahead)
        if promised > self._log.promised:
            self._log.promise(promised, status.phase_step)
            self._peers.wake()
        return status.step + max(1, ahead // 2)

    def steps_of_call(self, status: RunStatus, most: int, left: int) -> int:
        """Promises the moments of ``most`` steps, and orders that the call ends behind them if more are left."""
        self._log.promise_call(status.moment, most, left, status.phase_step)
        self._peers.wake()
        return most

    def begin(self, opening: str) -> str:
        """Sends ``opening`` to the other processes."""
        self._channel.set("opening", opening)
        return opening

    def end(self, error: BaseException | None = None) -> list[PendingCommand]:
        """Promises everything that is left, unless there is an ``error``. Waits for the last events."""
        self.ended = True
        if error is None:
            self._log.promise(END)
            self._peers.wake()
            self._peers.wait_for_flush()
        else:
            self.leave(error)
        return []

    def leave(self, error: BaseException | None = None) -> None:
        """Leaves the run."""
        super().leave(error)
        self._stream.close()

    def _next_record(self) -> str | None:
        """Returns the next record for the log; None if there is none, or the stream has carried all there is."""
        again, self._repeats = self._repeats, False
        record = self._log.take_record(again=again)
        if record is None:
            return None
        if not (again or record.orders or record.promised == END) and self._stream.send(
            Promise(self._records, record.promised, record.phase_step)
        ):
            self._is_streamed = True
            return None
        self._is_streamed = False
        self._records += 1
        return RECORD.dump_json(record).decode()

    def _repeat_streamed(self) -> None:
        """Has the last promise that went through the stream alone written to the log, in case it was lost there."""
        self._stream.accept()
        if self._is_streamed:
            self._repeats = True
            self._peers.wake()

    def _take_ask(self, text: str) -> None:
        message = _MESSAGE.validate_json(text)
        if isinstance(message, Forwarded):
            publish_forwarded(message, self._publish)
        elif message.command is not None:
            pending = PendingCommand(
                message.command, CrossLoopFuture(), ask=message.number, signal=message.signal
            )
            queue = self._plane.queue
            if queue.is_open or self.ended:
                queue.post([pending])
            else:  # the other process has begun the run already
                queue.arrived.append(pending)
                queue.wake()
        elif message.release is not None:
            tag, step = message.release
            kept = self._plane.view.snapshots.get(tag)
            if kept is not None and kept.step == step:  # else another one was taken under that tag
                kept.release()


class Follower(_Several):
    """Another process than process 0: it carries out the orders in the log.

    Args:
        channel: of the run.
        index, processes: of this process, and of all.
        queue: is woken when a record arrives.
        on_lost: as for ``Peers``.
    """

    decides = False

    def __init__(
        self,
        channel: Channel,
        index: int,
        processes: int,
        queue: CommandQueue,
        on_lost: Callable[[PeerLost, Loss], None],
    ) -> None:
        self._log = FollowerLog()
        self._index = index
        self._queue = queue
        self._numbers = count(1)
        self._asked: dict[str, PendingCommand] = {}
        self._unsent: deque[_Ask] = deque()
        self._outbox = Outbox(index, lambda: self._peers.wake())
        self._stream = PromiseReceiver(channel, coordinator_host(), self._take_promise, READ_S)
        peers = Peers(
            channel,
            index,
            processes,
            next_message=self._next_ask,
            take=self._take_record,
            on_lost=on_lost,
            is_last=lambda: self._log.promised == END,
            next_bulk=self._outbox.take,
        )
        super().__init__(channel, peers)

    def forward(self, events: Sequence[Event]) -> None:
        """Sends events that were published here to process 0, in batches. Any thread; never blocks."""
        self._outbox.offer(events)

    def is_open(self, status: RunStatus) -> bool:
        """Returns False."""
        return False

    def record(self, status: RunStatus, order: Order) -> None:
        """Does nothing: process 0 has recorded it."""

    def promise(self, status: RunStatus, until: int) -> int:
        """Returns the first step whose boundary is not promised, or has an order."""
        return status.step + self._log.free(status.moment)

    def steps_of_call(self, status: RunStatus, most: int, left: int) -> int | None:
        """Returns what process 0 has ordered."""
        return self._log.steps_of_call(status.moment, left)

    def ask(self) -> None:
        """Sends the commands that have arrived here to process 0."""
        arrived = self._queue.arrived
        if not arrived:
            return
        for _ in range(len(arrived)):
            pending = arrived.popleft()
            number = f"{self._index}-{next(self._numbers)}"
            self._asked[number] = pending
            self._unsent.append(_Ask(number=number, command=pending.command, signal=pending.signal))
        self._peers.wake()

    def ask_to_release(self, tag: str, step: int) -> None:
        """Asks process 0 to have every process release the snapshot of this tag and step. Any thread."""
        self._unsent.append(_Ask(release=(tag, step)))
        self._peers.wake()

    def is_promised(self, status: RunStatus) -> bool:
        """Returns whether process 0 has promised the present moment; see ``FollowerLog.is_promised``."""
        return self._log.is_promised(status.moment, status.phase_step)

    @property
    def has_order(self) -> bool:
        """Whether an order has arrived that was not carried out."""
        return self._log.has_order

    def early_stop(self, status: RunStatus) -> ApplyCommand | None:
        """Returns the stop by which process 0 ends the run before this process has its first batch, if it does."""
        return self._log.early_stop(status.moment)

    def next_order(self, status: RunStatus, *, at_end: bool = False) -> Order | None:
        """Returns the next order of the log for the present moment; those that reject a command are carried out."""
        moment = END if at_end else status.moment
        while isinstance(order := self._log.take(moment), RejectCommand):
            pending = self.asked(order.ask)
            if pending is not None:
                self._queue.reject(pending, order.reason)
        return order

    def asked(self, number: str | None) -> PendingCommand | None:
        """Returns the command that this process asked for by that number, once."""
        return None if number is None else self._asked.pop(number, None)

    def begin(self, opening: str) -> str:
        """Returns the opening of process 0. Blocks until that begins the run, or ``BEGIN_S`` after a stop here.

        Raises:
            PeerLost: process 0 has failed, or has not begun the run by then. This process has left it.
        """
        end_s = math.inf
        while (found := self._channel.wait_for("opening", READ_S)) is None:
            self.check()
            if self._queue.arrived:  # a stop, since the queue is not open yet
                end_s = min(end_s, monotonic() + BEGIN_S)
            if monotonic() >= end_s:
                error = PeerLost(
                    f"Process 0 has not begun the run {BEGIN_S:.0f} s after a stop of this one", 0
                )
                self.leave(error)
                raise error
        return found

    def end(self, error: BaseException | None = None) -> list[PendingCommand]:
        """Returns the commands that process 0 has not answered."""
        self.ended = True
        if error is not None:
            self.leave(error)
        else:
            self._peers.flush()
        unanswered = list(self._asked.values())
        self._asked.clear()
        return unanswered

    def leave(self, error: BaseException | None = None) -> None:
        """Leaves the run."""
        super().leave(error)
        self._stream.close()

    def _next_ask(self) -> str | None:
        return self._unsent.popleft().model_dump_json() if self._unsent else None

    def _take_record(self, text: str) -> None:
        self._log.add(RECORD.validate_json(text))
        self._queue.wake()

    def _take_promise(self, promise: Promise) -> None:
        self._log.add_promise(promise)
        self._queue.wake()
