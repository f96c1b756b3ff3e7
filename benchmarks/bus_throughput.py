"""Cost of the bus: publishing from a thread, and delivering events to 1 and to 10 async handlers.

Each figure of eventtrain is a ratio to the simplest alternative. Both run in this process in alternating order, and the
figure is the median of all pairs. Other libraries are measured with the same events and handlers.

    python -m benchmarks.bus_throughput [--pairs 9] [--json PATH]
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import anyio
import anyio.from_thread
import typer
from rich.console import Console
from rich.table import Table

import eventtrain as et
from benchmarks.machine import write_json

try:
    import blinker
except ImportError:
    blinker = None
try:
    from pyee.asyncio import AsyncIOEventEmitter
except ImportError:
    AsyncIOEventEmitter = None
try:
    import abxbus
except ImportError:
    abxbus = None

EVENTS = 10_000
"""Events per run: fewer than the limit of a Lossless queue, so that none is refused."""
WINDOW = 256
"""Events between two turns of the event loop in the fan-out: about one window of the training loop."""


class Ping(et.Event):
    number: int = 0


Handler = Callable[[Any], Awaitable[None]]


def pings() -> list[Ping]:
    return [Ping() for _ in range(EVENTS)]


def counting_handlers(number: int, counts: list[int]) -> list[Handler]:
    counts[:] = [0] * number

    def make(index: int) -> Handler:
        async def handle(event: Any) -> None:
            counts[index] += 1

        return handle

    return [make(index) for index in range(number)]


# --- publish from a thread ------------------------------------------------------------------------------------


class Flag:
    __slots__ = ("up",)

    def __init__(self) -> None:
        self.up = False

    def raise_it(self) -> None:
        raise AssertionError


class BareInbox:
    """Minimal way to hand an item to another thread: one append, and a check whether that thread sleeps."""

    def __init__(self) -> None:
        self.waiting: deque[Any] = deque()
        self.asleep = Flag()

    def publish(self, event: Any) -> None:
        self.waiting.append(event)
        if self.asleep.up:
            self.asleep.raise_it()


def time_inline(events: list[Ping]) -> float:
    inbox = BareInbox()
    waiting, asleep = inbox.waiting, inbox.asleep
    began_s = perf_counter()
    for event in events:
        waiting.append(event)
        if asleep.up:
            asleep.raise_it()
    return perf_counter() - began_s


def time_calls(publish: Callable[[Any], None], events: list[Ping]) -> float:
    began_s = perf_counter()
    for event in events:
        publish(event)
    return perf_counter() - began_s


def publish_ratios(pairs: int) -> dict[str, float]:
    """Publishes from this thread while a handler keeps the event loop, in another thread, busy."""
    by_call: list[float] = []
    inline: list[float] = []
    nanoseconds: list[float] = []

    async def busy(bus: et.EventBus, started: threading.Event, go_on: threading.Event) -> int:
        async def hold(event: et.AlertRaised) -> None:
            started.set()
            go_on.wait()

        subscription = bus.subscribe(et.AlertRaised, hold)
        received = 0

        async def receive(event: Ping) -> None:
            nonlocal received
            received += 1

        counted = bus.subscribe(Ping, receive)
        bus.publish(et.AlertRaised(name="hold"))
        await bus.drain()
        subscription.cancel()
        counted.cancel()
        return received

    with anyio.from_thread.start_blocking_portal() as portal:
        bus = et.EventBus(block_warning_s=60.0)
        with portal.wrap_async_context_manager(bus):
            for _ in range(pairs):
                started, go_on = threading.Event(), threading.Event()
                received = portal.start_task_soon(busy, bus, started, go_on)
                started.wait()
                ours_s = time_calls(bus.publish, pings())
                called_s = time_calls(BareInbox().publish, pings())
                inline_s = time_inline(pings())
                go_on.set()
                assert received.result() == EVENTS
                by_call.append(ours_s / called_s)
                inline.append(ours_s / inline_s)
                nanoseconds.append(1e9 * ours_s / EVENTS)
    return {
        "publish / append and check, in a function": median(by_call),
        "publish / append and check, inline": median(inline),
        "publish, ns": median(nanoseconds),
    }


# --- fan-out --------------------------------------------------------------------------------------------------


async def fan_out_directly(handlers: list[Handler]) -> float:
    events = pings()
    began_s = perf_counter()
    for event in events:
        for handler in handlers:
            await handler(event)
    return perf_counter() - began_s


async def fan_out_eventtrain(handlers: list[Handler]) -> float:
    async with et.EventBus() as bus:
        for handler in handlers:
            bus.subscribe(Ping, handler)
        await bus.drain()
        events = pings()
        began_s = perf_counter()
        for start in range(0, EVENTS, WINDOW):
            for event in events[start : start + WINDOW]:
                bus.publish(event)
            await anyio.lowlevel.checkpoint()
        await bus.drain()
        return perf_counter() - began_s


async def fan_out_queue(handlers: list[Handler]) -> float:
    """Hand-written alternative: one asyncio.Queue and one task per handler."""
    queues: list[asyncio.Queue[Any]] = [asyncio.Queue() for _ in handlers]

    async def work(queue: asyncio.Queue[Any], handler: Handler) -> None:
        while True:
            await handler(await queue.get())
            queue.task_done()

    async with asyncio.TaskGroup() as tasks:
        workers = [tasks.create_task(work(*pair)) for pair in zip(queues, handlers, strict=True)]
        events = pings()
        began_s = perf_counter()
        for start in range(0, EVENTS, WINDOW):
            for event in events[start : start + WINDOW]:
                for queue in queues:
                    queue.put_nowait(event)
            await asyncio.sleep(0)
        for queue in queues:
            await queue.join()
        elapsed_s = perf_counter() - began_s
        for worker in workers:
            worker.cancel()
    return elapsed_s


async def fan_out_blinker(handlers: list[Handler]) -> float:
    """blinker's asynchronous form awaits the handlers one after the other, in the publisher."""
    assert blinker is not None
    signal = blinker.Signal()
    for handler in handlers:
        signal.connect(handler)
    events = pings()
    began_s = perf_counter()
    for event in events:
        await signal.send_async(event)
    return perf_counter() - began_s


