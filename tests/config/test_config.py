"""Files as subscribers: what they may say, and how they are told what they may not."""

from __future__ import annotations

import functools
import inspect
import json
import re
import subprocess
import sys
import traceback
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import jsonschema
import pytest
from pydantic import BeforeValidator, SecretStr, ValidationError
from rich.console import Console

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.config import run_file
from eventtrain.config.load import load_run, run_json_schema
from eventtrain.config.subscriber_config import build, subscriber_type, type_names
from eventtrain.events.models import snake_case
from eventtrain.validation.optional_imports import MissingModule
from tests.conftest import python_path

if TYPE_CHECKING:
    from decimal import Decimal

TYPES = {
    "Alerts": "alerts",
    "CSVLogger": "csv_logger",
    "Checkpointer": "checkpointer",
    "Dashboard": "dashboard",
    "CommandReplay": "command_replay",
    "DeviceStats": "device_stats",
    "EarlyStopping": "early_stopping",
    "EvaluateEvery": "evaluate_every",
    "GradientSpike": "gradient_spike",
    "History": "history",
    "HyperparamScheduler": "hyperparam_scheduler",
    "JSONLLogger": "jsonl_logger",
    "LRFinder": "lr_finder",
    "Lambda": "lambda",
    "LearningRateScheduler": "learning_rate_scheduler",
    "MLflowLogger": "mlflow_logger",
    "MaxTime": "max_time",
    "ModelRegistry": "model_registry",
    "NATSEvents": "nats_events",
    "OpenTelemetry": "open_telemetry",
    "OverheadMeter": "overhead_meter",
    "ParquetLogger": "parquet_logger",
    "PlotCurves": "plot_curves",
    "Profiler": "profiler",
    "ProgressBar": "progress_bar",
    "PrometheusExporter": "prometheus_exporter",
    "RedisEvents": "redis_events",
    "ReduceLROnPlateau": "reduce_lr_on_plateau",
    "StepTimer": "step_timer",
    "Report": "report",
    "Sample": "sample",
    "Summary": "summary",
    "TensorBoardLogger": "tensor_board_logger",
    "TerminateOnNaN": "terminate_on_nan",
    "Uploader": "uploader",
    "TrackioLogger": "trackio_logger",
    "WandbLogger": "wandb_logger",
}
"""Class -> its name in a file."""

REQUIRED: dict[str, dict[str, Any]] = {
    "Alerts": {"rules": [{"metric": "loss", "above": 1.0}]},
    "CSVLogger": {"path": "metrics.csv"},
    "Checkpointer": {"directory": "checkpoints"},
    "CommandReplay": {"run_dir": "runs/other"},
    "EvaluateEvery": {"steps": 10},
    "HyperparamScheduler": {
        "hyperparam": "weight_decay",
        "schedule": {"name": "constant_schedule", "value": 0.1},
    },
    "JSONLLogger": {"path": "run.jsonl"},
    "LearningRateScheduler": {
        "schedule": {"name": "cosine_decay_schedule", "init_value": 0.1, "decay_steps": 9}
    },
    "MaxTime": {"max_time": "00:00:10:00"},
    "MLflowLogger": {"tracking_uri": "sqlite:///mlflow.db"},
    "ModelRegistry": {"name": "digits", "tracking_uri": "sqlite:///mlflow.db"},
    "NATSEvents": {"url": "nats://trainer@host"},
    "ParquetLogger": {"path": "metrics"},
    "RedisEvents": {"url": "redis://host"},
    "Uploader": {"url": "s3://bucket/prefix"},
    "TrackioLogger": {"project": "digits"},
    "WandbLogger": {"project": "digits"},
}
"""What a table has to say besides its type."""

NOT_IN_FILES = {"Lambda", "Sample"}
"""What needs functions, which no file can give."""

CLASSES = [
    name
    for name in subs.__all__
    if inspect.isclass(cls := getattr(subs, name)) and issubclass(cls, et.Subscriber)
]


