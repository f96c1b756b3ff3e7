"""The rules of ``Alerts`` about what happens to a run: judged by single events. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from eventtrain.errors import ConfigurationError
from eventtrain.events import CheckpointCommitted, CheckpointFailed, Event, RunCompleted, RunFailed
from eventtrain.subscribers.alerts.rule import AlertRule, Findings, Severity
from eventtrain.validation.annotations import checked


@dataclass(frozen=True)
class EventRule(AlertRule, ABC):
    """Base of the rules that are judged by single events, of the classes ``events``."""

    events: ClassVar[tuple[type[Event], ...]]

    @abstractmethod
    def judge(self, event: Event) -> Findings:
        """Returns what is wrong after ``event``."""


@checked
@dataclass(frozen=True)
class CheckpointFailedRule(EventRule):
    """A checkpoint failed; resolved by the next one that is committed."""

    label_format = "checkpoint failed"
    events = (CheckpointFailed, CheckpointCommitted)
    severity: Severity = field(default="critical", kw_only=True)
    type: Literal["checkpoint_failed"] = field(default="checkpoint_failed", kw_only=True, repr=False)

    def judge(self, event: Event) -> Findings:
        """Returns the error of a failed checkpoint."""
        return {"": event.error} if isinstance(event, CheckpointFailed) else {}


@dataclass(frozen=True)
class RunEndRule(EventRule):
    """Base of the rules about the end of a run, which are not resolved; each run raises its own alert."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("for_s", self.for_s), ("for_steps", self.for_steps)):
            if value:
                raise ConfigurationError(
                    f"{type(self).__name__}({name}={value!r}): can never be raised, since a run ends at one moment. "
                    f"Leave {name} out."
                )


@checked
@dataclass(frozen=True)
class RunFailedRule(RunEndRule):
    """The run ended with an error."""

    label_format = "run failed"
    events = (RunFailed,)
    severity: Severity = field(default="critical", kw_only=True)
    type: Literal["run_failed"] = field(default="run_failed", kw_only=True, repr=False)

    def judge(self, event: Event) -> Findings:
        """Returns the error."""
        return {"": f"after step {event.step}: {event.error}"} if isinstance(event, RunFailed) else {}


@checked
@dataclass(frozen=True)
class RunCompletedRule(RunEndRule):
    """The run ended by itself, by a command or by an interruption; the message gives the reason."""

    label_format = "run completed"
    events = (RunCompleted,)
    severity: Severity = field(default="info", kw_only=True)
    type: Literal["run_completed"] = field(default="run_completed", kw_only=True, repr=False)

    def judge(self, event: Event) -> Findings:
        """Returns the reason."""
        return {"": f"after step {event.step}: {event.reason}"} if isinstance(event, RunCompleted) else {}
