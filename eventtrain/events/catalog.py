"""Everything eventtrain says: frozen Pydantic models, plain numbers, never device arrays.

``step`` is always the number of optimiser updates completed when the event happened. Subclass ``Event`` for
events of your own. The bus stamps ``run_id``, ``seq`` and ``time`` when an event is published.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError

from eventtrain.errors import EventParseError
from eventtrain.events.base import EpochEvent, Event, RunEvent
from eventtrain.events.commands import Cause, CommandApplied, CommandRejected
from eventtrain.events.models import Columns, FrozenDict, Number, Numbers, Text

# --- the run -------------------------------------------------------------------------------------------


TO_BE_CONTINUED = frozenset({"interrupted", "preempted", "cancelled", "failed"})
"""Reasons for which a run ends from outside: another one may go on from its state, which stays as it is."""


class RunStarted(RunEvent):
    """A run begins; the first event of its stream. ``step``: steps completed before it."""


class RunResumed(RunEvent):
    """A run goes on from a checkpoint; no part of the training sequence, which goes on where the cut was."""

    epoch: int
    batch: int
    """Batches of the epoch trained on before."""
    path: str
    """Of the checkpoint."""


class RunCompleted(RunEvent):
    """``reason``: "completed", the reason given to ``stop``, "interrupted", "preempted", "cancelled"."""

    reason: Text
    deterministic: bool = True
    """False when something that depends on timing took effect: a command without a finite lag that changed
    the run, or a decider that exceeded its ``timeout_s``."""


class RunFailed(RunEvent):
    """The run ended with ``error`` ("Type: message"); nothing of its training sequence follows."""

    error: Text


# --- epochs and steps ----------------------------------------------------------------------------------


class EpochStarted(EpochEvent):
    """Before the first step of an epoch, with the ``hyperparams`` then in effect."""

    hyperparams: Numbers = Field(default_factory=FrozenDict)


class EpochCompleted(EpochEvent):
    """``metrics``: the mean of each metric over the epoch's steps (float64), evaluation's with ``val_``."""

    metrics: Numbers
    hyperparams: Numbers = Field(default_factory=FrozenDict)
    steps: int
    duration_s: float
    """From the epoch's first dispatch until its last step was complete on the device."""


class StepStarted(Event):
    """The update ``step + 1`` is about to be dispatched; ``batch`` is its 0-based index within the epoch."""

    epoch: int
    batch: int


class StepCompleted(Event):
    """One optimiser update. ``batch`` is the 0-based index within the epoch."""

    epoch: int
    batch: int
    metrics: Numbers


class StepsCompleted(Event):
    """A window of consecutive steps of one epoch, by columns; ``step`` is ``last_step``."""

    first_step: int
    last_step: int
    epoch: int
    first_batch: int = 0
    """The 0-based index within the epoch of ``first_step``."""
    metrics: Columns

    def is_multiple_of(self, every: int) -> bool:
        """Whether the window holds a step that is a multiple of ``every``."""
        return self.last_step // every > (self.first_step - 1) // every


# --- evaluation and prediction -------------------------------------------------------------------------


class EvalStarted(Event):
    """An evaluation begins, of the state after ``step`` updates."""

    epoch: int


class EvalStepCompleted(Event):
    """One batch was evaluated; ``batch`` is its 0-based index."""

    epoch: int
    batch: int
    metrics: Numbers


class EvalCompleted(Event):
    """``metrics``: weighted means over the evaluation data, without a prefix."""

    epoch: int
    metrics: Numbers
    steps: int
    duration_s: float


class PredictStarted(Event):
    """``predict`` begins."""


class PredictStepCompleted(Event):
    """The outputs of one batch are on the host; ``batch`` is its 0-based index."""

    batch: int


class PredictCompleted(Event):
    """``predict`` is through with ``steps`` batches."""

    steps: int
    duration_s: float


# --- control -------------------------------------------------------------------------------------------


class HyperparamChanged(Event):
    """``old`` and ``new`` are the values on the device; step ``step + 1`` is the first computed with ``new``.

    A command that leaves the value as it was is answered by CommandApplied only.
    """

    name: str
    path: str
    old: Number
    new: Number
    reason: Text = ""
    cause: Cause | None = None


