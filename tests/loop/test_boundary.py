from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import anyio
import pytest

import eventtrain as et
from eventtrain.loop.command_executor import CommandExecutor
from tests.support.models import batches, make_trainer

MOST = 20_000


def test_commands_without_end_hold_up_neither_the_steps_nor_their_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command is followed by another one before it is applied, as from a service that is faster than the loop."""
    trainer = make_trainer(tmp_path, flush_interval_s=0.001)
    apply, at_step, handled = CommandExecutor.apply, list[int](), list[int]()

    def flooding(self: CommandExecutor, pending: Any) -> None:
        at_step.append(trainer.step)
        if len(at_step) < MOST:
            trainer.control.set_hyperparam("learning_rate", 0.1 + len(at_step) % 2)
        apply(self, pending)

    monkeypatch.setattr(CommandExecutor, "apply", flooding)

    @trainer.on(et.CommandApplied)
    async def note(event: et.CommandApplied) -> None:
        handled.append(event.step)

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 1, lag=0)
    async def begin(event: et.StepCompleted, control: et.Control) -> None:
        control.set_hyperparam("learning_rate", 0.5)

    assert trainer.fit(batches(8), epochs=1).step == 8
    assert {2, 3, 4, 5, 6, 7} <= set(at_step)
    assert len(at_step) < MOST
    assert {2, 3, 4, 5, 6, 7} <= set(handled)


@pytest.mark.parametrize("slow", [False, True])
def test_while_paused_events_of_commands_are_held_by_the_queues_of_their_subscribers_alone(
    tmp_path: Path, slow: bool
) -> None:
    trainer = make_trainer(tmp_path)
    alive: list[int] = []

    @trainer.on(et.CommandApplied | et.HyperparamChanged, queue=et.Lossless(limit=100), name="reader")
    async def read(event: et.Event) -> None:
        while slow and not alive:  # noqa: ASYNC110
            await anyio.sleep(0.001)

    @trainer.on(et.StepCompleted, once=True)
    async def service(event: et.StepCompleted, control: et.Control) -> None:
        def pending() -> int:
            return trainer.bus.statistics()["reader"].pending

        try:
            await control.pause().result()
            for i in range(1000):
                await control.set_hyperparam("learning_rate", 0.1 + i % 2).result()
            while not slow and pending():  # noqa: ASYNC110
                await anyio.sleep(0.001)
            gc.collect()
            kinds = (et.CommandApplied, et.HyperparamChanged)
            # Half of those that wait are CommandApplied, each of which refers to its command, and that to its answer.
            waiting = pending()
            alive.append(sum(isinstance(one, kinds) for one in gc.get_objects()) - waiting - waiting // 2)
        finally:
            alive.append(0)
            control.resume()

    trainer.fit(batches(4), epochs=1)
    assert alive[0] < 50
