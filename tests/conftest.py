"""What all tests share: the event loops, the check for blocked loops, and runs on several CPU devices."""

from __future__ import annotations

import atexit
import importlib.util
import inspect
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import absl.logging
import blockbuster
import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILED = "EVENTTRAIN_TESTS_COMPILED"


def keep_compiled_programs() -> None:
    """Has JAX keep what it compiles, for the length of this run of the tests.

    Most tests compile the same few small programs, which takes half of the CPU time of the suite. Each process of
    pytest-xdist has a folder of its own, with the processes that its tests start: JAX does not write the files at once.
    """
    if COMPILED not in os.environ:  # the processes of pytest-xdist inherit it
        os.environ[COMPILED] = tempfile.mkdtemp(prefix="eventtrain-compiled-")
        atexit.register(shutil.rmtree, os.environ[COMPILED], ignore_errors=True)
    folder = Path(os.environ[COMPILED]) / os.environ.get("PYTEST_XDIST_WORKER", "main")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


keep_compiled_programs()

# A busy machine is no failure: Hypothesis' deadline per example would make one of it.
hypothesis.settings.register_profile("eventtrain", deadline=None)
hypothesis.settings.load_profile("eventtrain")

BACKENDS = [
    pytest.param(("asyncio", {}), id="asyncio"),
    pytest.param(
        ("asyncio", {"use_uvloop": True}),
        id="uvloop",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("uvloop") is None, reason="uvloop is not installed"
        ),
    ),
    pytest.param(("trio", {}), id="trio"),
]


# Importing MLflow has logging close all handlers, and absl's, which Orbax brings, closes the stderr that it found:
# that of pytest.
absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__

# A shell that runs the tests in the background has them ignore SIGINT, which several of them send to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Half a surrogate pair in what a test logged would end pytest-xdist's worker, and with it the whole run."""
    return encodable((yield))


def encodable(value: Any) -> Any:
    """``value``, plain JSON data, with what UTF-8 cannot have as escapes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, (list, tuple)):
        return type(value)(map(encodable, value))
    if isinstance(value, dict):
        return {encodable(key): encodable(item) for key, item in value.items()}
    return value


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Every coroutine test, and each test that asks for this fixture, runs on all three event loops."""
    return request.param


@pytest.fixture(scope="module", autouse=True)
def no_thread_stays() -> Iterator[None]:
    """Fails the last test of a file that leaves a thread of eventtrain behind, which the next file would find."""
    before = set(threading.enumerate())
    yield
    ends_s = time.monotonic() + 30
    while left := [
        t.name for t in threading.enumerate() if t.name.startswith("eventtrain") and t not in before
    ]:
        if time.monotonic() > ends_s:
            pytest.fail(f"Threads are left: {', '.join(left)}", pytrace=False)
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def no_blocked_event_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test in which code of eventtrain, or a handler it calls, blocks an asyncio event loop."""
    if request.node.get_closest_marker("allow_blocking"):
        yield
        return
    with recorded_blocking_calls() as calls:
        yield
    if calls:
        pytest.fail("The event loop was blocked: " + "\n".join(calls), pytrace=False)


@contextmanager
def recorded_blocking_calls() -> Iterator[list[str]]:
    """Makes blocking calls raise where an asyncio loop runs, and records them.

    It sees calls such as time.sleep and file access in any thread with a running asyncio loop and a frame of
    eventtrain on the stack; under trio it sees nothing. Raising is not enough, since the bus isolates a
    handler's exception: that is why each one is recorded too.
    """
    calls: list[str] = []

    class RecordedBlockingError(blockbuster.BlockingError):
        def __init__(self, func: str) -> None:
            super().__init__(func)
            calls.append(f"{func} was called at\n" + "".join(traceback.format_stack(limit=12)[:-2]))

    with (
        pytest.MonkeyPatch.context() as patch,
        blockbuster.blockbuster_ctx("eventtrain") as checks,
    ):
        # Where log lines go is the program's choice, not a handler's: absl, say, writes them to stderr.
        for check in checks.functions.values():
            check.can_block_in("logging/__init__.py", {"emit", "flush"})
            # Orbax runs an event loop of its own, on the thread that is kept for it (see test_checkpointer.py).
            check.can_block_in("eventtrain/subscribers/checkpointing/store.py", {"_fill", "close"})
            check.can_block_in("eventtrain/subscribers/checkpointing/reader.py", {"_read_arrays"})
            # So has the client of a broker, on the thread that sends.
            check.can_block_in("eventtrain/subscribers/brokers/redis_events.py", {"open"})
        patch.setattr(blockbuster.blockbuster, "BlockingError", RecordedBlockingError)
        yield calls


class RunOnDevices(Protocol):
    def __call__(self, n: int, script: str | Callable[[], object], *, timeout_s: float = 240) -> str: ...


@pytest.fixture
def run_on_devices(tmp_path: Path) -> RunOnDevices:
    """Runs a script on n forced CPU devices, in a process of its own: jax fixes their number once.

    `script` is source text, or a function without arguments and closures whose source is taken and called.
    Warnings are errors there too. Returns what it printed; a return code other than 0 fails the test with the
    output.
    """

    def run(n: int, script: str | Callable[[], object], *, timeout_s: float = 240) -> str:
        if callable(script):
            script = f"{textwrap.dedent(inspect.getsource(script))}\n{script.__name__}()\n"
        path = tmp_path / "on_devices.py"
        path.write_text(textwrap.dedent(script))
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={n}".strip()
        env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path()}
        try:
            done = subprocess.run(
                [sys.executable, "-W", "error", "-X", "faulthandler", str(path)],
                cwd=tmp_path,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as error:
            printed = (error.stdout or b"").decode(errors="replace")
            pytest.fail(f"On {n} devices the script was not through after {timeout_s} s:\n{printed}")
        if done.returncode != 0:
            pytest.fail(
                f"On {n} devices the script ended with {done.returncode}:\n{done.stdout}", pytrace=False
            )
        return done.stdout

    return run


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a store of MLflow's in a file. Making its tables takes seconds, so all tests share it."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


def python_path() -> str:
    """PYTHONPATH for a subprocess: this checkout comes before an installed eventtrain."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="jax sees no GPU"))


def has_gpu() -> bool:
    # In a process of its own: asking jax here would fix the devices of this one before a test can choose.
    question = "import jax, sys; sys.exit(jax.default_backend() != 'gpu')"
    return subprocess.run([sys.executable, "-c", question], capture_output=True).returncode == 0