class CommandConflict(Event):
    """Two subscribers set the same hyperparameter at one boundary; the last of ``subscribers`` had the last word."""

    name: str
    path: str
    subscribers: tuple[str, ...]
    cause_step: int


class SnapshotTaken(Event):
    """The device state of this boundary is kept under ``tag``; ``epoch``: epochs completed."""

    tag: str
    purpose: Literal["snapshot", "checkpoint"] = "snapshot"
    epoch: int = 0
    requested_by: str | None = None
    """The subscriber whose schedule asked for it; None where a command did."""


# --- checkpoints ---------------------------------------------------------------------------------------


class CheckpointStarted(Event):
    """A Checkpointer begins to write the state of ``step`` to ``path``."""

    lifecycle: ClassVar[bool] = True
    path: str
    tag: str | None = None


class CheckpointCommitted(Event):
    """The checkpoint stands on disk under its final name; from now on it can be restored."""

    lifecycle: ClassVar[bool] = True
    path: str
    tag: str | None = None
    size_bytes: int
    duration_s: float


class CheckpointFailed(Event):
    """The state of ``step`` was not made durable, and why; training goes on."""

    lifecycle: ClassVar[bool] = True
    path: str
    """Empty where nothing was begun."""
    tag: str | None = None
    error: Text
    requested_by: str | None = None
    """The Checkpointer concerned; None where a command asked all of them."""


class CheckpointSkipped(Event):
    """The state of ``step`` was wanted and not kept: ``in_flight`` checkpoints were still being written."""

    lifecycle: ClassVar[bool] = True
    tag: str | None = None
    requested_by: str
    in_flight: int


class CheckpointUploaded(Event):
    """The checkpoint of ``path`` lies at ``url`` as well, whole and verified; ``step`` is that of its state."""

    lifecycle: ClassVar[bool] = True
    path: str
    url: str
    tag: str | None = None
    size_bytes: int
    duration_s: float


class CheckpointUploadFailed(Event):
    """The checkpoint of ``path`` was not copied to below ``url``, and why; what lies on this machine is whole."""

    lifecycle: ClassVar[bool] = True
    path: str
    url: str
    tag: str | None = None
    error: Text


class CheckpointRestored(Event):
    """A kept state was put back."""

    lifecycle: ClassVar[bool] = True
    path: str = ""
    tag: str | None = None
    part: Literal["all", "params"] = "all"
    restored_step: int
    """The step whose state was put back; ``step`` itself never goes back."""

    def is_multiple_of(self, every: int) -> bool:
        """True: whoever looks at every so many steps has to know that what it saw before no longer holds."""
        return True


# --- subscribers and alerts ----------------------------------------------------------------------------


class SubscriberFailed(Event):
    """One attempt to handle an event raised; ``event_kind`` is the kind of that event."""

    subscriber: str
    event_kind: str
    error: Text
    attempt: int = 1


class SubscriberLagged(Event):
    """``dropped`` events were dropped since the last SubscriberLagged of this subscriber."""

    subscriber: str
    dropped: int


class SubscriberDisabled(Event):
    """A subscription was switched off after failures: it receives nothing more."""

    subscriber: str
    reason: Text


class AlertRaised(Event):
    """A rule was met; it is not raised again before it is resolved."""

    lifecycle: ClassVar[bool] = True
    name: str
    severity: Literal["info", "warning", "critical"] = "warning"
    message: Text = ""
    metric: str | None = None
    value: Number | None = None


class AlertResolved(Event):
    """The rule of an alert is no longer met."""

    lifecycle: ClassVar[bool] = True
    name: str
    message: Text = ""


class LoopStalled(Event):
    """Training waited ``waited_s`` seconds so far for ``subscriber``, whose Lossless queue is at its limit."""

    subscriber: str
    waited_s: float


# --- the machine ---------------------------------------------------------------------------------------


class MachineMeasured(Event):
    """What a subscriber measured beside the training: the machine, or where the loop's time goes.

    ``metrics`` holds what could be measured; what this machine does not tell is left out. Units stand in the names.
    """

    source: str
    """Name of the subscriber that measured."""
    metrics: Numbers


class ProfileCaptured(Event):
    """JAX's profiler traced the steps ``first_step`` to ``last_step``; what it saw lies in the folder ``path``."""

    lifecycle: ClassVar[bool] = True
    path: str
    first_step: int
    last_step: int
    duration_s: float
    """How long training was held until the trace was written."""


