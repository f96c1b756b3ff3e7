"""Evaluations: when a run evaluates, and how ``eval_fn`` is dispatched over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from typing import Any, Literal

import jax

from eventtrain.control.requests import PeriodicRequest
from eventtrain.data.epoch_iterator import EpochIterator
from eventtrain.device.compiled_eval import CompiledEval
from eventtrain.device.compiled_step import Carry
from eventtrain.device.fetcher import Fetcher
from eventtrain.device.model import Model
from eventtrain.device.state import replicated_sharding
from eventtrain.errors import ConfigurationError
from eventtrain.events import EvalCompleted, EvalStarted, EvalStepCompleted
from eventtrain.loop.agreement.agreement import Agreement
from eventtrain.loop.agreement.log import RunEvaluation
from eventtrain.loop.event_builder import EvalEnd, EvalWindow
from eventtrain.loop.lag_gates import LagGates
from eventtrain.loop.metric_windows import MetricWindows
from eventtrain.loop.profiling import StepProfiler
from eventtrain.loop.request_schedule import RequestSchedule
from eventtrain.loop.run_ahead import RunAhead
from eventtrain.loop.run_resources import RunResources
from eventtrain.loop.run_status import RunStatus
from eventtrain.loop.waiting import WaitingPlace


@dataclass
class EvaluationSource:
    """Model and data of the evaluations of a run.

    Attributes:
        model: has the eval_fn.
        data: as ``fit`` takes it; None if the run has none (yet).
    """

    model: Model
    data: Any = None

    @property
    def available(self) -> bool:
        """Whether there is both an eval_fn and data."""
        return self.model.eval_fn is not None and self.data is not None


@dataclass(eq=False, kw_only=True)
class Evaluations:
    """The evaluations of one run. Training thread only.

    Attributes:
        requested: how many evaluations commands, requests and epochs asked for at this boundary.
        evaluated_batches: of the evaluation that was cut short at this boundary; None if none was.
        in_progress: whether an evaluation is being dispatched. A checkpoint would hold half of it.
    """

    source: EvaluationSource
    carry: Carry
    status: RunStatus
    resources: RunResources
    windows: MetricWindows
    ahead: RunAhead
    profiler: StepProfiler
    agreement: Agreement
    requested: int = 0
    evaluated_batches: int | None = None
    in_progress: bool = False

    def __post_init__(self) -> None:
        # Identifies the state evaluated last: step, and number of changes by commands.
        self._evaluated: tuple[int, int] | None = None
        self.schedule = RequestSchedule(self.resources.plane.requests.evaluations, self.status)

    @property
    def state(self) -> Literal["none", "pending", "done"]:
        """How far the evaluation of this boundary is."""
        if self.requested or self.evaluated_batches is not None or self.schedule.is_due():
            return "pending"
        return "done" if self._evaluated == self._present else "none"

    @property
    def _present(self) -> tuple[int, int]:
        return self.status.step, self.status.changes

    def request(self) -> None:
        """Evaluate at this boundary: a command asked for it. Raises ConfigurationError if that is not possible."""
        if not self.source.available:
            raise ConfigurationError(
                "this run has nothing to evaluate on. Pass Trainer(eval_fn=...) and fit(eval_data=...)."
            )
        self.requested += 1

    def take_due(self) -> None:
        """Request the evaluations that are due at this boundary by step and by clock."""
        if not self.agreement.is_open(self.status):
            return
        for request in self.schedule.take_due():
            self._request_if_new(request)

    def take_epoch(self) -> None:
        """Request the evaluations that are due at the end of the epoch in progress."""
        if not self.agreement.decides:
            return
        self.take_due()
        for request in self.schedule.take_epoch(self.status.epoch + 1):
            self._request_if_new(request)
        if not self.schedule:
            self._request_if_new()

    def _request_if_new(self, request: PeriodicRequest | None = None) -> None:
        """Request one, unless the state of this boundary was evaluated already."""
        if self._evaluated == self._present:
            return
        deterministic = request is None or request.every_s is None
        order = RunEvaluation(deterministic=deterministic)
        self.agreement.record(self.status, order)
        self.request_ordered(order)

    def request_ordered(self, order: RunEvaluation) -> None:
        """Evaluate at this boundary."""
        self.requested += 1
        if not order.deterministic:
            self.status.deterministic = False

    def resume(self, state: Literal["none", "pending", "done"], evaluated_batches: int | None) -> None:
        """Continue from a checkpoint."""
        self.evaluated_batches = evaluated_batches
        self.requested = int(state == "pending")
        if state == "done":
            self._evaluated = self._present

    def run(self, place: WaitingPlace) -> None:
        """Evaluate at this boundary. Waits for batches, not for results.

        Ends early, without EvalCompleted, if the run has to end.
        """
        self.requested = 0
        self.profiler.end_due()
        self.windows.flush()
        source, carry, status, gates = self.source, self.carry, self.status, self.resources.gates
        if not source.available:
            return
        evaluation = source.model.evaluation(carry.leaves)
        leaves = source.model.leaves_for("eval", carry.leaves, carry.ext_leaves)

        batches = EpochIterator(
            source.data,
            status.epoch,
            steps_per_call=1,
            sharding=replicated_sharding(carry.leaves),
            split=source.model.split,
            waiter=place,
            name="evaluation data",
        )
        self.in_progress = True
        status.begin_phase()
        try:
            self.evaluated_batches = dispatch_evaluation(
                evaluation,
                leaves,
                batches.batches(),
                status,
                fetcher=self.resources.fetcher,
                ahead=self.ahead,
                continues=place.agree,
                gates=gates,
                done=self.evaluated_batches,
            )
        finally:
            self.in_progress = False
            batches.close()
        status.begin_phase()
        if self.evaluated_batches is None:
            self._evaluated = self._present
            gates.note(EvalCompleted, status.step)


def dispatch_evaluation(
    evaluation: CompiledEval,
    leaves: Sequence[jax.Array],
    batches: Iterable[Any],
    status: RunStatus,
    *,
    fetcher: Fetcher,
    ahead: RunAhead,
    continues: Callable[[], bool],
    gates: LagGates | None = None,
    done: int | None = None,
) -> int | None:
    """Evaluate ``leaves`` on ``batches``; for a run, and for ``trainer.evaluate``. Waits for no result.

    Args:
        evaluation: eval_fn.
        leaves: of the state; they are not donated.
        batches: on the device or on the host.
        status: step and epoch for the events.
        fetcher: gets the windows of metrics and the events, in order.
        ahead: bounds how far the dispatches run ahead of the device.
        continues: asked before each batch; False ends the evaluation early.
        gates: count the events; None outside a run.
        done: batches that were evaluated before a resume; EvalStarted was published then.

    Returns:
        None at its end, with EvalCompleted on its way; else the number of batches after which it stopped.
    """
    step, epoch = status.step, status.epoch
    began_s, count, carry = perf_counter(), done or 0, None
    if done is None:
        if gates is not None:
            gates.note(EvalStarted, step)
        fetcher.put(EvalStarted(step=step, epoch=epoch))

    def flush() -> None:
        assert carry is not None
        if carry.rows:
            fetcher.put(evaluation.take_ring(carry, EvalWindow(step, epoch, count - carry.rows)))

    for batch in islice(batches, count, None):
        if not continues():
            break
        ahead.make_room()
        if carry is None:
            evaluation.prepare(batch)
            carry = evaluation.initial()
        evaluation(carry, leaves, batch)
        ahead.tokens.append(carry.cursor)
        if gates is not None:
            gates.note(EvalStepCompleted, step)
        count += 1
        status.evaluated += 1
        if carry.rows >= evaluation.capacity:
            flush()
    if carry is not None:
        flush()  # also if it ends early: what was dispatched is published
    if not continues():
        return count
    fetcher.put(EvalEnd(step, epoch, count, began_s))
    return None
