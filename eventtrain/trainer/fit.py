"""The epochs of ``fit``, driven on a ``Run`` as a user's own loop may drive a session. Training thread only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from eventtrain.control.run_state import LoopRecord
from eventtrain.data.prefetch import EpochIterator
from eventtrain.data.sources import position_in, rewound
from eventtrain.events import EpochCompleted
from eventtrain.loop.run_recorder import Aim
from eventtrain.trainer.resume import ResumePoint
from eventtrain.trainer.run import Run

S = TypeVar("S")


@dataclass(frozen=True)
class FitResult(Generic[S]):
    """The result of ``fit``. Its repr leaves out the state and the history, which may fill many screens.

    Attributes:
        state: the state reached, on the device. It belongs to the caller. With a step extension whose ``use_for`` has
            "final" it holds the weights of the extension; ``trainer.state`` holds those that training continues with.
        step: updates completed over the trainer's life.
        epochs_completed: of this call.
        stop_reason: "completed", or the reason given to ``control.stop``, "interrupted", "preempted", "cancelled".
        history: the EpochCompleted events of this call, of more than 10,000 epochs the newest 10,000. All are in a log,
            and ``subscribers.History(max_epochs=...)`` keeps as many as you want.
        undelivered: subscription name -> events not handled within ``drain_timeout_s``; empty if all were.
    """

    state: S = field(repr=False)
    step: int
    epochs_completed: int
    stop_reason: str
    history: list[EpochCompleted] = field(repr=False)
    undelivered: Mapping[str, int]


def train(run: Run, data: Any, aim: Aim, point: ResumePoint | None = None) -> None:
    """Train epoch after epoch until ``aim`` is reached or the run has to end.

    Args:
        run: has begun.
        data: as for ``Trainer.fit``.
        aim: what is still to do: epochs or steps.
        point: where the first epoch continues, if the run resumes.
    """
    steps_left, epochs_left = aim.steps, aim.epochs
    for_data = run.resources.clock.for_data
    record = point.record.loop if point is not None else None
    start_of_data = position_in(data) if record is not None else None
    if point is not None and point.ended is not None:
        # Nothing is trained, but what is due at the end of the run still is.
        _prepare_without_a_step(run, data, start_of_data)
        return
    # An epoch that was cut short behind the last step of the aim still has to end.
    while (record is not None and record.in_epoch) or (
        (epochs_left is None or epochs_left > 0) and (steps_left is None or steps_left > 0)
    ):
        batches = for_data(partial(_open, run, data, record))  # it fetches the first batch
        try:
            group = for_data(batches.next)
            if group is not None:
                run.prepare(group.batches if run.grouped else group.batches[0])
            elif record is None or not record.in_epoch or not batches.exhausted:
                return
            elif not _prepare_without_a_step(run, data, start_of_data):
                return  # all of the epoch was trained on
            if not run.status.in_epoch and not run.begin_epoch():
                return
            record = None
            while group is not None and steps_left != 0:
                count = group.steps if steps_left is None else min(group.steps, steps_left)
                done = run.advance(group.batches, count, group.positions)
                if done < count:
                    return
                steps_left = None if steps_left is None else steps_left - done
                group = for_data(batches.next) if steps_left != 0 else None
        finally:
            batches.close()
        if run.status.stop_reason is not None or not run.end_epoch():
            return
        epochs_left = None if epochs_left is None else epochs_left - 1


def _prepare_without_a_step(run: Run, data: Any, start_of_data: Any) -> bool:
    """Compile for the first batch of the epoch, which is not trained on. Returns False if the run has to end.

    Args:
        start_of_data: the state of data that is one iterator, before it was moved to where the run resumes.
    """
    if run.source.model.compiled is not None:
        run.prepare(None)
        return True
    with rewound(data, start_of_data):
        batches = _open(run, data)
        try:
            group = batches.next()
        finally:
            batches.close()
    if group is not None:
        run.prepare(group.batches if run.grouped else group.batches[0])
    return group is not None


def _open(run: Run, data: Any, record: LoopRecord | None = None) -> EpochIterator:
    """Returns the batches of the epoch in progress, from where ``record`` says on."""
    return EpochIterator(
        data,
        run.status.epoch,
        steps_per_call=run.source.model.options.steps_per_call,
        sharding=run.sharding,
        waiter=run,
        start=record.batch if record is not None and record.in_epoch else 0,
        data_state=record.data if record is not None else None,
    )
