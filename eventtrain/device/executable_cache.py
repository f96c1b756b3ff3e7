"""Compiled executables, one for each batch signature, selected without inspecting every batch.

An executable refuses a batch of another structure, shape, dtype or sharding with a TypeError or ValueError, before it
donates anything. Its callers call the current executable, and select another one when it refuses. Executables compiled
ahead of time dispatch as fast as jitted functions (11, 60 and 650 us for 8, 64 and 512 leaves) and never recompile
unseen. They accept a float64 NumPy array where float32 was lowered, as jit does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeAlias, TypeVar

import jax

from eventtrain.device.state import PyTree, is_array, is_weak, type_of
from eventtrain.errors import DataError, StepError, amend, listed

E = TypeVar("E")

LowerOnCaller: TypeAlias = Callable[[Callable[[], Any]], Any]
"""Runs a function that traces and lowers, on the thread whose JAX settings count; returns its result.

Lowering in another thread would lose `jax.set_mesh`, `jax.enable_x64`, the matmul precision and the default device of
the thread that called `fit`. Compiling what was lowered needs none of them.
"""


def lower_here(function: Callable[[], Any]) -> Any:
    """The `LowerOnCaller` where that thread is the present one."""
    return function()


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles `lowered`. It takes arrays of int4 and the like, committed ones too, as a jitted function does.

    Before 0.12, JAX refuses to call a compiled executable with a committed array whose elements are smaller than a
    byte, its own outputs included: the executable reports a layout with 4 bits an element, and each array one with 0.
    No public setting of layouts avoids that, so what JAX compares with is removed. Jitted functions do not compare.
    """
    executable = lowered.compile()
    inner: Any = getattr(executable, "_executable", None)
    layouts: Any = getattr(inner, "_xla_in_layouts", ())
    if any(_is_sub_byte(layout) for layout in layouts):
        inner._xla_in_layouts = [None if _is_sub_byte(layout) else layout for layout in layouts]
    return executable


def _is_sub_byte(layout: Any) -> bool:
    return bool(getattr(layout, "sub_byte_element_size_in_bits", 0))


class ExecutableCache(Generic[E]):
    """Maps each batch signature met so far to what `build` made for it. Training thread only.

    Attributes:
        built: signature -> what was built, in order.
        current: what was selected last; None before the first.
    """

    def __init__(
        self,
        function: str,
        build: Callable[[PyTree], E],
        one_batch: Callable[[Any], PyTree] = lambda batch: batch,
    ) -> None:
        """`one_batch` returns the batch that messages describe, or its shapes and dtypes."""
        self._function = function
        self._build = build
        self._one_batch = one_batch
        self._signature: Hashable = None
        self._types: dict[Hashable, dict[str, str]] = {}
        self.built: dict[Hashable, E] = {}
        self.current: E | None = None

    def require(self) -> E:
        """Returns ``current``; raises a StepError if there is none."""
        if self.current is None:
            raise StepError(f"{self._function} was not compiled yet. Call prepare(batch) first.")
        return self.current

    def select(self, batch: PyTree) -> E:
        """Returns what serves `batch`; builds it if its signature is new, which blocks.

        Raises:
            DataError: a leaf of the batch is neither an array nor a number.
        """
        return self._select(batch, _signature_of(batch))

    def reselect(self, refusal: Exception, batch: PyTree, check: Callable[[], None]) -> E:
        """Returns what serves a batch that `current` refused; as `select`.

        If the batch has the signature of `current`, another argument was the reason: raises what `check` raises, or
        else `refusal`.
        """
        signature = _signature_of(batch)
        if signature == self._signature:
            check()
            raise refusal
        return self._select(batch, signature)

    def _select(self, batch: PyTree, signature: Hashable) -> E:
        if signature not in self.built:
            one_batch = self._one_batch(batch)
            try:
                self.built[signature] = self._build(batch)
            except StepError as error:
                describe_batch(error, one_batch, self._types.get(self._signature))
                raise
            self._types[signature] = types_by_path(one_batch)
        self._signature, self.current = signature, self.built[signature]
        return self.built[signature]


def types_by_path(batch: PyTree) -> dict[str, str]:
    """Returns dtype and shape of each leaf, such as "float32[32,64]", by its path in `batch`."""
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    return {f"batch{jax.tree_util.keystr(path)}": type_of(leaf) for path, leaf in leaves}


def describe_batch(error: StepError, batch: PyTree, before: dict[str, str] | None = None) -> None:
    """Adds the types of a batch to the message of the error that it led to.

    Of a first batch only if a function of the user raised, because else the message says what is wrong.

    Args:
        error: on its way.
        batch: arrays, or their shapes and dtypes.
        before: `types_by_path` of the batch before it.
    """
    types = types_by_path(batch)
    changed: list[str] = []
    if before is not None and before.keys() == types.keys():
        changed = [
            f"{path} is {kind} instead of {before[path]} as before"
            for path, kind in types.items()
            if kind != before[path]
        ]
    if types and (before is not None or error.__cause__ is not None):
        amend(
            error, after=f"Here {listed(changed or [f'{path} is {kind}' for path, kind in types.items()])}."
        )


def argument_types(batch: PyTree) -> Hashable:
    """Returns what tracing depends on: structure, and each leaf's shape and dtype, but not where it is.

    Raises:
        DataError: a leaf of the batch is neither an array nor a number.
    """
    treedef, kinds = _signature_of(batch)
    return treedef, tuple(kind[:3] if isinstance(kind, tuple) else kind for kind in kinds)


def _signature_of(batch: PyTree) -> tuple[Any, tuple[Any, ...]]:
    """Returns all that an executable depends on: structure, and each leaf's shape, dtype, sharding."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(batch)
    kinds: list[Any] = []
    for path, leaf in with_paths:
        if isinstance(leaf, jax.Array):
            sharding = leaf.sharding if leaf.committed else None
            kinds.append((leaf.shape, leaf.dtype, is_weak(leaf), sharding))
        elif is_array(leaf):
            kinds.append((leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype), False, None))
        elif isinstance(leaf, (bool, int, float, complex)):
            kinds.append(type(leaf))
        else:
            given = type(leaf).__name__ + (f" of dtype {leaf.dtype}" if hasattr(leaf, "dtype") else "")
            raise DataError(
                f"batch{jax.tree_util.keystr(path)} is {given}, but a compiled function takes only arrays and numbers. "
                "Remove it from the batch, or encode it as numbers (labels as integers, text as token ids)."
            )
    return treedef, tuple(kinds)
