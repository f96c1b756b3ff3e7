"""A run always ends, by its name and saved, and takes with it what belongs to it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.bus.bus import core_of
from eventtrain.loop import boundary
from eventtrain.trainer import execution
from eventtrain.trainer.run import Run
from tests.support.models import batches, make_trainer, new_state, record, step_fn

CHECKPOINTS = "ck"


def steps_saved(run_dir: Path) -> list[int]:
    folder = run_dir / "run" / CHECKPOINTS
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir() if path.is_dir())


def checkpointer() -> subs.Checkpointer:
    return subs.Checkpointer(CHECKPOINTS, every=10**9)


def endless(epoch: int) -> Iterator[Any]:
    while True:
        yield from batches(2)


class Life(et.Subscriber):
    """Says what is called, and in which order."""

    def __init__(self) -> None:
        self.said: list[str] = []

    async def start(self, run: et.RunContext) -> None:
        self.said.append("start")

    async def on_run_started(self, event: et.RunStarted) -> None:
        self.said.append("run_started")

    async def on_run_completed(self, event: et.RunCompleted) -> None:
        self.said.append(event.reason)

    async def on_eval_completed(self, event: et.EvalCompleted) -> None:
        self.said.append("eval_completed")

    async def finish(self) -> None:
        self.said.append("finish")

    async def stop(self) -> None:
        self.said.append("stop")


# --- deadlines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["fit", "fit_async", "cancelled"])
def test_a_cycle_of_events_costs_the_end_of_a_run_its_drain_timeout_and_no_more(
    tmp_path, anyio_backend, entry, monkeypatch
):
    """Measured from where the end begins: before it, the step is compiled beside a busy event loop, at its pace.

    On a machine with eight busy processes on two cores that took up to 5 s, and the end 1.4 to 2.0 s.
    """
    backend, options = anyio_backend
    trainer = make_trainer(tmp_path, drain_timeout_s=0.3, backend=backend, backend_options=options)
    ends_s: list[float] = []
    finish = Run._finish

    def finish_later(self, *args):
        ends_s.append(time.monotonic())
        finish(self, *args)

    monkeypatch.setattr(Run, "_finish", finish_later)

    class Echo(et.Event):
        pass

    @trainer.on(et.Event, name="audit")
    async def audit(event: et.Event) -> None:
        trainer.bus.publish(Echo())

    async def train() -> None:
        if entry == "fit_async":
            await trainer.fit_async(batches(2), epochs=1)
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: trainer.fit_async(endless, epochs=1))
            while trainer.step == 0:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            ends_s.append(time.monotonic())
            tasks.cancel_scope.cancel()

    if entry == "fit":
        assert trainer.fit(batches(2), epochs=1).undelivered
    else:
        anyio.run(train, backend=backend, backend_options=options)
    assert time.monotonic() - ends_s[0] < 10
    assert trainer.step > 0


@pytest.mark.allow_blocking
def test_a_handler_that_blocks_the_event_loop_costs_the_drain_timeout_and_the_state_is_kept(
    tmp_path, caplog, monkeypatch
):
    released = threading.Event()
    trainer = make_trainer(tmp_path, drain_timeout_s=0.5, subscribers=[checkpointer()])

    @trainer.on(et.StepCompleted, once=True, name="blocker")
    async def blocker(event: et.StepCompleted) -> None:
        released.wait(60)

    try:
        began_s = time.monotonic()
        result = trainer.fit(batches(4), epochs=2)
        assert time.monotonic() - began_s < 20
        assert result.stop_reason == "completed"
        assert steps_saved(tmp_path) == [8]
        assert "the handler of blocker blocks the event loop" in caplog.text
        monkeypatch.setattr(execution, "LEFT_END_S", 0.1)
        with pytest.raises(et.errors.AlreadyRunning, match="handler of blocker still blocks"):
            trainer.fit(batches(4), epochs=1)
    finally:
        released.set()
    again = make_trainer(tmp_path, subscribers=[checkpointer()])
    assert again.fit(batches(4), epochs=3, resume=True).step == 12


def test_sigterm_ends_a_process_whose_event_loop_is_blocked(tmp_path):
    script = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        import eventtrain as et
        from eventtrain import subscribers as subs
        from tests.support.models import batches, make_trainer

        writer = subs.Checkpointer("ck", every=10**9)
        trainer = make_trainer(Path({str(tmp_path)!r}), drain_timeout_s=0.5, subscribers=[writer])

        @trainer.on(et.StepCompleted, once=True)
        async def blocker(event):
            print("blocked", flush=True)
            time.sleep(3600)

        def endless(epoch):
            while True:
                yield from batches(2)

        trainer.fit(endless, epochs=1, progress=False)
        """
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "blocked\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert len(steps_saved(tmp_path)) == 1


