"""The epochs of ``fit``, driven on a ``Run`` as a user's own loop may drive a session. Training thread only."""

from __future__ import annotations

from typing import Any

from eventtrain.control.run_state import LoopRecord
from eventtrain.data.batch_group import BatchGroup
from eventtrain.data.epoch_iterator import EpochIterator, Leftovers
from eventtrain.errors import DataError
from eventtrain.loop.run_recorder import Aim
from eventtrain.trainer.resume import ResumePoint
from eventtrain.trainer.run import Run


def train(run: Run, data: Any, aim: Aim, leftovers: Leftovers, point: ResumePoint | None = None) -> None:
    """Train epoch after epoch until ``aim`` is reached or the run has to end.

    Args:
        run: has begun.
        data: as for ``Trainer.fit``.
        aim: what is still to do: epochs or steps.
        leftovers: of the trainer.
        point: where the first epoch continues, if the run resumes.
    """
    steps_left, epochs_left = aim.steps, aim.epochs
    for_data = run.resources.clock.for_data
    record = point.record.loop if point is not None else None
    if point is not None and point.ended is not None:
        # Nothing is trained, but what is due at the end of the run still is.
        _prepare_without_a_step(run, data, leftovers)
        return
    # An epoch that was cut short behind the last step of the aim still has to end.
    while (record is not None and record.in_epoch) or (
        (epochs_left is None or epochs_left > 0) and (steps_left is None or steps_left > 0)
    ):
        batches = _open(run, data, leftovers, most=steps_left, record=record)
        try:
            group = for_data(batches.next)
            if group is None:
                return
            _prepare(run, group)
            if not run.status.in_epoch and not run.begin_epoch():
                return
            record = None
            while group is not None and steps_left != 0 and group.steps:
                count = group.steps if steps_left is None else min(group.steps, steps_left)
                done = run.advance(group.call, count, group)
                batches.used(done)
                if done < count:
                    return
                steps_left = None if steps_left is None else steps_left - done
                group = for_data(batches.next) if steps_left != 0 else None
        finally:
            batches.close()
        if run.status.stop_reason is not None:
            return
        if steps_left == 0:
            run.end_last_epoch()
            return
        if not run.end_epoch():
            return
        epochs_left = None if epochs_left is None else epochs_left - 1


def _prepare_without_a_step(run: Run, data: Any, leftovers: Leftovers) -> None:
    """Compile for the first batch of the epoch, which is not trained on."""
    if run.source.model.compiled is not None:
        run.prepare(None)
        return
    batches = _open(run, data, leftovers, most=0)
    try:
        group = batches.next()
    finally:
        batches.close()
    if group is not None:
        _prepare(run, group)


def _prepare(run: Run, group: BatchGroup) -> None:
    """Compile for a group. Without a batch in it, an earlier run must have compiled."""
    if group.call is None and run.source.model.compiled is None:
        raise DataError(
            f"The data of epoch {run.status.epoch} ended before the batch from which the run resumes, and has none to "
            "compile the step for. Pass the data from its beginning: a new iterator, or a callable epoch -> iterable."
        )
    run.prepare(group.call)


def _open(
    run: Run, data: Any, leftovers: Leftovers, *, most: int | None, record: LoopRecord | None = None
) -> EpochIterator:
    """Returns the batches of the epoch in progress, from where ``record`` says on; at most ``most``."""
    return EpochIterator(
        data,
        run.status.epoch,
        steps_per_call=run.source.model.options.steps_per_call,
        sharding=run.sharding,
        split=run.source.model.split,
        waiter=run,
        start=record.batch if record is not None and record.in_epoch else 0,
        data_state=record.data if record is not None else None,
        batch_crc32=record.batch_crc32 if record is not None else None,
        most=most,
        leftovers=leftovers,
    )
