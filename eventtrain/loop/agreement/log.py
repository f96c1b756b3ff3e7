"""The log of the decisions of one run: process 0 writes it, each other process follows it. Pure: no thread, no JAX.

The course of a run is divided into moments, which are the same on every process, since each process dispatches the
same steps and evaluations. Process 0 adds an order for each decision that it carries out, with the moment at which it
did, and *promises* moments: no order will be added at a promised moment or an earlier one. Another process carries out
the orders of a moment when it is there, and passes the moment once that is promised. It reads ahead: while nothing is
due, promises reach many steps further than process 0 is.

Laws, each with a test:

1. Process 0 decides only at moments that are not promised. A decision promises those before its own.
2. Promises only rise, and a record holds every order that was added before its promise was given.
3. A moment is counted where something is dispatched or published, never where a boundary happens to be looked at.
4. A process passes a moment only when that is promised, and has then carried out exactly the orders up to it. Where it
   reads ahead, it looks again at the next order, also if the promise reaches further.
5. One call may run several steps, the same ones on each process: those of a group of batches, which all divide alike,
   up to its end or to the next order. Process 0 adds an order for an earlier end before it dispatches the call.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, TypeAdapter

from eventtrain.errors import ProcessesDiverged
from eventtrain.events.commands import AnyCommand
from eventtrain.events.models import Frozen


class Moment(NamedTuple):
    """A place in the course of a run where decisions can take effect.

    Attributes:
        phase: counts what the loop does besides steps: an epoch or an evaluation that begins or ends.
        count: steps, or batches of an evaluation, that were dispatched since the phase began.
    """

    phase: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # tuple.count, which nothing here uses


NOTHING = Moment(-1, 0)
END = Moment(1 << 62, 0)
ENDLESS = 1 << 62


class ApplyCommand(Frozen):
    """Apply ``command``, which process 0 has applied."""

    kind: Literal["apply_command"] = "apply_command"
    command: AnyCommand
    ask: str | None = None
    """The number of the request by which another process asked for it; None if process 0 issued it."""
    signal: int | None = None
    """The signal behind a ``Stop``, which one of the processes has received; None if there is none."""


class RejectCommand(Frozen):
    """Reject the command that a process asked for by the request ``ask``."""

    kind: Literal["reject_command"] = "reject_command"
    ask: str
    reason: str


class TakeCheckpoint(Frozen):
    """Take the snapshot of a checkpoint, for the Checkpointers named ``owners``.

    It contains the other snapshots with the tags ``kept``.
    """

    kind: Literal["take_checkpoint"] = "take_checkpoint"
    tag: str | None
    requested_by: str | None
    owners: tuple[str, ...]
    kept: tuple[str, ...] = ()


class MakeSample(Frozen):
    """Dispatch the function of the sample ``name``, whose outputs process 0 reads."""

    kind: Literal["make_sample"] = "make_sample"
    name: str


class RunEvaluation(Frozen):
    """Evaluate."""

    kind: Literal["run_evaluation"] = "run_evaluation"
    deterministic: bool


class AnnounceStep(Frozen):
    """Publish StepStarted of the next step now, since deciders wait for it; not ``active``: they have gone."""

    kind: Literal["announce_step"] = "announce_step"
    active: bool = True


class EndGroup(Frozen):
    """End a call of several steps here, before the end of its group of batches."""

    kind: Literal["end_group"] = "end_group"


class BeginEnd(Frozen):
    """Keep the run as it is before its end, with the other snapshots ``kept``."""

    kind: Literal["begin_end"] = "begin_end"
    kept: tuple[str, ...] = ()


class RestoreSnapshot(Frozen):
    """Restore a snapshot at the end of the run."""

    kind: Literal["restore_snapshot"] = "restore_snapshot"
    tag: str
    part: Literal["all", "params"]


class ReleaseSnapshots(Frozen):
    """Release snapshots that were taken by tag."""

    kind: Literal["release_snapshots"] = "release_snapshots"
    tags: tuple[str, ...]


class EndRun(Frozen):
    """End the run, with the ``RunCompleted`` that process 0 publishes."""

    kind: Literal["end_run"] = "end_run"
    deterministic: bool


Order = Annotated[
    ApplyCommand
    | RejectCommand
    | TakeCheckpoint
    | MakeSample
    | RunEvaluation
    | AnnounceStep
    | EndGroup
    | BeginEnd
    | RestoreSnapshot
    | ReleaseSnapshots
    | EndRun,
    Field(discriminator="kind"),
]


class DatedOrder(Frozen):
    """An order, and the moment at which it takes effect."""

    moment: Moment
    order: Order


class Record(Frozen):
    """A part of the log: orders, and how far it is complete.

    Attributes:
        orders: in the order in which they take effect.
        promised: no later record has an order at this moment or before it.
        phase_step: steps completed when the phase of ``promised`` began. Other processes compare it with theirs.
    """

    orders: tuple[DatedOrder, ...] = ()
    promised: Moment = NOTHING
    phase_step: int = 0


RECORD: TypeAdapter[Record] = TypeAdapter(Record)


class Promise(NamedTuple):
    """A promise on its way beside the records.

    Attributes:
        after: how many records there were before it: they have every order at ``moment`` or before it.
        moment, phase_step: ``promised`` and ``phase_step`` of a record.
    """

    after: int
    moment: Moment
    phase_step: int


class _Log:
    """Orders, and the last moment that was promised."""

    def __init__(self) -> None:
        self._orders: deque[DatedOrder] = deque()
        self._promise: tuple[Moment, int] = (NOTHING, 0)

    @property
    def promised(self) -> Moment:
        """The last moment that was promised, as far as is known here."""
        return self._promise[0]

    def promise(self, moment: Moment, phase_step: int = 0) -> None:
        """Promises that no order will be added at ``moment`` or before it. Does nothing if that is promised."""
        if moment > self.promised:
            self._promise = moment, phase_step


class LeaderLog(_Log):
    """Process 0's end of the log. The training thread adds and promises; another thread takes the records."""

    def __init__(self) -> None:
        super().__init__()
        self._taken = NOTHING

    def is_open(self, moment: Moment) -> bool:
        """Returns whether an order may be added at ``moment``."""
        return moment > self.promised

    def add(self, moment: Moment, order: Order, phase_step: int = 0) -> None:
        """Adds an order at ``moment``, which must be open, and promises those before it.

        So the others come to it although process 0 waits for them there, in a computation that the order began.
        """
        if not self.is_open(moment):
            raise ValueError(f"{order.kind} at {moment} comes after the promise of {self.promised}")
        self._orders.append(DatedOrder(moment=moment, order=order))
        self.promise(Moment(moment.phase, moment.count - 1), phase_step)

    def promise_call(self, moment: Moment, steps: int, left: int, phase_step: int = 0) -> None:
        """Promises the moments of a call of ``steps`` steps at ``moment``, of ``left`` in its group of batches.

        Adds the order by which it ends before its group does, if it does.
        """
        if steps < left:
            self.add(Moment(moment.phase, moment.count + steps), EndGroup(), phase_step)
        self.promise(Moment(moment.phase, moment.count + steps - 1), phase_step)

    def take_record(self, *, again: bool = False) -> Record | None:
        """Returns what was added and promised since the last call; None if nothing was, unless ``again``.

        The promise is read before the orders: every order that was added before it is in this record, or in an
        earlier one.
        """
        promised, phase_step = self._promise
        orders: list[DatedOrder] = []
        while self._orders:
            orders.append(self._orders.popleft())
        if not orders and promised == self._taken and not again:
            return None
        self._taken = promised
        return Record(orders=tuple(orders), promised=promised, phase_step=phase_step)


