"""``subscriber_config``: a subscriber's constructor as a Pydantic model of the table that describes it, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    SecretBytes,
    SecretStr,
    create_model,
)

from eventtrain.bus.options import OnError
from eventtrain.config.schema import TABLE, fits_a_file
from eventtrain.errors import ConfigurationError
from eventtrain.events.models import snake_case
from eventtrain.events.names import EventClass
from eventtrain.subscribers.base import Subscriber

Boundaries = Annotated[int, Field(ge=0)]
NoneInWords = Annotated[Literal["none"], AfterValidator(lambda _: None)]


class SubscriptionOptions(TypedDict):
    """Subscription options that any table may set; they become attributes of the instance."""

    name: str | None
    every: Annotated[int, Field(ge=1)]
    every_s: Annotated[float, Field(gt=0)] | None
    lag: Boundaries | dict[EventClass, Boundaries | None] | None
    timeout_s: Annotated[float, Field(gt=0)] | None
    on_error: OnError
    disable_after: Annotated[int, Field(ge=1)] | None


def subscriber_config(cls: type[Subscriber], type_name: str | None = None) -> type[BaseModel]:
    """The Pydantic model of a table that describes a ``cls``, made from the signature of its constructor.

    Fields: ``type``, always ``type_name`` (the class' name in snake_case if None); each parameter, with its annotation
    and default; the subscription options ``name``, ``every``, ``every_s``, ``lag``, ``timeout_s``, ``on_error`` and
    ``disable_after``, where no parameter has that name. Left out are parameters with a default that no file can give (a
    function, a Console), ``*args`` and ``**kwargs``. An annotation may hold Pydantic validators, ``Annotated[Callable,
    BeforeValidator(...)]`` say. Where text is no value of its own, ``"none"`` stands for None, which TOML lacks.

    A class whose constructor cannot be described so has a classmethod ``from_config(cls, ...)`` that returns an
    instance; its parameters are then taken instead.

    Raises:
        ConfigurationError: a parameter without a default cannot come from a file, is called ``type``, or has an
            annotation that cannot be resolved.
    """
    parameters = _signature(cls).parameters
    hints = _hints(cls)
    fields: dict[str, Any] = {"type": (Literal[type_name or snake_case(cls.__name__)], ...)}
    for name, annotation in get_type_hints(SubscriptionOptions, include_extras=True).items():
        if name not in parameters:
            fields[name] = (_or_none_in_words(annotation), getattr(cls, name))
    for name, parameter in parameters.items():
        annotation = _secret(hints.get(name, Any))
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name == "type" or not fits_a_file(annotation):
            if parameter.default is parameter.empty:
                raise ConfigurationError(
                    f"{cls.__name__} cannot be described in a file: its parameter {name!r} "
                    f"({inspect.formatannotation(hints.get(name, Any))}) has no default, and nothing in a file can "
                    "stand for it. Build it in Python: Trainer(subscribers=[...])."
                )
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        # A model has methods of its own (json, copy), and no fields of private names.
        taken = hasattr(BaseModel, name) or name.startswith("_")
        fields[f"parameter_{name}" if taken else name] = (
            _or_none_in_words(annotation),
            Field(default, alias=name) if taken else default,
        )
    return create_model(
        f"{cls.__name__}Config", __config__=TABLE, __doc__=f"A table for {cls.__name__}.", **fields
    )


def build(cls: type[Subscriber], config: BaseModel) -> Subscriber:
    """An instance as ``config`` says, a model of ``subscriber_config(cls)``. What it leaves out, the class decides."""
    arguments = _signature(cls).bind_partial()
    options: dict[str, Any] = {}
    for field in config.model_fields_set - {"type"}:
        name = type(config).model_fields[field].alias or field
        place = arguments.arguments if name in arguments.signature.parameters else options
        place[name] = getattr(config, field)
    subscriber = _maker(cls)(*arguments.args, **arguments.kwargs)
    for name, value in options.items():
        setattr(subscriber, name, value)
    return subscriber


def _maker(cls: type[Subscriber]) -> Callable[..., Subscriber]:
    return getattr(cls, "from_config", cls)


def _signature(cls: type[Subscriber]) -> inspect.Signature:
    return inspect.signature(_maker(cls))


def _hints(cls: type[Subscriber]) -> dict[str, Any]:
    try:
        return get_type_hints(getattr(cls, "from_config", cls.__init__), include_extras=True)
    except NameError as error:
        raise ConfigurationError(
            f"{cls.__name__} cannot be described in a file: an annotation of its parameters cannot be resolved "
            f"({error}). Import that name outside of `if TYPE_CHECKING`."
        ) from error


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _secret(annotation: Any) -> Any:
    """``str | SecretStr`` without ``str``, so that what comes from a file is kept secret."""
    members = _members(annotation)
    if SecretStr in members or SecretBytes in members:
        return Union[tuple(member for member in members if member not in (str, bytes))]  # noqa: UP007
    return annotation


def _or_none_in_words(annotation: Any) -> Any:
    if type(None) not in _members(annotation):
        return annotation
    whole = Annotated[
        annotation, "one choice"
    ]  # else its own choices would be tried from left to right as well
    return Annotated[Union[whole, NoneInWords], Field(union_mode="left_to_right")]  # noqa: UP007
