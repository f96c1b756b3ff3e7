"""Runs cut at awkward moments: in a handler, in an evaluation, at a closed gate, behind the end of the run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import jax
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.data.epoch_iterator import EpochIterator
from tests.support.models import batches, eval_fn, new_state, step_fn
from tests.support.saved_in_memory import MemoryCheckpointer
from tests.support.stateful_metrics import measured, scored, uneven
from tests.trainer.test_resume import Positioned, Record

PATIENCE_S = 20.0


class Heard(Record):
    """Tells too at which steps the marker of a cut has passed: the announcement comes behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.marked: set[int] = set()

    async def handle(self, event: et.Event) -> None:
        if isinstance(event, et.SnapshotTaken):
            self.marked.add(event.step)
        await super().handle(event)


def make(
    tmp_path: Any, checkpointer: MemoryCheckpointer, *extra: et.Subscriber, **options: Any
) -> tuple[et.Trainer, Heard]:
    checkpointer.name = "memory"
    record = Heard()
    trainer = et.Trainer(
        state=new_state(),
        subscribers=[record, *extra, checkpointer],
        run_dir=tmp_path,
        **{"step_fn": step_fn, "eval_fn": eval_fn, **options},
    )
    return trainer, record


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def interrupted_before(count: int, data: list[Any]) -> Iterator[list[Any]]:
    """Ctrl-C when the loop asks for the batch of ``data`` behind ``count`` others."""
    asked, ask = 0, EpochIterator.next

    def counted(self: EpochIterator) -> Any:
        nonlocal asked
        if self._data is data:
            asked += 1
            if asked == count + 1:
                interrupt()
        return ask(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(EpochIterator, "next", counted)
        yield data


async def until(ready: Callable[[], object]) -> None:
    with anyio.fail_after(PATIENCE_S):
        while not ready():  # noqa: ASYNC110  of other threads too
            await anyio.sleep(0.001)


def block_until(ready: Callable[[], object]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not ready():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def kinds(record: Heard) -> list[tuple[str, int]]:
    return [
        (event.kind, event.step)
        for event in record.seen
        if isinstance(event, et.EvalStarted | et.EvalCompleted | et.EpochCompleted)
    ]


def changes(record: Heard) -> list[tuple[int, float]]:
    return [(event.step, event.new) for event in record.seen if isinstance(event, et.HyperparamChanged)]


# --- commands ---------------------------------------------------------------------------------------------


def test_cuts_that_are_complete_are_let_go_though_nobody_sends_a_command(tmp_path: Any) -> None:
    trainer, _ = make(tmp_path, MemoryCheckpointer(every=1))
    trainer.fit(batches(12), epochs=2)
    assert len(trainer._plane.queue._barriers) <= 4


def test_what_a_decider_asks_for_behind_the_end_of_a_failed_run_belongs_to_its_last_checkpoint(
    tmp_path: Any,
) -> None:
    data = batches(12)

    def run(name: str, checkpointer: MemoryCheckpointer, fails: bool, **aim: Any) -> Heard:
        trainer, record = make(tmp_path / name, checkpointer)
        entered = threading.Event()

        @trainer.on(et.StepCompleted, where=lambda event: event.step == 6, lag=4, name="decider")
        async def decide(event: et.StepCompleted, control: et.Control) -> None:
            entered.set()
            if fails:
                await until(lambda: trainer._plane.queue._closed is not None)
            control.set_hyperparam("learning_rate", 0.125)

        def read(epoch: int, start: int = 0) -> Iterator[Any]:
            yield from data[start : 8 if fails else None]
            if fails:
                assert entered.wait(PATIENCE_S)
                raise OSError("the disk is gone")

        if fails:
            with pytest.raises(OSError, match="gone"):
                trainer.fit(read, epochs=1)
        else:
            trainer.fit(read, epochs=1, **aim)
        return record

    whole = run("whole", MemoryCheckpointer(), fails=False)
    assert changes(whole) == [(10, 0.125)]
    checkpointer = MemoryCheckpointer(at_end=True)
    before = run("first", checkpointer, fails=True)
    after = run("second", checkpointer, fails=False, resume=8)
    assert before.sequence()[:-1] + after.sequence() == whole.sequence()


def test_an_interruption_at_a_closed_gate_leaves_the_order_of_the_commands_behind_it(tmp_path: Any) -> None:
    def run(name: str, checkpointer: MemoryCheckpointer, interrupted: bool = False, **aim: Any) -> Heard:
        trainer, record = make(tmp_path / name, checkpointer)
        decided: list[str] = []

        @trainer.on(et.StepCompleted, where=lambda event: event.step == 4, lag=0, name="first")
        async def first(event: et.StepCompleted, control: et.Control) -> None:
            if interrupted:
                await until(lambda: decided)
                interrupt()
                await until(lambda: 4 in record.marked)
            control.set_hyperparam("learning_rate", 0.125)

        @trainer.on(et.StepCompleted, where=lambda event: event.step == 4, lag=0, name="second")
        async def second(event: et.StepCompleted, control: et.Control) -> None:
            control.scale_hyperparam("learning_rate", 0.5)
            decided.append("second")

        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                trainer.fit(batches(6), epochs=1)
        else:
            trainer.fit(batches(6), epochs=1, **aim)
        return record

    whole = run("whole", MemoryCheckpointer())
    assert changes(whole) == [(4, 0.125), (4, 0.0625)]
    checkpointer = MemoryCheckpointer(at_end=True)
    before = run("first", checkpointer, interrupted=True)
    after = run("second", checkpointer, resume=4)
    assert before.sequence()[:-1] + after.sequence() == whole.sequence()


@pytest.mark.parametrize("waits", [True, False])
def test_a_step_that_was_announced_to_a_decider_when_the_run_was_interrupted_is_not_announced_again(
    tmp_path: Any, waits: bool
) -> None:
    """Its command is applied once, whether the marker of the cut finds the handler at work or not."""

    def run(name: str, checkpointer: MemoryCheckpointer, interrupts: bool = False, **aim: Any) -> Heard:
        trainer, record = make(tmp_path / name, checkpointer)

        @trainer.on(et.StepStarted, lag=0, name="decider")
        async def decide(event: et.StepStarted, control: et.Control) -> None:
            if interrupts and event.step == 4:
                interrupt()
                if waits:
                    await until(lambda: 4 in record.marked)
            control.scale_hyperparam("learning_rate", 0.5 if event.step == 4 else 0.9)

        if interrupts:
            with pytest.raises(KeyboardInterrupt):
                trainer.fit(batches(6), epochs=1)
        else:
            trainer.fit(batches(6), epochs=1, **aim)
        return record

    whole = run("whole", MemoryCheckpointer())
    assert [step for step, _ in changes(whole)] == [0, 1, 2, 3, 4, 5]
    checkpointer = MemoryCheckpointer(at_end=True)
    before = run("first", checkpointer, interrupts=True)
    after = run("second", checkpointer, resume=4)
    assert before.sequence()[:-1] + after.sequence() == whole.sequence()
    assert changes(before) + changes(after) == changes(whole)


def test_an_interrupted_run_does_not_wait_for_its_deciders_before_its_last_checkpoint(tmp_path: Any) -> None:
    checkpointer = MemoryCheckpointer(at_end=True)
    trainer, record = make(tmp_path, checkpointer, drain_timeout_s=30.0)
    entered = threading.Event()
    in_time: list[bool] = []

    @trainer.on(et.StepCompleted, lag=50, name="decider")
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        entered.set()
        if event.step == 1:
            with anyio.move_on_after(10.0) as scope:
                await until(lambda: 5 in record.marked)
            in_time.append(not scope.cancelled_caught)

    def read(epoch: int) -> Iterator[Any]:
        yield from batches(5)
        assert entered.wait(PATIENCE_S)
        while trainer.step < 5:  # the data is read ahead
            time.sleep(0.001)
        interrupt()
        yield from batches(1)

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(read, epochs=1)
    assert in_time == [True]
    assert [event["step"] for event in checkpointer.saved[5].facts.shares["decider"].unhandled] == [
        2,
        3,
        4,
        5,
    ]


def test_the_numbers_of_published_events_do_not_hide_a_pending_command(tmp_path: Any) -> None:
    """They are counted on their own, and may be those of events that the loop said."""

    class Decider(et.Subscriber):
        name = "decider"
        lag = {et.StepCompleted: 6}  # noqa: RUF012

        def __init__(self, record: list[Heard]) -> None:
            self._record = record

        async def start(self, run: et.RunContext) -> None:
            self._publish = run.publish

        async def on_step_completed(self, event: et.StepCompleted, control: et.Control) -> None:
            if event.step == 4:
                control.set_hyperparam("learning_rate", 0.125)
            if event.step == 5:
                for _ in range(40):
                    self._publish(et.AlertRaised(name="alarm", message="look", severity="info"))
                await until(lambda: 6 in self._record[0].marked)

        async def on_alert_raised(self, event: et.AlertRaised) -> None:
            pass

    def run(name: str, checkpointer: MemoryCheckpointer, **aim: Any) -> Heard:
        records: list[Heard] = []
        trainer, record = make(tmp_path / name, checkpointer, Decider(records))
        records.append(record)
        trainer.fit(batches(12), epochs=1, **aim)
        return record

    checkpointer = MemoryCheckpointer(every=6)
    whole = run("whole", checkpointer)
    facts = checkpointer.saved[6].facts
    (order,) = facts.loop.orders
    unhandled = facts.shares["decider"].unhandled
    assert order.cause_seq in [event["seq"] for event in unhandled if event["kind"] == "alert_raised"]
    resumed = run("second", checkpointer, resume=6)
    assert changes(whole) == changes(resumed) == [(10, 0.125)]


def test_a_handler_sees_the_hyperparameters_in_an_event_it_gets_once_more(tmp_path: Any) -> None:
    def run(checkpointer: MemoryCheckpointer, **aim: Any) -> dict[int, Any]:
        trainer, record = make(tmp_path, checkpointer)
        seen: dict[int, Any] = {}

        @trainer.on(et.StepCompleted, every=2, lag=4, name="decider")
        async def decide(event: et.StepCompleted, control: et.Control) -> None:
            if event.step == 4 and not aim:
                await until(lambda: 6 in record.marked)
            seen[event.step] = dict(control.hyperparams)

        trainer.fit(batches(8), epochs=1, **aim)
        return seen

    checkpointer = MemoryCheckpointer(every=6)
    run(checkpointer)
    assert [event["step"] for event in checkpointer.saved[6].facts.shares["decider"].unhandled] == [6]
    assert run(checkpointer, resume=6) == {6: {"learning_rate": 0.5}, 8: {"learning_rate": 0.5}}


# --- evaluations ------------------------------------------------------------------------------------------


def test_an_evaluation_that_was_due_where_the_run_was_interrupted_is_not_lost(tmp_path: Any) -> None:
    data = batches(6)

    def run(name: str, checkpointer: MemoryCheckpointer) -> tuple[et.Trainer, Heard]:
        return make(tmp_path / name, checkpointer, subs.EvaluateEvery(steps=3))

    trainer, whole = run("whole", MemoryCheckpointer())
    trainer.fit(data, epochs=1, eval_data=batches(2))
    checkpointer = MemoryCheckpointer(at_end=True)
    trainer, before = run("first", checkpointer)
    with interrupted_before(3, data):
        trainer.fit(data, epochs=1, eval_data=batches(2))
    assert kinds(before) == []
    trainer, after = run("second", checkpointer)
    trainer.fit(data, epochs=1, eval_data=batches(2), resume=3)
    assert before.sequence()[:-1] + after.sequence() == whole.sequence()


class AsksForCheckpoints(et.Subscriber):
    """At once, at one kind of event; ``lag=0`` holds the loop there."""

    lag = 0

    def __init__(self, kind: type[et.Event], step: int) -> None:
        self.events = kind
        self._step = step

    async def handle(self, event: et.Event, control: et.Control) -> None:
        if event.step == self._step:
            control.checkpoint()


@pytest.mark.parametrize(
    ("kind", "first"),
    [(et.StepCompleted, ("eval_started", 4)), (et.EvalCompleted, ("epoch_completed", 4))],
    ids=["before", "behind"],
)
@pytest.mark.parametrize("by_step", [True, False], ids=["by step", "by epoch"])
def test_a_checkpoint_by_command_has_the_evaluation_of_its_boundary_before_or_behind_it(
    tmp_path: Any, by_step: bool, kind: type[et.Event], first: tuple[str, int]
) -> None:
    def run(name: str, checkpointer: MemoryCheckpointer, **aim: Any) -> Heard:
        evaluate_every = [subs.EvaluateEvery(steps=4)] if by_step else []
        trainer, record = make(tmp_path / name, checkpointer, *evaluate_every, AsksForCheckpoints(kind, 4))
        trainer.fit(batches(4), epochs=2, eval_data=batches(2), **aim)
        return record

    checkpointer = MemoryCheckpointer()
    whole = run("whole", checkpointer)
    assert kinds(whole) == [
        (name, step) for step in (4, 8) for name in ("eval_started", "eval_completed", "epoch_completed")
    ]
    after = run("second", checkpointer, resume=4)
    assert kinds(after)[0] == first
    assert after.sequence() == whole.sequence(after=checkpointer.saved[4].facts.stream.seq)


def test_a_run_by_steps_that_was_interrupted_in_its_last_evaluation_still_ends_it_and_its_epoch(
    tmp_path: Any,
) -> None:
    data, evaluated_on = batches(8), batches(4)
    trainer, whole = make(tmp_path / "whole", MemoryCheckpointer())
    result = trainer.fit(data, steps=5, eval_data=evaluated_on)
    checkpointer = MemoryCheckpointer(at_end=True)
    trainer, before = make(tmp_path / "first", checkpointer)
    with interrupted_before(2, evaluated_on):
        trainer.fit(data, steps=5, eval_data=evaluated_on)
    assert checkpointer.saved[5].facts.loop.evaluated_batches is not None
    trainer, after = make(tmp_path / "second", checkpointer)
    again = trainer.fit(data, steps=5, eval_data=evaluated_on, resume=5)
    assert before.sequence()[:-1] + after.sequence() == whole.sequence()
    assert (trainer.epoch, len(again.history)) == (1, len(result.history))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("cut", [1, 4])
def test_an_interrupted_evaluation_goes_on_with_the_states_of_its_metrics(
    tmp_path: Any, cut: int, named: bool
) -> None:
    data = uneven(scored())

    def run(name: str, checkpointer: MemoryCheckpointer) -> tuple[et.Trainer, Heard]:
        trainer, heard = make(tmp_path / name, checkpointer, eval_fn=measured, step_fn=counted)
        return trainer, heard

    def counted(state: Any, batch: Any) -> Any:
        return state, {"loss": batch["score"].sum()}

    trainer, whole = run("whole", MemoryCheckpointer())
    evaluated_on, checkpointer = data[:4], MemoryCheckpointer(at_end=True)
    sets = {"first": data[:2], "second": evaluated_on} if named else evaluated_on
    trainer.fit(data, epochs=2, eval_data=sets)
    trainer, before = run("first", checkpointer)
    with interrupted_before(cut, evaluated_on):
        trainer.fit(data, epochs=2, eval_data=sets)
    trainer, after = run("second", checkpointer)
    trainer.fit(data, epochs=2, eval_data=sets, resume=4)
    assert any(event.arrays for event in after.seen if isinstance(event, et.EvalCompleted))
    assert before.sequence()[:-1] + after.sequence() == whole.sequence()


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_data_that_is_one_iterator_goes_on_in_an_evaluation_behind_its_last_batch(
    tmp_path: Any, steps_per_call: int
) -> None:
    evaluated_on = batches(4)

    def run(name: str, checkpointer: MemoryCheckpointer) -> tuple[et.Trainer, Heard]:
        return make(tmp_path / name, checkpointer, steps_per_call=steps_per_call)

    trainer, whole = run("whole", MemoryCheckpointer())
    result = trainer.fit(Positioned(batches(6)), epochs=1, eval_data=evaluated_on)
    checkpointer = MemoryCheckpointer(at_end=True)
    trainer, before = run("first", checkpointer)
    data = Positioned(batches(6))
    with interrupted_before(2, evaluated_on):
        trainer.fit(data, epochs=1, eval_data=evaluated_on)
    saved = checkpointer.saved[6]
    assert saved.facts.loop.evaluated_batches is not None
    in_a_new_process, after = run("second", checkpointer)
    new = Positioned(batches(6))
    resumed = in_a_new_process.fit(new, epochs=1, eval_data=evaluated_on, resume=6)
    assert before.sequence()[:-1] + after.sequence() == whole.sequence()
    assert resumed.history[0].metrics == result.history[0].metrics
    assert new.get_state()["next"] == 6
    begun = len(before.seen)
    checkpointer.saved[6] = saved
    resumed = trainer.fit(data, epochs=1, eval_data=evaluated_on, resume=6)  # as in a notebook
    assert before.sequence()[:begun][:-1] + before.sequence()[begun:] == whole.sequence()
    assert resumed.history[0].metrics == result.history[0].metrics


@pytest.mark.parametrize("waits_for_data", [False, True])
def test_an_evaluation_by_command_at_the_end_of_an_epoch_is_that_of_the_epoch(
    tmp_path: Any, waits_for_data: bool
) -> None:
    trainer, record = make(tmp_path, MemoryCheckpointer())

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 4, lag=0)
    async def ask(event: et.StepCompleted, control: et.Control) -> None:
        control.evaluate()

    def read(epoch: int) -> Iterator[Any]:
        yield from (jax.tree.map(np.asarray, batch) for batch in batches(4))
        if waits_for_data:  # so that the command is carried out before the loop knows that the epoch is over
            block_until(lambda: any(isinstance(event, et.EvalCompleted) for event in record.seen))

    trainer.fit(read, epochs=1, eval_data=batches(2))
    assert kinds(record) == [("eval_started", 4), ("eval_completed", 4), ("epoch_completed", 4)]


# --- subscriptions ----------------------------------------------------------------------------------------


def test_a_checkpointer_that_was_cancelled_does_not_hold_training(tmp_path: Any) -> None:
    trainer, _ = make(tmp_path, MemoryCheckpointer(every=1))

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 3, lag=0)
    async def cancel(event: et.StepCompleted) -> None:
        (subscription,) = [s for s in trainer.bus.subscriptions if s.name == "memory"]
        subscription.cancel()

    too_long = threading.Timer(PATIENCE_S, lambda: trainer.control.stop("held"))
    too_long.start()
    result = trainer.fit(batches(12), epochs=1)
    too_long.cancel()
    assert (result.stop_reason, result.step) == ("completed", 12)


