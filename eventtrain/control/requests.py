"""``RunRequests``: the control side of one trainer. Makes handlers' controls; keeps what subscribers planned."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eventtrain.bus.barrier import Barrier
from eventtrain.bus.core import BusCore
from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.control.command_queue import CommandQueue, RunPart
from eventtrain.control.control import Control
from eventtrain.control.snapshots import KeptSnapshot
from eventtrain.device.snapshot import Snapshot
from eventtrain.errors import SnapshotError
from eventtrain.events import Event

WhenFull = Literal["skip", "wait", "fail"]
"""What becomes of a checkpoint while as many as allowed are still being written."""


@dataclass
class BoundaryRequest:
    """When one subscriber wants something done at exact boundaries: every so many steps, epochs or seconds.

    ``max_in_flight`` and ``when_full`` concern checkpoints only.
    """

    owner: str
    every: int | None = None
    every_epochs: int | None = None
    every_s: float | None = None
    next_s: float = 0.0
    at_start: bool = False
    at_end: bool = False
    max_in_flight: int = 2
    when_full: WhenFull = "wait"
    wait_timeout_s: float = 600.0
    on_command: bool = True
    """Whether it also serves commands without an addressee."""
    in_flight: int = 0
    kept: tuple[int, int, str | None] | None = None
    """Which state was kept for it last: step, how often commands had changed it by then, and why the run ended."""


@dataclass(frozen=True)
class TraceRequest:
    """Which steps one subscriber wants traced by JAX's profiler: from the first to the last of each range.

    Commands that ask for a trace go by the first plan of a run.
    """

    owner: str
    folder: Path
    ranges: tuple[tuple[int, int], ...]
    python: bool


@dataclass(frozen=True)
class RestoreAtEnd:
    """A kept snapshot to be put back when the run has ended, where ``where()`` then says so."""

    tag: str
    part: Literal["all", "params"]
    where: Callable[[], bool]


@dataclass(frozen=True)
class ClaimedSnapshot:
    """What a Checkpointer writes; ``finish`` it in any case.

    Attributes:
        snapshot: the device state.
        kept: other snapshots that the rest of the run needs, by tag.
        cut: what belongs to it from the host.
    """

    snapshot: KeptSnapshot
    kept: Mapping[str, Snapshot]
    cut: Barrier[RunPart]
    _room: RunRequests
    _owner: str
    _offer: _Offer

    def finish(self) -> None:
        """It is written, or given up: the next one may be taken. Any thread; once."""
        self.snapshot.release()
        self._room.finished(self._owner, self._offer)


@dataclass
class _Offer:
    snapshot: Snapshot
    kept: Mapping[str, Snapshot]
    cut: Barrier[RunPart]
    owners: list[str]
    claims: int = 0
    """Claimed and not finished."""

    def give_up_if_alone(self) -> None:
        """Nobody is to give their share any more, once nobody writes it."""
        if not self.owners and not self.claims:
            self.cut.abandon("it was given up")


class RunRequests:
    """What the subscribers of one trainer ask of its runs, besides commands. Any thread."""

    def __init__(self, bus: BusCore) -> None:
        self.inbox = CommandQueue(bus)
        self.checkpoints: list[BoundaryRequest] = []
        """When Checkpointers want the state kept."""
        self.evaluations: list[BoundaryRequest] = []
        """When evaluations are wanted, instead of at the end of each epoch."""
        self.final_restores: list[RestoreAtEnd] = []
        """What is to be put back when the run has ended."""
        self.traces: list[TraceRequest] = []
        """What is to be traced by the profiler, and where traces go."""
        self._offers: dict[tuple[int, str | None], _Offer] = {}
        self._lock = threading.Lock()

    def clear_plans(self) -> None:
        """A run begins: its subscribers make their plans anew."""
        self.checkpoints.clear()
        self.evaluations.clear()
        self.final_restores.clear()
        self.traces.clear()

    def begin_transaction(self, subscription: SubscriptionCore, event: Event) -> Control:
        """The control for one handler call."""
        return Control(self.inbox, event, subscription, subscription.filter.lag_for(type(event)))

    # --- checkpoints ----------------------------------------------------------------------------------------

    def offer(
        self,
        snapshot: Snapshot,
        kept: Mapping[str, Snapshot],
        cut: Barrier[RunPart],
        plans: Sequence[BoundaryRequest],
        requested_by: str | None,
    ) -> None:
        """Hold a snapshot until everyone of ``plans`` has claimed it."""
        key = (snapshot.step, requested_by)
        with self._lock:
            self._forget_the_gone()
            for plan in plans:
                plan.in_flight += 1
            owners = [plan.owner for plan in plans]
            if key in self._offers:  # asked for twice at one boundary: the same state serves both
                owners += self._offers[key].owners
            self._offers[key] = _Offer(snapshot, kept, cut, owners)

    def claim(self, owner: str, step: int, requested_by: str | None) -> ClaimedSnapshot | None:
        """A Checkpointer takes what ``SnapshotTaken`` announced; None where nothing is held for it."""
        with self._lock:
            offer = self._offers.get((step, requested_by))
            if offer is None or owner not in offer.owners:
                return None
            offer.owners.remove(owner)
            offer.claims += 1
            snapshot = offer.snapshot
            if offer.owners:
                with suppress(SnapshotError):  # it was refused, which whoever looks at it sees
                    snapshot = snapshot.share()
            else:
                del self._offers[step, requested_by]
        return ClaimedSnapshot(KeptSnapshot(snapshot), offer.kept, offer.cut, self, owner, offer)

    def finished(self, owner: str, offer: _Offer) -> None:
        """One checkpoint of ``owner`` is no longer in flight."""
        with self._lock:
            offer.claims -= 1
            offer.give_up_if_alone()
            for plan in self.checkpoints:
                if plan.owner == owner:
                    plan.in_flight -= 1
        self.inbox.ring()

    def release_all(self) -> None:
        """The run is over: drop what no Checkpointer claimed. Snapshots taken by tag stay until released."""
        with self._lock:
            for offer in self._offers.values():
                offer.owners.clear()
                offer.give_up_if_alone()
            self._offers.clear()

    def is_gone(self, plan: BoundaryRequest) -> bool:
        """Whether its subscription was cancelled or disabled, so that nobody takes what it planned."""
        return self.inbox.bus.has_ended(plan.owner)

    def _forget_the_gone(self) -> None:
        """What only they would have claimed is let go. Under the lock."""
        gone = {plan.owner for plan in self.checkpoints if self.is_gone(plan)}
        for key, offer in list(self._offers.items()) if gone else ():
            offer.owners = [owner for owner in offer.owners if owner not in gone]
            if not offer.owners:
                offer.give_up_if_alone()
                del self._offers[key]

    def plans_of(self, requested_by: str | None) -> list[BoundaryRequest]:
        """Of the subscriber who asked; where a command did, of all who serve commands, or of all if none does."""
        if requested_by is not None:
            return [
                plan for plan in self.checkpoints if plan.owner == requested_by and not self.is_gone(plan)
            ]
        there = [plan for plan in self.checkpoints if not self.is_gone(plan)]
        return [plan for plan in there if plan.on_command] or there
