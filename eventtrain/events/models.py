"""Base of events and commands: Pydantic models that are read-only all the way down."""

from __future__ import annotations

import inspect
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NoReturn,
    Self,
    TypeVar,
    cast,
    dataclass_transform,
    get_args,
)

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

K = TypeVar("K")
V = TypeVar("V")


def _refuse(self: object, *args: object, **kwargs: object) -> NoReturn:
    kind = type(self).__name__.removeprefix("Frozen").lower()
    raise TypeError(
        f"Events are shared by all subscribers, so their {kind}s are read-only. Copy one with {kind}(...)."
    )


class FrozenDict(dict[K, V]):
    """A dict that cannot be changed. It compares, iterates and serialises like any other dict."""

    __setitem__ = __delitem__ = __ior__ = _refuse  # pyright: ignore[reportAssignmentType]
    update = setdefault = pop = popitem = clear = _refuse  # pyright: ignore[reportAssignmentType]

    def __reduce__(self) -> tuple[type[Self], tuple[dict[K, V]]]:
        return type(self), (dict(self),)


class FrozenList(list[V]):
    """A list that cannot be changed."""

    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse  # pyright: ignore[reportAssignmentType]
    append = extend = insert = pop = remove = clear = sort = reverse = _refuse  # pyright: ignore[reportAssignmentType]

    def __reduce__(self) -> tuple[type[Self], tuple[list[V]]]:
        return type(self), (list(self),)


class FrozenSet(set[V]):
    """A set that cannot be changed; a ``frozenset`` is not what a field of type ``set`` holds."""

    __iand__ = __ior__ = __isub__ = __ixor__ = _refuse  # pyright: ignore[reportAssignmentType]
    add = discard = remove = pop = clear = update = _refuse  # pyright: ignore[reportAssignmentType]
    difference_update = intersection_update = symmetric_difference_update = _refuse  # pyright: ignore[reportAssignmentType]

    def __reduce__(self) -> tuple[type[Self], tuple[set[V]]]:
        return type(self), (set(self),)


def frozen(value: Any) -> Any:
    """Returns ``value`` with every dict, list and set in it replaced by a read-only one, in models and dataclasses too.

    Raises:
        ValueError: an array in it is not a ``Column``, and has no JSON that it could be read back from; or a model or
            dataclass in it can be changed.
    """
    if isinstance(value, (FrozenDict, Frozen)):
        return value
    if isinstance(value, BaseModel) or is_dataclass(value):
        return _frozen_object(value)
    if isinstance(value, dict):
        return FrozenDict({key: frozen(item) for key, item in value.items()})
    if isinstance(value, list):
        return FrozenList(map(frozen, value))
    if isinstance(value, tuple):
        make: Any = getattr(type(value), "_make", tuple)  # of a NamedTuple
        return make(map(frozen, value))
    if isinstance(value, set):
        return FrozenSet(value)
    if isinstance(value, (deque, bytearray)):
        remedy = "bytes" if isinstance(value, bytearray) else "list"
        raise ValueError(f"an event cannot hold a {type(value).__name__}, which can be changed: use {remedy}")
    if hasattr(value, "__array__") and not (isinstance(value, np.ndarray) and _is_frozen_array(value)):
        raise _array_refused(value)
    return value


def _frozen_object(value: Any) -> Any:
    """Returns a copy of a frozen model or dataclass with everything in it frozen."""
    is_model, name = isinstance(value, BaseModel), type(value).__name__
    if not (value.model_config.get("frozen") if is_model else value.__dataclass_params__.frozen):
        remedy = f"class {name}(BaseModel, frozen=True)" if is_model else "@dataclass(frozen=True)"
        raise ValueError(
            f"an event cannot hold the {'model' if is_model else 'dataclass'} {name}, which can be changed by each "
            f"subscriber: declare it as {remedy}"
        )
    copied = copy(value)
    for field in type(value).model_fields if is_model else value.__dataclass_fields__:
        was = getattr(value, field)
        if (now := frozen(was)) is not was:
            _set(copied, field, now)
    return copied


def _array_refused(value: Any) -> ValueError:
    return ValueError(
        f"an event cannot hold {type(value).__name__} {getattr(value, 'dtype', '')}{list(np.shape(value))}: use "
        "array.tolist(), or for one dimension of numbers a field of type eventtrain.Column"
    )


