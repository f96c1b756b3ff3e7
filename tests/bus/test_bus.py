from __future__ import annotations

import functools
import inspect
import logging
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eventtrain as et
from eventtrain.bus.bus import core_of
from eventtrain.bus.training_stream import EventSeries


class Ping(et.Event):
    number: int = 0


class LoudPing(Ping):
    pass


class Pong(et.Event):
    number: int = 0


class Record:
    """A handler that keeps the numbers of what it got."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.events: list[Any] = []

    async def __call__(self, event: Any) -> None:
        self.numbers.append(getattr(event, "number", -1))
        self.events.append(event)


@pytest.fixture(autouse=True)
def on_every_event_loop(anyio_backend: object) -> None:
    """All of these tests run on asyncio, uvloop and trio."""


# --- routing ------------------------------------------------------------------------------------------------


async def test_an_event_reaches_subscribers_of_its_class_its_bases_and_unions_and_nobody_else() -> None:
    everything, pings, loud, union, pongs = Record(), Record(), Record(), Record(), Record()
    async with et.EventBus() as bus:
        bus.subscribe(et.Event, everything)
        bus.subscribe(Ping, pings)
        bus.subscribe(LoudPing, loud)
        bus.subscribe(LoudPing | Pong, union)
        bus.subscribe(Pong, pongs)
        bus.publish(Ping(number=1))
        bus.publish(LoudPing(number=2))
        bus.publish(Pong(number=3))
    assert [r.numbers for r in (everything, pings, loud, union, pongs)] == [
        [1, 2, 3],
        [1, 2],
        [2],
        [2, 3],
        [3],
    ]


async def test_a_decorated_function_comes_back_unchanged() -> None:
    bus = et.EventBus()

    async def handle(event: Ping) -> None: ...

    assert bus.on(Ping)(handle) is handle


async def test_events_are_numbered_stamped_once_and_shared_by_all() -> None:
    first, second = Record(), Record()
    async with et.EventBus(run_id="the run") as bus:
        bus.subscribe(Ping, first)
        bus.subscribe(et.Event, second)
        for number in range(3):
            bus.publish(Ping(number=number, run_id="another" if number == 2 else ""))
    assert [event.seq for event in first.events] == [1, 2, 3]
    assert [event.run_id for event in first.events] == ["the run", "the run", "another"]
    assert all(event.time.year > 2000 for event in first.events)
    assert all(a is b for a, b in zip(first.events, second.events, strict=True))


async def test_one_instance_is_published_only_once() -> None:
    event = Ping()
    async with et.EventBus() as bus:
        bus.publish(event)
        with pytest.raises(et.EventReused, match="published before"):
            bus.publish(event)
        await bus.drain()
        with pytest.raises(et.EventReused, match="seq 1"):
            bus.publish(event)
        bus.publish(event.model_copy(update={"seq": 0}))


@pytest.mark.parametrize(
    "thing", [object(), 3, None, "ping", {"kind": "ping"}, type("Odd", (), {"seq": 0})()]
)
async def test_what_is_no_event_is_refused_by_name(thing: Any) -> None:
    with pytest.raises(et.ConfigurationError, match=r"it is not an eventtrain\.Event"):
        et.EventBus().publish(thing)


# --- order and loss -----------------------------------------------------------------------------------------


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bursts=st.lists(st.lists(st.integers(1, 30), max_size=6), min_size=1, max_size=3),
    delays=st.lists(st.sampled_from([None, 0.0, 0.0005]), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_every_subscription_gets_each_event_once_in_one_order_whatever_the_others_do(
    anyio_backend: tuple[str, dict[str, Any]], bursts: list[list[int]], delays: list[float | None], seed: int
) -> None:
    """Threads publish in bursts while handlers of several speeds, one of them failing, work them off."""

    async def scenario() -> None:
        records = [Record() for _ in delays]
        failing = 0

        def handler(record: Record, delay_s: float | None) -> Any:
            async def handle(event: Ping) -> None:
                nonlocal failing
                if delay_s is not None and (event.number + seed) % 5 == 0:
                    await anyio.sleep(delay_s)
                await record(event)
                if (event.number * 7 + seed) % 11 == 0:
                    failing += 1
                    raise ValueError("now and then")

            return handle

        def publish(publisher: int, sizes: list[int]) -> None:
            sent = 0
            for size in sizes:
                for _ in range(size):
                    bus.publish(Ping(number=publisher * 1_000 + sent))
                    sent += 1

        async with et.EventBus() as bus:
            for record, delay_s in zip(records, delays, strict=True):
                bus.subscribe(Ping, handler(record, delay_s), disable_after=None)
            async with anyio.create_task_group() as tasks:
                for publisher, sizes in enumerate(bursts):
                    tasks.start_soon(anyio.to_thread.run_sync, publish, publisher, sizes)
            assert await bus.drain() == {}
        sent = sorted(p * 1_000 + n for p, sizes in enumerate(bursts) for n in range(sum(sizes)))
        for record in records:
            assert sorted(record.numbers) == sent
            assert [event.seq for event in record.events] == sorted(event.seq for event in record.events)
            assert record.numbers == records[0].numbers
            for publisher in range(len(bursts)):
                own = [number for number in record.numbers if number // 1_000 == publisher]
                assert all(a < b for a, b in pairwise(own))

    anyio.run(scenario, backend=anyio_backend[0], backend_options=anyio_backend[1])


async def test_publish_appends_before_it_looks_whether_the_router_sleeps() -> None:
    """The router looks in the other order, so one of the two always sees the other."""
    waiting: list[int] = []

    class Wakeup:
        @property
        def armed(self) -> bool:
            waiting.append(len(core_of(bus).publish_queue))
            return False

    class Runner:
        publish_wakeup = Wakeup()

    bus = et.EventBus()
    core_of(bus).publish_queue.open(Runner())  # pyright: ignore[reportArgumentType]
    bus.publish(Ping())
    bus.publish(Ping())
    assert waiting == [1, 2]


@pytest.mark.parametrize("kind", ["async", "plain", "with timeout", "retry", "concurrent"])
async def test_a_failing_handler_of_any_kind_leaves_its_neighbours_everything_in_order(kind: str) -> None:
    neighbour, failed = Record(), 0

    async def fail(event: Ping) -> None:
        nonlocal failed
        failed += 1
        if event.number % 3 == 0:
            await anyio.lowlevel.checkpoint()
        raise RuntimeError("always")

    def fail_in_thread(event: Ping) -> None:
        nonlocal failed
        failed += 1
        raise RuntimeError("always")

    options: dict[str, Any] = {
        "with timeout": {"timeout_s": 10},
        "retry": {"on_error": "retry", "retries": 2, "retry_delay_s": 0},
        "concurrent": {"concurrency": 3},
    }.get(kind, {})
    async with et.EventBus() as bus:
        bus.subscribe(Ping, fail_in_thread if kind == "plain" else fail, disable_after=None, **options)
        bus.subscribe(Ping, neighbour)
        for number in range(50):
            bus.publish(Ping(number=number))
    assert neighbour.numbers == list(range(50))
    assert failed == 50 * (3 if kind == "retry" else 1)


async def test_a_handler_that_awaits_what_someone_cancelled_fails_and_works_on() -> None:
    got = Record()

    async def fragile(event: Ping) -> None:
        if event.number == 0:
            raise anyio.get_cancelled_exc_class()() if anyio_is_asyncio() else RuntimeError("as good as")
        await got(event)

    async with et.EventBus() as bus:
        subscription = bus.subscribe(Ping, fragile)
        bus.publish(Ping(number=0))
        bus.publish(Ping(number=1))
    assert got.numbers == [1]
    assert subscription.statistics().errors == 1


def anyio_is_asyncio() -> bool:
    import sniffio

    return sniffio.current_async_library() == "asyncio"


async def test_a_handler_publishes_also_events_of_its_own_class() -> None:
    got = Record()
    async with et.EventBus() as bus:

        @bus.on(Ping)
        async def echo(event: Ping) -> None:
            await got(event)
            if event.number:
                bus.publish(Ping(number=event.number - 1))

        bus.publish(Ping(number=5))
    assert got.numbers == [5, 4, 3, 2, 1, 0]


async def test_a_where_that_publishes_at_the_limit_does_not_hang_the_bus() -> None:
    got, answers = Record(), Record()
    go_on = anyio.Event()

    async def slow(event: Ping) -> None:
        await go_on.wait()
        await got(event)

    async with et.EventBus() as bus:

        def echo(event: Ping) -> bool:
            bus.publish(Pong(number=event.number))
            return True

        bus.subscribe(Ping, slow, queue=et.Lossless(2), where=echo)
        bus.subscribe(Pong, answers)
        await bus.drain()
        with anyio.fail_after(10):
            for number in range(3):
                await bus.publish_async(Ping(number=number))
                await anyio.wait_all_tasks_blocked()
            go_on.set()
            await bus.drain()
    assert got.numbers == answers.numbers == [0, 1, 2]


# --- limits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_thread", [False, True])
async def test_publish_is_refused_exactly_at_the_lossless_limit_and_nothing_is_lost(
    from_thread: bool,
) -> None:
    limit, got, refusals = 20, Record(), list[str]()
    go_on = anyio.Event()

    async def hold(event: Ping) -> None:
        await go_on.wait()
        await got(event)

    async with et.EventBus() as bus:
        bus.subscribe(Ping, hold, queue=et.Lossless(limit))
        bus.publish(Ping(number=0))
        await anyio.wait_all_tasks_blocked()  # the first is being handled, so it does not wait

        def fill() -> int:
            for accepted in range(10 * limit):
                try:
                    bus.publish(Ping(number=accepted + 1))
                except et.QueueFull as error:
                    refusals.append(str(error))
                    return accepted
            return 10 * limit

        accepted = await anyio.to_thread.run_sync(fill) if from_thread else fill()
        assert accepted == limit
        assert "at its limit of 20 events" in refusals[0]
        bus.publish(Pong())  # nobody wants it, so there is room
        go_on.set()
    assert got.numbers == list(range(limit + 1))


async def test_a_refused_event_can_be_published_later_and_publish_async_waits_for_room() -> None:
    got, go_on = Record(), anyio.Event()

    async def hold(event: Ping) -> None:
        await go_on.wait()
        await got(event)

    async with et.EventBus() as bus:
        bus.subscribe(Ping, hold, queue=et.Lossless(1))
        bus.publish(Ping(number=0))
        await anyio.wait_all_tasks_blocked()
        bus.publish(Ping(number=1))
        refused = Ping(number=2)
        with pytest.raises(et.QueueFull):
            bus.publish(refused)
        with anyio.move_on_after(0.01) as scope:
            await bus.publish_async(refused)
        assert scope.cancelled_caught
        assert refused.seq == 0
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(bus.publish_async, refused)
            await anyio.wait_all_tasks_blocked()
            go_on.set()
    assert got.numbers == [0, 1, 2]


async def test_a_thread_that_publishes_blocks_until_there_is_room_or_it_gives_up() -> None:
    got, go_on, giving_up = Record(), anyio.Event(), threading.Event()

    async def hold(event: Ping) -> None:
        await go_on.wait()
        await got(event)

    async with et.EventBus() as bus:
        core = core_of(bus)
        bus.subscribe(Ping, hold, queue=et.Lossless(1))
        for number in range(2):
            bus.publish(Ping(number=number))
            await anyio.wait_all_tasks_blocked()
        outcomes: dict[str, bool] = {}

        def publish(name: str, event: Ping, give_up: Callable[[], bool]) -> None:
            outcomes[name] = core.publish_blocking(event, give_up=give_up)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, publish, "patient", Ping(number=2), lambda: False)
            await anyio.to_thread.run_sync(publish, "impatient", given_up := Ping(number=3), lambda: True)
            giving_up.set()
            await anyio.to_thread.run_sync(publish, "late", Ping(number=4), giving_up.is_set)
            assert outcomes == {"impatient": False, "late": False}
            assert given_up.seq == 0
            go_on.set()
        assert outcomes["patient"] is True
        await bus.drain()
        await anyio.to_thread.run_sync(publish, "at once", given_up, lambda: True)
        assert outcomes["at once"] is True
        with pytest.raises(et.EventReused):
            core.publish_blocking(given_up)
    assert got.numbers == [0, 1, 2, 3]
    with pytest.raises(et.BusClosed):
        core.publish_blocking(Ping())


async def test_a_thread_that_waits_for_room_is_told_that_the_bus_was_closed() -> None:
    refused: list[type] = []
    bus = et.EventBus(buffer_limit=1)
    bus.publish(Ping())

    def publish() -> None:
        try:
            core_of(bus).publish_blocking(Ping())
        except et.BusClosed as error:
            refused.append(type(error))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, publish)
            while not core_of(bus).progress._waiters:
                await anyio.lowlevel.checkpoint()
            await bus.aclose(timeout_s=0)
    assert refused == [et.BusClosed]


async def test_publishers_in_many_threads_lose_nothing_at_a_small_limit() -> None:
    got, threads, each = Record(), 4, 200

    async with et.EventBus() as bus:
        bus.subscribe(Ping, got, queue=et.Lossless(7))

        def publish(publisher: int) -> int:
            refused = 0
            for number in range(each):
                event = Ping(number=publisher * each + number)
                while True:
                    try:
                        bus.publish(event)
                        break
                    except et.QueueFull:
                        refused += 1
                        time.sleep(0.0001)  # not for luck: it leaves the interpreter to the consumer
            return refused

        async with anyio.create_task_group() as tasks:
            for publisher in range(threads):
                tasks.start_soon(anyio.to_thread.run_sync, publish, publisher)
    assert sorted(got.numbers) == list(range(threads * each))


# --- before the start, after the end --------------------------------------------------------------------------


async def test_what_is_published_before_the_start_waits_for_those_subscribed_by_then() -> None:
    early, late = Record(), Record()
    bus = et.EventBus(buffer_limit=3)
    bus.publish(Ping(number=1))
    bus.subscribe(Ping, early)
    bus.publish(Ping(number=2))
    bus.publish(Ping(number=3))
    with pytest.raises(et.QueueFull, match="was it started"):
        bus.publish(Ping(number=4))
    async with bus:
        bus.subscribe(Ping, late)
        bus.publish(Ping(number=5))
    assert early.numbers == [1, 2, 3, 5]
    assert late.numbers == [5]


async def test_a_subscription_joins_behind_what_was_published_before_it() -> None:
    late = Record()
    async with et.EventBus() as bus:
        bus.publish(Ping(number=1))
        bus.subscribe(Ping, late)
        bus.publish(Ping(number=2))
    assert late.numbers == [2]


async def test_a_closed_bus_refuses_events_subscriptions_and_a_second_start() -> None:
    got = Record()
    async with et.EventBus() as bus:
        bus.subscribe(Ping, got)
        bus.publish(Ping(number=1))
        assert await bus.aclose() == {}
        with pytest.raises(et.BusClosed, match="the bus was closed"):
            bus.publish(Ping())
    assert got.numbers == [1]
    assert await bus.aclose() == {}
    with pytest.raises(et.BusClosed):
        bus.subscribe(Ping, got)
    with pytest.raises(et.BusClosed):
        await bus.publish_async(Ping())
    with pytest.raises(et.BusClosed):
        await bus.wait_for(Ping)
    with pytest.raises(et.BusClosed, match="the bus was closed"):
        await bus.__aenter__()
    assert bus.statistics()["Record"].delivered == 1


async def test_a_bus_is_served_by_one_event_loop_at_a_time_and_may_be_served_again() -> None:
    got, bus = Record(), et.EventBus()
    bus.subscribe(Ping, got)
    for number in range(2):
        async with bus.serve():
            with pytest.raises(et.ConfigurationError, match="already running"):
                async with bus.serve():
                    pass
            bus.publish(Ping(number=number))
            await bus.drain()
    assert got.numbers == [0, 1]


async def test_draining_ends_also_when_nobody_wants_what_was_published() -> None:
    async with et.EventBus() as bus:
        with anyio.fail_after(30):
            bus.publish(Ping())
            assert await bus.drain() == {}


async def test_closing_with_a_deadline_returns_what_a_blocked_handler_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with et.EventBus() as bus:

        @bus.on(Ping, name="stuck")
        async def stuck(event: Ping) -> None:
            await anyio.sleep_forever()

        for _ in range(5):
            bus.publish(Ping())
        assert await bus.drain(timeout_s=0.01) == {"stuck": 5}
        with anyio.fail_after(30):
            assert await bus.aclose(timeout_s=0.01) == {"stuck": 5}


async def test_leaving_the_block_with_work_left_says_what_was_not_handled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with anyio.fail_after(30):
        async with et.EventBus(drain_timeout_s=0.01) as bus:

            @bus.on(Ping, name="stuck")
            async def stuck(event: Ping) -> None:
                await anyio.sleep_forever()

            bus.publish(Ping())
    assert "left over: stuck: 1" in caplog.text


async def test_closing_from_another_event_loop_stops_the_bus_and_loses_nothing(
    anyio_backend: tuple[str, dict[str, Any]],
) -> None:
    got = Record()
    async with et.EventBus() as bus:
        bus.subscribe(Ping, got)

        def publish_and_close() -> dict[str, int]:
            for number in range(500):
                bus.publish(Ping(number=number))
            return anyio.run(bus.aclose, backend=anyio_backend[0], backend_options=anyio_backend[1])

        assert await anyio.to_thread.run_sync(publish_and_close) == {}
    assert got.numbers == list(range(500))


async def test_what_a_thread_published_until_the_moment_of_closing_is_delivered() -> None:
    for _ in range(5):
        got, accepted = Record(), 0
        started = threading.Event()

        def publish(bus: et.EventBus, started: threading.Event = started) -> None:
            nonlocal accepted
            while True:
                try:
                    bus.publish(Ping(number=accepted))
                except et.QueueFull:
                    continue
                except et.BusClosed:
                    return
                accepted += 1
                if accepted == 50:
                    started.set()

        async with anyio.create_task_group() as tasks, et.EventBus() as bus:
            bus.subscribe(Ping, got)
            tasks.start_soon(anyio.to_thread.run_sync, publish, bus)
            await anyio.to_thread.run_sync(started.wait)
            await bus.aclose(timeout_s=30)
        assert got.numbers == list(range(accepted))


async def test_an_exception_in_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"):
        async with et.EventBus():
            raise KeyError("mine")


# --- streams ------------------------------------------------------------------------------------------------


async def test_a_stream_and_a_wait_that_end_say_why(anyio_backend: object) -> None:
    reasons: list[str | None] = []

    async def read(bus: et.EventBus, opened: anyio.Event, **options: Any) -> None:
        async with bus.stream(Ping, **options) as events:
            assert events.end_reason is None
            opened.set()
            async for _ in events:
                pass
            reasons.append(events.end_reason)

    async def wait(bus: et.EventBus) -> None:
        try:
            await bus.wait_for(Ping | Pong)
        except et.BusClosed as error:
            reasons.append(str(error))

    async def end_of(bus: et.EventBus, end: Callable[[], Any], **options: Any) -> None:
        reasons.clear()
        async with anyio.create_task_group() as tasks:
            opened = anyio.Event()
            tasks.start_soon(functools.partial(read, bus, opened, **options))
            await opened.wait()
            await bus.drain()
            if not options:
                tasks.start_soon(wait, bus)
                await anyio.wait_all_tasks_blocked()
            result = end()
            if inspect.isawaitable(result):
                await result

    async with et.EventBus() as bus:
        await end_of(bus, bus.aclose)
        assert sorted(map(str, reasons)) == [
            "No Ping or Pong came: the bus was closed.",
            "the bus was closed",
        ]
    async with et.EventBus() as bus:
        cancel = lambda: next(s for s in bus.subscriptions if s.name == "mine").cancel()  # noqa: E731
        await end_of(bus, cancel, name="mine")
        assert reasons == ["its subscription was cancelled"]

        def fails(event: Ping) -> bool:
            raise ValueError("broken")

        publish = lambda: [bus.publish(Ping()) for _ in range(100)]  # noqa: E731
        await end_of(bus, publish, where=fails)
        assert reasons == [
            "its subscription was disabled after 100 failures in a row, the last: ValueError: broken"
        ]
    bus = et.EventBus()
    with pytest.raises(ZeroDivisionError):
        async with bus:
            1 / 0  # noqa: B018
    with pytest.raises(et.BusClosed, match=r"the bus was closed \(its block raised ZeroDivisionError"):
        bus.publish(Ping())


async def test_a_stream_gives_what_is_published_and_ends_when_the_bus_closes() -> None:
    numbers: list[int] = []
    opened = anyio.Event()
    async with anyio.create_task_group() as tasks:
        async with et.EventBus() as bus:

            async def read() -> None:
                async with bus.stream(Ping, where=lambda event: event.number % 2 == 0) as events:
                    opened.set()
                    async for event in events:
                        numbers.append(event.number)  # noqa: PERF401  one at a time is the point

            tasks.start_soon(read)
            await opened.wait()
            for number in range(5):
                bus.publish(Ping(number=number))
        with anyio.fail_after(30):
            while len(numbers) < 3:
                await anyio.lowlevel.checkpoint()
    assert numbers == [0, 2, 4]


async def test_a_stream_on_another_event_loop_with_a_dropping_queue_accounts_for_every_event(
    anyio_backend: tuple[str, dict[str, Any]],
) -> None:
    bus, count, numbers = et.EventBus(), 5_000, list[int]()
    ready = threading.Event()
    dropped: list[int] = []

    async def read() -> None:
        async with bus.stream(Ping, queue=et.DropOldest(10), name="reader") as events:
            ready.set()
            async for event in events:
                numbers.append(event.number)
                if event.number == count - 1:
                    break
            dropped.append(bus.statistics()["reader"].dropped)

    def elsewhere() -> None:
        anyio.run(read, backend=anyio_backend[0], backend_options=anyio_backend[1])

    with anyio.fail_after(20):
        async with bus, anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, elsewhere)
            await anyio.to_thread.run_sync(ready.wait)
            for number in range(count):
                bus.publish(Ping(number=number))
                if number % 50 == 0:
                    await anyio.lowlevel.checkpoint()
    assert all(a < b for a, b in pairwise(numbers))
    assert len(numbers) + dropped[0] == count


async def test_wait_for_gives_the_next_event_or_says_why_not() -> None:
    got: list[int] = []
    async with anyio.create_task_group() as tasks, et.EventBus() as bus:
        bus.publish(Ping(number=0))

        async def wait() -> None:
            got.append((await bus.wait_for(Ping, where=lambda event: event.number > 1)).number)

        async def wait_in_vain() -> None:
            with pytest.raises(et.BusClosed, match="No Pong came: the bus was closed"):
                await bus.wait_for(Pong)
            got.append(-1)

        tasks.start_soon(wait)
        tasks.start_soon(wait_in_vain)
        await anyio.wait_all_tasks_blocked()
        for number in range(1, 4):
            bus.publish(Ping(number=number))
        with pytest.raises(TimeoutError, match=r"No Pong came within timeout_s=0\.01"):
            await bus.wait_for(Pong, timeout_s=0.01)
    assert got == [2, -1]


@pytest.mark.parametrize("types", [(Ping | Pong,), (Ping, Pong), ((Ping, Pong),), (LoudPing | Ping, Pong)])
async def test_waiting_and_streaming_take_several_classes_and_unions(types: tuple[Any, ...]) -> None:
    got: list[Any] = []
    async with anyio.create_task_group() as tasks, et.EventBus() as bus:

        async def wait() -> None:
            got.append(await bus.wait_for(*types, where=lambda event: event.number == 2))

        async def wait_in_vain() -> None:
            with pytest.raises(et.BusClosed, match=r"No .*Ping or Pong came: the bus was closed"):
                await bus.wait_for(*types, where=lambda event: event.number > 9)

        tasks.start_soon(wait)
        tasks.start_soon(wait_in_vain)
        with pytest.raises(TimeoutError, match=r"No .*Ping or Pong came within timeout_s=0\.01"):
            await bus.wait_for(*types, timeout_s=0.01)
        async with bus.stream(*types, every=1) as events:
            bus.publish(et.AlertRaised(name="neither"))
            bus.publish(Ping(number=1))
            bus.publish(Pong(number=2))
            assert [(await anext(events)).kind for _ in range(2)] == ["ping", "pong"]
    assert [event.kind for event in got] == ["pong"]


async def test_a_reader_ends_also_when_the_block_is_left_by_an_exception() -> None:
    ended = anyio.Event()
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            with pytest.raises(KeyError):  # noqa: PT012
                async with et.EventBus() as bus:

                    async def read() -> None:
                        async with bus.stream(Ping) as events:
                            async for _ in events:
                                pass
                        ended.set()

                    tasks.start_soon(read)
                    await anyio.wait_all_tasks_blocked()
                    raise KeyError
            await ended.wait()


# --- failures ---------------------------------------------------------------------------------------------------


async def test_on_error_fail_ends_the_block_with_subscriber_error() -> None:
    with pytest.raises(et.SubscriberError, match=r"Subscriber strict failed.*ValueError: wrong") as caught:  # noqa: PT012
        async with et.EventBus() as bus:

            @bus.on(Ping, on_error="fail", name="strict")
            async def strict(event: Ping) -> None:
                raise ValueError("wrong")

            bus.publish(Ping())
    assert isinstance(caught.value.__cause__, ValueError)


async def test_a_failure_is_said_as_an_event_and_a_handler_that_fails_on_it_does_not_loop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)
    said: list[et.SubscriberFailed] = []
    async with et.EventBus() as bus:

        @bus.on(Ping, name="wrong")
        async def wrong(event: Ping) -> None:
            raise ValueError("wrong")

        @bus.on(et.SubscriberFailed, name="worse")
        async def worse(event: et.SubscriberFailed) -> None:
            said.append(event)
            raise ValueError("worse")

        bus.publish(Ping(step=7))
    assert [(event.subscriber, event.event_kind, event.step, event.handler_attempt) for event in said] == [
        ("wrong", "ping", 7, 1)
    ]
    assert bus.statistics()["worse"].errors == 1


async def test_lag_reports_add_up_to_the_counter() -> None:
    reports = Record()
    async with et.EventBus() as bus:
        bus.subscribe(et.SubscriberLagged, reports)
        subscription = bus.subscribe(Ping, Record(), queue=et.KeepLatest(), name="slow")
        for _ in range(3):
            for number in range(100):
                bus.publish(Ping(number=number))
            await bus.drain()
        dropped = subscription.statistics().dropped
        assert dropped > 0
        assert sum(event.dropped for event in reports.events) == dropped
        assert {event.subscriber for event in reports.events} == {"slow"}


async def test_two_subscriptions_of_one_name_are_told_apart() -> None:
    bus = et.EventBus()
    first, second = bus.subscribe(Ping, Record(), name="same"), bus.subscribe(Ping, Record(), name="same")
    assert (first.name, second.name) == ("same", "same-2")
    first.cancel()
    assert bus.subscribe(Ping, Record(), name="same").name == "same"


async def test_subscribing_and_cancelling_in_many_threads_leaves_the_right_ones() -> None:
    bus, kept = et.EventBus(), []
    async with bus:

        def churn() -> None:
            for index in range(100):
                subscription = bus.subscribe(Ping, Record())
                if index % 10:
                    subscription.cancel()
                else:
                    kept.append(subscription)

        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(anyio.to_thread.run_sync, churn)
        await bus.drain()
        bus.publish(Ping())
        await bus.drain()
        assert set(bus.subscriptions) == set(kept)
        assert len(kept) == 40
        assert [subscription.statistics().delivered for subscription in kept] == [1] * 40
        assert len({subscription._core.index for subscription in kept}) == 40


async def test_work_from_another_thread_runs_on_the_event_loop_of_the_bus() -> None:
    bus = et.EventBus()

    async def answer(value: int) -> int:
        await anyio.lowlevel.checkpoint()
        return value

    async def wait_for_ever() -> None:
        await anyio.sleep_forever()

    with pytest.raises(et.BusClosed, match="not running"):
        core_of(bus).submit(answer, 1)
    async with bus:
        future = core_of(bus).submit(answer, 2)
        assert await anyio.to_thread.run_sync(future.result) == 2
        hanging = core_of(bus).submit(wait_for_ever)
        await anyio.wait_all_tasks_blocked()
    with pytest.raises(et.BusClosed):
        hanging.result(timeout=5)


# --- the training loop's side -------------------------------------------------------------------------------


def series(steps: range, built: list[int] | None = None) -> EventSeries:
    def build(wanted: Any) -> list[et.Event]:
        wanted = list(wanted)
        if built is not None:
            built.extend(wanted)
        return [et.StepCompleted(step=step, epoch=0, batch=step, metrics={}) for step in wanted]

    return EventSeries(et.StepCompleted, steps, build)


async def test_events_of_a_series_are_built_once_and_only_where_someone_wants_them() -> None:
    built: list[int] = []
    every, latest = Record(), Record()
    async with et.EventBus() as bus:
        core_of(bus).feed([series(range(1, 11), built)])
        await bus.drain()
        assert built == []
        bus.subscribe(et.StepCompleted, every, every=10)
        await bus.drain()
        core_of(bus).feed([series(range(11, 41), built)])
        await bus.drain()
        assert built == [20, 30, 40]
        bus.subscribe(et.StepCompleted, latest, queue=et.KeepLatest())
        await bus.drain()
        core_of(bus).feed([series(range(41, 71), built)])
    assert built == [20, 30, 40, 50, 60, 70]
    assert [event.step for event in every.events] == [20, 30, 40, 50, 60, 70]
    assert latest.events[-1].step == 70
    assert latest.events[-1] is every.events[-1]
    assert core_of(bus).stream.rows_routed == 70


async def test_the_stream_waits_for_room_and_a_subscriber_that_never_moves_is_disabled() -> None:
    neighbour, disabled = Record(), Record()
    async with et.EventBus() as bus:

        @bus.on(et.StepCompleted, queue=et.Lossless(2, stall_timeout_s=0.02), name="stuck")
        async def stuck(event: et.StepCompleted) -> None:
            await anyio.sleep_forever()

        bus.subscribe(et.StepCompleted, neighbour)
        bus.subscribe(et.SubscriberDisabled, disabled)
        await bus.drain(timeout_s=0.01)
        core_of(bus).feed([series(range(1, 101))])
        with anyio.fail_after(10):
            while len(neighbour.events) < 100 or not disabled.events:  # noqa: ASYNC110
                await anyio.sleep(0.005)
        assert disabled.events[0].subscriber == "stuck"
    assert [event.step for event in neighbour.events] == list(range(1, 101))


async def test_rows_allowed_follows_the_tightest_lossless_queue() -> None:
    bus = et.EventBus(buffer_limit=1_000)
    stream = core_of(bus).stream
    kinds = (et.StepCompleted,)
    assert stream.rows_allowed(kinds) == 1_000
    assert stream.fullest(kinds) is None
    wide = bus.subscribe(et.StepCompleted, Record(), queue=et.Lossless(10), every=5)
    assert stream.rows_allowed(kinds) == 50
    assert stream.fullest(kinds) is wide._core
    narrow = bus.subscribe(et.StepCompleted, Record(), queue=et.Lossless(20))
    assert stream.rows_allowed(kinds) == 20
    narrow.cancel()
    bus.subscribe(et.StepCompleted, Record(), queue=et.KeepLatest())
    assert stream.rows_allowed(kinds) == 50


async def test_notices_of_failures_pass_no_limit_and_their_counts_are_exact(anyio_backend: object) -> None:
    opened = anyio.Event()
    seen: list[et.SubscriberFailed] = []
    async with et.EventBus() as bus:

        async def slow(event: et.SubscriberFailed) -> None:
            await opened.wait()
            seen.append(event)

        async def fails(event: Ping | Pong) -> None:
            raise ValueError("broken")

        reader = bus.subscribe(et.SubscriberFailed, slow, queue=et.Lossless(10))
        failing = bus.subscribe(Ping | Pong, fails, disable_after=None)
        most = 0
        for number in range(4_000):
            bus.publish(Ping(number=number) if number % 2 else Pong())
            if number % 100 == 99:
                await anyio.sleep(0.001)
                most = max(most, reader.statistics().pending)
        while failing.statistics().errors < 4_000:  # noqa: ASYNC110
            await anyio.sleep(0.001)
        assert max(most, reader.statistics().pending) <= 12
        opened.set()
        await bus.drain()
    assert sum(event.count for event in seen) == 4_000
    assert {event.event_kind: event.count for event in seen if event.count > 1}.keys() == {"ping", "pong"}


async def test_notices_of_a_subscription_that_ends_are_not_held_back(anyio_backend: object) -> None:
    opened, seen = anyio.Event(), list[et.SubscriberFailed]()
    async with et.EventBus() as bus:

        async def slow(event: et.SubscriberFailed) -> None:
            await opened.wait()
            seen.append(event)

        def fails(event: Ping) -> None:
            raise ValueError("broken")

        bus.subscribe(et.SubscriberFailed, slow, queue=et.Lossless(2))
        bus.subscribe(Ping, fails, disable_after=50)
        for number in range(60):
            bus.publish(Ping(number=number))
        while len(bus.subscriptions) == 2 and bus.subscriptions[-1].active:  # noqa: ASYNC110
            await anyio.sleep(0.001)
        opened.set()
        await bus.drain()
    assert sum(event.count for event in seen) == 50


async def test_one_full_queue_holds_up_no_event_of_its_neighbours_and_the_loop_waits_instead(
    anyio_backend: object,
) -> None:
    neighbour = Record()
    async with et.EventBus() as bus:

        @bus.on(et.EpochStarted, queue=et.Lossless(1))
        async def stuck(event: et.EpochStarted) -> None:
            await opened.wait()

        opened = anyio.Event()
        bus.subscribe(et.StepCompleted | et.EpochStarted, neighbour)
        await bus.drain()
        core, stream = core_of(bus), core_of(bus).stream
        kinds = (et.StepCompleted, et.StepStarted)
        for epoch in range(4):
            start = et.EpochStarted(epoch=epoch, hyperparams={}, step=epoch)
            core.feed([start, series(range(epoch + 1, epoch + 2))])
        with anyio.fail_after(5):
            while len(neighbour.events) < 8:  # noqa: ASYNC110
                await anyio.sleep(0.001)
        assert stream.rows_allowed(kinds) == stream.rows_routed
        fullest = stream.fullest(kinds)
        assert fullest is not None
        assert "stuck" in fullest.name
        opened.set()
        await bus.drain()
        assert stream.rows_allowed(kinds) > stream.rows_routed
