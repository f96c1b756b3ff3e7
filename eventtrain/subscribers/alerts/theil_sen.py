"""``TheilSen``: the trend of the last points, by medians. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np


class TheilSen:
    """The last ``window`` points, and the line through them.

    The slope is the median of the slopes of all pairs (Theil, 1950; Sen, 1968), the height the median of what is left.
    ``push`` is O(1), ``line`` O(window^2): at a window of 100 it takes 0.1 ms, so ask for it now and then.

    Args:
        window: how many points; at least 2.
        points: to begin with, oldest first: what ``list`` of another one gave.
    """

    def __init__(self, window: int, points: Iterable[tuple[float, float]] = ()) -> None:
        self._points: deque[tuple[float, float]] = deque(points, maxlen=window)
        self._first, self._second = np.triu_indices(window, 1)

    def __len__(self) -> int:
        return len(self._points)

    def __iter__(self) -> Iterator[tuple[float, float]]:
        """Oldest first."""
        return iter(self._points)

    @property
    def full(self) -> bool:
        """Whether there are as many points as the window holds."""
        return len(self._points) == self._points.maxlen

    def push(self, x: float, y: float) -> None:
        """Take in a point, with an ``x`` above the one before; the oldest goes where the window is full."""
        self._points.append((x, y))

    def line(self) -> tuple[float, float]:
        """Slope and the line's height at the newest point; NaN where numbers are too large to be subtracted.

        Raises:
            ValueError: there are fewer than two points.
        """
        count = len(self._points)
        if count < 2:
            raise ValueError("TheilSen.line: needs two points; look at len() first.")
        x, y = np.array(self._points, dtype=np.float64).T
        x = x - x[-1]
        if count == self._points.maxlen:
            first, second = self._first, self._second
        else:
            first, second = np.triu_indices(count, 1)
        with np.errstate(all="ignore"):
            slope = np.median((y[second] - y[first]) / (x[second] - x[first]))
            return float(slope), float(np.median(y - slope * x))
