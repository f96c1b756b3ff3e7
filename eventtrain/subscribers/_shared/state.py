"""``SavedState``: base of the versioned plain JSON data that subscribers save in checkpoints and load again. Pure."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from eventtrain.errors import StateError

S = TypeVar("S", bound="SavedState")


class SavedState(BaseModel):
    """Base of what ``state_dict`` returns. A subclass declares ``version: Literal[n] = n`` and its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    def to_json(self) -> dict[str, Any]:
        """Returns dicts, lists, strings, numbers, booleans and None; NaN and infinities, which JSON lacks, as text."""
        return json.loads(self.model_dump_json())

    @classmethod
    def parse(cls: type[S], owner: str, data: Mapping[str, Any]) -> S:
        """Returns the state from which ``to_json`` made ``data``; ``owner`` is the subscriber's name.

        Raises:
            StateError: another version, or invalid data.
        """
        known = cls.model_fields["version"].default
        version = data.get("version") if isinstance(data, Mapping) else None  # pyright: ignore[reportUnnecessaryIsInstance]
        if version != known:
            raise StateError(
                f"{owner} cannot load a state of version {version!r}, only of version {known}. Resume with the version "
                "of eventtrain that wrote it, or start without it."
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "state"
            given = reprlib.repr(first["input"])  # arrays are long
            raise StateError(
                f"{owner} cannot load its state: {key}: {first['msg']} (got {given}). The state is damaged "
                "or belongs to another subscriber; start without it."
            ) from error
