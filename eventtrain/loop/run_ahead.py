"""Bounds how far the training thread runs ahead of the device."""

from __future__ import annotations

from collections import deque
from time import perf_counter

import jax

from eventtrain.control.loop_statistics import LoopClock

CATCH_UP_S = 0.004
"""The longest wait for several steps at once. A longer one would delay the flush of a window."""


class RunAhead:
    """The completion tokens of the dispatches that may still be running, oldest first. Training thread only.

    Attributes:
        tokens: one array per dispatch, complete when the dispatch is. Never donated.
        limit: how many may be in flight. Up to 32 are safe: beyond that the dispatch itself blocks, and with several
            forced CPU devices unbounded run-ahead aborts the process.
    """

    def __init__(self, limit: int, clock: LoopClock) -> None:
        self.tokens: deque[jax.Array] = deque()
        self.limit = limit
        self._clock = clock
        self._at_once = 1

    def make_room(self) -> None:
        """Wait until one more dispatch may be in flight. Returns at once if it may be already.

        Waits for one step if steps are long, for up to half of those in flight if they are short. A wake-up costs
        about
        20 us: waiting for each step of 60 us made the loop 1.3 times as long as the bare one (median of 9 pairs,
        2-core CPU), waiting for 8 of 16 at a time 1.0 times. The device is never idle meanwhile.
        """
        tokens = self.tokens
        if len(tokens) < self.limit:
            return
        began_s = perf_counter()
        for _ in range(min(self._at_once, len(tokens)) - 1):
            tokens.popleft()
        tokens.popleft().block_until_ready()
        waited_s = perf_counter() - began_s
        self._clock.device_wait_s += waited_s
        if waited_s > CATCH_UP_S:
            self._at_once = max(1, self._at_once // 2)
        elif waited_s < CATCH_UP_S / 4:
            self._at_once = min(max(1, self.limit // 2), self._at_once * 2)
