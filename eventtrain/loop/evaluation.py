"""Evaluations: when a run evaluates, and how ``eval_fn`` is dispatched over a data set."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from time import perf_counter
from typing import Any, Literal

import jax

from eventtrain.control.requests import PeriodicRequest
from eventtrain.data.epoch_iterator import EpochIterator
from eventtrain.data.sources import evaluation_sets
from eventtrain.device.compiled_eval import CompiledEval, EvalCarry
from eventtrain.device.compiled_step import Carry
from eventtrain.device.fetcher import Fetcher
from eventtrain.device.model import Model
from eventtrain.device.state import replicated_sharding
from eventtrain.device.stateful_metrics import HostArray, TakenStates
from eventtrain.errors import ConfigurationError, DataError, StepError, amend
from eventtrain.events import EvalCompleted, EvalStarted, EvalStepCompleted, Event
from eventtrain.loop.agreement.agreement import Agreement
from eventtrain.loop.agreement.log import RunEvaluation
from eventtrain.loop.event_builder import EvalEnd, EvalSetEnd, EvalStates, EvalWindow
from eventtrain.loop.lag_gates import LagGates
from eventtrain.loop.metric_windows import MetricWindows
from eventtrain.loop.profiling import StepProfiler
from eventtrain.loop.request_schedule import RequestSchedule
from eventtrain.loop.run_ahead import RunAhead
from eventtrain.loop.run_resources import RunResources
from eventtrain.loop.run_status import EvalPosition, RunStatus
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

    @property
    def sets(self) -> Mapping[str, Any]:
        """The data by name; a single set has the name ""."""
        return evaluation_sets(self.data)


@dataclass(eq=False, kw_only=True)
class Evaluations:
    """The evaluations of one run. Training thread only.

    Attributes:
        requested: how many evaluations commands, requests and epochs asked for at this boundary.
        cut: where the evaluation was cut short at this boundary; None if none was.
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
    cut: EvalPosition | None = None
    in_progress: bool = False

    def __post_init__(self) -> None:
        # Identifies the state evaluated last: step, and number of changes by commands.
        self._evaluated: tuple[int, int] | None = None
        self.schedule = RequestSchedule(self.resources.plane.requests.evaluations, self.status)

    @property
    def state(self) -> Literal["none", "pending", "done"]:
        """How far the evaluation of this boundary is."""
        if self.requested or self.cut is not None or self.schedule.is_due():
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

    def resume(self, state: Literal["none", "pending", "done"], cut: EvalPosition | None) -> None:
        """Continue from a checkpoint."""
        self.cut = cut
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
        source, carry, status, resources = self.source, self.carry, self.status, self.resources
        if not source.available:
            return

        @contextmanager
        def open_set(name: str, data: Any) -> Generator[Iterable[Any]]:
            batches = EpochIterator(
                data,
                status.epoch,
                steps_per_call=1,
                sharding=replicated_sharding(carry.leaves),
                split=source.model.split,
                waiter=place,
                name=name_of_set(name),
            )
            try:
                yield batches.batches()
            finally:
                batches.close()

        dispatch = EvaluationDispatch(
            source.model.evaluation(carry.leaves),
            source.model.leaves_for("eval", carry.leaves, carry.ext_leaves),
            status,
            fetcher=resources.fetcher,
            ahead=self.ahead,
            continues=place.agree,
            gates=resources.gates,
        )
        self.in_progress = True
        status.begin_phase()
        try:
            self.cut = dispatch.run(source.sets, open_set, self.cut, resources.builder.eval_states)
        finally:
            self.in_progress = False
        status.begin_phase()
        if self.cut is None:
            self._evaluated = self._present
            resources.gates.note(EvalCompleted, status.step)


