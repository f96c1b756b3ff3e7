"""Applies commands to the state of a run, between two steps. Training thread only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax

from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.control.command_queue import PendingCommand
from eventtrain.control.control_plane import ControlPlane
from eventtrain.device.compiled_step import Carry
from eventtrain.device.hyperparams import Hyperparam, becomes_zero, labels, read, resolve, write
from eventtrain.device.snapshot import Snapshot
from eventtrain.errors import EventTrainError, ProcessesDiverged
from eventtrain.events import CommandApplied, CommandConflict, Event, HyperparamChanged, SnapshotTaken
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
    TakeSample,
    TakeSnapshot,
)
from eventtrain.events.models import Number
from eventtrain.loop.agreement.agreement import Agreement
from eventtrain.loop.agreement.log import ApplyCommand, RejectCommand, ReleaseSnapshots, RestoreSnapshot
from eventtrain.loop.checkpoints import Checkpoints
from eventtrain.loop.evaluation import Evaluations
from eventtrain.loop.metric_windows import MetricWindows
from eventtrain.loop.profiling import StepProfiler
from eventtrain.loop.run_status import RunStatus
from eventtrain.loop.samples import Samples
from eventtrain.loop.snapshot_ledger import SnapshotLedger


@dataclass(eq=False, kw_only=True)
class CommandExecutor:
    """Applies each command, or rejects it with the reason, and publishes which it was.

    Attributes:
        carry: the state between two steps.
        hyperparams: all that the state holds.
        status, plane, windows: of the run.
        ledger, checkpoints, evaluations, profiler, samples: do what commands ask for.
        agreement: with the other processes of the run.
    """

    carry: Carry
    hyperparams: Sequence[Hyperparam]
    status: RunStatus
    plane: ControlPlane
    windows: MetricWindows
    ledger: SnapshotLedger
    checkpoints: Checkpoints
    evaluations: Evaluations
    profiler: StepProfiler
    samples: Samples
    agreement: Agreement

    def __post_init__(self) -> None:
        self._labels = labels(self.hyperparams)
        self._values: dict[str, Number] = {}
        # Path of a hyperparameter -> the step at which, and the subscription by which, it was set last.
        self._setters: dict[str, tuple[int, SubscriptionCore]] = {}
        self._known_kept: set[str] = set()
        self._read_values()

    def apply(self, pending: PendingCommand) -> bool:
        """Apply ``pending`` at this boundary, or reject it with the reason. Never raises for a bad command.

        Returns:
            Whether it was applied.
        """
        command, step = pending.command, self.status.step
        events: list[Event] = []
        try:
            match command:
                case SetHyperparam() | ScaleHyperparam():
                    events = self._change_hyperparam(command, pending)
                case Stop():
                    self.status.stop(command.reason or "stopped", final=command.final, signal=pending.signal)
                case SaveCheckpoint():
                    self.checkpoints.request(command)
                case TakeSnapshot():
                    taken = SnapshotTaken(step=step, tag=command.tag, epoch=self.status.epoch)
                    self.plane.view.keep(command.tag, self.ledger.take(taken))
                    events = [taken]
                case Restore():
                    kept = self.ledger.find(command.target)
                    events = [self.ledger.restore(kept.device, command.part)]
                    self._read_values()
                case Pause():
                    self.status.paused = True
                case Resume():
                    self.status.paused = False
                case Evaluate():
                    self.evaluations.request()
                case Profile():
                    self.profiler.request(command.steps)
                case TakeSample():
                    self.samples.take(command.name)
        except (EventTrainError, OverflowError) as error:
            if not self.agreement.decides:
                raise ProcessesDiverged(
                    f"Process 0 has applied {command.kind} at step {step}, and this process cannot: {error}"
                ) from error
            reason = str(error)
            self.plane.queue.reject(pending, reason, self.windows)
            if pending.ask is not None:
                self.agreement.record(self.status, RejectCommand(ask=pending.ask, reason=reason))
            return False
        order = ApplyCommand(command=command, ask=pending.ask, signal=pending.signal)
        self.agreement.record(self.status, order)
        if command.due is None and self._changes_the_run(command):
            self.status.deterministic = False
        applied = CommandApplied(step=step, command=command)
        self.windows.emit(applied)
        for event in events:
            self.windows.emit(event)
        self.plane.queue.answer(pending, applied)
        return True

    def _changes_the_run(self, command: object) -> bool:
        """Whether a rerun without this command would differ."""
        if isinstance(command, Stop):
            return not self.status.cut_short  # a run that resumes from here repeats exactly
        return isinstance(command, (SetHyperparam, ScaleHyperparam, Restore, Evaluate))

    def restore_at_end(self) -> None:
        """Restore what subscribers requested for the end of the run, and release it. Whole states before params."""
        requests = self.plane.requests.final_restores
        for request in sorted(requests, key=lambda request: request.part == "params"):
            share = self.ledger.share_kept(request.tag)
            if share is None:
                continue
            if request.where():
                self.agreement.record(self.status, RestoreSnapshot(tag=request.tag, part=request.part))
                self._restore(share, request.part)
            else:
                self.agreement.record(self.status, ReleaseSnapshots(tags=(request.tag,)))
            share.release()
            self.release((request.tag,))

    def restore_ordered(self, order: RestoreSnapshot) -> None:
        """Restore what process 0 restores at the end of the run, and release it."""
        self._restore(self.ledger.find(order.tag).device, order.part)
        self.release((order.tag,))

    def replace_state(self, leaves: list[jax.Array]) -> None:
        """Make ``leaves`` the present state. Waits for the hyperparameters among them that are new."""
        before = self.carry.leaves
        self.ledger.replace(leaves)
        changed = [h for h in self.hyperparams if leaves[h.leaf_index] is not before[h.leaf_index]]
        if changed:
            self._read_values(*changed)

    def _restore(self, snapshot: Snapshot, part: Literal["all", "params"]) -> None:
        self.windows.emit(self.ledger.restore(snapshot, part))
        self._read_values()

    def release(self, tags: Sequence[str]) -> None:
        """Release snapshots that were taken by tag."""
        kept = self.plane.view.kept()
        for tag in tags:
            if tag in kept:
                kept[tag].device.release()

    def announce_released(self) -> None:
        """Have the other processes release what was released here since the last call."""
        kept = {tag for tag in self.plane.view.kept() if isinstance(tag, str)}
        if gone := self._known_kept - kept:
            self.agreement.record(self.status, ReleaseSnapshots(tags=tuple(sorted(gone))))
        self._known_kept = kept

    # --- hyperparameters --------------------------------------------------------------------------------------

    def _change_hyperparam(
        self, command: SetHyperparam | ScaleHyperparam, pending: PendingCommand
    ) -> list[Event]:
        target = resolve(self.hyperparams, command.name, command.path)
        old = self._values[target.path]
        value = command.value if isinstance(command, SetHyperparam) else _scaled(command, old, target)
        leaves = list(self.carry.leaves)
        leaves[target.leaf_index] = write(leaves[target.leaf_index], value)
        self.carry.leaves = leaves
        self.status.changes += 1
        self._read_values(target)
        conflict = self._conflict(target, pending)
        if self._values[target.path] == old:
            return conflict
        changed = HyperparamChanged(
            step=self.status.step,
            name=target.name,
            path=target.path,
            old=old,
            new=self._values[target.path],
            reason=command.reason,
            cause=command.cause,
            source=command.source,
        )
        return [changed, *conflict]

    def _conflict(self, target: Hyperparam, pending: PendingCommand) -> list[Event]:
        """The event that reports two subscriptions that set ``target`` at one boundary, if they did."""
        if pending.cause is None or pending.subscription is None:
            self._setters.pop(target.path, None)
            return []
        step, before = self.status.step, self._setters.get(target.path)
        self._setters[target.path] = (step, pending.subscription)
        if before is None or before[0] != step or before[1] is pending.subscription:
            return []
        return [
            CommandConflict(
                step=step,
                name=target.name,
                path=target.path,
                subscribers=(before[1].name, pending.subscription.name),
                cause_step=pending.cause.step,
            )
        ]

    def _read_values(self, *changed: Hyperparam) -> None:
        """Read the values of ``changed``, or of all, and show them. The host has written them: no wait."""
        for hyperparam in changed or self.hyperparams:
            self._values[hyperparam.path] = read(self.carry.leaves[hyperparam.leaf_index])
        self.plane.view.hyperparams = {self._labels[path]: value for path, value in self._values.items()}


def _scaled(command: ScaleHyperparam, old: Number, target: Hyperparam) -> Number:
    value = old * command.factor
    # A limit stops the scaling. A value that is already beyond it is not brought back to it.
    if command.minimum is not None:
        value = max(value, min(old, command.minimum))
    if command.maximum is not None:
        value = min(value, max(old, command.maximum))
    if target.dtype.kind in "iu":
        return round(value)
    # Neither is it scaled below the smallest value that the dtype holds.
    return old if command.minimum is not None and becomes_zero(value, target.dtype) else value
