"""Norms of parts of a tree, and metrics of step extensions, which single steps may lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.models import record

TREE = {
    "a": {"k": jnp.full((2, 2), 3.0), "b": {"x": jnp.full(9, 2.0), "n": jnp.arange(3)}},
    "c": [jnp.asarray([3.0, 4.0], jnp.bfloat16), jax.nn.relu],
}


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (0, {"g": np.sqrt(36 + 36 + 25)}),
        (1, {"g/a": np.sqrt(72), "g/c": 5.0}),
        (2, {"g/a/k": 6.0, "g/a/b": 6.0, "g/c/0": 5.0}),
        (9, {"g/a/k": 6.0, "g/a/b/x": 6.0, "g/c/0": 5.0}),
    ],
)
def test_the_parts_of_a_tree_have_their_norms_by_the_levels_of_their_names(
    depth: int, expected: dict[str, float]
) -> None:
    found = et.norms(TREE, prefix="g/", depth=depth)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)
    assert {value.dtype.name for value in found.values()} == {"float32"}


def test_a_tree_without_floats_and_levels_below_zero_are_refused() -> None:
    with pytest.raises(et.ConfigurationError, match="norms: the tree has no floating-point array"):
        et.norms({"n": jnp.arange(3)})
    with pytest.raises(et.ConfigurationError, match=r"norms\(depth=-1\): depth must be an integer >= 0"):
        et.norms(TREE, depth=-1)
    with pytest.raises(et.ConfigurationError, match=r"UpdateNorms\(every=0\): every must be an integer >= 1"):
        et.UpdateNorms(every=0)


def add(state: Any, batch: Any) -> tuple[Any, Any]:
    """The update of step k has the norm k for each of the two parts."""
    params = {"a": state["params"]["a"] + batch, "b": state["params"]["b"] - batch}
    return {"params": params}, {"loss": batch, "weight": batch}


def make(tmp_path: Path, **options: Any) -> et.Trainer[Any]:
    state = {"params": {"a": jnp.zeros(1), "b": jnp.zeros((1, 1))}}
    return et.Trainer(
        add,
        state,
        step_extensions=[et.UpdateNorms(every=3, depth=1)],
        run_dir=tmp_path,
        weight="weight",
        **options,
    )


DATA = [np.float32(step) for step in range(1, 8)]


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_update_norms_are_those_of_every_third_step_and_absent_from_the_others(
    tmp_path: Path, steps_per_call: int
) -> None:
    trainer = make(tmp_path, steps_per_call=steps_per_call, subscribers=[subs.JSONLLogger("log.jsonl")])
    steps = record(trainer, et.StepCompleted)
    windows = record(trainer, et.StepsCompleted)
    (epoch,) = trainer.fit(DATA, epochs=1).history
    names = {f"{kind}_{what}" for kind in ("param", "update") for what in ("norm", "norm/a", "norm/b")}
    names |= {"update_ratio", "update_ratio/a", "update_ratio/b"}
    for event in steps:
        assert event.metrics.keys() - {"loss", "weight"} == (names if event.step in (3, 6) else set())
    sixth = next(event.metrics for event in steps if event.step == 6)
    assert sixth["update_norm/a"] == 6.0
    assert sixth["param_norm/b"] == 21.0
    assert sixth["update_norm"] == pytest.approx(6 * 2**0.5)
    assert sixth["update_ratio"] == pytest.approx(6 / 21)
    assert epoch.metrics["update_norm/a"] == pytest.approx((3 * 3 + 6 * 6) / 9)  # weighted by the batch
    assert epoch.metrics["weight"] == 28.0
    covered = [step for event in windows for step in range(event.first_step, event.last_step + 1)]
    assert covered == list(range(1, 8))
    found = {event.first_step: event.metrics for event in windows if "update_norm/a" in event.metrics}
    assert {step: metrics["update_norm/a"].tolist() for step, metrics in found.items()} == {
        3: [3.0],
        6: [6.0],
    }
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = {
        row["step"] for row in rows if row["kind"] == "step_completed" and "update_norm" in row["metrics"]
    }
    assert logged == {3, 6}


def test_update_norms_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path: Path) -> None:
    checkpointer = subs.Checkpointer("ck", every=5)
    make(tmp_path, subscribers=[checkpointer]).fit(DATA, steps=5)
    again = make(tmp_path, subscribers=[subs.Checkpointer("ck")])
    steps = record(again, et.StepCompleted)
    again.fit(DATA, steps=7, resume=True)
    assert [event.metrics.get("update_norm/a") for event in steps] == [6.0, None]


class Seen(et.StepExtension):
    name = "seen"

    def __init__(self, given: Any) -> None:
        self.given = given

    def after_step(self, ext_state: Any, change: et.StepChange) -> Any:
        return self.given(ext_state, change)


def test_an_extension_sees_what_step_fn_was_given_and_what_it_returned(tmp_path: Path) -> None:
    def differences(ext_state: Any, change: et.StepChange) -> Any:
        moved = change.params["a"] - change.old_params["a"]
        in_state = change.state["params"]["b"] - change.old_state["params"]["b"]
        return ext_state, {"moved": moved[0], "in_state": in_state[0, 0], "step": change.step}

    trainer = et.Trainer(add, make(tmp_path).state, step_extensions=[Seen(differences)], run_dir=tmp_path)
    steps = record(trainer, et.StepCompleted)
    trainer.fit(DATA, epochs=1)
    assert [tuple(e.metrics[n] for n in ("moved", "in_state", "step")) for e in steps] == [
        (step, -step, step) for step in range(1, 8)
    ]


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (lambda s, c: s, et.errors.StepError, r"after_step must return a pair \(ext_state, metrics\)"),
        (lambda s, c: (s, {"loss": 1.0}), et.MetricsError, "returned the metric 'loss', which step_fn"),
        (
            lambda s, c: (s, {"x": c.params["a"]}),
            et.MetricsError,
            r"after_step returned the metric 'x' with shape \(1,\)",
        ),
    ],
)
def test_what_an_extension_may_not_return_is_refused_by_its_name(
    tmp_path: Path, given: Any, error: Any, said: str
) -> None:
    trainer = et.Trainer(add, make(tmp_path).state, step_extensions=[Seen(given)], run_dir=tmp_path)
    with pytest.raises(error, match=said):
        trainer.fit(DATA, epochs=1)
