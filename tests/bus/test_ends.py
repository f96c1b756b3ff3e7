"""Every awaiting call keeps its deadline, and no handler ends more than itself, whatever is published or raised."""

from __future__ import annotations

import ast
import asyncio
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

import eventtrain as et
from eventtrain.bus.bus import core_of
from eventtrain.bus.cancellation import persist
from eventtrain.bus.wakeup import CrossLoopCondition

BUS = Path(et.__file__).parent / "bus"


class Ping(et.Event):
    number: int = 0


class Echo(et.Event):
    of: str = ""


@pytest.fixture(autouse=True)
def on_every_event_loop(anyio_backend: object) -> None:
    """All of these tests run on asyncio, uvloop and trio."""


BOUNDED = {
    "_handle_some": "ends with its time slice, behind which _work has a checkpoint",
    "_reach_boundary": "one turn for each checkpoint of the run",
}
"""Coroutines whose loops end by themselves."""


# --- deadlines ------------------------------------------------------------------------------------------------


async def never(bus: et.EventBus) -> None:
    """``publish_async`` to a queue that has no room, because its handler never returns."""
    reached = anyio.Event()

    @bus.on(Ping, queue=et.Lossless(1), name="stuck")
    async def stuck(event: Ping) -> None:
        reached.set()
        await anyio.sleep_forever()

    bus.publish(Ping())
    await reached.wait()
    bus.publish(Ping())
    await bus.publish_async(Ping())


async def read(bus: et.EventBus) -> None:
    async with bus.stream(Ping, where=lambda event: False) as events:
        async for _ in events:
            pass


