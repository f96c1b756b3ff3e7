"""Hyperparameters in the state: those of optax, found by name at any depth, and those of step_fn itself.

`optax.inject_hyperparams` holds hyperparameters as scalar arrays in a dict named `hyperparams`, next to
`hyperparams_states` for those that follow a schedule. Wrapping, chaining and partitioning put that dict at any depth
and into any type of state, so it is searched by name, not by type. `Hyperparams` holds those of step_fn in a dict of
the same name, so that everything that changes, saves or shows the ones does the same with the others.

A new value must have the dtype, the strong type and the sharding of the old one: a Python number or a weakly typed
array in its place recompiles the step (90 to 300 ms, seconds for a large model).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from eventtrain.device.metric_codec import is_real
from eventtrain.device.placement import put
from eventtrain.device.state import PyTree, is_array
from eventtrain.errors import (
    AmbiguousHyperparam,
    ConfigurationError,
    HyperparamError,
    ScheduledHyperparam,
    UnknownHyperparam,
    did_you_mean,
    listed,
)

_BUILD = "optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)"
_PUT = "et.hyperparams(kl_weight=0.1)"
_COUNTERS = ("notfinite_count", "total_notfinite", "last_finite")


@dataclasses.dataclass(frozen=True)
class Hyperparam:
    """One hyperparameter of the state.

    Attributes:
        name: the parameter's name in the optimiser's factory: "learning_rate".
        path: its path in the state, as `jax.tree_util.keystr` writes it.
        leaf_index: its index among the leaves of `split_state`.
        scheduled: whether optax overwrites it at every update.
        dtype: of the scalar array.
    """

    name: str
    path: str
    leaf_index: int
    scheduled: bool
    dtype: np.dtype[Any]


@jax.tree_util.register_pytree_with_keys_class
class Hyperparams(Mapping[str, jax.Array]):
    """Read-only mapping name -> array of shape (), and a pytree: the part of a state that `hyperparams` makes.

    Attributes:
        hyperparams: the same as a dict.
    """

    def __init__(self, values: Mapping[str, jax.Array]) -> None:
        self.hyperparams = dict(values)

    def __getitem__(self, name: str) -> jax.Array:
        return self.hyperparams[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.hyperparams)

    def __len__(self) -> int:
        return len(self.hyperparams)

    def __repr__(self) -> str:
        return f"Hyperparams({', '.join(f'{name}={value}' for name, value in self.items())})"

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], None]:
        """For JAX."""
        return ((jax.tree_util.GetAttrKey("hyperparams"), self.hyperparams),), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Iterable[Any]) -> Self:
        """For JAX, which may pass anything in place of the dict."""
        self = object.__new__(cls)
        (self.hyperparams,) = children
        return self


def hyperparams(**values: float | int | bool | np.generic | jax.Array) -> Hyperparams:
    """Returns run-time parameters of step_fn, as a part of its state: a KL weight, a dropout rate, a temperature.

    They are hyperparameters as those of `optax.inject_hyperparams` are: commands, schedules and policies change them by
    name without recompiling, events and logs show them, and checkpoints hold them. step_fn reads them from the state,
    as in `state["loss"]["kl_weight"]`, and returns them with it. Put them beside the params, not inside, where an
    average of the weights would take them for weights.

    Args:
        values: name -> real number. A Python number becomes an array of JAX' default dtype of its kind, one with a
            dtype (`jnp.bfloat16(0.1)`) keeps it. The dtype stays: an int stays an int, a bool a bool.

    Raises:
        HyperparamError: no values, or one that is not a finite real number, such as a function.
    """
    if not values:
        raise HyperparamError(f"hyperparams() got no values. Name at least one, as in {_PUT}.")
    arrays: dict[str, jax.Array] = {}
    for name, value in values.items():
        if callable(value):
            raise HyperparamError(
                f"hyperparams({name}=...): expected a number, got {type(value).__name__}. For a schedule, begin with a "
                f"number and subscribe subscribers.HyperparamScheduler({name!r}, schedule)."
            )
        try:
            dtype = value.dtype if is_array(value) else np.result_type(type(_number(value)))
            arrays[name] = jnp.asarray(_fitted(value, jax.dtypes.canonicalize_dtype(dtype)))
        except HyperparamError as error:
            raise HyperparamError(f"hyperparams({name}=...): {error}") from None
    return Hyperparams(arrays)


def find_hyperparams(state: PyTree) -> list[Hyperparam]:
    """Returns every scalar array under `hyperparams` in the state, in the order of its leaves.

    Finds them in any nesting (chain, masked, partition, MultiSteps, apply_if_finite, inject within inject). Reads no
    array; never blocks.
    """
    scheduled = set(_scheduled(state, ()))
    found: list[Hyperparam] = []
    index = -1
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if not is_array(leaf):
            continue
        index += 1
        names = [entry_name(key) for key in path]
        # The innermost dict counts; flax.nnx puts one more key, `value`, behind the name.
        end = len(names) - 1 if names and names[-1] == "value" else len(names)
        if end < 2 or names[end - 2] != "hyperparams" or leaf.shape != ():
            continue
        found.append(
            Hyperparam(
                name=str(names[end - 1]),
                path=jax.tree_util.keystr(path),
                leaf_index=index,
                scheduled=tuple(names[:end]) in scheduled,
                dtype=np.dtype(leaf.dtype),
            )
        )
    return found


def resolve(hyperparams: Sequence[Hyperparam], name: str, path: str | None = None) -> Hyperparam:
    """Returns the one hyperparameter that `name`, and `path` if given, can mean, if it can be set.

    `path` is the whole path or any part of it that occurs in one candidate only.

    Raises:
        UnknownHyperparam: there is none of this name, or none at this path.
        AmbiguousHyperparam: there are several; the message lists their paths.
        ScheduledHyperparam: optax would overwrite it at the next update.
    """
    candidates = [h for h in hyperparams if h.name == name]
    if not candidates:
        raise UnknownHyperparam(_unknown_message(hyperparams, name))
    exact = [h for h in candidates if h.path == path]
    matching = exact or [h for h in candidates if path is None or path in h.path]
    if not matching:
        raise UnknownHyperparam(
            f"No hyperparameter {name!r} at path {path!r}. Its paths are {listed([h.path for h in candidates])}. "
            "Pass one of these, or a part of it."
        )
    if len(matching) > 1:
        raise AmbiguousHyperparam(
            f"{name!r}{'' if path is None else f' with path {path!r}'} can mean {len(matching)} hyperparameters: "
            f"{listed([h.path for h in matching])}. Pass path= with one of these, or a part that occurs in one only."
        )
    (hyperparam,) = matching
    if hyperparam.scheduled:
        raise ScheduledHyperparam(
            f"Cannot set {name!r}: it follows a schedule, and optax would overwrite it at the next update. Build the "
            "optimiser with a number, or use subscribers.LearningRateScheduler."
        )
    return hyperparam


def resolve_label(hyperparams: Sequence[Hyperparam], label: str) -> Hyperparam:
    """Returns the hyperparameter with a name, or with a whole path, as `labels` gives it. Raises as `resolve`."""
    at_path = next((h for h in hyperparams if h.path == label), None)
    return resolve(hyperparams, label if at_path is None else at_path.name, at_path and label)


def labels(hyperparams: Sequence[Hyperparam]) -> dict[str, str]:
    """Returns path -> key in events and ``control.hyperparams``: the name, or the path where names collide."""
    names = [h.name for h in hyperparams]
    return {h.path: h.name if names.count(h.name) == 1 else h.path for h in hyperparams}


def values_of(
    hyperparams: Sequence[Hyperparam], leaves: Sequence[jax.Array]
) -> dict[str, float | int | bool]:
    """Returns the values by label; blocks until they are computed."""
    names = labels(hyperparams)
    return {names[h.path]: read(leaves[h.leaf_index]) for h in hyperparams}


def read(leaf: jax.Array) -> float | int | bool:
    """Returns the value of a scalar leaf on the host; blocks until it is computed."""
    return np.asarray(leaf).item()


def write(leaf: jax.Array, value: object) -> jax.Array:
    """Returns a new leaf with `value`, a number or array of shape (), of the dtype and sharding of `leaf`.

    `leaf` is only inspected and stays valid. Blocks only if `value` is a device array still computing.

    Raises:
        HyperparamError: `value` is not a finite real number, or does not fit the leaf's dtype.
    """
    return put(_fitted(value, leaf.dtype), leaf.sharding)


def _fitted(value: object, kind: Any) -> np.ndarray[Any, Any]:
    """Returns `value` as an array of dtype `kind`. Raises a HyperparamError as `write` does."""
    number = _number(value)
    if isinstance(number, bool) != (kind == np.bool_):
        raise HyperparamError(
            f"Cannot write {value!r} to a hyperparameter of dtype {kind}: one is a bool and the other is not. Pass a "
            "value of the same kind."
        )
    if not isinstance(number, int) and not math.isfinite(number):
        raise HyperparamError(
            f"Cannot write {value!r} to a hyperparameter: the next update would make the weights NaN. Pass a finite "
            "number."
        )
    if jnp.issubdtype(kind, np.integer):
        limits = jnp.iinfo(kind)
        whole = isinstance(number, int) or number.is_integer()
        fits = whole and int(limits.min) <= number <= int(limits.max)
        holds = f"whole numbers from {limits.min} to {limits.max}"
    elif kind == np.bool_:
        return np.asarray(number, kind)
    else:
        least, limit = float(jnp.finfo(kind).smallest_subnormal), float(jnp.finfo(kind).max)
        fits = abs(number) <= limit and not becomes_zero(number, kind)
        holds = f"0 and magnitudes from {least:.2g} to {limit:.2g}"
    if not fits:
        wider = "" if kind == np.float32 else ", or build the optimiser with hyperparam_dtype=jnp.float32"
        raise HyperparamError(
            f"Cannot write {value!r} to a hyperparameter of dtype {kind}, which holds {holds}. Pass one of them{wider}."
        )
    return np.asarray(number, kind)


def becomes_zero(number: float, kind: Any) -> bool:
    """Returns whether `number` is not 0, but too small for the floating dtype `kind`."""
    return number != 0 and bool(np.asarray(number, kind) == 0)


def nonfinite_metrics(opt_state: PyTree, *, prefix: str = "") -> dict[str, jax.Array]:
    """Returns the counters of `optax.apply_if_finite` in `opt_state`, at any depth; for the metrics of a step_fn.

    Given the state that `update` returned, they include the present step. Names are optax's, behind `prefix`:
    `notfinite_count` (int32), updates in a row, up to this one, with a NaN or an infinity; `total_notfinite` (int32),
    such updates since the start; `last_finite` (bool), whether this one had none. All of shape (). May be traced.

    Raises:
        ConfigurationError: there is no such state, or more than one.
    """
    nodes = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=_has_counters)[0]
    found = [(f"opt_state{jax.tree_util.keystr(path)}", node) for path, node in nodes if _has_counters(node)]
    if not found:
        raise ConfigurationError(
            "nonfinite_metrics: opt_state has no state of optax.apply_if_finite. Wrap the optimiser, as in "
            "optax.apply_if_finite(optax.adam(1e-3), max_consecutive_errors=5), and pass its state."
        )
    if len(found) > 1:
        raise ConfigurationError(
            f"nonfinite_metrics: opt_state has {len(found)} states of optax.apply_if_finite: "
            f"{listed([path for path, _ in found])}. Call it for each of them, with a prefix of its own."
        )
    ((_, state),) = found
    return {f"{prefix}{name}": getattr(state, name) for name in _COUNTERS}


def _has_counters(node: Any) -> bool:
    """Whether `node` is the state of apply_if_finite; recognised by names, since importing optax takes a while."""
    return all(hasattr(node, name) for name in _COUNTERS)


def _number(value: object) -> float | int | bool:
    if isinstance(value, (bool, int, float)):
        return value
    shape = getattr(value, "shape", None)
    if is_array(value) and shape == () and is_real(value.dtype):
        return np.asarray(value).item()
    given = type(value).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")
    raise HyperparamError(
        f"Cannot write {given} to a hyperparameter: it must be one real number. Pass a float or an int."
    )


def entry_name(key: Any) -> object:
    """Returns the name in an entry of a key path: attribute, dict key or index."""
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return str(key)


def _scheduled(tree: PyTree, prefix: tuple[object, ...]) -> Iterator[tuple[object, ...]]:
    """Yields the paths, as names, of hyperparameters with an entry in `hyperparams_states`, which may have no leaf."""

    def holds_schedules(node: Any) -> bool:
        return node is not tree and _schedules(node) is not None

    own = _schedules(tree)
    if own is not None:
        yield from ((*prefix, "hyperparams", name) for name in own)
    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=holds_schedules)[0]:
        if holds_schedules(node):
            yield from _scheduled(node, (*prefix, *map(entry_name, path)))


def _schedules(node: Any) -> list[object] | None:
    states = getattr(node, "hyperparams_states", None)
    if states is None and isinstance(node, Mapping):
        mapping: Mapping[Any, Any] = node
        states = mapping.get("hyperparams_states")
    return list(states) if isinstance(states, Mapping) else None


def _unknown_message(hyperparams: Sequence[Hyperparam], name: str) -> str:
    names = list(dict.fromkeys(h.name for h in hyperparams))
    if not names:
        return (
            f"No hyperparameter {name!r}: the state has none, because the optimiser keeps them as constants of the "
            f"program. Build it with {_BUILD}, or put {_PUT} into the state."
        )
    return f"No hyperparameter {name!r}: the state holds {listed(names, 10)}. " + did_you_mean(
        name,
        names,
        f"To set {name!r}, name it when building the optimiser, as in {_BUILD}, or put {_PUT} into the state.",
    )
