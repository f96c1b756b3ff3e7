"""What a forked process publishes would never arrive, so it is refused there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import python_path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
def test_a_forked_process_cannot_publish_to_the_loop_of_its_parent() -> None:
    script = """
import os, anyio, numpy as np, eventtrain as et, concurrent.futures as futures
class Ping(et.Event): pass
def child(bus, trainer):
    for publish in (lambda: bus.publish(Ping()), lambda: bus.subscribe(Ping, print)):
        try:
            publish()
        except et.BusClosed as error:
            assert "forked" in str(error), error
        else:
            return 3
    command = trainer.control.stop("from the child")
    async def result():
        try:
            await command.result()
        except et.CommandRejectedError as error:
            assert "forked" in error.reason, error.reason
            return 0
    code = anyio.run(result)
    own = et.EventBus()  # a bus of the child's own works
    async def serve():
        async with own:
            own.publish(Ping())
            return await own.drain()
    return code or bool(anyio.run(serve))
async def main():
    unserved = et.EventBus()
    async with et.EventBus() as bus:
        trainer = et.Trainer(lambda s, b: (s, {}), {"w": np.zeros(1)}, bus=bus)
        pid = os.fork()
        if not pid:
            code = 9
            try:
                with futures.ThreadPoolExecutor(1) as thread:  # this one looks as if its loop ran
                    code = thread.submit(child, bus, trainer).result()
                unserved.publish(Ping())
            finally:
                os._exit(int(code))
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            await anyio.sleep(0.01)
        assert os.waitstatus_to_exitcode(status) == 0, status
        bus.publish(Ping())  # the parent's goes on
        assert not await bus.drain()
anyio.run(main)
"""
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": python_path()},
    )
