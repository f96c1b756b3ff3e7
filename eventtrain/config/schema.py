"""Settings and JSON Schema of the models that describe tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, create_model
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

TABLE = ConfigDict(
    extra="forbid",
    frozen=True,
    strict=True,  # a file has its own types: "3" and true are not numbers
    arbitrary_types_allowed=True,
    hide_input_in_errors=True,  # it may contain secrets
    protected_namespaces=(),
)


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
