"""Events from their JSON: one union of the classes that are known, told apart by ``kind``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Annotated, Any, Union

from pydantic import TypeAdapter
from pydantic_core import SchemaValidator

from eventtrain.errors import ConfigurationError, EventParseError, first_lines, shortened
from eventtrain.events.base import Event
from eventtrain.events.catalog import BUILT_IN
from eventtrain.events.models import ByKind, kind_of

NONE: tuple[type[Event], ...] = ()
"""The default of ``types``: looked for by identity, which takes no time."""


def event_classes(function: str, types: Any) -> tuple[type[Event], ...]:
    """Returns ``types``, event classes for ``function``, as a tuple. Raises ConfigurationError for anything else."""
    classes: tuple[Any, ...] = (
        tuple(types) if isinstance(types, Iterable) and not hasattr(types, "shape") else (types,)
    )
    for found in classes:
        if not (isinstance(found, type) and issubclass(found, Event)):
            raise ConfigurationError(
                f"{function}: types must be event classes, such as (MyEvent,), got {type(found).__name__}."
            )
    return classes


def parse_event(source: str | bytes | Mapping[str, Any], types: Iterable[type[Event]] = NONE) -> Event:
    """Parses one event from its JSON, or from the dict that its JSON holds.

    Args:
        source: ``event.model_dump_json()``, or ``event.model_dump(mode="json")``.
        types: your own event classes. The built-in ones are always known.

    Returns:
        An event equal to the original, NaN and infinities included.

    Raises:
        EventParseError: not a JSON object, an unknown ``kind``, a newer ``schema_version``, or wrong fields.
    """
    classes = () if types is NONE else event_classes("parse_event", types)
    text: Any = source
    if not isinstance(text, (str, bytes)) and isinstance(text, Mapping):
        text = _json_of(text)
    try:
        validator, newest = known(classes)
        event = validator.validate_json(text)
        if event.schema_version <= newest[event.kind]:
            return event
    except Exception:
        pass  # it is parsed again by steps, which says what is wrong with it
    return parse_by_steps(text, classes)


@lru_cache(maxsize=16)
def known(classes: tuple[type[Event], ...]) -> tuple[SchemaValidator, Mapping[str, int]]:
    """Returns the validator of the events known with these, and the newest ``schema_version`` of each kind.

    Built when it is first needed, which takes about 10 ms.
    """
    by_kind = {kind_of(known): known for known in (*BUILT_IN, *classes)}
    union: Any = Annotated[Union[tuple(by_kind.values())], ByKind()]  # noqa: UP007
    newest = {kind: known.model_fields["schema_version"].default for kind, known in by_kind.items()}
    validator: Any = TypeAdapter(union).validator
    return validator, newest


def _json_of(source: Mapping[Any, Any]) -> str:
    try:
        return json.dumps(dict(source))
    except (ValueError, TypeError, RecursionError) as error:
        raise _not_json(error) from error


def _not_json(error: Exception) -> EventParseError:
    return EventParseError(f"Cannot parse an event: the text is not JSON ({first_lines(str(error))}).")


def parse_by_steps(text: Any, classes: tuple[type[Event], ...] = ()) -> Event:
    """``parse_event`` that reads the kind first and then uses its class: slower, and says what is wrong."""
    try:
        data: Any = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise _not_json(error) from error
    if not isinstance(data, Mapping) or not isinstance(data.get("kind"), str):
        raise EventParseError("Cannot parse an event: expected a JSON object with a 'kind'.")
    kind = data["kind"]
    event_type = {kind_of(known): known for known in (*BUILT_IN, *classes)}.get(kind)
    if event_type is None:
        raise EventParseError(
            f"Cannot parse an event of kind {shortened(kind)!r}: no known class has that kind. "
            "Pass your own event classes as types=(YourEvent,)."
        )
    version, newest = data.get("schema_version"), event_type.model_fields["schema_version"].default
    if isinstance(version, int) and version > newest:
        raise EventParseError(
            f"Cannot parse this {kind}: it has schema_version {version}, and this program knows versions up to "
            f"{newest}. Parse it with the version of eventtrain that wrote it, or a newer one."
        )
    try:
        return event_type.model_validate_json(text)
    except Exception as error:  # a ValidationError, or whatever a validator of the user's class raises
        raise EventParseError(f"Cannot parse this {kind}: {first_lines(str(error))}") from error


def events_json_schema(types: Iterable[type[Event]] = ()) -> dict[str, Any]:
    """Returns the JSON Schema of all events, built-in and given, as one union discriminated by ``kind``.

    Raises:
        ConfigurationError: one of ``types`` is not an event class.
    """
    classes = (*BUILT_IN, *event_classes("events_json_schema", types))
    _, schema = TypeAdapter.json_schemas(
        [(kind_of(event_type), "serialization", TypeAdapter(event_type)) for event_type in classes],
        title="eventtrain events",
    )
    references = {kind_of(event_type): f"#/$defs/{event_type.__name__}" for event_type in classes}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "eventtrain events",
        "oneOf": [{"$ref": reference} for reference in references.values()],
        "discriminator": {"propertyName": "kind", "mapping": references},
        "$defs": schema["$defs"],
    }
