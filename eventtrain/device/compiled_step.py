"""The compiled training step: step_fn, extensions and the metric ring in one dispatch.

It exists in two variants. The *donating* one overwrites the state it is given, as a bare jitted
loop does. The *keeping* one leaves the old state alone, which makes it a snapshot: nothing is
copied and nothing waits. Where the keeping one is not compiled yet, a device copy serves.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from eventtrain.device.executable_cache import ExecutableCache
from eventtrain.device.extensions import StepExtension
from eventtrain.device.fused_step import FusedStep, LoweredStep
from eventtrain.device.metric_codec import MetricLayout
from eventtrain.device.metric_ring import RingCarry, RingSource
from eventtrain.device.program import StepProgram
from eventtrain.device.state import PyTree, Skeleton, copy_leaves, replicated_sharding
from eventtrain.device.validation import check_leaves
from eventtrain.errors import SnapshotError, StepError

__all__ = ["Carry", "CompiledStep", "Kept"]

_logger = logging.getLogger(__name__)


class Carry(RingCarry):
    """What one step hands to the next: state and extension leaves, ring, cursor, rows used."""

    __slots__ = ("ext_leaves", "leaves")

    def __init__(
        self,
        leaves: list[jax.Array],
        ext_leaves: list[jax.Array],
        ring: jax.Array,
        cursor: jax.Array,
    ) -> None:
        super().__init__(ring, cursor)
        self.leaves = leaves
        self.ext_leaves = ext_leaves


class Kept(NamedTuple):
    """The leaves as of the step before a keeping call: untouched, for a snapshot."""

    leaves: list[jax.Array]
    ext_leaves: list[jax.Array]


class CompiledStep:
    """`step_fn`, compiled so that a call dispatches one step (or a group) and never waits.

    Args:
        step_fn: `(state, batch) -> (state, metrics)`, pure; metrics a flat dict of scalars.
        skeleton, leaves: of the state, from `split_state` and `place`. Only shapes, dtypes and
            shardings of the leaves are used (and their values to initialise extensions).
        extensions: run after every step, inside the computation.
        params: lens state -> weights, for the extensions.
        hyperparams_watched: indices of scalar state leaves whose value after each step is written
            to the ring beside the metrics (`MetricLayout.decode_watched`).
        capacity: rows of the ring: how many steps fit between two `take_ring`.
        steps_per_call: K > 1 compiles one executable for up to K steps a call.
        donate: whether a call overwrites the state it is given. The ring always is.
        keep: whether the keeping variant is lowered, for snapshots without a copy.
        compile_on_caller: runs `f` and returns `f()`, on the thread whose JAX settings count;
            tracing and lowering go through it.

    All methods belong to the training thread; `keeping_ready` and `program` may be asked from any.

    Attributes:
        layout: how to decode a row; set by `prepare`.
        capacity: as given.
        grouped: whether a call runs several steps.
    """

    layout: MetricLayout

    def __init__(
        self,
        step_fn: Callable[[PyTree, PyTree], tuple[PyTree, Mapping[str, Any]]],
        skeleton: Skeleton,
        leaves: Sequence[jax.Array],
        *,
        extensions: Sequence[StepExtension] = (),
        params: Callable[[PyTree], PyTree] = lambda state: state,
        hyperparams_watched: Sequence[int] = (),
        capacity: int = 1024,
        steps_per_call: int = 1,
        donate: bool = True,
        keep: bool = True,
        compile_on_caller: Callable[[Callable[[], LoweredStep]], LoweredStep] = lambda f: f(),
    ) -> None:
        sharding = replicated_sharding(leaves)
        self._fused = FusedStep(
            step_fn,
            skeleton,
            leaves,
            extensions=extensions,
            params=params,
            watched=hyperparams_watched,
            capacity=capacity,
            steps_per_call=steps_per_call,
            donate=donate,
            keep=keep,
            sharding=sharding,
        )
        self.capacity = capacity
        self._donate = donate
        self.grouped = steps_per_call > 1
        self._counts = [jax.device_put(np.int32(n), sharding) for n in range(steps_per_call + 1)]
        self._compile_on_caller = compile_on_caller
        self._executables = ExecutableCache(self._build)
        self._rings: RingSource | None = None
        self._donating: Callable[..., Any] = _unprepared

    @property
    def compilations(self) -> int:
        """How many batch signatures were compiled; each blocked its caller once."""
        return self._executables.compilations

    @property
    def keeping_ready(self) -> bool:
        """Whether a keeping call of the batch signature in use needs no device copy."""
        executable = self._executables.current
        return not self._donate or (executable is not None and executable.keeping is not None)

    def program(self) -> StepProgram | None:
        """What was compiled for the batch signature in use; None before `prepare`."""
        executable = self._executables.current
        return None if executable is None else StepProgram(executable.jaxpr, executable.donating)

    def prepare(self, batch: PyTree) -> None:
        """Trace, check and lower step_fn for `batch`, and compile the donating variant.

        `batch` is what the call will get: for K > 1 the tuple of K batches. Blocks until compiled.

        Raises:
            DataError: the batch holds something that is neither array nor number.
            StepError: step_fn raised, or returned no `(state, metrics)` pair.
            StateError: the state it returned differs in structure, shape, dtype, static leaf.
            MetricsError: its metrics are no flat dict of scalars.
        """
        self._donating = self._executables.select(batch).donating

    def initial(
        self,
        leaves: Sequence[jax.Array],
        ext_leaves: Sequence[jax.Array] | None = None,
        *,
        step: int = 0,
    ) -> Carry:
        """The carry to start from, after `prepare`; `leaves` will be donated by the first call.

        Without `ext_leaves` (a snapshot's, on resume) the extensions start anew at these weights,
        with `step` as the number of completed steps.

        Raises:
            StateError: leaves of other shapes, dtypes or shardings than the step was compiled for.
        """
        check_leaves(leaves, self._fused.skeleton, self._fused.leaf_types)
        if ext_leaves is None:
            ext_leaves = self._fused.initial_extensions(leaves, step)
        else:
            check_leaves(ext_leaves, self._fused.ext_skeleton, self._fused.ext_types)
        rings = self._ring_source()
        return Carry(list(leaves), list(ext_leaves), rings.fresh(), rings.zero)

    def __call__(
        self, carry: Carry, batch: PyTree, start: int = 0, stop: int = 1, *, keep: bool = False
    ) -> Kept | None:
        """Dispatch one step and return at once; `carry` becomes the state after it.

        For `steps_per_call=K > 1`, `batch` is a tuple of K batches and the steps `start` to
        `stop - 1` of it are run; pad a short group by repeating its last batch.

        Args:
            keep: leave the old leaves intact and return them. Without it they are donated.

        Raises:
            DataError, StepError, StateError, MetricsError: as in `prepare`, for a batch of a new
                signature, which is compiled here (blocking). `carry` is as it was.
            SnapshotError: no room on the device to keep a state. `carry` is as it was: call again
                without `keep`.
        """
        rows = carry.rows + stop - start
        if rows > self.capacity:
            raise StepError(
                f"The metric ring holds {self.capacity} rows and {carry.rows} are used: the next ones would "
                "overwrite them. Call take_ring() first."
            )
        counts = (self._counts[start], self._counts[stop]) if self.grouped else ()
        kept = None
        try:
            if keep:
                kept, outputs = self._call_keeping(carry, batch, counts)
            elif counts:
                outputs = self._donating(
                    carry.leaves, carry.ext_leaves, carry.ring, carry.cursor, batch, *counts
                )
            else:  # spelt out: unpacking nothing costs 0.2 us a step
                outputs = self._donating(carry.leaves, carry.ext_leaves, carry.ring, carry.cursor, batch)
        except (TypeError, ValueError) as error:
            if keep:  # the batch was looked at before: the state must be the reason
                self._check(carry)
                raise
            outputs = self._call_after(error, carry, batch, counts)
        carry.leaves, carry.ext_leaves, carry.ring, carry.cursor = outputs
        carry.rows = rows
        return kept

    def take_ring(self, carry: Carry) -> tuple[jax.Array, int]:
        """The ring, perhaps not computed yet, and its rows in use; `carry` gets a fresh one."""
        return self._ring_source().take(carry)

    def extension_states(self, ext_leaves: Sequence[jax.Array]) -> dict[str, PyTree]:
        """The extensions' states by name, from a carry's or a snapshot's leaves."""
        if not self._fused.extensions:
            return {}
        _, states = self._fused.ext_skeleton.join(ext_leaves)
        return states

    @property
    def extension_types(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Path -> shape, dtype and sharding of the extensions' leaves, in their order."""
        return dict(zip(self._fused.ext_skeleton.paths, self._fused.ext_types, strict=True))

    def request_keeping(self) -> None:
        """Start to compile the keeping variant in a daemon thread, once; returns at once."""
        if self._executables.current is not None:
            self._executables.current.start_keeping()

    def close(self) -> None:
        """Wait until no helper thread compiles any more; an interpreter must not exit before."""
        for executable in self._executables.all():
            executable.join()

    def _ring_source(self) -> RingSource:
        if self._rings is None:
            raise StepError("The step was not compiled yet: call prepare(batch) first.")
        return self._rings

    def _build(self, batch: PyTree) -> _Variants:
        lowered = self._compile_on_caller(lambda: self._fused.lower(batch))
        if self._rings is None:
            self.layout, self._rings = lowered.layout, lowered.rings
        else:
            self.layout.require_same(lowered.layout, "step_fn")
        return _Variants(lowered)

    def _call_after(
        self, error: Exception, carry: Carry, batch: PyTree, counts: tuple[jax.Array, ...]
    ) -> Any:
        """The call that `error` refused, by the executable for this batch's signature."""
        if carry.ring.is_deleted():
            raise error  # it came after the donation: not a refusal of the arguments
        executable = self._executables.reselect(error, batch, lambda: self._check(carry))
        self._donating = executable.donating
        return self._donating(carry.leaves, carry.ext_leaves, carry.ring, carry.cursor, batch, *counts)

    def _check(self, carry: Carry) -> None:
        check_leaves(carry.leaves, self._fused.skeleton, self._fused.leaf_types)
        check_leaves(carry.ext_leaves, self._fused.ext_skeleton, self._fused.ext_types)

    def _call_keeping(self, carry: Carry, batch: PyTree, counts: tuple[jax.Array, ...]) -> tuple[Kept, Any]:
        kept = Kept(carry.leaves, carry.ext_leaves)
        executable = self._executables.select(batch)
        self._donating = executable.donating
        call, leaves, ext_leaves = executable.donating, carry.leaves, carry.ext_leaves
        try:
            if executable.keeping is not None:
                call = executable.keeping
            elif self._donate:
                copies = copy_leaves([*leaves, *ext_leaves])
                leaves, ext_leaves = copies[: len(leaves)], copies[len(leaves) :]
            return kept, call(leaves, ext_leaves, carry.ring, carry.cursor, batch, *counts)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or carry.ring.is_deleted():
                raise
            raise SnapshotError(
                "No snapshot was taken: the device has no memory for a second state of "
                f"{sum(leaf.nbytes for leaf in kept.leaves)} bytes. Training can go on without "
                "it. Shard the state over more devices, or use a smaller batch."
            ) from error


class _Variants:
    """The executables of one batch signature; the keeping one may still be on its way."""

    def __init__(self, lowered: LoweredStep) -> None:
        self.donating = lowered.donating.compile()
        self.jaxpr = lowered.jaxpr
        self.keeping: Callable[..., Any] | None = None
        self._lowered = lowered.keeping
        self._thread: threading.Thread | None = None

    def start_keeping(self) -> None:
        if self._lowered is None or self._thread is not None:
            return
        self._thread = threading.Thread(
            target=self._compile_keeping, name="eventtrain-compile-keeping", daemon=True
        )
        self._thread.start()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _compile_keeping(self) -> None:
        lowered, self._lowered = self._lowered, None
        assert lowered is not None
        try:
            self.keeping = lowered.compile()
        except Exception as error:  # out of memory, most likely
            _logger.warning(
                "The keeping variant of the step could not be compiled (%s: %s); snapshots go on to take a "
                "copy on the device.",
                type(error).__name__,
                error,
            )


def _unprepared(*_: object) -> Any:
    raise StepError("The step was not compiled yet: call prepare(batch) first.")
