"""The built-in events: frozen Pydantic models of plain numbers, never device arrays.

``step`` is always the number of optimiser updates completed when the event happened. Subclass ``Event`` for your own
events. The bus stamps ``run_id``, ``attempt``, ``stream``, ``seq`` and ``time`` when an event is
published.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from eventtrain.events.base import EpochEvent, Event, LifecycleEvent, RunEvent
from eventtrain.events.commands import Cause, CommandApplied, CommandRejected
from eventtrain.events.models import Arrays, ByKind, Columns, FrozenDict, Number, Numbers, Text
from eventtrain.events.samples import Media, SampleValue

__all__ = [
    "ActionRequested",
    "AlertRaised",
    "AlertResolved",
    "CheckpointCommitted",
    "CheckpointFailed",
    "CheckpointRestored",
    "CheckpointSkipped",
    "CheckpointStarted",
    "CheckpointUploadFailed",
    "CheckpointUploaded",
    "CommandApplied",
    "CommandConflict",
    "CommandRejected",
    "EpochCompleted",
    "EpochStarted",
    "EvalCompleted",
    "EvalStarted",
    "EvalStepCompleted",
    "HyperparamChanged",
    "LoopStalled",
    "MachineMeasured",
    "PeerLost",
    "PredictCompleted",
    "PredictStarted",
    "PredictStepCompleted",
    "ProfileCaptured",
    "RunCompleted",
    "RunFailed",
    "RunResumed",
    "RunStarted",
    "SampleTaken",
    "SnapshotTaken",
    "StagingLimited",
    "StepCompleted",
    "StepStarted",
    "StepsCompleted",
    "SubscriberDisabled",
    "SubscriberFailed",
    "SubscriberLagged",
]

TO_BE_CONTINUED = frozenset({"interrupted", "preempted", "cancelled", "failed"})
"""Reasons of runs that were ended from outside. Another run can continue from their state."""


class RunStarted(RunEvent):
    """A run begins: the first event of its stream. ``step`` counts the updates completed before it."""

    kind: Literal["run_started"] = "run_started"
    params_count: int | None = None
    """Numbers in the weights; None if the trainer cannot tell which arrays they are."""
    state_bytes: int | None = None
    """Size of the state over all devices, a replicated array counted once."""


class RunResumed(RunEvent):
    """A run continues from a checkpoint; published in place of RunStarted.

    The one event of the training sequence that an uninterrupted run does not have.
    """

    kind: Literal["run_resumed"] = "run_resumed"
    epoch: int
    batch: int
    """Number of batches of the epoch that were trained on before."""
    path: str
    """Path of the checkpoint."""


class RunCompleted(RunEvent):
    """``reason``: "completed", the reason given to ``stop``, "interrupted", "preempted" or "cancelled"."""

    kind: Literal["run_completed"] = "run_completed"
    reason: Text
    deterministic: bool = True
    """False if something that depends on timing took effect: a command without a finite lag that changed the run, or
    a handler with a finite lag that exceeded its ``timeout_s``."""


class RunFailed(RunEvent):
    """The run ended with ``error`` ("Type: message"). No event of its training sequence follows."""

    kind: Literal["run_failed"] = "run_failed"
    error: Text


class PeerLost(RunEvent):
    """Another process of the run failed, or gives no sign of life: this one cannot continue.

    If ``fit`` does not return because it waits for the other process inside a computation, the process ends itself
    with exit code 75 within 15 s.
    """

    kind: Literal["peer_lost"] = "peer_lost"
    process: int  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]  # never forwarded, so never None
    """``jax.process_index()`` of the other process."""
    error: Text


class EpochStarted(EpochEvent):
    """An epoch begins, with the ``hyperparams`` in effect before its first step."""

    kind: Literal["epoch_started"] = "epoch_started"
    hyperparams: Numbers = Field(default_factory=FrozenDict)


class EpochCompleted(EpochEvent):
    """``metrics``: the mean of each metric over the epoch's steps (float64); of the evaluation with prefix ``val_``."""

    kind: Literal["epoch_completed"] = "epoch_completed"
    metrics: Numbers
    arrays: Arrays = Field(default_factory=FrozenDict)
    """Results of metrics with state of ``step_fn`` that are not scalars: read-only NumPy arrays."""
    hyperparams: Numbers = Field(default_factory=FrozenDict)
    steps: int
    duration_s: float
    """From the epoch's first dispatch until its last step was complete on the device."""


