"""``PeriodicStep``: the compiled step of extensions that are not due at every step.

A branch inside the step costs all steps: on a CPU, a `lax.cond` on the weights made a 0.7 ms step 1.29 times as long
(49,536 weights), and on a GPU a branch has each dispatch wait for the device. The host knows the number of the step, so
it chooses between two programs, and the one for the steps between has nothing of these extensions in it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from eventtrain.device.compiled_step import Carry, CompiledStep
from eventtrain.device.state import PyTree


class PeriodicStep(CompiledStep):
    """Compiles step_fn with all extensions, and without those that override `is_due`; `prepare` compiles both.

    A step runs the same one of them in every run, whatever else happens at it, so its results are the same bit for bit.
    Only for one step per call.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._is_due = self._fused.extensions.is_due
        self._with_all = self._executables
        self._between = self._cache(replace(self._fused, none_due=True))

    def prepare(self, batch: PyTree) -> None:
        """As `CompiledStep.prepare`, for both programs."""
        for executables in (self._with_all, self._between):
            self._executables = executables
            super().prepare(batch)

    def __call__(
        self, carry: Carry, batch: PyTree, start: int = 0, stop: int = 1, *, keep: bool = False
    ) -> None:
        """As `CompiledStep`, with the program for the step after `carry.step`."""
        step = carry.step + 1
        due = any(is_due(step) for is_due in self._is_due)
        executables = self._with_all if due else self._between
        if executables is not self._executables:
            self._executables = executables
            self._donating = executables.require().donating
        super().__call__(carry, batch, start, stop, keep=keep)
        carry.step = step

    def request_keeping(self) -> None:
        """As `CompiledStep.request_keeping`, for both programs."""
        for executables in (self._with_all, self._between):
            if executables.current is not None:
                executables.current.start_keeping()

    def close(self) -> None:
        """As `CompiledStep.close`, for both programs."""
        for executables in (self._with_all, self._between):
            self._executables = executables
            super().close()
