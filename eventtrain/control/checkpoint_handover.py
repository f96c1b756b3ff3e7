"""Hands snapshots for checkpoints from the training thread to the Checkpointers that requested them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from eventtrain.bus.barrier import Barrier, SubscriptionCheckpoint
from eventtrain.bus.core import BusCore
from eventtrain.control.command_queue import CommandQueue, RunPart
from eventtrain.control.requests import CheckpointRequest, RunRequests
from eventtrain.control.run_state import RunRecord, SavedCommand, SavedSubscription
from eventtrain.control.snapshots import KeptSnapshot
from eventtrain.device.snapshot import Snapshot
from eventtrain.device.state import checksum
from eventtrain.errors import SnapshotError
from eventtrain.events import SnapshotTaken


@dataclass(frozen=True)
class ClaimedSnapshot:
    """Snapshot and records that one Checkpointer writes. Call ``finish`` in any case.

    Attributes:
        snapshot: the device state.
        kept: other snapshots that the rest of the run needs, by tag, and those of ``before_end``.
        barrier: what belongs to the checkpoint besides arrays.
        before_end: the same for the run before its end had begun; None if it had not.
    """

    snapshot: KeptSnapshot
    kept: Mapping[str, Snapshot]
    barrier: Barrier[RunPart]
    before_end: Barrier[RunPart] | None
    _handover: CheckpointHandover
    _owner: str
    _offer: _Offer

    def record(self, timeout_s: float) -> RunRecord:
        """Returns everything of the checkpoint that is not an array. Blocks until the barrier is complete.

        Raises:
            SnapshotError: a subscription did not contribute its state within ``timeout_s``.
        """
        record = _record_of(self.barrier, timeout_s)
        if self.before_end is None:
            return record
        return record.model_copy(update={"before_end": _record_of(self.before_end, timeout_s)})

    def hurry(self) -> None:
        """Have ``record`` leave out the subscriptions that have not contributed: the event loop will not run them."""
        self.barrier.hurry(self._handover.last_seq)

    def finish(self) -> None:
        """Report that it was written or given up, so that the next one may be taken. Any thread; once."""
        self.snapshot.release()
        self._handover.finished(self._owner, self._offer)


@dataclass
class _Offer:
    taken: SnapshotTaken
    snapshot: Snapshot
    kept: Mapping[str, Snapshot]
    barrier: Barrier[RunPart]
    before_end: Barrier[RunPart] | None
    owners: list[str]
    """Checkpointers that have not claimed it yet."""
    claims: int = 0
    """Claimed and not finished."""

    def abandon_if_unwanted(self) -> None:
        if not self.owners and not self.claims:
            self.barrier.abandon("it was given up")


class CheckpointHandover:
    """Holds each snapshot until every Checkpointer that requested it has claimed it. Any thread; never blocks."""

    def __init__(self, bus: BusCore, queue: CommandQueue, requests: RunRequests) -> None:
        self._bus = bus
        self._queue = queue
        self._requests = requests
        self._offers: dict[tuple[int, str | None], _Offer] = {}
        self._lock = threading.Lock()

    def requests_of(self, requested_by: str | None) -> list[CheckpointRequest]:
        """Returns the requests that one checkpoint is taken for.

        Args:
            requested_by: a Checkpointer. None, for a command: all that serve commands, or all if none does.
        """
        there = [request for request in self._requests.checkpoints if not self.is_gone(request)]
        if requested_by is not None:
            return [request for request in there if request.owner == requested_by]
        return [request for request in there if request.on_command] or there

    def is_gone(self, request: CheckpointRequest) -> bool:
        """Returns whether the subscription was cancelled or disabled, so that nothing will claim its snapshots."""
        return self._bus.has_ended(request.owner)

    def offer(
        self,
        snapshot: Snapshot,
        kept: Mapping[str, Snapshot],
        barrier: Barrier[RunPart],
        requests: Sequence[CheckpointRequest],
        taken: SnapshotTaken,
        before_end: Barrier[RunPart] | None = None,
    ) -> None:
        """Hold ``snapshot``, announced by ``taken``, until each request's owner has claimed it. Training thread."""
        key = (snapshot.step, taken.requested_by)
        with self._lock:
            self._drop_the_gone()
            for request in requests:
                request.in_flight += 1
            owners = [request.owner for request in requests]
            if key in self._offers:  # requested twice at one boundary: the same state serves both
                owners += self._offers[key].owners
            self._offers[key] = _Offer(taken, snapshot, kept, barrier, before_end, owners)

    def claim(self, owner: str, step: int, requested_by: str | None) -> ClaimedSnapshot | None:
        """Returns what ``SnapshotTaken`` announced; None if nothing is held for ``owner``."""
        with self._lock:
            offer = self._offers.get((step, requested_by))
            if offer is None or owner not in offer.owners:
                return None
            offer.owners.remove(owner)
            offer.claims += 1
            snapshot = offer.snapshot
            if offer.owners:
                with suppress(SnapshotError):  # the device had no room for it; reading it will raise the same
                    snapshot = snapshot.share()
            else:
                del self._offers[step, requested_by]
        return ClaimedSnapshot(
            KeptSnapshot(snapshot), offer.kept, offer.barrier, offer.before_end, self, owner, offer
        )

    def unclaimed(self, owner: str) -> list[SnapshotTaken]:
        """Returns what announces the snapshots that ``owner`` has not claimed yet, oldest first."""
        with self._lock:
            return [offer.taken for offer in self._offers.values() if owner in offer.owners]

    @property
    def last_seq(self) -> int:
        """Number of the last event of the training stream that was delivered."""
        return self._bus.stream.seq

    def finished(self, owner: str, offer: _Offer) -> None:
        """Count one checkpoint of ``owner`` less in flight, and wake the training thread, which may wait for that."""
        with self._lock:
            offer.claims -= 1
            offer.abandon_if_unwanted()
            for request in self._requests.checkpoints:
                if request.owner == owner:
                    request.in_flight -= 1
        self._queue.wake()

    def release_all(self) -> None:
        """Drop what was not claimed: the run is over. Snapshots taken by tag stay until they are released."""
        with self._lock:
            for offer in self._offers.values():
                offer.owners.clear()
                offer.abandon_if_unwanted()
            self._offers.clear()

    def _drop_the_gone(self) -> None:
        gone = {request.owner for request in self._requests.checkpoints if self.is_gone(request)}
        for key, offer in list(self._offers.items()) if gone else ():
            offer.owners = [owner for owner in offer.owners if owner not in gone]
            if not offer.owners:
                offer.abandon_if_unwanted()
                del self._offers[key]