async def fan_out_pyee(handlers: list[Handler]) -> float:
    """pyee starts one task per event and handler."""
    assert AsyncIOEventEmitter is not None
    emitter = AsyncIOEventEmitter()
    for handler in handlers:
        emitter.add_listener("ping", handler)
    events = pings()
    began_s = perf_counter()
    for start in range(0, EVENTS, WINDOW):
        for event in events[start : start + WINDOW]:
            emitter.emit("ping", event)
        await asyncio.sleep(0)
    await emitter.wait_for_complete()
    return perf_counter() - began_s


ABXBUS_EVENTS = 200
"""abxbus takes about a millisecond per event, so fewer events are enough."""


async def fan_out_abxbus(handlers: list[Handler]) -> float:
    assert abxbus is not None

    class AbxPing(abxbus.BaseEvent[None]):
        number: int = 0

    bus = abxbus.EventBus(f"Bench{len(handlers)}", max_history_size=None)
    for index, handler in enumerate(handlers):

        async def call(event: Any, handler: Handler = handler) -> None:
            await handler(event)

        call.__name__ = f"call_{index}"
        bus.on(AbxPing, call)
    events = [AbxPing() for _ in range(ABXBUS_EVENTS)]
    began_s = perf_counter()
    for event in events:
        bus.emit(event)
    await bus.wait_until_idle()
    elapsed_s = perf_counter() - began_s
    await bus.destroy()
    return elapsed_s * EVENTS / ABXBUS_EVENTS


async def fan_out_ratios(handlers: int, pairs: int, note: Callable[[str], None]) -> dict[str, float]:
    """Returns the time of each library over awaiting the same handlers, and its microseconds per event."""
    ways: dict[str, Callable[[list[Handler]], Awaitable[float]]] = {
        "eventtrain": fan_out_eventtrain,
        "asyncio.Queue": fan_out_queue,
    }
    if blinker is not None:
        ways["blinker"] = fan_out_blinker
    if AsyncIOEventEmitter is not None:
        ways["pyee"] = fan_out_pyee
    if abxbus is not None:
        ways["abxbus"] = fan_out_abxbus
    ratios: dict[str, float] = {}
    counts: list[int] = []
    for name, way in ways.items():
        found: list[tuple[float, float]] = []
        for pair in range(pairs):
            times: dict[bool, float] = {}
            for direct in (True, False) if pair % 2 else (False, True):
                chosen = fan_out_directly if direct else way
                times[direct] = await chosen(counting_handlers(handlers, counts))
                expected = ABXBUS_EVENTS if chosen is fan_out_abxbus else EVENTS
                if counts != [expected] * handlers:
                    note(f"{name}: of {expected} events the {handlers} handlers got {counts}")
            found.append((times[False] / times[True], 1e6 * times[False] / EVENTS))
        ratios[f"{name} / direct"] = median(ratio for ratio, _ in found)
        ratios[f"{name}, us per event"] = median(microseconds for _, microseconds in found)
    return ratios


# --- the report -----------------------------------------------------------------------------------------------

TARGETS = {
    ("publish", "publish / append and check, in a function"): 4.0,
    ("1 handler", "eventtrain / direct"): 3.0,
    ("10 handlers", "eventtrain / direct"): 3.0,
}


def main(
    pairs: Annotated[int, typer.Option(help="alternating runs, of which the median is taken")] = 9,
    json: Annotated[Path | None, typer.Option(help="file to write the figures to")] = None,
) -> None:
    """Measures and prints the table."""
    logging.disable(logging.WARNING)
    console = Console()
    notes: list[str] = []
    figures = {
        "publish": publish_ratios(pairs),
        "1 handler": anyio.run(fan_out_ratios, 1, pairs, notes.append),
        "10 handlers": anyio.run(fan_out_ratios, 10, pairs, notes.append),
    }
    table = Table(title=f"The bus (medians of {pairs} pairs, {EVENTS} events each, asyncio)")
    table.add_column("case")
    table.add_column("figure")
    table.add_column("measured", justify="right")
    table.add_column("target", justify="right")
    for case, rows in figures.items():
        for figure, value in rows.items():
            target = TARGETS.get((case, figure))
            table.add_row(case, figure, f"{value:.2f}", f"<= {target:.2f}" if target else "")
    console.print(table)
    for note in dict.fromkeys(notes):
        console.print(note)
    if json is not None:
        write_json(json, "bus_throughput", figures)


if __name__ == "__main__":
    typer.run(main)
