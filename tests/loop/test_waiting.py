"""The one place to wait: every wait of the training thread serves commands there, and costs no CPU."""

from __future__ import annotations

import ast
import contextvars
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import eventtrain as et
from tests.conftest import ROOT
from tests.support.models import batches, make_trainer

WAIT_S = 1.0
"""How long a wait is measured."""


class Stuck:
    """Data that blocks before batch ``at`` of ``epoch`` until it is freed."""

    def __init__(self, at: int = 0, epoch: int = 0) -> None:
        self.at, self.epoch = at, epoch
        self.blocked, self.free = threading.Event(), threading.Event()

    def __call__(self, epoch: int) -> Iterator[Any]:
        for index, batch in enumerate(batches(4)):
            if (index, epoch) == (self.at, self.epoch):
                self.blocked.set()
                assert self.free.wait(60)
            yield batch

    def when_blocked(self, call: Callable[[], object]) -> None:
        """Call from another thread soon after the data blocks."""

        def wait() -> None:
            assert self.blocked.wait(60)
            time.sleep(0.1)
            call()

        threading.Thread(target=wait, daemon=True).start()


def sources(where: str) -> tuple[Stuck, dict[str, Any]]:
    """The data that blocks, and the arguments of fit."""
    if "evaluation" in where:
        stuck = Stuck(epoch=int(where == "second evaluation"))
        return stuck, {"data": batches(4), "eval_data": stuck}
    stuck = Stuck(epoch=int(where == "second epoch"))
    return stuck, {"data": stuck}


# A batch of the first evaluation is read before the first step.
WHERE = {"first epoch": 0, "second epoch": 4, "first evaluation": 0, "second evaluation": 8}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("how", ["stop", "SIGTERM"])
def test_a_stop_is_answered_within_a_second_while_the_first_batch_is_awaited(
    tmp_path: Path, where: str, how: str
) -> None:
    stuck, arguments = sources(where)
    trainer = make_trainer(tmp_path)
    began_s: list[float] = []

    def end() -> None:
        began_s.append(time.monotonic())
        if how == "stop":
            trainer.control.stop("enough")
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    stuck.when_blocked(end)
    if how == "stop":
        assert trainer.fit(**arguments, epochs=3).stop_reason == "enough"
    else:
        with pytest.raises(SystemExit):
            trainer.fit(**arguments, epochs=3)
    assert time.monotonic() - began_s[0] < 2.0  # a second, and what the end of a run takes on a busy machine
    assert trainer.step == WHERE[where]
    stuck.free.set()


@pytest.mark.parametrize("where", [*WHERE, "evaluate_async"])
async def test_cancellation_is_answered_within_a_second_while_the_first_batch_is_awaited(
    tmp_path: Path, where: str
) -> None:
    stuck, arguments = sources(where)
    trainer = make_trainer(tmp_path)
    async with anyio.create_task_group() as tasks:
        if where == "evaluate_async":
            tasks.start_soon(trainer.evaluate_async, stuck)
        else:
            tasks.start_soon(lambda: trainer.fit_async(**arguments, epochs=3))
        while not stuck.blocked.is_set():  # noqa: ASYNC110  of another thread
            await anyio.sleep(0.01)
        await anyio.sleep(0.1)
        began_s = time.monotonic()
        tasks.cancel_scope.cancel()
    assert time.monotonic() - began_s < 2.0
    stuck.free.set()


def cpu_share(fit: Callable[[], object], wait: Callable[[], object], end: Callable[[], object]) -> float:
    """CPU time of the thread that runs ``fit`` in ``WAIT_S`` after ``wait()``, as a part of it."""
    clock: list[int] = []
    failed: list[BaseException] = []

    def run() -> None:
        clock.append(time.pthread_getcpuclockid(threading.get_ident()))
        try:
            fit()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait()
    began_s, used_s = time.monotonic(), time.clock_gettime(clock[0])
    time.sleep(WAIT_S)
    share = (time.clock_gettime(clock[0]) - used_s) / (time.monotonic() - began_s)
    end()
    thread.join(60)
    assert not thread.is_alive()
    assert not failed
    return share


@pytest.mark.parametrize("where", [*WHERE, "a later batch"])
def test_waiting_for_a_batch_with_a_command_pending_uses_no_cpu(tmp_path: Path, where: str) -> None:
    stuck, arguments = sources(where)
    if where == "a later batch":
        stuck.at, stuck.epoch = 2, 1
    trainer = make_trainer(tmp_path)

    def wait() -> None:
        assert stuck.blocked.wait(60)
        trainer.control.set_hyperparam("learning_rate", 0.1)
        time.sleep(0.2)

    assert cpu_share(lambda: trainer.fit(**arguments, epochs=2), wait, stuck.free.set) < 0.1


