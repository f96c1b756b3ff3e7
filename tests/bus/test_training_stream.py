from __future__ import annotations

import gc
import weakref

import anyio
import pytest

import eventtrain as et

pytestmark = pytest.mark.anyio


async def test_the_stream_does_not_keep_a_subscription_whose_queue_was_overfull() -> None:
    """On a bus that outlives a trainer, and gets no further event of a loop."""
    async with et.EventBus() as bus:
        core = bus._core
        release = anyio.Event()

        async def slow(event: et.EpochStarted) -> None:
            await release.wait()

        subscription = bus.subscribe(et.EpochStarted, slow, queue=et.Lossless(limit=1), name="slow")
        await bus.drain()
        core.feed([et.EpochStarted(epoch=epoch, hyperparams={}) for epoch in range(4)])
        with anyio.fail_after(10):
            while not core.stream.overfull:  # noqa: ASYNC110
                await anyio.sleep(0.001)
        known = weakref.ref(core.stream.fullest([et.EpochStarted]))
        assert known() is not None
        subscription.cancel()
        release.set()
        del subscription, slow
        with anyio.fail_after(10):
            while known() is not None:
                await anyio.sleep(0.001)
                gc.collect()
        assert not core.stream.overfull