BUILT_IN: tuple[type[Event], ...] = (
    RunStarted,
    RunResumed,
    RunCompleted,
    RunFailed,
    EpochStarted,
    EpochCompleted,
    StepStarted,
    StepCompleted,
    StepsCompleted,
    EvalStarted,
    EvalStepCompleted,
    EvalCompleted,
    PredictStarted,
    PredictStepCompleted,
    PredictCompleted,
    HyperparamChanged,
    CommandApplied,
    CommandRejected,
    CommandConflict,
    SnapshotTaken,
    CheckpointStarted,
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointSkipped,
    CheckpointUploaded,
    CheckpointUploadFailed,
    CheckpointRestored,
    SubscriberFailed,
    SubscriberLagged,
    SubscriberDisabled,
    AlertRaised,
    AlertResolved,
    LoopStalled,
    MachineMeasured,
    ProfileCaptured,
)
"""Every concrete event class of eventtrain."""

TRAINING_SEQUENCE: tuple[type[Event], ...] = (
    RunStarted,
    RunCompleted,
    RunFailed,
    EpochStarted,
    EpochCompleted,
    StepStarted,
    StepCompleted,
    EvalStarted,
    EvalStepCompleted,
    EvalCompleted,
    HyperparamChanged,
    CommandApplied,
)
"""The events that a rerun repeats exactly (of CommandApplied, those with a finite lag)."""

LOOP_EVENTS: tuple[type[Event], ...] = tuple(
    kind for kind in TRAINING_SEQUENCE if kind not in (CommandApplied, HyperparamChanged)
)
"""What a subscription with a finite lag may react to: published by the loop, and no answer to a command."""


def parse_event(source: str | bytes | Mapping[str, Any], types: Iterable[type[Event]] = ()) -> Event:
    """Read one event back from its JSON (or from the dict that its JSON holds).

    Args:
        source: what ``event.model_dump_json()`` gave, or ``event.model_dump(mode="json")``.
        types: your own event classes; the built-in ones are always known.

    Returns:
        An event equal to the one written, NaN and infinities included.

    Raises:
        EventParseError: no JSON object, an unknown ``kind``, a newer ``schema_version``, or wrong fields.
    """
    if isinstance(source, Mapping):
        data: Any = dict(source)
    else:
        try:
            data = json.loads(source)
        except (ValueError, TypeError) as error:
            raise EventParseError(f"Cannot read an event: the text is no JSON ({error}).") from error
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
        raise EventParseError("Cannot read an event: it needs to be a JSON object with a 'kind'.")
    classes = {_kind(kind): kind for kind in (*BUILT_IN, *types)}
    found = classes.get(data["kind"])
    if found is None:
        raise EventParseError(
            f"Cannot read an event of kind {data['kind']!r}: no class of that kind is known. "
            "Pass your own event classes as types=(YourEvent,)."
        )
    known = found.model_fields["schema_version"].default
    if isinstance(data.get("schema_version"), int) and data["schema_version"] > known:
        raise EventParseError(
            f"Cannot read this {data['kind']}: it has schema_version {data['schema_version']}, and this program "
            f"knows up to {known}. Read it with the newer version that wrote it."
        )
    try:
        return found.model_validate_json(json.dumps(data) if isinstance(source, Mapping) else source)
    except ValidationError as error:
        raise EventParseError(f"Cannot read this {data['kind']}: {error}") from error


def events_json_schema(types: Iterable[type[Event]] = ()) -> dict[str, Any]:
    """The JSON Schema of all events, built in and given, as one union told apart by ``kind``."""
    classes = (*BUILT_IN, *types)
    _, schema = TypeAdapter.json_schemas(
        [(_kind(kind), "serialization", TypeAdapter(kind)) for kind in classes], title="eventtrain events"
    )
    definitions: dict[str, Any] = schema["$defs"]
    references = {_kind(kind): f"#/$defs/{kind.__name__}" for kind in classes}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "eventtrain events",
        "oneOf": [{"$ref": reference} for reference in references.values()],
        "discriminator": {"propertyName": "kind", "mapping": references},
        "$defs": definitions,
    }


def _kind(event_type: type[Event]) -> str:
    return event_type.model_fields["kind"].default
