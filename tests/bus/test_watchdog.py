from __future__ import annotations

import logging
import re
import threading
import time
from typing import Any

import anyio
import pytest

import eventtrain as et
from eventtrain.bus.bus import core_of
from eventtrain.bus.subscription import SubscriptionCore
from eventtrain.bus.watchdog import Watchdog

pytestmark = pytest.mark.allow_blocking


class Ping(et.Event):
    pass


async def handle(event: Any) -> None: ...


@pytest.fixture
def watched() -> tuple[Watchdog, SubscriptionCore]:
    subscription = core_of(et.EventBus()).subscribe(Ping, handle, {"name": "watched"})
    return Watchdog(lambda: (subscription,), lambda: None, block_warning_s=0.1, cpu_budget=0.25), subscription


def test_a_handler_that_holds_the_loop_is_named_while_it_still_does(
    watched: tuple[Watchdog, SubscriptionCore], caplog: pytest.LogCaptureFixture
) -> None:
    watchdog, subscription = watched
    subscription.cost.slice_began = 100.0
    watchdog.look(100.05)
    assert not caplog.messages
    watchdog.look(100.2)
    watchdog.look(100.3)
    assert len(caplog.messages) == 1
    assert "watched held the event loop for 0.200 s so far" in caplog.text
    watchdog.look(100.5)
    assert "0.500 s so far" in caplog.messages[1]


def test_a_handler_that_held_the_loop_between_two_looks_is_named_with_the_figure(
    watched: tuple[Watchdog, SubscriptionCore], caplog: pytest.LogCaptureFixture
) -> None:
    watchdog, subscription = watched
    subscription.cost.add_slice(0.0, 0.35)
    watchdog.look(1.0)
    watchdog.look(2.0)
    assert [re.sub(r"; .*", "", message) for message in caplog.messages] == [
        "Subscriber watched held the event loop for 0.350 s"
    ]


def test_a_handler_that_burns_cpu_past_its_budget_is_named_with_the_share(
    watched: tuple[Watchdog, SubscriptionCore], caplog: pytest.LogCaptureFixture
) -> None:
    watchdog, subscription = watched
    watchdog.look(0.0)
    subscription.cost.add_thread_time(0.2)
    watchdog.look(1.0)
    assert not caplog.messages
    subscription.cost.add_thread_time(0.8)
    watchdog.look(2.0)
    assert "watched used 80% of a CPU core over the last 1.0 s (budget 25%)" in caplog.text


async def test_the_bus_names_a_handler_while_it_blocks_the_event_loop(
    anyio_backend: object, caplog: pytest.LogCaptureFixture
) -> None:
    warned = threading.Event()

    class Notice(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "blocker held the event loop" in record.getMessage():
                warned.set()

    notice = Notice()
    logging.getLogger("eventtrain").addHandler(notice)
    try:
        async with et.EventBus(block_warning_s=0.05) as bus:

            @bus.on(Ping, name="blocker")
            async def block(event: Ping) -> None:
                assert warned.wait(timeout=10)  # the warning has to come from outside the blocked loop

            bus.publish(Ping())
            await bus.drain()
            assert bus.statistics()["blocker"].delivered == 1
    finally:
        logging.getLogger("eventtrain").removeHandler(notice)


async def test_waiting_is_not_blocking(anyio_backend: object, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with et.EventBus(block_warning_s=0.2) as bus:

        @bus.on(Ping)
        async def wait(event: Ping) -> None:
            await anyio.sleep(0.5)

        bus.publish(Ping())
    assert "held the event loop" not in caplog.text


async def test_a_handler_that_turns_slow_gives_way_after_few_events(anyio_backend: object) -> None:
    """After a thousand quick events it takes 5 ms for each; nobody may wait behind a burst of a hundred of those."""
    async with et.EventBus() as bus:
        handled = 0

        @bus.on(Ping)
        async def turn_slow(event: Ping) -> None:
            nonlocal handled
            handled += 1
            if handled > 1_000:
                time.sleep(0.005)  # noqa: ASYNC251

        for _ in range(1_100):
            bus.publish(Ping())
        await bus.drain()
        assert bus.subscriptions[0].statistics().longest_slice_s < 0.3
