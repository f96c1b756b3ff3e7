"""Step extensions: computations inside the compiled step, for what needs the weights of every step.

An observer sees weights only where a snapshot was taken. An average or a norm over all steps is cheap on the device and
impossible outside of it, so it is fused with the step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from eventtrain.device.metric_codec import MetricLayout
from eventtrain.device.reductions import value_of
from eventtrain.device.state import Leaves, PyTree, TreeStructure, abstract, copy_leaves, partition, place
from eventtrain.device.validation import call_user, matched_leaves
from eventtrain.errors import ConfigurationError, MetricsError, StepError

Use: TypeAlias = Literal["eval", "predict", "final"]
# From the state to the weights in it; what it computes instead cannot be replaced.
ParamsLens: TypeAlias = Callable[[PyTree], PyTree]


class StepChange(NamedTuple):
    """One step, as an extension sees it: what step_fn was given and what it returned. To be traced.

    Attributes:
        old_params, params: the weights before and after it.
        old_state, state: the whole state before and after it.
        step: int32[], counts completed steps, up to 2**31 - 1.
    """

    old_params: PyTree
    params: PyTree
    old_state: PyTree
    state: PyTree
    step: jax.Array


class StepExtension:
    """A pure update of a small state of its own, and metrics, after every step, inside the compiled step.

    Override `init` and `update` for a state that follows the weights; `after_step` for metrics, or for what needs the
    state or the weights before the step; `is_due` too if only some steps need it. All other methods are traced by JAX:
    no side effects, no Python branches on values. The extension's state is donated from step to step and is part of
    snapshots.

    Attributes:
        name: unique among the extensions of one trainer; the key of its state in a snapshot.
        use_for: where `weights` replace the params: "eval" (the evaluations of a run and `trainer.evaluate`), "predict"
            (`trainer.predict`), "final" (`FitResult.state`). Training itself never uses them. At most one extension for
            each use.
    """

    name: str
    use_for: frozenset[Use] = frozenset()

    def init(self, params: PyTree) -> PyTree:
        """Returns the extension's state before the first step; any pytree of arrays. By default it has none."""
        return ()

    def update(self, ext_state: PyTree, params: PyTree, step: jax.Array) -> PyTree:
        """Returns the state after a step, of the same structure, shapes and dtypes; by default as it was.

        `params` are those after the update; `step`, int32[], counts completed steps, up to 2**31 - 1.
        """
        return ext_state

    def after_step(self, ext_state: PyTree, change: StepChange) -> tuple[PyTree, Mapping[str, Any]]:
        """Returns the state after a step, as `update` does, and metrics of the step beside those of step_fn.

        By default what `update` returns, and no metrics. XLA keeps what is used of `change`: to use the old params or
        the old state costs a copy of them, since the step overwrites them.
        """
        return self.update(ext_state, change.params, change.step), {}

    def is_due(self, step: int) -> bool:
        """Whether this step computes anything for the extension; by default every one does. Called on the host.

        A step at which no extension is due runs a program without those that override this: it costs nothing, their
        state stays as it is, and it has none of their metrics, which must be `Mean`, `Sum`, `Max` or `Last` of floats.
        Other steps may still compute the extension, and with `steps_per_call` above 1 all do: let `after_step` keep
        its state and return NaN where it is not due. The answer must depend on `step` only, counted from 1.
        """
        return True

    def weights(self, ext_state: PyTree, params: PyTree) -> PyTree:
        """Returns the weights that replace `params` where `use_for` says so; by default `params`.

        Structure and shapes are those of `params`; floating-point leaves may be wider, and are cast.
        """
        return params


LAST_STEP = 2**31 - 1
"""The count of steps that extensions get stays here: 64 bits need jax_enable_x64, and a negative step is worse."""