def _record_of(barrier: Barrier[RunPart], timeout_s: float) -> RunRecord:
    shares = barrier.wait(timeout_s)
    loop, stream = barrier.run.loop, barrier.run.stream
    assert loop is not None
    assert stream is not None  # both were recorded before the marker was routed
    batch = barrier.run.last_batch
    found = {
        "orders": tuple(_commands_of(barrier, shares)),
        "batch_crc32": None if batch is None else checksum(batch()),
    }
    return RunRecord(
        loop=loop.model_copy(update=found),
        stream=stream.model_copy(update={"seq": barrier.seq}),
        shares={name: SavedSubscription.of(share) for name, share in shares.items()},
    )


def _commands_of(
    barrier: Barrier[RunPart], shares: Mapping[str, SubscriptionCheckpoint]
) -> Iterator[SavedCommand]:
    """The commands of a checkpoint: not due, and caused before the marker by an event that is not redelivered."""
    redelivered = {
        (name, event.seq)
        for name, share in shares.items()
        for event, decided_on in zip(share.unhandled, share.decided_on, strict=True)
        if decided_on  # other events are numbered in another sequence
    }
    for pending in barrier.run.commands:
        cause, subscription = pending.cause, pending.subscription
        if pending.command.due is None or cause is None or subscription is None or cause.seq > barrier.seq:
            continue
        if (subscription.name, cause.seq) not in redelivered:
            yield SavedCommand(
                command=pending.command,
                cause_step=cause.step,
                cause_seq=cause.seq,
                subscriber=subscription.name,
                issue=pending.issue,
            )
