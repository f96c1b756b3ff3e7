"""What a checkpoint holds besides arrays, so that a run goes on exactly where it was: plain JSON data, validated."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from eventtrain.bus.barrier import Barrier, SubscriptionCheckpoint
from eventtrain.control.command_queue import PendingCommand, RunPart
from eventtrain.events import parse_event
from eventtrain.events.models import Frozen
from eventtrain.events.run_records import LoopRecord, SavedCommand, StreamRecord


class SavedSubscription(Frozen):
    """``SubscriptionCheckpoint`` of one subscription as JSON."""

    state: dict[str, Any] | None = None
    unhandled: tuple[dict[str, Any], ...] = ()
    decided_on: tuple[bool, ...] = ()
    spent: bool = False
    disabled: bool = False
    failures: int = 0

    @classmethod
    def of(cls, share: SubscriptionCheckpoint) -> SavedSubscription:
        """From what a subscription gave."""
        return cls(
            state=None if share.state is None else dict(share.state),
            unhandled=tuple(event.model_dump(mode="json") for event in share.unhandled),
            decided_on=share.decided_on,
            spent=share.spent,
            disabled=share.disabled,
            failures=share.failures,
        )

    def share(self) -> SubscriptionCheckpoint:
        """What the subscription gave; raises EventParseError where an event cannot be read."""
        events = tuple(parse_event(data) for data in self.unhandled)
        return SubscriptionCheckpoint(
            self.state, events, self.decided_on, self.spent, self.disabled, self.failures
        )


class RunRecord(Frozen):
    """Everything of one cut that is no array."""

    schema_version: Literal[1] = 1
    loop: LoopRecord
    stream: StreamRecord
    shares: dict[str, SavedSubscription]

    @classmethod
    def wait_for(cls, cut: Barrier[RunPart], timeout_s: float) -> RunRecord:
        """What ``cut`` collects. Blocks until everybody has given theirs; raises SnapshotError where one does not."""
        shares = cut.wait(timeout_s)
        loop, stream = cut.run.loop, cut.run.stream
        assert loop is not None
        assert stream is not None  # both were there before the marker was routed
        return cls(
            loop=loop.model_copy(update={"orders": tuple(_orders_of(cut.run.commands, shares, cut.seq))}),
            stream=stream.model_copy(update={"seq": cut.seq}),
            shares={name: SavedSubscription.of(share) for name, share in shares.items()},
        )


def _orders_of(
    orders: Iterable[PendingCommand], shares: Mapping[str, SubscriptionCheckpoint], seq: int
) -> Iterator[SavedCommand]:
    """The commands that belong to a cut: not due, caused before it, by an event that will not be handled once more."""
    again = {
        (name, event.seq)
        for name, share in shares.items()
        for event, decided_on in zip(share.unhandled, share.decided_on, strict=True)
        if decided_on  # others are numbered in another sequence
    }
    for order in orders:
        cause, subscription = order.cause, order.subscription
        if order.command.due is None or cause is None or subscription is None or cause.seq > seq:
            continue
        if (subscription.name, cause.seq) not in again:
            yield SavedCommand(
                command=order.command,
                cause_step=cause.step,
                cause_seq=cause.seq,
                subscriber=subscription.name,
                issue=order.issue,
            )


class SavedRun(Protocol):
    """A checkpoint that a run can go on from."""

    @property
    def path(self) -> Path:
        """Where it lies."""
        ...

    @property
    def step(self) -> int:
        """Updates completed."""
        ...

    @property
    def time(self) -> datetime:
        """When it was committed."""
        ...

    @property
    def facts(self) -> RunRecord | None:
        """What belongs to it besides arrays; None where only a state was saved."""
        ...

    def state(self, like: Any) -> Any:
        """The state, placed as ``like`` is. Raises StateError where it does not fit."""
        ...

    def extensions(self, like: Mapping[str, Any], tag: str | None = None) -> list[Any]:
        """The leaves of the step extensions, placed as those of ``like`` (by path) and in their order.

        Those that belong to the state, or to the snapshot ``tag`` of ``kept``.
        Raises StateError where they do not fit.
        """
        ...

    def kept(self, like: Any) -> dict[str, tuple[int, Any]]:
        """Other snapshots that the rest of the run needs: tag -> step, and state placed as ``like``."""
        ...


class UndoLog(Protocol):
    """The trainer and its subscribers as they were."""

    def put_back(self) -> None:
        """Make it so again."""
        ...

    def forget(self) -> None:
        """There is no way back; what was remembered would only take memory."""
        ...


@dataclass(frozen=True)
class ResumePoint:
    """What a run starts from when it resumes."""

    saved: SavedRun
    facts: RunRecord
    before: UndoLog
    shares: Mapping[str, SubscriptionCheckpoint] = field(default_factory=dict[str, SubscriptionCheckpoint])
    kept: tuple[str, ...] = ()
    """Tags of the other snapshots that were saved with it."""
    ended: str | None = None
    """Why the run had reached its end, so that nothing is trained."""


def pack(state: Any) -> Any:
    """An iterator's state as JSON data; bytes become ``{"base64": ...}``.

    Raises:
        TypeError: it is neither bytes nor JSON data.
    """
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode()}
    if isinstance(state, Mapping):
        return {"mapping": [[pack(k), pack(v)] for k, v in state.items()]}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(state, (list, tuple)):
        return {"list": [pack(item) for item in state]}  # pyright: ignore[reportUnknownVariableType]
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    if hasattr(state, "item") and getattr(state, "ndim", None) == 0:
        return state.item()
    raise TypeError(
        f"the state of the data's iterator holds {type(state).__name__}, and a checkpoint takes bytes and JSON data"
    )


def unpack(data: Any) -> Any:
    """What ``pack`` was given; tuples come back as lists."""
    if isinstance(data, Mapping):
        if "base64" in data:
            return base64.b64decode(data["base64"])
        if "list" in data:
            return [unpack(item) for item in data["list"]]
        return {unpack(k): unpack(v) for k, v in data["mapping"]}
    return data
