"""Base of events and commands: Pydantic models that are read-only all the way down."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
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
    dataclass_transform,
)

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)

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
    """Returns ``value`` with every dict, list and set in it replaced by a read-only one.

    Raises:
        ValueError: an array in it is not a ``Column``, and has no JSON that it could be read back from.
    """
    if isinstance(value, FrozenDict):
        return value
    if isinstance(value, dict):
        return FrozenDict({key: frozen(item) for key, item in value.items()})
    if isinstance(value, list):
        return FrozenList(map(frozen, value))
    if type(value) is tuple:
        return tuple(map(frozen, value))
    if isinstance(value, set):
        return FrozenSet(value)
    if hasattr(value, "__array__") and not (isinstance(value, np.ndarray) and _is_column(value)):
        raise ValueError(
            f"an event cannot hold {type(value).__name__} {getattr(value, 'dtype', '')}{list(np.shape(value))}: use "
            "array.tolist(), or for one dimension of numbers a field of type eventtrain.Column"
        )
    return value


def without_numpy_scalars(value: Any) -> Any:
    """Returns ``value`` with each NumPy scalar in its dicts, lists and tuples replaced by the equal Python one.

    Raises:
        ValueError: there is none, as for ``np.longdouble``.
    """
    if isinstance(value, np.generic):
        item = value.item()
        if isinstance(item, np.generic) or not isinstance(item, (bool, int, float, str)):
            raise ValueError(
                f"an event cannot hold {type(value).__name__}: convert it to a Python number or text"
            )
        return item
    if type(value) is dict:
        return {key: without_numpy_scalars(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(without_numpy_scalars, value))
    return value


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


def _is_column(array: np.ndarray) -> bool:
    return array.ndim == 1 and array.dtype.kind in "biuf" and not array.flags.writeable


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
    ``"Infinity"``.

    The classes of eventtrain declare ``kind`` as a ``Literal``, so that ``event.kind == "epoch_completed"`` narrows a
    union for type checkers.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_inf_nan="strings", validate_default=False, allow_inf_nan=True
    )

    shared: ClassVar[bool] = False
    """Whether instances are shared by subscribers, so that what their fields hold is made read-only too."""
    kind: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        annotations = inspect.get_annotations(cls)
        if "kind" not in annotations:
            # A Literal field and not a computed one, because extra="forbid" must accept it when parsing.
            kind = snake_case(cls.__name__)
            cls.__annotations__ = {**annotations, "kind": Literal[kind]}
            cls.kind = kind

    @model_validator(mode="wrap")
    @classmethod
    def _freeze(cls, given: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if not cls.shared:
            return validate(given)
        if isinstance(given, dict):
            for value in given.values():  # pyright: ignore[reportUnknownVariableType]
                if type(value) not in _IMMUTABLE:  # pyright: ignore[reportUnknownArgumentType]
                    given = without_numpy_scalars(given)
                    break
        self = validate(given)
        fields: Any = self.__dict__  # of the frozen model itself
        for name, value in fields.items():
            if type(value) not in _IMMUTABLE:
                is_default = isinstance(value, np.ndarray) and name not in self.model_fields_set
                fields[name] = _column(value) if is_default else frozen(value)  # defaults are not validated
        return self

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
