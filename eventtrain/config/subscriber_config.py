"""The subscriber class for ``type = "early_stopping"``, and its constructor as a Pydantic model of such a table."""

from __future__ import annotations

import inspect
from importlib.metadata import EntryPoint, entry_points
from types import UnionType
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BaseModel, Field, SecretBytes, SecretStr, create_model

from eventtrain import subscribers
from eventtrain.bus.options import OnError
from eventtrain.config.validation import TABLE, fits_a_file
from eventtrain.errors import ConfigurationError, did_you_mean
from eventtrain.events.models import snake_case
from eventtrain.events.names import EventClass
from eventtrain.subscribers.base import Subscriber
from eventtrain.validation.annotations import checked

GROUP = "eventtrain.subscribers"
"""The entry-point group by which a package offers classes: ``name = "package.module:Class"``."""

NOT_IN_FILES = {"lambda", "sample"}
"""Types whose constructor requires functions, which a file cannot contain; the error for using one says so."""

Boundaries = Annotated[int, Field(ge=0)]
NoneAsString = Annotated[Literal["none"], AfterValidator(lambda _: None)]


class SubscriptionOptions(TypedDict):
    """Subscription options that every table may set; they become attributes of the instance."""

    name: str | None
    every: Annotated[int, Field(ge=1)]
    every_s: Annotated[float, Field(gt=0)] | None
    lag: Boundaries | dict[EventClass, Boundaries | None] | None
    timeout_s: Annotated[float, Field(gt=0)] | None
    on_error: OnError
    disable_after: Annotated[int, Field(ge=1)] | None


def type_names() -> list[str]:
    """Returns every name that a file can use, without importing the classes."""
    return sorted({*_built_in(), *entry_points(group=GROUP).names} - NOT_IN_FILES)


def subscriber_type(name: str) -> type[Subscriber]:
    """Imports and returns the class for ``type = name``.

    Raises:
        ConfigurationError: no package offers the name, or several do; or its package cannot be imported, or offers
            something else.
    """
    attribute = _built_in().get(name)
    entries = list(entry_points(group=GROUP, name=name))
    sources = [*(["eventtrain itself"] if attribute is not None else []), *map(_source, entries)]
    if len(sources) > 1:
        raise ConfigurationError(
            f"{name!r} is offered more than once: by {' and '.join(sources)}. Uninstall all but one of them."
        )
    if attribute is not None:
        return getattr(subscribers, attribute)
    if entries:
        return _load(entries[0])
    known = type_names()
    hint = f"{did_you_mean(name, known)} Known types: {', '.join(known)}.".lstrip()
    raise ConfigurationError(f"there is no type {name!r}. {hint}")


@checked
def subscriber_config(cls: type[Subscriber], type_name: str | None = None) -> type[BaseModel]:
    """Returns the Pydantic model of a table that describes a ``cls``, made from the signature of its constructor.

    The fields are ``type``, which is always ``type_name`` (by default the class name in snake_case); each parameter,
    with its annotation and default; and the subscription options ``name``, ``every``, ``every_s``, ``lag``,
    ``timeout_s``, ``on_error`` and ``disable_after``, unless a parameter has that name. Parameters with a default that
    a file cannot contain (a function, a Console), ``*args`` and ``**kwargs`` are omitted. Annotations may contain
    Pydantic validators, for example ``Annotated[Callable, BeforeValidator(...)]``. If a string is not a valid value,
    ``"none"`` means None, which TOML lacks.

    A class whose constructor cannot be described in this way has a classmethod ``from_config(cls, ...)`` that returns
    an instance. Its parameters are then used instead.

    Raises:
        ConfigurationError: a parameter without a default cannot come from a file, is named ``type``, or has an
            annotation that cannot be resolved.
    """
    parameters = _signature(cls).parameters
    hints = _hints(cls)
    if type_name is not None and not type_name.isprintable():
        raise ConfigurationError(
            f"subscriber_config(type_name={type_name!r}): a type must be printable text."
        )
    fields: dict[str, Any] = {"type": (Literal[type_name or snake_case(cls.__name__)], ...)}
    for name, annotation in get_type_hints(SubscriptionOptions, include_extras=True).items():
        if name not in parameters:
            fields[name] = (_or_none_as_string(annotation), getattr(cls, name))
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = _without_plain_text(hints.get(name, Any))
        default = ... if parameter.default is parameter.empty else parameter.default
        if name == "type" or not fits_a_file(annotation):
            if default is ...:
                raise ConfigurationError(
                    f"{cls.__name__} cannot be described in a file: its parameter {name!r} "
                    f"({inspect.formatannotation(hints.get(name, Any))}) has no default, and a file cannot contain a "
                    "value for it. Create it in Python: Trainer(subscribers=[...])."
                )
            continue
        # A model has methods of its own (json, copy), and its fields cannot have private names.
        taken = hasattr(BaseModel, name) or name.startswith("_")
        fields[f"parameter_{name}" if taken else name] = (
            _or_none_as_string(annotation),
            Field(default, alias=name) if taken else default,
        )
    doc = f"A table for {cls.__name__}."
    return create_model(f"{cls.__name__}Config", __config__=TABLE, __doc__=doc, **fields)


def build(cls: type[Subscriber], config: BaseModel) -> Subscriber:
    """Returns an instance for ``config``, a model of ``subscriber_config(cls)``. Unset fields keep their defaults."""
    arguments = _signature(cls).bind_partial()
    options: dict[str, Any] = {}
    for field in config.model_fields_set - {"type"}:
        name = type(config).model_fields[field].alias or field
        place = arguments.arguments if name in arguments.signature.parameters else options
        place[name] = getattr(config, field)
    subscriber = getattr(cls, "from_config", cls)(*arguments.args, **arguments.kwargs)
    for name, value in options.items():
        setattr(subscriber, name, value)
    return subscriber


def _built_in() -> dict[str, str]:
    """Returns name -> attribute of ``eventtrain.subscribers``, without rules and targets, arguments of ``Alerts``."""
    return {
        snake_case(attribute): attribute
        for attribute in subscribers.__all__
        if attribute[0].isupper() and not attribute.endswith(("Rule", "Target"))
    }


def _load(entry: EntryPoint) -> type[Subscriber]:
    offer = f"{entry.name!r} is offered by {_source(entry)}"
    try:
        found: object = entry.load()
    except Exception as error:
        raise ConfigurationError(
            f"{offer}, which cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Subscriber)):
        raise ConfigurationError(f"{offer}, which is not a subclass of eventtrain.Subscriber.")
    return found


def _source(entry: EntryPoint) -> str:
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown package"
    return f"{package} ({entry.value})"


def _signature(cls: type[Subscriber]) -> inspect.Signature:
    return inspect.signature(getattr(cls, "from_config", cls))


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


def _without_plain_text(annotation: Any) -> Any:
    """Removes ``str`` from ``str | SecretStr``, so that a value from a file is kept secret."""
    members = _members(annotation)
    if SecretStr in members or SecretBytes in members:
        return Union[tuple(member for member in members if member not in (str, bytes))]  # noqa: UP007
    return annotation


def _or_none_as_string(annotation: Any) -> Any:
    if type(None) not in _members(annotation):
        return annotation
    # The marker keeps the annotation one choice; its own choices would be tried from left to right as well.
    whole = Annotated[annotation, "one choice"]
    return Annotated[Union[whole, NoneAsString], Field(union_mode="left_to_right")]  # noqa: UP007
