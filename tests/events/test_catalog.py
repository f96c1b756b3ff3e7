from __future__ import annotations

import contextlib
import copy
import json
import math
import pickle
import re
import subprocess
import sys
import tracemalloc
import types
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin

import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator
from typing_extensions import TypedDict

import eventtrain as et
from eventtrain.events import BUILT_IN, LOOP_EVENTS, TRAINING_SEQUENCE, commands, parsing
from eventtrain.events.models import FrozenDict, copies, snake_case

FLOATS = st.floats() | st.sampled_from([float("nan"), float("inf"), float("-inf"), -0.0])
NUMBERS = st.booleans() | st.integers(-(2**63), 2**64 - 1) | FLOATS
ANY_EVENTS = TypeAdapter(list[et.AnyEvent])
NUMBER_DICTS = st.dictionaries(st.text(max_size=8), NUMBERS, max_size=4)


class Measured(et.Event):
    """An event as a user writes it."""

    lifecycle: ClassVar[bool] = True
    value: float
    exact: bool | int | float
    extras: dict[str, Any] = {}  # noqa: RUF012  Pydantic copies it


@st.composite
def columns(draw: st.DrawFn) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    for name in draw(st.lists(st.text(max_size=5), max_size=3, unique=True)):
        dtype = draw(st.sampled_from(["float32", "float64", "int64", "uint64", "int8", "bool"]))
        if dtype.startswith("float"):
            values = draw(st.lists(st.floats(width=int(dtype[5:])) | st.just(float("nan")), max_size=4))
        elif dtype == "bool":
            values = draw(st.lists(st.booleans(), max_size=4))
        else:
            limits = np.iinfo(dtype)
            values = draw(st.lists(st.integers(int(limits.min), int(limits.max)), max_size=4))
        made[name] = np.array(values, dtype)
    return made


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, np.ndarray]:
    shapes = [(-1,), (-1, 1), (1, -1, 1)]
    return {
        name: column.reshape(() if column.size == 1 else draw(st.sampled_from(shapes)))
        for name, column in draw(columns()).items()
    }


COMMANDS = st.sampled_from(
    [
        commands.SetHyperparam(name="learning_rate", value=3, due=4),
        commands.ScaleHyperparam(name="learning_rate", factor=0.1, maximum=2.0),
        commands.Stop(reason="enough", cause=commands.Cause(event="ping", step=1, subscriber="me")),
        commands.Restore(target=3),
    ]
)


def values_of(name: str, annotation: Any) -> st.SearchStrategy[Any]:
    """Values for a field, from its type."""
    if name in ("metrics", "hyperparams"):
        return NUMBER_DICTS
    if name == "arrays":
        return arrays()
    if name == "command":
        return COMMANDS
    if name in ("step", "epoch", "peer"):
        return st.integers(0, 2**40)
    if annotation is float:
        return FLOATS
    if annotation is int:
        return st.integers(-(2**63), 2**63)
    if annotation is bool:
        return st.booleans()
    if annotation is str:
        return st.text(max_size=12)
    if annotation is datetime:
        return st.datetimes(timezones=st.just(UTC))
    if annotation is type(None):
        return st.none()
    if annotation is commands.Cause:
        return st.builds(
            commands.Cause, event=st.text(max_size=5), step=st.integers(0, 99), subscriber=st.text(max_size=5)
        )
    origin = get_origin(annotation)
    if origin is Literal:
        return st.sampled_from(get_args(annotation))
    if origin is tuple:
        return st.lists(st.text(max_size=5), max_size=3).map(tuple)
    if origin in (Union, types.UnionType):
        if set(get_args(annotation)) >= {bool, int, float}:
            return NUMBERS | (st.none() if type(None) in get_args(annotation) else st.nothing())
        return st.one_of(*(values_of(name, part) for part in get_args(annotation)))
    raise AssertionError(f"no values for {name}: {annotation}")


SAMPLES = st.sampled_from(
    [
        ("text", "two\nlines \ud800"),
        ("image", b"\x89PNG\r\n\x1a\n\x00"),
        ("array", np.array([[1.5, np.nan], [-np.inf, 0]], np.float32)),
        ("array", np.zeros((2, 0, 3), np.uint8)),
        ("array", np.int64(2**62)),
        ("table", {"i": [1, True, None], "x": np.array([0.5, 1.0, np.inf]), "NaN": ["NaN", "b", ""]}),
    ]
)