def write(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def table(**values: Any) -> str:
    """One ``[[subscribers]]`` table; JSON's strings, numbers, arrays and booleans are TOML's."""
    return "\n".join(
        ["[[subscribers]]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""]
    )


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[..., str]:
    """Why a file is refused; its path is taken out."""

    def refusal(text: str, *overrides: str, name: str = "run.toml") -> str:
        path = write(tmp_path, text, name)
        with pytest.raises(et.ConfigurationError) as caught:
            et.load_subscribers(path, overrides=overrides)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return refusal


# --- names ----------------------------------------------------------------------------------------------------


def test_every_subscriber_has_its_name_in_snake_case_and_nothing_else_is_a_type():
    assert type_names() == sorted(TYPES[name] for name in CLASSES if name not in NOT_IN_FILES)
    assert {name: snake_case(name) for name in TYPES} == TYPES


def test_neither_the_package_nor_the_names_of_the_types_load_what_is_heavy():
    script = """
import sys
import eventtrain as et
heavy = {"eventtrain.config", "eventtrain.subscribers.policies", "orbax", "matplotlib", "httpx"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
et.load_subscribers
from eventtrain.config.subscriber_config import subscriber_type, type_names
assert "checkpointer" in type_names()
assert subscriber_type("early_stopping").__name__ == "EarlyStopping"
assert "orbax" not in sys.modules
assert subscriber_type("checkpointer").__name__ == "Checkpointer"
assert "orbax" in sys.modules
"""
    env = {"PYTHONPATH": python_path(), "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


# --- from a constructor to a model and back -------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in NOT_IN_FILES])
def test_the_model_of_a_subscriber_takes_its_own_defaults_and_builds_the_same_instance(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = getattr(subs, name)
    signature, original = inspect.signature(cls), cls.__init__
    given: list[dict[str, Any]] = []

    @functools.wraps(original)
    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given.append(dict(bound.arguments))
        original(self, *args, **kwargs)

    monkeypatch.setattr(cls, "__init__", noting)
    required = REQUIRED.get(name, {})
    (loaded,) = et.load_subscribers(write(tmp_path, tomlish(type=TYPES[name], **required)))
    model = et.subscriber_config(cls)
    config = model.model_validate_json(json.dumps({"type": TYPES[name], **required}))
    whole = model.model_validate(dict(config))  # which validates each default
    direct = cls(**{key: getattr(config, key) for key in required})
    assert type(build(cls, whole)) is type(direct)
    from_file, by_hand, from_model = given
    assert from_model == by_hand
    assert {**from_file, **dict.fromkeys(required)} == {**by_hand, **dict.fromkeys(required)}
    options = ("name", "every", "every_s", "lag", "timeout_s", "on_error", "disable_after")
    assert [getattr(loaded, option) for option in options] == [getattr(direct, option) for option in options]


def tomlish(**values: Any) -> str:
    """As ``table``, where values may hold tables."""

    def inline(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key} = {inline(below)}" for key, below in value.items()) + "}"
        return f"[{', '.join(map(inline, value))}]" if isinstance(value, list) else json.dumps(value)

    return "\n".join(["[[subscribers]]", *(f"{key} = {inline(value)}" for key, value in values.items()), ""])


@pytest.mark.parametrize("name", [name for name in CLASSES if name in NOT_IN_FILES])
def test_a_subscriber_that_needs_functions_says_that_no_file_can_give_them(
    name: str, refusal: Callable[..., str]
) -> None:
    told = refusal(table(type=TYPES[name]))
    assert f'run.toml, [[subscribers]] #1, type = "{TYPES[name]}": {name}' in told
    assert "it in Python: Trainer(subscribers=[...])" in told


def schedule_of(value: Any) -> Callable[[int], float]:
    if callable(value):
        return value
    if not isinstance(value, dict) or value.keys() != {"start", "drop"}:
        raise ValueError("needs a table such as {start = 0.1, drop = 0.5}")
    return lambda epoch: value["start"] * value["drop"] ** epoch


Schedule = Annotated[Callable[[int], float], BeforeValidator(schedule_of)]


class Everything(et.Subscriber):
    """One parameter of every kind."""

    def __init__(
        self,
        first: int,
        /,
        schedule: Schedule,
        *args: int,
        url: str | SecretStr | None = None,
        folder: str | Path = "out",
        names: tuple[str, ...] = ("a",),
        key: Callable[[Any], bool] | None = None,
        console: Console | None = None,
        both: Console | Callable[[], None] = print,
        kind: type[int] = int,
        json: bool = False,
        _private: float = 0.5,
        lag: int | None = 3,
        limit: int | None = 7,
        on_error: Callable[[Exception], None] = print,
        **kwargs: int,
    ) -> None:
        self.given = {name: value for name, value in locals().items() if name != "self"}

    async def on_epoch_completed(self, event: et.EpochCompleted) -> None: ...


def everything(**values: Any) -> Any:
    model = et.subscriber_config(Everything)
    config = {"type": "everything", "first": 1, "schedule": {"start": 1.0, "drop": 0.5}, **values}
    return model.model_validate_json(json.dumps(config))


def test_a_model_has_what_a_file_can_give_and_the_options_that_are_no_parameters():
    fields = et.subscriber_config(Everything).model_fields
    names = {found.alias or name for name, found in fields.items()}
    parameters = {"first", "schedule", "url", "folder", "names", "json", "_private", "lag", "limit"}
    assert names == {"type", "name", "every", "every_s", "timeout_s", "disable_after"} | parameters
    assert fields["lag"].default == 3
    assert fields["disable_after"].default == 100
    assert [name for name, found in fields.items() if found.is_required()] == ["type", "first", "schedule"]


def test_validators_in_annotations_make_values_of_what_a_file_says():
    assert everything().schedule(2) == 0.25
    with pytest.raises(ValidationError, match="needs a table such as"):
        everything(schedule=3)


def test_an_event_is_a_class_or_its_name() -> None:
    config = functools.partial(et.subscriber_config(subs.JSONLLogger), type="jsonl_logger", path="x")
    assert (
        config(events="step_completed").events is config(events=et.StepCompleted).events is et.StepCompleted
    )
    alerts = functools.partial(et.subscriber_config(subs.Alerts), type="alerts")
    for model, wrong in ((config, {"events": int}), (alerts, {"rules": [{**RULE, "event": et.RunFailed}]})):
        with pytest.raises(ValidationError):
            model(**wrong)


def test_text_that_may_be_secret_is_secret_in_the_model():
    config = everything(url="https://token")
    assert "token" not in repr(config)
    assert config.url.get_secret_value() == "https://token"


def test_values_have_the_types_of_the_file_and_no_others_are_made_of_them():
    for wrong in (
        {"first": "1"},
        {"first": True},
        {"first": 1.0},
        {"names": "a"},
        {"folder": 3},
        {"json": 1},
    ):
        with pytest.raises(ValidationError):
            everything(**wrong)
    assert everything(names=["b", "c"]).names == ("b", "c")


def test_none_in_words_is_none_where_text_is_no_value():
    config = everything(limit="none", folder="none", name="none")
    assert (config.limit, config.folder, config.name) == (None, "none", "none")


def test_a_subscriber_is_built_with_what_was_said_and_its_own_defaults_otherwise(plugins: Plugins) -> None:
    plugins.offer("everything", everything="tests.config.test_config:Everything")
    text = tomlish(
        type="everything",
        first=4,
        schedule={"start": 1, "drop": 0.5},
        json=True,
        _private=2,
        every=5,
        name="it",
    )
    (built,) = et.load_subscribers(write(plugins.folder, text))
    assert isinstance(built, Everything)
    given = built.given
    assert (given["first"], given["json"], given["_private"], given["lag"]) == (4, True, 2.0, 3)
    assert (given["args"], given["kwargs"], given["both"], given["names"]) == ((), {}, print, ("a",))
    assert (built.every, built.name, built.disable_after) == (5, "it", 100)


class Plain(et.Subscriber):
    async def on_epoch_completed(self, event: et.EpochCompleted) -> None: ...


@dataclass
class WithFactory(Plain):
    items: list[str] = field(default_factory=list)
    size: int = 3


def test_a_default_that_is_made_anew_is_left_to_the_constructor(plugins: Plugins) -> None:
    plugins.offer("factory", with_factory="tests.config.test_config:WithFactory")
    first, second = et.load_subscribers(
        write(plugins.folder, table(type="with_factory") + table(type="with_factory", size=4))
    )
    assert (first.items, second.items, second.size) == ([], [], 4)
    assert first.items is not second.items


def test_a_subscriber_without_a_constructor_has_the_options_only():
    assert set(et.subscriber_config(Plain).model_fields) == {
        "type", "name", "every", "every_s", "lag", "timeout_s", "on_error", "disable_after",
    }  # fmt: skip


class FromConfig(Plain):
    def __init__(self, function: Callable[[float], float]) -> None:
        self.function = function

    @classmethod
    def from_config(cls, power: int = 2) -> FromConfig:
        return cls(lambda x: x**power)


def test_a_class_may_have_a_constructor_of_its_own_for_files(plugins: Plugins) -> None:
    plugins.offer("powers", power="tests.config.test_config:FromConfig")
    (built,) = et.load_subscribers(write(plugins.folder, table(type="power", power=3, name="cube")))
    assert isinstance(built, FromConfig)
    assert (built.function(2.0), built.name) == (8.0, "cube")


class NeedsFunction(Plain):
    def __init__(self, function: Callable[[float], float]) -> None: ...


class NeedsType(Plain):
    def __init__(self, type: str) -> None: ...


class Unresolved(Plain):
    def __init__(self, amount: Decimal) -> None: ...


@pytest.mark.parametrize(
    ("cls", "parts"),
    [
        (NeedsFunction, ["'function'", "Callable", "Trainer(subscribers=[...])"]),
        (NeedsType, ["'type'"]),
        (Unresolved, ["Decimal", "TYPE_CHECKING"]),
    ],
)
def test_a_class_that_no_file_can_describe_is_refused_by_name(
    cls: type[et.Subscriber], parts: list[str]
) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        et.subscriber_config(cls)
    assert f"{cls.__name__} cannot be described in a file" in str(caught.value)
    assert [part for part in parts if part not in str(caught.value)] == []


# --- what a file says -----------------------------------------------------------------------------------------


def test_a_file_gives_subscribers_in_its_order(tmp_path: Path) -> None:
    text = """
    [fit]
    epochs = 3

    [[subscribers]]
    type = "early_stopping"
    patience = 4
    lag = { epoch_completed = 2 }

    [[subscribers]]
    type = "alerts"
    rules = [{ metric = "loss", above = 3, event = "step_completed" }, { metric = "loss", non_finite = true }]

    [[subscribers]]
    type = "jsonl_logger"
    path = "run.jsonl"
    events = ["epoch_completed", "run_completed"]

    [[subscribers]]
    type = "checkpointer"
    directory = "checkpoints"
    max_to_keep = "none"
    """
    first, second, third, fourth = et.load_subscribers(write(tmp_path, text))
    assert isinstance(first, subs.EarlyStopping)
    assert first.lag == {et.EpochCompleted: 2}
    assert isinstance(second, subs.Alerts)
    assert second.events[:2] == (et.StepsCompleted, et.EpochCompleted)
    assert isinstance(third, subs.JSONLLogger)
    assert third.events == (et.EpochCompleted, et.RunCompleted)
    assert isinstance(fourth, subs.Checkpointer)
    assert load_run(tmp_path / "run.toml").fit.epochs == 3


STOP = 'run.toml, [[subscribers]] #1, type = "early_stopping": '
ALERTS = 'run.toml, [[subscribers]] #1, type = "alerts": '
RULE = {"metric": "loss", "above": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (table(type="early_stopping", patince=3), STOP + "unknown key 'patince'. Did you mean 'patience'?"),
        (table(type="early_stopping", xyzzy=3), STOP + "unknown key 'xyzzy'. Known keys: baseline, "),
        (table(type="early_stopping", patience="3"), STOP + 'patience = "3" should be a valid integer'),
        (table(type="early_stopping", patience=True), STOP + "patience = true should be a valid integer"),
        (table(type="early_stopping", mode="mni"), STOP + "mode = \"mni\" should be 'auto', 'min' or 'max'"),
        (table(type="early_stopping", patience=-1), STOP + "EarlyStopping(patience=-1): patience must be"),
        (table(type="early_stopping", every=0), STOP + "every = 0 should be greater than or equal to 1"),
        (
            table(type="early_stopping", lag="x"),
            STOP + "lag = \"x\" should be a valid integer or an object or 'none'",
        ),
        (
            tomlish(type="early_stopping", lag={"epoch_complete": 1}),
            STOP + "lag.epoch_complete = 1: no such event. Did you mean 'epoch_completed'?",
        ),
        (
            table(type="erly_stopping"),
            "type = \"erly_stopping\": there is no type 'erly_stopping'. Did you mean 'early_",
        ),
        (table(type="wxyz"), "there is no type 'wxyz'. Known types: alerts, checkpointer, "),
        (
            table(typ="early_stopping"),
            'run.toml, [[subscribers]] #1: expected a type, such as type = "early_stopping"',
        ),
        (table(type=3), "run.toml, [[subscribers]] #1: expected a type"),
        (table(type="alerts"), ALERTS + "the key 'rules' is missing"),
        (table(type="alerts", rules=3), ALERTS + "rules should be a valid array"),
        (table(type="alerts", rules=[]), ALERTS + "Alerts(rules=[]) watches nothing."),
        (
            tomlish(type="alerts", rules=[{**RULE, "abov": 1}]),
            ALERTS + "unknown key 'rules[0].abov'. Did you mean 'above'?",
        ),
        (tomlish(type="alerts", rules=[RULE, {"above": 1}]), ALERTS + "the key 'rules[1].metric' is missing"),
        (tomlish(type="alerts", rules=[{"metric": "x"}]), ALERTS + "rules[0]: Rule('x') can never be broken"),
        (
            tomlish(type="alerts", rules=[{**RULE, "event": "step_complete"}]),
            ALERTS + "rules[0].event: no such event. Did you mean 'step_completed'?",
        ),
        (
            tomlish(type="alerts", rules=[{**RULE, "event": "run_failed"}]),
            ALERTS
            + "rules[0].event: no such event. Expected the name of an event, such as 'eval_completed'.",
        ),
        (
            tomlish(type="alerts", rules=[{"type": "spik", "metric": "loss"}]),
            ALERTS + "rules[0]: no such type of rule. Did you mean 'spike'?",
        ),
        (
            tomlish(type="alerts", rules=[{"type": "xyzzy"}]),
            ALERTS + "rules[0]: no such type of rule. Known types: threshold, spike, ",
        ),
        (
            tomlish(type="alerts", rules=[{"type": "stall", "window": 3}]),
            ALERTS + "unknown key 'rules[0].window'. Known keys: after_s, cooldown_s, for_s, for_steps, ",
        ),
        (
            tomlish(type="alerts", rules=[{"type": "stall", "afterr_s": 3}]),
            ALERTS + "unknown key 'rules[0].afterr_s'. Did you mean 'after_s'?",
        ),
        (
            tomlish(type="alerts", rules=[{"type": "deadline", "at": "2030-01-31T08:00:00"}]),
            ALERTS + "rules[0]: DeadlineRule(at='2030-01-31T08:00:00'): has no time zone",
        ),
        (
            tomlish(type="alerts", rules=[{"type": "deadline", "at": "soon"}]),
            ALERTS + "rules[0].at: needs a time such as 2030-01-31T08:00:00+01:00",
        ),
        (
            table(type="jsonl_logger", path="x", events=["epoch_complete"]),
            "events[0] = \"epoch_complete\": no such event. Did you mean 'epoch_completed'?",
        ),
        ("[[subscriber]]\n", "run.toml: unknown section 'subscriber'. Did you mean 'subscribers'?"),
        ("[model]\n", "run.toml: unknown section 'model'. Known sections: [fit] and [[subscribers]]."),
        ("subscribers = 3\n", "run.toml: `subscribers` must be an array of tables: [[subscribers]]."),
        ("subscribers = [3]\n", "run.toml: `subscribers` must be an array of tables: [[subscribers]]."),
        ("fit = 3\n", "run.toml: `fit` must be a table: [fit]."),
        ("[fit]\nepoch = 3\n", "run.toml, [fit]: unknown key 'epoch'. Did you mean 'epochs'?"),
        ("[fit]\nepochs = 0\n", "run.toml, [fit]: epochs = 0 should be greater than or equal to 1"),
        ("[fit]\nepochs = 1\nsteps = 1\n", "run.toml, [fit]: expected epochs or steps, not both"),
        ("[fit]\nepochs =\n", "run.toml is not valid TOML: Invalid value (at line 2, column 9)."),
    ],
)
def test_what_is_wrong_is_told_with_file_table_key_and_the_nearest_that_exists(
    text: str, expected: str, refusal: Callable[..., str]
) -> None:
    assert expected in refusal(text)


def test_all_problems_of_a_table_are_told_at_once_and_the_table_is_counted(
    refusal: Callable[..., str],
) -> None:
    told = refusal(table(type="progress_bar") + table(type="early_stopping", patince=3, min_delta="x"))
    assert told == (
        'run.toml, [[subscribers]] #2, type = "early_stopping":\n'
        '  min_delta = "x" should be a valid number\n'
        "  unknown key 'patince'. Did you mean 'patience'?"
    )


def test_a_table_with_many_problems_is_told_in_at_most_20_lines(refusal: Callable[..., str]) -> None:
    told = refusal(table(type="early_stopping", **{f"key{number}": 1 for number in range(40)}))
    assert told.count("unknown key") == 15
    assert told.endswith("\n  and 25 more")
    assert len(told.splitlines()) <= 20


def test_a_file_that_cannot_be_read_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    for name, reason in (
        ("none.toml", "No such file"),
        ("run.json", "expected a file name that ends in .toml, .yaml or .yml"),
        ("latin.toml", "is not UTF-8 text"),
    ):
        with pytest.raises(et.ConfigurationError, match=f"{name}.*{reason}"):
            et.load_subscribers(tmp_path / name)


def test_an_empty_file_has_no_subscribers(tmp_path: Path) -> None:
    assert et.load_subscribers(write(tmp_path, "")) == []
    assert et.load_subscribers(write(tmp_path, "", "run.yaml")) == []


# --- YAML -----------------------------------------------------------------------------------------------------

YAML = """
fit:
  epochs: 3
subscribers:
  - type: early_stopping
    min_delta: 1e-4
    patience: 5
  - type: checkpointer
    directory: checkpoints
    max_to_keep: null
"""


def test_yaml_says_the_same_as_toml(tmp_path: Path) -> None:
    for name in ("run.yaml", "run.yml"):
        first, second = et.load_subscribers(write(tmp_path, YAML, name))
        assert isinstance(first, subs.EarlyStopping)
        assert isinstance(second, subs.Checkpointer)
    assert load_run(tmp_path / "run.yaml").fit.epochs == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            YAML.replace("patience", "patince"),
            'run.yaml, [[subscribers]] #1, type = "early_stopping": unknown key',
        ),
        (
            YAML + "subscribers: []\n",
            "run.yaml is not valid YAML: found the key `subscribers` twice (line 11, column 1).",
        ),
        ("fit: [\n", "run.yaml is not valid YAML: "),
        ("- fit\n", "run.yaml: the top level must be a mapping"),
        (
            "a: !!python/object/apply:os.getcwd []\n",
            "run.yaml is not valid YAML: could not determine a constructor",
        ),
        ("fit: \x01\n", "run.yaml is not valid YAML: "),
        ("subscribers: &all\n  - type: early_stopping\n    name: *all\n", "one that contains itself"),
        ("1: 2\n", "run.yaml: unknown section 1. "),
    ],
)
def test_yaml_that_is_wrong_is_told_as_toml_is(text: str, expected: str, refusal: Callable[..., str]) -> None:
    assert expected in refusal(text, name="run.yaml")


