"""Resuming: finding the checkpoint, and putting model, loop and stream where it was. Training thread only."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from eventtrain.bus.barrier import SubscriptionCheckpoint, SubscriptionRestore
from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.bus.wakeup import CrossLoopFuture
from eventtrain.control.command_queue import PendingCommand
from eventtrain.control.run_state import BEFORE_END, LoopRecord, RunRecord, SavedRun, unpack
from eventtrain.control.run_view import RunView
from eventtrain.device.hyperparams import find_hyperparams, values_of
from eventtrain.device.model import Model
from eventtrain.device.snapshot import Snapshot
from eventtrain.device.state import split_state
from eventtrain.errors import ConfigurationError, SnapshotError, StateError, listed, shortened
from eventtrain.events import Event, RunResumed
from eventtrain.loop.run_recorder import Aim
from eventtrain.loop.run_resources import RunResources
from eventtrain.loop.train_loop import TrainingLoop
from eventtrain.subscribers.base import Subscriber, name_of

logger = logging.getLogger("eventtrain")

# Not optax.__version__: importing optax takes a tenth of the time of importing eventtrain.
JAXLIB, OPTAX = version("jaxlib"), version("optax")


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run resumes from, once model and subscribers have taken it over.

    Attributes:
        saved: gives the arrays.
        record: everything else.
        backup: of the trainer, as it was before.
        shares: by subscription, what it held at the checkpoint.
        kept: tag -> tag on disk, of the other snapshots that were saved with it.
        state_tag: tag on disk of the snapshot whose state was taken over; None if it was the checkpoint's own.
        ended: why the run had reached its end, so that nothing is trained; None if it continues.
    """

    saved: SavedRun
    record: RunRecord
    backup: Backup
    shares: Mapping[str, SubscriptionCheckpoint] = field(default_factory=dict[str, SubscriptionCheckpoint])
    kept: Mapping[str, str] = field(default_factory=dict[str, str])
    state_tag: str | None = None
    ended: str | None = None


class Backup:
    """The state of a trainer between two runs, restored if resuming fails. Copies no array."""

    def __init__(self, model: Model, view: RunView, subscribers: Sequence[Subscriber]) -> None:
        self._model = model
        self._view = view
        self._model_state: tuple[Any, list[jax.Array] | None, int, int] | None = (
            model.structure.join(model.leaves),
            model.ext_leaves,
            model.step,
            model.epoch,
        )
        self._snapshots = dict(view.snapshots)
        self._subscribers = [(one, dict(vars(one)), _state_of(one)) for one in subscribers]

    def restore(self) -> None:
        """Restore it. Does nothing after ``discard``."""
        if self._model_state is None:
            return
        model = self._model
        state, model.ext_leaves, model.step, model.epoch = self._model_state
        model.adopt(state)
        self._view.snapshots = self._snapshots
        for subscriber, attributes, state in self._subscribers:
            if state is not None:
                try:
                    subscriber.load_state_dict(state)  # into the objects that it holds, and may have changed
                except Exception as error:
                    logger.warning("%s refuses the state it had before: %s", type(subscriber).__name__, error)
            vars(subscriber).clear()
            vars(subscriber).update(attributes)

    def discard(self) -> None:
        """Free the memory: there is no way back."""
        self._model_state = None
        self._subscribers.clear()
        self._snapshots = {}


def _state_of(subscriber: Subscriber) -> dict[str, Any] | None:
    """Returns the state that it would save; None if it saves nothing, or cannot before its first run."""
    if type(subscriber).state_dict is Subscriber.state_dict:
        return None
    try:
        return copy.deepcopy(subscriber.state_dict())
    except Exception:
        return None


# --- finding it -------------------------------------------------------------------------------------------------


