"""Lambda: functions as a subscriber."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.models import batches, make_trainer

BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@BACKENDS
def test_each_event_goes_to_its_function_in_one_order(tmp_path: Path, backend: str) -> None:
    seen: list[tuple[str, str, int]] = []

    def noting(name: str) -> Any:
        async def note(event: et.Event) -> None:
            seen.append((name, event.kind, event.step))

        return note

    class Own(et.Event):
        """An event of a user's."""

    policy = subs.Lambda(
        on_run_started=noting("start"),
        on_step_completed=noting("step"),
        on_epoch_completed=noting("epoch"),
        on_run_completed=noting("end"),
        on_own=noting("own"),
        event_types=[Own],
    )
    trainer = make_trainer(tmp_path, subscribers=[policy], backend=backend)

    @trainer.on(et.RunCompleted)
    async def say(event: et.RunCompleted) -> None:
        trainer.bus.publish(Own(step=event.step))

    trainer.fit(batches(2), epochs=2)
    assert seen == [
        ("start", "run_started", 0),
        *(("step", "step_completed", step) for step in (1, 2)),
        ("epoch", "epoch_completed", 2),
        *(("step", "step_completed", step) for step in (3, 4)),
        ("epoch", "epoch_completed", 4),
        ("end", "run_completed", 4),
        ("own", "own", 4),
    ]


def test_on_event_gets_what_no_other_takes(tmp_path: Path) -> None:
    rest: list[str] = []
    steps: list[str] = []

    async def keep(kinds: list[str], event: et.Event) -> None:
        kinds.append(event.kind)

    policy = subs.Lambda(on_event=partial(keep, rest), on_step_completed=partial(keep, steps))
    make_trainer(tmp_path, subscribers=[policy]).fit(batches(2), epochs=1)
    assert steps == ["step_completed"] * 2
    assert {"run_started", "epoch_started", "epoch_completed", "run_completed"} <= set(rest)
    assert "step_completed" not in rest


@BACKENDS
def test_a_function_with_control_decides_at_its_lag(tmp_path: Path, backend: str) -> None:
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        if event.step == 2:
            control.set_hyperparam("learning_rate", 0.25)

    steps: list[int] = []

    async def count(event: et.EpochCompleted) -> None:
        steps.append(event.step)

    rates: list[Any] = []

    async def see(event: et.StepCompleted) -> None:
        rates.append(event.metrics["rate"])

    decider = subs.Lambda(
        name="decider",
        lag={et.StepCompleted: 3, et.EpochCompleted: 0},
        on_step_completed=decide,
        on_epoch_completed=count,
    )
    watcher = subs.Lambda(on_step_completed=see)
    trainer = make_trainer(tmp_path, subscribers=[decider, watcher], backend=backend)
    trainer.fit(batches(8), epochs=1)
    assert (rates, steps) == ([0.5] * 5 + [0.25] * 3, [8])


def test_what_a_function_raises_fails_the_run_where_that_is_asked_for(tmp_path: Path) -> None:
    async def fail(event: et.StepCompleted) -> None:
        raise RuntimeError("no")

    trainer = make_trainer(tmp_path, subscribers=[subs.Lambda(on_error="fail", on_step_completed=fail)])
    with pytest.raises(et.SubscriberError, match="RuntimeError: no"):
        trainer.fit(batches(2), epochs=1)


async def observe(event: et.Event) -> None: ...


async def take_three(event: et.Event, control: et.Control, more: int) -> None: ...


def plain(event: et.Event) -> None: ...


@pytest.mark.parametrize(
    ("handlers", "named"),
    [
        ({}, "configuration file"),
        ({"on_epoch_complete": observe}, r"Did you mean 'on_epoch_completed'\?"),
        ({"epoch_completed": observe}, r"Lambda\(epoch_completed=...\): handlers must be named on_"),
        ({"on_epoch_completed": plain}, "on_epoch_completed must be written `async def`"),
        (
            {"on_epoch_completed": None},
            r"on_epoch_completed=None\): on_epoch_completed must be a coroutine function",
        ),
        ({"on_epoch_completed": take_three}, "take_three"),
    ],
)
def test_what_cannot_work_is_refused_by_name_when_it_is_built(handlers: dict[str, Any], named: str) -> None:
    with pytest.raises(et.ConfigurationError, match=named):
        subs.Lambda(**handlers)


def test_a_finite_lag_for_everything_is_refused_when_it_is_subscribed(tmp_path: Path) -> None:
    with pytest.raises(et.ConfigurationError, match="lag"):
        make_trainer(tmp_path, subscribers=[subs.Lambda(on_event=observe, lag=0)])


def test_a_configuration_file_is_told_that_it_takes_functions(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[[subscribers]]\ntype = "lambda"\n')
    with pytest.raises(et.ConfigurationError, match="They cannot come from a configuration file"):
        et.load_subscribers(file)
