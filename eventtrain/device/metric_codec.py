"""Metrics as rows of uint32 words: how scalars of any dtype cross to the host exactly.

The step encodes its metrics into one row of a device buffer, the *ring*; the fetch thread decodes
the rows of many steps at once, one column a metric. Bits are carried, not values: nothing is
rounded on the way, and an int64 or a NaN arrives as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eventtrain.errors import MetricsError

__all__ = ["Column", "MetricLayout", "Rows", "is_real"]

# uint32[k, words]: the rows of k steps, on the host.
Rows: TypeAlias = "np.ndarray[Any, np.dtype[np.uint32]]"
# A read-only 1-D array, one value a step.
Column: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclasses.dataclass(frozen=True)
class MetricLayout:
    """Which words of a row hold which metric.

    `names` are sorted, as JAX sorts the keys of a dict; `dtypes[i]` belongs to `names[i]`. A value
    takes one uint32 word, or two if it is 64 bits wide. `watched` are indices of state leaves
    (hyperparameters) whose value after each step follows the metrics in the row. Two layouts are
    equal if they decode alike. Immutable; any thread may use it.
    """

    names: tuple[str, ...]
    dtypes: tuple[np.dtype[Any], ...]
    watched: tuple[int, ...] = ()
    watched_dtypes: tuple[np.dtype[Any], ...] = ()

    @classmethod
    def of(
        cls,
        metrics: object,
        where: str,
        *,
        watched: Mapping[int, jax.Array] | None = None,
    ) -> MetricLayout:
        """The layout for what `where` ("step_fn", "eval_fn") returned as its metrics.

        Args:
            metrics: a flat dict of name to scalar: an array, tracer or `jax.ShapeDtypeStruct` of
                shape (), or a Python bool, int or float, which becomes a constant.
            where: the user's function, for error messages.
            watched: state leaves of shape () by leaf index, to be recorded beside the metrics.

        Raises:
            MetricsError: `metrics` is no flat dict of real scalars; names the metric, what it is
                and the remedy.
        """
        if not isinstance(metrics, Mapping):
            raise MetricsError(
                f"{where} returned {type(metrics).__name__} as metrics, but events carry metrics by "
                "name. Return a flat dict, for example {'loss': loss}."
            )
        given: Mapping[Any, object] = metrics
        for name in given:
            if not isinstance(name, str):
                raise MetricsError(
                    f"{where} returned a metric with the key {name!r} of type "
                    f"{type(name).__name__}: metrics are known by name. Use a str as the key."
                )
        names = tuple(sorted(given))
        dtypes = tuple(_scalar_dtype(name, given[name], where) for name in names)
        leaves = watched or {}
        watched_dtypes = tuple(np.dtype(leaf.dtype) for leaf in leaves.values())
        return cls(names, dtypes, tuple(leaves), watched_dtypes)

    @property
    def words(self) -> int:
        """uint32 words in a row; a layout without any value has one dummy word."""
        return max(1, sum(_words(dtype) for dtype in (*self.dtypes, *self.watched_dtypes)))

    def encode(self, metrics: Mapping[str, Any], watched: Sequence[jax.Array] = ()) -> jax.Array:
        """The row, uint32[words], of one step; to be traced inside the compiled step.

        `metrics` and `watched` (in the order of `self.watched`) must fit this layout.
        """
        values = [metrics[name] for name in self.names] + list(watched)
        dtypes = (*self.dtypes, *self.watched_dtypes)
        words = [_to_words(jnp.asarray(v, d)) for v, d in zip(values, dtypes, strict=True)]
        return jnp.concatenate(words) if words else jnp.zeros((1,), jnp.uint32)

    def decode(self, rows: Rows) -> dict[str, Column]:
        """The metrics of k steps from uint32[k, words]: name to a read-only column of k values.

        bool, integers, float32 and float64 keep their dtype (4-bit integers come as 8-bit ones),
        narrower floats are widened to float32; every value is exact. Copies; never blocks.
        """
        return dict(zip(self.names, self._columns(rows, self.dtypes, 0), strict=True))

    def decode_watched(self, rows: Rows) -> dict[int, Column]:
        """The watched state leaves of k steps, by leaf index; dtypes as `decode` says."""
        start = sum(_words(dtype) for dtype in self.dtypes)
        columns = self._columns(rows, self.watched_dtypes, start)
        return dict(zip(self.watched, columns, strict=True))

    def require_same(self, other: MetricLayout, where: str) -> None:
        """Raise a MetricsError unless `other`, of another batch signature, equals this layout.

        It names the metrics that appeared, vanished or changed their dtype.
        """
        if other == self:
            return
        before = dict(zip(self.names, self.dtypes, strict=True))
        after = dict(zip(other.names, other.dtypes, strict=True))
        found = [f"{name!r} appeared" for name in after.keys() - before.keys()]
        found += [f"{name!r} vanished" for name in before.keys() - after.keys()]
        found += [
            f"{name!r} changed from {before[name]} to {after[name]}"
            for name in before.keys() & after.keys()
            if before[name] != after[name]
        ]
        raise MetricsError(
            f"{where} returned other metrics for a batch of another shape: "
            f"{', '.join(sorted(found))}. Every step of a run must carry the same metrics: return "
            "them always, as jnp.nan where they do not apply, and in one dtype."
        )

    def _columns(self, rows: Rows, dtypes: Sequence[np.dtype[Any]], start: int) -> list[Column]:
        columns: list[Column] = []
        for dtype in dtypes:
            column = _from_words(rows[:, start : start + _words(dtype)], dtype)
            column.setflags(write=False)
            columns.append(column)
            start += _words(dtype)
        return columns


def _scalar_dtype(name: str, value: object, where: str) -> np.dtype[Any]:
    subject = f"{where} returned the metric {name!r}"
    if isinstance(value, Mapping):
        raise MetricsError(
            f"{subject} as a dict: metrics are one flat dict, so that each event carries them by "
            f"one name. Flatten it, for example to '{name}/...'."
        )
    if isinstance(value, (bool, int, float)):
        try:
            return np.dtype(jnp.asarray(value).dtype)
        except OverflowError as error:
            raise MetricsError(
                f"{subject} = {value}, which no integer of 32 bits holds. Return it as a float, or "
                "enable 64-bit mode with jax.config.update('jax_enable_x64', True)."
            ) from error
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        raise MetricsError(
            f"{subject} as {type(value).__name__}, which is no array: only numbers can be written "
            "to the metric ring on the device. Return a scalar array, or leave it out."
        )
    if shape != ():
        raise MetricsError(
            f"{subject} with shape {tuple(shape)} and dtype {dtype}: a metric is one number a step. "
            "Reduce it, for example with jnp.mean, or return its entries under names of their own."
        )
    dtype = jax.dtypes.canonicalize_dtype(dtype) if isinstance(dtype, np.dtype) else dtype
    if not is_real(dtype):
        raise MetricsError(
            f"{subject} of dtype {dtype}, but only bool, integers and real floats can be metrics. "
            "Return real numbers, for example its jnp.real, jnp.imag or jnp.abs."
        )
    return np.dtype(dtype)


def is_real(dtype: Any) -> bool:
    """Whether a NumPy dtype, or an extended one of JAX's (PRNG keys), is one of real numbers or bool."""
    return (
        jnp.issubdtype(dtype, np.bool_)
        or jnp.issubdtype(dtype, np.integer)
        or jnp.issubdtype(dtype, np.floating)
    )


def _words(dtype: np.dtype[Any]) -> int:
    return 2 if dtype.itemsize == 8 else 1


def _to_words(value: jax.Array) -> jax.Array:
    """uint32[1], or uint32[2] (low word first) for 64 bits, with the bits of a scalar."""
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
    """The inverse of `_to_words` for uint32[k, 1 or 2]: a column of k values, a fresh copy."""
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
