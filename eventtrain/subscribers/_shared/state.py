"""What a subscriber saves, as plain JSON data with a version, and how it is read back. Shared by all of them; pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from eventtrain.errors import StateError

S = TypeVar("S", bound="SavedState")


class SavedState(BaseModel):
    """Base of what ``state_dict`` gives. A subclass declares ``version: Literal[n] = n`` and its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    def to_json(self) -> dict[str, Any]:
        """Dicts, lists, strings, numbers, booleans and None; NaN and infinities, which JSON lacks, as text."""
        return json.loads(self.model_dump_json())

    @classmethod
    def parse(cls: type[S], owner: str, data: Mapping[str, Any]) -> S:
        """What ``to_json`` gave; ``owner`` is the subscriber's name.

        Raises:
            StateError: another version, or data that does not fit.
        """
        known = cls.model_fields["version"].default
        version = data.get("version") if isinstance(data, Mapping) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        if version != known:
            raise StateError(
                f"{owner} cannot take over a state of version {version!r}; it knows version {known}. Resume with the "
                "version of eventtrain that wrote it, or start without it."
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "state"
            raise StateError(
                f"{owner} cannot take over its state: {key}: {first['msg']} (given: {first['input']!r}). The state is "
                "broken or of another subscriber; start without it."
            ) from error
