"""The training state as a flat list of arrays, and where those arrays are placed.

A state is any pytree. Its array leaves pass through the compiled step as one flat list. Its other leaves (activation
functions, strings, Python numbers) are static: a `TreeStructure` holds them and joins both again.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeGuard, TypeVar

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from eventtrain.device.placement import put, read
from eventtrain.errors import StateError, listed

T = TypeVar("T")

# A pytree has no static type: its containers are whatever the user registered with JAX.
PyTree: TypeAlias = Any
# An array leaf before it was placed; afterwards every leaf is a jax.Array.
Leaf: TypeAlias = "jax.Array | np.ndarray[Any, Any] | np.generic[Any]"
# The array leaves of a tree, in its order: what is donated and what snapshots refer to.
Leaves: TypeAlias = list[jax.Array]


def is_array(leaf: object) -> TypeGuard[Leaf]:
    """Whether `leaf` is dynamic: a JAX array, or a NumPy array or scalar that JAX can hold."""
    if isinstance(leaf, jax.Array):
        return True
    if not isinstance(leaf, (np.ndarray, np.generic)):
        return False
    return leaf.dtype == np.bool_ or jnp.issubdtype(leaf.dtype, np.number)


@dataclasses.dataclass(frozen=True, eq=False)
class TreeStructure:
    """A pytree without its arrays. Immutable; any thread may use it.

    `paths[i]` names array leaf `i` as `jax.tree_util.keystr` writes it. `static` holds the other leaves as (position
    among all leaves, path, leaf).
    """

    treedef: Any  # a PyTreeDef, which is a variable for a type checker
    paths: tuple[str, ...]
    static: tuple[tuple[int, str, object], ...]

    def join(self, leaves: Sequence[Leaf]) -> PyTree:
        """Returns the pytree with `leaves` (arrays or tracers, in order) in place of its arrays.

        Never blocks and copies nothing. The caller ensures `len(leaves) == len(paths)`.
        """
        merged: list[object] = list(leaves)
        for position, _, leaf in self.static:
            merged.insert(position, leaf)
        return jax.tree_util.tree_unflatten(self.treedef, merged)


def partition(tree: PyTree) -> tuple[list[Leaf], TreeStructure]:
    """Splits any pytree into its array leaves and the rest; a tree without arrays is legal."""
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
    return leaves, TreeStructure(treedef, tuple(paths), tuple(static))


def split_state(state: PyTree) -> tuple[list[Leaf], TreeStructure]:
    """Splits a training state into its array leaves and the structure that joins them again.

    Copies and moves nothing: see `place`. Any thread may call it; it never blocks.

    Raises:
        StateError: the state has no array, or one that was deleted or donated before.
    """
    leaves, structure = partition(state)
    if not leaves:
        static = [
            f"{path or 'the state itself'}: {type(leaf).__name__}" for _, path, leaf in structure.static
        ]
        raise StateError(
            f"state is a {type(state).__name__} without any array leaf ({listed(static) or 'no leaves'}), so there "
            "is nothing to train. Pass the parameters and the optimiser state as JAX or NumPy arrays, for example "
            "{'params': params, 'opt_state': optimiser.init(params)}."
        )
    for path, leaf in zip(structure.paths, leaves, strict=True):
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise StateError(
                f"state{path} was deleted, most likely donated to an earlier jitted call, so its values are gone. "
                "Pass the state that this call returned, or a copy made before it."
            )
    return leaves, structure


@dataclasses.dataclass(frozen=True)
class StateArray:
    """One array of a state.

    Attributes:
        path: in the state.
        shape, dtype: of all of it, over all devices.
        sharding: as text.
        count, size_bytes: numbers in it, and their size, over all devices; a replicated array counts once.
        is_param: whether it is one of the weights.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    sharding: str
    count: int
    size_bytes: int
    is_param: bool


def abstract(leaves: Sequence[jax.Array], weak: Sequence[bool] | None = None) -> list[jax.ShapeDtypeStruct]:
    """Returns shape, dtype, sharding and weak type (`weak`, if given) of each leaf, without its values."""
    weak = [is_weak(leaf) for leaf in leaves] if weak is None else weak
    return [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding, weak_type=weakly)
        for leaf, weakly in zip(leaves, weak, strict=True)
    ]


def is_weak(array: Any) -> bool:
    """Whether `array` is weakly typed, as `jnp.asarray(1.0)` is: for JAX another type than strong."""
    return bool(getattr(array, "weak_type", False))  # typed PRNG keys have no such attribute


def type_of(leaf: Any) -> str:
    """Returns `dtype[shape]` of an array, as JAX writes it: `float32[3,4]`; of another object its class."""
    if not hasattr(leaf, "dtype"):
        return type(leaf).__name__
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def strong(array: jax.Array) -> jax.Array:
    """Returns `array`, strongly typed."""
    return jax.lax.convert_element_type(array, array.dtype) if is_weak(array) else array