def events_of(kind: type[et.Event]) -> st.SearchStrategy[et.Event]:
    fields = {
        name: columns()
        if (kind, name) == (et.StepsCompleted, "metrics")
        else values_of(name, info.annotation)
        for name, info in kind.model_fields.items()
        if name not in ("kind", "schema_version") and (kind, name) != (et.SampleTaken, "value")
    }
    made = st.fixed_dictionaries(fields)
    if kind is et.SampleTaken:
        made = st.builds(
            lambda values, sample: {**values, "media": sample[0], "value": sample[1]}, made, SAMPLES
        )
    return made.map(lambda values: kind(**values))


def exactly(value: Any) -> Any:
    """A form in which 1, 1.0 and True differ, and NaN equals NaN."""
    if isinstance(value, dict):
        return {key: exactly(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        numbers = value.tobytes() if value.dtype.kind != "f" else repr(value.tolist())
        return (value.dtype.name, value.shape, numbers)
    if isinstance(value, datetime):  # Pydantic reads a UTC of its own
        return value.astimezone(UTC)
    return (type(value).__name__, repr(value))


@pytest.mark.parametrize("kind", BUILT_IN, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_every_built_in_event_equals_what_its_json_parses_to(
    kind: type[et.Event], data: st.DataObject
) -> None:
    event = data.draw(events_of(kind))
    text = event.model_dump_json()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    for back in (et.parse_event(text), et.parse_event(json.loads(text)), et.parse_event(text.encode())):
        assert type(back) is kind
        assert back == event
        assert exactly(back.__dict__) == exactly(event.__dict__)


@given(value=FLOATS, exact=NUMBERS, step=st.integers(0))
def test_an_event_of_the_users_own_is_read_back_when_its_class_is_given(
    value: float, exact: Any, step: int
) -> None:
    event = Measured(value=value, exact=exact, step=step)
    back = et.parse_event(event.model_dump_json(), types=(Measured,))
    assert back == event
    assert isinstance(back, Measured)
    assert type(back.exact) is type(exact)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{no json", "the text is not JSON"),
        ("[1]", "with a 'kind'"),
        ("{}", "with a 'kind'"),
        ('{"kind": 3}', "with a 'kind'"),
        ('{"kind": "measured"}', r"kind 'measured': no known class.*types=\(YourEvent,\)"),
        (
            '{"kind": "run_started", "schema_version": 99}',
            "schema_version 99, and this program knows versions up to 1",
        ),
        ('{"kind": "run_completed"}', "Cannot parse this run_completed.*reason"),
        ('{"kind": "run_started", "more": 1}', "Cannot parse this run_started.*more"),
        ('{"kind": "step_completed", "step": -1, "epoch": 0, "batch": 0, "metrics": {}}', "step"),
        ({"kind": "run_failed", "error": 3}, "Cannot parse this run_failed"),
    ],
)
def test_what_is_no_known_event_is_refused_with_the_reason(source: Any, message: str) -> None:
    with pytest.raises(et.EventParseError, match=f"(?s){message}"):
        et.parse_event(source)


class Plain(et.Event):
    """Its kind is not a Literal, and it has validators of its own."""

    kind: str = "plain"
    values: list[float] = []  # noqa: RUF012
    seen: str = ""

    @model_validator(mode="before")
    @classmethod
    def note(cls, given: Any) -> Any:
        return {**given, "seen": type(given).__name__} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def check(self) -> Plain:
        assert isinstance(self.values, list)
        return self


def test_events_of_users_are_read_from_json_as_they_validate_themselves() -> None:
    back = et.parse_event(Plain(values=[1.0]).model_dump_json(), types=iter([Plain, Measured]))
    assert back == Plain(values=[1.0], seen="dict")
    assert isinstance(back, Plain)
    with pytest.raises(TypeError, match="read-only"):
        back.values.append(2.0)


def test_a_class_of_a_user_takes_the_place_of_the_one_with_its_kind() -> None:
    class RunStarted(et.Event):
        machine: str

    event = RunStarted(machine="a")
    assert et.parse_event(event.model_dump_json(), types=(RunStarted,)) == event
    assert type(et.parse_event(et.RunStarted().model_dump_json())) is et.RunStarted


@given(data=st.data())
def test_any_event_is_a_type_for_annotations_and_adapters(data: st.DataObject) -> None:
    events = [data.draw(events_of(data.draw(st.sampled_from(BUILT_IN)))) for _ in range(2)]
    text = f"[{','.join(event.model_dump_json() for event in events)}]"
    for back in (ANY_EVENTS.validate_json(text), ANY_EVENTS.validate_python(json.loads(text))):
        assert back == events
        assert [exactly(one.__dict__) for one in back] == [exactly(one.__dict__) for one in events]
    for one in ANY_EVENTS.validate_json(text):
        with contextlib.suppress(AttributeError), pytest.raises(TypeError, match="read-only"):
            one.metrics["more"] = 1  # pyright: ignore


def test_any_event_and_any_command_have_a_schema_and_fit_into_unions_of_users() -> None:
    schema = ANY_EVENTS.json_schema()
    assert set(schema["items"]["discriminator"]["mapping"]) == {
        snake_case(kind.__name__) for kind in BUILT_IN
    }
    assert all(set(one) == {"$ref"} for one in schema["items"]["oneOf"])
    mine = TypeAdapter(Annotated[Measured | et.RunStarted, Field(discriminator="kind")])
    assert type(mine.validate_json('{"kind": "run_started"}')) is et.RunStarted
    assert set(get_args(get_args(et.AnyEvent)[0])) == set(BUILT_IN)
    stop: Any = TypeAdapter(et.AnyCommand).validate_json('{"kind": "stop", "reason": "enough"}')
    assert stop == commands.Stop(reason="enough")
    with pytest.raises(ValidationError, match="kind"):
        ANY_EVENTS.validate_json('[{"kind": "nothing"}]')


def test_importing_eventtrain_builds_no_union_of_events() -> None:
    code = (
        "import eventtrain; from eventtrain.events import parsing; print(parsing.known.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_what_parse_event_reads_in_one_step_is_what_it_reads_by_steps() -> None:
    """Duplicate keys, numbers as text, a version as text: where the two could differ."""
    for text in (
        '{"kind": "run_started", "kind": "run_failed", "error": "x"}',
        '{"kind": "run_failed", "error": "x", "kind": "run_started"}',
        '{"kind": "run_started", "step": "3", "schema_version": "1"}',
        '{"kind": "run_started", "step": 3.0, "schema_version": true}',
        '{"kind": "step_completed", "epoch": 0, "batch": 0, "metrics": {"a": NaN, "b": "NaN"}}',
        ' {"kind": "run_started", "time": 5} ',
    ):
        outcomes: list[Any] = []
        for parse in (et.parse_event, parsing.parse_by_steps):
            try:
                outcomes.append(parse(text))
            except et.EventParseError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]


def test_kinds_are_class_names_in_snake_case_and_all_differ() -> None:
    assert {kind.model_fields["kind"].default for kind in BUILT_IN} == {
        snake_case(k.__name__) for k in BUILT_IN
    }
    assert len({kind.model_fields["kind"].default for kind in BUILT_IN}) == len(BUILT_IN)
    assert snake_case("LRChanged") == "lr_changed"
    assert Measured(value=1, exact=1).kind == "measured"


def test_every_event_class_of_the_package_is_listed_as_built_in() -> None:
    exported = {
        thing for thing in vars(et).values() if isinstance(thing, type) and issubclass(thing, et.Event)
    }
    assert exported - {et.Event} == set(BUILT_IN)
    assert set(LOOP_EVENTS) < set(TRAINING_SEQUENCE) < set(BUILT_IN)


def test_the_json_schema_names_every_event_and_describes_its_fields() -> None:
    schema = et.events_json_schema(types=(Measured,))
    assert set(schema["discriminator"]["mapping"]) == {snake_case(k.__name__) for k in (*BUILT_IN, Measured)}
    for reference in schema["discriminator"]["mapping"].values():
        definition = schema["$defs"][reference.removeprefix("#/$defs/")]
        assert definition["additionalProperties"] is False
        assert {"run_id", "seq", "time", "step", "kind"} <= set(definition["properties"])
    assert json.loads(json.dumps(schema)) == schema


def test_the_json_schema_accepts_what_events_are_written_as() -> None:
    schema = et.events_json_schema(types=(Measured,))
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for event in (
        Measured(value=1.5, exact=True),
        et.StepCompleted(step=1, epoch=0, batch=0, metrics={"loss": 0.5, "count": 3}),
        et.StepsCompleted(first_step=1, last_step=2, epoch=0, metrics={"loss": np.array([1.0, 2.0])}),
        et.CommandApplied(command=commands.Stop(reason="enough")),
    ):
        validator.validate(json.loads(event.model_dump_json()))
    assert not validator.is_valid({"kind": "run_completed"})


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (et.RunFailed, "error"),
        (et.SubscriberFailed, "error"),
        (et.AlertRaised, "message"),
        (commands.Stop, "reason"),
    ],
)
def test_half_a_surrogate_pair_in_the_text_of_an_error_costs_no_row(kind: Any, field: str) -> None:
    needed = {"subscriber": "s", "event_kind": "k"} if kind is et.SubscriberFailed else {}
    event = kind(
        **needed, **({"name": "n"} if kind is et.AlertRaised else {}), **{field: "no file caf\udce9"}
    )
    assert getattr(event, field) == "no file caf\\udce9"
    assert kind.model_validate_json(event.model_dump_json()) == event