def without_numpy_scalars(value: Any) -> Any:
    """Returns ``value`` with each NumPy scalar in its dicts, lists and tuples replaced by the equal Python one.

    Raises:
        ValueError: there is none, as for ``np.longdouble``, or a list or dict contains itself.
    """
    try:
        return _without_numpy_scalars(value)
    except RecursionError:
        raise ValueError("an event cannot hold lists and dicts that contain themselves") from None


def _without_numpy_scalars(value: Any) -> Any:
    if isinstance(value, np.generic):
        item = value.item()
        if isinstance(item, np.generic) or not isinstance(item, (bool, int, float, str)):
            raise ValueError(
                f"an event cannot hold {type(value).__name__}: convert it to a Python number or text"
            )
        return item
    if type(value) is dict:
        return {key: _without_numpy_scalars(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_numpy_scalars, value))
    return value


MOST_NESTED = 100
"""Lists and dicts in each other in a part of type ``Any``. Pydantic parses 200, those around the part included."""
MOST_INTEGER_BITS = 14_000
"""Of an integer in a part of type ``Any``. Pydantic parses 4,300 digits."""


def _require_json(value: Any, depth: int = 0) -> Any:
    """Returns ``value``, which is in a part of type ``Any``, where JSON alone decides what is read back.

    Raises:
        ValueError: something else, or nothing, would be read back. A field's type can say what to read.
    """
    if isinstance(value, str):
        return _require_json_text(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _any_refused(f"{value}, which JSON has as text", "float")
    elif isinstance(value, int):
        if value.bit_length() > MOST_INTEGER_BITS:
            raise _any_refused(f"an integer of {value.bit_length()} bits", "str, for its digits")
    elif isinstance(value, (list, dict)):
        if depth == MOST_NESTED:
            raise _any_refused(f"lists and dicts that are nested more than {MOST_NESTED} deep", "str")
        for item in value.values() if isinstance(value, dict) else value:
            _require_json(item, depth + 1)
        if isinstance(value, dict):
            for key in value:
                _require_json_text(key)
    elif hasattr(value, "__array__"):
        raise _array_refused(value)
    elif value is not None:
        name = type(value).__name__
        raise _any_refused(f"{name} (JSON has none)", "tuple[int, ...]" if name == "tuple" else name)
    return value


def _require_json_text(text: Any) -> Any:
    if not isinstance(text, str):
        raise _any_refused(f"the key {text!r}, which is not text", f"dict[{type(text).__name__}, ...]")
    if text != escape_surrogates(text):
        raise _any_refused(f"{text!r}, which has half of a surrogate pair", "bytes")
    return text


def _any_refused(what: str, remedy: str) -> ValueError:
    return ValueError(
        f"a part of type Any cannot hold {what}: it would not be read back from JSON as it is. Declare the type in the "
        f"event's class, such as {remedy}"
    )


_NO_SCHEMAS = {
    "config",
    "cls",
    "expected",
    "members",
    "metadata",
    "default",
    "serialization",
    "computed_fields",
}
"""Keys of a core schema whose values must stay as they are."""


def _json_in_any(schema: Any) -> Any:
    """Returns a copy of a core schema in which each part of type ``Any`` takes only what JSON gives back."""
    if isinstance(schema, (list, tuple)):
        return type(schema)(map(_json_in_any, schema))
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "any" and "serialization" not in schema:
        return core_schema.no_info_before_validator_function(_require_json, core_schema.any_schema())
    copy = {key: value if key in _NO_SCHEMAS else _json_in_any(value) for key, value in schema.items()}
    if copy.get("type") == "dict" and schema.get("keys_schema", {}).get("type") == "any":
        copy["keys_schema"] = core_schema.no_info_before_validator_function(
            _require_json_text, core_schema.any_schema()
        )
    if copy.get("type") == "default" and copy != schema:
        copy["validate_default"] = True
    return copy


_OBJECTS = {"model", "dataclass", "typed-dict", "definition-ref"}
"""Types of core schemas whose parts are declared in a class of their own."""


def _has_objects(schema: Any, resolve: Callable[[CoreSchema], CoreSchema]) -> bool:
    """Whether a core schema has a part that is declared in another class, and that class is not a ``Frozen``."""
    if isinstance(schema, (list, tuple)):
        return any(_has_objects(part, resolve) for part in schema)
    if not isinstance(schema, dict):
        return False
    if schema.get("type") in _OBJECTS:
        with suppress(LookupError):  # it is still being made
            if schema["type"] == "definition-ref":
                schema = resolve(cast(CoreSchema, schema))
        return not issubclass(_model_in(schema).get("cls", object), Frozen)
    return any(_has_objects(part, resolve) for key, part in schema.items() if key not in _NO_SCHEMAS)


def _model_in(schema: Any) -> dict[str, Any]:
    """Returns the schema of a model without the validators around it."""
    while "cls" not in schema and "schema" in schema:
        schema = schema["schema"]
    return schema


_reading_back = ContextVar("_reading_back", default=False)


def _require_round_trip(event: Frozen) -> None:
    """Checks that the event's JSON gives it back. For those with parts that ``_json_in_any`` does not see.

    Raises:
        ValueError: something else, or nothing, would be read back.
    """
    kind, token = type(event), _reading_back.set(True)
    try:
        back = kind.model_validate_json(event.model_dump_json()).__dict__
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{kind.__name__} cannot be written to JSON and read back: {error}. A model of yours that holds NaN or an "
            'infinity requires model_config = ConfigDict(ser_json_inf_nan="strings", frozen=True)'
        ) from error
    finally:
        _reading_back.reset(token)
    changed = [name for name, value in event.__dict__.items() if not _same(value, back[name])]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} would not be read back from JSON as it is: in a model, dataclass or TypedDict, "
            "declare the type of each part, such as tuple[int, ...] instead of Any"
        )


