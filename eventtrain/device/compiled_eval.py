"""eval_fn and predict_fn, compiled: the state is only read, never donated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from eventtrain.device.executable_cache import ExecutableCache
from eventtrain.device.fused_step import abstract
from eventtrain.device.metric_codec import MetricLayout
from eventtrain.device.metric_ring import RingCarry, RingSource, write_row
from eventtrain.device.state import PyTree, Skeleton, replicated_sharding
from eventtrain.device.validation import call_user, check_leaves
from eventtrain.errors import StepError

__all__ = ["CompiledEval", "CompiledPredict"]


class _LoweredEval(NamedTuple):
    layout: MetricLayout
    rings: RingSource
    lowered: jax.stages.Lowered


class CompiledEval:
    """`eval_fn`, `(state, batch) -> metrics`, fused with a metric ring as the step is.

    `skeleton`, `leaves`, `capacity` and `compile_on_caller` are those of `CompiledStep`. All
    methods belong to the training thread.

    Attributes:
        layout: how to decode a row; set by `prepare`.
        capacity: rows of the ring.
    """

    layout: MetricLayout

    def __init__(
        self,
        eval_fn: Callable[[PyTree, PyTree], Mapping[str, Any]],
        skeleton: Skeleton,
        leaves: Sequence[jax.Array],
        *,
        capacity: int = 1024,
        compile_on_caller: Callable[[Callable[[], Any]], Any] = lambda f: f(),
    ) -> None:
        self.capacity = capacity
        self._eval_fn = eval_fn
        self._skeleton = skeleton
        self._leaf_types = abstract(leaves)
        self._sharding = replicated_sharding(leaves)
        self._compile_on_caller = compile_on_caller
        self._executables = ExecutableCache(self._build)
        self._rings: RingSource | None = None
        self._evaluate: Callable[..., tuple[jax.Array, jax.Array]] = self._unprepared

    @property
    def compilations(self) -> int:
        """How many batch signatures were compiled; each blocked its caller once."""
        return self._executables.compilations

    def prepare(self, batch: PyTree) -> None:
        """Trace, check and compile eval_fn for `batch`; blocks until compiled.

        Raises:
            DataError: the batch holds something that is neither array nor number.
            StepError: eval_fn raised.
            MetricsError: it returned no flat dict of scalars.
        """
        self._evaluate = self._executables.select(batch)

    def initial(self) -> RingCarry:
        """The carry to start an evaluation with, after `prepare`."""
        rings = self._ring_source()
        return RingCarry(rings.fresh(), rings.zero)

    def __call__(self, carry: RingCarry, leaves: Sequence[jax.Array], batch: PyTree) -> None:
        """Dispatch eval_fn on one batch and return at once; its metrics are the ring's next row.

        The state's `leaves` are not donated. A batch of a new signature is compiled first
        (blocking); errors as in `prepare`, and then `carry` is as it was.
        """
        if carry.rows >= self.capacity:
            raise StepError(f"The metric ring holds {self.capacity} rows and all are used. Call take_ring().")
        try:
            out = self._evaluate(leaves, carry.ring, carry.cursor, batch)
        except (TypeError, ValueError) as error:
            self._evaluate = self._executables.reselect(error, batch, lambda: self._check(leaves))
            out = self._evaluate(leaves, carry.ring, carry.cursor, batch)
        carry.ring, carry.cursor = out
        carry.rows += 1

    def take_ring(self, carry: RingCarry) -> tuple[jax.Array, int]:
        """The ring, perhaps not computed yet, and its rows in use; `carry` gets a fresh one."""
        return self._ring_source().take(carry)

    def _ring_source(self) -> RingSource:
        return self._unprepared() if self._rings is None else self._rings

    def _unprepared(self, *_: object) -> Any:
        raise StepError("eval_fn was not compiled yet: call prepare(batch) first.")

    def _check(self, leaves: Sequence[jax.Array]) -> None:
        check_leaves(leaves, self._skeleton, self._leaf_types)

    def _build(self, batch: PyTree) -> Callable[..., Any]:
        built: _LoweredEval = self._compile_on_caller(lambda: self._lower(batch))
        if self._rings is None:
            self.layout, self._rings = built.layout, built.rings
        else:
            self.layout.require_same(built.layout, "eval_fn")
        return built.lowered.compile()

    def _lower(self, batch: PyTree) -> _LoweredEval:
        layouts: list[MetricLayout] = []

        def row_of(leaves: list[jax.Array], batch: PyTree) -> jax.Array:
            state = self._skeleton.join(leaves)
            metrics = call_user("eval_fn", self._eval_fn, state, batch)
            layouts.append(MetricLayout.of(metrics, "eval_fn"))
            return layouts[-1].encode(metrics)

        traced_once = jax.jit(row_of, inline=True)
        traced_once.trace(self._leaf_types, batch)
        rings = RingSource(layouts[0], self.capacity, self._sharding)

        def call(
            leaves: list[jax.Array], ring: jax.Array, cursor: jax.Array, batch: PyTree
        ) -> tuple[jax.Array, jax.Array]:
            return write_row(ring, cursor, traced_once(leaves, batch))

        jitted = jax.jit(call, donate_argnums=1, out_shardings=self._sharding)
        lowered = jitted.lower(self._leaf_types, rings.ring_type, rings.cursor_type, batch)
        return _LoweredEval(layouts[0], rings, lowered)


class CompiledPredict:
    """`predict_fn`, `(state, batch) -> outputs`, compiled; outputs are any pytree of arrays.

    `skeleton`, `leaves` and `compile_on_caller` are those of `CompiledStep`. All methods belong to
    the training thread.
    """

    def __init__(
        self,
        predict_fn: Callable[[PyTree, PyTree], PyTree],
        skeleton: Skeleton,
        leaves: Sequence[jax.Array],
        *,
        compile_on_caller: Callable[[Callable[[], Any]], Any] = lambda f: f(),
    ) -> None:
        self._predict_fn = predict_fn
        self._skeleton = skeleton
        self._leaf_types = abstract(leaves)
        self._compile_on_caller = compile_on_caller
        self._executables = ExecutableCache(self._build)
        self._predict: Callable[..., PyTree] = self._unprepared

    @property
    def compilations(self) -> int:
        """How many batch signatures were compiled; each blocked its caller once."""
        return self._executables.compilations

    def prepare(self, batch: PyTree) -> None:
        """Trace and compile predict_fn for `batch`; blocks until compiled.

        Raises:
            DataError: the batch holds something that is neither array nor number.
            StepError: predict_fn raised, or returned something that is no pytree of arrays.
        """
        self._predict = self._executables.select(batch)

    def __call__(self, leaves: Sequence[jax.Array], batch: PyTree) -> PyTree:
        """Dispatch predict_fn on one batch and return its outputs, not computed yet.

        Nothing is donated. A batch of a new signature is compiled first (blocking); errors as in
        `prepare`.
        """
        try:
            return self._predict(leaves, batch)
        except (TypeError, ValueError) as error:
            self._predict = self._executables.reselect(error, batch, lambda: self._check(leaves))
            return self._predict(leaves, batch)

    def _unprepared(self, *_: object) -> PyTree:
        raise StepError("predict_fn was not compiled yet: call prepare(batch) first.")

    def _check(self, leaves: Sequence[jax.Array]) -> None:
        check_leaves(leaves, self._skeleton, self._leaf_types)

    def _build(self, batch: PyTree) -> Callable[..., Any]:
        lowered: jax.stages.Lowered = self._compile_on_caller(lambda: self._lower(batch))
        return lowered.compile()

    def _lower(self, batch: PyTree) -> jax.stages.Lowered:
        def call(leaves: list[jax.Array], batch: PyTree) -> PyTree:
            state = self._skeleton.join(leaves)
            outputs = call_user("predict_fn", self._predict_fn, state, batch)
            for path, leaf in jax.tree_util.tree_flatten_with_path(outputs)[0]:
                if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float)):
                    raise StepError(
                        f"predict_fn returned outputs{jax.tree_util.keystr(path)} as "
                        f"{type(leaf).__name__}, which cannot leave a compiled function. Return a "
                        "pytree of arrays."
                    )
            return outputs

        return jax.jit(call).lower(self._leaf_types, batch)