@dataclass(eq=False)
class EvaluationDispatch:
    """Evaluates one state; for a run, and for ``trainer.evaluate``. Waits for no result.

    Attributes:
        evaluation: eval_fn.
        leaves: of the state; they are not donated.
        status: step and epoch for the events.
        fetcher: gets the windows of metrics and the events, in order.
        ahead: bounds how far the dispatches run ahead of the device.
        continues: asked before each batch; False ends the evaluation early.
        gates: count the events; None outside a run.
    """

    evaluation: CompiledEval
    leaves: Sequence[jax.Array]
    status: RunStatus
    _: KW_ONLY
    fetcher: Fetcher
    ahead: RunAhead
    continues: Callable[[], bool]
    gates: LagGates | None = None

    def run(
        self,
        sets: Mapping[str, Any],
        open_set: Callable[[str, Any], AbstractContextManager[Iterable[Any]]],
        done: EvalPosition | None = None,
        states: Sequence[HostArray] = (),
    ) -> EvalPosition | None:
        """Evaluate on each of ``sets``, in their order.

        Args:
            sets: data by name; the only one may have none ("").
            open_set: opens the batches of one of them.
            done: what was evaluated before a resume; EvalStarted was published then.
            states: of the metrics with state then.

        Returns:
            None at its end, with EvalCompleted on its way; else where it stopped.
        """
        step, epoch = self.status.step, self.status.epoch
        began_s, finished, count = (
            perf_counter(),
            list(done.sets if done else ()),
            done.batches if done else 0,
        )
        if done is None:
            self._note(EvalStarted)
            self.fetcher.put(EvalStarted(step=step, epoch=epoch))
        for name, data in islice(sets.items(), len(finished), None):
            with open_set(name, data) as batches:
                count, ended = self._run_set(name, batches, sum(finished), count, states)
            if not ended:
                return EvalPosition(tuple(finished), count)
            finished.append(count)
            count, states = 0, ()
        self.fetcher.put(EvalEnd(step, epoch, sum(finished), began_s))
        return None

    def _run_set(
        self, name: str, batches: Iterable[Any], before: int, count: int, states: Sequence[HostArray]
    ) -> tuple[int, bool]:
        """Evaluate on one set from its batch ``count`` on. Returns how many were evaluated, and whether those are all.

        Args:
            before: number of batches of the sets before it.
        """
        status, evaluation, carry = self.status, self.evaluation, None
        for batch in islice(batches, max(0, count - 1), None):
            if carry is None and count:  # evaluated before a resume: it tells what the metrics are
                evaluation.prepare(batch)
                carry = evaluation.initial(states)
                continue
            if not self.continues():
                break
            self.ahead.make_room()
            try:
                if carry is None:
                    evaluation.prepare(batch)
                    carry = evaluation.initial()
                evaluation(carry, self.leaves, batch)
            except (StepError, DataError) as error:
                amend(error, before=f"At batch {count} of the {name_of_set(name)}, at step {status.step}: ")
                raise
            self.ahead.tokens.append(carry.cursor)
            self._note(EvalStepCompleted)
            count += 1
            status.evaluated += 1
            if carry.rows >= evaluation.capacity:
                self._flush(carry, name, before + count)
        if carry is not None:
            # Also if it ends early: what was dispatched is published.
            self._flush(carry, name, before + count)
        if not self.continues():
            if carry is not None and carry.states:
                self.fetcher.put(evaluation.take_states(carry, EvalStates()))
            return count, False
        end = EvalSetEnd(name)
        self.fetcher.put(TakenStates({}, end) if carry is None else evaluation.take_values(carry, end))
        return count, True

    def _flush(self, carry: EvalCarry, name: str, count: int) -> None:
        if carry.rows:
            window = EvalWindow(self.status.step, self.status.epoch, count - carry.rows, name)
            self.fetcher.put(self.evaluation.take_ring(carry, window))

    def _note(self, event_type: type[Event]) -> None:
        if self.gates is not None:
            self.gates.note(event_type, self.status.step)


def name_of_set(name: str) -> str:
    """Returns how messages call the evaluation data ``name``."""
    return f"evaluation data {name!r}" if name else "evaluation data"