class StepStarted(Event):
    """The update ``step + 1`` is about to be dispatched. ``batch`` is its 0-based index within the epoch."""

    kind: Literal["step_started"] = "step_started"
    epoch: int
    batch: int


class StepCompleted(Event):
    """One optimiser update. ``batch`` is the 0-based index within the epoch."""

    kind: Literal["step_completed"] = "step_completed"
    epoch: int
    batch: int
    metrics: Numbers


class StepsCompleted(Event):
    """A window of consecutive steps of one epoch, as columns. ``step`` is ``last_step``."""

    kind: Literal["steps_completed"] = "steps_completed"
    first_step: int
    last_step: int
    epoch: int
    first_batch: int = 0
    """0-based index of ``first_step`` within the epoch."""
    metrics: Columns

    def is_multiple_of(self, every: int) -> bool:
        """Returns whether a step of the window is a multiple of ``every``."""
        return self.last_step // every > (self.first_step - 1) // every


class EvalStarted(Event):
    """An evaluation of the state after ``step`` updates begins."""

    kind: Literal["eval_started"] = "eval_started"
    epoch: int


class EvalStepCompleted(Event):
    """One batch was evaluated. ``batch`` is its 0-based index."""

    kind: Literal["eval_step_completed"] = "eval_step_completed"
    epoch: int
    batch: int
    metrics: Numbers


class EvalCompleted(Event):
    """``metrics``: weighted means over the evaluation data, and what metrics with state computed; without a prefix."""

    kind: Literal["eval_completed"] = "eval_completed"
    epoch: int
    metrics: Numbers
    arrays: Arrays = Field(default_factory=FrozenDict)
    """Results of metrics with state that are not scalars, such as a confusion matrix: read-only NumPy arrays."""
    steps: int
    duration_s: float


class PredictStarted(Event):
    """``predict`` begins."""

    kind: Literal["predict_started"] = "predict_started"


class PredictStepCompleted(Event):
    """The outputs of one batch are on the host. ``batch`` is its 0-based index."""

    kind: Literal["predict_step_completed"] = "predict_step_completed"
    batch: int


class PredictCompleted(Event):
    """``predict`` has finished ``steps`` batches."""

    kind: Literal["predict_completed"] = "predict_completed"
    steps: int
    duration_s: float


class HyperparamChanged(Event):
    """``old`` and ``new`` are the values on the device. Step ``step + 1`` is the first computed with ``new``.

    A command that does not change the value is answered by CommandApplied only.
    """

    kind: Literal["hyperparam_changed"] = "hyperparam_changed"
    name: str
    path: str
    old: Number
    new: Number
    reason: Text = ""
    cause: Cause | None = None
    source: str | None = None
    """The way by which the command came from outside the program, such as "dashboard"; None: the program issued it."""


class CommandConflict(Event):
    """Two subscribers set one hyperparameter at one boundary. The value of the last of ``subscribers`` is in effect."""

    kind: Literal["command_conflict"] = "command_conflict"
    name: str
    path: str
    subscribers: tuple[str, ...]
    cause_step: int


class SnapshotTaken(Event):
    """The device state of this boundary is kept under ``tag``. ``epoch``: epochs completed."""

    kind: Literal["snapshot_taken"] = "snapshot_taken"
    tag: str
    purpose: Literal["snapshot", "checkpoint"] = "snapshot"
    epoch: int = 0
    requested_by: str | None = None
    """The subscriber whose schedule requested it; None if a command did."""


