"""What a changed model can use of a saved state is taken, and the rest is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eventtrain as et
from eventtrain import subscribers as subs

ADAM = optax.adam(0.1)


def state_of(value: float, width: int = 3, *, optimiser: Any = ADAM) -> dict[str, Any]:
    params = {"body": jnp.full((4, 2), value), "head": {"w": jnp.full(width, value)}}
    return {
        "params": params,
        "opt_state": optimiser.init(params),
        "key": jax.random.key(int(value)),
        "step": 0,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    def step_fn(state: Any, batch: Any) -> Any:
        return {**state, "step": state["step"] + 1}, {}

    trainer = et.Trainer(step_fn, state_of(7.0), subscribers=[subs.Checkpointer("ck")], run_dir=tmp_path)
    trainer.fit([np.float32(1)] * 2, epochs=1)
    (found,) = (tmp_path / "ck").iterdir()
    return found


def test_what_fits_is_taken_and_the_rest_is_named(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    like = state_of(1.0, width=5, optimiser=optax.sgd(0.1, momentum=0.9))
    state, left = et.take_matching(path, like)
    assert (state["params"]["body"] == 7).all()
    assert (state["params"]["head"]["w"] == 1).all()
    assert state["params"]["head"]["w"].shape == (5,)
    assert state["key"] == jax.random.key(7)
    assert state["step"].item() == 2
    assert jax.tree.structure(state) == jax.tree.structure(like)
    assert left["['params']['head']['w']"] == "float32[3] saved, float32[5] wanted"
    assert left["['opt_state'][0].trace['body']"] == "not saved"
    assert left["['opt_state'][0].mu['body']"] == "not wanted"
    assert "take_matching took 3 arrays. Left: " in caplog.text


def test_the_params_alone_are_taken_wherever_they_are(path: Path) -> None:
    like = {"body": np.zeros((4, 2), np.float32), "tail": jnp.zeros(2)}
    state, left = et.take_matching(path, like, part="params")
    assert type(state["body"]) is np.ndarray
    assert (state["body"] == 7).all()
    assert left == {"['tail']": "not saved", "['head']['w']": "not wanted"}


def test_a_state_and_a_dict_of_renamed_paths_are_taken_too(path: Path) -> None:
    like = jax.eval_shape(lambda: {"params": state_of(0.0)["params"], "key": jax.random.key(0)})
    state, left = et.take_matching({**state_of(3.0), "opt_state": None}, like)
    assert (state["params"]["body"] == 3).all()
    assert not left
    arrays = et.load_state(path)
    arrays["['trunk']"] = arrays.pop("['params']['body']")
    state, left = et.take_matching(arrays, {"trunk": jnp.zeros((4, 2))})
    assert (state["trunk"] == 7).all()
    assert left["['key']"] == "not wanted"


def test_what_gives_no_state_is_refused_by_name(path: Path) -> None:
    with pytest.raises(et.StateError, match=r"nothing of the saved state fits `like` \(\['x'\]: not saved"):
        et.take_matching(path, {"x": jnp.zeros(2)})
    with pytest.raises(et.StateError, match=r"\['x'\] of `like` would be left without a value"):
        et.take_matching(
            path, {"params": state_of(0.0)["params"], "x": jax.ShapeDtypeStruct((2,), np.float32)}
        )
    with pytest.raises(et.ConfigurationError, match="requires the path of a checkpoint"):
        et.take_matching(state_of(1.0), state_of(1.0), part="params")
    with pytest.raises(et.SnapshotError, match="is not a checkpoint"):
        et.take_matching(path.parent, state_of(1.0))


def test_a_refused_state_lists_the_arrays_that_differ_and_no_others(path: Path) -> None:
    like = state_of(0.0, width=5)
    with pytest.raises(et.StateError) as caught:
        et.load_state(path, like)
    said = str(caught.value)
    assert "['params']['head']['w'] is float32[3], not float32[5]" in said
    assert "['opt_state'][0].mu['head']['w'] is float32[3]" in said
    assert "body" not in said
