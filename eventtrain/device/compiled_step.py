"""The compiled training step: step_fn, extensions and the metric ring in one dispatch.

Each batch signature is compiled in two variants. The *donating* one overwrites the state it is given, as a bare jitted
loop does. The *keeping* one leaves that state alone, so that a reference to it is a snapshot: nothing is copied and
nothing waits. On an H200 a keeping step took as long as a donating one (134 and 136 ms); a copy of a 120 MB state on a
CPU takes 28 to 62 ms.

- Owner. The loop owns the carry; a donating call destroys all arrays in it but the cursor and puts the new ones in
  their place. Arrays of the carry that another object refers to must be followed by a keeping call.
- Errors. Every error is raised before the donation: the carry is as it was, and still valid.
- Threads. All calls, tracing and lowering belong to the training thread, since another thread would break the order of
  collectives and lose JAX's settings. The keeping variant is compiled by a helper thread: compiling beside the loop
  slows it (p50 12 -> 24 ms), compiling inside it would stop it. Until then a snapshot is a copy on the device.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from eventtrain.device.executable_cache import ExecutableCache, LowerOnCaller, compile_lowered, lower_here
from eventtrain.device.extensions import ExtensionStates, ParamsLens, StepExtension
from eventtrain.device.fused_step import FusedStep, LoweredStep, StepFn, StepOptions, first_batch
from eventtrain.device.metric_ring import MetricRings, RingCarry, TakenRing
from eventtrain.device.placement import put
from eventtrain.device.state import Leaves, PyTree, TreeStructure, abstract, copy_leaves, replicated_sharding
from eventtrain.device.stateful_metrics import CompiledStates, HostArray, TakenStates
from eventtrain.device.validation import check_leaves
from eventtrain.errors import SnapshotError, first_lines

_logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False, kw_only=True)
class Carry(RingCarry):
    """State that one step hands to the next, as in `lax.scan`. Training thread only.

    Attributes:
        leaves: array leaves of the training state; donated.
        ext_leaves: array leaves of `ExtensionStates`, and behind them what is carried of metrics with state; donated.
        step: completed steps; only `PeriodicStep` counts them.
    """

    leaves: Leaves
    ext_leaves: Leaves
    step: int = 0


class CompiledStep:
    """`step_fn`, compiled so that a call dispatches one step (or a group) and never waits.

    Args:
        step_fn: `(state, batch) -> (state, metrics)`, pure; metrics a flat dict of scalars.
        structure, leaves: of the state, from `split_state` and `place`. Only shapes, dtypes and shardings of the leaves
            are used (and their values to initialise extensions).
        leaf_types: how to trace the leaves; by default as they are.
        extensions, params: computed after every step, from the weights that the lens `params` finds in the state.
        hyperparams_watched: indices of scalar state leaves whose value after each step is written to the ring beside
            the metrics.

    All methods but `program` belong to the training thread.

    Attributes:
        capacity: rows of the ring.
        grouped: whether a call runs several steps.
    """

    def __init__(
        self,
        step_fn: StepFn,
        structure: TreeStructure,
        leaves: Sequence[jax.Array],
        *,
        leaf_types: Sequence[jax.ShapeDtypeStruct] | None = None,
        extensions: Sequence[StepExtension] = (),
        params: ParamsLens = lambda state: state,
        hyperparams_watched: Sequence[int] = (),
        options: StepOptions | None = None,
        lower_on_caller: LowerOnCaller = lower_here,
    ) -> None:
        options, sharding = options or StepOptions(), replicated_sharding(leaves)
        self.capacity = options.capacity
        self.grouped = options.steps_per_call > 1
        self._fused = FusedStep(
            step_fn,
            structure,
            leaf_types=abstract(leaves) if leaf_types is None else list(leaf_types),
            extensions=ExtensionStates(extensions, params, structure, leaves),
            watched=hyperparams_watched,
            rings=MetricRings("step_fn", options.capacity, sharding),
            options=options,
        )
        self._extension_count = len(self._fused.extensions.types)
        self._states = CompiledStates(sharding)
        self._computed_names = frozenset[str]()
        counts = range(options.steps_per_call + 1)
        self._counts = [put(np.int32(count), sharding) for count in counts]
        self._lower_on_caller = lower_on_caller
        self._executables = self._cache(self._fused)
        # Of the current executable: one look-up less at every step. Before prepare() it raises.
        self._donating: Callable[..., Any] = lambda *_: self._executables.require()

    @property
    def compilations(self) -> int:
        """Number of batch signatures that were compiled; each blocked its caller once."""
        return len(self._executables.built)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics of a step, after `prepare`."""
        return self._fused.rings.layout.names

    @property
    def computed_names(self) -> frozenset[str]:
        """Names of the scalars that metrics with state compute for an epoch, after `prepare`."""
        return self._computed_names

    def program(self) -> StepProgram | None:
        """Returns the compiled step for the batch signature in use; None before `prepare`."""
        executable = self._executables.current
        return None if executable is None else StepProgram(executable.jaxpr, executable.donating)

    def prepare(self, batch: PyTree) -> None:
        """Traces and checks step_fn for `batch` (K > 1: the tuple of K batches), and compiles the donating variant.

        Blocks until compiled.

        Raises:
            DataError: the batch has a leaf that is neither an array nor a number.
            StepError: step_fn raised, or did not return a pair `(state, metrics)`.
            StateError: the state it returned differs in structure, shape, dtype or static leaf.
            MetricsError: its metrics are not a flat dict of scalars.
        """
        self._donating = self._executables.select(batch).donating

    def initial(
        self,
        leaves: Sequence[jax.Array],
        ext_leaves: Sequence[jax.Array] | None = None,
        *,
        step: int = 0,
        states: Sequence[HostArray] = (),
    ) -> Carry:
        """Returns the carry to start from, after `prepare`; the first call will donate `leaves`.

        Without `ext_leaves` the extensions are initialised from these weights, with `step` as the number of completed
        steps. `states` are those of the metrics of an epoch that was cut short, from `take_states`.

        Raises:
            StateError: leaves of other shapes, dtypes or shardings than the step was compiled for, or other states.
        """
        ring, cursor = self._fused.rings.fresh()
        self._check(leaves, ext_leaves)
        if ext_leaves is None:
            ext_leaves = self._fused.extensions.init(leaves, step)
        carried = [*ext_leaves, *self._states.initial(states)]
        return Carry(ring, cursor, leaves=list(leaves), ext_leaves=carried, step=step)

    def __call__(
        self, carry: Carry, batch: PyTree, start: int = 0, stop: int = 1, *, keep: bool = False
    ) -> None:
        """Dispatches one step and returns at once; `carry` becomes the state after it.

        For `steps_per_call=K > 1`, `batch` is a tuple of K batches and the steps `start` to `stop - 1` of it are run;
        pad a short group by repeating its last batch.

        Args:
            keep: leave the arrays in `carry.leaves` and `carry.ext_leaves` intact, for a caller that took references to
                them. Without it they are donated.

        Raises:
            DataError, StepError, StateError, MetricsError: as in `prepare`, for a batch of a new signature, which is
                compiled here (blocking).
            SnapshotError: no room on the device to keep a state: call again without `keep`.
        """
        rows = carry.rows + stop - start
        if rows > self.capacity:
            raise self._fused.rings.refuse_more(carry)
        counts = (self._counts[start], self._counts[stop]) if self.grouped else ()
        try:
            if keep:
                outputs = self._call_keeping(carry, batch, counts)
            elif counts:
                outputs = self._donating(
                    carry.leaves, carry.ext_leaves, carry.ring, carry.cursor, batch, *counts
                )
            else:  # spelt out: unpacking nothing costs 0.2 us a step
                outputs = self._donating(carry.leaves, carry.ext_leaves, carry.ring, carry.cursor, batch)
        except (TypeError, ValueError) as error:
            outputs = self._call_after(error, carry, batch, counts, keep)
        carry.leaves, carry.ext_leaves, carry.ring, carry.cursor = outputs
        carry.rows = rows

    def take_ring(self, carry: Carry, window: Any = None) -> TakenRing:
        """Returns the ring of `carry`, with `window` as the caller's record of it; `carry` gets a fresh one."""
        return self._fused.rings.take(carry, window)

    def begin_epoch(self, carry: Carry) -> None:
        """Begins the metrics with state from scratch: the next step finds no state."""
        carry.ext_leaves[self._extension_count :] = self._states.restarted(self._carried_states(carry))

    def take_values(self, carry: Carry, window: Any = None) -> TakenStates | None:
        """Dispatches `compute()` of the metrics with state. Returns its results by name; None without such metrics."""
        states = self._carried_states(carry)
        return self._states.computed(states, window) if states else None

    def take_states(self, carry: Carry, window: Any = None) -> TakenStates | None:
        """Returns a copy of the states of the metrics, for `initial`; None without such metrics."""
        states = self._carried_states(carry)
        return self._states.copied(states, window) if states else None

    def extension_leaves(self, carry: Carry) -> Leaves:
        """Returns the leaves of the extensions only."""
        return carry.ext_leaves[: self._extension_count]

    def with_extensions(self, carry: Carry, extensions: Sequence[jax.Array]) -> Leaves:
        """Returns `carry.ext_leaves` with other leaves of the extensions, from another step.

        The first one, which counts completed steps, stays, and so do the states of metrics.
        """
        return [*self.extension_leaves(carry)[:1], *extensions[1:], *self._carried_states(carry)]

    def _carried_states(self, carry: Carry) -> Leaves:
        return carry.ext_leaves[self._extension_count :]

    def extension_states(self, ext_leaves: Sequence[jax.Array]) -> dict[str, PyTree]:
        """Returns the extensions' states by name, from the leaves of a carry or a snapshot."""
        return self._fused.extensions.by_name(ext_leaves[: self._extension_count])

    @property
    def extension_types(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Path -> shape, dtype and sharding of the extensions' leaves, in their order."""
        extensions = self._fused.extensions
        return dict(zip(extensions.structure.paths, extensions.types, strict=True))

    def request_keeping(self) -> None:
        """Starts to compile the keeping variant in a daemon thread, once; returns at once."""
        if self._executables.current is not None:
            self._executables.current.start_keeping()

    def close(self) -> None:
        """Waits until no helper thread compiles; the interpreter must not exit before that."""
        for executable in self._executables.built.values():
            if executable.thread is not None:
                executable.thread.join()

    def _cache(self, fused: FusedStep) -> ExecutableCache[_Variants]:
        build = partial(self._build, fused)
        return ExecutableCache("step_fn", build, first_batch if self.grouped else lambda batch: batch)

    def _build(self, fused: FusedStep, batch: PyTree) -> _Variants:
        lowered: LoweredStep = self._lower_on_caller(lambda: fused.lower(batch))
        self._fused.rings.adopt(lowered.layout)
        self._states.adopt(lowered.states, self._lower_on_caller)
        self._computed_names = lowered.computed_names
        return _Variants(lowered)

    def _call_after(
        self, refusal: Exception, carry: Carry, batch: PyTree, counts: tuple[jax.Array, ...], keep: bool
    ) -> Any:
        if carry.ring.is_deleted():
            raise refusal  # it came after the donation: the arguments were not refused
        executable = self._executables.reselect(
            refusal, batch, lambda: self._check(carry.leaves, carry.ext_leaves)
        )
        self._donating = executable.donating
        if keep:
            return self._call_keeping(carry, batch, counts)
        return self._donating(carry.leaves, carry.ext_leaves, carry.ring, carry.cursor, batch, *counts)

    def _check(self, leaves: Sequence[jax.Array], ext_leaves: Sequence[jax.Array] | None) -> None:
        fused = self._fused
        check_leaves("state", leaves, fused.structure, fused.leaf_types)
        if ext_leaves is not None:
            own = ext_leaves[: self._extension_count]
            check_leaves("ext_state", own, fused.extensions.structure, fused.extensions.types)

    def _call_keeping(self, carry: Carry, batch: PyTree, counts: tuple[jax.Array, ...]) -> Any:
        executable = self._executables.require()
        call, leaves, ext_leaves = executable.donating, carry.leaves, carry.ext_leaves
        try:
            if jax.process_count() > 1:
                executable.finish_keeping()  # every process dispatches the same programs
            if executable.keeping is not None:
                call = executable.keeping
            elif self._fused.options.donate:
                copies = copy_leaves([*leaves, *ext_leaves])
                leaves, ext_leaves = copies[: len(leaves)], copies[len(leaves) :]
            return call(leaves, ext_leaves, carry.ring, carry.cursor, batch, *counts)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or carry.ring.is_deleted():
                raise
            raise SnapshotError(
                "No snapshot was taken: the device has no memory for a second state of "
                f"{sum(leaf.nbytes for leaf in carry.leaves)} bytes. Training continues without it. Shard the state "
                "over more devices, or use a smaller batch."
            ) from error


class _Variants:
    """The executables of one batch signature.

    `keeping` is written once, by the helper thread that compiles it; None until then, and for good where it is not
    wanted or does not compile.
    """

    def __init__(self, lowered: LoweredStep) -> None:
        self.donating = compile_lowered(lowered.donating)
        self.jaxpr = lowered.jaxpr
        self.keeping: Callable[..., Any] | None = None
        self.thread: threading.Thread | None = None
        self._lowered = lowered.keeping

    def start_keeping(self) -> None:
        """Starts to compile the keeping variant in a thread, once."""
        if self._lowered is None:
            return
        self.thread = threading.Thread(
            target=self._compile_keeping,
            args=(self._lowered,),
            name="eventtrain-compile-keeping",
            daemon=True,
        )
        self._lowered = None
        self.thread.start()

    def finish_keeping(self) -> None:
        """Waits until the keeping variant is compiled, or cannot be."""
        self.start_keeping()
        if self.thread is not None:
            self.thread.join()

    def _compile_keeping(self, lowered: jax.stages.Lowered) -> None:
        try:
            self.keeping = compile_lowered(lowered)
        except Exception as error:  # out of memory, most likely
            _logger.warning(
                "Cannot compile the keeping variant of the step (%s: %s). Each snapshot takes a copy on the device "
                "instead.",
                type(error).__name__,
                first_lines(str(error)),
            )


class StepProgram:
    """The text of the compiled step (step_fn, extensions, write of the metrics), and its cost according to XLA.

    The texts are made when they are first read, which takes seconds for a large step: not on an event loop. Any thread.
    Nothing is compiled for it.
    """

    def __init__(self, traced: Any, compiled: jax.stages.Compiled) -> None:
        self._traced = traced
        self._compiled = compiled

    @cached_property
    def jaxpr(self) -> str:
        """The program as JAX traced it."""
        return str(self._traced)

    @cached_property
    def hlo(self) -> str:
        """The program as XLA compiled it, after its optimisations; empty where the backend does not give it."""
        return _if_supported(self._compiled.as_text) or ""

    @cached_property
    def cost(self) -> Mapping[str, float]:
        """XLA's estimates for one call, such as "flops" and "bytes accessed"; empty where the backend gives none.

        XLA counts the body of a loop once where it does not know the number of iterations: with ``steps_per_call``
        above 1 the estimates are those of one step.
        """
        analysis = _if_supported(self._compiled.cost_analysis) or {}
        return MappingProxyType({str(name): float(value) for name, value in analysis.items()})

    @cached_property
    def memory(self) -> Mapping[str, int]:
        """XLA's memory for one call on one device, in bytes; empty where the backend tells none.

        "arguments" and "outputs"; "aliased": of the outputs, where they take the place of donated arguments;
        "temporary"; "code".
        """
        stats = _if_supported(self._compiled.memory_analysis)
        if stats is None:
            return MappingProxyType({})
        sizes = {
            "arguments": stats.argument_size_in_bytes,
            "outputs": stats.output_size_in_bytes,
            "aliased": stats.alias_size_in_bytes,
            "temporary": stats.temp_size_in_bytes,
            "code": stats.generated_code_size_in_bytes,
        }
        return MappingProxyType({name: int(size) for name, size in sizes.items()})


def _if_supported(question: Callable[[], Any]) -> Any:
    """Returns the answer, or None where the backend cannot give one."""
    try:
        return question()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
