"""Keeping the state of a boundary for Checkpointers, with everything that belongs to it. Training thread only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import monotonic

from eventtrain.bus.barrier import Barrier, Marker
from eventtrain.bus.core import BusCore
from eventtrain.control.command_queue import RunPart
from eventtrain.control.requests import BoundaryRequest, RunRequests
from eventtrain.events import CheckpointFailed, CheckpointSkipped, Event, LoopStalled
from eventtrain.events.commands import SaveCheckpoint
from eventtrain.events.run_records import LoopRecord
from eventtrain.loop.backpressure import STALL_REPORT_S
from eventtrain.loop.command_executor import CommandExecutor
from eventtrain.loop.metric_windows import MetricWindows, Position
from eventtrain.loop.request_schedule import RequestSchedule


class Checkpoints:
    """Takes cuts where plans and commands ask for them.

    Args:
        room: holds the plans and what was taken.
        effects: keeps the device state.
        windows: carry the marker, behind everything that was said up to the boundary.
        position: of the run.
        bus: which hears of waits.
        wait: the loop's waiting place; False where the run has to end.
        describe: says where the run is; raises TypeError where a checkpoint cannot hold it.
    """

    def __init__(
        self,
        room: RunRequests,
        effects: CommandExecutor,
        windows: MetricWindows,
        position: Position,
        bus: BusCore,
        wait: Callable[[Callable[[], object]], bool],
        describe: Callable[[], LoopRecord],
    ) -> None:
        self.schedule = RequestSchedule(
            room.checkpoints, position, lambda plan: self._take([(None, plan.owner)])
        )
        self._room = room
        self._effects = effects
        self._windows = windows
        self._position = position
        self._bus = bus
        self._wait = wait
        self._describe = describe
        self._taking = False
        self.no_step_follows = False
        """The state is the last one: keeping it takes no memory, so that it needs no room."""

    def take_asked(self) -> None:
        """Those that commands asked for at this boundary."""
        self._take([])

    def take_final(self, *, unchanged: bool) -> None:
        """After the last step, for those who want the state as it is then and do not have it yet.

        ``unchanged``: the run resumed from a checkpoint of this very state, so that another would only push out an
        older one.
        """
        self.no_step_follows = True
        self.take_asked()
        if unchanged:
            return
        now = self._now
        owners = [plan.owner for plan in self._room.checkpoints if plan.at_end and plan.kept != now]
        self._take([(None, owner) for owner in owners])

    @property
    def _now(self) -> tuple[int, int, str | None]:
        """Tells two states apart: a cut that does not know that the run has ended is not its last one."""
        return self._position.step, self._effects.changes, self._effects.ended

    def _take(self, wanted: Iterable[tuple[str | None, str | None]]) -> None:
        """Keep the state for each tag and subscriber ``wanted``, and for the commands that have come by then."""
        if self._taking:
            return  # a command that came while the one below waits, and is looked at there
        self._taking = True
        try:
            for tag, owner in wanted:
                self._keep(tag, owner)
            while self._effects.checkpoints_asked:
                command = self._effects.checkpoints_asked.pop(0)
                self._keep(command.tag, self._asked_by(command))
        finally:
            self._taking = False

    def _asked_by(self, command: SaveCheckpoint) -> str | None:
        """A Checkpointer that asks means itself; anybody else means all of them."""
        name = command.cause.subscriber if command.cause is not None else None
        return name if any(plan.owner == name for plan in self._room.checkpoints) else None

    def _keep(self, tag: str | None, requested_by: str | None) -> None:
        position, room, windows = self._position, self._room, self._windows
        plans = [plan for plan in room.plans_of(requested_by) if self._has_room(plan, tag)]
        if not plans:
            return
        cut = Barrier(position.step, RunPart())
        try:
            cut.run.loop = self._describe()
            room.inbox.open_cut(cut)
        except TypeError as error:
            cut.abandon(str(error))
        for plan in plans:
            plan.kept = self._now
        windows.put(Marker(cut))
        snapshot, taken = self._effects.take_checkpoint(position.step, position.epoch, tag, requested_by)
        room.offer(snapshot, self._effects.kept_for_the_end(), cut, plans, requested_by)
        windows.emit(taken)

    def _has_room(self, plan: BoundaryRequest, tag: str | None) -> bool:
        """Whether its Checkpointer can take one more, perhaps after a wait; where not, that is said."""
        has_room = (
            self.no_step_follows
            or plan.in_flight < plan.max_in_flight
            or (plan.when_full == "wait" and self._wait_for_room(plan))
        )
        if not has_room:
            self._windows.emit(self._refused(plan, tag))
        return has_room

    def _wait_for_room(self, plan: BoundaryRequest) -> bool:
        """Hold training until one less is being written; False where that takes too long.

        Commands are served meanwhile: a handler that awaits one may be what the writer waits for.
        """
        began_s = monotonic()
        deadline_s = began_s + plan.wait_timeout_s
        self._windows.flush()

        def has_room() -> bool:
            return plan.in_flight < plan.max_in_flight or self._room.is_gone(plan)

        going_on = self._wait(lambda: has_room() or monotonic() >= deadline_s)
        waited_s = monotonic() - began_s
        if waited_s >= STALL_REPORT_S:
            self._bus.notify(LoopStalled(step=self._position.step, subscriber=plan.owner, waited_s=waited_s))
        return not going_on or has_room()

    def _refused(self, plan: BoundaryRequest, tag: str | None) -> Event:
        step, count = self._position.step, plan.in_flight
        if plan.when_full == "skip":
            return CheckpointSkipped(step=step, tag=tag, requested_by=plan.owner, in_flight=count)
        reason = f"{count} checkpoints of {plan.owner} are still being written, and no more may be at a time"
        return CheckpointFailed(step=step, path="", tag=tag, requested_by=plan.owner, error=reason)
