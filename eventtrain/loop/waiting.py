"""``WaitingPlace``: the one place where the training thread waits, as its users see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class WaitingPlace(Protocol):
    """Waits while serving commands. ``Boundary`` implements it; training thread only, unless stated otherwise."""

    def wait(self, ready: Callable[[], object]) -> bool:
        """Wait until ``ready()``. Returns False if the run has to end first."""
        ...

    def wait_for_observers(self, ready: Callable[[], object]) -> bool:
        """As ``wait``, for something that a subscriber has to do: the time is charged to observers."""
        ...

    def apply_arrived(self) -> None:
        """Apply the commands that have arrived and have no boundary to wait for."""
        ...

    def agree(self) -> bool:
        """Agree with the other processes that a batch of an evaluation is dispatched now. False: the run has to end."""
        ...

    def wake(self) -> None:
        """Make ``wait`` ask ``ready`` again. Any thread."""
        ...
