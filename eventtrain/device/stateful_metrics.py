"""Metrics with state, such as F1 or a confusion matrix: pytrees with `merge(other)` and `compute()`.

A mean of batch values is wrong for them. Their states are merged on the device, inside the program that makes them, and
computed once at the end. clu.metrics and metrax have such classes; metrics of Flax NNX are merged by their state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from eventtrain.device.executable_cache import LowerOnCaller, compile_lowered
from eventtrain.device.metric_codec import is_real
from eventtrain.device.placement import put
from eventtrain.device.state import Leaves, PyTree, TreeStructure, copy_leaves, is_array, partition, strong
from eventtrain.device.validation import call_user, sharded_as
from eventtrain.errors import MetricsError, StateError, listed

# Read-only, of any shape; bool, integers, float16 to float64.
HostArray = np.ndarray[Any, np.dtype[Any]]


def split_metrics(metrics: Any, function: str) -> tuple[Any, dict[str, Any]]:
    """Returns what the user's `function` returned without its metrics with state, and those by name.

    If the whole of `metrics` is such a metric, its name is empty.
    """
    if _has_state(metrics):
        return {}, dict(_parts("", metrics, function))
    if not isinstance(metrics, Mapping) or not any(_has_state(value) for value in metrics.values()):
        return metrics, {}
    given: Mapping[Any, Any] = metrics
    scalars = {name: value for name, value in given.items() if not _has_state(value)}
    found: dict[str, Any] = {}
    for name, value in given.items():
        if _has_state(value):
            found.update(_parts(str(name), value, function))
    return scalars, found


@dataclasses.dataclass(frozen=True, eq=False)
class StatefulMetrics:
    """The metrics with state of one function: how their states are merged and computed. Holds no array.

    What is carried from call to call is `[began, *states]`: a bool[] that tells whether there is a state yet, and the
    array leaves of all metrics. `types` are those of the states.
    """

    function: str
    structure: TreeStructure
    types: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def split(cls, metrics: Mapping[str, Any], function: str) -> tuple[StatefulMetrics, Leaves]:
        """Returns the layout of these metrics by name, and the states of one batch; traced.

        Python numbers in them are static, unless `merge` changes them.

        Raises:
            MetricsError: a state holds other things than real numbers, or `merge` changes its shape or dtype.
            StepError: `merge` raised.
        """
        flat, treedef = jax.tree_util.tree_flatten(dict(metrics))
        merged = jax.tree_util.tree_flatten(_merged(metrics, metrics, function))[0]
        for index, (leaf, after) in enumerate(zip(flat, merged, strict=False)):
            if isinstance(leaf, (bool, int, float)) and (is_array(after) or after != leaf):
                flat[index] = jnp.asarray(leaf)
        arrays, structure = partition(jax.tree_util.tree_unflatten(treedef, flat))
        leaves = [strong(jnp.asarray(leaf)) for leaf in arrays]
        for path, leaf in zip(structure.paths, leaves, strict=True):
            if not is_real(leaf.dtype):
                raise MetricsError(
                    f"{function} returned a metric whose state{path} is {leaf.dtype}, but states must be bools, "
                    "integers or real floats. Keep real numbers in it."
                )
        layout = cls(function, structure, tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves))
        layout._merge_leaves(leaves, leaves)
        return layout, leaves

    def require_same(self, other: StatefulMetrics) -> None:
        """Raises a MetricsError unless `other`, of another batch signature, has the same states."""
        before = dict(zip(self.structure.paths, map(_type, self.types), strict=True))
        after = dict(zip(other.structure.paths, map(_type, other.types), strict=True))
        if before == after:
            return
        found = [
            f"{path} is {after.get(path, 'missing')} instead of {before.get(path, 'missing')}"
            for path in sorted({*before, *after})
            if before.get(path) != after.get(path)
        ]
        raise MetricsError(
            f"{self.function} returned metrics with another state for a batch of another shape: {listed(found)}. "
            f"{_REMEDY}"
        )

    def carried_types(self, sharding: Sharding) -> list[jax.ShapeDtypeStruct]:
        """Returns shape, dtype and sharding of what is carried; nothing without metrics."""
        if not self.types:
            return []
        types = (jax.ShapeDtypeStruct((), np.bool_), *self.types)
        return [jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding) for one in types]

    def scalar_names(self, used: Sequence[str]) -> frozenset[str]:
        """Returns the names of the scalars that are computed, and checks that all can be; traces `compute`.

        Raises a MetricsError if one is among the names `used`.
        """
        if not self.types:
            return frozenset()
        computed = jax.eval_shape(self.compute, [jax.ShapeDtypeStruct((), np.bool_), *self.types])
        if twice := sorted({*used} & {*computed}):
            raise MetricsError(
                f"{self.function} returned two metrics named {twice[0]!r}. Rename one of them."
            )
        return frozenset(name for name, of in computed.items() if of.shape == ())

    def merge(self, carried: Leaves, states: Leaves) -> Leaves:
        """Returns what is carried after a batch with these `states`; traced."""
        if not self.types:
            return []
        began, *old = carried
        states = [sharded_as(before, state) for before, state in zip(old, states, strict=True)]
        merged = self._merge_leaves(old, states)
        both = zip(old, merged, states, strict=True)
        return [
            jnp.ones_like(began),
            *(jnp.where(began, sharded_as(before, after), state) for before, after, state in both),
        ]

    def compute(self, carried: Leaves) -> dict[str, jax.Array]:
        """Returns what the metrics compute, by name; traced.

        The parts of a dict or dataclass are `<name>/<part>`.
        """
        metrics: dict[str, Any] = self.structure.join(carried[1:])
        found: dict[str, jax.Array] = {}
        for name, metric in metrics.items():
            what = f"{self.function}: compute() of {_named(name, metric)}"
            value = call_user(what, metric.compute)
            for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
                full = "/".join([name] * bool(name) + [_key(key) for key in path])
                dtype = getattr(
                    leaf, "dtype", np.result_type(leaf) if isinstance(leaf, (bool, int, float)) else None
                )
                if dtype is None or not is_real(dtype):
                    raise MetricsError(
                        f"{what} returned {full!r} as {dtype or type(leaf).__name__}, but a metric must be real "
                        "numbers or an array of them."
                    )
                if not full or full in found:
                    raise MetricsError(
                        f"{what} returned a value {'without a name' if not full else f'{full!r} twice'}. Return a dict "
                        "of metrics by name from the function, for example {'f1': metric}."
                    )
                found[full] = jnp.asarray(leaf)
        return found

    def _merge_leaves(self, old: Sequence[Any], new: Sequence[Any]) -> Leaves:
        merged = _merged(self.structure.join(old), self.structure.join(new), self.function)
        arrays, structure = partition(merged)
        after = [strong(jnp.asarray(leaf)) for leaf in arrays]
        if structure.paths != self.structure.paths:
            raise MetricsError(
                f"{self.function}: merge() returned another structure than it was given: "
                f"{listed(sorted({*structure.paths} ^ {*self.structure.paths}))}. {_REMEDY}"
            )
        changed = [
            f"{path} from {_type(before)} to {_type(leaf)}"
            for path, before, leaf in zip(structure.paths, self.types, after, strict=True)
            if _type(before) != _type(leaf)
        ]
        if changed:
            raise MetricsError(
                f"{self.function}: merge() changed the state of a metric: {listed(changed)}. {_REMEDY}"
            )
        return after


class CompiledStates:
    """Begins, computes, copies and puts back the states of one function, outside its calls.

    Training thread only. Methods dispatch and do not wait; `adopt` blocks until compiled.
    """

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        self._metrics: StatefulMetrics | None = None
        self._zeros: Callable[[], Leaves] = list
        self._compute: Callable[[Leaves], dict[str, jax.Array]] = lambda carried: {}
        self._types: list[jax.ShapeDtypeStruct] = []

    def adopt(self, metrics: StatefulMetrics, lower: LowerOnCaller) -> None:
        """Takes over the metrics of a batch signature. Raises a MetricsError if others were taken over before."""
        if self._metrics is not None:
            self._metrics.require_same(metrics)
            return
        self._metrics, sharding = metrics, self._sharding
        self._types = types = metrics.carried_types(sharding)
        if not types:
            return
        self._compute = compile_lowered(
            lower(lambda: jax.jit(metrics.compute, out_shardings=sharding).lower(types))
        )
        if sharding.is_fully_addressable:
            self._zeros = compile_lowered(
                lower(lambda: jax.jit(partial(_zeros, types), out_shardings=sharding).lower())
            )
        else:  # no computation of all processes
            self._zeros = lambda: [put(np.zeros(one.shape, one.dtype), sharding) for one in types]

    def initial(self, states: Sequence[HostArray] = ()) -> Leaves:
        """Returns what is carried into the first call; none without metrics.

        Args:
            states: those of an evaluation or an epoch that was cut short, as `copied` gave them.

        Raises:
            StateError: they are not those of these metrics.
        """
        if not states:
            return self._zeros()
        expected, given = ([str(tuple(one.shape)) for one in arrays] for arrays in (self._types, states))
        if expected != given:
            assert self._metrics is not None
            raise StateError(
                f"What was cut short cannot continue: its metrics had states of the shapes {listed(given)}, "
                f"and those of {self._metrics.function} have {listed(expected)} now. Resume with the "
                f"{self._metrics.function} of the checkpoint."
            )
        pairs = zip(states, self._types, strict=True)
        return [put(state.astype(of.dtype), self._sharding) for state, of in pairs]

    def restarted(self, carried: Leaves) -> Leaves:
        """Returns what is carried into the first call of an epoch: the arrays stay, and count for nothing."""
        return [put(np.bool_(False), self._sharding), *carried[1:]] if carried else []

    def computed(self, carried: Leaves, window: Any = None) -> TakenStates:
        """Returns what the metrics compute, by name; none without metrics."""
        return TakenStates(self._compute(carried) if carried else {}, window)

    @staticmethod
    def copied(carried: Leaves, window: Any = None) -> TakenStates:
        """Returns a copy of what is carried, for `initial`."""
        return TakenStates({str(index): state for index, state in enumerate(copy_leaves(carried))}, window)


def _zeros(types: Sequence[jax.ShapeDtypeStruct]) -> Leaves:
    return [jnp.zeros(one.shape, one.dtype) for one in types]


class TakenStates(NamedTuple):
    """Arrays by name, perhaps not computed yet, and what they are for. They are never donated."""

    arrays: dict[str, jax.Array]
    window: Any

    def fetch(self) -> FetchedStates:
        """Waits until they are computed and returns them on the host; the GIL is released meanwhile."""
        return FetchedStates({name: host_array(array) for name, array in self.arrays.items()}, self.window)


class FetchedStates(NamedTuple):
    """`TakenStates` on the host."""

    arrays: dict[str, HostArray]
    window: Any


def host_array(array: jax.Array) -> HostArray:
    """Returns a copy that is read-only, with a dtype of NumPy's own. Waits until it is computed."""
    value = np.array(array)
    if value.dtype.kind not in "biuf":  # bfloat16, float8, int4 ...
        value = value.astype(np.float32 if jnp.issubdtype(value.dtype, np.floating) else np.int32)
    value.setflags(write=False)
    return value


