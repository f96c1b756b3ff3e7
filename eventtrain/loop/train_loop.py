"""The training loop: the one place that dispatches training steps to the device.

``step`` is the hot path. It enters ``_settle`` only if a command has arrived or something is due; what may happen
between two steps is in ``boundary.py``. All of it runs on the training thread.

Invariants of the hot path:

- ``_attention`` is a step count: ``step`` enters ``_settle`` when ``status.step`` has reached it. Only ``_settle``
  raises it, to the next boundary at which anything can be due. Everything else only lowers it: ``step`` to the
  boundary of a decider whose event it has just counted, and to 0 where it has kept a state for a function; ``_flush``
  to 0 where something goes by the clock or deciders came or went; ``wait``, ``begin_epoch`` and ``end_epoch`` to 0,
  since anything may have happened meanwhile.
- Other threads never write a field of the loop. They append to ``queue.arrived``, whose truth ``step`` tests.
- ``carry`` is replaced leaf by leaf by the compiled step, which donates the old leaves unless ``ledger.pinned``.
  Nothing else may hold a leaf across a call of ``step``; the cursor is not donated and serves as the completion
  token.
- ``status.step`` and ``view.step`` count dispatches. They are written after the dispatch: if it raises, the state and
  the counts are those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import jax

from eventtrain.control.run_state import LoopRecord
from eventtrain.device.compiled_step import Carry, CompiledStep
from eventtrain.device.hyperparams import Hyperparam, labels
from eventtrain.errors import DataError, SnapshotError, StepError, amend
from eventtrain.events import EpochCompleted, EpochStarted, StepCompleted
from eventtrain.loop.agreement.agreement import Agreement
from eventtrain.loop.agreement.log import EndRun
from eventtrain.loop.backpressure import Backpressure
from eventtrain.loop.boundary import Boundary
from eventtrain.loop.checkpoints import Checkpoints
from eventtrain.loop.command_executor import CommandExecutor
from eventtrain.loop.evaluation import Evaluations, EvaluationSource
from eventtrain.loop.event_builder import EpochEnd
from eventtrain.loop.lag_gates import NEVER
from eventtrain.loop.lent_states import LentStates
from eventtrain.loop.metric_windows import MetricWindows
from eventtrain.loop.profiling import StepProfiler
from eventtrain.loop.run_ahead import RunAhead
from eventtrain.loop.run_recorder import RunRecorder
from eventtrain.loop.run_resources import RunResources
from eventtrain.loop.run_status import EvalPosition, RunStatus
from eventtrain.loop.samples import Samples
from eventtrain.loop.snapshot_ledger import SnapshotLedger


@dataclass(frozen=True, slots=True)
class Pace:
    """How far the loop may run ahead of the device, and how long a metric may wait in the ring."""

    flush_interval_s: float
    max_in_flight_calls: int


class TrainingLoop:
    """The loop of one run, from its first dispatch to its last flush. Training thread only.

    Args:
        source: the model, and what it is evaluated on.
        compiled: the prepared step.
        carry: the state to start from. The loop owns it from now on.
        hyperparams: all that the state holds.
        status, resources, recorder: of the run.
        agreement: with the other processes of the run.
        pace: how far to run ahead.

    Attributes:
        boundary: the one place to wait.
    """

    def __init__(
        self,
        source: EvaluationSource,
        compiled: CompiledStep,
        carry: Carry,
        hyperparams: Sequence[Hyperparam],
        *,
        status: RunStatus,
        resources: RunResources,
        recorder: RunRecorder,
        agreement: Agreement,
        pace: Pace,
    ) -> None:
        plane, bus = resources.plane, resources.bus
        self.compiled = compiled
        self.carry = carry
        self.status = status
        self.windows = windows = MetricWindows(compiled, carry, status, resources, pace.flush_interval_s)
        self.profiler = StepProfiler(
            plane.requests.traces, status, carry, bus, marks_steps=not compiled.grouped
        )
        self.ledger = SnapshotLedger(
            model=source.model, compiled=compiled, carry=carry, status=status, plane=plane, windows=windows
        )
        self._ahead = RunAhead(pace.max_in_flight_calls, resources.clock)
        self.evaluations = Evaluations(
            source=source,
            carry=carry,
            status=status,
            resources=resources,
            windows=windows,
            ahead=self._ahead,
            profiler=self.profiler,
            agreement=agreement,
        )
        self.checkpoints = Checkpoints(
            status=status,
            resources=resources,
            windows=windows,
            ledger=self.ledger,
            recorder=recorder,
            evaluations=self.evaluations,
            agreement=agreement,
        )
        self.samples = Samples(
            model=source.model,
            carry=carry,
            status=status,
            plane=plane,
            windows=windows,
            agreement=agreement,
        )
        self._executor = CommandExecutor(
            carry=carry,
            hyperparams=hyperparams,
            status=status,
            plane=plane,
            windows=windows,
            ledger=self.ledger,
            checkpoints=self.checkpoints,
            evaluations=self.evaluations,
            profiler=self.profiler,
            samples=self.samples,
            agreement=agreement,
        )
        self.boundary = Boundary(
            status=status,
            resources=resources,
            windows=windows,
            executor=self._executor,
            checkpoints=self.checkpoints,
            evaluations=self.evaluations,
            samples=self.samples,
            agreement=agreement,
        )
        self._backpressure = Backpressure(bus, windows, status, self.boundary)
        self._lent = LentStates(status, resources, windows, self.ledger, self._backpressure)
        self._gates = resources.gates
        self._clock = resources.clock
        self._queue = plane.queue
        self._view = plane.view
        self._attention = 0
        shares_calls = agreement.is_shared and compiled.grouped
        self._agrees_from = 1 if shares_calls else 2
        self._promises_calls = shares_calls and agreement.decides
        self._epoch_began_s = perf_counter()
        names = labels(hyperparams)
        resources.builder.watch({h.leaf_index: names[h.path] for h in hyperparams if h.scheduled})

    # --- the hot path -----------------------------------------------------------------------------------------

    def step(self, batch: Any, start: int = 0, stop: int = 1) -> int:
        """Dispatch one step and return 1; or steps ``start`` to ``stop - 1`` of a group, and return how many.

        Returns fewer than ``stop - start`` if something is due at a boundary between them, and 0 once the run has to
        end. It waits only for: the device, if that is ``max_in_flight_steps`` behind; a due decision of a
        subscription with a finite lag; a pause; a Lossless queue at its limit.
        """
        status, gates = self.status, self._gates
        if (self._queue.arrived or status.step >= self._attention) and not self._settle():
            return 0
        if stop - start >= self._agrees_from:
            stop = start + self._steps_of_call(stop - start)
        if len(self._ahead.tokens) >= self._ahead.limit:
            self._ahead.make_room()
        began_s = perf_counter()
        try:
            if self.ledger.pinned:
                self._dispatch_keeping(batch, start, stop)
            else:
                self.compiled(self.carry, batch, start, stop)
        except (StepError, DataError) as error:
            amend(error, before=f"At step {status.step + 1} (epoch {status.epoch}, batch {status.batch}): ")
            raise
        now_s = perf_counter()
        self._clock.dispatch_s += now_s - began_s
        self._ahead.tokens.append(self.carry.cursor)
        count = stop - start
        status.batch += count
        status.step = self._view.step = step = status.step + count
        if step >= gates.next_step_event:
            if self._lent:
                self._lent.keep(StepCompleted)
                self._attention = 0
            gates.note_step(step)
            self._attention = min(self._attention, gates.next_due)
            self._clock.observing_s += perf_counter() - now_s
        if (
            self.carry.rows >= self.compiled.capacity
            or now_s >= self.windows.flush_at_s
            or step >= gates.flush_by
        ):
            self._flush()
        return count

    def _settle(self) -> bool:
        """Settle what is due before the next step, and find out when to look again. False: the run has to end."""
        status, boundary = self.status, self.boundary
        self._attention = 0
        self.evaluations.take_due()
        if not self._backpressure.make_room() or not boundary.settle() or not self._lent.make_room():
            return False
        if not boundary.replay_late():
            return False
        if self.checkpoints.take_due(boundary) and not boundary.settle():
            return False  # it waited for a writer, and the run was stopped meanwhile
        self.samples.take_due()
        if self._gates.announces_steps:
            boundary.announce_step()
            if not boundary.settle():
                return False
            self.profiler.before_step()
            boundary.promise(status.step)
            return True  # and look again before every step
        self.profiler.before_step()
        due = min(
            boundary.next_due(),
            self.checkpoints.schedule.next_step(),
            self.evaluations.schedule.next_step(),
            self.samples.schedule.next_step(),
        )
        self._attention = min(
            due,
            self.profiler.next_step(),
            status.step + self._backpressure.free_steps(),
            NEVER
            if self._promises_calls
            else boundary.promise(min(due, self._gates.next_undecided(status.step)) - 1),
        )
        return True

    def _steps_of_call(self, left: int) -> int:
        """How many of the steps ``left`` in a group one dispatch runs: up to the next boundary at which anything can be
        due, and at least 1. The same on every process."""
        gates, step, room = self._gates, self.status.step, self.compiled.capacity - self.carry.rows
        until_due = min(self._attention, gates.next_step_event, max(gates.flush_by, step + 1)) - step
        steps = max(1, min(until_due, room, left))
        if self._agrees_from == 1:
            steps = self.boundary.steps_of_call(steps, left)
            if steps > room:
                self._flush()
        return steps

    def _dispatch_keeping(self, batch: Any, start: int, stop: int) -> None:
        """Dispatch a step that leaves the state before it alone, because something else refers to it."""
        try:
            self.compiled(self.carry, batch, start, stop, keep=True)
        except SnapshotError as error:
            if not self.ledger.refuse(error):
                raise
            self.compiled(self.carry, batch, start, stop)
        else:
            if self.ledger.survived():
                self.compiled.request_keeping()  # the next snapshot needs no copy

    def _flush(self) -> None:
        self.windows.flush()
        if self.checkpoints.schedule.by_clock or self.evaluations.schedule.by_clock or self._gates.stale:
            self._attention = 0  # the clock and the deciders are looked at once per window

    # --- between steps ----------------------------------------------------------------------------------------

    def lend_state(self) -> list[jax.Array]:
        """Returns the leaves of the present state. The next step leaves them alone; nothing is copied."""
        self.compiled.request_keeping()
        return self.ledger.lend()

    def replace_state(self, leaves: list[jax.Array]) -> None:
        """Make ``leaves``, of the same types and placement, the present state."""
        self._executor.replace_state(leaves)

    def wait(self, ready: Callable[[], object]) -> bool:
        """Wait between two steps until ``ready()``, serving commands. Returns False if the run has to end first."""
        continues = self.boundary.settle() and self.boundary.wait(ready)
        self._attention = 0
        return continues

    def begin_epoch(self) -> bool:
        """Publish EpochStarted, to be decided on before the first step. Returns False if the run has to end."""
        status = self.status
        if (self._queue.arrived or status.stop_reason is not None) and not self.boundary.settle():
            return False
        self.boundary.begin_phase()
        self.boundary.admit_deciders()
        self.windows.begin_epoch()
        self.compiled.begin_epoch(self.carry)
        status.epoch_first_step = status.step
        status.in_epoch = True
        hyperparams = dict(self._view.hyperparams)
        self._lent.keep(EpochStarted)
        self.windows.emit(EpochStarted(step=status.step, epoch=status.epoch, hyperparams=hyperparams))
        self._attention = 0
        self._epoch_began_s = perf_counter()
        return True

    def end_epoch(self) -> bool:
        """Evaluate, publish EpochCompleted, apply what is decided on it. Returns False if the run has to end."""
        status = self.status
        self.profiler.end_due()
        self.boundary.begin_phase()
        self.evaluations.take_epoch()
        continues = self.boundary.settle()
        self.evaluations.requested = 0
        if status.cut_short:
            return False  # the run that resumes from here publishes EpochCompleted
        steps = status.step - status.epoch_first_step
        self._gates.note(EpochCompleted, status.step, status.epoch)
        self._lent.keep(EpochCompleted)
        end = EpochEnd(status.step, status.epoch, steps, self._epoch_began_s, self._view.hyperparams)
        self.windows.put(self.compiled.take_values(self.carry, end) or end)
        status.epoch += 1
        status.in_epoch = False
        self.boundary.begin_phase()
        self.windows.begin_epoch()
        continues = self.boundary.settle() and continues
        self.samples.take_epoch(status.epoch)
        self.checkpoints.take_epoch(status.epoch, self.boundary)
        self._attention = 0
        return continues

    def resume_epoch(self, record: LoopRecord) -> None:
        """Continue in the middle of an epoch, and perhaps of an evaluation."""
        status = self.status
        self.windows.flush()
        self.boundary.admit_deciders()
        status.in_epoch = True
        status.epoch_first_step = record.epoch_first_step
        status.announced_step = status.step if record.step_started else -1
        cut = record.evaluated_batches
        position = None if cut is None else EvalPosition(record.evaluated_sets, cut)
        self.evaluations.resume(record.evaluation, position)
        self._epoch_began_s = perf_counter()

    def finish(self, deadline_s: float) -> None:
        """Settle the last boundary, send the last window, wait for the deciders until ``deadline_s`` (monotonic)."""
        self.boundary.begin_phase()
        if self.status.stop_reason is None:
            self.boundary.settle()
        self.samples.take_due()
        self.checkpoints.no_step_follows = True
        self.checkpoints.take_due(self.boundary)
        self.windows.flush()
        if not self.status.cut_short:  # else the run that resumes from here delivers them their events again
            self.boundary.wait_for_deciders(deadline_s)

    def follow_to_end(self) -> EndRun:
        """``finish``, where process 0 decides. Returns the order by which it ended the run."""
        self.checkpoints.no_step_follows = True
        end = self.boundary.follow_to_end()
        self.windows.flush()
        return end

    def restore_at_end(self) -> None:
        """Restore what subscribers requested for the end of a run that was not cut short. After ``finish``."""
        self._executor.restore_at_end()
