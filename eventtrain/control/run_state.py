"""The records of a checkpoint besides arrays, from which a run continues exactly: plain JSON data, validated.

Each ``kind`` is part of the format on disk, so it does not follow the name of its class.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from pydantic import Field, model_validator

from eventtrain.bus.barrier import SubscriptionCheckpoint
from eventtrain.events import parse_event
from eventtrain.events.commands import AnyCommand
from eventtrain.events.models import Array, Frozen, Number

BEFORE_END = "before-end"
"""Tag of the state before the end of a run, if that is another one. Kept snapshots of it: ``before-end/<tag>``."""


class SavedReduction(Frozen):
    """How a metric with a reduction of its own is reduced, and the weight of the rows so far that have a value."""

    how: Literal["mean", "sum", "max", "last"]
    weight: str | None = None
    total: float = 0.0


class SavedMeans(Frozen):
    """The sums behind the means of an epoch or an evaluation; for metrics in ``reductions``, what they reduce to."""

    sums: dict[str, float] = Field(default_factory=dict)
    total: float = 0.0
    reductions: dict[str, SavedReduction] = Field(default_factory=dict)


class SavedCommand(Frozen):
    """A command that was not due when the checkpoint was taken."""

    kind: Literal["saved_order"] = "saved_order"
    command: AnyCommand
    cause_step: int = Field(ge=0)
    cause_seq: int = Field(ge=0)
    subscriber: str
    issue: int = Field(ge=0)


class LoopRecord(Frozen):
    """The state of the training loop.

    Attributes:
        step, epoch, batch: completed; ``batch`` counts those of the epoch in progress.
        in_epoch: EpochStarted of ``epoch`` was published, and EpochCompleted was not.
        step_started: StepStarted of the next step was published, for deciders.
        evaluation: how far the evaluation of this boundary is.
        evaluated_batches: of the evaluation that was cut short at this boundary, of its set in progress; None if none
            was.
        evaluated_sets: number of batches of each set before that.
        epoch_first_step: steps completed before the epoch in progress.
        start_step, start_epoch: completed when the call of ``fit`` began whose aim the run has.
        epochs, steps: the aim of that call; both None in a session.
        ended: why the run ended, if a command ended it for good.
        data: the state of the data's iterator after the last batch trained on, by ``pack``; None if it has none.
        batch_crc32: of that batch, to be compared where a resumed run makes it again; None if it is not known.
        orders: commands that were not due.
        deterministic: nothing that depends on timing has taken effect.
        fingerprint: what an exact continuation depends on: versions, devices, options.
        attempt: of the run, when the checkpoint was taken.
        given: path -> value, of the hyperparameters that this call of ``fit`` was given.
    """

    kind: Literal["loop_facts"] = "loop_facts"
    step: int = Field(ge=0)
    epoch: int = Field(ge=0)
    batch: int = Field(ge=0)
    in_epoch: bool
    step_started: bool = False
    evaluation: Literal["none", "pending", "done"] = "none"
    evaluated_batches: int | None = Field(default=None, ge=0)
    evaluated_sets: tuple[int, ...] = ()
    epoch_first_step: int = Field(ge=0)
    start_step: int = Field(ge=0)
    start_epoch: int = Field(ge=0)
    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    ended: str | None = None
    data: Any = None
    batch_crc32: int | None = None
    orders: tuple[SavedCommand, ...] = ()
    deterministic: bool = True
    fingerprint: dict[str, Any] = Field(default_factory=dict)
    attempt: int = Field(default=1, ge=1)
    given: dict[str, Number] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        first = self.epoch_first_step
        if self.batch != (self.step - first if self.in_epoch else 0) or first > self.step:
            raise ValueError(
                f"batch {self.batch} of the epoch in progress contradicts step {self.step} and epoch_first_step {first}"
            )
        if self.start_step > self.step or self.start_epoch > self.epoch:
            raise ValueError("start_step or start_epoch is after the checkpoint")
        for order in self.orders:
            due = order.command.due
            if due is None or due < self.step or order.cause_step > self.step:
                raise ValueError(
                    f"a pending {order.command.kind} of {order.subscriber} is due at {due}, not later"
                )
        unpack(self.data)
        return self


class StreamRecord(Frozen):
    """The state of the training stream.

    Attributes:
        seq: number of the last event before the marker.
        epoch_means: of the epoch in progress.
        eval_means: of the evaluation that was cut short.
        evaluated: means of the epoch's last evaluation, for its EpochCompleted.
        epoch_states, eval_states: of the metrics with state, in the epoch in progress and in the evaluation that was
            cut short.
        eval_metrics, eval_arrays: of the sets that this evaluation has finished.
        watched: values of the hyperparameters that follow a schedule.
    """

    kind: Literal["stream_facts"] = "stream_facts"
    seq: int = Field(default=0, ge=0)
    epoch_means: SavedMeans = SavedMeans()
    eval_means: SavedMeans = SavedMeans()
    evaluated: dict[str, Number] | None = None
    epoch_states: tuple[Array, ...] = ()
    eval_states: tuple[Array, ...] = ()
    eval_metrics: dict[str, Number] = Field(default_factory=dict)
    eval_arrays: dict[str, Array] = Field(default_factory=dict)
    watched: dict[str, Number] = Field(default_factory=dict)


class SavedSubscription(Frozen):
    """``SubscriptionCheckpoint`` of one subscription as JSON."""

    kind: Literal["saved_share"] = "saved_share"
    state: dict[str, Any] | None = None
    unhandled: tuple[dict[str, Any], ...] = ()
    decided_on: tuple[bool, ...] = ()
    spent: bool = False
    disabled: bool = False
    failures: int = Field(default=0, ge=0)
    error: str | None = None
    about: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _can_be_restored(self) -> Self:
        if len(self.unhandled) != len(self.decided_on):
            raise ValueError(
                f"{len(self.unhandled)} unhandled events and {len(self.decided_on)} values of decided_on"
            )
        self.share()
        return self

    @classmethod
    def of(cls, share: SubscriptionCheckpoint) -> SavedSubscription:
        """Returns the record of ``share``, without its state and events if the state is not plain JSON data."""
        try:
            _require_plain(share.state)
        except (TypeError, ValueError, RecursionError) as error:
            problem = f"state_dict() must return plain JSON data: {error}"
            share = replace(share, state=None, unhandled=(), decided_on=(), error=problem)
        return cls(
            state=None if share.state is None else dict(share.state),
            unhandled=tuple(event.model_dump(mode="json") for event in share.unhandled),
            decided_on=share.decided_on,
            spent=share.spent,
            disabled=share.disabled,
            failures=share.failures,
            error=share.error,
            about=dict(share.about),
        )

    def share(self) -> SubscriptionCheckpoint:
        """Returns what the subscription gave. Raises EventParseError if an event cannot be read."""
        events = tuple(parse_event(data) for data in self.unhandled)
        return SubscriptionCheckpoint(
            state=self.state,
            unhandled=events,
            decided_on=self.decided_on,
            spent=self.spent,
            disabled=self.disabled,
            failures=self.failures,
            error=self.error,
            about=self.about,
        )


class HostRecord(Frozen):
    """The part of another process than process 0 in a ``RunRecord``.

    Attributes:
        data, batch_crc32: as in ``LoopRecord``.
        shares: of the subscriptions with ``per_host``.
    """

    kind: Literal["host_facts"] = "host_facts"
    data: Any = None
    batch_crc32: int | None = None
    shares: dict[str, SavedSubscription] = Field(default_factory=dict)

    @classmethod
    def of(cls, record: RunRecord) -> HostRecord:
        """Returns the part of the process that made ``record``."""
        return cls(data=record.loop.data, batch_crc32=record.loop.batch_crc32, shares=record.shares)


class RunRecord(Frozen):
    """Everything of one checkpoint that is not an array.

    Attributes:
        processes: of the run.
        hosts: the parts of the processes 1, 2 and so on, by their index.
        before_end: if the end of a run had begun: the run before it, from which one with a higher aim continues. Its
            snapshots have the tags of ``BEFORE_END``.
    """

    kind: Literal["run_facts"] = "run_facts"
    schema_version: Literal[1] = 1
    loop: LoopRecord
    stream: StreamRecord
    shares: dict[str, SavedSubscription]
    processes: int = Field(default=1, ge=1)
    hosts: dict[int, HostRecord] = Field(default_factory=dict)
    before_end: RunRecord | None = None

    def of_process(self, index: int) -> RunRecord:
        """Returns the record as the process with this index resumes from it.

        A process that was not part of the run has neither a state of its data's iterator nor of its own subscribers.
        """
        if index == 0:
            return self
        host = self.hosts.get(index, HostRecord())
        loop = self.loop.model_copy(update={"data": host.data, "batch_crc32": host.batch_crc32, "orders": ()})
        before_end = None if self.before_end is None else self.before_end.of_process(index)
        return self.model_copy(update={"loop": loop, "shares": host.shares, "before_end": before_end})

    def with_hosts(self, others: Mapping[int, RunRecord]) -> RunRecord:
        """Returns the record of process 0 with the parts of the other processes."""
        hosts = {index: HostRecord.of(record) for index, record in others.items()}
        before_end = self.before_end
        if before_end is not None:
            ends = {index: one.before_end for index, one in others.items() if one.before_end is not None}
            before_end = before_end.with_hosts(ends)
        return self.model_copy(
            update={"processes": len(others) + 1, "hosts": hosts, "before_end": before_end}
        )

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        step, seq = self.loop.step, self.stream.seq
        for order in self.loop.orders:
            if order.cause_seq > seq:
                raise ValueError(f"the cause of a pending {order.command.kind} is after the checkpoint")
        for name, share in self.shares.items():
            for event, decided_on in zip(share.unhandled, share.decided_on, strict=True):
                if decided_on and (
                    event["step"] > step or event["seq"] > seq
                ):  # others have their own numbers
                    raise ValueError(f"an event that {name} has not handled is after the checkpoint")
        return self


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

    def kept(self, like: Any, *, before_end: bool) -> dict[str, tuple[int, Any]]:
        """Returns other snapshots: tag -> step, and state placed as ``like``.

        Args:
            before_end: those of ``RunRecord.before_end``, instead of those that the rest of the run needs.
        """
        ...


def _require_plain(state: Any) -> None:
    """Raises TypeError or ValueError unless ``state`` comes back from JSON as it is, with lists for tuples."""
    json.dumps(state)
    waiting = [state]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            for key in value:  # pyright: ignore[reportUnknownVariableType]
                if not isinstance(key, str):
                    raise TypeError(f"the key {key!r} is not text, and would come back as text")
            waiting += value.values()  # pyright: ignore[reportUnknownArgumentType]
        elif isinstance(value, (list, tuple)):
            waiting += value  # pyright: ignore[reportUnknownArgumentType]


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
    """Returns what ``pack`` was given, with lists for tuples. Raises ValueError if ``pack`` did not make ``data``."""
    match data:
        case {"base64": str(text)}:
            return base64.b64decode(text, validate=True)
        case {"list": list(items)}:
            return [unpack(item) for item in items]  # pyright: ignore[reportUnknownVariableType]
        case {"mapping": list(pairs)} if all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):  # pyright: ignore
            return {_hashable(unpack(key)): unpack(value) for key, value in pairs}  # pyright: ignore
        case None | bool() | int() | float() | str():
            return data
        case _:
            raise ValueError("the state of the data's iterator is not what a checkpoint holds")


def _hashable(key: Any) -> Any:
    if isinstance(key, (list, dict)):
        raise ValueError("a key of the state of the data's iterator is a list or a dict")
    return key
