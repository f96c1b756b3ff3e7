"""``Tracker``: base of the subscribers that write a run to a tracker, in a thread of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eventtrain.events import Event
from eventtrain.subscribers._shared.validation import require_number
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.trackers.tracker_thread import TrackerStatistics, TrackerThread

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
