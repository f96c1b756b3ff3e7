from __future__ import annotations

import itertools
import threading
import time

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

import eventtrain as et
from eventtrain.bus import wakeup as wakeups
from eventtrain.bus.wakeup import CrossLoopCondition, CrossLoopFuture, LoopThread, Wakeup


async def test_no_wakeup_is_lost_however_the_threads_interleave(anyio_backend: object) -> None:
    waiting: list[int] = []
    wakeup = Wakeup(LoopThread())
    count, received = 20_000, 0

    def produce() -> None:
        for number in range(count):
            waiting.append(number)
            if wakeup.armed:
                wakeup.wake()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, produce)
            while received < count:
                await wakeup.sleep_until(lambda: waiting)
                received += len(waiting)
                del waiting[: len(waiting)]
                if not received % 7:
                    await anyio.lowlevel.checkpoint()
    assert received == count


async def test_the_sleeper_is_armed_before_it_looks_for_the_last_time(anyio_backend: object) -> None:
    wakeup, armed = Wakeup(LoopThread()), list[bool]()

    def look() -> bool:
        armed.append(wakeup.armed)
        return True

    await wakeup.sleep_until(look)
    assert armed == [True]


async def test_a_wakeup_without_a_reason_is_slept_through(anyio_backend: object) -> None:
    wakeup, ready = Wakeup(LoopThread()), False

    async def sleep() -> None:
        await wakeup.sleep_until(lambda: ready)
        assert ready

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sleep)
        await anyio.wait_all_tasks_blocked()
        wakeup.wake()
        await anyio.wait_all_tasks_blocked()
        assert wakeup.armed
        ready = True
        wakeup.wake()
    assert not wakeup.armed


async def test_notifying_wakes_every_waiter_on_every_event_loop_and_in_threads(
    anyio_backend: tuple[str, dict[str, object]],
) -> None:
    condition, woken, enlisted = CrossLoopCondition(), [], threading.Semaphore(0)
    ready = False

    def look() -> bool:
        enlisted.release()
        return ready

    async def wait(name: str) -> None:
        await condition.wait_until(look)
        woken.append(name)

    def elsewhere() -> None:
        anyio.run(wait, "elsewhere", backend=anyio_backend[0], backend_options=anyio_backend[1])

    def block() -> None:
        condition.block_until(look, poll_s=60.0)
        woken.append("thread")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, elsewhere)
        tasks.start_soon(anyio.to_thread.run_sync, block)
        tasks.start_soon(wait, "here")
        tasks.start_soon(wait, "here too")
        for _ in range(2 * 4):  # each looks before it is enlisted and once more afterwards
            await anyio.to_thread.run_sync(enlisted.acquire)
        ready = True
        condition.notify_all()
    assert sorted(woken) == ["elsewhere", "here", "here too", "thread"]
    assert not condition._waiters


async def test_a_waiter_sees_what_changed_between_its_first_look_and_its_enlisting(
    anyio_backend: object,
) -> None:
    condition, looks = CrossLoopCondition(), list[bool]()

    def look() -> bool:
        looks.append(bool(condition._waiters))
        return len(looks) > 1

    with anyio.fail_after(10):
        await condition.wait_until(look)
    assert looks == [False, True]
    looks.clear()
    condition.block_until(look, poll_s=60.0)
    assert looks == [False, True]


async def test_a_waiter_that_is_notified_in_vain_waits_on(anyio_backend: object) -> None:
    condition, ready, done = CrossLoopCondition(), False, list[bool]()

    async def wait() -> None:
        await condition.wait_until(lambda: ready)
        done.append(True)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        for _ in range(2):
            await anyio.wait_all_tasks_blocked()
            condition.notify_all()
        await anyio.wait_all_tasks_blocked()
        assert not done
        ready = True
        condition.notify_all()
    assert done


def test_a_thread_evaluates_its_condition_also_without_a_notification() -> None:
    looks: list[int] = []
    CrossLoopCondition().block_until(lambda: looks.append(0) or len(looks) > 4, poll_s=0.001)
    assert len(looks) == 5


def test_the_listener_hears_every_notification() -> None:
    condition, heard = CrossLoopCondition(), list[int]()
    condition.notify_all()
    condition.listener = lambda: heard.append(len(heard))
    condition.notify_all()
    condition.notify_all()
    assert heard == [0, 1]


async def test_a_cancelled_waiter_leaves_nothing_behind(anyio_backend: object) -> None:
    condition = CrossLoopCondition()
    with anyio.move_on_after(0):
        await condition.wait_until(lambda: False)
    assert not condition._waiters


async def test_the_first_result_counts_and_reaches_waiters_before_and_after(anyio_backend: object) -> None:
    future: CrossLoopFuture[int] = CrossLoopFuture()
    got: list[int] = []

    async def wait() -> None:
        got.append(await future.wait())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await anyio.to_thread.run_sync(future.set_result, 1)
        future.set_result(2)
        future.set_exception(ValueError("too late"))
    assert [*got, await future.wait()] == [1, 1]


async def test_an_exception_that_was_set_is_raised_in_every_waiter(anyio_backend: object) -> None:
    future: CrossLoopFuture[int] = CrossLoopFuture()
    future.set_exception(ValueError("no"))
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            await future.wait()


async def test_sending_to_an_event_loop_that_has_ended_says_so(
    anyio_backend: tuple[str, dict[str, object]],
) -> None:
    loops: list[LoopThread] = []

    async def make() -> None:
        loops.append(LoopThread())

    await anyio.to_thread.run_sync(
        lambda: anyio.run(make, backend=anyio_backend[0], backend_options=anyio_backend[1])
    )
    assert loops[0].run_soon(lambda: None) is False


@pytest.mark.parametrize("busy", [True, False])
async def test_a_busy_event_loop_pauses_for_threads_that_wait_for_the_gil_and_an_idle_one_never(
    anyio_backend: object, busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    seconds = itertools.count(step=1.0)
    monkeypatch.setattr(wakeups.select, "select", lambda r, w, x, pause_s: pauses.append(pause_s))
    monkeypatch.setattr(wakeups, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(wakeups, "thread_time", itertools.count(step=0.9 if busy else 0.1).__next__)
    handled = 0

    class Echo(et.Event):
        pass

    async with et.EventBus() as bus:

        @bus.on(Echo)
        async def echo(event: Echo) -> None:
            nonlocal handled
            handled += 1
            if handled < 10:
                bus.publish(Echo())

        bus.publish(Echo())
        await bus.drain()
    assert handled == 10
    if busy:
        assert len(pauses) >= handled
        assert set(pauses) == {wakeups.PAUSE_S}
    else:
        assert not pauses


async def test_the_pause_comes_once_in_a_while(anyio_backend: object) -> None:
    loop, paused = LoopThread(), 0
    loop.pause_if_busy()
    until_s = time.perf_counter() + 0.1
    while time.perf_counter() < until_s:
        before_s = loop._looked_s
        loop.pause_if_busy()
        paused += loop._looked_s != before_s
    assert 1 <= paused <= 0.1 / wakeups.BUSY_S + 1
