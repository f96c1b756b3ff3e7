"""What Pydantic found wrong with a table, in words that name the key, the value and the nearest valid key."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from eventtrain.config.read import Table
from eventtrain.config.schema import json_schema
from eventtrain.errors import ConfigurationError

M = TypeVar("M", bound=BaseModel)
KeyPath = tuple[str | int, ...]

UNKNOWN = {"extra_forbidden", "unexpected_keyword_argument"}
MISSING = {"missing", "missing_argument", "missing_keyword_only_argument"}
SHOWN = 60
"""Characters of a wrong value that a message quotes."""


def validated(model: type[M], table: Table) -> M:
    """``table`` as a ``model``.

    Raises:
        ConfigurationError: every problem, each with its key. A value is quoted only if ``model`` takes no secrets.
    """
    try:
        # By way of JSON: what is strict there is what a file can say, a path as text and a tuple as an array.
        return model.model_validate_json(json.dumps(table.values, default=str), strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
    raise ConfigurationError(
        "\n".join(_told(model, table, found))
    )  # out here: `found` only, not the error with the input


def _told(model: type[BaseModel], table: Table, found: list[ErrorDetails]) -> Iterator[str]:
    schema = json_schema(model)
    takes_secrets = '"writeOnly": true' in json.dumps(schema)
    told: dict[KeyPath, list[str]] = {}
    for error in found:
        path = _key_path(table.values, error)
        text = _text(error, path, schema, table.values)
        if text not in told.setdefault(path, []):
            told[path].append(text)
    for path, texts in told.items():
        if any(path == other[: len(path)] for other in told if len(other) > len(path)):
            continue  # another choice of a union, while the one that was meant is nearly right
        text = " or ".join(texts).replace(" or should be ", " or ")
        if path and not text.startswith(("unknown key ", "the key ")):
            value = "" if takes_secrets else f" = {_shown(_at(table.values, path))}"
            text = f"{_written(path)}{value}{' ' if text.startswith('should ') else ': '}{text}"
        by = table.overridden.get(str(path[0])) if path else None
        yield f"{text} ({by})" if by else text


def _text(error: ErrorDetails, path: KeyPath, schema: dict[str, Any], values: Any) -> str:
    if error["type"] in MISSING:
        return f"the key {_written(path)!r} is missing"
    if error["type"] in UNKNOWN:
        keys = sorted(_keys(schema, values, path[:-1]))
        nearest = difflib.get_close_matches(str(path[-1]), keys, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(keys)}"
        return f"unknown key {_written(path)!r}; {hint}"
    text = str(error.get("ctx", {}).get("error") or error["msg"])
    return text.removeprefix("Input ")


def _key_path(values: Any, error: ErrorDetails) -> KeyPath:
    """Where the error lies in the file: its location without the branches of unions that Pydantic names in it."""
    path: list[str | int] = []
    for part in error["loc"]:
        if _has(values, part):
            values = values[part]
            path.append(part)
        elif error["type"] in MISSING and part == error["loc"][-1]:
            path.append(part)
    return tuple(path)


def _has(values: Any, part: str | int) -> bool:
    if isinstance(values, dict):
        return part in values
    return isinstance(values, list) and isinstance(part, int) and part < len(values)


def _at(values: Any, path: KeyPath) -> Any:
    for part in path:
        values = values[part]
    return values


def _written(path: KeyPath) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _keys(schema: dict[str, Any], values: Any, path: KeyPath) -> set[str]:
    """The keys that a schema knows at a path; where tables of several types may stand there, those of the one given."""
    nodes = list(_expanded(schema, schema))
    for part in path:
        below = [
            node["items"] if isinstance(part, int) else node["properties"][part]
            for node in nodes
            if (isinstance(part, int) and "items" in node) or part in node.get("properties", {})
        ]
        nodes = [node for child in below for node in _expanded(child, schema)]
    kind = table.get("type") if isinstance(table := _at(values, path), dict) else None
    of_type = [node for node in nodes if node.get("properties", {}).get("type", {}).get("const") == kind]
    nodes = of_type if kind is not None and of_type else nodes
    return {key for node in nodes for key in node.get("properties", {})}


def _expanded(node: dict[str, Any], schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A node and what it refers to or offers as a choice."""
    yield node
    if "$ref" in node:
        yield from _expanded(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    for choice in (*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())):
        yield from _expanded(choice, schema)
