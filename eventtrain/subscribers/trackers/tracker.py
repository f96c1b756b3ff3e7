"""``Tracker``: base of the subscribers that write a run to a tracker, which may be slow, fail or hang.

Its thread runs the jobs that the subscriber adds, repeats them while the target is away, flushes, and reports losses.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any

from eventtrain.errors import BusClosed, EventTrainError, QueueFull, StorageError, SubscriberError
from eventtrain.events import Event, SubscriberFailed
from eventtrain.subscribers._shared.retry import attempts
from eventtrain.subscribers._shared.worker_thread import WorkerThread, in_own_thread
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.validation.arguments import require_number

logger = logging.getLogger("eventtrain")

ROW_LIMIT = 100_000
"""Rows that may wait; further ones are lost, and counted."""
RETRIES_AT_END = 2
"""How often a job is repeated after the run has ended, while the target is away."""


@dataclass(frozen=True)
class TrackerStatistics:
    """Counts of a tracker's rows."""

    written: int = 0
    waiting: int = 0
    lost: int = 0
    outages: int = 0
    """How often the target failed, or fell behind by the row limit, after it had worked."""


@dataclass(frozen=True)
class _Job:
    work: Callable[[], None]
    step: int
    event_kind: str
    rows: int


class TrackerThread(WorkerThread):
    """Runs jobs in order; reports each outage once, with the number of rows that it cost.

    A job that raises ``StorageError(may_pass=True)`` is repeated, with growing delays, until it works or the run has
    ended; jobs must be repeatable. The rows of a job that raises another exception are lost. Only the text of a
    StorageError is shown, so it must not contain secrets; of other exceptions only the type is.

    An outage begins with the first failure, or when ``row_limit`` rows wait; SubscriberFailed reports it. It ends with
    a job that works while at most half of ``row_limit`` waits; if rows were lost, a second SubscriberFailed says how
    many.

    Args:
        owner, publish: as of ``WorkerThread``.
        target: the tracker in messages, such as "the tracking server"; without secrets.
        flush: makes durable what the jobs wrote; called in the thread, at most ``flush_interval_s`` after a job.
            May raise as jobs do.
        row_limit: rows that may wait.
        retry_delay_s, max_retry_delay_s: seconds before a job is repeated; doubled each time, up to the second.
    """

    def __init__(
        self,
        owner: str,
        publish: Callable[[Event], None],
        *,
        target: str,
        flush: Callable[[], None] | None = None,
        flush_interval_s: float = 5.0,
        row_limit: int = ROW_LIMIT,
        retry_delay_s: float = 1.0,
        max_retry_delay_s: float = 30.0,
    ) -> None:
        super().__init__(owner, publish)
        self._owner = owner
        self._target = target
        self._flush = flush
        self._flush_interval_s = flush_interval_s
        self._row_limit = row_limit
        self._retry_delay_s = retry_delay_s
        self._max_retry_delay_s = max_retry_delay_s
        self._lock = threading.RLock()
        self.statistics = TrackerStatistics()
        """Counts up to now. Any thread."""
        self._lost_before: int | None = None
        """Rows lost before the current outage; None while there is none."""
        self._unpublished: list[Event] = []
        self._ending = threading.Event()
        self._given_up = False
        self._last = _Job(lambda: None, 0, "run_started", 0)

    # --- any thread; never blocks -----------------------------------------------------------------------------

    def add(self, work: Callable[[], None], *, step: int, event_kind: str, rows: int = 1) -> bool:
        """Queues ``work``, unless too many rows wait; returns whether it was queued.

        Args:
            work: writes the rows; called in the thread, perhaps several times.
            step, event_kind: of the event that it is done for; shown in SubscriberFailed.
            rows: its share of ``row_limit``; 0 for the few jobs that begin and end a run, which are always queued.
        """
        job = self._last = _Job(work, step, event_kind, rows)
        with self._lock:
            waiting = self.statistics.waiting
            taken = waiting + rows <= self._row_limit
            if taken:
                self._count(waiting=rows)
        if taken:
            self.put(partial(self._do, job))
            return True
        text = f"{self._target} is slower than the run: {waiting} rows wait, and further ones are lost"
        self._begin_outage(job, text)
        self._count(lost=rows)
        return False

    # --- on the event loop ------------------------------------------------------------------------------------

    async def flushed_within(self, timeout_s: float) -> bool:
        """Waits until the jobs so far are done and flushed; returns whether they were.

        Returns False at once during an outage and after the end: a checkpoint does not wait for a target that is away.
        """
        if self._lost_before is not None or not self.is_alive():
            return False
        flushed = threading.Event()

        def flush() -> None:
            self._do_flush()
            flushed.set()

        self.put(flush)
        in_time = await in_own_thread(partial(flushed.wait, timeout_s))
        return in_time and self._lost_before is None

    async def aclose(self, timeout_s: float) -> None:
        """Ends the thread after the jobs so far; waits for that at most ``timeout_s`` seconds.

        Raises:
            SubscriberError: that was too short; the message counts the rows.
        """

        def report() -> None:
            logger.error("The time for the end of the run is over; %s lacks %s", self._target, self._left)

        if not await self.finish_within(timeout_s, report):
            raise SubscriberError(
                f"{self._target} did not take everything within {timeout_s:g} s after the run; it lacks {self._left}."
            )

    def finish(self, timeout_s: float) -> bool:
        """As of ``WorkerThread``."""
        self._ending.set()  # a job that waits is repeated at once
        return super().finish(timeout_s)

    # --- on the thread ----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Runs jobs and flushes until ``finish``."""
        flush_at_s = None
        while not self.stopping.is_set():
            try:
                job = self._jobs.get(
                    timeout=None if flush_at_s is None else max(0.0, flush_at_s - monotonic())
                )
            except queue.Empty:
                flush_at_s = None
                self._do_flush()
                continue
            if job is None:
                self._do_flush()
                break
            job()
            if flush_at_s is None:
                flush_at_s = monotonic() + self._flush_interval_s
            elif monotonic() >= flush_at_s:  # there was always a next job
                flush_at_s = None
                self._do_flush()
        if self._lost_before is not None and not self.stopping.is_set():
            self._end_outage()

    def _do_flush(self) -> None:
        if self._flush is not None:
            self._do(_Job(self._flush, self._last.step, "flush", 0))

    def _do(self, job: _Job) -> None:
        for _ in self._attempts():
            error = _error_of(job.work)
            if error is None:
                self._succeeded(job)
                return
            self._begin_outage(job, f"{self._target}: {error}")
            if not error.may_pass:
                break
        else:
            self._given_up = True
            if self.stopping.is_set():
                return  # its rows stay among those that wait, which ``aclose`` reports
        self._count(waiting=-job.rows, lost=job.rows)

    def _attempts(self) -> Iterator[int]:
        """Attempts without end while the run lasts, then a few more; none after a job was given up."""
        delay_s = self._retry_delay_s
        if not self._ending.is_set():
            yield from attempts(math.inf, delay_s, self._ending.wait, max_delay_s=self._max_retry_delay_s)
        if not self._given_up:
            yield from attempts(RETRIES_AT_END, delay_s, self.stopping.wait, max_delay_s=delay_s)

    def _succeeded(self, job: _Job) -> None:
        self._count(waiting=-job.rows, written=job.rows)
        if self._unpublished:
            self.publish(self._unpublished.pop(0))
        if self._lost_before is not None and self.statistics.waiting <= self._row_limit // 2:
            self._end_outage()

    # --- reports ----------------------------------------------------------------------------------------------

    def _begin_outage(self, job: _Job, text: str) -> None:
        with self._lock:
            if self._lost_before is not None:
                return
            self._lost_before = self.statistics.lost
            self._count(outages=1)
        logger.error("%s", text)
        event = self._failure(job, text)
        try:  # also called on the event loop, which must not wait
            self._publish(event)
        except QueueFull:
            self._unpublished.append(event)
        except BusClosed:
            pass
        except EventTrainError as error:
            logger.error("The event that reports it was not published: %s", error)

    def _end_outage(self) -> None:
        with self._lock:
            lost = self.statistics.lost - (self._lost_before or 0)
            self._lost_before = None
        if not lost:
            logger.info("%s works again; no row was lost", self._target)
            return
        text = f"{self._target}: {lost} rows were lost"
        logger.error("%s", text)
        self.publish(self._failure(self._last, text))

    def _failure(self, job: _Job, text: str) -> SubscriberFailed:
        return SubscriberFailed(step=job.step, subscriber=self._owner, event_kind=job.event_kind, error=text)

    @property
    def _left(self) -> str:
        now = self.statistics
        return f"{now.waiting + now.lost} rows" if now.waiting or now.lost else "the end of the run"

    def _count(self, *, written: int = 0, waiting: int = 0, lost: int = 0, outages: int = 0) -> None:
        with self._lock:
            now = self.statistics
            self.statistics = TrackerStatistics(
                now.written + written, now.waiting + waiting, now.lost + lost, now.outages + outages
            )