def test_sigterm_is_answered_while_a_subscriber_starts(tmp_path):
    class Slow(et.Subscriber):
        async def start(self, run: et.RunContext) -> None:
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            await anyio.sleep(60)

        async def on_step_completed(self, event: et.StepCompleted) -> None:
            raise AssertionError

    before, behind = Life(), Life()
    trainer = make_trainer(tmp_path, subscribers=[before, Slow(), behind])
    began_s = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        trainer.fit(batches(2), epochs=1)
    assert caught.value.code == 128 + signal.SIGTERM
    assert time.monotonic() - began_s < 10
    assert trainer.step == 0
    assert before.said == ["start", "run_started", "preempted", "finish", "stop"]
    assert behind.said == []


@pytest.mark.allow_blocking
def test_the_time_of_a_blocked_loop_disables_no_innocent_subscriber(tmp_path):
    trainer = make_trainer(tmp_path)
    disabled = record(trainer, et.SubscriberDisabled)

    @trainer.on(et.StepCompleted, once=True, name="blocker")
    async def blocker(event: et.StepCompleted) -> None:
        time.sleep(2.5)  # noqa: ASYNC251

    handled: list[int] = []

    @trainer.on(et.StepCompleted, queue=et.Lossless(4, stall_timeout_s=1.0))
    async def innocent(event: et.StepCompleted) -> None:
        handled.append(event.step)

    trainer.fit(batches(20), epochs=1)
    assert disabled == []
    assert handled == list(range(1, 21))


def test_a_wait_for_a_decider_that_does_not_return_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(boundary, "GATE_REPORT_S", 0.1)
    trainer = make_trainer(tmp_path)
    stalled = record(trainer, et.LoopStalled)

    @trainer.on(et.StepCompleted, lag=0, name="slow")
    async def slow(event: et.StepCompleted) -> None:
        await anyio.sleep(0.5 if event.step == 2 else 0.0)

    trainer.fit(batches(3), epochs=1)
    assert [(event.step, event.subscriber) for event in stalled[:2]] == [(2, "slow")] * 2
    assert stalled[1].waited_s > 1.5 * stalled[0].waited_s
    assert "whose lag is finite" in caplog.text


def test_a_decider_of_lag_0_cannot_wait_for_the_next_step(tmp_path):
    trainer = make_trainer(tmp_path)
    failed = record(trainer, et.SubscriberFailed)

    @trainer.on(et.StepCompleted, lag=0)
    async def waits(event: et.StepCompleted) -> None:
        await trainer.bus.wait_for(et.StepCompleted)

    trainer.fit(batches(2), epochs=1)
    assert [event.error.split(":")[0] for event in failed] == ["WaitsForItself"] * 2


# --- what is raised -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [None, 0])
@pytest.mark.parametrize("raised", [SystemExit("diverged"), KeyboardInterrupt()], ids=["exit", "interrupt"])
def test_a_handler_that_exits_fails_alone(tmp_path, anyio_backend, raised, lag):
    backend, options = anyio_backend
    trainer = make_trainer(tmp_path, subscribers=[checkpointer()], backend=backend, backend_options=options)
    failed = record(trainer, et.SubscriberFailed)
    seen = record(trainer, et.StepCompleted)

    @trainer.on(et.StepCompleted, lag=lag, name="exits")
    async def exits(event: et.StepCompleted) -> None:
        if event.step == 2:
            raise raised

    assert trainer.fit(batches(4), epochs=1).stop_reason == "completed"
    assert [(event.subscriber, event.step) for event in failed] == [("exits", 2)]
    assert [event.step for event in seen] == [1, 2, 3, 4]
    assert steps_saved(tmp_path) == [4]


def fail_in_data(raised: BaseException, tmp_path: Path) -> tuple[et.Trainer, Any]:
    def data(epoch: int) -> Iterator[Any]:
        yield from batches(3)
        raise raised

    return make_trainer(tmp_path, subscribers=[checkpointer()]), data


