from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eventtrain.device.compiled_step import CompiledStep
from eventtrain.device.model import ParamsOverride
from eventtrain.device.state import place, split_state
from eventtrain.device.weight_averaging import EMA
from eventtrain.errors import EventTrainError, MetricsError, StateError, StepError

NAMES = [f"w{number:03}" for number in range(1000)]
STATE = {name: jnp.zeros(2) for name in NAMES}


def message(error: type[EventTrainError], function: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        function()
    text = str(caught.value)
    assert len(text.splitlines()) <= 20
    assert len(text) < 1500
    return text


def prepare(step_fn: Callable[[Any], Any], state: Any = STATE) -> Callable[[], None]:
    leaves, structure = split_state(state)
    step = CompiledStep(lambda state, batch: (step_fn(state), {}), structure, place(leaves))
    return lambda: step.prepare(np.float32(1))


@pytest.mark.parametrize(
    ("step_fn", "first"),
    [
        (
            lambda state: {name: w[:1] for name, w in state.items()},
            "state['w000'] is float32[1] instead of float32[2]",
        ),
        (
            lambda state: {name: w > 0 for name, w in state.items()},
            "state['w000'] is bool[2] instead of float32[2]",
        ),
        (lambda state: dict.fromkeys(state, "text"), "state['w000'] is str instead of float32[2]"),
        (lambda state: {f"{name}x": w for name, w in state.items()}, "['w000x'] was added"),
        (lambda state: [*state.values()], "[0] was added"),
        (lambda state: {}, "['w000'] is missing"),
    ],
    ids=["shapes", "dtypes", "types", "names", "containers", "nothing"],
)
def test_a_thousand_leaves_that_differ_are_named_first_and_counted(
    step_fn: Callable[[Any], Any], first: str
) -> None:
    text = message(StateError, prepare(step_fn))
    assert first in text
    assert "; and 995 more. " in text or "; and 1995 more. " in text


def test_a_thousand_static_leaves_that_changed_are_named_first_and_counted() -> None:
    state = STATE | {f"n{number:03}": number for number in range(1000)}
    text = message(
        StateError, prepare(lambda s: {k: v + 1 if k[0] == "n" else v for k, v in s.items()}, state)
    )
    assert "state['n000'] from 0 to 1; state['n001'] from 1 to 2; " in text
    assert "; and 995 more. " in text


def test_a_long_static_leaf_is_cut() -> None:
    state = STATE | {"text": "line\n" * 10_000}
    text = message(StateError, prepare(lambda s: s | {"text": "other"}, state))
    assert "state['text'] from 'line" in text
    assert "... to 'other'" in text


def test_only_the_leaves_that_differ_are_listed() -> None:
    text = message(StateError, prepare(lambda s: s | {name: s[name][:1] for name in NAMES[500:507]}))
    assert [name for name in NAMES if f"['{name}']" in text] == NAMES[500:505]
    assert "; and 2 more. " in text


def test_a_thousand_leaves_put_in_place_of_others_are_named_first_and_counted() -> None:
    leaves, structure = split_state(STATE)
    step = CompiledStep(lambda s, b: (s, {}), structure, place(leaves))
    step.prepare(np.float32(1))
    text = message(StateError, lambda: step.initial([jnp.zeros(3)] * 1000))
    assert "state['w000'] is float32[3] instead of float32[2]" in text
    assert "; and 995 more. " in text


def test_a_thousand_weights_of_an_extension_are_named_first_and_counted() -> None:
    class Cut(EMA):
        def weights(self, ext_state: Any, params: Any) -> Any:
            return jax.tree.map(lambda w: w[:1], params)

    leaves, structure = split_state(STATE)
    placed = place(leaves)
    text = message(
        StateError, lambda: ParamsOverride(Cut(0.5), lambda s: s, structure, placed, lambda f: f())
    )
    assert "params['w000'] is float32[1] instead of float32[2]" in text
    assert "; and 995 more. " in text


def test_a_thousand_metrics_that_changed_are_named_first_and_counted() -> None:
    leaves, structure = split_state(jnp.zeros(2))

    def moody(state: Any, batch: Any) -> Any:
        return state, {f"{name}{batch.shape[0]}": 0 for name in NAMES}

    step = CompiledStep(moody, structure, place(leaves))
    step.prepare(np.zeros(1))
    text = message(MetricsError, lambda: step.prepare(np.zeros(2)))
    assert "'w0002' was added; " in text
    assert "; and 1995 more. " in text


def test_a_long_error_of_step_fn_is_cut_and_chained_whole() -> None:
    def broken(state: Any) -> Any:
        raise ValueError("line\n" * 1000)

    function = prepare(broken)
    text = message(StepError, function)
    assert text.startswith("step_fn raised ValueError: line\n")
    assert "... and 990 more lines" in text
    with pytest.raises(StepError) as caught:
        function()
    assert str(caught.value.__cause__) == "line\n" * 1000