@pytest.mark.parametrize(("step", "saved"), [(3, (False, 1)), (6, (True, 2))])
def test_failures_in_a_row_are_counted_across_a_resumption(
    tmp_path: Any, step: int, saved: tuple[bool, int]
) -> None:
    """The subscription is switched off while the cut of step 6 waits for it, with events 5 and 6 behind."""

    def run(checkpointer: MemoryCheckpointer, **aim: Any) -> tuple[et.Trainer, Heard]:
        trainer, record = make(tmp_path, checkpointer)

        @trainer.on(et.StepCompleted, lag=4, name="decider", disable_after=2)
        async def decide(event: et.StepCompleted, control: et.Control) -> None:
            if event.step in (3, 4):
                if event.step == 4 and not aim:
                    await until(lambda: 6 in record.marked)
                raise ValueError("no")
            if event.step > 4:
                control.scale_hyperparam("learning_rate", 0.5)

        trainer.fit(batches(10), epochs=1, **aim)
        return trainer, record

    checkpointer = MemoryCheckpointer(every=3)
    _, whole = run(checkpointer)
    share = checkpointer.saved[step].facts.shares["decider"]
    assert (share.disabled, share.failures) == saved
    trainer, resumed = run(checkpointer, resume=step)
    assert [s.statistics().state for s in trainer.bus.subscriptions if s.name == "decider"] == ["disabled"]
    assert changes(whole) == changes(resumed) == []


