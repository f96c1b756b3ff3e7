"""One compiled object for each kind of batch, found again without looking at every batch.

A compiled object refuses a batch of another shape, dtype, sharding or structure, so nobody looks
at a batch before calling one: the refusal is the check.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from eventtrain.device.state import PyTree, is_array, is_weak
from eventtrain.errors import DataError

__all__ = ["ExecutableCache"]

E = TypeVar("E")


class ExecutableCache(Generic[E]):
    """What `build` made of each batch signature met so far.

    Belongs to the thread that calls the compiled objects.

    Attributes:
        current: what was selected last.
    """

    def __init__(self, build: Callable[[PyTree], E]) -> None:
        self._build = build
        self._built: dict[Hashable, E] = {}
        self._key: Hashable = None
        self.current: E | None = None

    @property
    def compilations(self) -> int:
        """How many signatures were built."""
        return len(self._built)

    def all(self) -> list[E]:
        """What was built, in order."""
        return list(self._built.values())

    def select(self, batch: PyTree) -> E:
        """What serves `batch`, built if its signature is new; blocks while building.

        Raises:
            DataError: a leaf of the batch is no array and no number.
        """
        return self._select(batch, _signature(batch))

    def reselect(self, error: Exception, batch: PyTree, check: Callable[[], None]) -> E:
        """What serves a batch that `current` refused with `error`; otherwise as `select`.

        If the batch has the signature of `current`, the refusal has another reason: then `check`
        may raise what explains it, or else `error` is raised.
        """
        key = _signature(batch)
        if key == self._key:
            check()
            raise error
        return self._select(batch, key)

    def _select(self, batch: PyTree, key: Hashable) -> E:
        if key not in self._built:
            self._built[key] = self._build(batch)
        self._key, self.current = key, self._built[key]
        return self._built[key]


def _signature(batch: PyTree) -> Hashable:
    """All that a compiled object depends on: structure, and each leaf's shape, dtype, sharding."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(batch)
    kinds: list[Hashable] = []
    for path, leaf in with_paths:
        if isinstance(leaf, jax.Array):
            sharding = leaf.sharding if leaf.committed else None
            kinds.append((leaf.shape, leaf.dtype, is_weak(leaf), sharding))
        elif is_array(leaf):
            kinds.append((leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype), False, None))
        elif isinstance(leaf, (bool, int, float, complex)):
            kinds.append(type(leaf))
        else:
            raise DataError(_not_an_array(jax.tree_util.keystr(path), leaf))
    return treedef, tuple(kinds)


def _not_an_array(path: str, leaf: Any) -> str:
    given = type(leaf).__name__
    if isinstance(leaf, (np.ndarray, np.generic)):
        given += f" of dtype {leaf.dtype}"  # pyright: ignore[reportUnknownMemberType]
    return (
        f"batch{path} is {given}, but the compiled step takes only arrays and numbers. Drop it "
        "from the batch, or encode it as numbers (labels as integers, text as token ids)."
    )
