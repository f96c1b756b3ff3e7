"""What all policies have in common: when their state starts from scratch, and how it is saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

import eventtrain as et
from eventtrain import subscribers as subs

MONITOR = {
    "version": 1,
    "best": 0.5,
    "best_epoch": 2,
    "best_step": 30,
    "wait": 1.5,
    "cooldown_left": 2.0,
    "seen": 4,
    "last_step": 40,
    "elapsed_s": 12.5,
}
# A policy, and a state as earlier releases saved it.
SAVED: dict[str, tuple[Any, dict[str, Any]]] = {
    "early stopping": (subs.EarlyStopping, {"version": 1, "monitor": MONITOR}),
    "plateau": (subs.ReduceLROnPlateau, {"version": 1, "monitor": {**MONITOR, "best": "Infinity"}}),
    "spike": (subs.GradientSpike, {"version": 1, "values": [0.5, 1.5], "quiet_until": 7}),
    "not finite": (
        lambda: subs.TerminateOnNaN("rollback"),
        {
            "version": 1,
            "good": 1,
            "candidate": [0, 64],
            "rollbacks": 2,
            "rollbacks_to_good": 1,
            "ignore_until": 9,
            "unrepaired": True,
            "over": False,
        },
    ),
    "time": (lambda: subs.MaxTime(60), {"version": 1, "elapsed_s": 12.5}),
    "range test": (
        subs.LRFinder,
        {
            "version": 1,
            "first_step": 0,
            "back_at": 66,
            "learning_rates": [1e-7, 1e-6],
            "losses": [2.0, 1.5],
            "smoothed": [2.0, 1.75],
        },
    ),
    "learning rate": (lambda: subs.LearningRateScheduler(lambda epoch: 0.1), {"version": 1, "sent": 0.25}),
    "hyperparameter": (lambda: subs.HyperparamScheduler("b1", lambda epoch: 0.1), {"version": 1, "sent": None}),
}  # fmt: skip
policies = pytest.mark.parametrize("name", SAVED)


@pytest.fixture(scope="module")
def cpu() -> None:
    """Makes JAX look for its CPU before there is an event loop, which that would block."""
    jax.local_devices(backend="cpu")


def context(run_dir: Path) -> et.RunContext:
    class Context(et.RunContext):
        def require_hyperparam(self, name: str, path: str | None = None) -> str:
            return name

        def restore_at_end(self, *args: Any, **options: Any) -> None: ...

    control: Any = SimpleNamespace(snapshots={"LRFinder/start": None})
    values = {f.name: getattr(et.RunContext("run", run_dir, control, lambda event: None), f.name)
              for f in dataclasses.fields(et.RunContext)}  # fmt: skip
    return Context(**values)


@policies
def test_a_state_of_an_earlier_release_is_loaded_and_saved_with_the_same_keys(name: str) -> None:
    make, state = SAVED[name]
    policy = make()
    policy.load_state_dict(state)
    assert policy.state_dict() == state


@policies
async def test_a_loaded_state_holds_for_one_run(name: str, tmp_path: Path, cpu: None) -> None:
    make, state = SAVED[name]
    policy, fresh = make(), make().state_dict()
    policy.load_state_dict(state)
    await policy.start(context(tmp_path))
    if name != "time":  # which has used some more
        assert policy.state_dict() == state
    await policy.stop()
    await policy.start(context(tmp_path))
    if name != "time":
        assert policy.state_dict() == fresh
    assert policy.state_dict().get("elapsed_s", 0.0) < 1.0


@policies
def test_a_broken_state_is_refused_by_name(name: str) -> None:
    make, state = SAVED[name]
    for wrong in ({}, {**state, "version": 2}, {**state, "more": 1}):
        with pytest.raises(et.StateError, match=f"{type(make()).__name__} cannot load"):
            make().load_state_dict(wrong)