def fail_in_step(raised: BaseException, tmp_path: Path) -> tuple[et.Trainer, Any]:
    def step(state: Any, batch: Any) -> Any:
        if batch["x"].shape[0] == 2:  # traced anew for this shape
            raise raised
        return step_fn(state, batch)

    trainer = et.Trainer(step, new_state(), run_dir=tmp_path / "run", subscribers=[checkpointer()])
    return trainer, [*batches(3), *batches(1, size=2)]


@pytest.mark.parametrize("place", [fail_in_data, fail_in_step])
@pytest.mark.parametrize("entry", ["fit", "fit_async", "session"])
def test_what_a_user_raises_on_the_training_thread_leaves_as_itself_behind_state_events_and_checkpoint(
    tmp_path, place, entry
):
    trainer, data = place(SystemExit(5), tmp_path)
    failed = record(trainer, et.RunFailed)

    def run() -> None:
        if entry == "fit":
            trainer.fit(data, epochs=1)
        elif entry == "fit_async":
            anyio.run(lambda: trainer.fit_async(data, epochs=1))
        else:
            with trainer.session() as session:
                for batch in data(0) if callable(data) else data:
                    session.step(batch)

    with pytest.raises(SystemExit) as caught:
        run()
    assert caught.value.code == 5
    assert "SystemExit: 5" in failed[0].error
    assert trainer.step == 3
    assert steps_saved(tmp_path) == [3]


def test_a_start_that_exits_ends_the_run_with_its_exception(tmp_path):
    class Exits(Life):
        async def start(self, run: et.RunContext) -> None:
            raise SystemExit(4)

    with pytest.raises(SystemExit) as caught:
        make_trainer(tmp_path, subscribers=[Exits()]).fit(batches(1), epochs=1)
    assert caught.value.code == 4


def test_a_start_that_raises_names_its_subscriber_and_ends_those_before_it(tmp_path):
    class Broken(Life):
        name = "broken one"

        async def start(self, run: et.RunContext) -> None:
            raise RuntimeError("no start")

    first, broken, last = Life(), Broken(), Life()
    last.name = "last"
    with pytest.raises(RuntimeError, match="no start") as caught:
        make_trainer(tmp_path, subscribers=[first, broken, last]).fit(batches(1), epochs=1)
    assert caught.value.__notes__ == ["Raised by the subscriber broken one when the run started."]
    assert first.said == ["start", "finish", "stop"]
    assert broken.said == ["finish", "stop"]
    assert last.said == []


def test_a_search_for_a_checkpoint_that_raises_names_its_subscriber(tmp_path):
    class Broken(Life):
        resumes_runs = True

        def saved_run(self, run_dir: Path, which: Any) -> None:
            raise RuntimeError("no search")

    with pytest.raises(RuntimeError, match="no search") as caught:
        make_trainer(tmp_path, subscribers=[Broken()]).fit(batches(1), epochs=1, resume=True)
    assert caught.value.__notes__ == ["Raised by the subscriber Broken when it looked for a checkpoint."]


# --- tasks that nobody awaits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True], ids=["own bus", "shared bus"])
def test_a_task_left_behind_when_asyncio_run_ends_settles_its_run(tmp_path, shared):
    life = Life()
    kept: list[Any] = []

    async def main() -> None:
        bus = et.EventBus() if shared else None
        if bus is not None:
            kept.append(asyncio.create_task(serve(bus)))
            await asyncio.sleep(0.05)
        trainer = make_trainer(tmp_path, bus=bus, subscribers=[checkpointer(), life])
        kept.append(trainer)
        kept.append(asyncio.create_task(trainer.fit_async(endless, epochs=1)))
        while trainer.step < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def serve(bus: et.EventBus) -> None:
        async with bus:
            await asyncio.sleep(3600)

    asyncio.run(main())
    trainer = next(one for one in kept if isinstance(one, et.Trainer))
    assert steps_saved(tmp_path) == [trainer.step]
    if not shared:
        assert life.said == ["start", "run_started", "cancelled", "finish", "stop"]


# --- what belongs to a run ------------------------------------------------------------------------------------


async def test_subscriptions_of_a_trainer_take_events_of_its_own_runs_only(tmp_path, anyio_backend):
    async with et.EventBus() as bus:
        ids: list[list[str]] = [[], []]
        lives = [Life(), Life()]
        trainers = [
            make_trainer(tmp_path / str(n), bus=bus, run_id=f"job{n}", subscribers=[lives[n]])
            for n in range(2)
        ]
        for trainer, seen in zip(trainers, ids, strict=True):

            @trainer.on(et.Event)
            async def see(event: et.Event, seen: list[str] = seen) -> None:
                seen.append(event.run_id)

        for trainer in trainers:
            await trainer.fit_async(batches(2), epochs=1)
            await bus.drain()
        assert set(ids[0]) == {"job0"}
        assert set(ids[1]) == {"job1"}
        assert [life.said.count("run_started") for life in lives] == [1, 1]


