"""Every public constructor and function is called with one wrong value at a time: an error by name, or it works."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import BaseModel, ValidationError

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain import testing
from eventtrain.bus.options import OPTION_NAMES


class Unordered:
    """Compares with nothing, has no truth value and no length."""

    def __eq__(self, other: object) -> bool:
        raise TypeError("cannot be compared")

    def __bool__(self) -> bool:
        raise TypeError("no truth value")

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


WRONG: list[Any] = [
    None, True, 0, -1, 3, 10**400, -(10**400), 2**63, 1.5, -0.5, float("nan"), float("inf"), 1j,
    "", "x", "\0", "../..", "\ud800", "x" * 10_000, b"x", [], [None], {}, {"x": None}, {1: 2}, (), (None, None), {1},
    object(), int, et.Event, et.StepCompleted, len, lambda: None, lambda *args: None, Path("x"), range(3),
    np.zeros(3), np.float32(1.0), np.array("x"), jnp.zeros(2), iter([1]), Unordered(), Unprintable(), Ellipsis,
]  # fmt: skip


def step_fn(state: Any, batch: Any) -> Any:
    return state, {"loss": state["w"].sum()}


def observe(event: Any) -> None: ...


def trainer() -> et.Trainer[Any]:
    return et.Trainer(step_fn, {"w": np.zeros(2)}, eval_fn=lambda state, batch: {"loss": state["w"].sum()})


NEEDED: dict[str, dict[str, Any]] = {
    "ArrayLoader": {"arrays": np.zeros((4, 2)), "batch_size": 2},
    "Cause": {"event": "x", "step": 1, "subscriber": "x"},
    "DropNewest": {"limit": 3},
    "DropOldest": {"limit": 3},
    "EMA": {"decay": 0.9},
    "SWA": {"start": 1},
    "Trainer": {"step_fn": step_fn, "state": {"w": np.zeros(2)}},
    "parse_event": {"source": "{}"},
    "subscriber_config": {"cls": subs.EarlyStopping},
    "Last": {"value": 1.0},
    "Max": {"value": 1.0},
    "Mean": {"value": 1.0},
    "Sum": {"value": 1.0},
    "nonfinite_metrics": {"opt_state": {"x": np.zeros(2)}},
    "load_state": {"path": "missing", "like": {"w": np.zeros(2)}},
    "norms": {"tree": {"w": np.zeros(2)}},
    "take_matching": {"saved": {"w": np.zeros(2)}, "like": {"w": np.zeros(2)}},
    "restore_state": {"path": "missing", "like": {"w": np.zeros(2)}},
    "load_subscribers": {"path": "missing.toml"},
    "read_events": {"run_dir": "missing"},
    "replay": {"run_dir": "missing", "into": [subs.History()]},
    "Checkpointer": {"directory": "c", "every": 3},
    "CSVLogger": {"path": "x.csv"},
    "JSONLLogger": {"path": "x.jsonl"},
    "ParquetLogger": {"path": "x"},
    "HyperparamScheduler": {"hyperparam": "x", "schedule": lambda epoch: 0.1},
    "LearningRateScheduler": {"schedule": lambda epoch: 0.1},
    "MaxTime": {"max_time": 1},
    "ModelRegistry": {"name": "x", "tracking_uri": "sqlite:///x.db"},
    "MLflowLogger": {"tracking_uri": "sqlite:///x.db"},
    "ForecastRule": {"metric": "loss", "above": 1},
    "NoImprovementRule": {"metric": "loss", "patience": 3},
    "Rule": {"metric": "loss", "above": 1},
    "SpikeRule": {"metric": "loss"},
    "TrackioLogger": {"project": "x"},
    "WandbLogger": {"project": "x"},
    "NATSEvents": {"url": "nats://localhost"},
    "Profiler": {"steps": [(1, 2)]},
    "RedisEvents": {"url": "redis://localhost"},
    "Uploader": {"url": "memory://x"},
    "download_checkpoint": {"url": "memory://x", "directory": "x"},
    "Alerts": {"rules": []},
    "AlertTarget": {"url": "json://localhost"},
    "Lambda": {"on_epoch_completed": observe},
    "CommandReplay": {"run_dir": "missing"},
    "EvaluateEvery": {"steps": 3},
    "Sample": {"fn": lambda state: state},
    "ScriptedStep": {"metrics": {"loss": [1.0]}},
}


def constructors() -> Iterator[tuple[str, Callable[..., Any]]]:
    for module in (et, subs, testing):
        for name in sorted(module.__all__):
            found = getattr(module, name)
            if isinstance(found, type) and issubclass(found, (BaseException, et.Event)):
                continue  # an exception takes anything; events are Pydantic's, in tests/events
            if (
                inspect.isabstract(found)
                or not callable(found)
                or name in ("AnyCommand", "AnyEvent", "Command", "Column")
            ):
                continue
            if name in MADE_BY_EVENTTRAIN:
                continue
            yield name, found


MADE_BY_EVENTTRAIN = {
    "Control", "EventReader", "EventStream", "FitResult", "Hyperparams", "KeptSnapshot", "LoopStatistics",
    "RunContext", "Session", "StateArray", "StepChange", "StepProgram", "StepSeries", "Subscription",
    "SubscriptionStatistics", "TracedRun",
}  # fmt: skip


def parameters(name: str, function: Callable[..., Any]) -> list[str]:
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]


def raw_errors(call: Callable[..., Any], needed: dict[str, Any], names: list[str]) -> list[str]:
    """Calls with each wrong value for each parameter; returns the calls that end in an error without a name."""
    found: list[str] = []
    for name in names:
        for index, value in enumerate(WRONG):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    call(**{**needed, name: value})
            except et.errors.EventTrainError as error:
                if len(str(error)) > 10_100:
                    found.append(f"{name}=WRONG[{index}]: {len(str(error))} characters")
            except ValidationError as error:
                if not isinstance(call, type) or not issubclass(call, BaseModel):
                    found.append(
                        f"{name}=WRONG[{index}] ({type(value).__name__}): {type(error).__name__}: {error}"[
                            :200
                        ]
                    )
            except Exception as error:
                if name in ("data", "eval_data") and callable(value):
                    continue  # what the user's code raises leaves fit as it is
                found.append(
                    f"{name}=WRONG[{index}] ({type(value).__name__}): {type(error).__name__}: {error}"[:200]
                )
    return found


@pytest.mark.allow_blocking
@pytest.mark.parametrize(("name", "function"), [pytest.param(*pair, id=pair[0]) for pair in constructors()])
def test_a_wrong_value_for_one_argument_is_an_error_by_name_or_works(
    name: str, function: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert raw_errors(function, NEEDED.get(name, {}), parameters(name, function)) == []


def test_a_wrong_value_for_an_option_of_a_subscription_is_an_error_by_name_or_works() -> None:
    bus = et.EventBus()
    subscribe = partial(bus.subscribe, et.EpochCompleted, observe)
    assert raw_errors(subscribe, {}, list(OPTION_NAMES)) == []
    assert raw_errors(lambda event_type: bus.subscribe(event_type, observe), {}, ["event_type"]) == []
    assert raw_errors(lambda handler: bus.subscribe(et.Event, handler), {}, ["handler"]) == []
    assert raw_errors(lambda event: bus.publish(event), {}, ["event"]) == []

    class Mine(et.Subscriber):
        async def on_epoch_completed(self, event: et.EpochCompleted) -> None: ...

    one = trainer()

    def subscriber(**options: Any) -> None:
        mine = Mine()
        vars(mine).update(options)
        one.subscribe(mine)

    assert raw_errors(subscriber, {}, [*OPTION_NAMES, "events", "event_types"]) == []
    assert raw_errors(one.subscribe, {}, ["subscriber"]) == []


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("fit", ["epochs", "steps", "eval_data", "resume", "hyperparams", "progress", "data"]),
        ("evaluate", ["data"]),
        ("predict", ["data"]),
    ],
)
def test_a_wrong_value_for_an_argument_of_the_trainer_is_an_error_by_name_or_works(
    method: str, names: list[str], tmp_path: Path
) -> None:
    def call(**arguments: Any) -> None:
        one = et.Trainer(
            step_fn, {"w": np.zeros(2)}, run_dir=tmp_path, eval_fn=lambda s, b: {"loss": s["w"].sum()}
        )
        if method == "fit" and "steps" not in arguments:
            arguments.setdefault("epochs", 1)
        getattr(one, method)(**arguments)

    assert raw_errors(call, {"data": []}, names) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"drain_timeout_s": "x"},
        {"drain_timeout_s": float("nan")},
        {"drain_timeout_s": -1.0},
        {"backend": "nope"},
        {"weight": 3},
        {"donate": "yes"},
        {"run_id": 5},
        {"run_dir": 5},
        {"backend_options": {1: 2}},
        {"subscribers": subs.EarlyStopping()},
        {"subscribers": [3]},
        {"bus": "bus"},
        {"step_extensions": [3]},
        {"steps_per_call": True},
        {"max_in_flight_steps": 2.0},
        {"flush_interval_s": None},
        {"snapshot": "none"},
    ],
    ids=lambda wrong: re.sub(r" at 0x\w+", "", str(wrong)),
)
def test_an_argument_of_the_trainer_that_cannot_work_is_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(
        et.ConfigurationError, match=rf"{name}.* must be|Expected a Subscriber, got int"
    ) as raised:
        et.Trainer(step_fn, {"w": np.zeros(2)}, **wrong)
    assert type(raised.value) is et.ConfigurationError


def test_a_missing_or_unknown_keyword_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'path'"):
        subs.CSVLogger()  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="unexpected keyword argument 'patienc'"):
        subs.EarlyStopping(patienc=3)  # pyright: ignore[reportCallIssue]


def test_what_is_checked_has_its_signature_and_its_annotations() -> None:
    assert next(iter(inspect.signature(subs.EarlyStopping).parameters)) == "monitor"
    assert subs.EarlyStopping.__init__.__annotations__["patience"]
