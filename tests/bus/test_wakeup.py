from __future__ import annotations

import threading

import anyio
import anyio.from_thread
import anyio.to_thread
import pytest

from eventtrain.bus.wakeup import Answer, LoopThread, Signal, Wakeup


async def test_no_ring_is_lost_however_the_threads_interleave(anyio_backend: object) -> None:
    waiting: list[int] = []
    bell = Wakeup(LoopThread())
    count, received = 20_000, 0

    def produce() -> None:
        for number in range(count):
            waiting.append(number)
            if bell.armed:
                bell.ring()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, produce)
            while received < count:
                await bell.sleep_unless(lambda: waiting)
                received += len(waiting)
                del waiting[: len(waiting)]
                if not received % 7:
                    await anyio.lowlevel.checkpoint()
    assert received == count


async def test_the_sleeper_is_armed_before_it_looks_for_the_last_time(anyio_backend: object) -> None:
    bell, armed = Wakeup(LoopThread()), list[bool]()

    def look() -> bool:
        armed.append(bell.armed)
        return True

    await bell.sleep_unless(look)
    assert armed == [True]


async def test_a_ring_without_a_reason_is_slept_through(anyio_backend: object) -> None:
    bell, ready = Wakeup(LoopThread()), False

    async def sleep() -> None:
        await bell.sleep_unless(lambda: ready)
        assert ready

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sleep)
        await anyio.wait_all_tasks_blocked()
        bell.ring()
        await anyio.wait_all_tasks_blocked()
        assert bell.armed
        ready = True
        bell.ring()
    assert not bell.armed


async def test_a_pulse_wakes_every_waiter_on_every_event_loop(
    anyio_backend: tuple[str, dict[str, object]],
) -> None:
    signal, woken, enlisted = Signal(), [], threading.Semaphore(0)

    async def wait(name: str) -> None:
        def look() -> bool:
            enlisted.release()
            return False

        await signal.wait_unless(look)
        woken.append(name)

    def elsewhere() -> None:
        anyio.run(wait, "elsewhere", backend=anyio_backend[0], backend_options=anyio_backend[1])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, elsewhere)
        tasks.start_soon(wait, "here")
        tasks.start_soon(wait, "here too")
        for _ in range(3):
            await anyio.to_thread.run_sync(enlisted.acquire)
        signal.pulse()
    assert sorted(woken) == ["elsewhere", "here", "here too"]


async def test_a_cancelled_waiter_leaves_nothing_behind(anyio_backend: object) -> None:
    signal = Signal()
    with anyio.move_on_after(0):
        await signal.wait_unless(lambda: False)
    assert not signal._waiting


async def test_the_first_answer_counts_and_reaches_waiters_before_and_after(anyio_backend: object) -> None:
    answer: Answer[int] = Answer()
    got: list[int] = []

    async def wait() -> None:
        got.append(await answer.wait())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await anyio.to_thread.run_sync(answer.give, 1)
        answer.give(2)
        answer.fail(ValueError("too late"))
    assert [*got, await answer.wait()] == [1, 1]


async def test_an_error_given_as_answer_is_raised_in_every_waiter(anyio_backend: object) -> None:
    answer: Answer[int] = Answer()
    answer.fail(ValueError("no"))
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            await answer.wait()


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
