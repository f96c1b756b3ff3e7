"""What a checkpoint holds besides arrays, so that a run goes on exactly where it was: plain JSON data, validated."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from eventtrain.bus.cut import Cut, Share
from eventtrain.commands import AnyCommand
from eventtrain.control import Order
from eventtrain.events import parse_event
from eventtrain.frozen import Frozen, Number


class SavedMeans(Frozen):
    """The sums behind the means of an epoch or an evaluation."""

    sums: dict[str, float] = Field(default_factory=dict)
    total: float = 0.0


class SavedOrder(Frozen):
    """A command on its way: not due yet when the cut was taken."""

    command: AnyCommand
    cause_step: int
    cause_seq: int
    subscriber: str
    issue: int


class LoopFacts(Frozen):
    """Where the loop was.

    Attributes:
        step, epoch, batch: completed; ``batch`` counts those of the epoch in progress.
        in_epoch: EpochStarted of ``epoch`` was said.
        evaluation: how far the evaluation of this boundary is, if there is one.
        evaluated_batches: of the evaluation that was cut short at this boundary; None if none was.
        epoch_first_step: completed before the epoch in progress.
        start_step, start_epoch: completed when the call of ``fit`` began whose aim is pursued.
        data: the state of the data's iterator after the last batch trained on, by ``pack``; None where it has none.
        orders: commands that are not due yet.
        deterministic: nothing that depends on timing has taken effect.
        fingerprint: what an exact continuation depends on: versions, devices, options.
    """

    step: int
    epoch: int
    batch: int
    in_epoch: bool
    evaluation: Literal["none", "pending", "done"] = "none"
    evaluated_batches: int | None = None
    epoch_first_step: int
    start_step: int
    start_epoch: int
    data: Any = None
    orders: tuple[SavedOrder, ...] = ()
    deterministic: bool = True
    fingerprint: dict[str, Any] = Field(default_factory=dict)


class StreamFacts(Frozen):
    """Where the stream was.

    Attributes:
        seq: number of the last event before the cut.
        epoch_means: of the epoch in progress.
        eval_means: of the evaluation that was cut short.
        evaluated: means of the epoch's last evaluation, which its EpochCompleted will carry.
        watched: values of the hyperparameters that follow a schedule.
    """

    seq: int = 0
    epoch_means: SavedMeans = SavedMeans()
    eval_means: SavedMeans = SavedMeans()
    evaluated: dict[str, Number] | None = None
    watched: dict[str, Number] = Field(default_factory=dict)


class SavedShare(Frozen):
    """``Share`` of one subscription as JSON."""

    state: dict[str, Any] | None = None
    unhandled: tuple[dict[str, Any], ...] = ()
    decided_on: tuple[bool, ...] = ()
    spent: bool = False
    disabled: bool = False
    failures: int = 0

    @classmethod
    def of(cls, share: Share) -> SavedShare:
        """From what a subscription gave."""
        return cls(
            state=None if share.state is None else dict(share.state),
            unhandled=tuple(event.model_dump(mode="json") for event in share.unhandled),
            decided_on=share.decided_on,
            spent=share.spent,
            disabled=share.disabled,
            failures=share.failures,
        )

    def share(self) -> Share:
        """What the subscription gave; raises EventParseError where an event cannot be read."""
        events = tuple(parse_event(data) for data in self.unhandled)
        return Share(self.state, events, self.decided_on, self.spent, self.disabled, self.failures)


class RunFacts(Frozen):
    """Everything of one cut that is no array."""

    schema_version: Literal[1] = 1
    loop: LoopFacts
    stream: StreamFacts
    shares: dict[str, SavedShare]

    @classmethod
    def of(cls, cut: Cut, timeout_s: float) -> RunFacts:
        """What ``cut`` collects. Blocks until everybody has given theirs; raises SnapshotError where one does not."""
        shares = cut.wait(timeout_s)
        loop: LoopFacts = cut.facts["loop"]
        stream: StreamFacts = cut.facts["stream"]
        seq: int = cut.facts["seq"]
        return cls(
            loop=loop.model_copy(update={"orders": tuple(_orders_of(cut.orders, shares, seq))}),
            stream=stream.model_copy(update={"seq": seq}),
            shares={name: SavedShare.of(share) for name, share in shares.items()},
        )


def _orders_of(orders: Iterable[Order], shares: Mapping[str, Share], seq: int) -> Iterator[SavedOrder]:
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
            yield SavedOrder(
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
    def facts(self) -> RunFacts | None:
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


@dataclass(frozen=True)
class Resumption:
    """What a run starts from when it resumes."""

    saved: SavedRun
    facts: RunFacts
    shares: Mapping[str, Share] = field(default_factory=dict[str, Share])
    kept: tuple[str, ...] = ()
    """Tags of the other snapshots that were saved with it."""


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
