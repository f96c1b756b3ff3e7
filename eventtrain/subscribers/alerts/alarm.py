"""``Alarm``: when what is wrong becomes an alert, and when that is over. Pure: time is given."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Change = Literal["raised", "resolved"]


class AlarmState(BaseModel):
    """What an alarm remembers. Seconds are counted from the moment of saving."""

    model_config = ConfigDict(extra="forbid")

    raised: bool = False
    bad_since_step: int | None = None
    bad_for_s: float = 0.0
    quiet_s: float = 0.0


class Alarm:
    """One alert: raised once, when it was bad for long enough; resolved once, when it is not any more.

    Args:
        for_s, for_steps: how long it has to be bad without a break.
        cooldown_s: for so long after it is resolved it is not raised.
    """

    def __init__(self, for_s: float = 0.0, for_steps: int = 0, cooldown_s: float = 0.0) -> None:
        self._for_s, self._for_steps, self._cooldown_s = for_s, for_steps, cooldown_s
        self._raised = False
        self._bad_since: tuple[int, float] | None = None
        self._quiet_until_s = float("-inf")

    @property
    def raised(self) -> bool:
        """Whether it was raised and not resolved."""
        return self._raised

    @property
    def idle(self) -> bool:
        """Whether ``judge(False, ...)`` would change nothing."""
        return not self._raised and self._bad_since is None

    def is_as_new(self, now_s: float) -> bool:
        """Whether another alarm of the same conditions would do what this one does."""
        return self.idle and now_s >= self._quiet_until_s

    def judge(self, bad: bool, step: int, now_s: float) -> Change | None:
        """Take one observation in, in their order; what has changed, if anything."""
        if not bad:
            was_raised, self._raised, self._bad_since = self._raised, False, None
            if not was_raised:
                return None
            self._quiet_until_s = now_s + self._cooldown_s
            return "resolved"
        if self._raised:
            return None
        if self._bad_since is None:
            self._bad_since = (step, now_s)
        since_step, since_s = self._bad_since
        if (
            now_s - since_s < self._for_s
            or step - since_step < self._for_steps
            or now_s < self._quiet_until_s
        ):
            return None
        self._raised = True
        return "raised"

    def reset(self) -> None:
        """Forget that it is raised, without a word."""
        self._raised, self._bad_since = False, None

    def save(self, now_s: float) -> AlarmState:
        """What ``load`` takes."""
        since = self._bad_since
        return AlarmState(
            raised=self._raised,
            bad_since_step=None if since is None else since[0],
            bad_for_s=0.0 if since is None else max(0.0, now_s - since[1]),
            quiet_s=max(0.0, self._quiet_until_s - now_s),
        )

    def load(self, state: AlarmState, now_s: float) -> None:
        """Go on from ``state``; time between two runs does not count."""
        self._raised = state.raised
        since = state.bad_since_step
        self._bad_since = None if since is None else (since, now_s - state.bad_for_s)
        self._quiet_until_s = now_s + state.quiet_s