class ExtensionStates:
    """The states of all extensions of a trainer as one pytree, `(completed steps, {name: state})`.

    Holds no array itself: the carry owns the leaves. `structure` (of that pytree) has none without extensions; `types`
    are their shapes, dtypes and shardings.

    Raises:
        ConfigurationError: two extensions have one name.
        StepError: `params` or an `init` raised.
    """

    def __init__(
        self,
        extensions: Sequence[StepExtension],
        params: ParamsLens,
        structure: TreeStructure,
        leaves: Sequence[jax.Array],
    ) -> None:
        self._extensions = {extension.name: extension for extension in extensions}
        if len(self._extensions) < len(extensions):
            raise ConfigurationError(
                f"step_extensions have the names {[extension.name for extension in extensions]}, but each extension "
                "needs a name of its own. Rename one, for example with EMA(0.999, name='ema_slow')."
            )
        self._params = params
        self._state_structure = structure
        initial, self.structure = self._init(leaves, 0)
        self.types = abstract(initial, [False] * len(initial))

    @property
    def is_due(self) -> tuple[Callable[[int], bool], ...]:
        """`is_due` of the extensions that override it; they raise a StepError where those raise."""
        return tuple(
            partial(call_user, f"{one!r}.is_due", one.is_due)
            for one in self._extensions.values()
            if is_periodic(one)
        )

    def init(self, leaves: Sequence[jax.Array], step: int) -> Leaves:
        """Returns the leaves for a state after `step` steps, in buffers of their own."""
        return self._init(leaves, step)[0]

    def update(
        self,
        ext_leaves: Leaves,
        old_state: PyTree,
        state: PyTree,
        metrics: Mapping[str, Any],
        none_due: bool = False,
    ) -> tuple[Leaves, Mapping[str, Any]]:
        """Returns the leaves after the step that made `state`, and its metrics with those of the extensions; traced.

        With `none_due`, nothing is computed for the extensions that override `is_due`.

        Raises:
            StepError: an extension raised, or did not return a pair. MetricsError: its metrics are not a flat dict of
                scalars, or have names that others have.
        """
        if not self._extensions:
            return ext_leaves, metrics
        step, states = self.structure.join(ext_leaves)
        step = step + (step < LAST_STEP)
        old_params, params = (call_user("params", self._params, one) for one in (old_state, state))
        change = StepChange(old_params, params, old_state, state, step)
        updated: dict[str, PyTree] = {}
        for name, extension in self._extensions.items():
            has_own = type(extension).after_step is not StepExtension.after_step
            subject = f"{extension!r}.{'after_step' if has_own else 'update'}"
            after_step = partial(call_user, subject, extension.after_step, states[name], change)
            if none_due and is_periodic(extension):
                updated[name], given = (
                    states[name],
                    _absent(subject, _pair(subject, jax.eval_shape(after_step))[1]),
                )
            else:
                updated[name], given = _pair(subject, after_step())
            if given:
                MetricLayout.of(metrics, "step_fn")
                MetricLayout.of(given, subject)
                if taken := sorted(given.keys() & metrics.keys()):
                    raise MetricsError(
                        f"{subject} returned the metric {taken[0]!r}, which step_fn or another extension returns too. "
                        "Rename one of them."
                    )
                metrics = {**metrics, **given}
        leaves = matched_leaves((step, updated), self.structure, ext_leaves, "step_extensions", "ext_state")
        return leaves, metrics

    def by_name(self, ext_leaves: Sequence[jax.Array]) -> dict[str, PyTree]:
        """Returns the state of each extension."""
        return self.structure.join(ext_leaves)[1] if self._extensions else {}

    def _init(self, leaves: Sequence[jax.Array], step: int) -> tuple[Leaves, TreeStructure]:
        if not self._extensions:
            return [], partition(())[1]
        params = call_user("params", self._params, self._state_structure.join(leaves))
        states = {
            name: call_user(f"{extension!r}.init", extension.init, params)
            for name, extension in self._extensions.items()
        }
        fresh, structure = partition((np.int32(min(step, LAST_STEP)), states))
        placed = place([*leaves, *fresh])[len(leaves) :]
        return copy_leaves(placed), structure


def is_periodic(extension: StepExtension) -> bool:
    """Whether the extension is due at some steps only."""
    return type(extension).is_due is not StepExtension.is_due


def _absent(subject: str, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the metrics of a step that has none of them."""
    for name, metric in metrics.items():
        dtype = getattr(value_of(metric), "dtype", None)
        if value_of(metric) is metric or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise MetricsError(
                f"{subject} returned the metric {name!r}, which the steps at which it is not due must be able to leave "
                "out. Return et.Mean, et.Sum, et.Max or et.Last of a float."
            )
    return jax.tree.map(lambda value: jnp.full(value.shape, jnp.nan, value.dtype), dict(metrics))


def _pair(subject: str, returned: object) -> tuple[PyTree, Mapping[str, Any]]:
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):  # pyright: ignore[reportUnknownArgumentType]
        return returned  # pyright: ignore[reportUnknownVariableType]
    raise StepError(
        f"{subject} must return a pair (ext_state, metrics) with a dict of metrics, got {type(returned).__name__}."
    )


def if_due(
    due: jax.Array, change: Callable[[list[Any], list[Any]], list[Any]], old: list[Any], new: list[Any]
) -> list[Any]:
    """Returns `change(old, new)` if `due`, else `old`, at no cost to the other steps where the platform allows it.

    On a GPU, XLA decides a branch on the host, so that each dispatch would wait for the device. There the change is
    always computed and used if due.
    """

    def branch(old: list[Any], new: list[Any]) -> list[Any]:
        return lax.cond(due, change, lambda old, _: old, old, new)

    def select(old: list[Any], new: list[Any]) -> list[Any]:
        return [jnp.where(due, after, before) for after, before in zip(change(old, new), old, strict=True)]

    return lax.platform_dependent(old, new, cuda=select, rocm=select, default=branch)


def checked_uses(subject: str, use_for: Any) -> frozenset[Use]:
    """Returns `use_for` as a set; raises a ConfigurationError if it has other values than those of `Use`."""
    valid = get_args(Use)
    if isinstance(use_for, Collection) and not isinstance(use_for, str):
        given: list[Any] = list(use_for)
        if all(use in valid for use in given):
            return frozenset(given)
    raise ConfigurationError(
        f"{subject}: use_for must be a collection of any of {', '.join(map(repr, valid))}, got {use_for!r}. For "
        'example use_for=["eval", "final"].'
    )
