from __future__ import annotations

from typing import Any

import pytest

import eventtrain as et
from eventtrain.bus.bus import core_of
from eventtrain.subscribers import base


def subscribe(bus: et.EventBus, subscriber: et.Subscriber) -> Any:
    core = base.subscribe(core_of(bus), subscriber)
    core_of(bus).attach(core)
    core_of(bus).start_worker(core)
    return core


class Ping(et.Event):
    number: int = 0


class Base(et.Subscriber):
    async def on_ping(self, event: Ping) -> None: ...

    event_types = (Ping,)


def subclass(**attributes: Any) -> et.Subscriber:
    return type("Mine", (Base,), attributes)()


async def method(self: Any) -> None: ...


@pytest.mark.parametrize(
    ("attribute", "value", "meant"),
    [
        ("evry", 10, "every"),
        ("evrey", 10, "every"),
        ("every_", 10, "every"),
        ("timeou_s", 3.0, "timeout_s"),
        ("on_eror", "fail", "on_error"),
        ("disable_atfer", None, "disable_after"),
        ("nmae", "x", "name"),
        ("alg", 3, "lag"),
        ("qeue", et.KeepLatest(), "queue"),
        ("whre", lambda self, event: True, "where"),
        ("evnts", Ping, "events"),
        ("strat", method, "start"),
        ("state_dcit", method, "state_dict"),
    ],
)
def test_a_misspelt_attribute_is_refused_by_name(attribute: str, value: Any, meant: str) -> None:
    with pytest.raises(
        et.ConfigurationError, match=rf"Mine\.{attribute} is not an attribute.*Did you mean '{meant}'\?"
    ):
        subscribe(et.EventBus(), subclass(**{attribute: value}))


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("every_steps", 10),  # not close
        ("timeout", 3.0),
        ("names", ("loss", "accuracy")),  # plural
        ("event", Ping),
        ("event_type", Ping),
        ("tag", "best"),  # short names have many neighbours
        ("once_", True),
        ("step", 0),
        ("stage", 0),
        ("start_", 0),  # of another kind than start()
        ("_evry", 10),
        ("evry", property(lambda self: 10)),
    ],
)
def test_attributes_of_the_users_own_stay_possible(attribute: str, value: Any) -> None:
    assert subscribe(et.EventBus(), subclass(**{attribute: value})).active


def test_a_similar_attribute_beside_the_option_is_the_users_own() -> None:
    assert subscribe(et.EventBus(), subclass(every=5, evry=10)).statistics().name == "Mine"


def test_what_is_not_a_subscriber_is_refused_by_type() -> None:
    with pytest.raises(et.ConfigurationError, match=r"Expected a Subscriber, got int\. Subclass"):
        subscribe(et.EventBus(), 3)  # pyright: ignore[reportArgumentType]


class HandlesSteps(et.Subscriber):
    async def on_epoch_completed(self, event: et.StepCompleted) -> None: ...


class HandlesUnion(et.Subscriber):
    events = et.EpochCompleted | Ping

    async def handle(self, event: et.EpochCompleted | et.StepCompleted) -> None: ...


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (HandlesSteps, r"HandlesSteps\.on_epoch_completed to EpochCompleted.*annotated as StepCompleted"),
        (HandlesUnion, r"HandlesUnion\.handle to EpochCompleted \| Ping.*which a Ping is not"),
    ],
)
def test_a_method_whose_annotation_contradicts_its_event_is_refused_by_name(cls: Any, message: str) -> None:
    with pytest.raises(et.ConfigurationError, match=message):
        subscribe(et.EventBus(), cls())


async def test_the_options_of_a_subscriber_are_its_attributes(anyio_backend: object) -> None:
    numbers: list[int] = []

    class Every(Base):
        every = 3
        queue = et.DropOldest(5)

        def where(self, event: Ping) -> bool:
            return event.number != 3

        async def on_ping(self, event: Ping) -> None:
            numbers.append(event.number)

    async with et.EventBus() as bus:
        subscription = subscribe(bus, Every())
        subscribe(bus, again := Every())
        assert (subscription.name, again.name) == ("Every", "Every-2")
        for number in range(10):
            bus.publish(Ping(number=number, step=number))
            await bus.drain()
        again.name = None
    assert numbers == [0, 0, 6, 6, 9, 9]


def plain_method(self: Any, *args: Any) -> Any: ...


def generator_method(self: Any, *args: Any) -> Any:
    yield


@pytest.mark.parametrize("name", ["start", "finish", "stop", "flush"])
@pytest.mark.parametrize("value", [plain_method, generator_method])
def test_a_method_that_is_awaited_has_to_be_async(name: str, value: Any) -> None:
    with pytest.raises(et.ConfigurationError, match=rf"Mine\.{name} must be written `async def`"):
        subscribe(et.EventBus(), subclass(**{name: value}))


@pytest.mark.parametrize("name", ["state_dict", "load_state_dict", "saved_run"])
@pytest.mark.parametrize("value", [method, generator_method])
def test_a_method_whose_result_is_used_at_once_is_not_async(name: str, value: Any) -> None:
    with pytest.raises(et.ConfigurationError, match=rf"Mine\.{name} must be a plain function"):
        subscribe(et.EventBus(), subclass(**{name: value}))


async def yields(self: Any, event: Any) -> Any:
    yield


def test_a_method_with_a_yield_is_refused_by_name() -> None:
    with pytest.raises(et.ConfigurationError, match=r"contains a yield"):
        subscribe(et.EventBus(), subclass(on_ping=yields))


async def test_what_a_method_returns_is_awaited(anyio_backend: object) -> None:
    seen: list[int] = []

    class Mine(et.Subscriber):
        event_types = (Ping,)

        async def on_ping(self, event: Ping) -> Any:
            return self.note(event)

        async def note(self, event: Ping) -> None:
            seen.append(event.number)

    async with et.EventBus() as bus:
        subscribe(bus, Mine())
        bus.publish(Ping(number=3))
        await bus.drain()
    assert seen == [3]
