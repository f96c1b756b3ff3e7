"""`Mean`, `Sum`, `Max`, `Last`: how the values of a metric become one value of an epoch or an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax

from eventtrain.errors import MetricsError

How = Literal["mean", "sum", "max", "last"]


@dataclasses.dataclass(frozen=True)
class Reduction:
    """How the values of one metric are reduced. `weight`: name of the metric that weights a mean."""

    how: How
    weight: str | None = None


@dataclasses.dataclass(frozen=True)
class _Reduced:
    value: Any

    how: ClassVar[How]

    @property
    def reduction(self) -> Reduction:
        return Reduction(self.how)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean(_Reduced):
    """A metric of which epochs and evaluations have the mean, without the steps where it is NaN.

    ``{"aux_loss": et.Mean(jnp.where(used, aux_loss, jnp.nan))}``: a metric that is absent on most steps. A plain scalar
    has a mean too, which a single NaN makes NaN.

    Args:
        value: a scalar of any real dtype. Events of single steps have it, but for those where it is NaN.
        weight: name of the metric that weights this mean; None: ``Trainer(weight=...)``.
    """

    weight: str | None = dataclasses.field(default=None, metadata={"static": True})

    how = "mean"

    @property
    def reduction(self) -> Reduction:
        """How it is reduced."""
        return Reduction("mean", self.weight)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum(_Reduced):
    """A metric of which epochs and evaluations have the sum, without the steps where it is NaN.

    Args:
        value: a scalar of any real dtype. Events of single steps have it, but for those where it is NaN.
    """

    how = "sum"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Max(_Reduced):
    """A metric of which epochs and evaluations have the largest value, without the steps where it is NaN.

    Args:
        value: a scalar of any real dtype. Events of single steps have it, but for those where it is NaN.
    """

    how = "max"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Last(_Reduced):
    """A metric of which epochs and evaluations have the last value that is not NaN.

    Args:
        value: a scalar of any real dtype. Events of single steps have it, but for those where it is NaN.
    """

    how = "last"


def value_of(metric: Any) -> Any:
    """Returns the scalar in a metric that may be one of these."""
    return metric.value if isinstance(metric, _Reduced) else metric


def reductions_of(metrics: Mapping[str, Any]) -> tuple[tuple[str, Reduction], ...]:
    """Returns the reductions of the metrics that have one of their own, by name, sorted.

    Raises:
        MetricsError: the weight of a mean is not the name of a metric.
    """
    found: list[tuple[str, Reduction]] = []
    for name, metric in sorted(metrics.items()):
        if not isinstance(metric, _Reduced):
            continue
        weight: Any = metric.reduction.weight  # whatever the user gave
        if weight is not None and not (isinstance(weight, str) and weight in metrics):
            raise MetricsError(
                f"The metric {name!r} is et.Mean(weight={weight!r}), but weight must be the name of a scalar "
                f"metric beside it ({', '.join(sorted(metrics))}). Return that metric too, for example "
                "the number of examples."
            )
        found.append((name, metric.reduction))
    return tuple(found)
