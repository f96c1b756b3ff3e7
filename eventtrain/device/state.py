"""The training state as a flat list of arrays, and where those arrays live.

A state is any pytree. Its array leaves travel through the compiled step as one flat list; whatever
else stands in it (activation functions, strings, Python numbers) is held by a `Skeleton`, which
puts both together again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from eventtrain.errors import StateError

__all__ = [
    "Leaf",
    "PyTree",
    "Skeleton",
    "TreeDef",
    "copy_leaves",
    "is_array",
    "is_weak",
    "partition",
    "place",
    "replicated_sharding",
    "split_state",
    "strong",
]

# A pytree has no static type: its containers are whatever the user registered with JAX.
PyTree: TypeAlias = Any
# jax.tree_util.PyTreeDef and jax.Device are variables for a type checker, not types.
TreeDef: TypeAlias = Any
Device: TypeAlias = Any
# An array leaf before it was placed; afterwards every leaf is a jax.Array.
Leaf: TypeAlias = "jax.Array | np.ndarray[Any, Any] | np.generic[Any]"


def is_array(leaf: object) -> TypeGuard[Leaf]:
    """Whether `leaf` is dynamic: a JAX array, or a NumPy array or scalar that JAX can hold."""
    if isinstance(leaf, jax.Array):
        return True
    if not isinstance(leaf, (np.ndarray, np.generic)):
        return False
    return leaf.dtype == np.bool_ or jnp.issubdtype(leaf.dtype, np.number)


@dataclasses.dataclass(frozen=True, eq=False)
class Skeleton:
    """All of a pytree but its arrays.

    `paths[i]` names array leaf `i` as `jax.tree_util.keystr` writes it; `static` holds the other
    leaves as (position among all leaves, path, leaf). Immutable; any thread may use it.
    """

    treedef: TreeDef
    paths: tuple[str, ...]
    static: tuple[tuple[int, str, object], ...]

    def join(self, leaves: Sequence[Leaf]) -> PyTree:
        """The pytree with `leaves` (arrays or tracers, in order) in place of its arrays.

        Never blocks and copies nothing. The caller sees to it that `len(leaves) == len(paths)`.
        """
        merged: list[object] = list(leaves)
        for position, _, leaf in self.static:
            merged.insert(position, leaf)
        return jax.tree_util.tree_unflatten(self.treedef, merged)


def partition(tree: PyTree) -> tuple[list[Leaf], Skeleton]:
    """Split any pytree into its array leaves and the rest; a tree without arrays is legal."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves: list[Leaf] = []
    paths: list[str] = []
    static: list[tuple[int, str, object]] = []
    for position, (path, leaf) in enumerate(with_paths):
        if is_array(leaf):
            leaves.append(leaf)
            paths.append(jax.tree_util.keystr(path))
        else:
            static.append((position, jax.tree_util.keystr(path), leaf))
    return leaves, Skeleton(treedef, tuple(paths), tuple(static))


def split_state(state: PyTree) -> tuple[list[Leaf], Skeleton]:
    """Split a training state into its array leaves and the skeleton that joins them again.

    JAX arrays, NumPy arrays and NumPy scalars are leaves, in pytree order; everything else is held
    static. Nothing is copied or moved: see `place`. Any thread may call it; it never blocks.

    Raises:
        StateError: the state holds no array, or one that was deleted or donated before.
    """
    leaves, skeleton = partition(state)
    if not leaves:
        held = ", ".join(f"{path or 'the state itself'}: {type(leaf).__name__}"
                         for _, path, leaf in skeleton.static[:5])  # fmt: skip
        raise StateError(
            f"state is a {type(state).__name__} without any array leaf ({held or 'no leaves'}): "
            "there is nothing to train. Pass the parameters and the optimiser state as JAX or "
            "NumPy arrays, for example {'params': params, 'opt_state': optimiser.init(params)}."
        )
    for path, leaf in zip(skeleton.paths, leaves, strict=True):
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise StateError(
                f"state{path} was deleted, most likely donated to an earlier jitted call: its values are "
                "gone. Pass the state which that call returned, or a copy made before it."
            )
    return leaves, skeleton


def is_weak(array: jax.Array) -> bool:
    """Whether `array` is weakly typed, as `jnp.asarray(1.0)` is: to JAX another type than strong."""
    return getattr(array, "weak_type", False)  # typed PRNG keys have no such attribute


