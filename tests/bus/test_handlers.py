from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest

import eventtrain as et
from eventtrain.bus.bus import core_of
from eventtrain.bus.handlers import describe, is_async, takes_control


class Ping(et.Event):
    number: int = 0


async def observe(event: Any) -> None: ...


async def decide(event: Any, control: Any) -> None: ...


async def with_default(event: Any, path: str = "", *, flag: bool = False) -> None: ...


async def control_by_name(event: Any, control: Any = None) -> None: ...


async def anything(*args: Any) -> None: ...


async def nothing() -> None: ...


async def three(event: Any, control: Any, more: Any) -> None: ...


async def keyword(event: Any, *, needed: int) -> None: ...


class Caller:
    async def __call__(self, event: Any) -> None: ...

    async def method(self, event: Any, control: Any) -> None: ...


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        (observe, False),
        (decide, True),
        (with_default, False),
        (control_by_name, True),
        (anything, False),
        (Caller(), False),
        (Caller().method, True),
        (partial(three, more=1), True),
        (partial(decide, control=None), False),
        ([].append, False),
    ],
)
def test_the_signature_tells_whether_a_handler_takes_the_control(handler: Any, expected: bool) -> None:
    assert takes_control(handler) is expected


@pytest.mark.parametrize("handler", [nothing, three, keyword])
def test_a_handler_that_cannot_be_called_with_event_or_event_and_control_is_refused(handler: Any) -> None:
    with pytest.raises(
        et.ConfigurationError, match=rf"Cannot subscribe {handler.__name__}.*\(event\) or \(event, control\)"
    ):
        et.EventBus().subscribe(Ping, handler)


@pytest.mark.parametrize("thing", [3, None, "handler"])
def test_what_cannot_be_called_is_no_handler(thing: Any) -> None:
    with pytest.raises(
        et.ConfigurationError, match=r"expected a function of \(event\) or \(event, control\), got"
    ):
        et.EventBus().on(Ping)(thing)


def test_coroutine_functions_are_recognised_through_partials_and_objects() -> None:
    assert is_async(partial(partial(observe), 1))
    assert is_async(Caller())
    assert not is_async(print)
    assert describe(partial(observe)) == "observe"
    assert describe(Caller()) == "Caller"


async def test_without_a_trainer_a_handler_that_takes_the_control_fails_with_the_reason(
    anyio_backend: object,
) -> None:
    async with et.EventBus() as bus:
        subscription = bus.subscribe(Ping, decide)
        bus.publish(Ping())
        await bus.drain()
        assert "no Trainer uses this bus" in str(subscription.dead_letters[0].error)


class Attempts:
    """A control source that notes how each attempt ended."""

    def __init__(self) -> None:
        self.ends: list[str] = []

    def begin_transaction(self, subscription: Any, event: Any) -> Any:
        ends = self.ends

        class Transaction:
            control = "the control"

            def commit(self) -> None:
                ends.append("committed")

            def discard(self) -> None:
                ends.append("discarded")

        return Transaction()


async def test_each_attempt_has_a_control_of_its_own_committed_only_on_success(anyio_backend: object) -> None:
    attempts, calls = Attempts(), 0
    async with et.EventBus() as bus:
        core_of(bus).control_source = attempts

        @bus.on(Ping, on_error="retry", retries=2, retry_delay_s=0, timeout_s=0.05)
        async def handle(event: Ping, control: Any) -> None:
            nonlocal calls
            calls += 1
            assert control == "the control"
            if calls == 1:
                raise ValueError("first")
            if calls == 2:
                await anyio.sleep_forever()

        bus.publish(Ping())
    assert attempts.ends == ["discarded", "discarded", "committed"]


async def test_a_plain_function_runs_in_a_thread_and_its_error_is_its_own(anyio_backend: object) -> None:
    threads: set[int] = set()
    async with et.EventBus() as bus:

        def handle(event: Ping) -> None:
            threads.add(threading.get_ident())
            if event.number == 1:
                raise ValueError("mine")

        subscription = bus.subscribe(Ping, handle)
        for number in range(3):
            bus.publish(Ping(number=number))
        await bus.drain()
        assert threading.get_ident() not in threads
        assert (subscription.statistics().delivered, subscription.statistics().errors) == (2, 1)


async def test_a_plain_handler_past_its_timeout_never_runs_beside_itself(anyio_backend: object) -> None:
    release, handled = threading.Event(), list[int]()
    running = peak = 0
    async with et.EventBus() as bus:

        def handle(event: Ping) -> None:
            nonlocal running, peak
            running += 1
            peak = max(peak, running)
            if event.number == 0:
                release.wait()
            handled.append(event.number)
            running -= 1

        subscription = bus.subscribe(Ping, handle, timeout_s=0.05)
        for number in range(3):
            bus.publish(Ping(number=number))
        with anyio.fail_after(10):
            while subscription.statistics().errors < 2:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            release.set()
            await bus.drain()
        assert peak == 1
        statistics = subscription.statistics()
        assert statistics.delivered + statistics.errors == 3
        assert 0 in handled  # late, and no longer counted as delivered
        assert statistics.delivered == len(handled) - 1


async def test_a_plain_handler_abandoned_at_the_end_blocks_nothing_and_writes_no_statistics(
    anyio_backend: object,
) -> None:
    release, returned = threading.Event(), threading.Event()
    with anyio.fail_after(10):
        async with et.EventBus(drain_timeout_s=0.02) as bus:

            def handle(event: Ping) -> None:
                release.wait()
                returned.set()

            subscription = bus.subscribe(Ping, handle)
            bus.publish(Ping())
        before = subscription.statistics()
        release.set()
        await anyio.to_thread.run_sync(returned.wait)
    after = subscription.statistics()
    assert (after.delivered, after.errors) == (before.delivered, before.errors) == (0, 0)


async def test_forty_blocked_plain_handlers_leave_a_services_own_threads_free(anyio_backend: object) -> None:
    release = threading.Event()
    async with et.EventBus() as bus:

        def block(event: Ping) -> None:
            release.wait()

        for _ in range(40):
            bus.subscribe(Ping, block)
        bus.publish(Ping())
        try:
            with anyio.fail_after(30):
                assert await anyio.to_thread.run_sync(lambda: 1) == 1
        finally:
            release.set()


async def test_cpu_time_of_a_plain_handler_is_charged(anyio_backend: object) -> None:
    async with et.EventBus() as bus:

        def burn(event: Ping) -> None:
            end_s = time.thread_time() + 0.03
            while time.thread_time() < end_s:
                pass

        subscription = bus.subscribe(Ping, burn)
        bus.publish(Ping())
        await bus.drain()
        assert 0.03 <= subscription.statistics().handler_cpu_s < 0.06