def test_an_event_is_read_only_all_the_way_down() -> None:
    metrics = {"loss": 0.5}
    column = np.array([1.0, 2.0])
    event = et.StepCompleted(epoch=0, batch=0, metrics=metrics)
    window = et.StepsCompleted(first_step=1, last_step=2, epoch=0, metrics={"loss": column})
    metrics["loss"] = column[0] = 9.0
    assert event.metrics == {"loss": 0.5}
    assert window.metrics["loss"].tolist() == [1.0, 2.0]
    with pytest.raises(ValidationError, match="frozen"):
        event.step = 3  # pyright: ignore[reportAttributeAccessIssue]
    for change in (
        lambda: event.metrics.update(loss=1),
        lambda: event.metrics.__setitem__("loss", 1),
        lambda: event.metrics.pop("loss"),
        lambda: event.metrics.clear(),
        lambda: event.metrics.setdefault("new", 1),
        lambda: event.metrics.__ior__({"loss": 1}),
    ):
        with pytest.raises(TypeError, match="read-only"):
            change()
    with pytest.raises(ValueError, match="read-only"):
        window.metrics["loss"][0] = 1.0


def test_copies_of_events_are_equal_and_as_read_only() -> None:
    event = et.StepCompleted(epoch=0, batch=0, metrics={"loss": float("nan")})
    for other in (
        copy.copy(event),
        copy.deepcopy(event),
        pickle.loads(pickle.dumps(event)),
        event.model_copy(),
    ):
        assert other == event
        with pytest.raises(TypeError, match="read-only"):
            other.metrics["loss"] = 1


