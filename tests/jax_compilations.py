"""Counts what XLA compiles, process-wide, so that a test can say that nothing was."""

from __future__ import annotations

import jax


class Compilations:
    """`since()` is the number of compilations after `start()`."""

    def __init__(self) -> None:
        self._all = 0
        self._before = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_s: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._all += 1

    def start(self) -> None:
        self._before = self._all

    def since(self) -> int:
        return self._all - self._before


COMPILATIONS = Compilations()  # one listener for the process: JAX offers no public way to remove it
