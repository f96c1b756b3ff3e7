"""From data to steps: the epochs of ``fit``, written on a session as a user's own loop may be. Training thread only."""

from __future__ import annotations

from functools import partial
from typing import Any

from eventtrain.control.run_state import ResumePoint
from eventtrain.data.epoch_iterator import EpochIterator
from eventtrain.data.sources import position_in, rewound
from eventtrain.events.run_records import LoopRecord
from eventtrain.trainer.session import Session


def train(
    session: Session,
    data: Any,
    epochs: int | None,
    steps: int | None,
    steps_per_call: int,
    resumption: ResumePoint | None = None,
) -> None:
    """Epoch after epoch until the aim is reached or the run has to end.

    Args:
        session: a run that has begun.
        data: as for ``Trainer.fit``.
        epochs, steps: still to go; one of them.
        steps_per_call: batches in a group.
        resumption: where the first epoch goes on, of a run that resumes.
    """
    left = steps
    epochs_left = epochs
    clock = session.clock
    facts = resumption.facts.loop if resumption is not None else None
    opening = position_in(data) if facts is not None else None
    if resumption is not None and resumption.ended is not None:
        # What is due at the end of the run still is.
        _prepare_without_a_step(session, data, steps_per_call, opening)
        return
    # An epoch that was cut short behind the last step wanted still has to end.
    while (facts is not None and facts.in_epoch) or (
        (epochs_left is None or epochs_left > 0) and (left is None or left > 0)
    ):
        # It fetches the first batch.
        feed = clock.for_data(partial(_opened, session, data, steps_per_call, facts))
        try:
            group = clock.for_data(feed.next)
            if group is not None:
                session.prepare(group.batches if steps_per_call > 1 else group.batches[0])
            elif facts is None or not facts.in_epoch or not feed.exhausted:
                return
            elif not _prepare_without_a_step(session, data, steps_per_call, opening):
                return  # all of the epoch was trained on
            if not session.in_epoch and not session.begin_epoch():
                return
            facts = None
            while group is not None and left != 0:
                count = group.steps if left is None else min(group.steps, left)
                done = session.advance(group.batches, count, group.positions)
                if done < count:
                    return
                left = None if left is None else left - done
                group = clock.for_data(feed.next) if left != 0 else None
        finally:
            feed.close()
        if session.stop_reason is not None or not session.end_epoch():
            return
        epochs_left = None if epochs_left is None else epochs_left - 1


def _prepare_without_a_step(session: Session, data: Any, steps_per_call: int, opening: Any) -> bool:
    """Compile for the first batches of the epoch, none of which is trained on. False: the run has to end.

    Args:
        opening: where data that is one iterator has a batch, though it may stand behind its last one.
    """
    if session.compiled:
        session.prepare(None)
        return True
    with rewound(data, opening):
        feed = _opened(session, data, steps_per_call)
        try:
            example = feed.next()
        finally:
            feed.close()
    if example is not None:
        session.prepare(example.batches if steps_per_call > 1 else example.batches[0])
    return example is not None


def _opened(
    session: Session, data: Any, steps_per_call: int, facts: LoopRecord | None = None
) -> EpochIterator:
    """The batches of the session's epoch, from where ``facts`` say on."""
    return EpochIterator(
        data,
        session.epoch,
        steps_per_call=steps_per_call,
        sharding=session.sharding,
        waiter=session,
        start=facts.batch if facts is not None and facts.in_epoch else 0,
        data_state=facts.data if facts is not None else None,
    )
