"""Models of the tables in a file: their settings, their JSON Schema, and validation whose errors name key and value."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import ErrorDetails, core_schema

from eventtrain.config.run_file import Table
from eventtrain.errors import ConfigurationError, did_you_mean

M = TypeVar("M", bound=BaseModel)
KeyPath = tuple[str | int, ...]

UNKNOWN = {"extra_forbidden", "unexpected_keyword_argument"}
MISSING = {"missing", "missing_argument", "missing_keyword_only_argument"}
MAX_QUOTED = 60
"""Characters of a wrong value that a message quotes."""
MAX_PROBLEMS = 15
"""Problems of one table that a message lists."""

TABLE = ConfigDict(
    extra="forbid",
    frozen=True,
    strict=True,  # a file has its own types: "3" and true are not numbers
    arbitrary_types_allowed=True,
    hide_input_in_errors=True,  # it may contain secrets
    protected_namespaces=(),
)


def validated(model: type[M], table: Table) -> M:
    """Returns ``table`` as a ``model``.

    Raises:
        ConfigurationError: names every problem with its key. A value is quoted only if ``model`` has no secrets.
    """
    try:
        # As JSON: strictly validated JSON may have a string for a path, and an array for a tuple, as a file has.
        return model.model_validate_json(json.dumps(table.values, default=str), strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
    # Outside of the except block, so that the traceback does not contain the error with its input.
    problems = list(_problems(model, table, found))
    if (more := len(problems) - MAX_PROBLEMS) > 0:
        problems[MAX_PROBLEMS:] = [f"and {more} more"]
    raise ConfigurationError("\n".join(problems))


def _problems(model: type[BaseModel], table: Table, found: list[ErrorDetails]) -> Iterator[str]:
    schema = json_schema(model)
    has_secrets = '"writeOnly": true' in json.dumps(schema)
    texts: dict[KeyPath, dict[str, None]] = {}
    for error in found:
        path = _key_path(table.values, error)
        texts.setdefault(path, {})[_text(error, path, schema, table.values)] = None
    for path, choices in texts.items():
        if any(path == other[: len(path)] for other in texts if len(other) > len(path)):
            continue  # a different choice of a union; the intended one has a problem further down
        text = " or ".join(choices).replace(" or should be ", " or ")
        if path and not text.startswith(("unknown key ", "the key ")):
            value = "" if has_secrets else f" = {_quoted(_at(table.values, path))}"
            text = f"{_written(path)}{value}{' ' if text.startswith('should ') else ': '}{text}"
        by = table.overridden.get(str(path[0])) if path else None
        yield f"{text} ({by})" if by else text


def _text(error: ErrorDetails, path: KeyPath, schema: dict[str, Any], values: Any) -> str:
    if error["type"] in MISSING:
        return f"the key {_written(path)!r} is missing"
    if error["type"] in UNKNOWN:
        keys = sorted(_known_keys(schema, values, path[:-1]))
        hint = did_you_mean(str(path[-1]), keys, f"Known keys: {', '.join(keys)}.")
        return f"unknown key {_written(path)!r}. {hint}"
    return str(error.get("ctx", {}).get("error") or error["msg"]).removeprefix("Input ")


def _key_path(values: Any, error: ErrorDetails) -> KeyPath:
    """Returns the location in the file: Pydantic's location without the branches of unions in it."""
    path: list[str | int] = []
    for part in error["loc"]:
        if _has(values, part):
            values = values[part]
        elif error["type"] not in MISSING or part != error["loc"][-1]:
            continue
        path.append(part)
    return tuple(path)


def _has(values: Any, part: str | int) -> bool:
    keys: Any = values if isinstance(values, dict) else range(len(values) if isinstance(values, list) else 0)
    return part in keys


def _at(values: Any, path: KeyPath) -> Any:
    for part in path:
        values = values[part]
    return values


def _written(path: KeyPath) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _quoted(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


def _known_keys(schema: dict[str, Any], values: Any, path: KeyPath) -> set[str]:
    """Returns the keys of the schema at a path; of several possible types of tables, those of the given type."""
    nodes = list(_expanded(schema, schema))
    for part in path:
        key = "items" if isinstance(part, int) else "properties"
        below = [node[key] if key == "items" else node[key].get(part, {}) for node in nodes if key in node]
        nodes = [node for child in below for node in _expanded(child, schema)]
    kind = table.get("type") if isinstance(table := _at(values, path), dict) else None
    of_kind = [node for node in nodes if node.get("properties", {}).get("type", {}).get("const", ...) == kind]
    return {key for node in of_kind or nodes for key in node.get("properties", {})}


def _expanded(node: dict[str, Any], schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a node, and every node that it refers to or offers as a choice."""
    yield node
    if "$ref" in node:
        yield from _expanded(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
    for choice in (*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())):
        yield from _expanded(choice, schema)


def json_schema(model: type[BaseModel]) -> JsonSchemaValue:
    """Returns the JSON Schema of a table."""
    return model.model_json_schema(schema_generator=_FileSchema)


def fits_a_file(annotation: Any) -> bool:
    """Returns whether a file can contain a valid value, which is the case if there is a JSON Schema for it."""
    try:
        json_schema(create_model("Parameter", __config__=TABLE, value=(annotation, ...)))
    except (PydanticSchemaGenerationError, PydanticInvalidForJsonSchema):
        return False
    return True


class _FileSchema(GenerateJsonSchema):
    """Classes, functions and arbitrary objects have no JSON Schema unless a validator creates them from data."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012  # as Pydantic declares it

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        """Adds that unknown keys are refused, which Pydantic before 2.14 does but does not declare."""
        found = super().dataclass_schema(schema)
        forbids = schema.get("config", {}).get("extra_fields_behavior") == "forbid"
        return {"additionalProperties": False} | found if forbids else found

    def is_subclass_schema(self, schema: core_schema.IsSubclassSchema) -> JsonSchemaValue:
        """Refuses classes; Pydantic returns ``{}``, as if every value were valid."""
        return self.handle_invalid_for_json_schema(schema, f"a subclass of {schema['cls'].__name__}")

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
        """Accepts any input if the result of the function has no schema."""
        return self._or_anything(super().function_before_schema, schema)

    def function_wrap_schema(self, schema: core_schema.WrapValidatorFunctionSchema) -> JsonSchemaValue:
        """Does the same for a wrapping function."""
        return self._or_anything(super().function_wrap_schema, schema)

    def union_schema(self, schema: core_schema.UnionSchema) -> JsonSchemaValue:
        """Returns the choices that have a schema, and refuses a union without any."""
        found = super().union_schema(schema)
        if not found.get("anyOf", True):
            return self.handle_invalid_for_json_schema(schema, "a union of types that data cannot have")
        return found

    def _or_anything(self, generate: Callable[[Any], JsonSchemaValue], schema: Any) -> JsonSchemaValue:
        try:
            return generate(schema)
        except PydanticInvalidForJsonSchema:
            return {}
