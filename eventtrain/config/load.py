"""``load_subscribers``: a file's tables as subscribers, and all that ``eventtrain run`` takes from a file."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any, Self, Union

from pydantic import BaseModel, Discriminator, Field, create_model, model_validator

from eventtrain.bus.bus import EventBus
from eventtrain.config.model import build, subscriber_config
from eventtrain.config.names import subscriber_type, type_names
from eventtrain.config.overrides import override
from eventtrain.config.problems import validated
from eventtrain.config.read import Table, read
from eventtrain.config.schema import TABLE, json_schema
from eventtrain.errors import ConfigurationError, EventTrainError
from eventtrain.subscribers.base import Subscriber, subscribe


class FitConfig(BaseModel):
    """The section ``[fit]``: how long to train, in epochs or in steps."""

    model_config = TABLE

    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _not_both(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self


@dataclass(frozen=True)
class RunConfig:
    """What a file says about a run."""

    fit: FitConfig
    subscribers: list[Subscriber]


def load_subscribers(path: str | Path, *, overrides: Sequence[str] = ()) -> list[Subscriber]:
    """The subscribers that a TOML or YAML file describes, in its order, for ``Trainer(subscribers=...)``.

    Each ``[[subscribers]]`` table has a ``type`` (``"early_stopping"``) and parameters of that class; see
    ``subscriber_config``. Other packages offer types by the entry-point group ``eventtrain.subscribers``. Blocks.

    Args:
        path: ends in .toml, .yaml or .yml.
        overrides: such as ``"early_stopping.patience=5"``, as after ``--set`` of ``eventtrain run``.

    Raises:
        ConfigurationError: names file, table and key; an unknown key or type also the nearest one there is. The whole
            file is checked, ``[fit]`` too. Values of a table that may hold secrets are in no message.
    """
    return load_run(path, overrides).subscribers


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Everything that a file says. As ``load_subscribers``."""
    file = read(path)
    for text in overrides:
        override(file, text)
    with _placed(file.fit):
        fit = validated(FitConfig, file.fit)
    return RunConfig(fit, [_subscriber(table) for table in file.subscribers])


def run_json_schema() -> dict[str, Any]:
    """JSON Schema of a whole file, with every type that is installed, for editors."""
    models: list[Any] = []
    for name in type_names():
        try:
            models.append(subscriber_config(subscriber_type(name), name))
        except ConfigurationError:  # not for files, or broken: whoever uses it is told why
            continue
    tables = list[Annotated[Union[tuple(models)], Discriminator("type")]]  # noqa: UP007  # pyright: ignore
    return json_schema(
        create_model("RunFile", __config__=TABLE, fit=(FitConfig, None), subscribers=(tables, []))
    )


def _subscriber(table: Table) -> Subscriber:
    with _placed(table):
        name = table.values.get("type")
        if not isinstance(name, str):
            raise ConfigurationError(
                f'needs a type, such as type = "early_stopping": one of {", ".join(type_names())}.'
            )
        cls = subscriber_type(name)
        subscriber = build(cls, validated(subscriber_config(cls, name), table))
        subscribe(EventBus(), subscriber)  # finds out now whether its options fit together
        return subscriber


@contextmanager
def _placed(table: Table) -> Generator[None]:
    """Say of whatever goes wrong where in the file it was."""
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, EventTrainError) else f"{type(error).__name__}: {error}"
        several = "\n" in text
        raise ConfigurationError(
            f"{table.label}:\n{indent(text, '  ')}" if several else f"{table.label}: {text}"
        ) from error