Number = bool | int | float
"""A scalar in its exact Python type, so that an int64 or a bool metric keeps its value."""

Numbers = Annotated[dict[str, Number], AfterValidator(FrozenDict)]
"""Name to scalar, read-only."""


def escape_surrogates(text: str) -> str:
    """Returns ``text`` with lone surrogates, which UTF-8 and JSON cannot hold, as escapes such as ``\\udc80``."""
    return text.encode("utf-8", "backslashreplace").decode()


Text = Annotated[str, AfterValidator(escape_surrogates)]
"""Text from outside, such as the message of an error: lone surrogates, which JSON cannot hold, become escapes."""


_JSON_VALUES = {
    **dict.fromkeys(("float16", "float32", "float64"), (float, int)),
    **dict.fromkeys((f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), (int,)),
    "bool": (bool,),
}
"""Name of a dtype -> types of the values in a column's JSON."""


def _column_from_json(form: dict[Any, Any]) -> np.ndarray:
    """Returns the array of ``{"dtype": ..., "values": [...]}``.

    Everything is checked before NumPy sees it, which would allocate whatever a dtype or a long text asks for.
    """
    dtype, values = form.get("dtype"), form.get("values")
    if form.keys() != {"dtype", "values"} or not isinstance(dtype, str) or not isinstance(values, list):
        raise ValueError('a column in JSON must be {"dtype": ..., "values": [...]}')
    types = _JSON_VALUES.get(dtype)
    if types is None:
        raise ValueError(
            f"the dtype of a column must be one of {', '.join(_JSON_VALUES)}, got {dtype[:40]!r}"
        )
    special = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf} if float in types else {}
    numbers = [special.get(value, value) if isinstance(value, str) else value for value in values]
    if not all(type(number) in types for number in numbers):
        raise ValueError(f"a value of this column of {dtype} is not one")
    try:
        return np.array(numbers, dtype)
    except OverflowError as error:
        raise ValueError(f"a value of this column is out of range for {dtype}") from error


def _is_frozen_array(array: np.ndarray) -> bool:
    return array.dtype.kind in "biuf" and not array.flags.writeable


def _column(value: Any) -> np.ndarray:
    if isinstance(value, dict):
        value = _column_from_json(value)
    elif isinstance(value, (list, tuple)) and not all(
        isinstance(v, (bool, int, float, np.number)) for v in value
    ):
        raise ValueError("a column must consist of numbers")
    try:
        column = np.asarray(value)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"a column must be a one-dimensional array of numbers ({error})") from error
    if column.ndim != 1 or column.dtype.kind not in "biuf":
        raise ValueError(
            f"a column must be a one-dimensional array of numbers, got {column.dtype}{list(column.shape)}"
        )
    if column.flags.writeable:
        column = column.copy()
        column.flags.writeable = False
    return column


Column = Annotated[
    np.ndarray,
    PlainValidator(_column),
    PlainSerializer(
        lambda c: {"dtype": c.dtype.name, "values": c.tolist()}, return_type=dict[str, Any], when_used="json"
    ),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {"dtype": {"type": "string"}, "values": {"type": "array"}},
            "required": ["dtype", "values"],
        }
    ),
]
"""A read-only one-dimensional NumPy array; in JSON ``{"dtype": ..., "values": [...]}``."""

