"""Dispatching eval_fn over a data set: the same for the loop's evaluations and for ``trainer.evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from time import perf_counter
from typing import Any

import jax

from eventtrain.device.compiled_eval import CompiledEval
from eventtrain.errors import DataError
from eventtrain.events import EvalStarted
from eventtrain.loop.event_builder import EvalEnd, EvalWindow


def run_evaluation(
    evaluation: CompiledEval,
    leaves: Sequence[jax.Array],
    batches: Iterable[Any],
    step: int,
    epoch: int,
    put: Callable[[Any], None],
    before_batch: Callable[[], bool],
    dispatched: Callable[[jax.Array], None],
    done: int | None = None,
) -> int | None:
    """Evaluate ``leaves`` on ``batches``. Training thread; waits for no result.

    Args:
        step, epoch: what the events say.
        put: takes what the fetch thread should get, in order.
        before_batch: called before each dispatch; False ends the evaluation early.
        dispatched: gets the completion token of each dispatch.
        done: this many batches were evaluated by the run from which this one resumes, which had said EvalStarted.

    Returns:
        None if it ran to its end, so that EvalCompleted is on its way; else after how many batches it stopped.

    Raises:
        DataError: there was no batch.
    """
    began_s, count, carry = perf_counter(), done or 0, None
    if done is None:
        put(EvalStarted(step=step, epoch=epoch))

    def fetch() -> None:
        assert carry is not None
        if carry.rows:
            put(evaluation.take_ring(carry, EvalWindow(step, epoch, count - carry.rows)))

    for batch in islice(batches, count, None):
        if not before_batch():
            break
        if carry is None:
            evaluation.prepare(batch)
            carry = evaluation.initial()
        evaluation(carry, leaves, batch)
        dispatched(carry.cursor)
        count += 1
        if carry.rows >= evaluation.capacity:
            fetch()
    if carry is not None:
        fetch()  # also when it ends early: what was dispatched is said
    if not before_batch():
        return count
    if not count:
        raise DataError(
            "The evaluation data is empty: it ended before its first batch, so there is nothing to average."
        )
    put(EvalEnd(step, epoch, count, began_s))
    return None
