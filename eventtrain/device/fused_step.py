"""step_fn, the extensions and the ring write, fused into one function and lowered.

The fused function is `(leaves, ext_leaves, ring, cursor, batch) -> (leaves, ext_leaves, ring,
cursor)`; for K > 1 steps a call it takes a tuple of K batches and the range `start, stop` of steps
to run. step_fn is traced once for each batch signature, whatever the number of variants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding

from eventtrain.device.extensions import StepExtension
from eventtrain.device.metric_codec import MetricLayout
from eventtrain.device.metric_ring import RingSource, write_row
from eventtrain.device.state import PyTree, Skeleton, copy_leaves, partition, place
from eventtrain.device.validation import call_user, matched_leaves, state_and_metrics
from eventtrain.errors import ConfigurationError

__all__ = ["FusedStep", "LoweredStep", "abstract"]

# What the fused function returns: state leaves, extension leaves, ring, cursor.
Outputs = tuple[list[jax.Array], list[jax.Array], jax.Array, jax.Array]
Fused = Callable[..., Outputs]


class LoweredStep(NamedTuple):
    """One batch signature, lowered: `.compile()` of the variants may run on any thread."""

    layout: MetricLayout
    rings: RingSource
    donating: jax.stages.Lowered
    keeping: jax.stages.Lowered | None
    jaxpr: Any  # a ClosedJaxpr, whose class has no settled place in JAX


def abstract(leaves: Sequence[jax.Array]) -> list[jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of each leaf, without its values."""
    return [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves]


