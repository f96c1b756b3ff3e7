"""``Policy``: base of the policies with a state that survives a restart."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers.base import RunContext, Subscriber, name_of

S = TypeVar("S", bound=SavedState)

STEP_LAG = 64
"""Default lag of decisions on every step: four times ``max_in_flight_steps``, so that the loop need not wait."""


class Policy(Subscriber, Generic[S]):
    """Every ``fit`` starts with ``_initial``, unless a state was loaded before it; that state holds for one ``fit``.

    A subclass keeps its state in ``_state``, or overrides ``_get_state`` and ``_set_state``.
    """

    _initial: S
    _loaded = False

    def _get_state(self) -> S:
        """Returns what must survive a restart."""
        return self._state

    def _set_state(self, state: S) -> None:
        """Continues from ``state``."""
        self._state = state

    @property
    def _name(self) -> str:
        return name_of(self)

    async def start(self, run: RunContext) -> None:
        """Starts from scratch, unless a state was loaded."""
        if not self._loaded:
            self._set_state(self._initial)

    async def stop(self) -> None:
        """Ends the run; the next one starts from scratch, unless a state is loaded."""
        self._loaded = False

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain JSON data."""
        return self._get_state().to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state for the next run. Raises StateError for another version or invalid data."""
        self._set_state(type(self._initial).parse(self._name, state))
        self._loaded = True
