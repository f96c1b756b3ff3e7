"""eval_fn and predict_fn, compiled: they read the state and never donate it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eventtrain.device.executable_cache import (
    ExecutableCache,
    LowerOnCaller,
    argument_types,
    compile_lowered,
    describe_batch,
    lower_here,
)
from eventtrain.device.metric_codec import MetricLayout
from eventtrain.device.metric_ring import MetricRings, RingCarry, TakenRing, write_row
from eventtrain.device.placement import own_shards
from eventtrain.device.state import Leaves, PyTree, TreeStructure, abstract, replicated_sharding
from eventtrain.device.stateful_metrics import (
    CompiledStates,
    HostArray,
    StatefulMetrics,
    TakenStates,
    split_metrics,
)
from eventtrain.device.validation import call_user, check_leaves
from eventtrain.errors import StepError


class _StateReader(abc.ABC):
    """A function of `(state, batch)`, compiled once for each batch signature. Training thread only.

    `structure`, `leaves`, `leaf_types` and `lower_on_caller` are those of `CompiledStep`. Leaves are never donated. A
    batch of a new signature is compiled when it is met, which blocks.
    """

    _name: str

    def __init__(
        self,
        function: Callable[[PyTree, PyTree], Any],
        structure: TreeStructure,
        leaves: Sequence[jax.Array],
        *,
        leaf_types: Sequence[jax.ShapeDtypeStruct] | None = None,
        lower_on_caller: LowerOnCaller = lower_here,
    ) -> None:
        self._function = function
        self._structure = structure
        self._leaf_types = abstract(leaves) if leaf_types is None else list(leaf_types)
        self._lower_on_caller = lower_on_caller
        self._executables = ExecutableCache[Callable[..., Any]](self._name, self._build)
        self._replicated = replicated_sharding(leaves)

    @property
    def compilations(self) -> int:
        """Number of batch signatures that were compiled; each blocked its caller once."""
        return len(self._executables.built)

    def prepare(self, batch: PyTree) -> None:
        """Traces, checks and compiles the function for `batch`; blocks until compiled.

        Raises:
            DataError: the batch has a leaf that is neither an array nor a number.
            StepError: the function raised, or returned other things than arrays where those are expected.
            MetricsError: eval_fn did not return a flat dict of scalars.
        """
        self._executables.select(batch)

    @abc.abstractmethod
    def _build(self, batch: PyTree) -> Callable[..., Any]: ...

    def _dispatch(self, leaves: Sequence[jax.Array], *ring_and_batch: Any) -> Any:
        try:
            return self._executables.require()(leaves, *ring_and_batch)
        except (TypeError, ValueError) as error:
            executable = self._executables.reselect(
                error,
                ring_and_batch[-1],
                lambda: check_leaves("state", leaves, self._structure, self._leaf_types),
            )
            return executable(leaves, *ring_and_batch)

    def _call(self, leaves: Sequence[jax.Array], batch: PyTree) -> Any:
        """Calls the user's function; to be traced."""
        return call_user(self._name, self._function, self._structure.join(leaves), batch)


@dataclass(slots=True, eq=False, kw_only=True)
class EvalCarry(RingCarry):
    """State that one call of `CompiledEval` hands to the next.

    Attributes:
        states: of the metrics with state, merged so far; donated. Empty without such metrics.
    """

    states: Leaves


class _TracedEval(NamedTuple):
    """eval_fn, traced for one batch signature: JAX does not trace `function` again when it is called with that."""

    function: Callable[[Leaves, PyTree], tuple[jax.Array, Leaves]]
    layout: MetricLayout
    states: StatefulMetrics
    computed: frozenset[str]