def find_saved_run(
    resume: bool | str | int | Path, run_dir: Path, subscribers: Sequence[Subscriber]
) -> SavedRun | None:
    """Returns the checkpoint to resume from, of all that ``subscribers`` keep; None if there is none yet.

    Args:
        resume: True for the one committed last that holds a run; or a step, a tag or a path.
        run_dir: of the run.
        subscribers: of the trainer.

    Raises:
        ConfigurationError: no Checkpointer is subscribed.
        SnapshotError: no subscriber has the one that ``resume`` names.
    """
    finders = [subscriber for subscriber in subscribers if subscriber.resumes_runs]
    if not finders:
        raise ConfigurationError(
            f"resume={resume!r} requires a Checkpointer: Trainer(subscribers=[subs.Checkpointer(...)])."
        )
    found: list[SavedRun] = []
    missing: list[SnapshotError] = []
    for subscriber in finders:
        try:
            saved = subscriber.saved_run(run_dir, resume)
        except SnapshotError as error:  # another one may have it
            missing.append(error)
        except Exception as error:
            error.add_note(f"Raised by the subscriber {name_of(subscriber)} when it looked for a checkpoint.")
            raise
        else:
            found += [saved] if saved is not None else []
    if not found and missing:
        raise missing[0]
    return max(found, key=lambda saved: (saved.facts is not None, saved.time, saved.step), default=None)


def remaining(record: LoopRecord, aim: Aim) -> Aim:
    """Returns what is left of ``aim``, which counts from the beginning of the run."""
    epochs = None if aim.epochs is None else max(0, record.start_epoch + aim.epochs - record.epoch)
    steps = None if aim.steps is None else max(0, record.start_step + aim.steps - record.step)
    return replace(aim, epochs=epochs, steps=steps)


def is_beyond(record: LoopRecord, aim: Aim) -> bool:
    """Returns whether the run has trained more than ``aim``, so that not even its end is due."""
    epochs, steps = record.epoch - record.start_epoch, record.step - record.start_step
    beyond = aim.epochs is not None and (epochs, record.in_epoch) > (aim.epochs, False)
    return beyond or (aim.steps is not None and steps > aim.steps)


def why_ended(run: RunRecord, aim: Aim, *, named: bool) -> str | None:
    """Returns why the run has reached its end already; None if there is something to do.

    An epoch that the end of the run has cut short counts as far as it was trained.

    Args:
        run: of the checkpoint.
        aim: of this call.
        named: the checkpoint was named, to continue from it whatever had ended the run.
    """
    record, trained = run.loop, (run.before_end or run).loop
    left = remaining(trained, aim)
    if is_beyond(trained, aim) or (not trained.in_epoch and 0 in (left.epochs, left.steps)):
        return "completed"
    if record.ended is None or named:
        return None
    higher = (aim.epochs or 0) > (record.epochs or 0) or (aim.steps or 0) > (record.steps or 0)
    return None if higher else record.ended


# --- taking it over ---------------------------------------------------------------------------------------------


def take_over(
    saved: SavedRun,
    model: Model,
    view: RunView,
    subscribers: Sequence[Subscriber],
    now: Mapping[str, Any],
    aim: Aim,
    *,
    named: bool,
) -> ResumePoint:
    """Load the state of ``saved`` into ``model``, and the states of its subscribers into those of the same name.

    If the run had ended and has a higher ``aim`` now, they are those before its end.

    Args:
        aim, named: as for ``why_ended``.
        now: the fingerprint of this trainer. Differences from the saved one are logged.

    Raises:
        SnapshotError: only a state was saved. StateError: something does not fit. Nothing has changed then.
    """
    record = saved.facts
    if record is None:
        raise SnapshotError(
            f"Cannot resume from {saved.path}: it holds weights only. Start with them: "
            "Trainer(state=et.load_state(path, like=state))."
        )
    record = record.of_process(jax.process_index())
    ended = why_ended(record, aim, named=named)
    left = remaining((record.before_end or record).loop, aim)
    before_end = record.before_end if ended is None and 0 not in (left.epochs, left.steps) else None
    record = before_end or record
    all_shares = {name: share.share() for name, share in record.shares.items()}
    shares = _meant_for(subscribers, all_shares)
    like = model.structure.join(model.leaves)
    kept = saved.kept(like, before_end=before_end is not None)
    state_tag = BEFORE_END if BEFORE_END in kept else None
    state = kept.pop(BEFORE_END)[1] if state_tag is not None else saved.state(like)
    changed = differences(record.loop.fingerprint, now, values_of(find_hyperparams(state), _leaves_of(state)))
    if changed:
        logger.warning(
            "The run resumes from %s under different conditions and may not repeat bit for bit: %s",
            saved.path, listed(changed, 20),
        )  # fmt: skip
    tags = {tag.removeprefix(f"{BEFORE_END}/"): tag for tag in kept}
    left_out = all_shares.keys() - shares.keys()
    orders = tuple(order for order in record.loop.orders if order.subscriber not in left_out)
    loop_record = record.loop.model_copy(update={"data": unpack(record.loop.data), "orders": orders})
    backup = Backup(model, view, subscribers)
    try:
        _load_states(subscribers, shares)
    except BaseException:
        backup.restore()
        raise
    model.adopt(state)
    model.ext_leaves = None
    model.step, model.epoch = loop_record.step, loop_record.epoch
    for tag, on_disk in tags.items():
        step, state = kept[on_disk]
        view.keep(tag, Snapshot(step, _leaves_of(state), model.structure, tag=tag))
    record = record.model_copy(update={"loop": loop_record})
    return ResumePoint(saved, record, backup, shares, tags, state_tag, ended)


