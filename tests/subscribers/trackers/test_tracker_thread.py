"""TrackerThread: a target that is slow, fails or hangs costs the run nothing, and what is lost is said."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest

import eventtrain as et
from eventtrain.subscribers.trackers.tracker import RETRIES_AT_END, TrackerStatistics, TrackerThread

SECRET = "s3cr3t-passw0rd"


class Target:
    """Takes rows; ``error`` is raised instead, and while ``hold`` is clear it hangs."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.flushed: list[int] = []
        self.tries = 0
        self.error: Exception | None = None
        self.hold = threading.Event()
        self.hold.set()

    def write(self, row: int) -> None:
        self.tries += 1
        self.hold.wait(60)
        if self.error is not None:
            raise self.error
        self.rows.append(row)

    def flush(self) -> None:
        self.flushed.append(len(self.rows))


class Tracked:
    def __init__(self, **options: Any) -> None:
        self.target = Target()
        self.said: list[Any] = []
        options = {"flush": self.target.flush, "retry_delay_s": 0.001, **options}
        self.thread = TrackerThread("Tracker", self.said.append, target="the target", **options)
        self.thread.start()

    def add(self, row: int, **options: Any) -> bool:
        return self.thread.add(
            lambda: self.target.write(row), step=row, event_kind="steps_completed", **options
        )

    @property
    def errors(self) -> list[str]:
        assert all(
            type(event) is et.SubscriberFailed and event.subscriber == "Tracker" for event in self.said
        )
        return [event.error for event in self.said]


@pytest.fixture
def tracked() -> Iterator[Callable[..., Tracked]]:
    made: list[Tracked] = []

    def make(**options: Any) -> Tracked:
        made.append(Tracked(**options))
        return made[-1]

    yield make
    for one in made:
        one.target.hold.set()
        one.thread.finish(30)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_jobs_are_done_in_order_and_flushed_at_the_end(tracked: Any) -> None:
    one = tracked()
    for row in range(100):
        assert one.add(row)
    assert one.thread.finish(60)
    assert one.target.rows == list(range(100))
    assert one.target.flushed[-1] == 100
    assert one.thread.statistics == TrackerStatistics(written=100)
    assert one.said == []


def test_it_flushes_on_a_schedule_while_nothing_comes_and_while_much_does(tracked: Any) -> None:
    one = tracked(flush_interval_s=0.01)
    one.add(0)
    until(lambda: one.target.flushed == [1])
    seen = len(one.target.flushed)
    for row in range(1, 30):
        one.add(row)
        time.sleep(0.001)
    until(lambda: one.target.flushed[-1] == 30)
    assert len(one.target.flushed) > seen


def test_a_target_that_is_away_for_a_while_gets_every_row_once_and_that_is_said_once(tracked: Any) -> None:
    one = tracked()
    one.add(0)
    until(lambda: one.target.rows)
    one.target.error = et.StorageError("no route to host", may_pass=True)
    for row in range(1, 20):
        one.add(row)
    until(lambda: one.target.tries > 5)
    one.target.error = None
    assert one.thread.finish(60)
    assert one.target.rows == list(range(20))
    assert one.errors == ["the target: no route to host"]
    assert one.said[0].step == 1
    assert one.thread.statistics == TrackerStatistics(written=20, outages=1)


def test_rows_beyond_the_limit_are_lost_counted_and_said_once_an_outage(tracked: Any) -> None:
    one = tracked(row_limit=10)
    for outage in (1, 2):
        one.target.hold.clear()
        start = 100 * outage
        assert [one.add(start + row) for row in range(15)] == [True] * 10 + [False] * 5
        assert not one.add(0, rows=7)
        assert one.add(start + 99, rows=0)  # as jobs that begin and end a run
        one.target.hold.set()
        until(lambda outage=outage: len(one.said) == 2 * outage)
        assert one.target.rows[-3:-1] == [start + 8, start + 9]
    text = "the target is slower than the run: 10 rows wait, and further ones are lost"
    assert one.errors == [text, "the target: 12 rows were lost"] * 2
    assert one.thread.finish(60)
    assert one.thread.statistics == TrackerStatistics(written=20, lost=24, outages=2)


def test_what_fails_for_good_is_lost_and_the_next_is_tried_and_no_text_of_strangers_is_shown(
    tracked: Any, caplog: pytest.LogCaptureFixture
) -> None:
    one = tracked()
    one.target.error = OSError(f"https://user:{SECRET}@host refused")
    one.add(1)
    until(lambda: one.thread.statistics.lost == 1)
    one.target.error = et.StorageError("refused")
    one.add(2)
    until(lambda: one.thread.statistics.lost == 2)
    one.target.error = None
    one.add(3)
    assert one.thread.finish(60)
    assert one.target.rows == [3]
    assert one.errors == ["the target: OSError", "the target: 2 rows were lost"]
    assert SECRET not in caplog.text


@pytest.mark.parametrize("rows", [1, 50])
def test_at_the_end_a_target_that_stays_away_is_given_up_after_some_tries(tracked: Any, rows: int) -> None:
    one = tracked(retry_delay_s=0.01, max_retry_delay_s=3600.0)
    one.target.error = et.StorageError("no route to host", may_pass=True)
    for row in range(rows):
        one.add(row)
    until(lambda: one.target.tries == 1)
    assert one.thread.finish(60)  # and not after an hour
    assert one.target.tries <= 3 + RETRIES_AT_END
    assert one.errors == ["the target: no route to host", f"the target: {rows} rows were lost"]
    assert one.thread.statistics.lost == rows


async def test_a_target_that_hangs_delays_the_end_by_the_timeout_and_no_longer(
    tracked: Any, caplog: pytest.LogCaptureFixture
) -> None:
    one = tracked()
    one.target.hold.clear()
    for row in range(3):
        one.add(row)
    begin = time.monotonic()
    with pytest.raises(
        et.SubscriberError, match=r"the target did not take everything within 0.1 s .* 3 rows"
    ):
        await one.thread.aclose(0.1)
    assert time.monotonic() - begin < 30
    assert "the target lacks 3 rows" in caplog.text
    one.target.hold.set()
    await anyio.to_thread.run_sync(one.thread.join)
    assert one.target.rows == [0]


async def test_a_cancelled_end_is_told_too(tracked: Any, caplog: pytest.LogCaptureFixture) -> None:
    one = tracked()
    one.target.hold.clear()
    one.add(0)
    with anyio.move_on_after(0.05):
        await one.thread.aclose(60)
    assert "the target lacks 1 rows" in caplog.text


async def test_settling_waits_for_everything_so_far_but_for_no_target_that_is_away(tracked: Any) -> None:
    one = tracked()
    for row in range(50):
        one.add(row)
    assert await one.thread.flushed_within(60)
    assert one.target.rows == list(range(50))
    assert one.target.flushed[-1] == 50
    one.target.hold.clear()
    one.add(50)
    assert not await one.thread.flushed_within(0.01)
    one.target.error = et.StorageError("no route to host", may_pass=True)
    one.target.hold.set()
    while not one.said:  # noqa: ASYNC110  # a thread says it
        await anyio.sleep(0.001)
    assert not await one.thread.flushed_within(3600)


async def test_a_bus_that_takes_nothing_more_is_no_reason_to_wait(tracked: Any) -> None:
    def closed(event: et.Event) -> None:
        raise et.BusClosed("the bus was closed")

    thread = TrackerThread("Tracker", closed, target="the target")
    thread.start()

    def fail() -> None:
        raise et.StorageError("refused")

    thread.add(fail, step=1, event_kind="run_started")
    await thread.aclose(60)
    assert thread.statistics.lost == 1


def test_what_a_full_bus_does_not_take_is_said_later() -> None:
    said: list[Any] = []
    full = threading.Event()
    full.set()

    def publish(event: et.Event) -> None:
        if full.is_set():
            raise et.QueueFull("at the limit")
        said.append(event)

    thread = TrackerThread("Tracker", publish, target="the target", row_limit=1)
    hold = threading.Event()
    thread.start()

    def wait() -> None:
        hold.wait(60)

    thread.add(wait, step=1, event_kind="run_started")
    assert not thread.add(lambda: None, step=2, event_kind="run_started")
    full.clear()
    hold.set()
    assert thread.finish(60)
    assert [event.error.partition(":")[0] for event in said] == [
        "the target is slower than the run",
        "the target",
    ]
