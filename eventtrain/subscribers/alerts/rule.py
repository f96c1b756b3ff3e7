"""``CommonRule``: what every rule of ``Alerts`` has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from eventtrain.subscribers._shared.validation import require_choice, require_count, require_number

Severity = Literal["info", "warning", "critical"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
"""Mild to severe."""


@dataclass(frozen=True, kw_only=True)
class CommonRule:
    """What every rule has.

    Attributes:
        name: of the alert; made from the rule if None. Unique among an ``Alerts``' rules.
        severity: "info", "warning" or "critical".
        for_s, for_steps: raised only when it was so for so many seconds and steps without a break.
        cooldown_s: once it is over, it is not raised again for so many seconds.
    """

    name: str | None = None
    severity: Severity = "warning"
    for_s: float = 0.0
    for_steps: int = 0
    cooldown_s: float = 0.0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        require_choice(owner, "severity", self.severity, SEVERITIES)
        require_number(owner, "for_s", self.for_s, at_least=0)
        require_count(owner, "for_steps", self.for_steps)
        require_number(owner, "cooldown_s", self.cooldown_s, at_least=0)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """In a file all but thresholds have to say their type."""
        found = handler(schema)
        whole = handler.resolve_ref_schema(found)
        if whole["properties"]["type"]["const"] != "threshold":
            whole["required"] = [*whole.get("required", ()), "type"]
        return found

    @property
    def label(self) -> str:
        """The alert's name."""
        return self.name if self.name is not None else self._default_label

    @property
    def _default_label(self) -> str:
        raise NotImplementedError
