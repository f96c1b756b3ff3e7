"""``--set section.key=value``: what a command line says over a file."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator
from typing import Any

from eventtrain.config.read import RunFile, Table
from eventtrain.errors import ConfigurationError


def override(file: RunFile, text: str) -> None:
    """Put ``section.key=value`` into the table it names.

    The section is ``fit``, a subscriber's ``name`` or else its ``type``, or ``subscribers.0`` for the first. The
    value is read as TOML, and as text where it is none.

    Raises:
        ConfigurationError: it has another form, or names no table or several.
    """
    target, equals, value = text.partition("=")
    section, _, key = target.strip().rpartition(".")
    if not equals or not section or not key:
        raise ConfigurationError(
            f"--set {target}: needs the form section.key=value, such as fit.epochs=3 or early_stopping.patience=5."
        )
    table = _find(file, section, key)
    table.values[key] = _value(value.strip())
    table.overridden[key] = f"--set {section}.{key}"


def _find(file: RunFile, section: str, key: str) -> Table:
    if section == "fit":
        return file.fit
    paths = {f"subscribers.{index}": table for index, table in enumerate(file.subscribers)}
    for attribute in ("name", "type"):
        found = [path for path, table in paths.items() if table.values.get(attribute) == section]
        if len(found) > 1:
            choice = ", ".join(f"{path}.{key}" for path in found)
            raise ConfigurationError(
                f"--set {section}.{key}: {file.path} has several of that {attribute}. Say which: {choice}."
            )
        if found:
            return paths[found[0]]
    if section in paths:
        return paths[section]
    known = list(dict.fromkeys(_sections(file, paths)))
    nearest = difflib.get_close_matches(section, known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(known)}."
    raise ConfigurationError(f"--set {section}.{key}: {file.path} has no {section!r}; {hint}")


def _sections(file: RunFile, paths: dict[str, Table]) -> Iterator[str]:
    yield "fit"
    for table in file.subscribers:
        yield from (str(table.values[word]) for word in ("name", "type") if word in table.values)
    yield from paths


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text
