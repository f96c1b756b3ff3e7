"""Positive controls: the checks that all tests rely on do catch what they are there for."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import anyio
import pytest
import sniffio

import eventtrain
from tests.conftest import RunOnDevices, encodable, recorded_blocking_calls

PACKAGE = Path(next(iter(eventtrain.__path__)))


def isolate(handler: object) -> None:
    """Calls a handler as the bus does: from a file of eventtrain, its exception kept away from others."""
    code = compile("try:\n    handler()\nexcept Exception:\n    pass", str(PACKAGE / "planted.py"), "exec")
    exec(code, {"handler": handler})


@pytest.mark.allow_blocking
@pytest.mark.parametrize("anyio_backend", [("asyncio", {}), ("asyncio", {"use_uvloop": True})])
async def test_blocking_call_in_a_handler_is_recorded_though_its_exception_is_isolated() -> None:
    with recorded_blocking_calls() as calls:
        isolate(lambda: time.sleep(0))
        time.sleep(0)  # noqa: ASYNC251  no frame of eventtrain on the stack
        await asyncio.to_thread(isolate, lambda: time.sleep(0))  # no event loop in that thread
    assert len(calls) == 1
    assert calls[0].startswith("time.sleep was called at")


def test_half_a_surrogate_pair_in_a_log_line_reaches_pytest_xdist_as_an_escape() -> None:
    report = {
        "sections": [("Captured log", "a \ud800 b")],
        "longrepr": None,
        "duration": 0.5,
        "\udc80": ["\ud800"],
    }
    assert encodable(report) == {
        "sections": [("Captured log", "a \\ud800 b")], "longrepr": None, "duration": 0.5, "\\udc80": ["\\ud800"],
    }  # fmt: skip


async def test_coroutine_tests_run_on_the_event_loop_they_are_named_after(
    request: pytest.FixtureRequest,
) -> None:
    await anyio.lowlevel.checkpoint()
    name = request.node.callspec.id
    assert sniffio.current_async_library() == ("trio" if name == "trio" else "asyncio")
    if name != "trio":
        module = type(asyncio.get_running_loop()).__module__
        assert module.startswith("uvloop") == (name == "uvloop")


def count_devices() -> None:
    import jax

    print(jax.device_count(), jax.default_backend())


@pytest.mark.parametrize(
    "script", [count_devices, "import jax\nprint(jax.device_count(), jax.default_backend())"]
)
def test_script_runs_on_as_many_devices_as_it_was_promised(
    run_on_devices: RunOnDevices, script: object
) -> None:
    assert run_on_devices(8, script) == "8 cpu\n"  # pyright: ignore[reportArgumentType]


def test_script_that_fails_on_devices_fails_the_test_with_its_output(run_on_devices: RunOnDevices) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"ended with 3:\n(.|\n)*the reason"):
        run_on_devices(1, "import sys\nprint('the reason')\nsys.exit(3)")
    with pytest.raises(pytest.fail.Exception, match="UserWarning: careless"):
        run_on_devices(1, "import warnings\nwarnings.warn('careless')")