def test_unvalidated_copies_are_what_validation_would_have_made() -> None:
    first = et.StepCompleted(step=1, epoch=0, batch=0, metrics={"loss": 1.0})
    made = copies(
        first, ({"step": n, "batch": n - 1, "metrics": FrozenDict(loss=1.0 / n)} for n in range(1, 4))
    )
    validated = [
        et.StepCompleted(step=n, epoch=0, batch=n - 1, metrics={"loss": 1.0 / n}) for n in range(1, 4)
    ]
    assert made == validated
    for one, other in zip(made, validated, strict=True):
        assert one.model_dump_json(exclude_unset=True) == other.model_dump_json(exclude_unset=True)
        assert one.model_copy(update={"seq": 0}) == other
        assert pickle.loads(pickle.dumps(one)) == one
        with pytest.raises(ValidationError, match="frozen"):
            one.step = 9
    made[0].__dict__["seq"] = 5
    assert first.seq == made[1].seq == 0


@pytest.mark.parametrize("column", [np.zeros((2, 2)), np.array(["a"]), np.array([1j]), np.float32(1.0)])
def test_a_column_that_is_no_flat_array_of_numbers_is_refused(column: Any) -> None:
    with pytest.raises(ValidationError, match="one-dimensional array of numbers"):
        et.StepsCompleted(first_step=1, last_step=1, epoch=0, metrics={"loss": column})


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 12))
def test_a_window_is_due_when_a_multiple_lies_in_it(first: int, rows: int, every: int) -> None:
    last = first + rows - 1
    window = et.StepsCompleted(step=last, first_step=first, last_step=last, epoch=0, metrics={})
    assert window.is_multiple_of(every) == any(step % every == 0 for step in range(first, last + 1))