def strong(array: jax.Array) -> jax.Array:
    """`array`, strongly typed."""
    return jax.lax.convert_element_type(array, array.dtype) if is_weak(array) else array


def _home(leaves: Sequence[Leaf]) -> tuple[Sharding, frozenset[Device]]:
    """Where whatever is not yet placed belongs, and the devices that the state spans."""
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    meshes = [leaf.sharding for leaf in arrays if isinstance(leaf.sharding, NamedSharding)]
    wide = {frozenset(a.sharding.device_set) for a in arrays if len(a.sharding.device_set) > 1}
    if len(wide) > 1:
        raise StateError(
            "The state's leaves are spread over different sets of devices: "
            + " and ".join(sorted(str(sorted(d.id for d in devices)) for devices in wide))
            + ". One jitted step runs on one set; place all of them on one mesh with "
            "jax.device_put(state, jax.sharding.NamedSharding(mesh, spec))."
        )
    if meshes:
        widest = max(meshes, key=lambda sharding: len(sharding.device_set))
        return NamedSharding(widest.mesh, PartitionSpec()), frozenset(widest.device_set)
    if wide:  # some leaf spans devices by a sharding that knows no mesh
        (devices,) = wide
        mesh = jax.sharding.Mesh(np.array(sorted(devices, key=lambda d: d.id)), ("devices",))
        return NamedSharding(mesh, PartitionSpec()), devices
    committed = {d for a in arrays if a.committed for d in a.sharding.device_set}
    if len(committed) > 1:
        raise StateError(
            "The state's leaves are committed to different devices: "
            + ", ".join(sorted(str(device) for device in committed))
            + ". One jitted step runs on one device or one mesh; put the state on one of them "
            "with jax.device_put(state, device)."
        )
    devices = committed or {d for a in arrays[:1] for d in a.sharding.device_set}
    if not devices:
        devices = set(jax.device_put(np.uint32(0)).sharding.device_set)
    (device,) = devices
    return SingleDeviceSharding(device), frozenset(devices)


def replicated_sharding(leaves: Sequence[Leaf]) -> Sharding:
    """The sharding of what belongs to the state but is no part of it (ring, cursor, batches).

    Replicated over the state's mesh, or the state's only device. Never blocks.

    Raises:
        StateError: the leaves are committed to several devices, or span several sets of them.
    """
    return _home(leaves)[0]


def place(leaves: Sequence[Leaf]) -> list[jax.Array]:
    """Commit every leaf to its place, strongly typed, so that one executable serves for ever.

    Leaves that already span the state's devices keep their sharding. Others go, replicated, to
    the mesh of the others, or to their device; NumPy leaves too, and to JAX's default device when
    there is nothing else. Leaves that lie right are not copied: donate the result only after
    `copy_leaves`. Blocks for the host-to-device transfer of NumPy leaves at most. To be called on
    the thread that trains, before its first step.

    Raises:
        StateError: the leaves are committed to several devices, or span several sets of them.
    """
    home, devices = _home(leaves)
    placed: list[jax.Array] = []
    for leaf in leaves:
        if not isinstance(leaf, jax.Array):
            placed.append(jax.device_put(np.asarray(leaf), home))
            continue
        leaf = strong(leaf)
        there = frozenset(leaf.sharding.device_set) == devices
        on_mesh = isinstance(leaf.sharding, NamedSharding) or not isinstance(home, NamedSharding)
        keeps = there and (on_mesh or len(devices) > 1)
        placed.append(jax.device_put(leaf, leaf.sharding if keeps else home))
    return placed


def _copies(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(leaf) for leaf in leaves]


def copy_leaves(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Copy every leaf on its devices, in one jitted call, to the same sharding.

    Every result has a buffer of its own, also where one array stands twice in `leaves` (tied
    weights, which could not be donated otherwise). `leaves` are not donated. Returns before the
    copy is done; the first call for a list of shapes compiles. Training thread only.
    """
    shardings = [leaf.sharding for leaf in leaves]
    jitted: Callable[[list[jax.Array]], list[jax.Array]]
    jitted = jax.jit(_copies, out_shardings=shardings)
    return jitted(list(leaves))
