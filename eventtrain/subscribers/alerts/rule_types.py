"""The rules of ``Alerts`` by the names that config files give them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Tag

from eventtrain.subscribers.alerts.metric_rules import ForecastRule, NoImprovementRule, Rule, SpikeRule
from eventtrain.subscribers.alerts.rule import CommonRule
from eventtrain.subscribers.alerts.run_rules import (
    CheckpointFailedRule,
    DeadlineRule,
    LowDiskRule,
    RunCompletedRule,
    RunFailedRule,
    SlowSubscriberRule,
    StallRule,
)

RULES: dict[str, type[CommonRule]] = {
    "threshold": Rule,
    "spike": SpikeRule,
    "no_improvement": NoImprovementRule,
    "forecast": ForecastRule,
    "stall": StallRule,
    "slow_subscriber": SlowSubscriberRule,
    "checkpoint_failed": CheckpointFailedRule,
    "low_disk": LowDiskRule,
    "run_failed": RunFailedRule,
    "run_completed": RunCompletedRule,
    "deadline": DeadlineRule,
}
"""``type`` in a file -> its class."""


def _type_of(given: Any) -> str | None:
    return (
        given.get("type", "threshold")
        if isinstance(given, Mapping)
        else str(getattr(given, "type", "threshold"))
    )


def _known(given: Any) -> Any:
    kind = given.get("type", "threshold") if isinstance(given, Mapping) else "threshold"
    if kind in RULES:
        return given
    nearest = difflib.get_close_matches(
        str(kind), RULES, n=1
    )  # what was given is not quoted: a secret perhaps
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(RULES)}"
    raise ValueError(f"no such type of rule; {hint}")


AnyRule = Annotated[
    Annotated[Rule, Tag("threshold")]
    | Annotated[SpikeRule, Tag("spike")]
    | Annotated[NoImprovementRule, Tag("no_improvement")]
    | Annotated[ForecastRule, Tag("forecast")]
    | Annotated[StallRule, Tag("stall")]
    | Annotated[SlowSubscriberRule, Tag("slow_subscriber")]
    | Annotated[CheckpointFailedRule, Tag("checkpoint_failed")]
    | Annotated[LowDiskRule, Tag("low_disk")]
    | Annotated[RunFailedRule, Tag("run_failed")]
    | Annotated[RunCompletedRule, Tag("run_completed")]
    | Annotated[DeadlineRule, Tag("deadline")],
    Discriminator(_type_of),
    BeforeValidator(_known),
]
"""A rule; in a file a table whose ``type`` names it, "threshold" where it names none."""
