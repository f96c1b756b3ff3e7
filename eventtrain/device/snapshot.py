"""The state as of one step, kept on the device while training goes on."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eventtrain.device.host_memory import has_pinned_host, is_on_host, to_pinned_host
from eventtrain.device.state import PyTree, Skeleton
from eventtrain.errors import SnapshotError, StateError

__all__ = ["HostKey", "Snapshot"]


@dataclasses.dataclass(frozen=True, eq=False)
class HostKey:
    """A typed PRNG key array on the host: NumPy has no dtype for it.

    `data` is uint32[..., words of the implementation] as `jax.random.key_data` gives it, `impl`
    the name of the implementation. A leaf, not a container, for JAX.
    """

    data: np.ndarray[Any, np.dtype[np.uint32]]
    impl: str

    def wrap(self) -> jax.Array:
        """The key array again, on the default device."""
        return jax.random.wrap_key_data(jnp.asarray(self.data), impl=self.impl)


class Snapshot:
    """A reference to the state after `step`, safe from donation.

    Args:
        step: completed steps.
        leaves, skeleton: of the state. The leaves must never be donated: they come from a keeping
            call, or are a copy.
        tag: the name under which it can be restored.
        extensions: the extension leaves of the same step, for a restore.
        extension_paths: their names.

    It holds one whole state on the device until `release`. Any thread may use it.
    """

    def __init__(
        self,
        step: int,
        leaves: Sequence[jax.Array],
        skeleton: Skeleton,
        *,
        tag: str | None = None,
        extensions: Sequence[jax.Array] = (),
        extension_paths: Sequence[str] = (),
    ) -> None:
        self.step = step
        self.tag = tag
        self.extension_paths = tuple(extension_paths)
        self.size_bytes = sum(leaf.nbytes for leaf in (*leaves, *extensions))
        self._skeleton = skeleton
        self._lock = threading.Lock()
        self._held: tuple[list[jax.Array], list[jax.Array]] | None
        self._held = (list(leaves), list(extensions))

    def __repr__(self) -> str:
        released = ", released" if self.released else ""
        return f"Snapshot(step={self.step}, tag={self.tag!r}, {self.size_bytes} bytes{released})"

    @property
    def released(self) -> bool:
        """Whether `release` was called."""
        with self._lock:
            return self._held is None

    @property
    def leaves(self) -> list[jax.Array]:
        """The state's array leaves, on the device; never donate them. Never blocks.

        Raises:
            SnapshotError: after `release`.
        """
        return list(self._references()[0])

    @property
    def extensions(self) -> list[jax.Array]:
        """The extensions' array leaves of the same step; as `leaves`."""
        return list(self._references()[1])

    @property
    def state(self) -> PyTree:
        """The state as the pytree it was given as, on the device; as `leaves`.

        Donating it to a function of one's own destroys the snapshot.
        """
        return self._skeleton.join(self._references()[0])

    def host_state(self) -> PyTree:
        """The state with every array as a NumPy copy, typed PRNG keys as `HostKey`.

        Blocks until the step was computed and its state has been transferred: not for the training
        thread. All transfers are started before the first is waited for. A `release` meanwhile
        does not disturb it.

        Raises:
            SnapshotError: after `release`, or if a leaf was donated against the rules.
        """
        leaves, _ = self._references()
        return self._skeleton.join(self._on_host(leaves, copy=True))

    def host_leaves(self, only: Collection[str] | None = None) -> dict[str, Any]:
        """The arrays of the state by their path, or those of the paths `only`, read-only; as `host_state`.

        Where the device's memory is the host's (CPU) they are views, which keep that memory alive: a copy of 120 MB
        took 0.26 s here, most of it to get the pages, and then hindered the step that trains meanwhile.

        Raises:
            StateError: two of them have the same path, so that they could not be told apart.
        """
        leaves, _ = self._references()
        named = [(path, leaf) for path, leaf in zip(self._skeleton.paths, leaves, strict=True)
                 if only is None or path in only]  # fmt: skip
        fetched = self._on_host([leaf for _, leaf in named])
        by_path = {path: leaf for (path, _), leaf in zip(named, fetched, strict=True)}
        if len(by_path) < len(named):
            raise StateError(
                "Two leaves of the state have the same path, as jax.tree_util.keystr writes it. Register its classes "
                "with keys that differ (jax.tree_util.register_pytree_with_keys)."
            )
        return by_path

    def host_extensions(self) -> dict[str, Any]:
        """The extensions' arrays by path; as `host_leaves`."""
        _, extensions = self._references()
        return dict(zip(self.extension_paths, self._on_host(extensions), strict=True))

    def share(self) -> Snapshot:
        """Another snapshot of the same arrays, to be released on its own.

        Raises:
            SnapshotError: after `release`.
        """
        return self.with_extensions(self.extensions, self.extension_paths)

    def with_extensions(self, extensions: Sequence[jax.Array], paths: Sequence[str]) -> Snapshot:
        """As `share`, with other extension leaves, named `paths`."""
        return Snapshot(
            self.step,
            self.leaves,
            self._skeleton,
            tag=self.tag,
            extensions=extensions,
            extension_paths=paths,
        )

    def move_to_host(self) -> bool:
        """Have pinned host memory hold it instead of an accelerator, which gets its memory back; whether that is so.

        Blocks until the step was computed and its state has been transferred. False, and nothing is done, where a
        device has no such memory. On a CPU there is nothing to move.

        Raises:
            SnapshotError: after `release`.
        """
        held = self._references()
        # Keys stay: they are small, and reading one is a computation, which wants it on the device.
        on_device = [leaf for part in held for leaf in part if not (is_on_host(leaf) or _is_key(leaf))]
        if not on_device:
            return True
        if not all(has_pinned_host(leaf) for leaf in on_device):
            return False
        there = dict(zip(map(id, on_device), to_pinned_host(on_device), strict=True))
        jax.block_until_ready(list(there.values()))
        leaves, extensions = ([there.get(id(leaf), leaf) for leaf in part] for part in held)
        moved = (leaves, extensions)
        with self._lock:
            if self._held is held:  # else it was released meanwhile
                self._held = moved
        return True

    def release(self) -> None:
        """Give the device memory back, as soon as nobody else refers to it. May be repeated."""
        with self._lock:
            self._held = None

    def _on_host(self, leaves: Sequence[jax.Array], *, copy: bool = False) -> list[Any]:
        for leaf in leaves:
            if leaf.is_deleted():
                raise SnapshotError(
                    f"The snapshot of step {self.step} was destroyed: its state was donated to a "
                    "jitted function. Pass such a function a copy of snapshot.state."
                )
            leaf.copy_to_host_async()
        return [_on_host(leaf, copy) for leaf in leaves]

    def _references(self) -> tuple[list[jax.Array], list[jax.Array]]:
        with self._lock:
            if self._held is None:
                raise SnapshotError(
                    f"The snapshot of step {self.step} (tag {self.tag!r}) was released: its state "
                    "is gone. Read it before release(), or take another one."
                )
            return self._held


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _on_host(leaf: jax.Array, copy: bool) -> Any:
    if _is_key(leaf):
        data = np.array(jax.random.key_data(leaf))
        return HostKey(data, str(jax.random.key_impl(leaf)))
    return np.array(leaf) if copy else np.asarray(leaf)
