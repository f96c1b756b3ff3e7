"""Takes the snapshots that Checkpointers write, at exactly the boundaries that requests and commands name.

A checkpoint of step k is one consistent cut: a ``Barrier`` collects the state of every subscription at its marker,
which travels in the stream behind the last event of step k; the ledger keeps the device state; the record says where
the loop was. None of it waits, unless a Checkpointer with ``when_full="wait"`` is still writing as many as it may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

from eventtrain.bus.barrier import Barrier, Marker
from eventtrain.control.command_queue import RunPart
from eventtrain.control.requests import CheckpointRequest
from eventtrain.control.run_state import BEFORE_END
from eventtrain.device.snapshot import Snapshot
from eventtrain.errors import SnapshotError
from eventtrain.events import CheckpointFailed, CheckpointSkipped, LoopStalled, SnapshotTaken
from eventtrain.events.commands import SaveCheckpoint
from eventtrain.loop.agreement.agreement import Agreement
from eventtrain.loop.agreement.log import BeginEnd, TakeCheckpoint
from eventtrain.loop.backpressure import STALL_REPORT_S
from eventtrain.loop.evaluation import Evaluations
from eventtrain.loop.event_builder import EpochStates
from eventtrain.loop.metric_windows import MetricWindows
from eventtrain.loop.request_schedule import RequestSchedule
from eventtrain.loop.run_recorder import RunRecorder
from eventtrain.loop.run_resources import RunResources
from eventtrain.loop.run_status import RunStatus
from eventtrain.loop.snapshot_ledger import SnapshotLedger
from eventtrain.loop.waiting import WaitingPlace


@dataclass(frozen=True)
class _BeforeEnd:
    """The run before its end: the state besides arrays, the state, the kept snapshots, and ``status.changes``."""

    barrier: Barrier[RunPart]
    snapshot: Snapshot
    kept: Mapping[str, Snapshot]
    changes: int


@dataclass(eq=False, kw_only=True)
class Checkpoints:
    """The checkpoints of one run. Training thread only.

    Attributes:
        requested: commands whose checkpoint is taken when all other commands of the boundary are applied.
        no_step_follows: the state is the last one, so that keeping it takes no memory and needs no room.
    """

    status: RunStatus
    resources: RunResources
    windows: MetricWindows
    ledger: SnapshotLedger
    recorder: RunRecorder
    evaluations: Evaluations
    agreement: Agreement
    requested: list[SaveCheckpoint] = field(default_factory=list[SaveCheckpoint])
    no_step_follows: bool = False

    def __post_init__(self) -> None:
        self._taking = False
        self._before_end: _BeforeEnd | None = None
        self.schedule = RequestSchedule(self.resources.plane.requests.checkpoints, self.status)

    def request(self, command: SaveCheckpoint) -> None:
        """Take one at this boundary: a command asked for it. Raises SnapshotError if nothing would write it."""
        if not self.resources.plane.requests.checkpoints:
            raise SnapshotError(
                "no Checkpointer is subscribed. Add subs.Checkpointer(...) to the subscribers."
            )
        if self.agreement.decides:  # else process 0 orders what is taken for it
            self.requested.append(command)

    def take_due(self, place: WaitingPlace) -> bool:
        """Take what is due at this boundary by step and by clock. Returns whether anything was."""
        if not self.agreement.is_open(self.status):
            return False
        due = self.schedule.take_due()
        self._take([request.owner for request in due], place)
        return bool(due)

    def take_epoch(self, epochs: int, place: WaitingPlace) -> None:
        """Take what is due at the end of the ``epochs``-th epoch."""
        if self.agreement.decides:
            self._take([request.owner for request in self.schedule.take_epoch(epochs)], place)

    def take_requested(self, place: WaitingPlace) -> None:
        """Take what commands asked for at this boundary."""
        self._take([], place)

    def take_final(self, place: WaitingPlace) -> None:
        """Take the state after the last step for the Checkpointers that want it and do not have it yet.

        Not if the run resumed from a checkpoint of this very state: another would only push out an older one.
        """
        self.no_step_follows = True
        self.take_requested(place)
        if not self.recorder.unchanged(self.status):
            requests = self.resources.plane.requests.checkpoints
            owners = [request.owner for request in requests if request.at_end and request.taken != self._now]
            self._take(owners, place)

    @property
    def _now(self) -> tuple[int, int, str | None]:
        """Identifies a state: a checkpoint that does not know that the run has ended is not its last one."""
        return self.status.step, self.status.changes, self.status.ended

    def _take(self, owners: list[str], place: WaitingPlace) -> None:
        """Take one for each of ``owners``, and for the commands that have arrived by then."""
        if self._taking:
            return  # a command that arrived while the call below waits; that call takes it
        self._taking = True
        try:
            for owner in owners:
                self._take_one(None, owner, place)
            while self.requested:
                command = self.requested.pop(0)
                self._take_one(command.tag, self._addressee(command), place)
        finally:
            self._taking = False

    def _addressee(self, command: SaveCheckpoint) -> str | None:
        """A Checkpointer that issues the command means itself; anything else means all of them."""
        name = command.cause.subscriber if command.cause is not None else None
        owners = {request.owner for request in self.resources.plane.requests.checkpoints}
        return name if name in owners else None

    def _take_one(self, tag: str | None, requested_by: str | None, place: WaitingPlace) -> None:
        requests = self.resources.plane.handover.requests_of(requested_by)
        requests = [request for request in requests if self._has_room(request, tag, place)]
        if requests:
            owners, kept = tuple(request.owner for request in requests), self.ledger.share_needed_at_end()
            order = TakeCheckpoint(tag=tag, requested_by=requested_by, owners=owners, kept=tuple(kept))
            self.agreement.record(self.status, order)
            self._take_for(requests, order, kept)

    def take_ordered(self, order: TakeCheckpoint) -> None:
        """Take one that process 0 has taken. There is room: it waits until all processes have written theirs."""
        requests = self.resources.plane.requests.checkpoints
        chosen = [request for request in requests if request.owner in order.owners]
        self._take_for(chosen, order, self._shared(order.kept))

    def _shared(self, tags: Sequence[str]) -> dict[str, Snapshot]:
        """Returns the snapshots that process 0 has shared. Here they are released by its orders alone."""
        return {tag: self.ledger.find(tag).device.share() for tag in tags}

    def _take_for(
        self, requests: list[CheckpointRequest], order: TakeCheckpoint, kept: dict[str, Snapshot]
    ) -> None:
        status, plane, windows = self.status, self.resources.plane, self.windows
        for request in requests:
            request.taken = self._now
        barrier = self._send_barrier()
        taken = SnapshotTaken(
            step=status.step,
            tag=order.tag or f"step-{status.step}",
            purpose="checkpoint",
            epoch=status.epoch,
            requested_by=order.requested_by,
        )
        snapshot, before = self.ledger.take(taken), self._before_end
        if before is not None:
            kept |= {f"{BEFORE_END}/{tag}": snapshot for tag, snapshot in before.kept.items()}
            if before.changes != status.changes:
                kept[BEFORE_END] = before.snapshot
        plane.handover.offer(
            snapshot, kept, barrier, requests, taken, before.barrier if before is not None else None
        )
        windows.emit(taken)

    def _send_barrier(self) -> Barrier[RunPart]:
        """Returns the barrier of this boundary, whose marker is on its way."""
        barrier = Barrier(self.status.step, RunPart())
        try:
            barrier.run.loop = self.recorder.record(
                self.status,
                self.resources.gates,
                evaluation=self.evaluations.state,
                cut=self.evaluations.cut,
            )
            barrier.run.last_batch = self.recorder.data.last_batch(self.status.batch)
            self.resources.plane.queue.open_barrier(barrier)
        except TypeError as error:
            barrier.abandon(str(error))
        if self.status.in_epoch:
            states = self.ledger.compiled.take_states(self.ledger.carry, EpochStates())
            if states is not None:
                self.windows.put(states)
        self.windows.put(Marker(barrier))
        return barrier

    def begin_end(self, order: BeginEnd | None = None) -> None:
        """Keep the run as it is now for the checkpoints behind: from here one with a higher aim continues.

        What follows (the end of an epoch that the aim cut short, the best weights put back) belongs to the end of this
        run, and would not be part of a longer one. Costs a reference to the state.
        """
        if self._before_end is not None or not self.resources.plane.requests.checkpoints:
            return
        if order is None and not self.agreement.decides:
            return  # process 0 orders it
        if order is None:
            kept = self.ledger.share_needed_at_end()
            self.agreement.record(self.status, BeginEnd(kept=tuple(kept)))
        else:
            kept = self._shared(order.kept)
        barrier, status = self._send_barrier(), self.status
        taken = SnapshotTaken(step=status.step, tag=BEFORE_END, purpose="checkpoint", epoch=status.epoch)
        self._before_end = _BeforeEnd(barrier, self.ledger.take(taken), kept, status.changes)

    # --- room -------------------------------------------------------------------------------------------------

    def _has_room(self, request: CheckpointRequest, tag: str | None, place: WaitingPlace) -> bool:
        """Whether the Checkpointer can take one more, perhaps after a wait. Publishes that it cannot."""
        if (
            self.no_step_follows
            or request.in_flight < request.max_in_flight
            or (request.when_full == "wait" and self._wait_for_room(request, place))
        ):
            return True
        step, count = self.status.step, request.in_flight
        if request.when_full == "skip":
            refused = CheckpointSkipped(step=step, tag=tag, requested_by=request.owner, in_flight=count)
        else:
            error = (
                f"{count} checkpoints of {request.owner} are still being written, which is its max_in_flight"
            )
            refused = CheckpointFailed(step=step, path="", tag=tag, requested_by=request.owner, error=error)
        self.windows.emit(refused)
        return False

    def _wait_for_room(self, request: CheckpointRequest, place: WaitingPlace) -> bool:
        """Hold training until one checkpoint less is in flight. Returns False if that takes too long.

        Commands are served meanwhile: the writer may wait for a handler that awaits the result of one.
        """
        began_s = reported_s = monotonic()
        deadline_s, report_s = began_s + request.wait_timeout_s, began_s + STALL_REPORT_S
        self.windows.flush()

        def has_room() -> bool:
            return request.in_flight < request.max_in_flight or self.resources.plane.handover.is_gone(request)

        def has_room_or_is_late() -> bool:
            return has_room() or monotonic() >= min(report_s, deadline_s)

        while True:
            continues = place.wait_for_observers(has_room_or_is_late)
            now_s = monotonic()
            if now_s - began_s >= STALL_REPORT_S:  # while it still waits too, whenever the wait has doubled
                stalled = LoopStalled(
                    step=self.status.step, subscriber=request.owner, waited_s=now_s - reported_s
                )
                self.resources.bus.notices.add((LoopStalled, request.owner), stalled, total="waited_s")
                reported_s, report_s = now_s, 2 * now_s - began_s
            if not continues or has_room():
                return True
            if now_s >= deadline_s:
                return False