def test_no_every_leaves_out_that_a_state_was_put_back() -> None:
    assert et.CheckpointRestored(step=54, restored_step=32).is_multiple_of(32)


def window(**column: Any) -> str:
    fields = {"first_step": 1, "last_step": 1, "epoch": 0, "metrics": {"loss": column}}
    return json.dumps({"kind": "steps_completed", **fields})


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000 + "]" * 200_000,
        '{"kind":' * 100_000,
        '{"kind": "run_started", "step": ' + "9" * 10_000 + "}",
        '{"kind": "' + "x" * 10_000_000 + '"}',
        b"\xff\xfe",
        "\ud800",
        '{"kind": "run_started", "run_id": "\ud800"}',
        '{"kind": "run_started", "step": -1}',
        '{"kind": "run_started", "step": 1e400}',
        '{"kind": "run_started", "time": "99999-01-01"}',
        '{"kind": ["run_started"]}',
        "null",
        "",
        5,
        None,
        {"kind": "run_started", "x": object()},
        {1: 2},
        window(values=[1]),
        window(dtype="float32"),
        window(dtype="nope", values=[1]),
        window(dtype="O", values=[{}]),
        window(dtype="datetime64[s]", values=[1]),
        window(dtype="V1000000000", values=[1]),
        window(dtype="U300000000", values=["a"]),
        window(dtype="(1000,1000,1000)float32", values=[1]),
        window(dtype=5, values=[1]),
        window(dtype=["float32"], values=[1]),
        window(dtype="int8", values=[1000]),
        window(dtype="int8", values=[1.5]),
        window(dtype="int8", values=["1"]),
        window(dtype="int64", values=[10**40]),
        window(dtype="float32", values=["1_0"]),
        window(dtype="float32", values=[[1.0]]),
        window(dtype="float32", values="a"),
        window(dtype="float32", values={"a": 1}),
        window(dtype="float32", values=[1], shape=[10**9]),
        json.dumps({"kind": "steps_completed", "metrics": {"loss": ["a" * 1_000_000] + [""] * 100_000}}),
        json.dumps({"kind": "steps_completed", "metrics": {"loss": [10**400]}}),
        json.dumps({"kind": "step_completed", "metrics": {str(n): "x" for n in range(20_000)}}),
    ],
    ids=lambda text: re.sub(r" at 0x\w+", "", repr(text))[:60],
)
def test_hostile_text_is_an_error_by_name_and_allocates_nothing(text: Any) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(et.EventParseError) as raised:
            et.parse_event(text)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    assert len(str(raised.value)) < 10_000
    assert str(raised.value).count("\n") <= 20