def test_a_cut_waits_for_a_subscriber_with_once_that_had_its_event_in_an_earlier_run(tmp_path: Any) -> None:
    class Once(et.Subscriber):
        name = "once"
        once = True
        lag = 0
        where = staticmethod(lambda event: event.step in (5, 11))

        async def on_step_completed(self, event: et.StepCompleted, control: et.Control) -> None:
            control.scale_hyperparam("learning_rate", 0.5)

        async def flush(self) -> None:
            await anyio.sleep(0.1)  # it takes a while until its state can be had

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    checkpointer = MemoryCheckpointer(every=4)
    trainer, record = make(tmp_path / "whole", checkpointer, Once())
    trainer.fit(batches(6), epochs=1)
    assert trainer.subscribe(Once()).name == "once"
    trainer.fit(batches(6), epochs=1)
    assert changes(record) == [(5, 0.25), (11, 0.125)]
    assert not checkpointer.saved[8].facts.shares["once"].spent
    trainer, resumed = make(tmp_path / "second", checkpointer, Once())
    trainer.fit(batches(6), epochs=1, resume=8)
    assert changes(resumed) == [(11, 0.125)]


def test_a_decider_that_ran_out_of_time_before_the_checkpoint_makes_the_resumed_run_undetermined(
    tmp_path: Any,
) -> None:
    def run(checkpointer: MemoryCheckpointer, **aim: Any) -> list[bool]:
        trainer, record = make(tmp_path, checkpointer)

        @trainer.on(et.StepCompleted, where=lambda event: event.step == 2, lag=0, timeout_s=0.05)
        async def decide(event: et.StepCompleted) -> None:
            await anyio.sleep_forever()

        trainer.fit(batches(6), epochs=1, **aim)
        return [event.deterministic for event in record.seen if isinstance(event, et.RunCompleted)]

    checkpointer = MemoryCheckpointer(every=4)
    assert run(checkpointer) == [False]
    assert not checkpointer.saved[4].facts.loop.deterministic
    assert run(checkpointer, resume=4) == [False]


