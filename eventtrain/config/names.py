"""``type = "early_stopping"``: the names that a file gives to subscriber classes, built in and of other packages."""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points

from eventtrain import subscribers
from eventtrain.errors import ConfigurationError
from eventtrain.events.models import snake_case
from eventtrain.subscribers.base import Subscriber

GROUP = "eventtrain.subscribers"
"""The entry-point group by which a package offers classes: ``name = "package.module:Class"``."""


NOT_IN_FILES = {"lambda"}
"""What needs functions, which no file can give; asked for all the same, its constructor says so."""


def type_names() -> list[str]:
    """Every name that a file can use; no class is loaded for it."""
    return sorted({*_built_in(), *entry_points(group=GROUP).names} - NOT_IN_FILES)


def subscriber_type(name: str) -> type[Subscriber]:
    """The class that ``type = name`` means; it is imported now.

    Raises:
        ConfigurationError: nobody or more than one offers it; its package cannot be imported or offers something else.
    """
    attribute = _built_in().get(name)
    entries = list(entry_points(group=GROUP, name=name))
    if len(entries) + (attribute is not None) > 1:
        offers = [*(["eventtrain itself"] if attribute is not None else []), *map(_source, entries)]
        raise ConfigurationError(
            f"{name!r} is offered more than once: by {' and '.join(offers)}. Uninstall all but one of them."
        )
    if attribute is not None:
        return getattr(subscribers, attribute)
    if entries:
        return _load(entries[0])
    names = type_names()
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    raise ConfigurationError(f"there is no type {name!r}. {hint}Known types: {', '.join(names)}.")


def _built_in() -> dict[str, str]:
    """Name in a file -> attribute of ``eventtrain.subscribers``. Rules and targets are arguments of ``Alerts``."""
    return {
        snake_case(attribute): attribute
        for attribute in subscribers.__all__
        if attribute[0].isupper() and not attribute.endswith(("Rule", "Target"))
    }


def _is_subscriber(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, Subscriber)


def _load(entry: EntryPoint) -> type[Subscriber]:
    try:
        found = entry.load()
    except Exception as error:
        raise ConfigurationError(
            f"{entry.name!r} is offered by {_source(entry)}, which cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if not _is_subscriber(found):
        raise ConfigurationError(
            f"{entry.name!r} is offered by {_source(entry)}, and that is no subclass of eventtrain.Subscriber."
        )
    return found


def _source(entry: EntryPoint) -> str:
    distribution = (
        f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown package"
    )
    return f"{distribution} ({entry.value})"