@given(st.recursive(st.none() | NUMBERS | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_any_json_is_an_event_or_an_error_by_name(value: Any) -> None:
    fields = {"first_step": value, "epoch": 0, "metrics": {"loss": value}, "run_id": value, "command": value}
    for kind in BUILT_IN:
        for given_fields in (fields, {"metrics": value}, {"step": value}):
            with contextlib.suppress(et.EventParseError):
                et.parse_event({"kind": snake_case(kind.__name__), **given_fields})


@pytest.mark.parametrize("types", [(int,), 5, [None], et.Event, "Ping"])
def test_types_that_are_no_event_classes_are_refused(types: Any) -> None:
    if types is et.Event:
        assert et.parse_event(et.RunStarted().model_dump_json(), types=types).kind == "run_started"
        return
    with pytest.raises(et.ConfigurationError, match="types must be event classes"):
        et.parse_event("{}", types=types)
    with pytest.raises(et.ConfigurationError, match="types must be event classes"):
        et.events_json_schema(types)


class Deep(et.Event):
    """An event of a user with containers in its fields."""

    anything: Any = None
    numbers: list[int] = []  # noqa: RUF012
    names: set[str] = set()  # noqa: RUF012
    table: dict[str, list[float]] = {}  # noqa: RUF012
    exact: bool | int | float = 0
    column: et.Column = np.zeros(0)
    pair: tuple[Any, ...] = ()
    sets: dict[str, list[set[int]]] = {}  # noqa: RUF012


def deep() -> Deep:
    return Deep(
        anything={"a": [1, {"b": 2}]},
        sets={"a": [{2}]},
        numbers=[1, 2],
        names={"x"},
        table={"x": [1.0]},
        column=np.arange(3),
        pair=([1], {"c": 1}),
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda event: event.anything.update(a=1),
        lambda event: event.anything["a"].append(1),
        lambda event: event.anything["a"][1].clear(),
        lambda event: event.sets["a"][0].add(1),
        lambda event: event.numbers.sort(),
        lambda event: event.numbers.__setitem__(0, 5),
        lambda event: event.numbers.__delitem__(0),
        lambda event: event.numbers.__iadd__([1]),
        lambda event: event.names.discard("x"),
        lambda event: event.names.__ior__({"y"}),
        lambda event: event.table["x"].extend([1]),
        lambda event: event.pair[0].append(1),
        lambda event: event.pair[1].pop("c"),
    ],
)
@pytest.mark.parametrize(
    "make", [deep, lambda: Deep(anything={"a": [1, {"b": 2}]}, sets={"a": [{2}]}, pair=([1], {"c": 1}))]
)
def test_events_of_users_are_read_only_all_the_way_down(make: Any, change: Any) -> None:
    for event in (make(), copy.deepcopy(make()), pickle.loads(pickle.dumps(make())), make().model_copy()):
        before = event.model_dump_json()
        with pytest.raises((TypeError, KeyError), match=r"read-only|'x'"):
            change(event)
        assert event.model_dump_json() == before


def test_what_a_user_gave_stays_the_users_and_what_is_read_back_is_equal() -> None:
    numbers = [1, 2]
    event = Deep(numbers=numbers, table={"x": [1.0]}, column=np.arange(3), anything={"a": [1, [2.5, None]]})
    numbers.append(3)
    assert event.numbers == [1, 2]
    back = et.parse_event(event.model_dump_json(), types=(Deep,))
    assert back == event
    assert isinstance(back, Deep)
    assert isinstance(event.names, set)
    assert sorted([*event.numbers, 0]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("given", "python"),
    [
        (np.int64(2**53 + 1), 2**53 + 1),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.bool_(True), True),
        (np.float32(0.1), 0.10000000149011612),
        (np.float64(0.1), 0.1),
        (np.float16(0.5), 0.5),
    ],
)
def test_numpy_scalars_become_the_equal_python_ones(given: Any, python: Any) -> None:
    event = Deep(exact=given, anything={"a": [given, [given]]}, pair=(given,))
    assert (event.exact, type(event.exact)) == (python, type(python))
    assert type(event.pair[0]) is type(python)
    assert type(event.anything["a"][0]) is type(event.anything["a"][1][0]) is type(python)
    assert et.parse_event(Deep(exact=given).model_dump_json(), types=(Deep,)) == Deep(exact=given)
    metrics = et.StepCompleted(epoch=0, batch=0, metrics={"loss": given}).metrics
    assert (metrics["loss"], type(metrics["loss"])) == (python, type(python))


@pytest.mark.parametrize(
    "value", [np.zeros(3), np.zeros((2, 2)), np.array(3), np.array(["a"]), [np.zeros(3)], {"a": jnp.zeros(3)}]
)
def test_an_array_that_json_cannot_hold_is_refused_with_the_remedy(value: Any) -> None:
    with pytest.raises(ValidationError, match=r"array\.tolist\(\).*eventtrain\.Column"):
        Deep(anything=value)


@pytest.mark.parametrize("value", [np.longdouble(1), np.datetime64("2020-01-01"), np.complex64(1)])
def test_a_numpy_scalar_without_an_equal_python_one_is_refused(value: Any) -> None:
    with pytest.raises(ValidationError, match="an event cannot hold"):
        Deep(anything=value)


