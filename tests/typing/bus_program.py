"""A program on the bus alone, with mistakes that a type checker has to report. See ``test_typing.py`` for the marks."""

# fmt: off

from __future__ import annotations

from typing import Any, reveal_type

import eventtrain as et

bus = et.EventBus()


class Temperature(et.Event):
    celsius: float


# --- handlers -----------------------------------------------------------------------------------------------------


@bus.on(et.StepCompleted)
async def reads_a_field(event: et.StepCompleted) -> None:
    print(event.metrics["loss"] * 2, event.batch)
    print(event.metrcs)  # E reportAttributeAccessIssue: Cannot access attribute "metrcs" for class "StepCompleted"
    print(event.metrics.loss)  # E reportAttributeAccessIssue: attribute "loss" for class "
    print(event.metrics["loss"].item())  # E reportAttributeAccessIssue: Cannot access attribute "item" for class "int"


@bus.on(et.StepCompleted)  # E reportArgumentType: "(event: EpochCompleted) -> CoroutineType
async def handles_another_event(event: et.EpochCompleted) -> None: ...


@bus.on(et.StepCompleted | et.EpochCompleted)  # E reportArgumentType: "(event: StepCompleted) -> CoroutineType
async def handles_one_of_two(event: et.StepCompleted) -> None: ...


@bus.on(et.StepCompleted | et.EpochCompleted, every=10, where=lambda event: event.epoch > 2)
def handles_a_union(event: et.StepCompleted | et.EpochCompleted) -> None: ...


@bus.on((et.StepCompleted, Temperature), queue=et.KeepLatest())
async def handles_a_base_class(event: et.Event) -> None: ...


@bus.on(et.Event, name="decides")
async def takes_the_control(event: et.Event, control: et.Control, factor: float = 0.5) -> None: ...


@bus.on(et.StepCompleted)  # E reportArgumentType: Extra parameter "more"
async def takes_too_much(event: et.StepCompleted, control: et.Control, more: int) -> None: ...


@bus.on(int)  # E reportArgumentType: Argument of type "type[int]"
async def handles_no_event(event: Any) -> None: ...


async def warn(event: Temperature) -> None: ...


bus.subscribe(Temperature, warn, timeout_s=3.0).cancel()
bus.subscribe(et.StepCompleted, warn)  # E reportArgumentType: "StepCompleted" is not assignable to "Temperature"
bus.subscribe(et.Event, list[et.Event]().append)


# --- options ------------------------------------------------------------------------------------------------------

bus.subscribe(Temperature, warn, evry=10)  # E reportCallIssue: No parameter named "evry"
bus.subscribe(Temperature, warn, every="10")  # E reportArgumentType: "Literal['10']" is not assignable to "int"
bus.subscribe(Temperature, warn, on_error="ignore")  # E reportArgumentType: Argument of type "Literal['ignore']"
bus.subscribe(Temperature, warn, queue=et.KeepLatest)  # E reportArgumentType: Argument of type "type[KeepLatest]"
bus.subscribe(Temperature, warn, where=lambda event: event.fahrenheit > 90)  # E reportAttributeAccessIssue: "fahr


@bus.on(Temperature, lags=0)  # E reportCallIssue: No parameter named "lags"
async def has_a_misspelt_option(event: Temperature) -> None: ...


# --- events -------------------------------------------------------------------------------------------------------


def uses_events(event: et.StepCompleted | et.EpochCompleted, own: Temperature, applied: et.CommandApplied) -> None:
    event.step = 3  # E reportAttributeAccessIssue: Attribute "step" is read-only
    own.celsius = 21.5  # E reportAttributeAccessIssue: Attribute "celsius" is read-only
    if event.kind == "epoch_completed":
        reveal_type(event)  # T EpochCompleted
        print(event.batch)  # E reportAttributeAccessIssue: Cannot access attribute "batch" for class "EpochCompleted"
    elif event.kind == "step_complete":  # E reportUnnecessaryComparison: Condition will always evaluate to False
        ...
    else:
        reveal_type(event)  # T StepCompleted
    match applied.command.kind:
        case "scale_hyperparam":
            print(applied.command.factor, applied.command.value)  # E reportAttributeAccessIssue: attribute "value"
        case "set_hyperparm":  # E reportUnnecessaryComparison: Pattern will never be matched
            ...
        case _:
            ...
    Temperature(celcius=21.5)  # E reportCallIssue: No parameter named "celcius"
    et.EpochCompleted(epoch=0, steps=1, duration_s=1.0, metrics={"loss": "low"})  # E reportArgumentType: "Literal['low
    bus.publish(et.StepCompleted)  # E reportArgumentType: Argument of type "type[StepCompleted]"


# --- waiting and streaming ----------------------------------------------------------------------------------------


async def waits() -> None:
    reveal_type(await bus.wait_for(Temperature, timeout_s=1.0))  # T Temperature
    reveal_type(await bus.wait_for(et.StepCompleted | et.EpochCompleted))  # T StepCompleted | EpochCompleted
    reveal_type(await bus.wait_for(et.StepCompleted, et.EpochCompleted))  # T StepCompleted | EpochCompleted
    step: et.StepCompleted = await bus.wait_for(et.EpochCompleted)  # E reportAssignmentType: "EpochCompleted"
    print((await bus.wait_for(et.StepCompleted, Temperature)).celsius)  # E reportAttributeAccessIssue: "celsius"
    await bus.wait_for(Temperature, where=lambda event: event.batch > 3)  # E reportAttributeAccessIssue: "batch"
    await bus.wait_for(Temperature, timeout=3)  # E reportCallIssue: No overloads for "wait_for" match
    print(step)
    async with bus.stream(et.StepCompleted, et.EpochCompleted, every=10) as events:
        async for event in events:
            reveal_type(event)  # T StepCompleted | EpochCompleted
            reveal_type(events.end_reason)  # T str | None
            print(event.loss)  # E reportAttributeAccessIssue: Cannot access attribute "loss" for class "StepCompleted"
    async with bus.stream(Temperature) as temperatures:
        print((await anext(temperatures)).celsius)
        print((await anext(temperatures)).kelvin)  # E reportAttributeAccessIssue: attribute "kelvin"
    async with bus.stream(Temperature, once=True):  # E reportCallIssue: No overloads for "stream" match
        ...


# --- the public surface -------------------------------------------------------------------------------------------


def looks_inside(subscription: et.Subscription) -> None:
    print(subscription.statistics().delivered, subscription.dead_letters[0].event)
    print(subscription.queue)  # E reportAttributeAccessIssue: Cannot access attribute "queue" for class "Subscription"
    bus.feed([])  # E reportAttributeAccessIssue: Cannot access attribute "feed" for class "EventBus"
