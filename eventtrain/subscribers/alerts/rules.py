"""All rules of ``Alerts``, and the type of a rule in a config file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Discriminator, Tag

from eventtrain.errors import did_you_mean
from eventtrain.subscribers.alerts import event_rules as events
from eventtrain.subscribers.alerts import metric_rules as metrics
from eventtrain.subscribers.alerts import timed_rules as timed

RULES: tuple[type[Any], ...] = (  # Any: `type` is another Literal in each class, so no base declares it
    metrics.Rule,
    metrics.SpikeRule,
    metrics.NoImprovementRule,
    metrics.ForecastRule,
    timed.StallRule,
    timed.SlowSubscriberRule,
    events.CheckpointFailedRule,
    timed.LowDiskRule,
    events.RunFailedRule,
    events.RunCompletedRule,
    timed.DeadlineRule,
)
"""Every rule that a file can name by its ``type``."""

_TYPES = [rule.type for rule in RULES]


def _type_of(given: Any) -> str:
    if isinstance(given, Mapping):
        return given.get("type", "threshold")
    return str(getattr(given, "type", "threshold"))


def _require_known_type(given: Any) -> Any:
    kind = given.get("type", "threshold") if isinstance(given, Mapping) else "threshold"
    if kind in _TYPES:
        return given
    known = f"Known types: {', '.join(_TYPES)}."  # the unknown one is not quoted: it may be a secret
    raise ValueError(f"no such type of rule. {did_you_mean(str(kind), _TYPES, known)}")


if TYPE_CHECKING:
    AnyRule = metrics.MetricRule[Any] | events.EventRule | timed.TimedRule
else:
    AnyRule = Annotated[
        reduce(or_, (Annotated[rule, Tag(rule.type)] for rule in RULES)),
        Discriminator(_type_of),
        BeforeValidator(_require_known_type),
    ]
"""A rule; in a file, a table whose ``type`` names it, "threshold" if it has none."""