class FollowerLog(_Log):
    """Another process's end of the log. The training thread takes the orders; others add records and promises."""

    def __init__(self) -> None:
        super().__init__()
        self._adding = threading.Lock()
        self._added = 0
        self._early: Promise | None = None

    def add(self, record: Record) -> None:
        """Adds the next record: its orders before its promise, which the training thread reads the other way round."""
        with self._adding:
            self._orders.extend(record.orders)
            self._added += 1
            self.promise(record.promised, record.phase_step)
            if self._early is not None and self._early.after <= self._added:
                self.promise(self._early.moment, self._early.phase_step)
                self._early = None

    def add_promise(self, promise: Promise) -> None:
        """Adds a promise that came beside the records, perhaps earlier than those before it, or later."""
        with self._adding:
            if promise.after <= self._added:
                self.promise(promise.moment, promise.phase_step)
            else:
                self._early = promise

    @property
    def has_order(self) -> bool:
        """Whether an order has arrived that was not taken."""
        return bool(self._orders)

    def early_stop(self, moment: Moment) -> ApplyCommand | None:
        """Returns the stop that ends the run at ``moment``, its first one, if it has arrived; it stays in the log.

        None if something is ordered before it that a process cannot do before its first batch, or leave out.
        """
        for dated in list(self._orders):
            order = dated.order
            if dated.moment > moment or not isinstance(order, (ApplyCommand, RejectCommand)):
                return None
            if isinstance(order, ApplyCommand) and order.command.kind == "stop":
                return order
        return None

    def take(self, moment: Moment) -> Order | None:
        """Returns the next order that takes effect at ``moment``; None if there is none (yet). At ``END``, any order.

        Raises:
            ProcessesDiverged: it should have been carried out before.
        """
        if not self._orders or self._orders[0].moment > moment:
            return None
        dated = self._orders.popleft()
        if dated.moment < moment != END:
            raise ProcessesDiverged(
                f"This process is at {moment}, and process 0 has carried out {dated.order.kind} at {dated.moment}. All "
                "processes must run the same program on data of the same length."
            )
        return dated.order

    def free(self, moment: Moment) -> int:
        """Returns how often this process may dispatch at ``moment`` before it has to ask for orders again; at least 1.

        ``moment`` is promised, and its orders were taken. In a phase that process 0 has ended, as often as there are
        batches, or up to the next order: its orders are all here.
        """
        promised = self.promised  # before the orders: those that come later are behind it
        free = ENDLESS if promised.phase > moment.phase else promised.count - moment.count + 1
        if self._orders and (order := self._orders[0].moment).phase == moment.phase:
            free = min(free, order.count - moment.count)
        return max(1, free)

    def steps_of_call(self, moment: Moment, left: int) -> int | None:
        """Returns how many steps the call at ``moment`` runs, of ``left`` in its group; None if that is not known yet.

        ``moment`` is promised, and its orders were taken.
        """
        promised = self.promised  # before the orders: those that come later are behind it
        if self._orders and (order := self._orders[0].moment) < Moment(moment.phase, moment.count + left):
            return max(1, order.count - moment.count)
        return left if promised >= Moment(moment.phase, moment.count + left - 1) else None

    def is_promised(self, moment: Moment, phase_step: int) -> bool:
        """Returns whether no further order can come at ``moment``. To be asked before ``take`` returns None.

        Raises:
            ProcessesDiverged: process 0 was in this phase after another number of steps.
        """
        promised, leader_step = self._promise
        if promised.phase == moment.phase and phase_step != leader_step:
            raise ProcessesDiverged(
                f"Phase {moment.phase} of the run began after {phase_step} steps here and after {leader_step} on "
                "process 0. Each process must be given the same number of batches in each epoch."
            )
        return promised >= moment
