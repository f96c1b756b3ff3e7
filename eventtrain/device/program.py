"""What the compiled step is: its text before and after compilation, and what XLA says that it costs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

import jax

__all__ = ["StepProgram"]


class StepProgram:
    """The compiled step that runs: step_fn, the extensions and the write of the metrics, in one computation.

    The texts are made when they are first asked for, which takes seconds for a large step: not on an event loop. Any
    thread. Nothing is compiled for it.

    Args:
        traced: the jaxpr of what was compiled.
        compiled: the ``jax.stages.Compiled`` that runs.
    """

    def __init__(self, traced: Any, compiled: Any) -> None:
        self._traced = traced
        self._compiled = compiled

    @cached_property
    def jaxpr(self) -> str:
        """As JAX traced it."""
        return str(self._traced)

    @cached_property
    def hlo(self) -> str:
        """As XLA compiled it, after its optimisations; empty where the backend does not say."""
        return _ask(self._compiled.as_text) or ""

    @cached_property
    def cost(self) -> Mapping[str, float]:
        """XLA's estimates for one call, such as "flops" and "bytes accessed"; empty where the backend gives none.

        XLA counts the body of a loop once where it does not know how often it runs: with ``steps_per_call`` above 1
        the estimates are those of one step.
        """
        analysis = _ask(self._compiled.cost_analysis) or {}
        return MappingProxyType({str(name): float(value) for name, value in analysis.items()})


def _ask(question: Any) -> Any:
    try:
        return question()
    except (NotImplementedError, jax.errors.JaxRuntimeError):  # what some backends say instead of an answer
        return None
