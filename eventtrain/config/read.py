"""A file as tables: TOML, or YAML where PyYAML is installed. Nothing of what a table says is judged here."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eventtrain.errors import ConfigurationError

try:
    from eventtrain.config import yaml_text
except ImportError:
    yaml_text = None

SECTIONS = ("fit", "subscribers")


@dataclass(frozen=True)
class Table:
    """One table, and where it stands.

    Attributes:
        place: such as ``run.toml, [[subscribers]] #2``, counted from 1.
        values: what it says.
        overridden: key -> the ``--set`` that gave its value.
    """

    place: str
    values: dict[str, Any]
    overridden: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def label(self) -> str:
        """For messages: the place and the type."""
        kind = self.values.get("type")
        return f'{self.place}, type = "{kind}"' if isinstance(kind, str) else self.place


@dataclass(frozen=True)
class RunFile:
    """The tables of one file."""

    path: Path
    fit: Table
    subscribers: tuple[Table, ...]


def read(path: str | Path) -> RunFile:
    """Read a file whose name ends in .toml, .yaml or .yml. Blocks.

    Raises:
        ConfigurationError: it cannot be read or parsed, PyYAML is missing, or it has another section than ``[fit]`` and
            ``[[subscribers]]``.
    """
    path = Path(path)
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise ConfigurationError(f"{path}: is none of .toml, .yaml and .yml.")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is no UTF-8 text.") from error
    sections = _parse_toml(path, text) if path.suffix == ".toml" else _parse_yaml(path, text)
    for name in sections:
        if name not in SECTIONS:
            nearest = difflib.get_close_matches(str(name), SECTIONS, n=1, cutoff=0.5)
            hint = f"did you mean {nearest[0]!r}?" if nearest else "there are [fit] and [[subscribers]]."
            raise ConfigurationError(f"{path}: unknown section {name!r}; {hint}")
    fit, listed = sections.get("fit", {}), sections.get("subscribers", [])
    if not isinstance(fit, dict):
        raise ConfigurationError(f"{path}: `fit` has to be a table: [fit].")
    if not isinstance(listed, list) or not all(isinstance(table, dict) for table in listed):
        raise ConfigurationError(f"{path}: `subscribers` has to be an array of tables: [[subscribers]].")
    tables = (Table(f"{path}, [[subscribers]] #{n}", table) for n, table in enumerate(listed, start=1))
    return RunFile(path, Table(f"{path}, [fit]", fit), tuple(tables))


def _parse_toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (
        tomllib.TOMLDecodeError
    ) as error:  # it says where, but newer ones carry the text, with secrets perhaps
        raise ConfigurationError(f"{path} is no TOML: {error}.") from None


def _parse_yaml(path: Path, text: str) -> dict[str, Any]:
    if yaml_text is None:
        raise ConfigurationError(
            f"{path}: reading YAML needs PyYAML. Install it: pip install 'eventtrain[yaml]'. TOML needs nothing."
        )
    try:
        sections = yaml_text.parse(text)
    except ValueError as error:
        raise ConfigurationError(f"{path} is no YAML: {error}.") from None
    if not isinstance(sections, dict | None):
        raise ConfigurationError(
            f"{path}: the outermost level has to be a mapping with `fit` and `subscribers`."
        )
    return sections or {}
