from __future__ import annotations

import threading
from typing import Any

import anyio
import anyio.to_thread
import pytest

import eventtrain as et
from eventtrain.bus.bus import core_of
from eventtrain.bus.training_stream import Activation, EventSeries
from eventtrain.testing import FakeClock


class Ping(et.Event):
    number: int = 0


class Record:
    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.events: list[Any] = []

    async def __call__(self, event: Any) -> None:
        self.numbers.append(getattr(event, "number", event.step))
        self.events.append(event)


@pytest.fixture(autouse=True)
def on_every_event_loop(anyio_backend: object) -> None:
    """All of these tests run on asyncio, uvloop and trio."""


def steps(first: int, last: int) -> EventSeries:
    def build(wanted: Any) -> list[et.Event]:
        return [et.StepCompleted(step=step, epoch=0, batch=step, metrics={}) for step in wanted]

    return EventSeries(et.StepCompleted, range(first, last + 1), build)


async def publish(bus: et.EventBus, count: int) -> None:
    for number in range(count):
        bus.publish(Ping(number=number, step=number))
    await bus.drain()


# --- which events ---------------------------------------------------------------------------------------------


async def test_every_counts_steps_and_epochs() -> None:
    pings, epochs = Record(), Record()
    async with et.EventBus() as bus:
        bus.subscribe(Ping, pings, every=3)
        bus.subscribe(et.EpochStarted, epochs, every=2)
        await publish(bus, 8)
        for epoch in range(5):
            bus.publish(et.EpochStarted(epoch=epoch))
    assert pings.numbers == [0, 3, 6]
    assert [event.epoch for event in epochs.events] == [1, 3]


async def test_every_s_lets_one_event_through_in_so_many_seconds() -> None:
    got, clock = Record(), FakeClock()
    async with et.EventBus(clock=clock) as bus:
        bus.subscribe(Ping, got, every_s=10.0)
        for number in range(25):
            bus.publish(Ping(number=number))
            await bus.drain()
            await clock.advance(1.0)
    assert got.numbers == [0, 10, 20]


async def test_where_selects_and_one_that_raises_is_a_failure_of_its_subscription() -> None:
    got, neighbour = Record(), Record()
    async with et.EventBus() as bus:
        subscription = bus.subscribe(Ping, got, where=lambda event: 6 / event.number > 2, name="picky")
        bus.subscribe(Ping, neighbour)
        await publish(bus, 5)
        assert [letter.event.number for letter in subscription.dead_letters] == [0]
        assert isinstance(subscription.dead_letters[0].error, ZeroDivisionError)
    assert got.numbers == [1, 2]
    assert neighbour.numbers == [0, 1, 2, 3, 4]
    assert subscription.statistics().errors == 1


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_once_gets_one_event_is_waited_for_and_then_ends(concurrency: int) -> None:
    got = Record()

    async def slow(event: Ping) -> None:
        await anyio.sleep(0.01)
        await got(event)

    async with et.EventBus() as bus:
        subscription = bus.subscribe(Ping, slow, once=True, concurrency=concurrency)
        await publish(bus, 5)
        assert got.numbers == [0]
        with anyio.fail_after(30):
            while subscription._core.state == "active":
                await anyio.lowlevel.checkpoint()
        assert subscription._core.state == "finished"
        assert not core_of(bus).has_subscribers(Ping)


async def test_once_takes_one_event_of_a_whole_series() -> None:
    got = Record()
    async with et.EventBus() as bus:
        bus.subscribe(et.StepCompleted, got, once=True, where=lambda event: event.step > 2)
        await bus.drain()
        core_of(bus).feed([steps(1, 10)])
    assert got.numbers == [3]


# --- order and concurrency --------------------------------------------------------------------------------


