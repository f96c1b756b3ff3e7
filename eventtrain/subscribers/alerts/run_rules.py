"""The rules of ``Alerts`` about the run itself and the machine it runs on."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from eventtrain.errors import ConfigurationError
from eventtrain.subscribers._shared.validation import require_count, require_number
from eventtrain.subscribers.alerts.rule import CommonRule, Severity


def _moment(given: Any) -> Any:
    """A file's text as a time; what it is not is not quoted."""
    if not isinstance(given, str):
        return given
    try:
        return datetime.fromisoformat(given)
    except ValueError:
        raise ValueError("needs a time such as 2030-01-31T08:00:00+01:00") from None


Moment = Annotated[datetime, BeforeValidator(_moment)]


def _require_moment(rule: CommonRule) -> None:
    """Refuse waiting for what happens once, at the end of a run."""
    for name, value in (("for_s", rule.for_s), ("for_steps", rule.for_steps)):
        if value:
            raise ConfigurationError(
                f"{type(rule).__name__}({name}={value!r}): can never be raised, since a run ends at one moment. "
                f"Leave {name} out."
            )


@dataclass(frozen=True)
class StallRule(CommonRule):
    """No step was made for ``after_s`` seconds, whatever the reason: compiling, evaluating and pauses count too."""

    after_s: float = 600.0
    type: Literal["stall"] = field(default="stall", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("StallRule", "after_s", self.after_s, above=0)

    @property
    def _default_label(self) -> str:
        return f"no step for {self.after_s:g} s"


@dataclass(frozen=True)
class SlowSubscriberRule(CommonRule):
    """A subscriber is behind: it holds training up, loses events, is disabled, or has a backlog.

    Attributes:
        backlog: so many events wait for it; None: that is no reason.
        lag_s: the oldest of them waits for so many seconds; None: that is no reason.
        quiet_s: it is over when nothing of it was seen for so many seconds.

    Each subscriber is an alert of its own.
    """

    backlog: int | None = 10_000
    lag_s: float | None = None
    quiet_s: float = 60.0
    type: Literal["slow_subscriber"] = field(default="slow_subscriber", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.backlog is not None:
            require_count("SlowSubscriberRule", "backlog", self.backlog, at_least=1)
        if self.lag_s is not None:
            require_number("SlowSubscriberRule", "lag_s", self.lag_s, above=0)
        require_number("SlowSubscriberRule", "quiet_s", self.quiet_s, at_least=0)

    @property
    def _default_label(self) -> str:
        return "slow subscriber"


@dataclass(frozen=True)
class CheckpointFailedRule(CommonRule):
    """A checkpoint failed; over with the next one that is committed."""

    severity: Severity = field(default="critical", kw_only=True)
    type: Literal["checkpoint_failed"] = field(default="checkpoint_failed", kw_only=True, repr=False)

    @property
    def _default_label(self) -> str:
        return "checkpoint failed"


@dataclass(frozen=True)
class LowDiskRule(CommonRule):
    """The disk of ``run_dir`` has fewer free bytes than ``below_bytes``; looked at every ``every_s`` seconds."""

    below_bytes: int = 10 * 2**30
    every_s: float = 10.0
    type: Literal["low_disk"] = field(default="low_disk", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("LowDiskRule", "below_bytes", self.below_bytes, at_least=1)
        require_number("LowDiskRule", "every_s", self.every_s, above=0)

    @property
    def _default_label(self) -> str:
        return "low disk"


@dataclass(frozen=True)
class RunFailedRule(CommonRule):
    """The run ended with an error."""

    severity: Severity = field(default="critical", kw_only=True)
    type: Literal["run_failed"] = field(default="run_failed", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_moment(self)

    @property
    def _default_label(self) -> str:
        return "run failed"


@dataclass(frozen=True)
class RunCompletedRule(CommonRule):
    """The run ended by itself, by a command or by an interruption; the message says which."""

    severity: Severity = field(default="info", kw_only=True)
    type: Literal["run_completed"] = field(default="run_completed", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_moment(self)

    @property
    def _default_label(self) -> str:
        return "run completed"


@dataclass(frozen=True)
class DeadlineRule(CommonRule):
    """At the pace of the last minutes the run will not be through in time.

    Attributes:
        at: the deadline, with a time zone; in a file text such as ``"2030-01-31T08:00:00+01:00"``.
        within_s: or so many seconds after the run first began; one of the two.
        pace_s: the pace is that of the last so many seconds, since the first step at most.

    Silent where the run does not know how many steps it has.
    """

    at: Moment | None = None
    within_s: float | None = None
    pace_s: float = 300.0
    type: Literal["deadline"] = field(default="deadline", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.at is None) == (self.within_s is None):
            raise ConfigurationError("DeadlineRule: give at= or within_s=, one of them.")
        if self.at is not None and not isinstance(self.at, datetime):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigurationError(
                f"DeadlineRule(at={self.at!r}): needs a datetime, such as "
                'datetime.fromisoformat("2030-01-31T08:00:00+01:00").'
            )
        if self.at is not None and self.at.tzinfo is None:
            raise ConfigurationError(
                f"DeadlineRule(at={self.at.isoformat()!r}): has no time zone. Append one, such as +00:00."
            )
        if self.within_s is not None:
            require_number("DeadlineRule", "within_s", self.within_s, above=0)
        require_number("DeadlineRule", "pace_s", self.pace_s, above=0)

    @property
    def _default_label(self) -> str:
        return "behind schedule"
