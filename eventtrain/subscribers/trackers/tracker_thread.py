"""``TrackerThread``: rows on their way to a tracker, which may be slow, fail or hang without touching the run.

A tracker's subscriber only puts jobs in; the thread does them in order, tries again while the target is away, flushes
from time to time, and says what was lost. Nothing here knows what a row is.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import monotonic

from eventtrain.errors import BusClosed, EventTrainError, QueueFull, StorageError, SubscriberError
from eventtrain.events import Event, SubscriberFailed
from eventtrain.subscribers._shared.worker_thread import WorkerThread, in_own_thread

logger = logging.getLogger("eventtrain")

ROW_LIMIT = 100_000
"""Rows that may wait; what comes beyond is lost, and counted."""
TRIES_AT_END = 2
"""How often a job is tried again, while the target is away, once the run has ended."""


@dataclass(frozen=True)
class TrackerStatistics:
    """What became of the rows.

    Attributes:
        written, waiting, lost: rows.
        outages: how often the target failed, or fell behind by the limit, after having worked.
    """

    written: int = 0
    waiting: int = 0
    lost: int = 0
    outages: int = 0


@dataclass(frozen=True)
class _Job:
    work: Callable[[], None]
    step: int
    event_kind: str
    rows: int


class TrackerThread(WorkerThread):
    """Does jobs in order; what they raise is said once for each outage, with the number of rows that it cost.

    A job that raises ``StorageError(may_pass=True)`` is tried again, with growing delays, until it works or the run
    has ended; it has to be one that can be repeated. What any other exception ends is lost. Only the text of a
    StorageError is shown, so it must hold no secrets; of other exceptions only the type is.

    An outage begins with the first failure, or when ``row_limit`` rows wait, and is said by SubscriberFailed. It ends
    with a job that works while no more than half of ``row_limit`` waits; if it cost rows, a second SubscriberFailed
    says how many.

    Args:
        owner: name of the subscriber.
        publish: ``EventBus.publish``.
        target: what is written to, for messages, without secrets, such as "the tracking server".
        flush: makes durable what the jobs wrote; called in the thread, at most ``flush_interval_s`` after a job.
            May raise as jobs do.
        flush_interval_s: seconds.
        row_limit: rows that may wait.
        retry_delay_s, max_retry_delay_s: seconds before another try, doubled each time up to the second.
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
        self._lock = threading.Lock()
        self._statistics = TrackerStatistics()
        self._outage: int | None = None
        """The rows lost before the outage that lasts; None: all is well."""
        self._unsaid: list[Event] = []
        self._ending = threading.Event()
        self._given_up = False
        self._last = _Job(lambda: None, 0, "run_started", 0)

    # --- any thread; never blocks -----------------------------------------------------------------------------

    def add(
        self,
        work: Callable[[], None],
        *,
        step: int,
        event_kind: str,
        rows: int = 1,
        must_keep: bool = False,
    ) -> bool:
        """Have ``work`` done, unless too many rows wait; whether it will be tried.

        Args:
            work: writes the rows; called in the thread, perhaps several times.
            step, event_kind: of the event that it is done for; what SubscriberFailed says.
            rows: how many of ``row_limit`` it takes.
            must_keep: take it also at the limit; for the few that say how a run began and ended.
        """
        job = self._last = _Job(work, step, event_kind, rows)
        with self._lock:
            waiting = self._statistics.waiting
            taken = must_keep or waiting + rows <= self._row_limit
            if taken:
                self._count(waiting=rows)
        if taken:
            self.put(partial(self._do, job))
            return True
        self._begin_outage(
            job, f"{self._target} is slower than the run: {waiting} rows wait, and what comes now is lost"
        )
        with self._lock:
            self._count(lost=rows)
        return False

    @property
    def statistics(self) -> TrackerStatistics:
        """As of now."""
        return self._statistics

    # --- on the event loop ------------------------------------------------------------------------------------

    async def settle(self, timeout_s: float) -> bool:
        """Wait until everything so far was written and flushed; False, at once, where an outage lasts, or in the end.

        For ``flush`` of the subscriber: a checkpoint does not wait for a target that is away.
        """
        if self._outage is not None or not self.is_alive():
            return False
        done = threading.Event()
        self.put(partial(self._settle, done))
        in_time = await in_own_thread(partial(done.wait, timeout_s))
        return in_time and self._outage is None

    async def aclose(self, timeout_s: float) -> None:
        """Take no more, and wait for what is on its way, but no longer than ``timeout_s`` seconds.

        Raises:
            SubscriberError: that was too short; the message counts the rows.
        """

        def give_up() -> None:
            logger.error("The time for the end of the run is over; %s lacks %s", self._target, self._left)

        if not await self.finish_within(timeout_s, give_up):
            raise SubscriberError(
                f"{self._target} did not take everything within {timeout_s:g} s after the run; it lacks {self._left}."
            )

    def finish(self, timeout_s: float) -> bool:
        """Take no more jobs, and wait for those there are; whether ``timeout_s`` was enough. Blocks."""
        self._ending.set()  # whoever waits for the next try tries now
        return super().finish(timeout_s)

    # --- on the thread ----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until ``finish``."""
        flush_at = None
        while not self.stopping.is_set():
            try:
                job = self._jobs.get(timeout=None if flush_at is None else max(0.0, flush_at - monotonic()))
            except queue.Empty:
                flush_at = None
                self._do_flush()
                continue
            if job is None:
                self._do_flush()
                break
            job()
            if flush_at is None:
                flush_at = monotonic() + self._flush_interval_s
            elif monotonic() >= flush_at:  # there was always a next job
                flush_at = None
                self._do_flush()
        if self._outage is not None and not self.stopping.is_set():
            self._end_outage()

    def _settle(self, done: threading.Event) -> None:
        self._do_flush()
        done.set()

    def _do_flush(self) -> None:
        if self._flush is not None:
            self._do(_Job(self._flush, self._last.step, "flush", 0))

    def _do(self, job: _Job) -> None:
        delay_s = self._retry_delay_s
        tries_at_end = 0
        while not self._given_up:
            error = _attempted(job.work)
            if error is None:
                self._succeeded(job)
                return
            self._begin_outage(job, f"{self._target}: {error}")
            if not error.may_pass:
                break
            if not self._ending.is_set():
                self._ending.wait(delay_s)
                delay_s = min(delay_s * 2, self._max_retry_delay_s)
            elif tries_at_end < TRIES_AT_END:
                tries_at_end += 1
                self.stopping.wait(self._retry_delay_s)
            else:
                self._given_up = True
            if self.stopping.is_set():
                return  # its rows go on waiting: whoever set it says how many
        with self._lock:
            self._count(waiting=-job.rows, lost=job.rows)

    def _succeeded(self, job: _Job) -> None:
        with self._lock:
            self._count(waiting=-job.rows, written=job.rows)
        if self._unsaid:
            self.publish(self._unsaid.pop(0))
        if self._outage is not None and self._statistics.waiting <= self._row_limit // 2:
            self._end_outage()

    # --- what is said -----------------------------------------------------------------------------------------

    def _begin_outage(self, job: _Job, text: str) -> None:
        with self._lock:
            if self._outage is not None:
                return
            self._outage = self._statistics.lost
            self._count(outages=1)
        logger.error("%s", text)
        event = SubscriberFailed(step=job.step, subscriber=self._owner, event_kind=job.event_kind, error=text)
        try:  # also called on the event loop, which may not wait
            self._publish(event)
        except QueueFull:
            self._unsaid.append(event)
        except BusClosed:
            pass
        except EventTrainError as error:
            logger.error("The event that says so was not taken: %s", error)

    def _end_outage(self) -> None:
        with self._lock:
            before, self._outage = self._outage, None
            lost = self._statistics.lost - (before or 0)
        if not lost:
            logger.info("%s works again; nothing was lost", self._target)
            return
        text = f"{self._target}: {lost} rows were lost"
        logger.error("%s", text)
        last = self._last
        self.publish(
            SubscriberFailed(step=last.step, subscriber=self._owner, event_kind=last.event_kind, error=text)
        )

    @property
    def _left(self) -> str:
        now = self._statistics
        return f"{now.waiting + now.lost} rows" if now.waiting or now.lost else "what says that the run ended"

    def _count(self, *, written: int = 0, waiting: int = 0, lost: int = 0, outages: int = 0) -> None:
        now = self._statistics
        self._statistics = TrackerStatistics(
            now.written + written, now.waiting + waiting, now.lost + lost, now.outages + outages
        )


def _attempted(work: Callable[[], None]) -> StorageError | None:
    try:
        work()
    except StorageError as error:
        return error
    except Exception as error:  # its text may hold secrets
        return StorageError(type(error).__name__)
    return None
