"""Event classes by their names, for what is written in files: ``"step_completed"`` is ``StepCompleted``."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import PlainValidator

from eventtrain.events.base import Event
from eventtrain.events.catalog import BUILT_IN, EpochCompleted
from eventtrain.events.models import snake_case


def by_name(*classes: type[Event]) -> PlainValidator:
    """A Pydantic validator that takes one of ``classes`` or its name in snake_case; all built-in events if none.

    ``Annotated[type[EpochCompleted] | type[StepCompleted], by_name(EpochCompleted, StepCompleted)]``.
    """
    wanted = classes or (Event, *BUILT_IN, EpochCompleted)
    names = {snake_case(kind.__name__): kind for kind in wanted}
    example = snake_case(wanted[-1].__name__)

    def find(given: Any) -> type[Event]:
        if isinstance(given, type) and issubclass(given, classes or Event):
            return given
        if isinstance(given, str) and given in names:
            return names[given]
        nearest = difflib.get_close_matches(str(given), names, n=1)
        raise ValueError(
            f"no such event; did you mean {nearest[0]!r}?"
            if nearest
            else f"needs an event such as {example!r}"
        )

    return PlainValidator(find, json_schema_input_type=Literal[tuple(names)])


EventClass = Annotated[type[Event], by_name()]
"""A parameter that is an event class: in a file, the name of a built-in one."""
