"""The tables of a configuration file: TOML, or YAML if PyYAML is installed. ``load.py`` checks their contents."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eventtrain.errors import ConfigurationError, did_you_mean, shortened
from eventtrain.subscribers._shared.paths import local_path
from eventtrain.validation.optional_imports import import_optional, require_installed

yaml: Any = import_optional("yaml", extra="yaml", used_by="A YAML file")

SECTIONS = ("fit", "subscribers")
MAX_SIZE = 1_000_000
"""Characters of a file."""
MAX_VALUES = 100_000
"""Values of a file, with the aliases of YAML written out."""
MAX_DEPTH = 50
"""Tables and arrays inside one another."""


@dataclass(frozen=True)
class Table:
    """One table of a file.

    Attributes:
        place: for messages, such as ``run.toml, [[subscribers]] #2``, counted from 1.
        values: key -> value.
        overridden: key -> the ``--set`` that gave its value.
    """

    place: str
    values: dict[str, Any]
    overridden: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def label(self) -> str:
        """The place and, if there is one, the type."""
        kind = self.values.get("type")
        return f'{self.place}, type = "{kind}"' if isinstance(kind, str) else self.place


@dataclass(frozen=True)
class RunFile:
    """The tables of one file."""

    path: Path
    fit: Table
    subscribers: tuple[Table, ...]

    def override(self, text: str) -> None:
        """Sets one value, given as ``section.key=value``.

        The section is ``fit``, a subscriber's ``name`` or else its ``type``, or ``subscribers.0`` for the first one.
        The value is parsed as TOML, and is a string if that fails.

        Raises:
            ConfigurationError: the text has another form, or the section names no table or several.
        """
        target, equals, value = text.partition("=")
        section, _, key = target.strip().rpartition(".")
        if not equals or not section or not key:
            raise ConfigurationError(
                f"--set {target}: expected section.key=value, such as fit.epochs=3 or early_stopping.patience=5."
            )
        table = self._find(section, key)
        table.values[key] = _parse_value(value.strip())
        table.overridden[key] = f"--set {section}.{key}"

    def _find(self, section: str, key: str) -> Table:
        by_index = {f"subscribers.{index}": table for index, table in enumerate(self.subscribers)}
        sections = {"fit": [self.fit]}
        for attribute in ("name", "type"):  # a name hides a type
            words = [word for table in self.subscribers if (word := table.values.get(attribute)) is not None]
            for word in map(str, words):
                named = [table for table in self.subscribers if table.values.get(attribute) == word]
                sections.setdefault(word, named)
        sections |= {path: [table] for path, table in by_index.items()}
        found = sections.get(section, [])
        if len(found) == 1:
            return found[0]
        if found:
            keys = [f"{path}.{key}" for path, table in by_index.items() if table in found]
            raise ConfigurationError(
                f"--set {section}.{key}: {self.path} has {len(found)} tables {section!r}. Use {' or '.join(keys)}."
            )
        hint = did_you_mean(section, sections, f"Known sections: {', '.join(sections)}.")
        raise ConfigurationError(f"--set {section}.{key}: {self.path} has no section {section!r}. {hint}")


def read_run_file(path: str | Path) -> RunFile:
    """Reads a file whose name ends in .toml, .yaml or .yml. Blocks.

    Raises:
        ConfigurationError: the file cannot be read or parsed, PyYAML is missing, or there is a section other than
            ``[fit]`` and ``[[subscribers]]``.
    """
    path = local_path(path, "load_subscribers")
    parse = {".toml": _parse_toml, ".yaml": _parse_yaml, ".yml": _parse_yaml}.get(path.suffix)
    if parse is None:
        raise ConfigurationError(f"{path}: expected a file name that ends in .toml, .yaml or .yml.")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_SIZE + 1)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text.") from error
    except ValueError as error:  # a null character in the path
        raise ConfigurationError(f"{str(path)!r} cannot be read: {error}.") from error
    if len(text) > MAX_SIZE:
        raise ConfigurationError(
            f"{path} has more than {MAX_SIZE:,} characters, so it is not a configuration."
        )
    sections = parse(path, text)
    _require_small(path, sections)
    for name in sections:
        if name not in SECTIONS:
            hint = did_you_mean(str(name), SECTIONS, "Known sections: [fit] and [[subscribers]].")
            raise ConfigurationError(f"{path}: unknown section {shortened(repr(name))}. {hint}")
    fit, listed = sections.get("fit", {}), sections.get("subscribers", [])
    if not isinstance(fit, dict):
        raise ConfigurationError(f"{path}: `fit` must be a table: [fit].")
    if not isinstance(listed, list) or not all(isinstance(table, dict) for table in listed):
        raise ConfigurationError(f"{path}: `subscribers` must be an array of tables: [[subscribers]].")
    tables = (Table(f"{path}, [[subscribers]] #{n}", table) for n, table in enumerate(listed, start=1))
    return RunFile(path, Table(f"{path}, [fit]", fit), tuple(tables))


def _require_small(path: Path, sections: dict[str, Any]) -> None:
    """Raises ConfigurationError if the values are too many or too deep, as a few aliases of YAML can make them."""
    level: list[Any] = [sections]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            below += (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, set)) else ()
            )
            if len(below) > MAX_VALUES:
                raise ConfigurationError(
                    f"{path} has more than {MAX_VALUES:,} values, with aliases written out."
                )
        if not below:
            return
        level = below
    raise _too_deep(path)


def _too_deep(path: Path) -> ConfigurationError:
    return ConfigurationError(
        f"{path} has tables or arrays more than {MAX_DEPTH} deep, or one that contains itself."
    )


def _parse_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text  # more keys: the text had several lines


def _parse_toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        # From None: newer errors carry the text, which may hold secrets.
        raise ConfigurationError(f"{path} is not valid TOML: {error}.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ConfigurationError(f"{path} cannot be read as TOML: {type(error).__name__}.") from None


def _parse_yaml(path: Path, text: str) -> dict[str, Any]:
    require_installed(yaml)
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):  # PyYAML takes quadratic time for them
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise _too_deep(path)
    try:
        sections = yaml.load(text, Loader=_yaml_loader())
    except yaml.MarkedYAMLError as error:
        # Its str() quotes the line, and its problem quotes tags and aliases.
        mark = error.problem_mark
        problem = re.sub(r"(['\"]).*\1", "...", error.problem or "something is wrong")
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigurationError(f"{path} is not valid YAML: {problem}{place}.") from None
    except Exception as error:  # a YAMLError, or of a date, a number or a key that Python does not have
        raise ConfigurationError(f"{path} is not valid YAML: {type(error).__name__}.") from None
    if not isinstance(sections, dict | None):
        raise ConfigurationError(f"{path}: the top level must be a mapping with `fit` and `subscribers`.")
    return sections or {}


def _yaml_loader() -> Any:
    """Returns PyYAML's safe loader with two changes: ``1e-4`` is a number, and a key given twice is an error."""

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    problem = f"found the key `{key.value}` twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(str(key.value))
            return super().construct_mapping(node, deep)

    # YAML 1.1 requires a point and a signed exponent, and takes everything else as a string.
    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+\Z")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader
