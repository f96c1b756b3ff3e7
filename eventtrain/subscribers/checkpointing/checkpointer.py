"""``Checkpointer``: snapshots made durable, by a thread of its own, while training goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from eventtrain.control.control import Control
from eventtrain.control.requests import WhenFull
from eventtrain.control.run_state import SavedRun
from eventtrain.errors import ConfigurationError
from eventtrain.events import (
    CheckpointFailed,
    CheckpointSkipped,
    EpochCompleted,
    EvalCompleted,
    Event,
    SnapshotTaken,
)
from eventtrain.subscribers._shared.metric_goal import Mode
from eventtrain.subscribers._shared.metric_reader import MetricReader
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.validation import require_choice, require_count, require_number
from eventtrain.subscribers._shared.worker_thread import in_own_thread
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.checkpointing.best_metric import BestSoFar, BestState, goal_of, require_decidable
from eventtrain.subscribers.checkpointing.naming import (
    DEFAULT_TEMPLATE,
    check_template,
    fill_template,
    scheduled_tag,
)
from eventtrain.subscribers.checkpointing.reader import find_checkpoint, load_state
from eventtrain.subscribers.checkpointing.retention import Retention
from eventtrain.subscribers.checkpointing.writer import CheckpointWriter, Job, WriterOptions

__all__ = ["Checkpointer", "load_state", "restore_state"]

logger = logging.getLogger("eventtrain")

restore_state = load_state


class CheckpointerState(SavedState):
    """What survives a restart.

    Attributes:
        best: of a Checkpointer that writes only what is better.
        runs: the run, and those it went on from: what they wrote counts as its own.
        measured_at: the step at which the metrics ``measured`` were; -1 before the first.
    """

    version: Literal[1] = 1
    best: BestState | None = None
    runs: tuple[str, ...] = ()
    measured_at: int = -1
    measured: dict[str, float] = Field(default_factory=dict)


class Checkpointer(Subscriber):
    """Writes checkpoints, each of the whole run as it was at exactly one step; ``fit(resume=True)`` goes on from it.

    Args:
        directory: relative to ``run_dir``; made if missing. Each checkpoint is a folder in it, and what lies there is
            never overwritten.
        every: steps; ``every_epochs``: epochs; ``every_s``: seconds. Any of them, also several or none. Besides,
            ``control.checkpoint(tag)`` asks for one.
        max_to_keep: once a new one is committed, the oldest of this run beyond so many are deleted. None keeps all.
            Those with a tag are never deleted.
        at_end: also the state after the last step, however the run ends: by itself, by Ctrl-C, SIGTERM or an
            exception. None: unless ``save_best_only``.
        monitor: a metric of EpochCompleted, for the options that follow.
        mode: "min", "max", or "auto" by the metric's name.
        save_best_only: instead of a schedule: at the end of each epoch (of every ``every_epochs``-th) where the metric
            is better than at any before (``lag=0``). Commands are then left to other Checkpointers, if there are any.
        initial_value_threshold: with ``save_best_only``: the first one has to be better than this.
        keep_best: so many of those with the best values are kept besides. Only a checkpoint of the step at which the
            metric was measured has a value.
        monitor_unit: "epochs", or "evaluations": go by EvalCompleted, also in the middle of an epoch.
        keep_every: those of steps that this divides are kept for ever.
        save_weights_only: only the params (``Trainer(params=...)``), for ``et.load_state``; no run can go on from that.
        template: name of the folder, with the fields ``{step}`` and ``{epoch}`` (completed) and those of metrics, which
            may have a format (``{val_loss:.3f}``). Where a metric was not measured at that step, the default is taken.
            A tag comes behind it.
        max_in_flight: how many may be taken and not written yet. Each holds a state, on the device or where ``stage``
            says.
        when_full: with one more, training waits ("wait"), or it is left out with CheckpointSkipped ("skip") or
            CheckpointFailed ("fail").
        marker_timeout_s: how long a checkpoint waits for the subscribers' states.
        fsync: have the disk hold all files before the checkpoint gets its name, and the name before it is committed.
        retries: after a failure on disk; each after ``retry_delay_s``, which doubles.
        on_failure: "continue" training after CheckpointFailed, or "stop" the run.
        stage: where a state waits until it is written: on the "device", or in pinned memory of the "host", to which a
            thread moves it as soon as it is taken. That frees an accelerator's memory early. On a CPU both are the
            same; a device without such memory keeps it, and a warning says so.

    The events: CheckpointStarted; then CheckpointCommitted, when it stands under its final name and can be restored, or
    CheckpointFailed with the reason. One thread writes them, one after the other.

    Raises:
        ConfigurationError: arguments that cannot work, alone or together.
    """

    disable_after = None  # one full disk must not end all checkpoints

    def __init__(
        self,
        directory: str | Path,
        every: int | None = None,
        every_epochs: int | None = None,
        every_s: float | None = None,
        max_to_keep: int | None = 3,
        *,
        at_end: bool | None = None,
        monitor: str | None = None,
        mode: Mode = "auto",
        save_best_only: bool = False,
        initial_value_threshold: float | None = None,
        keep_best: int | None = None,
        monitor_unit: Literal["epochs", "evaluations"] = "epochs",
        keep_every: int | None = None,
        save_weights_only: bool = False,
        template: str = DEFAULT_TEMPLATE,
        max_in_flight: int = 2,
        when_full: WhenFull = "wait",
        marker_timeout_s: float = 60.0,
        fsync: bool = True,
        retries: int = 2,
        retry_delay_s: float = 1.0,
        on_failure: Literal["continue", "stop"] = "continue",
        stage: Literal["device", "host"] = "device",
    ) -> None:
        _require_counts(
            every=every, every_epochs=every_epochs, max_to_keep=max_to_keep, keep_best=keep_best,
            keep_every=keep_every, max_in_flight=max_in_flight,
        )  # fmt: skip
        require_count("Checkpointer", "retries", retries)
        require_number("Checkpointer", "retry_delay_s", retry_delay_s, at_least=0)
        require_number("Checkpointer", "marker_timeout_s", marker_timeout_s, above=0)
        if every_s is not None:
            require_number("Checkpointer", "every_s", every_s, above=0)
        require_choice("Checkpointer", "monitor_unit", monitor_unit, ("epochs", "evaluations"))
        require_choice("Checkpointer", "when_full", when_full, ("wait", "skip", "fail"))
        require_choice("Checkpointer", "on_failure", on_failure, ("continue", "stop"))
        require_choice("Checkpointer", "stage", stage, ("device", "host"))
        goal = goal_of(monitor, mode) if save_best_only or keep_best is not None else None
        require_decidable(save_best_only, every, every_s, initial_value_threshold)
        self._best = BestSoFar(goal, initial_value_threshold) if goal is not None and save_best_only else None
        self._best_every = every_epochs or 1
        self._directory = Path(directory)
        self._template = template
        self._monitor = monitor
        self._reader: MetricReader | None = None
        self._by_evaluation = monitor_unit == "evaluations"
        self._may_lack_evaluations = False
        self._shown = check_template(template)
        self._stops = on_failure == "stop"
        self._schedule: dict[str, Any] = {
            "every": every,
            "every_epochs": None if save_best_only else every_epochs,
            "every_s": every_s,
            "at_end": not save_best_only if at_end is None else at_end,
            "on_command": not save_best_only,
            "max_in_flight": max_in_flight,
            "when_full": when_full,
        }
        self._options = partial(
            WriterOptions,
            retention=Retention(max_to_keep, keep_best, keep_every, goal.mode if goal is not None else "min"),
            marker_timeout_s=marker_timeout_s,
            fsync=fsync,
            retries=retries,
            retry_delay_s=retry_delay_s,
            weights_only=save_weights_only,
            monitor=monitor,
            stage=stage,
        )
        measured = EpochCompleted if monitor_unit == "epochs" else EvalCompleted
        self.events = (SnapshotTaken, CheckpointFailed, CheckpointSkipped)
        if monitor is not None or self._shown:
            self.events = (*self.events, measured)
        self.lag = {measured: 0} if save_best_only else None
        self.resumes_runs = not save_weights_only
        self._measured: tuple[int, dict[str, float]] = (-1, {})
        self._said_missing = False
        self._has_read = False
        self._runs: tuple[str, ...] = ()
        self._run: RunContext | None = None
        self._writer: CheckpointWriter | None = None

    @property
    def _name(self) -> str:
        return self.name or type(self).__name__

    async def start(self, run: RunContext) -> None:
        """Make the directory, remove what killed runs left half-written, tell the loop the schedule.

        Raises:
            ConfigurationError: the directory cannot be made, or ``params`` gives something else than leaves.
        """
        self._run = run
        self._may_lack_evaluations = run.can_evaluate and not self._by_evaluation
        if self._monitor is not None:
            self._reader = MetricReader(self._name, self._monitor, evaluates=self._may_lack_evaluations)
        self._runs = (*(one for one in self._runs if one != run.run_id), run.run_id)
        directory = (run.run_dir / self._directory).absolute()
        options = self._options(owner=self._name, directory=directory, runs=frozenset(self._runs))
        params = {path: place for path, place in run.params.items() if place is not None}
        if options.weights_only and len(params) < len(run.params):
            raise ConfigurationError(
                f"{self._name}(save_weights_only=True): Trainer(params=...) gives arrays that are no leaves of the "
                "state, so that they could not be put back. Let it pick a part of the state."
            )
        self._writer = CheckpointWriter(options, params, run.publish)
        try:
            await in_own_thread(self._writer.open().result)
        except OSError as error:
            raise ConfigurationError(
                f"{self._name} cannot keep checkpoints in {directory}: {error}."
            ) from error
        run.schedule_checkpoints(
            self._name,
            **self._schedule,
            at_start=self._lacks_the_best(run.control.step, self._writer.steps()),
        )

    def _lacks_the_best(self, step: int, there: frozenset[int]) -> bool:
        """Whether the run resumes at the best step so far, and was killed before that was on disk."""
        best = self._best
        if best is None or best.state.step is None or best.state.step in there:
            return False
        if best.state.step == step:
            return True
        best.lost(best.state.step)
        return False

    async def finish(self) -> None:
        """Wait until what was taken is written. Cancelled, it says what is not, and gives that up."""
        if self._reader is not None and not self._has_read:
            self._reader.end()
        writer = self._writer
        if writer is None:
            return
        try:
            await in_own_thread(writer.through().result)
        finally:
            steps = [job.step for job in writer.unfinished]
            if steps:
                writer.hurry()
                logger.error(
                    "The run ends before %s has written the checkpoints of the steps %s: the one in progress may still "
                    "be committed while the process lives, the others are lost. Raise Trainer(drain_timeout_s=...).",
                    self._name, steps,
                )  # fmt: skip

    async def stop(self) -> None:
        """Close Orbax. Raises what failed in it and was not told before."""
        writer, self._writer = self._writer, None
        if writer is not None:
            await in_own_thread(writer.close().result)

    async def handle(self, event: Event, control: Control) -> None:
        """Returns at once: what takes time is done by the thread, so that a cut never waits for this subscriber."""
        match event:
            case SnapshotTaken():
                self._take(event)
            case EpochCompleted() | EvalCompleted():
                value = self._measure(event)
                if value is not None:
                    self._decide(event, value, control)
            case CheckpointFailed() | CheckpointSkipped() if event.requested_by in (None, self._name):
                if self._best is not None:
                    self._best.lost(event.step)
                if self._stops and isinstance(event, CheckpointFailed):
                    control.stop(reason=f"the checkpoint of step {event.step} failed", final=False)
            case _:
                pass

    def _measure(self, event: EpochCompleted | EvalCompleted) -> float | None:
        """Remember what is to be known of a checkpoint of this step; the monitor's value."""
        evaluated = isinstance(event, EvalCompleted)
        metrics = (
            {f"val_{name}": value for name, value in event.metrics.items()} if evaluated else event.metrics
        )
        value = self._reader.read(metrics) if self._reader is not None else None
        known = {name: float(metrics[name]) for name in self._shown if name in metrics}
        missing = self._shown - known.keys()
        if self._may_lack_evaluations and not any(name.startswith("val_") for name in metrics):
            missing = {name for name in missing if not name.startswith("val_")}  # those are still to come
        if missing and not self._said_missing:
            self._said_missing = True
            logger.warning(
                "%s cannot name its checkpoints %r: %s is not among the metrics there are (%s). They get the default.",
                self._name, self._template, ", ".join(sorted(missing)), ", ".join(sorted(metrics)),
            )  # fmt: skip
        if self._reader is not None and value is not None:
            self._has_read = True
            known[self._reader.metric] = value
        self._measured = (event.step, known)
        return value

    def _decide(self, event: EpochCompleted | EvalCompleted, value: float, control: Control) -> None:
        """Ask for a checkpoint where the value is the best."""
        if isinstance(event, EpochCompleted) and (event.epoch + 1) % self._best_every:
            return
        if self._best is not None and self._best.improves(value, event.step):
            control.checkpoint(reason=f"the best value so far: {value:.6g}")

    def _take(self, event: SnapshotTaken) -> None:
        """Have the snapshot written, if it is for this Checkpointer."""
        run, writer = self._run, self._writer
        if event.purpose != "checkpoint" or event.requested_by not in (None, self._name):
            return
        measured_at, values = self._measured
        metrics = values if measured_at == event.step else {}
        name = self._folder_name(event, metrics)
        if run is None or writer is None or (claimed := run.claim(self._name, event)) is None:
            return
        if claimed.snapshot.device.released:  # the device had no room for it, which the loop has said
            claimed.finish()
            return
        writer.submit(Job(claimed, name, event.step, event.epoch, event.tag, event.run_id, metrics))

    def _folder_name(self, event: SnapshotTaken, metrics: Mapping[str, float]) -> str:
        try:
            name = fill_template(self._template, event.step, event.epoch, metrics)
        except (KeyError, ConfigurationError):  # not measured here, or of more digits than a name may have
            name = fill_template(DEFAULT_TEMPLATE, event.step, event.epoch, {})
        return name if event.tag == scheduled_tag(event.step) else f"{name}-{event.tag}"

    def saved_run(self, run_dir: Path, which: bool | str | int | Path) -> SavedRun | None:
        """See ``Subscriber``."""
        return find_checkpoint(run_dir / self._directory, which)

    def state_dict(self) -> dict[str, Any]:
        """What decides on later checkpoints, as plain JSON data."""
        best = self._best.state if self._best is not None else None
        step, metrics = self._measured
        return CheckpointerState(best=best, runs=self._runs, measured_at=step, measured=metrics).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave.

        Raises:
            StateError: another version, or broken.
        """
        saved = CheckpointerState.parse(self._name, state)
        self._runs, self._measured = saved.runs, (saved.measured_at, dict(saved.measured))
        self._has_read = saved.measured_at >= 0
        if self._best is not None and saved.best is not None:
            self._best.state = saved.best


def _require_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None:
            require_count("Checkpointer", name, count, at_least=1)