Columns = Annotated[dict[str, Column], AfterValidator(FrozenDict)]
"""Name to column, read-only."""


def _array_from_json(form: dict[Any, Any]) -> np.ndarray:
    shape = form.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):  # pyright: ignore[reportUnknownVariableType]
        raise ValueError('an array in JSON must be {"dtype": ..., "shape": [...], "values": [...]}')
    values = _column_from_json({name: part for name, part in form.items() if name != "shape"})
    if values.size != math.prod(shape):  # pyright: ignore[reportUnknownArgumentType]
        raise ValueError(f"an array of the shape {shape} cannot have {values.size} values")
    return values.reshape(shape)  # pyright: ignore[reportUnknownArgumentType]


def read_only_array(value: Any) -> np.ndarray:
    """Returns the array of a field, from Python or from JSON, read-only. Raises ValueError if it holds no numbers."""
    array = _array_from_json(value) if isinstance(value, dict) else np.asarray(value)
    if array.dtype.kind not in "biuf" or array.dtype.name not in _JSON_VALUES:
        raise ValueError(f"an array must hold bools, integers or floats of up to 64 bits, got {array.dtype}")
    if array.flags.writeable:
        array = array.copy()
        array.flags.writeable = False
    return array


Array = Annotated[
    np.ndarray,
    PlainValidator(read_only_array),
    PlainSerializer(
        lambda a: {"dtype": a.dtype.name, "shape": list(a.shape), "values": a.reshape(-1).tolist()},
        return_type=dict[str, Any],
        when_used="json",
    ),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "dtype": {"type": "string"},
                "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                "values": {"type": "array"},
            },
            "required": ["dtype", "shape", "values"],
        }
    ),
]
"""A read-only NumPy array of any shape; in JSON ``{"dtype": ..., "shape": [...], "values": [...]}``, row by row."""

Arrays = Annotated[dict[str, Array], AfterValidator(FrozenDict)]
"""Name to array, read-only."""


def _same(a: Any, b: Any) -> bool:
    """Compares with NaN equal to NaN, so that an event equals what its own JSON parses to."""
    if a is b:
        return True
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return (
            isinstance(a, np.ndarray)
            and isinstance(b, np.ndarray)
            and a.dtype == b.dtype
            and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        )
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, BaseModel) and not isinstance(a, Frozen):
        return type(a) is type(b) and _same(a.__dict__, b.__dict__)
    if is_dataclass(a) and not isinstance(a, type):
        return type(a) is type(b) and all(_same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return isinstance(a, list) == isinstance(b, list) and len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b) or (a != a and b != b)


def snake_case(name: str) -> str:
    """Converts ``StepCompleted`` to ``step_completed``, ``LRChanged`` to ``lr_changed``, ``SawNaN`` to ``saw_nan``."""
    name = name.replace("NaN", "Nan").replace("MLflow", "Mlflow")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field, PrivateAttr))
class _FrozenMetaclass(ModelMetaclass):
    """Makes type checkers report assignments to a field, in subclasses too.

    With ``class Event(BaseModel, frozen=True)`` they would ask every subclass to repeat ``frozen=True``.
    """


_IMMUTABLE = {str, int, float, bool, type(None), datetime, FrozenDict}


