"""``load_subscribers``: the subscribers that a file describes, and everything that ``eventtrain run`` reads from it."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any, Self, Union

from pydantic import BaseModel, Discriminator, Field, create_model, model_validator
from pydantic_core import to_jsonable_python

from eventtrain.bus.bus import EventBus, core_of
from eventtrain.config.run_file import Table, read_run_file
from eventtrain.config.subscriber_config import build, subscriber_config, subscriber_type, type_names
from eventtrain.config.validation import TABLE, json_schema, validated
from eventtrain.errors import ConfigurationError, EventTrainError, first_lines
from eventtrain.subscribers.base import Subscriber, subscribe
from eventtrain.validation.annotations import checked

SECRET = re.compile(r"token|secret|password|passwd|key|credential|header|auth|option", re.IGNORECASE)
"""Names of parameters whose values are not printed, as are all URLs."""


class FitConfig(BaseModel):
    """The section ``[fit]``: the length of the training, in epochs or in steps."""

    model_config = TABLE

    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _not_both(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("expected epochs or steps, not both")
        return self


@dataclass(frozen=True)
class RunConfig:
    """The contents of a file."""

    fit: FitConfig
    subscribers: list[Subscriber]


@checked
def load_subscribers(path: str | Path, *, overrides: Sequence[str] = ()) -> list[Subscriber]:
    """Returns the subscribers that a TOML or YAML file describes, for ``Trainer(subscribers=...)``. Blocks.

    They are in the order of the file. Each ``[[subscribers]]`` table has a ``type`` (``"early_stopping"``) and the
    parameters of that class; see ``subscriber_config``. Other packages offer types by the entry-point group
    ``eventtrain.subscribers``.

    Args:
        path: a file whose name ends in .toml, .yaml or .yml.
        overrides: such as ``"early_stopping.patience=5"``, as after ``--set`` of ``eventtrain run``.

    Raises:
        ConfigurationError: names file, table and key, and the closest valid key or type if one is unknown. The complete
            file is checked, including ``[fit]``. The values of a table that may contain secrets are in no message.
    """
    return load_run(path, overrides).subscribers


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the complete contents of a file; arguments and errors as for ``load_subscribers``."""
    file = read_run_file(path)
    for text in overrides:
        file.override(text)
    with _naming(file.fit):
        fit = validated(FitConfig, file.fit)
    return RunConfig(fit, [_subscriber(table) for table in file.subscribers])


def described(path: str | Path, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Returns the tables of subscribers as JSON data, with ``overrides``; values that may hold a secret are "..."."""
    file = read_run_file(path)
    for text in overrides:
        file.override(text)
    return [to_jsonable_python(_without_secrets(table.values), fallback=str) for table in file.subscribers]


def _without_secrets(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        items: Any = value.items()  # pyright: ignore[reportUnknownVariableType]
        return {name: _without_secrets(each, str(name)) for name, each in items}
    if isinstance(value, list):
        return [_without_secrets(each, key) for each in value]  # pyright: ignore[reportUnknownVariableType]
    is_secret = SECRET.search(key) or (isinstance(value, str) and "://" in value)
    return "..." if is_secret and value is not None else value


def run_json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a file, with every installed type, for editors."""
    models: list[Any] = []
    for name in type_names():
        try:
            models.append(subscriber_config(subscriber_type(name), name))
        except ConfigurationError:  # not for files, or broken: using it raises this error again
            continue
    tables = list[Annotated[Union[tuple(models)], Discriminator("type")]]  # noqa: UP007  # pyright: ignore
    return json_schema(
        create_model("RunFile", __config__=TABLE, fit=(FitConfig, None), subscribers=(tables, []))
    )


def _subscriber(table: Table) -> Subscriber:
    with _naming(table):
        name = table.values.get("type")
        if not isinstance(name, str):
            raise ConfigurationError(
                f'expected a type, such as type = "early_stopping". Known types: {", ".join(type_names())}.'
            )
        cls = subscriber_type(name)
        subscriber = build(cls, validated(subscriber_config(cls, name), table))
        subscribe(core_of(EventBus()), subscriber)  # raises now if its options do not fit together
        return subscriber


@contextmanager
def _naming(table: Table) -> Generator[None]:
    """Adds the place in the file to every error."""
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, EventTrainError) else f"{type(error).__name__}: {error}"
        text = first_lines(text, 30)
        separator, text = (":\n", indent(text, "  ")) if "\n" in text else (": ", text)
        raise ConfigurationError(f"{table.label}{separator}{text}") from error
