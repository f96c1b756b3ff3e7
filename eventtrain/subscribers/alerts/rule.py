"""``AlertRule``: base of the rules of ``Alerts``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from eventtrain.validation.arguments import require_choice, require_count, require_number

Severity = Literal["info", "warning", "critical"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
"""Mild to severe."""

Findings = Mapping[str, str]
"""Subject -> message of what is wrong. Empty if nothing is; the subject is "" for a rule that has only one."""


@dataclass(frozen=True, kw_only=True)
class AlertRule:
    """Base of all rules: a frozen configuration that also judges.

    A new rule is one class: a subclass of ``MetricRule``, ``EventRule`` or ``TimedRule`` that declares its options,
    ``type``, its name in files, and ``label_format``, and implements ``judge`` or ``watch``. It is listed in
    ``rules.RULES``, and is public if it is listed in ``eventtrain.subscribers``.

    Attributes:
        label_format: the alert's name if ``name`` is None, with options in braces.
        name: of the alert. Unique among the rules of an ``Alerts``.
        severity: "info", "warning" or "critical".
        for_s, for_steps: an alert is raised only after the condition has held for that many seconds and steps without
            interruption.
        cooldown_s: seconds after an alert is resolved in which it is not raised again.
    """

    label_format: ClassVar[str]
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
        """In a file, ``type`` is required for every rule but a threshold."""
        found = handler(schema)
        whole = handler.resolve_ref_schema(found)
        if whole["properties"]["type"]["const"] != "threshold":
            whole["required"] = [*whole.get("required", ()), "type"]
        return found

    @property
    def label(self) -> str:
        """Name of the alert."""
        return self.name if self.name is not None else self._default_label()

    def _default_label(self) -> str:
        return self.label_format.format_map(vars(self))
