"""What each command does to a run, between two steps. Training thread only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import jax

from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.control.command_queue import PendingCommand
from eventtrain.control.requests import RunRequests
from eventtrain.control.snapshots import KeptSnapshot
from eventtrain.device.compiled_step import Carry
from eventtrain.device.hyperparams import Hyperparam, labels, read, resolve, write
from eventtrain.device.snapshot import Snapshot
from eventtrain.device.state import Skeleton
from eventtrain.errors import ConfigurationError, EventTrainError, SnapshotError
from eventtrain.events import (
    TO_BE_CONTINUED,
    CheckpointFailed,
    CheckpointRestored,
    CommandApplied,
    CommandConflict,
    Event,
    HyperparamChanged,
    SnapshotTaken,
)
from eventtrain.events.commands import (
    Evaluate,
    Pause,
    Profile,
    Restore,
    Resume,
    SaveCheckpoint,
    ScaleHyperparam,
    SetHyperparam,
    Stop,
    TakeSnapshot,
)
from eventtrain.events.models import Number


class CommandExecutor:
    """Carries commands out on the state in ``carry`` and says so through ``emit``.

    Args:
        carry: the state between two steps; its leaves are replaced, never changed in place.
        skeleton: of the state.
        hyperparams: all that the optimiser state holds.
        params: indices of the leaves that the params lens covers.
        room: the trainer's control side.
        emit: publishes an event in the training stream.
        can_evaluate: whether there is anything to evaluate on.
        to_host: where a snapshot's leaves go instead of staying on the device (``snapshot="host"``).
        extension_paths: names of the step extensions' leaves.
    """

    def __init__(
        self,
        carry: Carry,
        skeleton: Skeleton,
        hyperparams: Sequence[Hyperparam],
        params: Sequence[int],
        room: RunRequests,
        emit: Callable[[Event], None],
        can_evaluate: Callable[[], bool],
        to_host: Callable[[list[jax.Array]], list[jax.Array]] | None = None,
        extension_paths: Sequence[str] = (),
    ) -> None:
        self._carry = carry
        self._skeleton = skeleton
        self._hyperparams = list(hyperparams)
        self._params = list(params)
        self._room = room
        self._inbox = room.inbox
        self._emit = emit
        self._can_evaluate = can_evaluate
        self._to_host = to_host
        self._extension_paths = tuple(extension_paths)
        self._labels = labels(hyperparams)
        self._values = {h.path: read(carry.leaves[h.leaf_index]) for h in hyperparams}
        self._setters: dict[str, tuple[int, SubscriptionCore]] = {}
        self._unborn: list[tuple[Snapshot, SnapshotTaken]] = []
        self._owned = (
            True  # the state is also somebody else's: its owner's at first, a restored snapshot's later
        )
        self.paused = False
        self.stop_reason: str | None = None
        self.ended: str | None = None
        """The same, where it is not to be resumed with the same aim."""
        self.evaluations_asked = 0
        self.checkpoints_asked: list[SaveCheckpoint] = []
        """Checkpoints to be taken when all of this boundary's other commands are carried out."""
        self.traces_asked: list[int] = []
        """How many steps to trace from this boundary on, for each command that asked."""
        self.deterministic = True
        self.changes = 0
        """How often something else than a step has changed the state."""
        self._show()

    @property
    def pinned(self) -> bool:
        """Whether someone else refers to the state, so that the next step must not overwrite it."""
        return self._owned or bool(self._unborn)

    @property
    def cut_short(self) -> bool:
        """Whether the run has to end for a reason from outside, so that another may go on where it was."""
        return self.stop_reason in TO_BE_CONTINUED

    @property
    def watched(self) -> dict[int, str]:
        """Leaf index -> label, of the hyperparameters that follow a schedule."""
        return {h.leaf_index: self._labels[h.path] for h in self._hyperparams if h.scheduled}

    # --- orders -----------------------------------------------------------------------------------------

    def carry_out(self, order: PendingCommand, step: int, epoch: int) -> None:
        """Do what ``order`` says at boundary ``step``, or refuse it with the reason. Never raises for a bad command."""
        command = order.command
        events: list[Event] = []
        try:
            match command:
                case SetHyperparam() | ScaleHyperparam():
                    events = self._change_hyperparam(command, order, step)
                case Stop():
                    self._stop(command)
                case SaveCheckpoint():
                    if not self._room.checkpoints:
                        raise SnapshotError(
                            "no Checkpointer is subscribed, so nobody would write it. Add subs.Checkpointer(...)."
                        )
                    self.checkpoints_asked.append(command)
                case TakeSnapshot():
                    taken = SnapshotTaken(step=step, tag=command.tag, epoch=epoch)
                    self._inbox.snapshots[command.tag] = KeptSnapshot(
                        self._snapshot(step, command.tag, taken)
                    )
                    events = [taken]
                case Restore():
                    events = [self._restore(command, step)]
                case Pause():
                    self.paused = True
                case Resume():
                    self.paused = False
                case Evaluate():
                    if not self._can_evaluate():
                        raise ConfigurationError(
                            "there is nothing to evaluate on. Give the run an eval_fn and eval_data."
                        )
                    self.evaluations_asked += 1
                case Profile():
                    if not self._room.traces:
                        raise ConfigurationError(
                            "no Profiler is subscribed, so no trace has a place. Add subs.Profiler()."
                        )
                    self.traces_asked.append(command.steps)
        except (EventTrainError, OverflowError) as error:
            self._inbox.reject(order, f"at step {step}: {error}", self._emit)
            return
        if (
            command.due is None
            and isinstance(command, (SetHyperparam, ScaleHyperparam, Stop, Restore, Evaluate))
            and not (
                isinstance(command, Stop) and self.cut_short
            )  # a run that goes on from here repeats exactly
        ):
            self.deterministic = False
        applied = CommandApplied(step=step, command=command)
        self._emit(applied)
        for event in events:
            self._emit(event)
        order.answer.set_result(applied)

    def _stop(self, command: Stop) -> None:
        if self.stop_reason is None:
            self.stop_reason = command.reason or "stopped"
            self.ended = self.stop_reason if command.final and not self.cut_short else None

    # --- hyperparameters --------------------------------------------------------------------------------

    def _change_hyperparam(
        self, command: SetHyperparam | ScaleHyperparam, order: PendingCommand, step: int
    ) -> list[Event]:
        target = resolve(self._hyperparams, command.name, command.path)
        old = self._values[target.path]
        value: Number
        if isinstance(command, SetHyperparam):
            value = command.value
        else:
            value = old * command.factor
            # A limit stops the scaling; a value that is beyond it already is not drawn to it.
            if command.minimum is not None:
                value = max(value, min(old, command.minimum))
            if command.maximum is not None:
                value = min(value, max(old, command.maximum))
            if target.dtype.kind in "iu":
                value = round(value)
        leaves = list(self._carry.leaves)
        new_leaf = write(leaves[target.leaf_index], value)
        leaves[target.leaf_index] = new_leaf
        self._carry.leaves = leaves
        self.changes += 1
        # A leaf just written from the host: reading it back waits for no step.
        new = self._values[target.path] = read(new_leaf)
        self._show()
        conflict = self._conflict(target, order, step)
        if new == old:
            return conflict
        changed = HyperparamChanged(
            step=step,
            name=target.name,
            path=target.path,
            old=old,
            new=new,
            reason=command.reason,
            cause=command.cause,
        )
        return [changed, *conflict]

    def _conflict(self, target: Hyperparam, order: PendingCommand, step: int) -> list[Event]:
        if order.cause is None or order.subscription is None:
            self._setters.pop(target.path, None)
            return []
        before = self._setters.get(target.path)
        self._setters[target.path] = (step, order.subscription)
        if before is None or before[0] != step or before[1] is order.subscription:
            return []
        return [
            CommandConflict(
                step=step,
                name=target.name,
                path=target.path,
                subscribers=(before[1].name, order.subscription.name),
                cause_step=order.cause.step,
            )
        ]

    def _show(self) -> None:
        self._inbox.show({self._labels[path]: value for path, value in self._values.items()})

    # --- snapshots --------------------------------------------------------------------------------------

    def take_checkpoint(
        self, step: int, epoch: int, tag: str | None, requested_by: str | None
    ) -> tuple[Snapshot, SnapshotTaken]:
        """Keep the state of this boundary for Checkpointers, with the event that tells them."""
        taken = SnapshotTaken(
            step=step, tag=tag or f"step-{step}", purpose="checkpoint", epoch=epoch, requested_by=requested_by
        )
        return self._snapshot(step, taken.tag, taken), taken

    def kept_for_the_end(self) -> dict[str, Snapshot]:
        """The snapshots that the end of the run needs, by tag."""
        kept = self._inbox.kept()
        tags = {plan.tag for plan in self._room.final_restores if plan.tag in kept}
        return {tag: kept[tag].device.share() for tag in tags}

    def _snapshot(self, step: int, tag: str, taken: SnapshotTaken) -> Snapshot:
        leaves, extensions = self._carry.leaves, self._carry.ext_leaves
        if self._to_host is not None:
            leaves, extensions = self._to_host(leaves), self._to_host(extensions)
        snapshot = Snapshot(
            step,
            leaves,
            self._skeleton,
            tag=tag,
            extensions=extensions,
            extension_paths=self._extension_paths,
        )
        if self._to_host is None:
            self._unborn.append((snapshot, taken))
        return snapshot

    def survived(self) -> bool:
        """The step after the boundary left the state alone; returns whether that saved any snapshot."""
        saved = bool(self._unborn)
        self._owned = False
        self._unborn.clear()
        return saved

    def refuse_snapshots(self, error: SnapshotError) -> bool:
        """The device has no room for a second state: drop the snapshots of this boundary, by name.

        Returns whether training can go on; it cannot where the state itself belongs to someone else.
        """
        for snapshot, taken in self._unborn:
            snapshot.release()
            failed = CheckpointFailed(
                step=taken.step, path="", tag=taken.tag, error=str(error), requested_by=taken.requested_by
            )
            self._emit(failed)
        self._unborn.clear()
        return not self._owned

    def restore_finally(self, step: int) -> None:
        """The run has ended by itself: put back what subscribers planned to have at its end, and let go of it."""
        for plan in sorted(self._room.final_restores, key=lambda plan: plan.part == "params"):
            kept = self._inbox.kept().get(plan.tag)
            if kept is not None:
                if plan.where():
                    self._emit(self._put_back(kept, plan.part, step))
                kept.release()

    def _restore(self, command: Restore, step: int) -> Event:
        snapshots = self._inbox.kept()
        kept = snapshots.get(command.target)
        if kept is None:
            kept = next((s for s in snapshots.values() if s.step == command.target), None)
        if kept is None:
            known = ", ".join(repr(tag) for tag in snapshots) or "none"
            raise SnapshotError(
                f"no snapshot {command.target!r} is kept; those kept: {known}. Take one with snapshot(tag)."
            )
        return self._put_back(kept, command.part, step)

    def _put_back(self, kept: KeptSnapshot, part: Literal["all", "params"], step: int) -> Event:
        source = kept.device.leaves
        if self._to_host is not None:
            source = _back(source, self._carry.leaves)
        leaves = list(source)
        if part == "params":
            leaves = list(self._carry.leaves)
            for index in self._params:
                leaves[index] = source[index]
        else:
            extensions = kept.device.extensions
            if self._to_host is not None:
                extensions = _back(extensions, self._carry.ext_leaves)
            # The first leaf is the number of completed steps, which never goes back.
            self._carry.ext_leaves = [*self._carry.ext_leaves[:1], *extensions[1:]]
        self._carry.leaves = leaves
        self.changes += 1
        self._owned = True
        for hyperparam in self._hyperparams:
            self._values[hyperparam.path] = read(leaves[hyperparam.leaf_index])
        self._show()
        return CheckpointRestored(step=step, tag=kept.device.tag, part=part, restored_step=kept.step)


def _back(leaves: Sequence[jax.Array], places: Sequence[jax.Array]) -> list[jax.Array]:
    """Leaves from pinned host memory, put where ``places`` are."""
    return [jax.device_put(leaf, place.sharding) for leaf, place in zip(leaves, places, strict=True)]
