"""Checks of a run: before its first step, of what would fail later; at its end, of what had no effect."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

from eventtrain.bus.core import BusCore
from eventtrain.bus.handlers import takes_control
from eventtrain.control.requests import RunRequests, TracedRun
from eventtrain.data.epoch_iterator import EpochIterator, Waiter
from eventtrain.device.compiled_step import CompiledStep
from eventtrain.device.model import Model
from eventtrain.device.state import abstract, replicated_sharding
from eventtrain.events import (
    EpochCompleted,
    EpochStarted,
    EvalCompleted,
    Event,
    StepCompleted,
    StepsCompleted,
)
from eventtrain.loop.backpressure import ROW_EVENTS
from eventtrain.loop.evaluation import EvaluationSource, name_of_set
from eventtrain.loop.event_builder import Derivations, with_derived
from eventtrain.loop.run_recorder import Aim
from eventtrain.loop.run_status import RunStatus

logger = logging.getLogger("eventtrain")

LONGEST_READ_S = 10.0
"""How long a batch of evaluation data is awaited. Data that takes longer is not checked: it may wait for the run."""


def trace_run(
    source: EvaluationSource,
    compiled: CompiledStep,
    batch: Any,
    *,
    epoch: int,
    derive: Derivations,
    may_evaluate_later: bool,
    waiter: Waiter,
) -> TracedRun:
    """Traces eval_fn and predict_fn, without compiling them, and returns what is known of the run then.

    Args:
        source: the model, whose state is not in use, and the data of evaluations: a batch of each set is read, unless
            the data is an iterator.
        compiled: the prepared step.
        batch: what it was prepared for; None if an earlier run has.
        epoch: completed.
        derive: of the trainer.
        may_evaluate_later: evaluation data may still come, as in a session.
        waiter: serves commands while a batch is read.

    Raises:
        StepError, MetricsError: eval_fn, predict_fn or a function of ``derive`` is broken.
    """
    model = source.model
    steps = frozenset(compiled.metric_names)
    evaluated = _trace_eval(source, epoch, derive, waiter) if source.available else frozenset[str]()
    known = evaluated is not None and (source.available or not may_evaluate_later)
    if model.predict_fn is not None and batch is not None:
        model.prediction().trace(batch)
    metrics: dict[type[Event], frozenset[str]] = {
        StepCompleted: steps,
        EpochCompleted: _derived(steps | compiled.computed_names, derive)
        | {f"val_{name}" for name in evaluated or ()},
        EvalCompleted: evaluated or frozenset(),
    }
    shapes: Any = abstract(model.leaves, [path in model.weak_paths for path in model.structure.paths])
    return TracedRun(model.structure.join(shapes), batch, metrics, known)


def report_endless_epoch(bus: BusCore, requests: RunRequests, status: RunStatus, aim: Aim) -> None:
    """Logs what goes by epochs, if the aim is reached within the first one: there was nothing for it to decide."""
    length = aim.steps_per_epoch
    if status.epoch > 0 or (length is not None and status.batch >= length):
        return
    by_epochs = (EpochStarted, EpochCompleted)
    if not any(request.every or request.every_s for request in requests.evaluations):
        by_epochs = (*by_epochs, EvalCompleted)
    deciders = [
        subscription.name
        for subscription in bus.table.active
        if subscription.handler is not None
        and takes_control(subscription.handler)
        and any(issubclass(kind, subscription.types) for kind in by_epochs)
        and not any(issubclass(kind, subscription.types) for kind in (*ROW_EVENTS, StepsCompleted))
    ]
    owners = [
        request.owner
        for request in (*requests.checkpoints, *requests.evaluations, *requests.samples)
        if request.every_epochs and not request.every and not request.every_s
    ]
    if deciders or owners:
        logger.warning(
            "No epoch of the data ended within %d steps. These go by epochs, so they decided nothing between the "
            "first step and the last: %s. Use data that ends, or let them go by steps, for example "
            'patience_unit="steps", by="step", every=... or EvaluateEvery(steps=...).',
            status.step, ", ".join(dict.fromkeys([*deciders, *owners])),
        )  # fmt: skip


def _trace_eval(
    source: EvaluationSource, epoch: int, derive: Derivations, waiter: Waiter
) -> frozenset[str] | None:
    """Returns the names of the metrics of an evaluation; None if they cannot be known yet."""
    model, found = source.model, set[str]()
    evaluation = model.evaluation(model.leaves)
    for name, data in source.sets.items():
        batch = _first_batch(model, data, epoch, name_of_set(name), waiter)
        if batch is None:
            return None
        names = _derived(evaluation.trace(batch), derive)
        found |= {f"{name}_{metric}" if name else metric for metric in names}
    return frozenset(found)


def _first_batch(model: Model, data: Any, epoch: int, name: str, waiter: Waiter) -> Any:
    """Returns a batch of evaluation data; None if there is none in time, or if reading it would use it up."""
    if hasattr(data, "__next__"):
        return None
    batches = None
    try:
        batches = EpochIterator(
            data,
            epoch,
            steps_per_call=1,
            sharding=replicated_sharding(model.leaves),
            split=model.split,
            waiter=_Impatient(waiter),
            most=1,
            name=name,
        )
        return batches.sample()
    except Exception as error:  # an evaluation may never come to it, or later, when there is data
        logger.debug("eval_fn is not checked before the first step: %s: %s", type(error).__name__, error)
        return None
    finally:
        if batches is not None:
            batches.close()


class _Impatient:
    """Waits as another waiter does, for a limited time."""

    def __init__(self, waiter: Waiter) -> None:
        self._waiter = waiter
        self._end_s = monotonic() + LONGEST_READ_S

    def wait(self, ready: Callable[[], object]) -> bool:
        continues = self._waiter.wait(lambda: ready() or monotonic() >= self._end_s)
        return continues and bool(ready())

    def wake(self) -> None:
        self._waiter.wake()


def _derived(names: frozenset[str], derive: Derivations) -> frozenset[str]:
    """Returns ``names``, and what can be derived from metrics of these names."""
    return frozenset(with_derived(dict.fromkeys(names, 1.0), derive))