def _meant_for(
    subscribers: Sequence[Subscriber], shares: Mapping[str, SubscriptionCheckpoint]
) -> dict[str, SubscriptionCheckpoint]:
    """Returns ``shares`` without those of subscribers that are about something else now, such as another metric."""
    meant = dict(shares)
    for subscriber in subscribers:
        name = name_of(subscriber)
        share = shares.get(name)
        if (
            share is not None
            and share.state is not None
            and dict(share.about) != dict(subscriber.state_about)
        ):
            del meant[name]
            logger.warning(
                "%s starts from scratch: the checkpoint has a state of that name about %s, and it is about %s. Names "
                "follow the order of the subscribers: set `name` to keep them apart.",
                name, _listing(share.about), _listing(subscriber.state_about),
            )  # fmt: skip
    return meant


def _listing(about: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in about.items()) or "nothing in particular"


def _load_states(subscribers: Sequence[Subscriber], shares: Mapping[str, SubscriptionCheckpoint]) -> None:
    for subscriber in subscribers:
        name = name_of(subscriber)
        share = shares.get(name)
        if share is None:
            continue
        if share.error is not None:
            logger.warning(
                "%s failed when the checkpoint was taken, and %s: %s",
                name,
                "starts with the events after it"
                if share.state is None
                else "may lack output of steps before it",
                share.error,
            )
        if share.state is None:
            continue
        try:
            subscriber.load_state_dict(dict(share.state))
        except Exception as error:
            raise StateError(f"The run cannot resume: {name} refuses its state: {error}") from error


def _leaves_of(state: Any) -> list[Any]:
    return list(split_state(state)[0])


def take_over_extensions(
    point: ResumePoint, types: Mapping[str, Any], view: RunView
) -> list[jax.Array] | None:
    """Returns the leaves of the step extensions at the checkpoint, and adds those of the other kept snapshots to
    them.

    When the step is compiled: only then are their ``types`` (path -> shape, dtype, placement) known.
    """
    saved, kept = point.saved, view.kept()
    if not types:
        return None
    for tag, on_disk in point.kept.items():
        if tag in kept:
            kept[tag].device.add_extensions(saved.extensions(types, on_disk), tuple(types))
    return saved.extensions(types, point.state_tag)


def resume_stream(point: ResumePoint, resources: RunResources, model: Model) -> None:
    """Put back what was under way at the checkpoint: unhandled events, open decisions, commands not due yet.

    After the deciders were activated, before the first step, which leaves the state of ``model`` alone.
    """
    record, bus, fetcher = point.record, resources.bus, resources.fetcher
    bus.stream.continue_from(record.stream.seq)
    resources.builder.resume(record.stream)
    names = {subscription.name: subscription for subscription in (*bus.table.active, *bus.table.disabled)}
    for name, share in point.shares.items():
        subscription = names.get(name)
        if subscription is None:
            if share.state is not None or share.unhandled:
                logger.warning(
                    "The checkpoint holds the state of %s, and no subscription has that name", name
                )
            continue
        share = _deliverable(share, subscription)
        for held in resources.plane.held_states:
            for event in share.unhandled if held.subscription is subscription else ():
                if event.step == model.step:
                    held.add(type(event), Snapshot(event.step, model.leaves, model.structure))
        fetcher.put(SubscriptionRestore(name, share))
        for event, decided_on in zip(share.unhandled, share.decided_on, strict=True):
            if decided_on:
                resources.gates.owe(subscription, type(event), event.step)
    causes: dict[tuple[int, int], Event] = {}
    for saved in record.loop.orders:
        command = saved.command
        if saved.subscriber not in names:
            logger.warning(
                "A %s that %s sent before the checkpoint is left out: no subscription has that name",
                command.kind, saved.subscriber,
            )  # fmt: skip
            continue
        if command.kind in ("stop", "pause"):
            logger.warning(
                "The run resumes with a %s that %s sent before the checkpoint, due at step %s",
                command.kind, saved.subscriber, command.due,
            )  # fmt: skip
        key = (saved.cause_step, saved.cause_seq)
        cause = causes.setdefault(key, Event(step=saved.cause_step, seq=saved.cause_seq))
        pending = PendingCommand(command, CrossLoopFuture(), cause, names[saved.subscriber], saved.issue)
        resources.plane.queue.due.append(pending)
    loop, path = record.loop, str(point.saved.path)
    resources.gates.note(RunResumed, loop.step)
    fetcher.put(RunResumed(step=loop.step, epoch=loop.epoch, batch=loop.batch, path=path))