class CompiledEval(_StateReader):
    """`eval_fn`, `(state, batch) -> metrics`, fused with a metric ring as the step is.

    Metrics with state are merged in the same program.

    Attributes:
        capacity: rows of the ring.
    """

    _name = "eval_fn"

    def __init__(
        self,
        eval_fn: Callable[[PyTree, PyTree], Any],
        structure: TreeStructure,
        leaves: Sequence[jax.Array],
        *,
        capacity: int = 1024,
        leaf_types: Sequence[jax.ShapeDtypeStruct] | None = None,
        lower_on_caller: LowerOnCaller = lower_here,
    ) -> None:
        super().__init__(eval_fn, structure, leaves, leaf_types=leaf_types, lower_on_caller=lower_on_caller)
        self.capacity = capacity
        self._rings = MetricRings(self._name, capacity, self._replicated)
        self._traces: dict[Hashable, _TracedEval] = {}
        self._states = CompiledStates(self._replicated)

    def initial(self, states: Sequence[HostArray] = ()) -> EvalCarry:
        """Returns the carry to start an evaluation with, after `prepare`.

        `states` are those of an evaluation that was cut short, from `take_states`. Raises a StateError if eval_fn has
        other ones.
        """
        return EvalCarry(*self._rings.fresh(), states=self._states.initial(states))

    def __call__(self, carry: EvalCarry, leaves: Sequence[jax.Array], batch: PyTree) -> None:
        """Dispatches eval_fn on one batch and returns at once; its metrics are the ring's next row.

        Errors as in `prepare`; then `carry` is as it was.
        """
        if carry.rows >= self.capacity:
            raise self._rings.refuse_more(carry)
        carry.ring, carry.cursor, carry.states = self._dispatch(
            leaves, carry.ring, carry.cursor, carry.states, batch
        )
        carry.rows += 1

    def take_ring(self, carry: EvalCarry, window: Any = None) -> TakenRing:
        """Returns the ring of `carry`, with `window` as the caller's record of it; `carry` gets a fresh one."""
        return self._rings.take(carry, window)

    def take_values(self, carry: EvalCarry, window: Any = None) -> TakenStates:
        """Dispatches `compute()` of the metrics with state. Returns its results by name; none without such metrics."""
        return self._states.computed(carry.states, window)

    def take_states(self, carry: EvalCarry, window: Any = None) -> TakenStates:
        """Returns the merged states, for `initial`."""
        return self._states.copied(carry.states, window)

    def _build(self, batch: PyTree) -> Callable[..., Any]:
        layout, states, lowered = self._lower_on_caller(lambda: self._lower(batch))
        self._rings.adopt(layout)
        self._states.adopt(states, self._lower_on_caller)
        return compile_lowered(lowered)

    def trace(self, batch: PyTree) -> frozenset[str]:
        """Traces and checks eval_fn for `batch` without compiling it; `prepare` does not trace it again.

        Returns:
            The names of the scalars that an evaluation has.

        Raises:
            As `prepare`.
        """
        try:
            traced = self._lower_on_caller(lambda: self._traced(batch))
        except StepError as error:
            describe_batch(error, batch)
            raise
        return frozenset(traced.layout.names) | traced.computed

    def _traced(self, batch: PyTree) -> _TracedEval:
        signature = argument_types(batch)
        if signature not in self._traces:
            self._traces[signature] = self._trace(batch)
        return self._traces[signature]

    def _trace(self, batch: PyTree) -> _TracedEval:
        found: list[tuple[MetricLayout, StatefulMetrics]] = []

        def measured(leaves: Leaves, batch: PyTree) -> tuple[jax.Array, Leaves]:
            scalars, stateful = split_metrics(self._call(leaves, batch), self._name)
            layout = MetricLayout.of(scalars, self._name)
            states, state_leaves = StatefulMetrics.split(stateful, self._name)
            found.append((layout, states))
            return layout.encode(scalars), state_leaves

        jitted = jax.jit(measured, inline=True)
        jitted.trace(self._leaf_types, batch)
        layout, states = found[0]
        return _TracedEval(jitted, layout, states, states.scalar_names(layout.names))

    def _lower(self, batch: PyTree) -> tuple[MetricLayout, StatefulMetrics, jax.stages.Lowered]:
        traced = self._traced(batch)
        layout, states = traced.layout, traced.states

        def call(
            leaves: Leaves, ring: jax.Array, cursor: jax.Array, carried: Leaves, batch: PyTree
        ) -> tuple[jax.Array, jax.Array, Leaves]:
            row, new = traced.function(leaves, batch)
            return *write_row(ring, cursor, row), states.merge(carried, new)

        jitted = jax.jit(call, donate_argnums=(1, 3), out_shardings=self._replicated)
        types = (*self._rings.types(layout), states.carried_types(self._replicated))
        return layout, states, jitted.lower(self._leaf_types, *types, batch)