class SampleTaken(Event):
    """The model has made a sample from the state of ``step``, as a ``subscribers.Sample`` says."""

    kind: Literal["sample_taken"] = "sample_taken"
    name: Text
    media: Media
    value: SampleValue
    """By ``media``: a str; the bytes of a PNG file (base64 in JSON); a read-only NumPy array (dtype, shape and flat
    values in JSON); or name -> column of a table, with numbers, text and None."""


class ActionRequested(LifecycleEvent):
    """A person pressed the button ``name`` of a dashboard (``subscribers.Dashboard(actions=...)``)."""

    kind: Literal["action_requested"] = "action_requested"
    name: str

    def is_multiple_of(self, every: int) -> bool:
        """Returns True: a person who asks does not look at the step."""
        return True


class CheckpointStarted(LifecycleEvent):
    """A Checkpointer begins to write the state of ``step`` to ``path``."""

    kind: Literal["checkpoint_started"] = "checkpoint_started"
    path: str
    tag: str | None = None


class CheckpointCommitted(LifecycleEvent):
    """The checkpoint is on disk under its final name and can be restored from now on."""

    kind: Literal["checkpoint_committed"] = "checkpoint_committed"
    path: str
    tag: str | None = None
    size_bytes: int
    duration_s: float


class CheckpointFailed(LifecycleEvent):
    """The state of ``step`` was not written, because of ``error``. Training continues."""

    kind: Literal["checkpoint_failed"] = "checkpoint_failed"
    path: str
    """Empty if writing never began."""
    tag: str | None = None
    error: Text
    requested_by: str | None = None
    """The Checkpointer concerned; None if a command addressed all of them."""


class CheckpointSkipped(LifecycleEvent):
    """The state of ``step`` was requested but not kept, because ``in_flight`` checkpoints were still being written."""

    kind: Literal["checkpoint_skipped"] = "checkpoint_skipped"
    tag: str | None = None
    requested_by: str
    in_flight: int


class CheckpointUploaded(LifecycleEvent):
    """The checkpoint ``path`` was copied to ``url`` and verified. ``step`` is that of its state."""

    kind: Literal["checkpoint_uploaded"] = "checkpoint_uploaded"
    path: str
    url: str
    tag: str | None = None
    size_bytes: int
    duration_s: float


class CheckpointUploadFailed(LifecycleEvent):
    """The checkpoint ``path`` was not copied to ``url``, because of ``error``. The local copy is complete."""

    kind: Literal["checkpoint_upload_failed"] = "checkpoint_upload_failed"
    path: str
    url: str
    tag: str | None = None
    error: Text


class CheckpointRestored(LifecycleEvent):
    """The state of a snapshot or checkpoint was put back."""

    kind: Literal["checkpoint_restored"] = "checkpoint_restored"
    path: str = ""
    tag: str | None = None
    part: Literal["all", "params"] = "all"
    restored_step: int
    """The step whose state was put back. ``step`` itself never goes back."""

    def is_multiple_of(self, every: int) -> bool:
        """Returns True: a subscriber of every N-th step must learn that the state it saw before is gone."""
        return True


class SubscriberFailed(Event):
    """An attempt to handle an event raised. ``event_kind`` is the kind of that event.

    While a Lossless queue that wants these notices is at its limit, failures on one kind of event share a notice: the
    newest one, with their ``count``.
    """

    kind: Literal["subscriber_failed"] = "subscriber_failed"
    subscriber: str
    event_kind: str
    error: Text
    handler_attempt: int = 1
    count: int = 1
    """The number of failed attempts that it stands for."""


class SubscriberLagged(Event):
    """``dropped`` events were dropped since the last SubscriberLagged of this subscriber."""

    kind: Literal["subscriber_lagged"] = "subscriber_lagged"
    subscriber: str
    dropped: int


class SubscriberDisabled(Event):
    """A subscription was disabled after failures. It receives no more events."""

    kind: Literal["subscriber_disabled"] = "subscriber_disabled"
    subscriber: str
    reason: Text


