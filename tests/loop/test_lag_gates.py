"""What the loop owes to deciders, counted on both sides."""

from __future__ import annotations

from typing import Any

import pytest

from eventtrain.bus.bus import EventBus, core_of
from eventtrain.events import EpochCompleted, EvalStepCompleted, RunStarted, StepCompleted, StepStarted
from eventtrain.loop.lag_gates import NEVER, LagGates


async def decide(event: Any) -> None: ...


def gates_with(*options: dict[str, Any]) -> tuple[LagGates, list[Any]]:
    bus = core_of(EventBus())
    subscriptions = [bus.subscribe(o.pop("event_type", StepCompleted), decide, o) for o in options]
    gates = LagGates(bus)
    deciders = [s for s in subscriptions if s.options.lag is not None]
    assert gates.refresh(0) == deciders
    for subscription in deciders:
        subscription.activate()  # as the stream does
    assert not gates.stale
    return gates, subscriptions


def test_nobody_decides_and_nothing_is_ever_due():
    gates, _ = gates_with({}, {"every": 5})
    assert (gates.next_due, gates.flush_by, gates.next_step_event) == (NEVER, NEVER, NEVER)


@pytest.mark.parametrize(("lag", "flush_by"), [(0, 10), (1, 10), (2, 11), (7, 13), (64, 42)])
def test_the_ring_is_due_half_the_lag_after_its_oldest_event(lag, flush_by):
    gates, (subscription,) = gates_with({"every": 10, "lag": lag})
    assert gates.next_step_event == 10
    gates.note_step(10)
    assert gates.flush_by == flush_by
    assert gates.next_due == 10 + lag
    assert gates.next_step_event == 20
    assert gates.blocking(10 + lag - 1) is None
    assert gates.blocking(10 + lag) is subscription
    subscription.worker.passed = 1
    assert gates.blocking(10 + lag) is None
    gates.flushed()
    assert gates.flush_by == NEVER


def test_what_was_handled_long_before_it_is_due_does_not_come_due():
    gates, (subscription,) = gates_with({"lag": 100})
    for step in range(1, 101):
        gates.note_step(step)
    assert gates.next_due == 101
    subscription.worker.passed = 60
    assert gates.blocking(101) is None
    assert gates.next_due == 161  # that of step 61
    assert gates.blocking(160) is None
    assert gates.blocking(161) is subscription


def test_what_an_earlier_run_left_opens_no_gate():
    bus = core_of(EventBus())
    subscription = bus.subscribe(StepCompleted, decide, {"lag": 0})
    subscription.activate()
    subscription.worker.passed = 5
    gates = LagGates(bus)
    gates.refresh(0)
    gates.note_step(1)
    assert gates.blocking(1) is subscription  # its activation is still on its way
    subscription.activate()
    assert gates.blocking(1) is subscription
    subscription.worker.passed = 1
    assert gates.blocking(1) is None


def test_epochs_count_by_epochs_and_other_events_are_not_counted():
    gates, (subscription,) = gates_with({"event_type": EpochCompleted, "every": 2, "lag": 0})
    gates.note(StepCompleted, 5)
    gates.note(EpochCompleted, 5, epoch=0)
    assert gates.next_due == NEVER
    gates.note(EpochCompleted, 10, epoch=1)
    assert gates.blocking(10) is subscription


def test_a_mapping_gives_each_event_type_its_own_lag():
    gates, _ = gates_with(
        {"event_type": StepCompleted | EpochCompleted, "lag": {StepCompleted: 4, EpochCompleted: 0}}
    )
    gates.note_step(1)
    assert gates.next_due == 5
    gates.note(EpochCompleted, 1, epoch=0)
    assert gates.next_due == 1


def test_every_leaves_out_no_event_of_a_whole_run():
    gates, (subscription,) = gates_with(
        {"event_type": RunStarted | StepCompleted, "lag": {RunStarted: 0, StepCompleted: 4}, "every": 8}
    )
    gates.note(RunStarted, 5)
    assert gates.blocking(5) is subscription
    assert subscription.filter.is_due(RunStarted(step=5))
    assert not subscription.filter.is_due(StepCompleted(step=5, epoch=0, batch=4, metrics={}))


def test_an_ended_subscription_blocks_nothing():
    gates, (subscription,) = gates_with({"lag": 0})
    gates.note_step(1)
    assert gates.blocking(1) is subscription
    subscription.cancel()
    assert gates.blocking(1) is None
    assert gates.stale


def test_step_started_and_evaluation_steps_can_be_decided_on():
    gates, _ = gates_with({"event_type": StepStarted, "lag": 0}, {"event_type": EvalStepCompleted, "lag": 3})
    assert gates.announces_steps
    gates.note(EvalStepCompleted, 8)
    assert (gates.next_due, gates.flush_by) == (11, 9)