ALIASES = "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deep.toml", "x = " + "[" * 100_000),
        ("deep.toml", "fit = " + "[" * 60 + "]" * 60),
        ("tables.toml", "[fit" + ".a" * 5_000 + "]"),
        ("digits.toml", "[fit]\nsteps = " + "9" * 10_000),
        ("large.toml", "#" * 2_000_000),
        ("key.toml", f"[{'k' * 500_000}]"),
        ("many.toml", "[fit]\nx = [" + "1," * 200_000 + "]"),
        ("deep.yaml", "fit: " + "[" * 5_000),
        ("aliases.yaml", ALIASES.replace("a39:", "fit:")),
        ("itself.yaml", "fit: &a\n  x: *a\n"),
        ("date.yaml", "fit: 2024-99-99"),
        ("digits.yaml", "fit: " + "9" * 10_000),
        ("key.yaml", "fit: {[1]: 2}"),
        ("key.yaml", "? {a: 1}\n: 2"),
        ("tag.yaml", "fit: !!python/object:os.system {}"),
        ("null\0.toml", None),
    ],
    ids=lambda text: str(text)[:30].replace("\0", "0"),
)
def test_a_hostile_file_is_an_error_by_name_and_allocates_little(
    tmp_path: Path, name: str, text: str | None
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    tracemalloc.start()
    began_s = perf_counter()
    try:
        with pytest.raises(et.ConfigurationError) as raised:
            et.load_subscribers(path)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    assert perf_counter() - began_s < 20
    assert len(str(raised.value)) < 20_000
    with pytest.raises(et.ConfigurationError):
        et.load_subscribers(tmp_path / "missing.toml", overrides=["fit.steps=" + "9" * 10_000])


def test_without_pyyaml_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    missing = MissingModule(ImportError("No module named 'yaml'"), "yaml", "A YAML file")
    monkeypatch.setattr(run_file, "yaml", missing)
    assert "No module named 'yaml'). Install it: pip install 'eventtrain[yaml]'." in refusal(
        YAML, name="run.yaml"
    )


def test_toml_needs_no_pyyaml(tmp_path: Path) -> None:
    path = write(tmp_path, table(type="early_stopping"))
    script = f"""
import sys
sys.modules["yaml"] = None
import eventtrain as et
print(len(et.load_subscribers({str(path)!r})))
"""
    env = {"PYTHONPATH": python_path(), "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


# --- overrides ------------------------------------------------------------------------------------------------

TWO = table(type="early_stopping", name="strict", monitor="loss") + table(
    type="reduce_lr_on_plateau", patience=2
)


def test_overrides_are_read_as_toml_and_as_text_where_they_are_none(plugins: Plugins) -> None:
    plugins.offer("everything", everything="tests.config.test_config:Everything")
    path = write(plugins.folder, tomlish(type="everything", first=1, schedule={"start": 1, "drop": 0.5}))
    overrides = [
        "first=3",
        "folder=a b",
        'name="3"',
        'names=["x", "y"]',
        "json=true",
        "limit=none",
        "_private=1e-3",
    ]
    (built,) = et.load_subscribers(path, overrides=[f"everything.{text}" for text in overrides])
    assert isinstance(built, Everything)
    given = built.given
    assert (given["first"], given["folder"], built.name, given["names"]) == (3, "a b", "3", ("x", "y"))
    assert (given["json"], given["limit"], given["_private"]) == (True, None, 1e-3)


def test_text_that_goes_on_after_its_value_is_text(plugins: Plugins) -> None:
    plugins.offer("everything", everything="tests.config.test_config:Everything")
    path = write(plugins.folder, tomlish(type="everything", first=1, schedule={"start": 1, "drop": 0.5}))
    (built,) = et.load_subscribers(path, overrides=["everything.folder=3\nfirst=9"])
    assert isinstance(built, Everything)
    assert (built.given["folder"], built.given["first"]) == ("3\nfirst=9", 1)


@pytest.mark.parametrize("section", ["strict", "early_stopping", "subscribers.0"])
def test_a_table_is_addressed_by_name_by_type_and_by_index(tmp_path: Path, section: str) -> None:
    path = write(tmp_path, TWO)
    (first, _) = et.load_subscribers(path, overrides=[f"{section}.every=7", "fit.steps=3"])
    assert first.every == 7
    assert load_run(path, [f"{section}.every=7", "fit.steps=3"]).fit.steps == 3


def test_the_last_override_of_a_key_counts(tmp_path: Path) -> None:
    assert load_run(write(tmp_path, ""), ["fit.steps=3", "fit.steps=4"]).fit.steps == 4


@pytest.mark.parametrize(
    ("text", "override", "expected"),
    [
        (TWO, "strict.patince=3", "unknown key 'patince'. Did you mean 'patience'? (--set strict.patince)"),
        (TWO, "strict.patience=x", 'patience = "x" should be a valid integer (--set strict.patience)'),
        (TWO, "fit.epoch=3", "unknown key 'epoch'. Did you mean 'epochs'? (--set fit.epoch)"),
        (
            TWO,
            "stict.patience=3",
            "--set stict.patience: run.toml has no section 'stict'. Did you mean 'strict'?",
        ),
        (
            TWO,
            "xyz.patience=3",
            "run.toml has no section 'xyz'. Known sections: fit, strict, early_stopping, reduce_lr_on_plateau, ",
        ),
        (
            TWO,
            "subscribers.2.patience=3",
            "run.toml has no section 'subscribers.2'. Did you mean 'subscribers.",
        ),
        (
            TWO + table(type="early_stopping"),
            "early_stopping.patience=3",
            "has 2 tables 'early_stopping'. Use subscribers.0.patience or subscribers.2.patience.",
        ),
        (
            TWO + TWO,
            "strict.patience=3",
            "has 2 tables 'strict'. Use subscribers.0.patience or subscribers.2",
        ),
        (TWO, "patience=3", "--set patience: expected section.key=value, such as fit.epochs=3"),
        (TWO, "strict.patience", "--set strict.patience: expected section.key=value"),
        (TWO, ".patience=3", "--set .patience: expected section.key=value"),
        (TWO, "strict.=3", "--set strict.: expected section.key=value"),
    ],
)
def test_an_override_that_cannot_work_is_told_as_such(
    text: str, override: str, expected: str, refusal: Callable[..., str]
) -> None:
    assert expected in refusal(text, override).replace("\n", " ")


# --- other packages -------------------------------------------------------------------------------------------


class Plugins:
    """Packages that are installed for one test: a folder on sys.path with the metadata of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def offer(self, distribution: str, **entries: str) -> None:
        """Install ``distribution`` 1.2 with these entry points; underscores stand for themselves."""
        info = self.folder / f"{distribution}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        lines = [f"{name} = {target}" for name, target in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[eventtrain.subscribers]", *lines, ""]))


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plugins:
    monkeypatch.syspath_prepend(str(tmp_path))
    return Plugins(tmp_path)


PLUGIN = """
import eventtrain as et

class Beeper(et.Subscriber):
    def __init__(self, times: int = 1) -> None:
        if times > 9:
            raise RuntimeError(f"{times} beeps wake the neighbours")
        self.times = times

    async def on_epoch_completed(self, event: et.EpochCompleted) -> None: ...

class NoSubscriber: ...
"""


@pytest.fixture
def beeper(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> Plugins:
    (plugins.folder / "beeper_plugin.py").write_text(PLUGIN)
    monkeypatch.delitem(sys.modules, "beeper_plugin", raising=False)
    return plugins


def test_another_package_offers_a_type_by_an_entry_point(beeper: Plugins) -> None:
    beeper.offer("beepers", beep="beeper_plugin:Beeper")
    assert "beep" in type_names()
    assert "beeper_plugin" not in sys.modules  # before it is asked for
    (built,) = et.load_subscribers(write(beeper.folder, table(type="beep", times=3, timeout_s=1.5)))
    assert type(built).__module__ == "beeper_plugin"
    assert (built.times, built.timeout_s) == (3, 1.5)
    assert subscriber_type("beep") is type(built)


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("beeper_plugin:Beper", ["AttributeError", "Beper"]),
        ("beeper_plugn:Beeper", ["ModuleNotFoundError", "beeper_plugn"]),
        ("beeper_plugin:NoSubscriber", ["is not a subclass of eventtrain.Subscriber"]),
        ("beeper_plugin", ["is not a subclass of eventtrain.Subscriber"]),
    ],
)
def test_an_entry_point_that_leads_nowhere_names_its_distribution(
    beeper: Plugins, refusal: Callable[..., str], target: str, parts: list[str]
) -> None:
    beeper.offer("beepers", beep=target)
    told = refusal(table(type="beep"))
    assert 'run.toml, [[subscribers]] #1, type = "beep": ' in told
    assert f"beepers 1.2 ({target})" in told
    assert [part for part in parts if part not in told] == []


def test_a_name_that_is_offered_twice_is_refused_when_it_is_used(
    beeper: Plugins, refusal: Callable[..., str]
) -> None:
    beeper.offer("beepers", beep="beeper_plugin:Beeper", early_stopping="beeper_plugin:Beeper")
    beeper.offer("buzzers", beep="beeper_plugin:Beeper")
    told = refusal(table(type="beep"))
    assert "'beep' is offered more than once" in told
    assert "beepers 1.2 (beeper_plugin:Beeper)" in told
    assert "buzzers 1.2 (beeper_plugin:Beeper)" in told
    assert "eventtrain itself and beepers 1.2" in refusal(table(type="early_stopping"))
    assert len(et.load_subscribers(write(beeper.folder, table(type="progress_bar")))) == 1


def test_what_a_constructor_raises_is_told_with_file_and_table(
    beeper: Plugins, refusal: Callable[..., str]
) -> None:
    beeper.offer("beepers", beep="beeper_plugin:Beeper")
    told = refusal(table(type="beep", times=10))
    assert told == 'run.toml, [[subscribers]] #1, type = "beep": RuntimeError: 10 beeps wake the neighbours'


# --- secrets --------------------------------------------------------------------------------------------------

TOKEN = "".join(["s3", "cr", "3t"])
URL = f"https://hooks.example/{TOKEN}"


@pytest.mark.parametrize(
    ("text", "overrides", "name"),
    [
        (tomlish(type="alerts", rules=[RULE], ulr=URL), (), "run.toml"),
        (tomlish(type="alerts", rules=[RULE], url=[URL]), (), "run.toml"),
        (tomlish(type="alerts", rules=[RULE], url={"to": URL}), (), "run.toml"),
        (tomlish(type="alerts", rules=[RULE], url=URL[8:]), (), "run.toml"),
        (tomlish(type="alerts", rules=[], url=URL), (), "run.toml"),
        (tomlish(type="alerts", url=URL), (), "run.toml"),
        (tomlish(type="alerts", rules=URL), (), "run.toml"),
        (tomlish(type="alerts", rules=[RULE], timeout_s=URL), (), "run.toml"),
        (tomlish(type="alerts", rules=[RULE], retries=[URL]), (), "run.toml"),
        (tomlish(type="alerts", rules=[{**RULE, "event": URL}]), (), "run.toml"),
        (tomlish(type="alerts", rules=[{**RULE, "type": URL}]), (), "run.toml"),
        (tomlish(type="alerts", rules=[RULE], targets=[{"url": URL, "ke": TOKEN}]), (), "run.toml"),
        (tomlish(type="alerts", rules=[RULE], targets=[{"url": URL[8:], "key": TOKEN}]), (), "run.toml"),
        (tomlish(type="alerts", rules=[RULE], targets=[{"url": URL, "key": [TOKEN]}]), (), "run.toml"),
        (tomlish(type="alrts", rules=[RULE], url=URL), (), "run.toml"),
        (tomlish(rules=[RULE], url=URL), (), "run.toml"),
        (tomlish(type="alerts", rules=[RULE]), (f"alerts.ulr={URL}",), "run.toml"),
        (tomlish(type="alerts", rules=[RULE]), (f'alerts.url=["{URL}"]',), "run.toml"),
        (tomlish(type="alerts", rules=[RULE]), (f"alrts.url={URL}",), "run.toml"),
        (tomlish(type="alerts", rules=[RULE]), (f"url={URL}",), "run.toml"),
        (f'[[subscribers]]\ntype = "alerts"\nurl = "{URL}\n', (), "run.toml"),
        (f'[[subscribers]]\ntype = "alerts"\nurl = {URL}\n', (), "run.toml"),
        (f"url: '{URL}\n", (), "run.yaml"),
        (f"subscribers:\n  - type: alerts: {URL}\n", (), "run.yaml"),
        (f"subscribers:\n  - type: alerts\n    url: *{TOKEN}\n", (), "run.yaml"),
        (f"subscribers:\n  - type: alerts\n    url: !{TOKEN} x\n", (), "run.yaml"),
    ],
)
def test_no_message_repr_or_traceback_shows_a_secret(
    tmp_path: Path, text: str, overrides: tuple[str, ...], name: str
) -> None:
    path = write(tmp_path, text, name)
    with pytest.raises(et.ConfigurationError) as caught:
        et.load_subscribers(path, overrides=overrides)
    shown = "".join(traceback.format_exception(caught.value))
    assert TOKEN not in shown + repr(caught.value)


def test_a_secret_reaches_the_subscriber_and_nothing_that_is_shown(tmp_path: Path, capsys: Any) -> None:
    more = [{"label": "more", "url": f"{URL}/2", "key": TOKEN}]
    path = write(tmp_path, tomlish(type="alerts", rules=[RULE], url=URL, targets=more))
    (alerts,) = et.load_subscribers(path)
    assert TOKEN not in repr(vars(alerts))
    targets = alerts._delivery_options.targets  # type: ignore[attr-defined]
    assert [transport._url.get_secret_value() for _, transport in targets] == [f"{URL}/2", URL]


# --- schema ---------------------------------------------------------------------------------------------------


def test_the_schema_of_a_file_accepts_what_is_right_and_refuses_what_is_wrong() -> None:
    schema = run_json_schema()
    rules = [
        {"metric": "loss", "above": 1, "event": "step_completed"},
        {"type": "spike", "metric": "loss"},
        {"type": "deadline", "at": "2030-01-31T08:00:00Z"},
    ]
    right = {
        "fit": {"epochs": 3},
        "subscribers": [
            {"type": "early_stopping", "patience": 3, "lag": {"epoch_completed": 1}},
            {"type": "alerts", "rules": rules, "url": "https://host"},
            {"type": "checkpointer", "directory": "x", "max_to_keep": "none"},
        ],
    }
    jsonschema.validate(right, schema)
    for wrong in (
        {"fit": {"epoch": 3}},
        {"subscribers": [{"type": "early_stoping"}]},
        {"subscribers": [{"type": "early_stopping", "patince": 3}]},
        {"subscribers": [{"type": "alerts", "rules": [{**RULE, "event": "run_failed"}]}]},
        {"subscribers": [{"type": "alerts", "rules": [{"type": "spik", "metric": "loss"}]}]},
        {"subscribers": [{"type": "alerts", "rules": [{"metric": "loss", "window": 3}]}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_a_broken_package_does_not_break_the_schema(plugins: Plugins) -> None:
    plugins.offer("broken", beep="nowhere:Beeper")
    text = json.dumps(run_json_schema())
    assert '"early_stopping"' in text
    assert '"beep"' not in text


# --- documentation --------------------------------------------------------------------------------------------


def test_the_files_in_the_documentation_load(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "configuration.md").read_text()
    texts = re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    files = [text for text in texts if "[[subscribers]]" in text]
    assert len(files) >= 1
    for text in [*files, (root / "examples" / "run.toml").read_text()]:
        assert load_run(write(tmp_path, text)).subscribers