class FusedStep:
    """What has to be known to trace the step; holds no array.

    Attributes:
        leaf_types, ext_types: shape, dtype and sharding of the state's and extensions' leaves.
        ext_skeleton: joins extension leaves to `(completed steps, {name: extension state})`.
    """

    def __init__(
        self,
        step_fn: Callable[[PyTree, PyTree], tuple[PyTree, Mapping[str, Any]]],
        skeleton: Skeleton,
        leaves: Sequence[jax.Array],
        *,
        extensions: Sequence[StepExtension],
        params: Callable[[PyTree], PyTree],
        watched: Sequence[int],
        capacity: int,
        steps_per_call: int,
        donate: bool,
        keep: bool,
        sharding: Sharding,
    ) -> None:
        self._step_fn = step_fn
        self._params = params
        self._watched = tuple(watched)
        self._capacity = capacity
        self._steps_per_call = steps_per_call
        self._donate = donate
        self._keep = keep
        self._sharding = sharding
        self.skeleton = skeleton
        self.extensions = {extension.name: extension for extension in extensions}
        if len(self.extensions) < len(extensions):
            names = [extension.name for extension in extensions]
            raise ConfigurationError(
                f"step_extensions have the names {names}, but each keeps its state under its name. "
                "Give them different ones, for example EMA(0.999, name='ema_slow')."
            )
        self.leaf_types = abstract(leaves)
        ext_leaves, self.ext_skeleton = self._initial_extensions(leaves, 0)
        self.ext_types = abstract(ext_leaves)

    def initial_extensions(self, leaves: Sequence[jax.Array], step: int) -> list[jax.Array]:
        """The extensions' leaves for a state of `step` completed steps; buffers of their own."""
        return self._initial_extensions(leaves, step)[0]

    def _initial_extensions(self, leaves: Sequence[jax.Array], step: int) -> tuple[list[jax.Array], Skeleton]:
        if not self.extensions:
            return [], partition(())[1]
        params = self._params_of(self.skeleton.join(leaves))
        states = {
            name: call_user(f"{extension!r}.init", extension.init, params)
            for name, extension in self.extensions.items()
        }
        fresh, skeleton = partition((np.int32(step), states))
        placed = place([*leaves, *fresh])[len(leaves) :]
        return copy_leaves(placed), skeleton

    def lower(self, batch: PyTree) -> LoweredStep:
        """Trace step_fn for `batch`, check what it returns, and lower every variant.

        Runs on the thread whose JAX settings (mesh, x64, matmul precision) are meant.

        Raises:
            StepError: step_fn, an extension or `params` raised; or no (state, metrics) pair.
            StateError: the state changed its structure, a shape, a dtype or a static leaf.
            MetricsError: the metrics are no flat dict of scalars.
        """
        layouts: list[MetricLayout] = []

        def one_step(
            leaves: list[jax.Array], ext_leaves: list[jax.Array], batch: PyTree
        ) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
            new_leaves, state, metrics = self._traced_step(leaves, batch)
            watched = {index: new_leaves[index] for index in self._watched}
            layout = MetricLayout.of(metrics, "step_fn", watched=watched)
            layouts.append(layout)
            row = layout.encode(metrics, list(watched.values()))
            return new_leaves, self._traced_extensions(ext_leaves, state), row

        traced_once = jax.jit(one_step, inline=True)  # shared by all that is lowered below
        first = batch if self._steps_per_call == 1 else batch[0]
        traced_once.trace(self.leaf_types, self.ext_types, first)
        rings = RingSource(layouts[0], self._capacity, self._sharding)

        arguments = [self.leaf_types, self.ext_types, rings.ring_type, rings.cursor_type, batch]
        if self._steps_per_call > 1:
            count = jax.ShapeDtypeStruct((), np.int32, sharding=self._sharding)
            arguments += [count, count]
        call = _with_ring(traced_once)
        fused = call if self._steps_per_call == 1 else _grouped(call)
        shardings = (
            [leaf.sharding for leaf in self.leaf_types],
            [leaf.sharding for leaf in self.ext_types],
            self._sharding,
            self._sharding,
        )

        def traced(*donated: int) -> jax.stages.Traced:
            # keep_unused: a leaf that step_fn overwrites without reading it is donated all the same.
            jitted = jax.jit(fused, donate_argnums=donated, out_shardings=shardings, keep_unused=True)
            return jitted.trace(*arguments)

        donating = traced(0, 1, 2) if self._donate else traced(2)
        keeping = traced(2).lower() if self._donate and self._keep else None
        return LoweredStep(layouts[0], rings, donating.lower(), keeping, donating.jaxpr)

    def _traced_step(
        self, leaves: list[jax.Array], batch: PyTree
    ) -> tuple[list[jax.Array], PyTree, Mapping[str, Any]]:
        result = call_user("step_fn", self._step_fn, self.skeleton.join(leaves), batch)
        state, metrics = state_and_metrics(result)
        new_leaves = matched_leaves(state, self.skeleton, leaves, "step_fn returned state")
        return new_leaves, self.skeleton.join(new_leaves), metrics

    def _traced_extensions(self, ext_leaves: list[jax.Array], state: PyTree) -> list[jax.Array]:
        if not self.extensions:
            return ext_leaves
        step, states = self.ext_skeleton.join(ext_leaves)
        step, params = step + 1, self._params_of(state)
        updated = {
            name: call_user(f"{e!r}.update", e.update, states[name], params, step)
            for name, e in self.extensions.items()
        }
        return matched_leaves((step, updated), self.ext_skeleton, ext_leaves, "step_extensions returned ")

    def _params_of(self, state: PyTree) -> PyTree:
        return call_user("params", self._params, state)


def _with_ring(one_step: Callable[..., tuple[list[jax.Array], list[jax.Array], jax.Array]]) -> Fused:
    """One step, which writes its row into the ring."""

    def call(
        leaves: list[jax.Array],
        ext_leaves: list[jax.Array],
        ring: jax.Array,
        cursor: jax.Array,
        batch: PyTree,
    ) -> Outputs:
        leaves, ext_leaves, row = one_step(leaves, ext_leaves, batch)
        return leaves, ext_leaves, *write_row(ring, cursor, row)

    return call


def _grouped(call: Fused) -> Fused:
    """The steps from ``start`` to ``stop`` of a group of batches."""

    def group(
        leaves: list[jax.Array],
        ext_leaves: list[jax.Array],
        ring: jax.Array,
        cursor: jax.Array,
        batches: tuple[PyTree, ...],
        start: jax.Array,
        stop: jax.Array,
    ) -> Outputs:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)

        def body(index: jax.Array, carried: Outputs) -> Outputs:
            batch = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), stacked)
            return call(*carried, batch)

        return lax.fori_loop(start, stop, body, (leaves, ext_leaves, ring, cursor))

    return group
