"""step_fn, the extensions and the write of the metric row, fused into one function and lowered.

The fused function is `(leaves, ext_leaves, ring, cursor, batch) -> (leaves, ext_leaves, ring, cursor)`. For K > 1 steps
per call it takes a tuple of K batches, and the range `start, stop` of steps to run.

- Donated are the leaves (in the donating variant), the extension leaves (likewise) and the ring; never the cursor and
  never the batch.
- Output shardings are the input shardings, so that one executable serves every step.
- step_fn is traced once for each batch signature: both variants and all K steps share that trace.
- What is carried of metrics with state follows the leaves of the extensions, in the same list: without such metrics a
  call has nothing more to pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eventtrain.device.extensions import ExtensionStates
from eventtrain.device.metric_codec import MetricLayout
from eventtrain.device.metric_ring import MetricRings, write_row
from eventtrain.device.state import Leaves, PyTree, TreeStructure
from eventtrain.device.stateful_metrics import StatefulMetrics, split_metrics
from eventtrain.device.validation import call_user, matched_leaves, state_and_metrics

# State leaves, extension leaves, ring, cursor.
Carried: TypeAlias = tuple[Leaves, Leaves, jax.Array, jax.Array]
StepFn: TypeAlias = Callable[[PyTree, PyTree], tuple[PyTree, Mapping[str, Any]]]


@dataclass(frozen=True)
class StepOptions:
    """How the step is compiled; all but `capacity` are options of ``Trainer``.

    Attributes:
        donate: whether a call overwrites the state it is given. The ring is always donated.
        steps_per_call: K > 1 compiles one executable for up to K steps per call.
        snapshot: how snapshots are taken; only for "keep" the keeping variant is lowered.
        capacity: rows of the ring: how many steps fit between two `take_ring`.
        debug: run the step uncompiled as well, before each call.
    """

    donate: bool = True
    steps_per_call: int = 1
    snapshot: Literal["keep", "copy", "host"] = "keep"
    capacity: int = 1024
    debug: bool = False


class StackedBatches(NamedTuple):
    """The batches of a call of several steps, with their leaves stacked: the first axis counts the batches."""

    batches: PyTree


class LoweredStep(NamedTuple):
    """One batch signature, lowered; `.compile()` of the variants may run on any thread."""

    layout: MetricLayout
    states: StatefulMetrics
    computed_names: frozenset[str]
    donating: jax.stages.Lowered
    keeping: jax.stages.Lowered | None
    jaxpr: Any  # a ClosedJaxpr, whose class has no public place in JAX


@dataclass(frozen=True)
class FusedStep:
    """Everything that the step is traced from, as for `CompiledStep`; holds no array."""

    step_fn: StepFn
    structure: TreeStructure
    leaf_types: list[jax.ShapeDtypeStruct]
    extensions: ExtensionStates
    watched: Sequence[int]
    rings: MetricRings
    options: StepOptions
    none_due: bool = False
    """Whether to leave out the extensions that override `is_due`."""

    def lower(self, batch: PyTree) -> LoweredStep:
        """Traces step_fn for `batch`, checks what it returns, and lowers every variant.

        Raises:
            StepError, StateError, MetricsError: as in `CompiledStep.prepare`.
        """
        options, grouped = self.options, self.options.steps_per_call > 1
        found: list[tuple[MetricLayout, StatefulMetrics]] = []

        def one_step(
            leaves: Leaves, ext_leaves: Leaves, batch: PyTree
        ) -> tuple[Leaves, Leaves, jax.Array, Leaves]:
            result = call_user("step_fn", self.step_fn, self.structure.join(leaves), batch)
            state, metrics = state_and_metrics(result)
            new_leaves = matched_leaves(state, self.structure, leaves, "step_fn", "state")
            joined = self.structure.join(new_leaves)
            scalars, stateful = split_metrics(metrics, "step_fn")
            new_ext_leaves, scalars = self.extensions.update(
                ext_leaves, self.structure.join(leaves), joined, scalars, self.none_due
            )
            watched = {index: new_leaves[index] for index in self.watched}
            layout = MetricLayout.of(scalars, "step_fn", watched=watched)
            states, state_leaves = StatefulMetrics.split(stateful, "step_fn")
            found.append((layout, states))
            row = layout.encode(scalars, list(watched.values()))
            return new_leaves, new_ext_leaves, row, state_leaves

        traced_once = jax.jit(one_step, inline=True)
        extensions, own = self.extensions.types, len(self.extensions.types)
        traced_once.trace(self.leaf_types, extensions, first_batch(batch) if grouped else batch)
        layout, states = found[0]
        computed_names = states.scalar_names(layout.names)
        ring, cursor = self.rings.types(layout)

        def call(
            leaves: Leaves, ext_leaves: Leaves, ring: jax.Array, cursor: jax.Array, batch: PyTree
        ) -> Carried:
            leaves, extended, row, new = traced_once(leaves, ext_leaves[:own], batch)
            return leaves, [*extended, *states.merge(ext_leaves[own:], new)], *write_row(ring, cursor, row)

        carried = [*extensions, *states.carried_types(ring.sharding)]
        arguments = [self.leaf_types, carried, ring, cursor, batch]
        if grouped:
            arguments += [jax.ShapeDtypeStruct((), np.int32, sharding=ring.sharding)] * 2
        shardings = jax.tree.map(lambda leaf: leaf.sharding, tuple(arguments[:4]))

        def traced(*donated: int) -> jax.stages.Traced:
            # keep_unused: a leaf that step_fn overwrites without reading it is donated all the same.
            jitted = jax.jit(
                _grouped(call) if grouped else call,
                donate_argnums=donated,
                out_shardings=shardings,
                keep_unused=True,
            )
            return jitted.trace(*arguments)

        donating = traced(0, 1, 2) if options.donate else traced(2)
        keeping = traced(2).lower() if options.donate and options.snapshot == "keep" else None
        return LoweredStep(layout, states, computed_names, donating.lower(), keeping, donating.jaxpr)


def first_batch(batches: tuple[PyTree, ...] | StackedBatches) -> PyTree:
    """Returns the first batch of a group; of a stacked one its shapes and dtypes."""
    if not isinstance(batches, StackedBatches):
        return batches[0]
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], jax.dtypes.canonicalize_dtype(leaf.dtype)),
        batches.batches,
    )


def _grouped(call: Callable[..., Carried]) -> Callable[..., Carried]:
    """Returns the function that runs the steps from `start` to `stop` of a tuple of batches.

    The number of steps is an argument, so that one executable serves a group that is cut short. On a 70 us step, 16
    steps per call took 0.29 of the time of single calls; unrolled they took 0.68. A tuple of batches is stacked, which
    copies them on the device: 1.07 on an H200 with 32 MB per 1.64 ms step. `StackedBatches` are only indexed.
    """

    def group(*arguments: Any) -> Carried:
        *carried, batches, start, stop = arguments
        if isinstance(batches, StackedBatches):
            stacked = batches.batches
        else:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)

        def body(index: jax.Array, carried: Carried) -> Carried:
            batch = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), stacked)
            return call(*carried, batch)

        return lax.fori_loop(start, stop, body, tuple(carried))

    return group
