"""``attempts`` and ``retry``: an action is tried again after delays that double. Blocking; any thread."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import TypeVar

from eventtrain.errors import StorageError

R = TypeVar("R")


def attempts(
    retries: float, delay_s: float, wait: Callable[[float], bool], *, max_delay_s: float = math.inf
) -> Iterator[int]:
    """Yields 1, 2, ... for the body of a ``for`` loop that leaves it on success; waits before each but the first.

    Args:
        retries: attempts after the first; ``math.inf`` for no limit.
        delay_s: seconds before the second attempt; doubles each time.
        wait: waits that long; returns True if there must not be another attempt, as ``threading.Event.wait`` does.
        max_delay_s: the longest delay.
    """
    for attempt in count(1):
        yield attempt
        if attempt > retries or wait(delay_s):
            return
        delay_s = min(2 * delay_s, max_delay_s)


def retry(action: Callable[[], R], *, retries: int, delay_s: float, stopping: threading.Event) -> R:
    """Returns what ``action`` returns; tries again after a StorageError that may pass, until ``stopping`` is set.

    Args:
        action: to be tried.
        retries, delay_s: as of ``attempts``.
        stopping: once set, there is no further attempt.

    Raises:
        StorageError: of the last attempt.
    """
    failure = None
    for attempt in attempts(retries, delay_s, stopping.wait):
        try:
            return action()
        except StorageError as error:
            failure = StorageError(f"{error} (attempt {attempt})")
            if not error.may_pass:
                break
    assert failure is not None
    raise failure