_REMEDY = (
    "It stays on the device, so shapes and dtypes must be the same for every batch, whatever its size. Keep counts or "
    "sums instead of single examples, for example in bins, and cast them with .astype."
)


def _has_state(value: object) -> bool:
    return _is_mergeable(value) or _is_nnx(value)


def _is_mergeable(value: object) -> bool:
    return callable(getattr(value, "merge", None)) and callable(getattr(value, "compute", None))


def _is_nnx(value: object) -> bool:
    return all(callable(getattr(value, method, None)) for method in ("update", "reset", "compute"))


def _parts(name: str, metric: Any, function: str) -> Iterator[tuple[str, Any]]:
    """Yields a metric, or the metrics that it consists of, by name."""
    if _is_mergeable(metric):
        yield name, metric
    elif hasattr(metric, "clu_metric"):  # metrax.nnx
        yield from _parts(name, metric.clu_metric, function)
    elif parts := {key: value for key, value in vars(metric).items() if _has_state(value)}:  # nnx.MultiMetric
        for key, value in parts.items():
            yield from _parts(f"{name}/{key}" if name else key, value, function)
    else:
        _nnx_state(metric, function, name)
        yield name, _NNXMetric(metric)


@jax.tree_util.register_pytree_node_class
class _NNXMetric:
    """A metric of Flax NNX that was updated once, with `merge`."""

    def __init__(self, metric: Any) -> None:
        self.metric = metric

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self.metric,), None

    @classmethod
    def tree_unflatten(cls, auxiliary: None, children: tuple[Any]) -> _NNXMetric:
        return cls(children[0])

    def merge(self, other: _NNXMetric) -> _NNXMetric:
        a, b = (_nnx_state(one.metric) for one in (self, other))
        merged = jax.tree.map(lambda leaf: leaf, self.metric)
        if "m2" not in a:  # Average, Accuracy: sums
            after = {name: a[name] + b[name] for name in a}
        else:  # Welford, in the parallel form of Chan, Golub and LeVeque (1979)
            count = a["count"] + b["count"]
            delta, share = b["mean"] - a["mean"], b["count"] / jnp.maximum(count, 1)
            m2 = a["m2"] + b["m2"] + delta * delta * a["count"] * share
            after = {"count": count, "mean": a["mean"] + delta * share, "m2": m2}
        for name, value in after.items():
            getattr(merged, name)[...] = value
        return _NNXMetric(merged)

    def compute(self) -> PyTree:
        return self.metric.compute()


def _nnx_state(metric: Any, function: str = "", name: str = "") -> dict[str, jax.Array]:
    for names in (("count", "mean", "m2"), ("total", "count")):
        if all(hasattr(metric, one) for one in names):
            return {one: getattr(metric, one)[...] for one in names}
    raise MetricsError(
        f"{function} returned {_named(name, metric)}, whose states cannot be merged: it is neither an Average nor a "
        "Welford. Give its class a method merge(other) that returns the metric of both."
    )


def _merged(old: Mapping[str, Any], new: Mapping[str, Any], function: str) -> dict[str, Any]:
    return {
        name: call_user(f"{function}: merge() of {_named(name, new[name])}", old[name].merge, new[name])
        for name in new
    }


def _named(name: str, metric: object) -> str:
    inner = metric.metric if isinstance(metric, _NNXMetric) else metric
    return f"the metric {name!r} ({type(inner).__name__})" if name else type(inner).__name__


def _key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _type(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
