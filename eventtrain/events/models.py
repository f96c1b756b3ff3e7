"""Base of events and commands: Pydantic models that are read-only all the way down."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Self, TypeVar, dataclass_transform

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    WithJsonSchema,
)

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

K = TypeVar("K")
V = TypeVar("V")


class FrozenDict(dict[K, V]):
    """A dict that cannot be changed. It compares, iterates and serialises like any other dict."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError(
            "Events are shared by all subscribers, so their dicts are read-only. Copy one with dict(...)."
        )

    __setitem__ = __delitem__ = __ior__ = _refuse  # pyright: ignore[reportAssignmentType]
    update = setdefault = pop = popitem = clear = _refuse  # pyright: ignore[reportAssignmentType]

    def __reduce__(self) -> tuple[type[Self], tuple[dict[K, V]]]:
        return type(self), (dict(self),)


Number = bool | int | float
"""A scalar in its exact Python type, so that an int64 or a bool metric keeps its value."""

Numbers = Annotated[dict[str, Number], AfterValidator(FrozenDict)]
"""Name to scalar, read-only."""


def escape_surrogates(text: str) -> str:
    """Returns ``text`` with lone surrogates, which UTF-8 and JSON cannot hold, as escapes such as ``\\udc80``."""
    return text.encode("utf-8", "backslashreplace").decode()


Text = Annotated[str, AfterValidator(escape_surrogates)]
"""Text from outside, such as the message of an error: lone surrogates, which JSON cannot hold, become escapes."""


def _column(value: Any) -> np.ndarray:
    if isinstance(value, dict):  # the JSON form
        value = np.array(value["values"], dtype=value["dtype"])
    column = np.asarray(value)
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


class Frozen(BaseModel, metaclass=_FrozenMetaclass):
    """A frozen model whose ``kind`` is its class name in snake_case, unless the class declares another one.

    Unknown fields are refused. NaN and infinities survive JSON as the strings ``"NaN"`` and ``"Infinity"``.

    The classes of eventtrain declare ``kind`` as a ``Literal``, so that ``event.kind == "epoch_completed"`` narrows a
    union for type checkers.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_inf_nan="strings", validate_default=False, allow_inf_nan=True
    )

    kind: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        annotations = inspect.get_annotations(cls)
        if "kind" not in annotations:
            # A Literal field and not a computed one, because extra="forbid" must accept it when parsing.
            kind = snake_case(cls.__name__)
            cls.__annotations__ = {**annotations, "kind": Literal[kind]}
            cls.kind = kind

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and _same(self.__dict__, other.__dict__)

    def __hash__(self) -> int:
        return hash(self.kind)


F = TypeVar("F", bound=Frozen)


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