class AlertRaised(LifecycleEvent):
    """The condition of an alert rule is met. It is not raised again until it is resolved."""

    kind: Literal["alert_raised"] = "alert_raised"
    name: str
    severity: Literal["info", "warning", "critical"] = "warning"
    message: Text = ""
    metric: str | None = None
    value: Number | None = None


class AlertResolved(LifecycleEvent):
    """The condition of an alert rule is no longer met."""

    kind: Literal["alert_resolved"] = "alert_resolved"
    name: str
    message: Text = ""


class LoopStalled(Event):
    """Training has waited ``waited_s`` seconds for ``subscriber``.

    Its Lossless queue is at its limit, it has not handled an event on which a step depends (finite lag), or it has not
    written its checkpoints yet (``when_full="wait"``).
    """

    kind: Literal["loop_stalled"] = "loop_stalled"
    subscriber: str
    waited_s: float


class StagingLimited(LifecycleEvent):
    """The state of ``step`` stays on the device until it is written: pinned host memory has no room for all of it.

    A longer wait for the disk then takes memory of the device, which may refuse the next checkpoint.
    """

    kind: Literal["staging_limited"] = "staging_limited"
    subscriber: str
    """Name of the Checkpointer that writes it."""
    size_bytes: int
    """Of the arrays to be written."""
    limit_bytes: int
    """Of the pinned host memory of the run, also for the checkpoints before this one; 0 if the device has none."""


class MachineMeasured(Event):
    """A measurement beside training: of the machine, or of where the loop's time goes.

    ``metrics`` holds what this machine can measure and omits the rest. Names contain the units.
    """

    kind: Literal["machine_measured"] = "machine_measured"
    source: str
    """Name of the subscriber that took the measurement."""
    metrics: Numbers


class ProfileCaptured(LifecycleEvent):
    """JAX's profiler traced the steps ``first_step`` to ``last_step`` into the folder ``path``."""

    kind: Literal["profile_captured"] = "profile_captured"
    path: str
    first_step: int
    last_step: int
    duration_s: float
    """Time that training waited until the trace was written."""


BUILT_IN: tuple[type[Event], ...] = tuple(globals()[name] for name in __all__)
"""Every concrete event class of eventtrain."""

TRAINING_SEQUENCE: tuple[type[Event], ...] = (
    RunStarted,
    RunResumed,
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
"""The events that a rerun repeats exactly (of CommandApplied, only those with a finite lag)."""

LOOP_EVENTS: tuple[type[Event], ...] = tuple(
    event_type for event_type in TRAINING_SEQUENCE if event_type not in (CommandApplied, HyperparamChanged)
)
"""Events that a subscription with a finite lag may react to: published by the loop, and not an answer to a command."""

AnyEvent = Annotated[
    ActionRequested
    | AlertRaised
    | AlertResolved
    | CheckpointCommitted
    | CheckpointFailed
    | CheckpointRestored
    | CheckpointSkipped
    | CheckpointStarted
    | CheckpointUploadFailed
    | CheckpointUploaded
    | CommandApplied
    | CommandConflict
    | CommandRejected
    | EpochCompleted
    | EpochStarted
    | EvalCompleted
    | EvalStarted
    | EvalStepCompleted
    | HyperparamChanged
    | LoopStalled
    | MachineMeasured
    | PeerLost
    | PredictCompleted
    | PredictStarted
    | PredictStepCompleted
    | ProfileCaptured
    | RunCompleted
    | RunFailed
    | RunResumed
    | RunStarted
    | SampleTaken
    | SnapshotTaken
    | StagingLimited
    | StepCompleted
    | StepStarted
    | StepsCompleted
    | SubscriberDisabled
    | SubscriberFailed
    | SubscriberLagged,
    ByKind(),
]
"""Any built-in event, told apart by ``kind``: for annotations, and for ``pydantic.TypeAdapter(et.AnyEvent)``."""
