"""``replay``: gives the events of a finished run, from its log, to subscribers that were not there."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from eventtrain.bus.bus import EventBus, core_of
from eventtrain.control.control_plane import ControlPlane
from eventtrain.control.loop_statistics import LoopStatistics
from eventtrain.control.run_context import RunContext
from eventtrain.errors import ConfigurationError, RunDirInUse
from eventtrain.events import (
    EpochCompleted,
    EpochStarted,
    Event,
    HyperparamChanged,
    RunStarted,
    StepCompleted,
    StepsCompleted,
    StepStarted,
)
from eventtrain.events.parsing import NONE
from eventtrain.runs.finding import find_log
from eventtrain.runs.owner import is_held, owner_of
from eventtrain.runs.reading import read_events
from eventtrain.subscribers._shared.paths import local_path
from eventtrain.subscribers._shared.step_table import follows
from eventtrain.subscribers.base import Subscriber, name_of, subscribe
from eventtrain.trainer.execution import END_S, EventLoopThread
from eventtrain.trainer.run_directory import run_directory
from eventtrain.trainer.subscriber_lifecycle import RunSubscriber, SubscriberLifecycle
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_number

logger = logging.getLogger("eventtrain")

MOST_STEPS = 1000
"""Steps that are given together. The next ones follow when all subscribers have handled them."""


@checked
def replay(
    run_dir: str | Path,
    into: Sequence[Subscriber],
    *,
    out_dir: str | Path | None = None,
    types: Any = NONE,
    drain_timeout_s: float = 30.0,
) -> int:
    """Gives the events of a finished run to fresh subscribers, as the run would have done. Blocks until they are done.

    For a tracker that was forgotten, alert rules to be tried on history, or a report to be made again. Events keep
    their run_id, attempt, seq and time. StepsCompleted is made from the steps of the log. A log with several calls of
    ``fit`` starts and stops the subscribers once for each.

    Nothing is trained, so commands are rejected, with an event and in the log; the subscribers see that as in a
    run. Subscribers that need the state or the loop at their start (checkpoints, histograms, hyperparameters to be set,
    evaluations, traces) are refused by name.

    Args:
        run_dir: of the run, or the path of its JSONL log. A run that was killed is replayed up to its last event.
        into: the subscribers; fresh ones, because they keep state.
        out_dir: the folder that their relative paths are in; by default that of the run. Files there are treated as
            by a run that begins: a logger, for example, appends to its file.
        types: your own event classes. The built-in ones are always known.
        drain_timeout_s: how long the subscribers may take to finish.

    Returns:
        The number of events that the log has.

    Raises:
        ConfigurationError: the run has no JSONL log, or an empty one; a subscriber writes to that log, or requires a
            run that trains.
        RunDirInUse: the run is in progress.
        EventParseError: a row is not a known event. The events before it were given.
        SubscriberError: a subscriber with ``on_error="fail"`` failed.
    """
    require_number("replay", "drain_timeout_s", drain_timeout_s, at_least=0)
    if not into:
        raise ConfigurationError("replay(into=[]): into must have at least one subscriber.")
    path = local_path(run_dir, "replay(run_dir=...)")
    events = read_events(path, types=types)
    log = find_log(path)
    if log.suffix != ".jsonl":
        raise ConfigurationError(
            f"replay requires a log of JSONLLogger, and {log} is a table, which has metrics only. Read it with "
            "read_events, or log the next run with subscribers.JSONLLogger."
        )
    folder = path if path.is_dir() else log.parent
    for owner in (folder, log.parent):
        if is_held(owner):
            raise RunDirInUse(
                f"replay requires a run that has ended, and {owner} is in use by {owner_of(owner)}. Wait for its end, "
                "or follow it with read_events(follow=True)."
            )
    out = folder if out_dir is None else local_path(out_dir, "replay(out_dir=...)")
    for subscriber in into:
        if any((out / output).resolve() == log.resolve() for output in subscriber.output_paths):
            raise ConfigurationError(
                f"{name_of(subscriber)} writes to {log}, which is the log that is replayed. "
                "Give it another path, or pass out_dir=..."
            )
    with events:
        first = next(events, None)
        if first is None:
            raise ConfigurationError(f"replay requires events, and {log} is empty.")
        with run_directory(out, first.run_id, into):
            return _Replay(out.absolute(), into, drain_timeout_s).run(chain([first], events))


class _Replay:
    def __init__(self, run_dir: Path, into: Sequence[Subscriber], drain_timeout_s: float) -> None:
        self._run_dir = run_dir
        self._drain_timeout_s = drain_timeout_s
        self._bus = core_of(EventBus(drain_timeout_s=drain_timeout_s))
        self._plane = ControlPlane(self._bus)
        self._bus.control_source = self._plane
        self._plane.queue.close("the run is replayed from its log, so there is nothing to steer")
        self._members = [RunSubscriber(one, subscribe(self._bus, one)) for one in into]
        self._lifecycle: SubscriberLifecycle | None = None
        self._last_step = 0
        self._steps: list[Any] = []

    def run(self, events: Iterable[Event]) -> int:
        loop, count = EventLoopThread(self._bus, "asyncio", None), 0
        loop.start()
        try:
            for batch in _batches(events):
                if self._lifecycle is None or isinstance(batch[0], RunStarted):
                    self._stop()
                    self._start(batch[0])
                count += len(batch)
                self._give(batch)
        finally:
            self._stop()
            loop.end(END_S)
        self._raise_failure()
        return count

    # --- what a subscriber sees of the run, as RunFigures ---------------------------------------------------------

    def statistics(self) -> LoopStatistics:
        return LoopStatistics(step=self._plane.view.step)

    def program(self) -> None:
        return None

    def arrays(self) -> tuple[()]:
        return ()

    def _start(self, first: Event) -> None:
        bus, plane = self._bus, self._plane
        bus.run_id, bus.attempt = first.run_id, first.attempt
        plane.view.step = self._last_step = first.step
        self._lifecycle = SubscriberLifecycle(bus, self._members)
        context = RunContext(
            run_id=first.run_id,
            run_dir=self._run_dir,
            control=plane.control,
            publish=bus.publish,
            start_step=first.step if isinstance(first, RunStarted) else 0,
            attempt=max(1, first.attempt),
            unknown_params="a replayed run has none.",
            _bus=bus,
            _figures=self,
        )
        self._lifecycle.start(context, _wait_for)

    def _stop(self) -> None:
        lifecycle, self._lifecycle = self._lifecycle, None
        if lifecycle is None:
            return
        self._give_window()
        left = lifecycle.stop(monotonic() + self._drain_timeout_s, self._plane.view.step)
        if left:
            listing = ", ".join(f"{name}: {count}" for name, count in left.items())
            logger.warning("Events were not handled within %.1f s: %s", self._drain_timeout_s, listing)

    def _give(self, batch: Sequence[Event]) -> None:
        """Gives events of one class to the subscribers, and waits until they have handled them."""
        first, last = batch[0], batch[-1]
        if isinstance(last, StepsCompleted) and last.last_step <= self._last_step:
            return  # its steps were in the log, and a window is made of them
        if not self._belongs_to_window(first):
            self._give_window()
        self._bus.attempt = last.attempt
        self._note(last)
        self._bus.submit(self._deliver, batch).result()
        if isinstance(last, StepCompleted):
            self._last_step = last.step
            self._steps += batch
        self._raise_failure()

    def _belongs_to_window(self, event: Event) -> bool:
        if isinstance(event, StepStarted) or not self._steps:
            return True
        return len(self._steps) < MOST_STEPS and follows(event, self._steps[-1])

    def _give_window(self) -> None:
        """Gives the steps since the last window as another one."""
        steps, self._steps = self._steps, []
        if steps and self._bus.has_subscribers(StepsCompleted):
            self._bus.submit(self._deliver, [_window(steps)]).result()

    async def _deliver(self, events: Sequence[Event]) -> None:
        with self._bus.table.delivery_lock:
            for subscription in self._bus.table.route(type(events[0])):
                subscription.offer(events)
        await self._bus.wait_until_quiet()

    def _note(self, event: Event) -> None:
        view = self._plane.view
        view.step = event.step
        match event:
            case EpochStarted() | EpochCompleted():
                view.hyperparams = event.hyperparams
            case HyperparamChanged():
                name = event.path if event.path in view.hyperparams else event.name
                view.hyperparams = {**view.hyperparams, name: event.new}
            case _:
                pass

    def _raise_failure(self) -> None:
        if self._bus.failure is not None:
            raise self._bus.failure


def _wait_for(future: Future[None]) -> bool:
    wait([future])
    return True


def _batches(events: Iterable[Event]) -> Iterator[list[Event]]:
    """Yields consecutive steps of one epoch with the same metrics together, and every other event alone."""
    batch: list[Event] = []
    for event in events:
        before = batch[-1] if batch else None
        if not (isinstance(before, StepCompleted) and follows(event, before) and len(batch) < MOST_STEPS):
            if batch:
                yield batch
            batch = []
        batch.append(event)
    if batch:
        yield batch


def _window(steps: Sequence[StepCompleted]) -> StepsCompleted:
    first, last = steps[0], steps[-1]
    window = StepsCompleted(
        step=last.step,
        first_step=first.step,
        last_step=last.step,
        epoch=first.epoch,
        first_batch=first.batch,
        metrics={name: np.asarray([step.metrics[name] for step in steps]) for name in first.metrics},
    )
    identity = ("run_id", "attempt", "stream", "seq", "process", "time")
    return window.model_copy(update={name: getattr(last, name) for name in identity})