async def test_with_concurrency_so_many_handlers_run_at_once_and_start_in_order() -> None:
    started: list[int] = []
    running = peak = 0
    async with et.EventBus() as bus:

        @bus.on(Ping, concurrency=3)
        async def handle(event: Ping) -> None:
            nonlocal running, peak
            started.append(event.number)
            running += 1
            peak = max(peak, running)
            await anyio.sleep(0.001 * (event.number % 4))
            running -= 1

        await publish(bus, 30)
        assert started == list(range(30))
        assert peak == 3
        assert bus.subscriptions[0].statistics().delivered == 30


async def test_workers_that_slept_are_woken_all_the_same() -> None:
    """Three idle workers, and then three events that each need the others to have begun."""
    begun = 0
    together = anyio.Event()
    async with et.EventBus() as bus:

        @bus.on(Ping, concurrency=3)
        async def meet(event: Ping) -> None:
            nonlocal begun
            begun += 1
            if begun == 3:
                together.set()
            await together.wait()

        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(30):
            for _ in range(3):
                bus.publish(Ping())
                await anyio.wait_all_tasks_blocked()
            await bus.drain()
    assert begun == 3


# --- failures -------------------------------------------------------------------------------------------------


async def test_retries_wait_twice_as_long_each_time_and_say_each_attempt() -> None:
    clock, moments, said = FakeClock(), list[float](), Record()
    async with et.EventBus(clock=clock) as bus:
        bus.subscribe(et.SubscriberFailed, said)

        @bus.on(Ping, on_error="retry", retries=3, retry_delay_s=1.0)
        async def flaky(event: Ping) -> None:
            moments.append(clock.now_s())
            if len(moments) < 4:
                raise ValueError("not yet")

        bus.publish(Ping())
        await clock.advance(10.0)
    assert moments == [0.0, 1.0, 3.0, 7.0]
    assert [event.handler_attempt for event in said.events] == [1, 2, 3]
    assert bus.statistics()[list(bus.statistics())[-1]].delivered == 1


async def test_when_the_last_retry_fails_the_event_becomes_a_dead_letter_and_redelivers() -> None:
    clock, broken, got = FakeClock(), True, Record()
    async with et.EventBus(clock=clock) as bus:

        async def handle(event: Ping) -> None:
            if broken:
                raise ValueError("broken")
            await got(event)

        subscription = bus.subscribe(Ping, handle, on_error="retry", retries=1, retry_delay_s=1.0)
        bus.publish(Ping(number=1))
        bus.publish(Ping(number=2))
        await clock.advance(5.0)
        assert [letter.event.number for letter in subscription.dead_letters] == [1, 2]
        assert subscription.statistics().errors == 4
        broken = False
        assert await anyio.to_thread.run_sync(subscription.redeliver) == 2
        await bus.drain()
        assert not subscription.dead_letters
    assert got.numbers == [1, 2]


async def test_cancelling_a_subscription_ends_its_retries() -> None:
    clock, attempts = FakeClock(), 0
    async with et.EventBus(clock=clock) as bus:

        async def fail(event: Ping) -> None:
            nonlocal attempts
            attempts += 1
            if attempts == 2:
                subscription.cancel()
            raise ValueError("always")

        subscription = bus.subscribe(Ping, fail, on_error="retry", retries=9, retry_delay_s=1.0)
        bus.publish(Ping())
        await clock.advance(1_000.0)
    assert attempts == 2


async def test_dead_letters_are_the_last_hundred() -> None:
    async with et.EventBus() as bus:

        async def fail(event: Ping) -> None:
            raise ValueError(event.number)

        subscription = bus.subscribe(Ping, fail, disable_after=None)
        await publish(bus, 150)
        assert [letter.event.number for letter in subscription.dead_letters] == list(range(50, 150))