def _deliverable(share: SubscriptionCheckpoint, subscription: SubscriptionCore) -> SubscriptionCheckpoint:
    """Returns ``share`` without events of classes that the subscription does not receive any more."""
    events = list(zip(share.unhandled, share.decided_on, strict=True))
    kept = [(event, decided_on) for event, decided_on in events if isinstance(event, subscription.types)]
    if len(kept) < len(events):
        logger.warning(
            "%d events that %s had not handled at the checkpoint are left out: it does not receive their class now",
            len(events) - len(kept), subscription.name,
        )  # fmt: skip
    unhandled, decided_on = tuple(event for event, _ in kept), tuple(decided_on for _, decided_on in kept)
    return replace(share, unhandled=unhandled, decided_on=decided_on)


def resume_loop(point: ResumePoint, loop: TrainingLoop) -> None:
    """Put a loop that was just made where the loop of the checkpoint was. From here on there is no way back."""
    record, status = point.record.loop, loop.status
    point.backup.discard()
    status.deterministic = record.deterministic
    if point.ended is not None:
        status.stop_reason = status.ended = record.ended
    if record.in_epoch:
        loop.resume_epoch(record)


# --- what an exact continuation depends on ----------------------------------------------------------------------


def fingerprint(model: Model) -> dict[str, Any]:
    """Returns what an exact continuation depends on, as plain JSON data."""
    leaves = model.leaves
    devices = sorted({device for leaf in leaves for device in leaf.devices()}, key=lambda device: device.id)
    return {
        "jax": jax.__version__,
        "jaxlib": JAXLIB,
        "optax": OPTAX,
        "devices": [device.device_kind for device in devices],
        "x64": bool(jax.config.read("jax_enable_x64")),
        "steps_per_call": model.options.steps_per_call,
        "step_extensions": [repr(extension) for extension in model.extensions],
        "hyperparams": values_of(find_hyperparams(model.structure.join(leaves)), leaves),
        "state": {
            path: f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in zip(model.structure.paths, leaves, strict=True)
        },
    }


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], restored: Mapping[str, Any] | None = None
) -> list[str]:
    """Returns what differs from the fingerprint of the checkpoint, one phrase each.

    Of the data, only what is known of both is compared: a generator around a loader does not describe itself. Nor is
    the state compared: one that does not fit is refused.

    Args:
        restored: the hyperparameters with which the run continues.
    """
    found: list[str] = []
    for name in sorted({*saved, *now} - {"state"}):
        then, here = saved.get(name), now.get(name)
        if name in ("data", "hyperparams"):
            then, here = dict(then or {}), dict(here or {})
            for key in sorted(then.keys() & here.keys()):
                if then[key] == here[key]:
                    continue
                continues = ""
                if name == "hyperparams":
                    value = f" {restored[key]!r}" if restored and key in restored else ""
                    continues = (
                        f"; the checkpoint's value{value} continues, fit(hyperparams=...) sets another"
                    )
                found.append(
                    f"{name}: {key}={shortened(repr(then[key]))} then, {shortened(repr(here[key]))} now{continues}"
                )
        elif then != here:
            found.append(f"{name}: {shortened(repr(then))} then, {shortened(repr(here))} now")
    return found
