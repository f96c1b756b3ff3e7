"""What the tests ask of JAX beside its API: how often XLA compiled, and 64-bit mode on every version."""

from __future__ import annotations

import jax
import jax.experimental


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

# jax.enable_x64 is newer than the lowest JAX supported.
x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
