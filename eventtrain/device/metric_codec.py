"""Metrics as rows of uint32 words, which carries scalars of any dtype to the host exactly.

The compiled step encodes its metrics into one row of the metric ring; the fetch thread decodes the rows of many steps
at once, one column per metric. The bits are carried, not the values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eventtrain.device.reductions import Reduction, reductions_of, value_of
from eventtrain.errors import MetricsError, listed

# uint32[k, words]: the rows of k steps, on the host.
Rows: TypeAlias = "np.ndarray[Any, np.dtype[np.uint32]]"
# A read-only 1-D array with one value per step.
Column: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclasses.dataclass(frozen=True)
class MetricLayout:
    """Assigns the words of a row to metrics. Immutable; any thread may use it.

    `names` are sorted, as JAX sorts the keys of a dict; `dtypes[i]` belongs to `names[i]`. A value takes one uint32
    word, or two if it is 64 bits wide. `watched` are indices of state leaves (hyperparameters) whose value after each
    step follows the metrics in the row. `reductions` are those of the metrics that have one of their own. Two layouts
    are equal if they decode and reduce alike.
    """

    names: tuple[str, ...]
    dtypes: tuple[np.dtype[Any], ...]
    watched: tuple[int, ...] = ()
    watched_dtypes: tuple[np.dtype[Any], ...] = ()
    reductions: tuple[tuple[str, Reduction], ...] = ()

    @classmethod
    def of(
        cls, metrics: object, function: str, *, watched: Mapping[int, jax.Array] | None = None
    ) -> MetricLayout:
        """Returns the layout for the metrics that `function` of the user returned, and state leaves by index.

        Raises:
            MetricsError: `metrics` is not a flat dict of real scalars (arrays or tracers of shape (), Python numbers).
        """
        if not isinstance(metrics, Mapping):
            raise MetricsError(
                f"{function} returned {type(metrics).__name__} as metrics, but events carry metrics by name. Return "
                "a flat dict, for example {'loss': loss}."
            )
        given: Mapping[Any, object] = metrics
        for name in given:
            if not isinstance(name, str):
                raise MetricsError(
                    f"{function} returned a metric with the key {name!r} of type {type(name).__name__}. Use a str as "
                    "the key, since events carry metrics by name."
                )
        names, leaves = tuple(sorted(given)), watched or {}
        dtypes = tuple(_scalar_dtype(name, value_of(given[name]), function) for name in names)
        watched_dtypes = tuple(np.dtype(leaf.dtype) for leaf in leaves.values())
        return cls(names, dtypes, tuple(leaves), watched_dtypes, reductions_of(given))

    @property
    def words(self) -> int:
        """Number of uint32 words in a row; a layout without any value has one unused word."""
        return max(1, sum(_words(dtype) for dtype in (*self.dtypes, *self.watched_dtypes)))

    def encode(self, metrics: Mapping[str, Any], watched: Sequence[jax.Array] = ()) -> jax.Array:
        """Returns the row of one step, uint32[words]; traced. `watched` has the order of `self.watched`."""
        values = [value_of(metrics[name]) for name in self.names] + list(watched)
        dtypes = (*self.dtypes, *self.watched_dtypes)
        words = [_to_words(jnp.asarray(v, d)) for v, d in zip(values, dtypes, strict=True)]
        return jnp.concatenate(words) if words else jnp.zeros((1,), jnp.uint32)

    def decode(self, rows: Rows) -> tuple[dict[str, Column], dict[int, Column]]:
        """Returns the metrics by name and the watched leaves by index, from uint32[k, words].

        Each is a read-only column of k values, copied. bool, integers, float32 and float64 keep their dtype (4-bit
        integers become 8-bit ones), narrower floats are widened to float32; every value is exact.
        """
        columns: list[Column] = []
        start = 0
        for dtype in (*self.dtypes, *self.watched_dtypes):
            columns.append(_from_words(rows[:, start : start + _words(dtype)], dtype))
            columns[-1].setflags(write=False)
            start += _words(dtype)
        metrics, watched = columns[: len(self.names)], columns[len(self.names) :]
        return dict(zip(self.names, metrics, strict=True)), dict(zip(self.watched, watched, strict=True))

    def require_same(self, other: MetricLayout, function: str) -> None:
        """Raises a MetricsError unless `other`, of another batch signature, equals this layout."""
        if self == other:
            return
        before = dict(zip(self.names, self.dtypes, strict=True))
        after = dict(zip(other.names, other.dtypes, strict=True))
        found = [f"{name!r} was added" for name in sorted(after.keys() - before.keys())]
        found += [f"{name!r} is missing" for name in sorted(before.keys() - after.keys())]
        found += [
            f"{name!r} changed from {before[name]} to {after[name]}"
            for name in self.names
            if after.get(name, before[name]) != before[name]
        ]
        if self.reductions != other.reductions:
            found.append("the reductions (et.Mean, et.Sum, et.Max, et.Last) changed")
        raise MetricsError(
            f"{function} returned other metrics for a batch of another shape: {listed(found)}. Every step of a run "
            "must return the same metrics: return jnp.nan where one does not apply, and keep its dtype."
        )


def is_real(dtype: Any) -> bool:
    """Whether `dtype` holds bools or real numbers; extended dtypes of JAX (PRNG keys) do not."""
    return any(jnp.issubdtype(dtype, kind) for kind in (np.bool_, np.integer, np.floating))


def _scalar_dtype(name: str, value: object, function: str) -> np.dtype[Any]:
    subject = f"{function} returned the metric {name!r}"
    if isinstance(value, Mapping):
        raise MetricsError(
            f"{subject} as a dict, but metrics are one flat dict. Flatten it, for example to '{name}/...'."
        )
    if isinstance(value, (bool, int, float)):
        try:
            return np.dtype(jnp.asarray(value).dtype)
        except OverflowError as error:
            raise MetricsError(
                f"{subject} = {value}, which does not fit into a 32-bit integer. Return it as a float, or enable "
                "64-bit mode with jax.config.update('jax_enable_x64', True)."
            ) from error
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        raise MetricsError(
            f"{subject} as {type(value).__name__}, which is not an array: the metric ring on the device holds numbers "
            "only. Return a scalar array, or leave it out."
        )
    if shape != ():
        raise MetricsError(
            f"{subject} with shape {tuple(shape)} and dtype {dtype}, but a metric is one number per step. Reduce it, "
            "for example with jnp.mean, or return its entries under names of their own."
        )
    dtype = jax.dtypes.canonicalize_dtype(dtype) if isinstance(dtype, np.dtype) else dtype
    if not is_real(dtype):
        raise MetricsError(
            f"{subject} of dtype {dtype}, but a metric must be a bool, an integer or a real float. Return real "
            "numbers, for example its jnp.real, jnp.imag or jnp.abs."
        )
    return np.dtype(dtype)


def _words(dtype: np.dtype[Any]) -> int:
    return 2 if dtype.itemsize == 8 else 1


def _to_words(value: jax.Array) -> jax.Array:
    """Returns the bits of a scalar as uint32[1], or as uint32[2] (low word first) for 64 bits."""
    if jnp.issubdtype(value.dtype, np.floating):
        # The bits, before anything else: XLA may skip the rounding in f32 -> bf16 -> f32.
        bits = jnp.finfo(value.dtype).bits
        if bits < 32:
            narrow = jnp.uint4 if bits == 4 else _UNSIGNED[bits]
            value = lax.bitcast_convert_type(value, narrow).astype(jnp.uint32)
    elif value.dtype == np.bool_ or jnp.issubdtype(value.dtype, np.unsignedinteger):
        value = value.astype(jnp.uint32) if value.dtype.itemsize < 8 else value
    elif value.dtype.itemsize < 8:
        value = value.astype(jnp.int32)
    return lax.bitcast_convert_type(value, jnp.uint32).reshape(-1)


def _from_words(words: Rows, dtype: np.dtype[Any]) -> Column:
    """Inverts `_to_words` for uint32[k, 1 or 2]: returns a column of k values, in memory of its own."""
    words = np.array(words, order="C")
    if dtype.itemsize == 8:
        return words.view(dtype)[:, 0]
    bits = words[:, 0]
    if dtype == np.bool_:
        return bits != 0
    if jnp.issubdtype(dtype, np.floating):
        if dtype.itemsize == 4:
            return bits.view(dtype)
        return bits.astype(_UNSIGNED[8 * dtype.itemsize]).view(dtype).astype(np.float32)
    if jnp.issubdtype(dtype, np.unsignedinteger):
        return bits.astype(_UNSIGNED[8 * dtype.itemsize])
    return bits.view(np.int32).astype(np.dtype(f"int{8 * dtype.itemsize}"))