# --- waiting for a checkpoint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["wait_for", "stream"])
@pytest.mark.parametrize("lag", [None, 4])
def test_a_handler_that_awaits_the_commit_of_its_own_cut_is_told_at_once(
    tmp_path: Any, how: str, lag: int | None
) -> None:
    class Awaits(et.Subscriber):
        name = "awaits"

        def __init__(self) -> None:
            self.lag = {et.StepCompleted: lag}

        async def on_step_completed(self, event: et.StepCompleted, control: et.Control) -> None:
            if event.step == 2:
                control.checkpoint("mine")
                if how == "stream":
                    async with trainer.bus.stream(et.CheckpointCommitted | et.CheckpointFailed) as events:
                        async for _ in events:
                            return
                await trainer.bus.wait_for(et.CheckpointCommitted)

        def state_dict(self) -> dict[str, Any]:
            return {}

    checkpointer = MemoryCheckpointer(every=3)
    trainer, _ = make(tmp_path, checkpointer, Awaits())
    failed: list[et.SubscriberFailed] = []

    @trainer.on(et.SubscriberFailed)
    async def note(event: et.SubscriberFailed) -> None:
        failed.append(event)

    trainer.fit(batches(6), epochs=1)
    (said,) = failed
    assert said.subscriber == "awaits"
    assert said.error.startswith(
        "WaitsForItself: awaits waits in its handler for the outcome of a checkpoint"
    )
    assert checkpointer.saved.keys() >= {3, 6}


async def test_a_handler_may_wait_for_what_does_not_wait_for_it(tmp_path: Any) -> None:
    """An observer without state; a task of its own; and events of which a checkpoint is only one."""
    checkpointer = subs.Checkpointer("ck", every=2, at_end=False)
    trainer = et.Trainer(step_fn, new_state(), subscribers=[checkpointer], run_dir=tmp_path)
    waited: list[tuple[str, int]] = []

    async with anyio.create_task_group() as tasks:

        async def wait(who: str) -> None:
            waited.append((who, (await trainer.bus.wait_for(et.CheckpointCommitted)).step))

        @trainer.on(et.StepCompleted, where=lambda event: event.step == 1, name="observer")
        async def observe(event: et.StepCompleted) -> None:
            await wait("observer")

        @trainer.on(et.StepCompleted, where=lambda event: event.step == 1, lag=1, name="decider")
        async def decide(event: et.StepCompleted) -> None:
            tasks.start_soon(wait, "task of a decider")
            await anyio.lowlevel.checkpoint()

        await trainer.fit_async(batches(2), epochs=1)
    assert sorted(waited) == [("observer", 2), ("task of a decider", 2)]
