"""Snapshot: the state as of one step, on the device while training continues.

Nothing is copied when it is taken: it refers to arrays of the carry, and the step that follows leaves them alone.
Whatever reads it on the host reads it through pinned host memory, leaf by leaf; for storage it moves there.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eventtrain.device.pinned_memory import PinnedPool, is_key, must_move
from eventtrain.device.placement import own_shards, read
from eventtrain.device.state import Leaves, PyTree, TreeStructure
from eventtrain.errors import SnapshotError, StateError


@dataclasses.dataclass(frozen=True, eq=False)
class HostKey:
    """A typed PRNG key array on the host, for which NumPy has no dtype.

    `data` is uint32[..., words of the implementation] as `jax.random.key_data` gives it, `impl` the name of the
    implementation. A leaf, not a container, for JAX.
    """

    data: np.ndarray[Any, np.dtype[np.uint32]]
    impl: str

    def wrap(self) -> jax.Array:
        """Returns the key array, on the default device."""
        return jax.random.wrap_key_data(jnp.asarray(self.data), impl=self.impl)


class Snapshot:
    """A reference to the state after `step`, safe from donation. Any thread may use it.

    It holds one whole state on the device until `release`.

    Args:
        step: completed steps.
        leaves, structure: of the state. The leaves must never be donated: the step after them keeps them, or they are a
            copy.
        tag: the name under which it can be restored.
        extensions, extension_paths: the extension leaves of the same step, and their names.
        pool: the pinned host memory of the run; None: its own, without a limit.
    """

    def __init__(
        self,
        step: int,
        leaves: Sequence[jax.Array],
        structure: TreeStructure,
        *,
        tag: str | None = None,
        extensions: Sequence[jax.Array] = (),
        extension_paths: Sequence[str] = (),
        pool: PinnedPool | None = None,
    ) -> None:
        self.step = step
        self.tag = tag
        self.extension_paths = tuple(extension_paths)
        self.pool = pool or PinnedPool()
        self.size_bytes = sum(leaf.nbytes for leaf in (*leaves, *extensions))
        self._structure = structure
        self._lock = threading.Lock()
        self._held: tuple[Leaves, Leaves] | None = (list(leaves), list(extensions))

    def __repr__(self) -> str:
        released = ", released" if self.released else ""
        return f"Snapshot(step={self.step}, tag={self.tag!r}, {self.size_bytes} bytes{released})"

    @property
    def released(self) -> bool:
        """Whether `release` was called."""
        return self._held is None

    @property
    def leaves(self) -> Leaves:
        """The state's array leaves, on the device; never donate them. Never blocks.

        Raises:
            SnapshotError: after `release`.
        """
        return list(self._references()[0])

    @property
    def extensions(self) -> Leaves:
        """The extensions' array leaves of the same step; as `leaves`."""
        return list(self._references()[1])

    @property
    def state(self) -> PyTree:
        """The state as the pytree it was given as, on the device; as `leaves`.

        Donating it to a function of your own destroys the snapshot.
        """
        return self._structure.join(self._references()[0])

    def leaves_by_path(self, only: Container[str] | None = None) -> dict[str, jax.Array | HostKey]:
        """Returns the arrays of the state, or those of the paths `only`, where they are; keys as `HostKey`.

        Never donate them. Blocks only to read keys.

        Raises:
            SnapshotError: after `release`, or if a leaf was donated against the rules.
            StateError: two of them have the same path.
        """
        leaves, _ = self._references()
        named = [
            (path, leaf)
            for path, leaf in zip(self._structure.paths, leaves, strict=True)
            if only is None or path in only
        ]
        by_path = {path: self._stored(path, leaf) for path, leaf in named}
        if len(by_path) < len(named):
            raise StateError(
                "Two leaves of the state have the same path, as jax.tree_util.keystr writes it. Register its classes "
                "with keys that differ (jax.tree_util.register_pytree_with_keys)."
            )
        return by_path

    def extensions_by_path(self) -> dict[str, jax.Array | HostKey]:
        """Returns the extensions' arrays; as `leaves_by_path`."""
        _, extensions = self._references()
        return dict(
            zip(self.extension_paths, map(self._stored, self.extension_paths, extensions), strict=True)
        )

    def host_state(self) -> PyTree:
        """Returns the state with every array as a NumPy copy, typed PRNG keys as `HostKey`.

        Blocks until the step was computed and its state has been transferred: not for the training thread. A `release`
        meanwhile does not disturb it.

        Raises:
            SnapshotError: after `release`, if a leaf was donated against the rules, or if other processes have parts of
                a leaf that this one lacks.
        """
        leaves, _ = self._references()
        named = zip(self._structure.paths, leaves, strict=True)
        return self._structure.join([self._copied(path, self._stored(path, leaf)) for path, leaf in named])

    def host_leaves(self, only: Container[str] | None = None) -> dict[str, np.ndarray[Any, Any] | HostKey]:
        """Returns copies of the arrays of the state by path, or of those of the paths `only`; as `host_state`.

        Raises:
            StateError: two of them have the same path.
        """
        return {path: self._copied(path, leaf) for path, leaf in self.leaves_by_path(only).items()}

    def share(self) -> Snapshot:
        """Returns another snapshot of the same arrays, to be released on its own.

        Raises:
            SnapshotError: after `release`.
        """
        leaves, extensions = self._references()
        return Snapshot(
            self.step,
            leaves,
            self._structure,
            tag=self.tag,
            extensions=extensions,
            extension_paths=self.extension_paths,
            pool=self.pool,
        )

    def add_extensions(self, leaves: Sequence[jax.Array], paths: Sequence[str]) -> None:
        """Adds the extension leaves of the same step, named `paths`, which it lacks. Does nothing after `release`."""
        with self._lock:
            if self._held is None:
                return
            self._held = self._held[0], list(leaves)
            self.extension_paths = tuple(paths)
            self.size_bytes += sum(leaf.nbytes for leaf in leaves)

    def keep_only(self, paths: Container[str]) -> None:
        """Drops all arrays but those of the state at `paths`, which frees the memory of the others.

        Its state is a dict of these by path then. For the one that reads it alone.

        Raises:
            SnapshotError: after `release`.
        """
        with self._lock:
            leaves, _ = self._references()
            kept = {
                path: leaf for path, leaf in zip(self._structure.paths, leaves, strict=True) if path in paths
            }
            kept = dict(sorted(kept.items()))
            self._structure = TreeStructure(jax.tree_util.tree_structure(kept), tuple(kept), ())
            self.extension_paths = ()
            self.size_bytes = sum(leaf.nbytes for leaf in kept.values())
            self._held = (list(kept.values()), [])

    def move_to_host(self) -> bool:
        """Moves the arrays from accelerators to pinned host memory; returns whether none takes theirs any more.

        Each leaf leaves the device as soon as it has arrived. Where a device has no pinned host memory, or the pool has
        no room for all of them, it does nothing and returns False. Blocks until the step was computed and its state has
        been transferred. On a CPU there is nothing to move. Keys stay.

        Raises:
            SnapshotError: after `release`, or if a leaf was donated against the rules.
        """
        held = self._references()
        for leaf in (*held[0], *held[1]):
            self._require_alive(leaf)
        size_bytes = sum(leaf.nbytes for part in held for leaf in part if must_move(leaf))
        if not self.pool.has_room(size_bytes):
            return False
        for part in held:
            for index in range(len(part)):
                if must_move(part[index]):
                    moved = self.pool.put(part[index])
                    if moved is None:
                        return False
                    part[index] = moved
        return True

    def release(self) -> None:
        """Drops the references, which frees the device memory unless others hold some. May be repeated."""
        with self._lock:
            self._held = None

    def _references(self) -> tuple[Leaves, Leaves]:
        held = self._held
        if held is None:
            raise SnapshotError(
                f"The snapshot of step {self.step} (tag {self.tag!r}) was released, so its state is gone. Read it "
                "before release(), or take another one."
            )
        return held

    def _stored(self, path: str, leaf: jax.Array) -> jax.Array | HostKey:
        self._require_alive(leaf)
        if not is_key(leaf):
            return leaf
        parts = own_shards(leaf)
        if parts is None:
            raise self._is_elsewhere(path, leaf)
        read = [(place, np.array(jax.random.key_data(part))) for place, part in parts]
        data = read[0][1] if len(read) == 1 else np.empty((*leaf.shape, read[0][1].shape[-1]), np.uint32)
        for place, part in read if len(read) > 1 else ():
            data[place] = part
        return HostKey(data, str(jax.random.key_impl(leaf)))

    def _is_elsewhere(self, path: str, leaf: jax.Array) -> SnapshotError:
        remedy = (
            "Let a Checkpointer write it (each process writes its own part), return what you need of it as a metric of "
            "step_fn or eval_fn, or read it after the run."
        )
        if is_key(leaf):
            remedy = "Replicate the keys, or keep jax.random.key_data(keys) in the state."
        return SnapshotError(
            f"{path or 'The state'} ({leaf.dtype}{list(leaf.shape)}) of the snapshot of step {self.step} is sharded "
            f"over several processes, so process {jax.process_index()} cannot read all of it. {remedy}"
        )

    def _require_alive(self, leaf: jax.Array) -> None:
        if leaf.is_deleted():
            raise SnapshotError(
                f"The snapshot of step {self.step} was destroyed: its state was donated to a jitted function. "
                "Pass such a function a copy of snapshot.state."
            )

    def _copied(self, path: str, leaf: jax.Array | HostKey) -> Any:
        if isinstance(leaf, HostKey):
            return leaf
        copy = read(leaf, self.pool.read)
        if copy is None:
            raise self._is_elsewhere(path, leaf)
        return np.array(copy)
