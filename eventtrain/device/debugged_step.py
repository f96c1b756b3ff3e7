"""``DebuggedStep``, for ``Trainer(debug=True)``: the compiled step, and before each call an uncompiled run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from eventtrain.device.compiled_step import Carry, CompiledStep
from eventtrain.device.state import PyTree


class DebuggedStep(CompiledStep):
    """Runs ``step_fn`` operation by operation first, on the values of the step, and drops what it returns.

    So ``print`` and ``breakpoint`` in it see values, and a NaN raises FloatingPointError at the operation that made it,
    before the step changes anything. Training itself is that of the compiled step. Slow, and it waits for the device.
    """

    def __init__(self, step_fn: Any, structure: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(step_fn, structure, *arguments, **options)
        self._step_fn = step_fn
        self._structure = structure

    def __call__(
        self, carry: Carry, batch: PyTree, start: int = 0, stop: int = 1, *, keep: bool = False
    ) -> None:
        """As ``CompiledStep``, behind the uncompiled run, whose exceptions pass unchanged."""
        with jax.disable_jit(), jax.debug_nans(True):
            self._step_fn(self._structure.join(carry.leaves), jax.tree.map(jnp.asarray, batch))
        super().__call__(carry, batch, start, stop, keep=keep)
