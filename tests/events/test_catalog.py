from __future__ import annotations

import contextlib
import copy
import json
import pickle
import re
import tracemalloc
import types
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal, Union, get_args, get_origin

import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import eventtrain as et
from eventtrain.events import BUILT_IN, LOOP_EVENTS, TRAINING_SEQUENCE, commands
from eventtrain.events.models import FrozenDict, copies, snake_case

FLOATS = st.floats() | st.sampled_from([float("nan"), float("inf"), float("-inf"), -0.0])
NUMBERS = st.booleans() | st.integers(-(2**63), 2**64 - 1) | FLOATS
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
    if name == "command":
        return COMMANDS
    if name in ("step", "epoch"):
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


def events_of(kind: type[et.Event]) -> st.SearchStrategy[et.Event]:
    fields = {
        name: columns()
        if (kind, name) == (et.StepsCompleted, "metrics")
        else values_of(name, info.annotation)
        for name, info in kind.model_fields.items()
        if name not in ("kind", "schema_version")
    }
    return st.fixed_dictionaries(fields).map(lambda values: kind(**values))


def exactly(value: Any) -> Any:
    """A form in which 1, 1.0 and True differ, and NaN equals NaN."""
    if isinstance(value, dict):
        return {key: exactly(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return (value.dtype.name, value.tobytes() if value.dtype.kind != "f" else repr(value.tolist()))
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


def deep() -> Deep:
    return Deep(
        anything={"a": [1, {"b": {2}}]},
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
        lambda event: event.anything["a"][1]["b"].add(1),
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
@pytest.mark.parametrize("make", [deep, lambda: Deep(anything={"a": [1, {"b": {2}}]}, pair=([1], {"c": 1}))])
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
    event = Deep(exact=given, anything={"a": [given, (given,)]}, pair=(given,))
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
