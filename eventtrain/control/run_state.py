"""The records of a checkpoint besides arrays, from which a run continues exactly: plain JSON data, validated."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from eventtrain.bus.barrier import Barrier, SubscriptionState
from eventtrain.control.command_queue import PendingCommand
from eventtrain.events import parse_event
from eventtrain.events.models import Frozen
from eventtrain.events.run_records import LoopRecord, SavedCommand, StreamRecord


class SavedSubscription(Frozen):
    """``SubscriptionState`` of one subscription as JSON."""

    state: dict[str, Any] | None = None
    unhandled: tuple[dict[str, Any], ...] = ()
    decided_on: tuple[bool, ...] = ()
    spent: bool = False
    disabled: bool = False
    failures: int = 0

    @classmethod
    def of(cls, share: SubscriptionState) -> SavedSubscription:
        """Returns the record of ``share``."""
        return cls(
            state=None if share.state is None else dict(share.state),
            unhandled=tuple(event.model_dump(mode="json") for event in share.unhandled),
            decided_on=share.decided_on,
            spent=share.spent,
            disabled=share.disabled,
            failures=share.failures,
        )

    def share(self) -> SubscriptionState:
        """Returns what the subscription gave. Raises EventParseError if an event cannot be read."""
        events = tuple(parse_event(data) for data in self.unhandled)
        return SubscriptionState(
            self.state, events, self.decided_on, self.spent, self.disabled, self.failures
        )


class RunRecord(Frozen):
    """Everything of one checkpoint that is not an array."""

    schema_version: Literal[1] = 1
    loop: LoopRecord
    stream: StreamRecord
    shares: dict[str, SavedSubscription]

    @classmethod
    def wait_for(cls, cut: Barrier, timeout_s: float) -> RunRecord:
        """Returns what ``cut`` collects. Blocks until it is complete; raises SnapshotError if a subscription fails."""
        shares = cut.wait(timeout_s)
        loop, stream = cut.loop, cut.stream
        assert loop is not None
        assert stream is not None  # both were there before the marker was routed
        return cls(
            loop=loop.model_copy(update={"orders": tuple(_orders_of(cut.orders, shares, stream.seq))}),
            stream=stream,
            shares={name: SavedSubscription.of(share) for name, share in shares.items()},
        )


def _orders_of(
    orders: Iterable[PendingCommand], shares: Mapping[str, SubscriptionState], seq: int
) -> Iterator[SavedCommand]:
    """The commands that belong to a checkpoint: not due, and caused before it by an event that is not redelivered."""
    again = {
        (name, event.seq)
        for name, share in shares.items()
        for event, decided_on in zip(share.unhandled, share.decided_on, strict=True)
        if decided_on  # other events are numbered in another sequence
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
    """A checkpoint from which a run can continue."""

    @property
    def path(self) -> Path:
        """Its directory."""
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
        """Everything that is not an array; None if only a state was saved."""
        ...

    def state(self, like: Any) -> Any:
        """Returns the state, placed as ``like`` is. Raises StateError if it does not fit."""
        ...

    def extensions(self, like: Mapping[str, Any], tag: str | None = None) -> list[Any]:
        """Returns the leaves of the step extensions, placed as those of ``like`` (by path) and in their order.

        They belong to the state, or to the snapshot ``tag`` of ``kept``. Raises StateError if they do not fit.
        """
        ...

    def kept(self, like: Any) -> dict[str, tuple[int, Any]]:
        """Returns the other snapshots that the rest of the run needs: tag -> step, and state placed as ``like``."""
        ...


def pack(state: Any) -> Any:
    """Returns an iterator's state as JSON data; bytes become ``{"base64": ...}``.

    Raises:
        TypeError: it holds something that is neither bytes nor JSON data.
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
        f"the state of the data's iterator holds {type(state).__name__}; a checkpoint can hold bytes and JSON data only"
    )


def unpack(data: Any) -> Any:
    """Returns what ``pack`` was given, with lists for tuples."""
    if isinstance(data, Mapping):
        if "base64" in data:
            return base64.b64decode(data["base64"])
        if "list" in data:
            return [unpack(item) for item in data["list"]]
        return {unpack(k): unpack(v) for k, v in data["mapping"]}
    return data