CALLS: dict[str, Callable[[et.EventBus], Awaitable[Any]]] = {
    "drain": lambda bus: bus.drain(),
    "aclose": lambda bus: bus.aclose(timeout_s=60),
    "wait_for": lambda bus: bus.wait_for(Ping, where=lambda event: False),
    "stream": read,
    "publish_async": never,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_a_call_keeps_its_deadline_while_every_event_causes_the_next(call) -> None:
    async with et.EventBus(drain_timeout_s=0.1) as bus:

        @bus.on(et.Event, name="audit")
        async def audit(event: et.Event) -> None:
            bus.publish(Echo(of=event.kind))

        bus.publish(Echo())
        began_s = time.monotonic()
        with anyio.move_on_after(0.2) as scope:
            await call(bus)
        assert scope.cancelled_caught
        assert time.monotonic() - began_s < 5


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_a_call_keeps_its_deadline_while_a_thread_notifies_without_a_pause(call) -> None:
    ended = threading.Event()
    async with et.EventBus(drain_timeout_s=0.1) as bus:
        bus.subscribe(et.Event, audit_of(bus))
        bus.publish(Echo())

        def pulse() -> None:
            while not ended.is_set():
                core_of(bus).progress.notify_all()
                time.sleep(0)

        thread = threading.Thread(target=pulse)
        thread.start()
        try:
            with anyio.move_on_after(0.2) as scope:
                await call(bus)
        finally:
            ended.set()
            thread.join()
        assert scope.cancelled_caught


def audit_of(bus: et.EventBus) -> Callable[[et.Event], Awaitable[None]]:
    async def audit(event: et.Event) -> None:
        bus.publish(Echo(of=event.kind))

    return audit


async def test_a_condition_that_is_notified_at_every_look_lets_a_cancellation_through() -> None:
    condition = CrossLoopCondition()

    def pulsing() -> bool:
        condition.notify_all()
        return False

    with anyio.move_on_after(0.1) as scope:
        await condition.wait_until(pulsing)
    assert scope.cancelled_caught


def test_every_loop_of_a_coroutine_of_the_bus_passes_a_place_where_a_cancellation_is_delivered(
    anyio_backend,
) -> None:
    checkpoints = {"checkpoint", "checkpoint_if_cancelled", "sleep", "acquire", "persist"}
    waits = checkpoints | {
        "sleep_until",
        "wait_until",
        "_wait_for_work",
        "_wait_for_room",
        "work",
        "_at_boundary",
    }
    loops = 0
    for path in sorted(BUS.glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.AsyncFunctionDef):
                continue
            for loop in [node for node in ast.walk(function) if isinstance(node, ast.While)]:
                names = {name_of(node.value) for node in ast.walk(loop) if isinstance(node, ast.Await)}
                if not names or function.name in BOUNDED:
                    continue
                loops += 1
                assert names & waits or names <= {"call", "at_boundary"}, (
                    f"{path.name}:{loop.lineno} awaits {names}"
                )
    assert loops >= 8


def name_of(node: ast.AST) -> str:
    while isinstance(node, (ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


# --- what a handler raises ------------------------------------------------------------------------------------

RAISED = [SystemExit(3), KeyboardInterrupt(), BaseExceptionGroup("both", [SystemExit(1), ValueError("x")])]


@pytest.mark.parametrize("raised", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", ["async", "plain", "retry", "where", "concurrent"])
async def test_whatever_a_handler_raises_is_its_own_failure(
    raised: BaseException, kind: str, anyio_backend
) -> None:
    numbers: list[int] = []

    async def raising(event: Ping) -> None:
        raise raised

    def raising_plain(event: Ping) -> bool:
        raise raised

    async with et.EventBus() as bus:
        options: dict[str, Any] = {"retry": {"on_error": "retry", "retries": 1, "retry_delay_s": 0.0}}.get(
            kind, {}
        )
        if kind == "where":
            options = {"where": raising_plain}
        if kind == "concurrent":
            options = {"concurrency": 2}
        failing = bus.subscribe(Ping, raising_plain if kind == "plain" else raising, **options)
        failed: list[et.SubscriberFailed] = []

        @bus.on(et.SubscriberFailed)
        async def see(event: et.SubscriberFailed) -> None:
            failed.append(event)

        @bus.on(Ping)
        async def innocent(event: Ping) -> None:
            numbers.append(event.number)

        for number in range(3):
            bus.publish(Ping(number=number))
        assert await bus.drain(10) == {}
        attempts = 6 if kind == "retry" else 3
        assert failing.statistics().errors == attempts
        assert len(failed) == attempts
        assert type(raised).__name__ in failed[0].error
        assert numbers == [0, 1, 2]


async def test_what_the_block_of_a_bus_raises_leaves_it_as_itself(anyio_backend) -> None:
    with pytest.raises(SystemExit) as caught:
        async with et.EventBus():
            raise SystemExit(7)
    assert caught.value.code == 7


# --- a handler that waits for itself --------------------------------------------------------------------------


async def failure_of_a_handler(bus: et.EventBus, handler: Any, **options: Any) -> Exception:
    subscription = bus.subscribe(Ping, handler, **options)
    bus.publish(Ping())
    with anyio.fail_after(10):
        while not subscription.dead_letters:  # noqa: ASYNC110
            await anyio.sleep(0.001)
    return subscription.dead_letters[0].error


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("call", ["drain", "aclose"])
async def test_draining_in_a_handler_is_refused(call: str, concurrency: int, anyio_backend) -> None:
    async with et.EventBus() as bus:

        async def handler(event: Ping) -> None:
            await getattr(bus, call)()

        error = await failure_of_a_handler(bus, handler, concurrency=concurrency)
        assert isinstance(error, et.errors.WaitsForItself)
        assert "itself among them" in str(error)


async def test_waiting_for_room_in_its_own_queue_is_refused(anyio_backend) -> None:
    async with et.EventBus() as bus:

        async def handler(event: Ping) -> None:
            for _ in range(3 if event.number == 0 else 0):
                await bus.publish_async(Ping(number=1))

        error = await failure_of_a_handler(bus, handler, queue=et.Lossless(2))
        assert isinstance(error, et.errors.WaitsForItself)
        assert "its own queue" in str(error)


# --- a blocked event loop -------------------------------------------------------------------------------------


@pytest.mark.allow_blocking
async def test_the_time_for_which_the_event_loop_is_blocked_is_measured(anyio_backend) -> None:
    async with et.EventBus() as bus:
        core = core_of(bus)

        @bus.on(Ping, name="blocker")
        async def blocker(event: Ping) -> None:
            time.sleep(1.0)  # noqa: ASYNC251

        bus.publish(Ping())
        await bus.drain(10)
        await anyio.sleep(0.3)
        assert 0.5 < core.blocked_s < 3
        assert core.blocked_now_s == 0.0


# --- the end of the process -----------------------------------------------------------------------------------


async def test_a_stream_ends_when_the_server_is_told_to_stop(anyio_backend) -> None:
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        async with et.EventBus() as bus, bus.stream(Ping) as events:
            bus.publish(Ping(number=1))
            numbers: list[int] = []
            with anyio.fail_after(10):
                async for event in events:
                    numbers.append(event.number)
                    signal.raise_signal(signal.SIGTERM)
                async with bus.stream(Ping) as late:  # a client that connects again
                    assert [event async for event in late] == []
        assert told == [signal.SIGTERM]
        assert numbers == [1]
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.modules["eventtrain.bus.termination"]._asked_s = float("-inf")  # type: ignore[attr-defined]


async def test_a_stream_leaves_the_default_handlers_of_signals_alone(anyio_backend) -> None:
    before = signal.getsignal(signal.SIGTERM)
    async with et.EventBus() as bus, bus.stream(Ping):
        assert signal.getsignal(signal.SIGTERM) is before


def test_tasks_that_asyncio_run_cancels_at_its_end_go_on_until_their_scope_ends_them(anyio_backend) -> None:
    if anyio_backend[0] != "asyncio":
        pytest.skip("trio has no cancellation of single tasks")
    steps: list[str] = []

    async def work() -> None:
        await anyio.sleep(0.05)
        steps.append("worked")

    async def main() -> None:
        task = asyncio.get_running_loop().create_task(persist(work))
        await asyncio.sleep(0)
        assert not task.done()

    asyncio.run(main())
    assert steps == ["worked"]