async def test_many_jobs_on_one_bus_leave_no_subscriptions_and_no_threads(tmp_path, anyio_backend):
    async with et.EventBus() as bus:
        await make_trainer(tmp_path / "first", bus=bus).fit_async(batches(1), epochs=1)
        before = threading.active_count()
        for n in range(6):
            trainer = make_trainer(tmp_path / str(n), bus=bus, subscribers=[subs.JSONLLogger("log.jsonl")])
            await trainer.fit_async(batches(1), epochs=1)
            del trainer
            gc.collect()
            assert len(bus.subscriptions) <= 2
        with anyio.fail_after(10):
            while bus.subscriptions:  # until the last worker has seen that it is detached
                await anyio.sleep(0.01)
                gc.collect()
        assert threading.active_count() <= before + 2


async def test_closing_a_trainer_frees_its_names(tmp_path, anyio_backend):
    async with et.EventBus() as bus:
        with make_trainer(tmp_path, bus=bus, subscribers=[Life()]) as trainer:

            @trainer.on(et.RunCompleted, name="seen")
            async def see(event: et.RunCompleted) -> None: ...

            await trainer.fit_async(batches(1), epochs=1)
            assert [one.name for one in bus.subscriptions] == ["Life", "seen"]
        assert bus.subscriptions == ()
        with pytest.raises(et.ConfigurationError, match="was closed"):
            await trainer.fit_async(batches(1), epochs=1)
        assert trainer.step == 1


def test_an_evaluation_between_runs_is_not_for_the_subscribers_of_runs(tmp_path):
    life = Life()
    trainer = make_trainer(tmp_path, subscribers=[life])
    seen = record(trainer, et.EvalCompleted)
    trainer.fit(batches(2), epochs=1, eval_data=batches(1))
    trainer.evaluate(batches(1))
    assert life.said.count("eval_completed") == 1
    assert len(seen) == 2


async def test_a_late_command_of_an_earlier_run_is_rejected(tmp_path, anyio_backend):
    release, commands = anyio.Event(), []
    async with et.EventBus() as bus:
        trainer = make_trainer(tmp_path, bus=bus, drain_timeout_s=0.1)

        @trainer.on(et.EpochCompleted)
        async def late(event: et.EpochCompleted, control: et.Control) -> None:
            if event.epoch == 0:
                await release.wait()
                commands.append(control.set_hyperparam("learning_rate", 0.125))

        await trainer.fit_async(batches(2), epochs=1)

        @trainer.on(et.StepCompleted, once=True, lag=0)
        async def let_go(event: et.StepCompleted) -> None:
            release.set()
            while not commands:  # noqa: ASYNC110
                await anyio.sleep(0.001)

        await trainer.fit_async(batches(2), epochs=1)
        with pytest.raises(et.CommandRejectedError, match="earlier run"):
            await commands[0].result()
    assert float(trainer.control.hyperparams["learning_rate"]) == 0.5


async def test_commands_behind_a_failure_are_rejected_with_it(tmp_path, anyio_backend):
    def data(epoch: int) -> Iterator[Any]:
        yield from batches(1)
        raise OSError("the disk went away")

    trainer = make_trainer(tmp_path)
    with pytest.raises(OSError, match="the disk went away"):
        await trainer.fit_async(data, epochs=1)
    with pytest.raises(et.CommandRejectedError) as caught:
        await trainer.control.set_hyperparam("learning_rate", 0.1).result()
    assert caught.value.reason == "the run failed (OSError: the disk went away)"


def test_a_session_that_failed_says_so(tmp_path):
    with pytest.raises(OSError, match="x"), make_trainer(tmp_path).session() as session:  # noqa: PT012
        session.step(batches(1)[0])
        raise OSError("x")
    assert session.ended_by == "failed"


def test_the_core_of_a_bus_forgets_the_subscriptions_of_a_trainer_that_is_gone(tmp_path):
    bus = et.EventBus()
    trainer = make_trainer(tmp_path, bus=bus, subscribers=[Life()])
    assert core_of(bus).table.detached
    del trainer
    gc.collect()
    assert core_of(bus).table.detached == ()