class CompiledPredict(_StateReader):
    """`predict_fn`, `(state, batch) -> outputs`, compiled; outputs are any pytree of arrays."""

    _name = "predict_fn"

    def __call__(self, leaves: Sequence[jax.Array], batch: PyTree) -> PyTree:
        """Dispatches predict_fn on one batch and returns its outputs, not computed yet; errors as in `prepare`.

        Outputs of which other processes have parts are replicated, by a computation of its own: within predict_fn it
        could change how that is partitioned, and with it the last bits.
        """
        outputs, treedef = jax.tree_util.tree_flatten(self._dispatch(leaves, batch))
        parted = [index for index, output in enumerate(outputs) if own_shards(output) is None]
        if parted:
            whole = self._gather([outputs[index] for index in parted])
            for index, output in zip(parted, whole, strict=True):
                outputs[index] = output
        return jax.tree_util.tree_unflatten(treedef, outputs)

    @cached_property
    def _gather(self) -> Callable[[Sequence[jax.Array]], list[jax.Array]]:
        return jax.jit(lambda outputs: outputs, out_shardings=self._replicated)

    def trace(self, batch: PyTree) -> None:
        """Traces and checks predict_fn for `batch`, which may be of another kind than those to predict on.

        Raises:
            StepError: what is wrong with it is not the batch: a name that is not defined, an import that fails, or
                outputs that are not arrays.
        """
        try:
            self._lower_on_caller(lambda: jax.eval_shape(self._outputs, self._leaf_types, batch))
        except StepError as error:
            if error.__cause__ is None or isinstance(error.__cause__, (NameError, ImportError, SyntaxError)):
                raise

    def _build(self, batch: PyTree) -> Callable[..., Any]:
        lowered = self._lower_on_caller(lambda: jax.jit(self._outputs).lower(self._leaf_types, batch))
        return compile_lowered(lowered)

    def _outputs(self, leaves: Leaves, batch: PyTree) -> PyTree:
        outputs = self._call(leaves, batch)
        for path, leaf in jax.tree_util.tree_flatten_with_path(outputs)[0]:
            if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float)):
                raise StepError(
                    f"{self._name} returned outputs{jax.tree_util.keystr(path)} as {type(leaf).__name__}, which a "
                    "compiled function cannot return. Return a pytree of arrays."
                )
        return outputs


class CompiledSample(CompiledPredict):
    """The function of a sample, `state -> outputs`, compiled before the first step. Training thread only.

    Its outputs are arrays of their own, also where the function returns a part of the state: the next step may donate
    that.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[PyTree], PyTree],
        structure: TreeStructure,
        leaves: Sequence[jax.Array],
        *,
        leaf_types: Sequence[jax.ShapeDtypeStruct],
        lower_on_caller: LowerOnCaller,
    ) -> None:
        self._name = f"the function of the sample {name!r}"
        super().__init__(
            lambda state, _: function(state),
            structure,
            leaves,
            leaf_types=leaf_types,
            lower_on_caller=lower_on_caller,
        )

    def _outputs(self, leaves: Leaves, batch: PyTree) -> PyTree:
        return jax.tree.map(jnp.copy, super()._outputs(leaves, batch))