class Loose(et.Event):
    """An event with every kind of part whose type says nothing."""

    anything: Any = None
    optional: Any | None = None
    table: dict[int, Any] = {}  # noqa: RUF012
    rows: list[Any] = []  # noqa: RUF012
    pair: tuple[int, Any] = (0, None)
    bare: dict = {}  # noqa: RUF012  # pyright: ignore[reportMissingTypeArgument, reportUnknownVariableType]


LEAVES = (
    st.none() | NUMBERS | st.integers(-(2**14_010), 2**14_010) | st.text() | st.text(st.characters(), max_size=3)
    | st.binary(max_size=3) | st.datetimes() | st.dates() | st.timedeltas() | st.decimals() | st.uuids()
    | st.complex_numbers() | st.frozensets(st.integers(), max_size=2) | st.sampled_from([Path("a"), range(3), b"a"])
)  # fmt: skip
ANYTHING = st.recursive(
    LEAVES,
    lambda parts: (
        st.lists(parts, max_size=3)
        | st.lists(parts, max_size=2).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.booleans() | st.none(), parts, max_size=3)
    ),
    max_leaves=5,
)


@pytest.mark.parametrize(
    "field",
    [
        lambda v: {"anything": v},
        lambda v: {"optional": v},
        lambda v: {"table": {3: v}},
        lambda v: {"rows": [v]},
        lambda v: {"pair": (1, v)},
        lambda v: {"bare": v if isinstance(v, dict) else {"a": v}},
    ],
)
@given(value=ANYTHING)
@example(value=float("nan"))
@example(value=[{"a": float("-inf")}])
@example(value={1: 2})
@example(value="\ud800")
@example(value=[(1, 2)])
def test_what_a_part_of_type_any_takes_comes_back_from_json_and_the_rest_is_refused(
    field: Any, value: Any
) -> None:
    try:
        event = Loose(**field(value))
    except ValidationError as error:
        assert "a part of type Any cannot hold" in str(error)  # noqa: PT017
        assert "Declare the type" in str(error)  # noqa: PT017
        return
    back = et.parse_event(event.model_dump_json(), types=(Loose,))
    assert back == event
    assert exactly(back.model_dump()) == exactly(event.model_dump())


@pytest.mark.parametrize("depth", [100, 101, 100_000])
def test_a_part_of_type_any_is_read_back_however_deep_it_is_or_refused(depth: int) -> None:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    if depth > 100:
        with pytest.raises(ValidationError, match=r"nested more than 100 deep|contain themselves"):
            Loose(anything=value)
    else:
        event = Loose(anything=value)
        assert et.parse_event(event.model_dump_json(), types=(Loose,)) == event


def test_a_default_of_type_any_that_json_does_not_give_back_is_refused_too() -> None:
    class Careless(et.Event):
        worst: Any = float("inf")

    with pytest.raises(ValidationError, match="a part of type Any cannot hold inf"):
        Careless()


def test_a_list_that_contains_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ValidationError, match="contain themselves"):
        Loose(anything=value)


# --- models, dataclasses and typed dicts in events ----------------------------------------------------------------


class Point(BaseModel, frozen=True, ser_json_inf_nan="strings"):
    x: float = 0.0
    notes: dict[str, list[int]] = {}
    anything: Any = None


@dataclass(frozen=True)
class Pair:
    left: Any = None
    right: list[int] = field(default_factory=list)


class Row(TypedDict):
    value: Any


class Named(NamedTuple):
    numbers: list[int]


class Nested(et.Event):
    point: Point = Point()
    points: list[Point] = []  # noqa: RUF012
    pair: Pair | None = None
    row: Row | None = None
    named: Named | None = None


def nested() -> Nested:
    return Nested(
        point=Point(x=math.nan, notes={"a": [1]}, anything={"b": [1, None, "text"]}),
        points=[Point(x=math.inf), Point()],
        pair=Pair(left=[1], right=[2]),
        row={"value": [1, {"c": 2}]},
        named=Named([1, 2]),
    )


def test_models_dataclasses_and_typed_dicts_in_an_event_are_read_back_equal() -> None:
    event = nested()
    back = et.parse_event(event.model_dump_json(), types=(Nested,))
    assert back == event
    assert isinstance(back, Nested)
    assert back.points[0].x == math.inf
    assert nested() != Nested(point=Point(x=math.nan, notes={"a": [2]}, anything={"b": [1, None, "text"]}))


