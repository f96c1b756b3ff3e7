"""What the loop and its stream add to a cut, besides arrays and the subscribers' shares: plain JSON data, validated."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from eventtrain.events.commands import AnyCommand
from eventtrain.events.models import Frozen, Number


class SavedMeans(Frozen):
    """The sums behind the means of an epoch or an evaluation."""

    sums: dict[str, float] = Field(default_factory=dict)
    total: float = 0.0


class SavedCommand(Frozen):
    """A command on its way: not due yet when the cut was taken."""

    command: AnyCommand
    cause_step: int
    cause_seq: int
    subscriber: str
    issue: int


class LoopRecord(Frozen):
    """Where the loop was.

    Attributes:
        step, epoch, batch: completed; ``batch`` counts those of the epoch in progress.
        in_epoch: EpochStarted of ``epoch`` was said.
        step_started: StepStarted of the next step was said, for deciders.
        evaluation: how far the evaluation of this boundary is, if there is one.
        evaluated_batches: of the evaluation that was cut short at this boundary; None if none was.
        epoch_first_step: completed before the epoch in progress.
        start_step, start_epoch: completed when the call of ``fit`` began whose aim is pursued.
        data: the state of the data's iterator after the last batch trained on, by ``pack``; None where it has none.
        epochs, steps: what that call aimed at; both None for a session of one's own.
        ended: why the run ended, where a command ended it for good.
        orders: commands that are not due yet.
        deterministic: nothing that depends on timing has taken effect.
        fingerprint: what an exact continuation depends on: versions, devices, options.
    """

    step: int
    epoch: int
    batch: int
    in_epoch: bool
    step_started: bool = False
    evaluation: Literal["none", "pending", "done"] = "none"
    evaluated_batches: int | None = None
    epoch_first_step: int
    start_step: int
    start_epoch: int
    epochs: int | None = None
    steps: int | None = None
    ended: str | None = None
    data: Any = None
    orders: tuple[SavedCommand, ...] = ()
    deterministic: bool = True
    fingerprint: dict[str, Any] = Field(default_factory=dict)


class StreamRecord(Frozen):
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
