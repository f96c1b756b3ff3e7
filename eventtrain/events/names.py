"""Looks up event classes by name, as configuration files spell them: ``"step_completed"`` is ``StepCompleted``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import PlainValidator

from eventtrain.errors import did_you_mean
from eventtrain.events.base import Event
from eventtrain.events.catalog import BUILT_IN, EpochCompleted
from eventtrain.events.models import snake_case


def by_name(*classes: type[Event]) -> PlainValidator:
    """Returns a Pydantic validator that accepts one of ``classes`` or its name in snake_case; any built-in by default.

    ``Annotated[type[EpochCompleted] | type[StepCompleted], by_name(EpochCompleted, StepCompleted)]``.
    """
    accepted = classes or (Event, *BUILT_IN, EpochCompleted)
    names = {snake_case(event_type.__name__): event_type for event_type in accepted}
    example = snake_case(accepted[-1].__name__)

    def find(given: Any) -> type[Event]:
        if isinstance(given, type) and issubclass(given, classes or Event):
            return given
        if isinstance(given, str) and given in names:
            return names[given]
        hint = did_you_mean(
            str(given), names, otherwise=f"Expected the name of an event, such as {example!r}."
        )
        raise ValueError(f"no such event. {hint}")

    return PlainValidator(find, json_schema_input_type=Literal[tuple(names)])


EventClass = Annotated[type[Event], by_name()]
"""A parameter that is an event class. In a file, the name of a built-in one."""