class Frozen(BaseModel, metaclass=_FrozenMetaclass):
    """A frozen model whose ``kind`` is its class name in snake_case, unless the class declares another one.

    Unknown fields are refused. Dicts, lists and sets in fields are read-only, NumPy scalars become Python ones, and
    other arrays than a ``Column`` are refused. NaN and infinities survive JSON as the strings ``"NaN"`` and
    ``"Infinity"``. A part of type ``Any`` takes only what JSON gives back: None, bools, finite numbers, text, and lists
    and dicts (with text as keys) of these. Models and dataclasses in fields must be frozen, and be read back from JSON
    as they are.

    The classes of eventtrain declare ``kind`` as a ``Literal``, so that ``event.kind == "epoch_completed"`` narrows a
    union for type checkers.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_inf_nan="strings", validate_default=False, allow_inf_nan=True
    )

    shared: ClassVar[bool] = False
    """Whether instances are shared by subscribers, so that what their fields hold is made read-only too."""
    _holds_objects: ClassVar[bool] = False
    """Whether fields hold models, dataclasses or typed dicts of the user."""
    kind: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        annotations = inspect.get_annotations(cls)
        if "kind" not in annotations:
            # A Literal field and not a computed one, because extra="forbid" must accept it when parsing.
            kind = snake_case(cls.__name__)
            cls.__annotations__ = {**annotations, "kind": Literal[kind]}
            cls.kind = kind

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        if not cls.shared:
            return schema
        cls._holds_objects = _has_objects(_model_in(schema)["schema"], handler.resolve_ref_schema)
        return _json_in_any(schema)

    @model_validator(mode="wrap")
    @classmethod
    def _freeze(cls, given: Any, validate: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        if not cls.shared:
            return validate(given)
        if info.mode != "json" and isinstance(given, dict):
            for value in given.values():  # pyright: ignore[reportUnknownVariableType]
                if type(value) not in _IMMUTABLE:  # pyright: ignore[reportUnknownArgumentType]
                    given = without_numpy_scalars(given)
                    break
        self = _freeze_fields(validate(given))
        if cls._holds_objects and not _reading_back.get():
            _require_round_trip(self)
        return self

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and _same(self.__dict__, other.__dict__)

    def __hash__(self) -> int:
        return hash(self.kind)


F = TypeVar("F", bound=Frozen)


def _freeze_fields(model: F) -> F:
    fields: Any = model.__dict__  # of the frozen model itself
    for name, value in fields.items():
        if type(value) not in _IMMUTABLE:
            is_default = isinstance(value, np.ndarray) and name not in model.model_fields_set
            fields[name] = _column(value) if is_default else frozen(value)  # defaults are not validated
    return model


def kind_of(model: type[Frozen]) -> str:
    """Returns the ``kind`` of the instances of a class."""
    return model.model_fields["kind"].default


@dataclass(frozen=True)
class ByKind:
    """Annotation of a union of ``Frozen`` classes: told apart by ``kind``, and fast to parse from JSON.

    Beside ``Field(discriminator="kind")`` it leaves out what only Python objects need: Pydantic converts JSON to them
    for a validator of mode "wrap". 3.8 us for a StepCompleted, and 8.3 with it.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices: dict[str, CoreSchema] = {}
        for cls in get_args(source):
            python = handler.generate_schema(cls)
            json = _without_conversion(cls, handler.resolve_ref_schema(python))
            choices[kind_of(cls)] = core_schema.json_or_python_schema(json, python) if json else python
        return core_schema.tagged_union_schema(choices, discriminator="kind")

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        choices: Any = {
            kind: choice["python_schema"] if choice["type"] == "json-or-python" else choice
            for kind, choice in schema["choices"].items()
        }
        return handler(core_schema.tagged_union_schema(choices, discriminator="kind"))


def _without_conversion(cls: type[Frozen], schema: Any) -> Any:
    """Returns the schema of ``cls`` for JSON, without ``Frozen._freeze``; None if that is not found in it."""
    if not schema["type"].startswith("function-") or "schema" not in schema:
        return None
    outside = {key: value for key, value in schema.items() if key not in ("ref", "schema")}
    if getattr(schema["function"]["function"], "__qualname__", "") != "Frozen._freeze":
        inside = _without_conversion(cls, schema["schema"])
        return inside and {**outside, "schema": inside}
    if not cls.shared:
        return schema["schema"]
    return core_schema.no_info_after_validator_function(_freeze_fields, schema["schema"])


def copies(model: F, changes: Iterable[Mapping[str, Any]]) -> list[F]:
    """Returns one copy of ``model`` per entry of ``changes``, with those fields replaced and *not validated again*.

    For many events of one class whose values are right by construction: validating the first and copying the rest
    costs about a third. The caller is responsible for names and types; dicts must already be ``FrozenDict``.
    """
    cls, fields, fields_set = type(model), model.__dict__, model.__pydantic_fields_set__
    made: list[F] = []
    for change in changes:
        copy = _new(cls)
        _set(copy, "__dict__", {**fields, **change})
        # Shared: Pydantic never changes it in place. The other two are what Pydantic's own copies get.
        _set(copy, "__pydantic_fields_set__", fields_set)
        _set(copy, "__pydantic_extra__", None)
        _set(copy, "__pydantic_private__", None)
        made.append(copy)
    return made


_new, _set = object.__new__, object.__setattr__  # the frozen model's own refuse