def test_a_pause_uses_no_cpu(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    paused = threading.Event()

    @trainer.on(et.StepCompleted, lag=0)
    async def hold(event: et.StepCompleted, control: et.Control) -> None:
        if event.step == 2:
            control.pause()

    @trainer.on(et.CommandApplied, where=lambda event: event.command.kind == "pause")
    async def tell(event: et.CommandApplied) -> None:
        paused.set()

    share = cpu_share(
        lambda: trainer.fit(batches(4), epochs=1), lambda: paused.wait(60), lambda: trainer.control.resume()
    )
    assert share < 0.1


@pytest.mark.parametrize("prepared", [False, True])
def test_an_idle_session_with_a_command_pending_uses_no_cpu(tmp_path: Path, prepared: bool) -> None:
    trainer = make_trainer(tmp_path)
    idle, go_on = threading.Event(), threading.Event()

    def run() -> None:
        with trainer.session() as session:
            if prepared:
                session.step(batches(1)[0])
            session.control.set_hyperparam("learning_rate", 0.1)
            idle.set()
            session.wait(go_on.is_set)

    assert cpu_share(run, lambda: idle.wait(60), go_on.set) < 0.1


def test_commands_are_served_while_the_first_batch_of_an_epoch_is_awaited(tmp_path: Path) -> None:
    stuck = Stuck(epoch=1)
    trainer = make_trainer(tmp_path)

    @trainer.on(et.HyperparamChanged)
    async def free(event: et.HyperparamChanged) -> None:
        assert not stuck.free.is_set()
        stuck.free.set()

    stuck.when_blocked(lambda: trainer.control.set_hyperparam("learning_rate", 0.25))
    assert trainer.fit(stuck, epochs=2).step == 8


def test_the_users_data_runs_on_the_prefetch_thread_with_the_callers_context(tmp_path: Path) -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")
    name.set("caller")
    seen: list[tuple[str, str]] = []

    class Data:
        def __call__(self, epoch: int) -> Data:
            seen.append((threading.current_thread().name, name.get()))
            return self

        def __iter__(self) -> Iterator[Any]:
            seen.append((threading.current_thread().name, name.get()))
            yield from batches(2)

    trainer = make_trainer(tmp_path)
    trainer.fit(Data(), epochs=1, eval_data=Data())
    trainer.evaluate(Data())
    assert set(seen) == {("eventtrain-prefetch", "caller")}
    assert len(seen) == 8  # a batch of eval_data is read before the first step, too


# --- the code ---------------------------------------------------------------------------------------------------

ON_THE_TRAINING_THREAD = ["loop", "data", "trainer/run.py", "trainer/fit.py", "trainer/session.py"]
ALLOWED = {
    # Runs on the prefetch thread.
    ("data/prefetch.py", "rest", "self._thread.join()"),
    ("trainer/run.py", "end_beside", "self._ending.acquire(blocking=False)"),
    ("data/prefetch.py", "_wait_for_room", "self._room.wait()"),
    # Bounded by CLOSE_S.
    ("data/prefetch.py", "close", "self._thread.join(timeout_s)"),
    # Takes from a list.
    ("data/epoch_iterator.py", "_next", "next(self._direct, None)"),
}


def waits(source: str) -> Iterator[tuple[str, str]]:
    """Every call in a file that may block for as long as another thread likes: function, call."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        for node in ast.walk(function):
            if not isinstance(node, ast.Call):
                continue
            called, blocks = node.func, False
            if isinstance(called, ast.Name):
                blocks = called.id == "next" and not is_lazy(node)
            elif isinstance(called, ast.Attribute):
                owner = ast.unparse(called.value)
                blocks = called.attr in ("result", "acquire") or (
                    called.attr == "join"
                    and not isinstance(called.value, ast.Constant)
                    and not owner.endswith("structure")
                )
                blocks = blocks or (called.attr == "wait" and owner.split(".")[-1] not in THE_PLACE)
            if blocks:
                yield function.name, ast.unparse(node)


THE_PLACE = ("self", "boundary", "loop", "queue", "_queue", "_waiter", "_run", "place")


def is_lazy(call: ast.Call) -> bool:
    """``next`` of a generator expression over what is in memory."""
    return isinstance(call.args[0], ast.GeneratorExp)


def test_nothing_on_the_training_thread_waits_outside_the_one_place() -> None:
    package = ROOT / "eventtrain"
    roots = [package / name for name in ON_THE_TRAINING_THREAD]
    files = [file for root in roots for file in ([root] if root.is_file() else sorted(root.glob("*.py")))]
    found = {(str(file.relative_to(package)), *wait) for file in files for wait in waits(file.read_text())}
    assert found == ALLOWED


def test_the_search_for_waits_finds_them() -> None:
    calls = ["x.result()", "x.thread.join()", "next(x)", "x.event.wait()", "x.lock.acquire()"]
    allowed = ["', '.join(x)", "self.wait(x)", "self._queue.wait(x)", "next((y for y in x), None)"]
    source = "def f(x):\n" + "".join(f"    {call}\n" for call in [*calls, *allowed])
    assert [call for _, call in waits(source)] == calls