async def test_after_so_many_failures_in_a_row_it_is_disabled_says_so_and_what_waits_counts_as_dropped() -> (
    None
):
    notices, lagged, calls = Record(), Record(), list[int]()
    async with et.EventBus() as bus:
        bus.subscribe(et.SubscriberDisabled, notices)
        bus.subscribe(et.SubscriberLagged, lagged)

        async def fail(event: Ping) -> None:
            calls.append(event.number)
            if event.number != 1:
                raise ValueError("no")

        subscription = bus.subscribe(Ping, fail, disable_after=3, name="hopeless")
        await publish(bus, 10)
        assert calls == [0, 1, 2, 3, 4]
        assert subscription._core.state == "disabled"
        statistics = bus.statistics()["hopeless"]
        assert (statistics.delivered, statistics.errors, statistics.dropped, statistics.pending) == (
            1,
            4,
            5,
            0,
        )
        assert notices.events[0].subscriber == "hopeless"
        assert "3 failures in a row" in notices.events[0].reason
        assert sum(event.dropped for event in lagged.events) == 5
        with pytest.raises(et.ConfigurationError, match="it is disabled"):
            subscription.redeliver()


async def test_a_handler_past_its_timeout_fails_and_the_next_event_is_handled() -> None:
    clock, got = FakeClock(), Record()
    async with et.EventBus(clock=clock) as bus:

        async def handle(event: Ping) -> None:
            if event.number == 0:
                await anyio.sleep_forever()
            await got(event)

        subscription = bus.subscribe(Ping, handle, timeout_s=5.0)
        bus.publish(Ping(number=0))
        bus.publish(Ping(number=1))
        await clock.advance(4.9)
        assert got.numbers == []
        await clock.advance(0.2)
        assert got.numbers == [1]
        assert "timeout_s=5 s" in str(subscription.dead_letters[0].error)
        assert subscription._core.failures.timed_out


async def test_a_timeout_error_of_the_handler_itself_is_no_timeout_of_ours() -> None:
    async with et.EventBus() as bus:

        async def handle(event: Ping) -> None:
            raise TimeoutError

        subscription = bus.subscribe(Ping, handle, timeout_s=5.0)
        await publish(bus, 1)
        assert subscription.statistics().errors == 1
        assert not subscription._core.failures.timed_out


# --- the end ------------------------------------------------------------------------------------------------


async def test_cancelling_from_any_thread_in_mid_burst_ends_it_and_harms_nobody() -> None:
    neighbour, handled = Record(), 0
    begun = threading.Event()
    async with et.EventBus() as bus:

        async def handle(event: Ping) -> None:
            nonlocal handled
            handled += 1
            begun.set()
            await anyio.lowlevel.checkpoint()

        subscription = bus.subscribe(Ping, handle)
        bus.subscribe(Ping, neighbour)

        def cancel() -> None:
            begun.wait()
            subscription.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, cancel)
            for number in range(5_000):
                bus.publish(Ping(number=number))
                if number % 20 == 0:
                    await anyio.lowlevel.checkpoint()
        await bus.drain()
        at_the_end = handled
        await publish(bus, 10)
        assert handled == at_the_end
    assert subscription._core.state == "cancelled"
    assert len(neighbour.numbers) == 5_010


# --- events that the loop counts --------------------------------------------------------------------------------


async def test_a_decider_passes_each_due_event_whether_handled_failed_or_not_wanted() -> None:
    handled: list[int] = []
    async with et.EventBus() as bus:

        async def decide(event: et.StepCompleted) -> None:
            handled.append(event.step)
            if event.step == 4:
                raise ValueError("no")

        subscription = bus.subscribe(
            et.StepCompleted, decide, lag=3, every=2, where=lambda event: event.step != 8
        )
        assert core_of(bus).deciders == ()  # it joins in its turn
        await bus.drain()
        assert core_of(bus).deciders == (subscription._core,)
        core_of(bus).feed([steps(1, 2), Activation(subscription._core), steps(3, 10)])
        await bus.drain()
        assert handled == [4, 6, 10]
        assert subscription._core.passed == 4
        assert subscription.redeliver() == 1
        await bus.drain()
        assert handled == [4, 6, 10, 4]
        assert subscription._core.passed == 4