def _default_placement(leaves: Sequence[Leaf]) -> tuple[Sharding, frozenset[Any]]:
    """Returns the sharding for leaves that are not placed yet, and the devices that the state spans."""
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    meshes = [leaf.sharding for leaf in arrays if isinstance(leaf.sharding, NamedSharding)]
    spans = {frozenset(leaf.sharding.device_set) for leaf in arrays if len(leaf.sharding.device_set) > 1}
    if not spans and not meshes:
        spans = {frozenset(leaf.sharding.device_set) for leaf in arrays if leaf.committed}
    if len(spans) > 1:
        sets = sorted(f"({listed(sorted(map(str, devices)), 8)})" for devices in spans)
        raise StateError(
            f"The leaves of the state are on different sets of devices: {listed(sets)}. One jitted step runs on one "
            "device or one mesh. Move the state there with jax.device_put(state, device_or_sharding)."
        )
    if meshes:
        widest = max(meshes, key=lambda sharding: len(sharding.device_set))
        return NamedSharding(widest.mesh, PartitionSpec()), frozenset(widest.device_set)
    default = arrays[0] if arrays else put(np.uint32(0))
    devices = next(iter(spans), frozenset(default.sharding.device_set))
    if len(devices) > 1:  # sharded without a mesh
        mesh = jax.sharding.Mesh(np.array(sorted(devices, key=lambda d: d.id)), ("devices",))
        return NamedSharding(mesh, PartitionSpec()), devices
    return SingleDeviceSharding(next(iter(devices))), devices


def replicated_sharding(leaves: Sequence[Leaf]) -> Sharding:
    """Returns the sharding of arrays used beside the state (ring, cursor, batches); as `place`. Never blocks.

    A plain `jnp.zeros` instead would be a ShardingTypeError under an explicit mesh and a second compilation otherwise.
    """
    return _default_placement(leaves)[0]


def place(leaves: Sequence[Leaf]) -> Leaves:
    """Commits every leaf to its devices, so that one executable serves every step.

    A leaf that already spans the state's devices keeps its sharding. The others, NumPy leaves too, are replicated over
    the mesh of the state, or go to its device; if there is none, to JAX's default device. A leaf that is placed already
    is not copied unless its layout in memory is not JAX' own: donate the result only after `copy_leaves`. Blocks at
    most for the host-to-device transfer of NumPy leaves. To be called on the training thread, before the first step.

    Raises:
        StateError: the leaves are committed to several devices, or span several sets of them.
    """
    default, devices = _default_placement(leaves)
    placed: Leaves = []
    for leaf in leaves:
        if not isinstance(leaf, jax.Array):
            placed.append(put(np.asarray(leaf), default))
            continue
        on_devices = frozenset(leaf.sharding.device_set) == devices
        on_mesh = isinstance(leaf.sharding, NamedSharding) or not isinstance(default, NamedSharding)
        keeps = on_devices and (on_mesh or len(devices) > 1)
        placed.append(put(leaf, leaf.sharding if keeps else default))
    others = [index for index, leaf in enumerate(placed) if not _is_row_major(leaf)]
    if others:
        for index, copy in zip(others, copy_leaves([placed[index] for index in others]), strict=True):
            placed[index] = copy
    return placed


def _is_row_major(leaf: jax.Array) -> bool:
    """Whether the last dimension is the fastest in memory, as in what a compiled function takes unless told otherwise.

    `jax.jit` takes any layout and returns this one. An executable compiled ahead of time refuses the others.
    """
    layout: Any = getattr(getattr(leaf, "format", None), "layout", None)  # typed PRNG keys have none
    order = getattr(layout, "major_to_minor", None)
    return order is None or tuple(order) == tuple(range(leaf.ndim))


def _copies(leaves: Leaves) -> Leaves:
    return [jnp.copy(leaf) for leaf in leaves]


def copy_leaves(leaves: Sequence[jax.Array]) -> Leaves:
    """Copies every leaf on its devices, in one jitted call, to the same sharding.

    Every result has a buffer of its own, also where one array occurs twice in `leaves` (tied weights, which could not
    be donated otherwise). `leaves` are not donated. Returns before the copy is done; the first call for a list of
    shapes compiles. Training thread only.
    """
    jitted = jax.jit(_copies, out_shardings=[leaf.sharding for leaf in leaves])
    return jitted(list(leaves))


def checksum(tree: PyTree) -> int | None:
    """Returns the CRC-32 of the arrays of a tree, with their dtypes and shapes; keys count by dtype and shape only.

    Waits for the device: not on the training thread. None if an array was deleted, or if other processes have parts of
    it that this one lacks.
    """
    crc = 0
    for leaf in partition(tree)[0]:
        crc = zlib.crc32(f"{leaf.dtype}{leaf.shape}".encode(), crc)
        if isinstance(leaf, jax.Array):
            if leaf.is_deleted():
                return None
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                continue
        value = read(leaf) if isinstance(leaf, jax.Array) else leaf
        if value is None:
            return None
        octets: Any = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        crc = zlib.crc32(octets, crc)
    return crc


def with_x64_of_caller(function: Callable[[], T]) -> Callable[[], T]:
    """Returns `function`, to be run in another thread with the 64-bit mode of this one.

    JAX holds that mode per thread, so that a new thread would not inherit `jax.enable_x64(True)`.
    """
    enabled = bool(jax.config.read("jax_enable_x64"))
    module: Any = jax if hasattr(jax, "enable_x64") else jax.experimental  # older versions of JAX

    def run() -> T:
        with module.enable_x64(enabled):
            return function()

    return run