@pytest.mark.parametrize(
    "value",
    [
        {"point": Point(anything=(1, 2))},
        {"point": Point(anything=object())},
        {"point": {"anything": math.inf}},
        {"points": [Point(), Point(anything={1: 2})]},
        {"pair": Pair(left=(1,))},
        {"pair": Pair(left=b"\xff")},
        {"row": {"value": (1,)}},
    ],
)
def test_what_json_does_not_give_back_is_refused_in_models_dataclasses_and_typed_dicts_too(
    value: dict[str, Any],
) -> None:
    with pytest.raises(ValidationError, match="read back"):
        Nested(**value)


@pytest.mark.parametrize(
    "change",
    [
        lambda event: event.point.notes.update(a=[]),
        lambda event: event.point.notes["a"].append(1),
        lambda event: event.point.anything["b"].append(1),
        lambda event: setattr(event.point, "x", 1.0),
        lambda event: event.points.append(Point()),
        lambda event: event.pair.right.append(1),
        lambda event: event.pair.left.append(1),
        lambda event: setattr(event.pair, "left", 1),
        lambda event: event.row["value"].append(1),
        lambda event: event.named.numbers.append(1),
    ],
)
def test_models_dataclasses_and_tuples_in_an_event_are_read_only_all_the_way_down(change: Any) -> None:
    for event in (nested(), et.parse_event(nested().model_dump_json(), types=(Nested,))):
        before = event.model_dump_json()
        with pytest.raises(
            (TypeError, ValidationError, AttributeError), match=r"read-only|frozen|cannot assign"
        ):
            change(event)
        assert event.model_dump_json() == before


def test_what_can_be_changed_by_a_subscriber_is_refused_with_the_remedy() -> None:
    class Open(BaseModel):
        x: int = 0

    @dataclass
    class Changing:
        x: int = 0

    class Careless(et.Event):
        model: Open | None = None
        data: Changing | None = None
        queue: deque[int] | None = None
        raw: Any = None

    for value, remedy in (
        ({"model": Open()}, r"class Open\(BaseModel, frozen=True\)"),
        ({"model": {"x": 1}}, r"class Open\(BaseModel, frozen=True\)"),
        ({"data": Changing()}, r"@dataclass\(frozen=True\)"),
        ({"queue": deque([1])}, "use list"),
    ):
        with pytest.raises(ValidationError, match=remedy):
            Careless(**value)


def test_a_nan_that_a_model_writes_as_null_is_refused_with_the_remedy() -> None:
    class Measured(BaseModel, frozen=True):
        x: float

    class Holding(et.Event):
        measured: Measured

    Holding(measured=Measured(x=1.5))
    with pytest.raises(ValidationError, match='ser_json_inf_nan="strings"'):
        Holding(measured=Measured(x=math.nan))


def test_the_users_own_model_stays_as_it_is() -> None:
    point = Point(notes={"a": [1]})
    event = Nested(point=point)
    point.notes["a"].append(2)
    assert event.point.notes == {"a": [1]}


def test_events_of_eventtrain_are_not_written_to_json_when_they_are_made() -> None:
    assert [kind.__name__ for kind in BUILT_IN if kind._holds_objects] == []
    assert Nested._holds_objects


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"dtype": "float32", "values": [1.0]}, '"shape"'),
        ({"dtype": "float32", "shape": [2, 2], "values": [1.0]}, r"the shape \[2, 2\] cannot have 1 values"),
        ({"dtype": "float32", "shape": [-1], "values": [1.0]}, '"shape"'),
        ({"dtype": "object", "shape": [1], "values": [1.0]}, "the dtype of a column"),
        ({"dtype": "int8", "shape": [1], "values": [300]}, "out of range"),
    ],
)
def test_an_array_that_contradicts_itself_is_refused(form: Any, message: str) -> None:
    event = json.loads(et.EvalCompleted(epoch=0, metrics={}, steps=1, duration_s=1.0).model_dump_json())
    with pytest.raises(et.EventParseError, match=message):
        et.parse_event({**event, "arrays": {"a": form}})