async def test_what_an_earlier_run_left_over_does_not_count_for_the_next() -> None:
    go_on, handled = anyio.Event(), list[int]()
    async with et.EventBus() as bus:

        async def decide(event: et.StepCompleted) -> None:
            await go_on.wait()
            handled.append(event.step)

        subscription = bus.subscribe(et.StepCompleted, decide, lag=0)
        await bus.drain()
        core_of(bus).feed([Activation(subscription._core), steps(1, 3)])
        await bus.drain(timeout_s=0.01)
        core_of(bus).feed([Activation(subscription._core), steps(4, 5)])
        await bus.drain(timeout_s=0.01)
        go_on.set()
        await bus.drain()
    assert handled == [1, 2, 3, 4, 5]
    assert subscription._core.passed == 2


async def test_a_decider_with_once_decides_once_and_never_holds_up_the_loop_again() -> None:
    handled: list[int] = []
    async with et.EventBus() as bus:

        async def decide(event: et.StepCompleted) -> None:
            handled.append(event.step)

        subscription = bus.subscribe(et.StepCompleted, decide, lag=0, once=True)
        await bus.drain()
        core_of(bus).feed([Activation(subscription._core), steps(1, 5)])
        await bus.drain()
        assert handled == [1]
        assert subscription._core.state == "finished" or subscription._core.passed == 5
        with anyio.fail_after(30):
            while core_of(bus).deciders:
                await anyio.lowlevel.checkpoint()


async def test_the_lag_may_differ_by_class_and_holds_for_derived_ones() -> None:
    class MyEpoch(et.EpochCompleted):
        pass

    bus = et.EventBus()
    subscription = bus.subscribe(
        et.EpochCompleted | et.StepCompleted | Ping, Record(), lag={et.EpochCompleted: 0, et.StepCompleted: 5}
    )
    assert [subscription._core.filter.lag_for(kind) for kind in (MyEpoch, et.StepCompleted, Ping)] == [
        0,
        5,
        None,
    ]


# --- statistics -----------------------------------------------------------------------------------------------


async def test_statistics_tell_what_was_delivered_dropped_waits_and_how_far_it_is_behind() -> None:
    go_on = anyio.Event()
    async with et.EventBus() as bus:

        async def hold(event: Ping) -> None:
            await go_on.wait()

        lossless = bus.subscribe(Ping, hold, name="lossless")
        latest = bus.subscribe(Ping, hold, queue=et.KeepLatest(), name="latest")
        bus.publish(Ping())
        await anyio.wait_all_tasks_blocked()
        for _ in range(9):
            bus.publish(Ping())
        await anyio.wait_all_tasks_blocked()
        one, other = lossless.statistics(), latest.statistics()
        assert (one.delivered, one.dropped, one.pending, one.lag_events) == (0, 0, 10, 10)
        assert (other.delivered, other.dropped, other.pending, other.lag_events) == (0, 8, 2, 10)
        assert one.lag_s > 0
        assert other.lag_s > 0
        go_on.set()
        await bus.drain()
        one, other = lossless.statistics(), latest.statistics()
        assert (one.delivered, one.pending, one.lag_events, one.lag_s) == (10, 0, 0, 0.0)
        assert (other.delivered, other.dropped, other.pending, other.lag_events) == (2, 8, 0, 0)
        assert one.handler_wall_s > 0
        assert one.handler_cpu_s > 0
        assert one.longest_slice_s > 0


@pytest.mark.parametrize("queue", [et.Lossless(), et.DropOldest(5)])
async def test_statistics_can_be_read_from_any_thread_at_any_time(queue: et.Queue) -> None:
    done = threading.Event()
    async with et.EventBus() as bus:
        bus.subscribe(Ping, Record(), queue=queue)

        def read() -> int:
            reads = 0
            while not done.is_set():
                bus.statistics()
                reads += 1
            return reads

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, read)
            for _ in range(50):
                await publish(bus, 50)
            done.set()
