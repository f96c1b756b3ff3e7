"""The first moments of a run that goes on from a checkpoint. Training thread only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
import optax

from eventtrain.bus.barrier import SubscriptionCheckpoint, SubscriptionRestore
from eventtrain.bus.core import BusCore
from eventtrain.bus.wakeup import CrossLoopFuture
from eventtrain.control.command_queue import CommandQueue, PendingCommand
from eventtrain.control.run_state import ResumePoint, SavedRun, unpack
from eventtrain.control.snapshots import KeptSnapshot
from eventtrain.device.extensions import StepExtension
from eventtrain.device.snapshot import Snapshot
from eventtrain.device.state import Skeleton, split_state
from eventtrain.errors import SnapshotError, StateError
from eventtrain.events import Event, RunResumed
from eventtrain.loop.event_builder import EventBuilder
from eventtrain.loop.lag_gates import LagGates
from eventtrain.loop.train_loop import TrainingLoop
from eventtrain.subscribers.base import Subscriber
from eventtrain.trainer.model import Model
from eventtrain.trainer.rollback import Rollback

logger = logging.getLogger("eventtrain")

JAXLIB = version("jaxlib")


def resume_loop(resumption: ResumePoint, loop: TrainingLoop) -> None:
    """Put a loop that was just made where that of the checkpoint was. From here on there is no way back."""
    facts = resumption.facts.loop
    resumption.before.forget()
    loop.effects.deterministic = facts.deterministic
    if resumption.ended is not None:
        loop.effects.stop_reason = loop.effects.ended = facts.ended
    if facts.in_epoch:
        loop.windows.flush()
        loop.resume_epoch(facts)


def resume_stream(
    resumption: ResumePoint,
    bus: BusCore,
    gates: LagGates,
    inbox: CommandQueue,
    narrator: EventBuilder,
    put: Callable[[Any], None],
) -> None:
    """Put back what was on its way at the cut: unhandled events, what the loop owes them, commands not due yet.

    After the deciders were activated, before the first step.
    """
    facts, shares = resumption.facts, resumption.shares
    bus.stream.continue_from(facts.stream.seq)
    narrator.resume(facts.stream)
    names = {subscription.name: subscription for subscription in bus.subscriptions}
    for name, share in shares.items():
        subscription = names.get(name)
        if subscription is None:
            if share.state is not None or share.unhandled:
                logger.warning(
                    "The checkpoint holds the state of %s, and nobody of that name is subscribed", name
                )
            continue
        put(SubscriptionRestore(name, share))
        for event, decided_on in zip(share.unhandled, share.decided_on, strict=True):
            if decided_on:
                gates.owe(subscription, type(event), event.step)
    causes: dict[tuple[int, int], Event] = {}
    for saved in facts.loop.orders:
        key = (saved.cause_step, saved.cause_seq)
        cause = causes.setdefault(key, Event(step=saved.cause_step, seq=saved.cause_seq))
        order = PendingCommand(
            saved.command, CrossLoopFuture(), cause, names.get(saved.subscriber), saved.issue
        )
        inbox.due.append(order)
    position = facts.loop
    put(
        RunResumed(
            step=position.step, epoch=position.epoch, batch=position.batch, path=str(resumption.saved.path)
        )
    )


def take_over(
    saved: SavedRun,
    model: Model,
    inbox: CommandQueue,
    subscribers: Sequence[Subscriber],
    now: Mapping[str, Any],
) -> ResumePoint:
    """Put the state of ``saved`` into ``model``, and its subscribers' states into those of the same name.

    Args:
        now: the fingerprint of this trainer; what differs from the saved one is said in the log.

    Raises:
        SnapshotError: only a state was saved. StateError: something does not fit. Nothing has changed then.
    """
    facts = saved.facts
    if facts is None:
        raise SnapshotError(
            f"Cannot resume from {saved.path}: it holds weights only. Start with them: "
            "Trainer(state=et.load_state(path, like=state))."
        )
    changed = differences(facts.loop.fingerprint, now)
    if changed:
        logger.warning(
            "The run resumes from %s in other circumstances and may not repeat bit for bit: %s",
            saved.path, "; ".join(changed),
        )  # fmt: skip
    shares = {name: share.share() for name, share in facts.shares.items()}
    like = model.skeleton.join(model.leaves)
    leaves, kept = _leaves_of(saved.state(like)), saved.kept(like)
    resumed_loop = facts.loop.model_copy(update={"data": unpack(facts.loop.data)})
    before = Rollback(model, inbox, subscribers)
    try:
        _load_states(subscribers, shares)
    except BaseException:
        before.put_back()
        raise
    model.leaves, model.ext_leaves = leaves, None
    model.step, model.epoch = facts.loop.step, facts.loop.epoch
    for tag, (step, state) in kept.items():
        inbox.snapshots[tag] = KeptSnapshot(Snapshot(step, _leaves_of(state), model.skeleton, tag=tag))
    facts = facts.model_copy(update={"loop": resumed_loop})
    return ResumePoint(saved, facts, before, shares, tuple(kept))


def take_over_extensions(
    resumption: ResumePoint, types: Mapping[str, Any], inbox: CommandQueue
) -> list[jax.Array] | None:
    """What step extensions had computed by the cut; that of the other snapshots is put beside them.

    When the step is compiled, since their ``types`` (path -> shape, dtype, placement) are known only then.
    """
    saved, there = resumption.saved, inbox.kept()
    if not types:
        return None
    for tag in resumption.kept:
        if tag in there:
            whole = there[tag].device.with_extensions(saved.extensions(types, tag), tuple(types))
            inbox.snapshots[tag] = KeptSnapshot(whole)
    return saved.extensions(types)


def fingerprint(
    skeleton: Skeleton,
    leaves: Sequence[jax.Array],
    steps_per_call: int,
    extensions: Sequence[StepExtension],
) -> dict[str, Any]:
    """What an exact continuation depends on, as plain JSON data."""
    devices = sorted({device for leaf in leaves for device in leaf.devices()}, key=lambda device: device.id)
    return {
        "jax": jax.__version__,
        "jaxlib": JAXLIB,
        "optax": optax.__version__,
        "devices": [device.device_kind for device in devices],
        "x64": bool(jax.config.read("jax_enable_x64")),
        "steps_per_call": steps_per_call,
        "step_extensions": [repr(extension) for extension in extensions],
        "state": {
            path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in zip(skeleton.paths, leaves, strict=True)
        },
    }


def _load_states(subscribers: Sequence[Subscriber], shares: Mapping[str, SubscriptionCheckpoint]) -> None:
    for subscriber in subscribers:
        name = subscriber.name or type(subscriber).__name__
        share = shares.get(name)
        if share is None or share.state is None:
            continue
        try:
            subscriber.load_state_dict(dict(share.state))
        except Exception as error:
            raise StateError(f"The run cannot resume: {name} refuses its state: {error}") from error


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was when the checkpoint was written, one phrase each."""
    names = sorted({*saved, *now})
    return [
        f"{name}: {saved.get(name)!r} then, {now.get(name)!r} now"
        for name in names
        if saved.get(name) != now.get(name)
    ]


def _leaves_of(state: Any) -> list[Any]:
    return list(split_state(state)[0])