def _error_of(work: Callable[[], None]) -> StorageError | None:
    try:
        work()
    except StorageError as error:
        return error
    except Exception as error:  # its text may contain secrets
        return StorageError(type(error).__name__)
    return None


FLUSH_TIMEOUT_S = 10.0
"""How long a checkpoint waits for rows to be written."""


class Tracker(Subscriber):
    """Abstract. A subclass starts the thread in ``start`` and adds jobs to it in ``handle``, which never blocks.

    Args:
        finish_timeout_s: how long ``stop`` waits for rows that are not written.

    Raises:
        ConfigurationError: ``finish_timeout_s`` is invalid.
    """

    disable_after = None  # a tracker that was away for a day may be back

    def __init__(self, finish_timeout_s: float) -> None:
        require_number(type(self).__name__, "finish_timeout_s", finish_timeout_s, at_least=0)
        self._finish_timeout_s = finish_timeout_s
        self._thread: TrackerThread | None = None

    @property
    def statistics(self) -> TrackerStatistics:
        """Counts of the rows of this run, or of the last one."""
        return self._thread.statistics if self._thread is not None else TrackerStatistics()

    async def stop(self) -> None:
        """Waits for rows that are not written.

        Raises:
            SubscriberError: that took longer than ``finish_timeout_s``.
        """
        thread = self._thread
        if thread is not None and thread.is_alive():
            if (work := self._last_job()) is not None:
                thread.add(work, step=0, event_kind="stop", rows=0)
            await thread.aclose(self._finish_timeout_s)

    @property
    def unwritten(self) -> int:
        """Number of rows that the tracker lacks."""
        now = self.statistics
        return now.waiting + now.lost

    def _last_job(self) -> Callable[[], None] | None:
        """The job that ends the run at the tracker, if it needs one."""
        return None

    @property
    def _owner(self) -> str:
        return self.name or type(self).__name__

    def _start_thread(
        self, run: RunContext, target: str, first_job: Callable[[], None] | None = None, **options: Any
    ) -> None:
        """Starts a thread for ``run``; ``options`` are those of ``TrackerThread``."""
        self._thread = TrackerThread(self._owner, run.publish, target=target, **options)
        self._thread.start()
        if first_job is not None:
            self._thread.add(first_job, step=run.start_step, event_kind="start", rows=0)

    def _add(self, event: Event, work: Callable[[], None], *, rows: int = 1) -> bool:
        """Adds a job to the thread; returns whether it was queued."""
        thread = self._thread
        return thread is not None and thread.add(work, step=event.step, event_kind=event.kind, rows=rows)

    async def _flushed(self) -> bool:
        """Waits until everything so far is written; False if that takes too long, or the tracker is away."""
        return self._thread is not None and await self._thread.flushed_within(FLUSH_TIMEOUT_S)
