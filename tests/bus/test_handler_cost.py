from __future__ import annotations

from contextvars import copy_context
from time import perf_counter, thread_time

import anyio
import pytest

from eventtrain.bus.handler_cost import HandlerCost, measured


def burn(duration_s: float) -> None:
    end_s = thread_time() + duration_s
    while thread_time() < end_s:
        pass


@pytest.mark.allow_blocking
async def test_cpu_time_of_every_slice_is_charged_and_waiting_is_not(anyio_backend: object) -> None:
    cost = HandlerCost()

    async def work() -> None:
        burn(0.02)
        await anyio.sleep(0.05)
        burn(0.02)

    await measured(work(), cost, copy_context)
    assert 0.04 <= cost.cpu_s < 0.06
    assert cost.longest_slice_s >= 0.02


async def test_while_a_slice_lasts_its_beginning_can_be_read_and_afterwards_not(
    anyio_backend: object,
) -> None:
    cost, seen = HandlerCost(), []

    async def work() -> None:
        seen.append(cost.slice_began)
        await anyio.lowlevel.checkpoint()
        seen.append(cost.slice_began)

    before_s = perf_counter()
    await measured(work(), cost, copy_context)
    assert before_s <= seen[0] <= seen[1] <= perf_counter()
    assert cost.slice_began is None


async def test_errors_and_cancellation_pass_through_both_ways(anyio_backend: object) -> None:
    seen: list[str] = []

    async def fail() -> None:
        await anyio.lowlevel.checkpoint()
        raise ValueError("mine")

    async def wait() -> None:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            seen.append("cancelled")
            raise

    with pytest.raises(ValueError, match="mine"):
        await measured(fail(), HandlerCost(), copy_context)
    with anyio.move_on_after(0.01) as scope:
        await measured(wait(), HandlerCost(), copy_context)
    assert seen == ["cancelled"]
    assert scope.cancelled_caught
