"""Names of subscriber classes in a file (``type = "early_stopping"``), built in and from other packages."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from eventtrain import subscribers
from eventtrain.errors import ConfigurationError, did_you_mean
from eventtrain.events.models import snake_case
from eventtrain.subscribers.base import Subscriber

GROUP = "eventtrain.subscribers"
"""The entry-point group by which a package offers classes: ``name = "package.module:Class"``."""

NOT_IN_FILES = {"lambda"}
"""Types whose constructor requires functions, which a file cannot contain; the error for using one says so."""


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
