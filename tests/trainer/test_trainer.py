"""fit, fit_async, evaluate and predict as a user calls them."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from tests.support.models import batches, eval_fn, examples, in_step, make_trainer, new_state, record, step_fn


def reference(data: list[Any], epochs: int) -> Any:
    state = new_state()
    jitted = jax.jit(step_fn)
    for _ in range(epochs):
        for batch in data:
            state, _ = jitted(state, batch)
    return state


def test_fit_reaches_the_state_of_the_bare_jitted_loop_bit_for_bit(tmp_path):
    data = batches(5)
    result = make_trainer(tmp_path).fit(data, epochs=3)
    assert result.step == 15
    assert result.epochs_completed == 3
    assert result.stop_reason == "completed"
    np.testing.assert_array_equal(result.state["params"]["w"], reference(data, 3)["params"]["w"])


def test_the_events_of_a_run_come_in_the_order_of_the_design(tmp_path):
    trainer = make_trainer(tmp_path)
    seen = record(trainer)
    trainer.fit(batches(2), epochs=2, eval_data=batches(1))
    kinds = [event.kind for event in seen if event.kind != "steps_completed"]
    epoch = ["epoch_started", *["step_started", "step_completed"] * 2]
    epoch += ["eval_started", "eval_step_completed", "eval_completed", "epoch_completed"]
    assert kinds == ["run_started", *epoch, *epoch, "run_completed"]
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
    assert {event.run_id for event in seen} == {trainer.run_id}
    assert [e.step for e in seen if e.kind == "step_completed"] == [1, 2, 3, 4]
    assert [(e.step, e.epoch, e.batch) for e in seen if e.kind == "step_started"] == [
        (0, 0, 0),
        (1, 0, 1),
        (2, 1, 0),
        (3, 1, 1),
    ]


def test_epoch_metrics_are_float64_means_with_the_evaluation_under_val(tmp_path):
    trainer = make_trainer(tmp_path)
    steps = record(trainer, et.StepCompleted)
    result = trainer.fit(batches(4), epochs=1, eval_data=batches(2))
    (epoch,) = result.history
    losses = [event.metrics["loss"] for event in steps]
    assert epoch.metrics["loss"] == pytest.approx(np.mean(np.float64(losses)), rel=1e-15)
    assert epoch.steps == 4
    assert epoch.duration_s > 0
    expected = np.mean([float(eval_fn(result.state, batch)["loss"]) for batch in batches(2)])
    assert epoch.metrics["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert set(epoch.metrics) == {"loss", "rate", "examples", "val_loss", "val_examples"}
    assert epoch.hyperparams == {"learning_rate": 0.5}


def test_weight_weights_the_means_by_the_named_metric(tmp_path):
    arrays = examples(10)
    uneven = [{k: v[:8] for k, v in arrays.items()}, {k: v[8:] for k, v in arrays.items()}]
    trainer = make_trainer(tmp_path, weight="examples")
    steps = record(trainer, et.StepCompleted)
    result = trainer.fit(uneven, epochs=1, eval_data=uneven)
    first, second = (event.metrics["loss"] for event in steps)
    assert result.history[0].metrics["loss"] == pytest.approx((8 * first + 2 * second) / 10)
    assert result.history[0].metrics["examples"] == 10
    whole = float(eval_fn(result.state, arrays)["loss"])
    assert result.history[0].metrics["val_loss"] == pytest.approx(whole, rel=1e-5)


def test_integer_and_bool_metrics_keep_their_exact_value(tmp_path):
    def counting(state: Any, batch: Any) -> Any:
        return {"n": state["n"] + 1}, {"big": jnp.int32(2**31 - 1), "flag": state["n"] > 0, "n": state["n"]}

    trainer = et.Trainer(counting, {"n": jnp.int32(0)}, run_dir=tmp_path)
    seen = record(trainer, et.StepCompleted)
    trainer.fit([jnp.zeros(())] * 2, epochs=1)
    assert [event.metrics for event in seen] == [
        {"big": 2**31 - 1, "flag": False, "n": 0},
        {"big": 2**31 - 1, "flag": True, "n": 1},
    ]
    assert [type(seen[0].metrics[name]) for name in ("big", "flag", "n")] == [int, bool, int]


def test_steps_counts_the_steps_of_this_call_over_as_many_epochs_as_needed(tmp_path):
    trainer = make_trainer(tmp_path)
    assert trainer.fit(batches(3), steps=7).step == 7
    assert trainer.epoch == 3
    assert trainer.fit(batches(3), steps=2).step == 9


def test_fit_again_goes_on_from_the_state_reached(tmp_path):
    data = batches(4)
    trainer = make_trainer(tmp_path)
    trainer.fit(data, epochs=1)
    between = trainer.state
    kept = np.array(between["params"]["w"])
    result = trainer.fit(data, epochs=1)
    np.testing.assert_array_equal(result.state["params"]["w"], reference(data, 2)["params"]["w"])
    np.testing.assert_array_equal(between["params"]["w"], kept)  # it stayed valid for its owner
    assert [epoch.epoch for epoch in result.history] == [1]


def test_the_state_given_stays_valid_for_its_owner(tmp_path):
    state = new_state()
    et.Trainer(step_fn, state, run_dir=tmp_path).fit(batches(3), epochs=2)
    np.testing.assert_array_equal(state["params"]["w"], np.zeros(3))


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_steps_per_call_changes_neither_result_nor_events(tmp_path, steps_per_call):
    trainer = make_trainer(tmp_path, steps_per_call=steps_per_call)
    seen = record(trainer, et.StepCompleted)
    result = trainer.fit(et.ArrayLoader(examples(28), 4, seed=3), epochs=3)
    plain = make_trainer(tmp_path / "plain").fit(et.ArrayLoader(examples(28), 4, seed=3), epochs=3)
    np.testing.assert_array_equal(result.state["params"]["w"], plain.state["params"]["w"])
    assert [event.step for event in seen] == list(range(1, 22))
    found, expected = ([epoch.metrics for epoch in run.history] for run in (result, plain))
    if jax.default_backend() == "cpu":
        assert found == expected
    else:  # XLA may fuse a metric otherwise inside a loop
        for mine, its in zip(found, expected, strict=True):
            assert mine == pytest.approx(its, rel=1e-5)


@pytest.mark.parametrize("count", [8, 7])
def test_a_call_on_stacked_batches_is_a_call_on_a_tuple_of_them(tmp_path, count):
    host = [jax.tree.map(np.asarray, batch) for batch in batches(count)]
    results = [
        make_trainer(tmp_path / str(number), steps_per_call=4).fit(data, epochs=2)
        for number, data in enumerate((host, batches(count), lambda epoch: iter(host)))
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result.state["params"]["w"], results[0].state["params"]["w"])
        assert [e.metrics for e in result.history] == [e.metrics for e in results[0].history]
    assert [result.step for result in results] == [2 * count] * 3


def test_numpy_batches_from_a_callable_are_prefetched_and_give_the_same_result(tmp_path):
    loader = et.ArrayLoader(examples(), 8, seed=1)
    on_host = make_trainer(tmp_path).fit(loader, epochs=2)
    on_device = make_trainer(tmp_path).fit(
        lambda epoch: [jax.tree.map(jnp.asarray, batch) for batch in loader(epoch)], epochs=2
    )
    np.testing.assert_array_equal(on_host.state["params"]["w"], on_device.state["params"]["w"])


def test_evaluate_and_predict_read_the_state_and_publish(tmp_path):
    trainer = make_trainer(tmp_path)
    seen = record(trainer)
    data = batches(3)
    metrics = trainer.evaluate(data)
    assert metrics["loss"] == pytest.approx(np.mean([float(eval_fn(trainer.state, b)["loss"]) for b in data]))
    outputs = trainer.predict(data)
    assert isinstance(outputs, np.ndarray)
    assert outputs.shape == (12,)
    kinds = [event.kind for event in seen]
    assert kinds == [
        "eval_started",
        *["eval_step_completed"] * 3,
        "eval_completed",
        "predict_started",
        *["predict_step_completed"] * 3,
        "predict_completed",
    ]


async def test_fit_async_trains_beside_the_event_loop(tmp_path, anyio_backend):
    trainer = make_trainer(tmp_path)
    threads = set()

    def data(epoch: int) -> Any:
        threads.add(threading.get_ident())
        return batches(5)

    seen = record(trainer, et.StepCompleted)
    result = await trainer.fit_async(data, epochs=2)
    assert result.step == 10
    assert [event.step for event in seen] == list(range(1, 11))
    assert threading.get_ident() not in threads
    metrics = await trainer.evaluate_async(batches(1))
    assert set(metrics) == {"loss", "examples"}
    assert (await trainer.predict_async(batches(2))).shape == (8,)


async def test_a_bus_shared_with_a_service_is_used_and_never_closed(tmp_path, anyio_backend):
    async with et.EventBus() as bus:
        trainer = make_trainer(tmp_path, bus=bus)
        async with bus.stream(et.RunCompleted) as events:
            await trainer.fit_async(batches(2), epochs=1)
            async for event in events:
                assert event.run_id == trainer.run_id
                break
        await trainer.fit_async(batches(2), epochs=1)
        bus.publish(et.AlertRaised(name="still open"))
        assert await bus.drain(5) == {}


async def test_cancelling_fit_async_stops_at_a_boundary_and_delivers_everything(tmp_path, anyio_backend):
    trainer = make_trainer(tmp_path)
    seen = record(trainer)

    async def stop_soon(scope: anyio.CancelScope) -> None:
        await trainer.bus.wait_for(et.StepCompleted, timeout_s=20)
        scope.cancel()

    def endless(epoch: int) -> Any:
        while True:
            yield from batches(4)

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stop_soon, scope)
            await trainer.fit_async(endless, epochs=1)
    assert scope.cancelled_caught
    steps = [event.step for event in seen if event.kind == "step_completed"]
    assert steps == list(range(1, trainer.step + 1))
    assert seen[-1].kind == "run_completed"
    assert seen[-1].reason == "cancelled"
    assert np.isfinite(np.asarray(trainer.state["params"]["w"])).all()
    assert not [t for t in threading.enumerate() if t.name.startswith("eventtrain")]


def test_trainer_epoch_follows_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    seen: list[int] = []

    @trainer.on(et.EpochCompleted, lag=0)
    async def look(event: et.EpochCompleted) -> None:
        seen.append(trainer.epoch)

    trainer.fit(batches(2), epochs=3)
    assert seen == [1, 2, 3]
    assert trainer.epoch == 3


def test_a_snapshot_outlives_its_run_and_can_be_restored_in_the_next(tmp_path):
    trainer = make_trainer(tmp_path)

    @trainer.on(et.EpochCompleted, lag=0)
    async def keep(event: et.EpochCompleted, control: et.Control) -> None:
        control.snapshot("first") if event.epoch == 0 else control.restore("first")

    first = trainer.fit(batches(3), epochs=1)
    weights = np.array(first.state["params"]["w"])
    second = trainer.fit(batches(3), epochs=1)
    np.testing.assert_array_equal(second.state["params"]["w"], weights)
    assert trainer.control.snapshots["first"].step == 3


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"epochs": 1, "steps": 1}, "exactly one"),
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"steps": -3}, "steps must be an integer >= 1, got -3"),
        ({"epochs": 1.5}, "epochs must be an integer >= 1, got 1.5"),
    ],
)
def test_fit_refuses_an_aim_that_is_none(tmp_path, arguments, message):
    with pytest.raises(et.ConfigurationError, match=message):
        make_trainer(tmp_path).fit(batches(1), **arguments)


def test_one_array_is_no_data(tmp_path):
    with pytest.raises(et.DataError, match="ArrayLoader"):
        make_trainer(tmp_path).fit(np.ones((8, 3)), epochs=1)


def test_a_decorator_without_its_event_type_is_refused_at_once(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(et.ConfigurationError, match="event class"):

        @trainer.on  # type: ignore[arg-type]
        async def report(event: et.Event) -> None: ...


async def test_a_second_run_on_the_same_bus_is_refused(tmp_path):
    async with et.EventBus() as bus:
        first, second = make_trainer(tmp_path, bus=bus), make_trainer(tmp_path, bus=bus)
        errors: list[Exception] = []

        @first.on(et.StepCompleted, where=lambda event: event.step == 2)
        async def start_another(event: et.StepCompleted) -> None:
            try:
                await second.fit_async(batches(1), epochs=1)
            except et.AlreadyRunning as error:
                errors.append(error)
            first.control.stop()

        def endless(epoch: int) -> Any:
            while True:
                yield from batches(4)

        await first.fit_async(endless, epochs=1)
        assert len(errors) == 1
        await second.fit_async(batches(1), epochs=1)


@pytest.mark.parametrize("data", [[], lambda epoch: [], iter(())])
def test_empty_data_is_refused_by_name_and_the_run_says_so(tmp_path, data):
    trainer = make_trainer(tmp_path)
    seen = record(trainer, et.RunFailed)
    with pytest.raises(et.DataError, match="empty"):
        trainer.fit(data, epochs=1)
    assert "DataError" in seen[0].error
    trainer.fit(batches(1), epochs=1)  # the trainer is whole


def test_a_generator_that_ends_before_the_aim_is_refused_by_name(tmp_path):
    with pytest.raises(et.DataError, match="epoch 1"):
        make_trainer(tmp_path).fit((b for b in batches(2)), epochs=2)


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (lambda s, b: (s, {"loss": jnp.zeros(3)}), et.MetricsError, "loss"),
        (lambda s, b: (s, {"loss": "low"}), et.MetricsError, "loss"),
        (lambda s, b: (s, [1.0]), et.MetricsError, "dict"),
        (lambda s, b: s, et.StepError, "metrics"),
        (lambda s, b: ({"other": s}, {}), et.StateError, "structure"),
        (
            lambda s, b: (jax.tree.map(lambda a: jnp.concatenate([a, a]) if a.ndim else a, s), {}),
            et.StateError,
            "shape",
        ),
        (
            lambda s, b: (jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.ndim else a, s), {}),
            et.StateError,
            "float32",
        ),
        (lambda s, b: 1 / 0, et.StepError, "ZeroDivisionError"),
    ],
)
def test_a_step_function_that_breaks_its_contract_is_named(tmp_path, broken, error, message):
    trainer = et.Trainer(broken, new_state(), run_dir=tmp_path)
    seen = record(trainer)
    with pytest.raises(error, match=message):
        trainer.fit(batches(2), epochs=1)
    assert [event.kind for event in seen] == ["run_started", "run_failed"]
    np.testing.assert_array_equal(trainer.state["params"]["w"], np.zeros(3))


async def async_function(*args: Any) -> Any:
    return args


def generator_function(*args: Any) -> Any:
    yield args


@pytest.mark.parametrize("function", [async_function, generator_function])
@pytest.mark.parametrize("name", ["step_fn", "eval_fn", "predict_fn", "params"])
def test_a_function_that_is_async_or_a_generator_is_refused_or_named_where_it_is_hidden(
    tmp_path, name, function
):
    functions = {"step_fn": step_fn}
    with pytest.raises(et.ConfigurationError, match=f"{name} must be a plain function"):
        et.Trainer(**{**functions, name: function}, state=new_state(), run_dir=tmp_path)
    hidden = {**functions, name: lambda *args: function(*args)}
    data = batches(2)

    def use() -> None:
        trainer = et.Trainer(**hidden, state=new_state(), run_dir=tmp_path, step_extensions=[et.EMA(0.9)])
        if name == "predict_fn":
            trainer.predict(data)
        trainer.fit(data, epochs=1, eval_data=data if name == "eval_fn" else None)

    with pytest.raises(et.ConfigurationError, match=f"{name} returned a .*, and its result is used at once"):
        use()


def test_data_that_is_an_async_function_is_named(tmp_path):
    trainer = et.Trainer(step_fn, new_state(), run_dir=tmp_path)
    with pytest.raises(
        et.ConfigurationError, match=r"data\(epoch=0\) returned a coroutine of async_function"
    ):
        trainer.fit(async_function, epochs=1)


def test_metrics_that_change_their_names_between_batch_shapes_are_refused(tmp_path):
    def changing(state: Any, batch: Any) -> Any:
        return state, {"a": jnp.zeros(())} if batch["x"].shape[0] == 4 else {"b": jnp.zeros(())}

    trainer = et.Trainer(changing, new_state(), run_dir=tmp_path)
    steps = record(trainer, et.StepCompleted)
    with pytest.raises(et.MetricsError, match="b"):
        trainer.fit([*batches(2), *batches(1, size=2)], epochs=1)
    assert [event.step for event in steps] == [1, 2]  # what came before is whole


def test_nan_metrics_are_legal_and_survive_json(tmp_path):
    trainer = et.Trainer(
        lambda s, b: (s, {"loss": jnp.nan * s["params"]["w"][0]}), new_state(), run_dir=tmp_path
    )
    steps = record(trainer, et.StepCompleted)
    result = trainer.fit(batches(2), epochs=1)
    assert np.isnan(steps[0].metrics["loss"])
    assert np.isnan(result.history[0].metrics["loss"])
    assert et.parse_event(steps[0].model_dump_json()) == steps[0]


def test_an_exception_of_the_data_passes_unchanged_and_what_came_before_is_delivered(tmp_path):
    def failing(epoch: int) -> Any:
        yield from batches(3)
        raise OSError("the disk is gone")

    trainer = make_trainer(tmp_path)
    seen = record(trainer)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.fit(failing, epochs=1)
    assert [e.step for e in seen if e.kind == "step_completed"] == [1, 2, 3]
    assert seen[-1].kind == "run_failed"
    assert trainer.step == 3


def test_the_state_cannot_be_read_while_a_run_owns_it_and_a_second_run_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    found: list[BaseException] = []

    def data(epoch: int) -> Any:
        for index, batch in enumerate(in_step(trainer, batches(3))):
            if index == 2:
                for call in (lambda: trainer.state, lambda: trainer.fit(batches(1), epochs=1)):
                    try:
                        call()
                    except et.EventTrainError as error:
                        found.append(error)
            yield batch

    trainer.fit(data, epochs=1)
    assert [type(error) for error in found] == [et.StateInUse, et.AlreadyRunning]
    assert "snapshot" in str(found[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps_per_call": 0}, "steps_per_call"),
        ({"max_in_flight_steps": 0}, "max_in_flight_steps"),
        ({"flush_interval_s": 0}, "flush_interval_s"),
        ({"snapshot": "maybe"}, "snapshot"),
        ({"eval_fn": 3}, "eval_fn"),
        ({"subscribers": [object()]}, "Subscriber"),
    ],
)
def test_a_trainer_refuses_options_that_cannot_work(tmp_path, options, message):
    with pytest.raises(et.ConfigurationError, match=message):
        make_trainer(tmp_path, **options)


class Started(et.Subscriber):
    """Notes its name when it starts."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name = name
        self.order = order

    async def start(self, run: et.RunContext) -> None:
        self.order.append(self.name or "")

    async def on_epoch_completed(self, event: et.EpochCompleted) -> None:
        self.order.append(f"{self.name} {event.epoch}")


def test_subscribers_added_afterwards_start_behind_those_that_are_there(tmp_path):
    order: list[str] = []
    trainer = make_trainer(tmp_path, subscribers=[Started("first", order)])
    subscription = trainer.subscribe(Started("second", order))
    assert subscription.active
    assert [subscriber.name for subscriber in trainer.subscribers] == ["first", "second"]
    trainer.fit(batches(1), epochs=1)
    assert order[:2] == ["first", "second"]
    assert set(order[2:]) == {"first 0", "second 0"}


def test_one_subscriber_cannot_be_given_twice(tmp_path):
    only = Started("only", [])
    with pytest.raises(et.ConfigurationError, match="This Started is subscribed already"):
        make_trainer(tmp_path, subscribers=[only, only])
    trainer = make_trainer(tmp_path, subscribers=[only])
    with pytest.raises(et.ConfigurationError, match="would get every event twice"):
        trainer.subscribe(only)
    assert trainer.subscribers == (only,)


def test_a_subscriber_cannot_be_added_while_a_run_is_in_progress(tmp_path):
    trainer = make_trainer(tmp_path)
    late = Started("late", [])
    with (
        trainer.session(),
        pytest.raises(et.AlreadyRunning, match=r"Cannot subscribe Started while session is in progress"),
    ):
        trainer.subscribe(late)
    assert trainer.subscribers == ()
    trainer.subscribe(late)


def test_a_weight_that_is_no_metric_is_refused_by_name(tmp_path):
    with pytest.raises(et.MetricsError, match="exmples"):
        make_trainer(tmp_path, weight="exmples").fit(batches(3), epochs=1)


def test_eval_data_without_eval_fn_is_refused(tmp_path):
    with pytest.raises(et.ConfigurationError, match="eval_fn"):
        make_trainer(tmp_path, eval_fn=None).fit(batches(1), epochs=1, eval_data=batches(1))


@pytest.mark.allow_blocking  # the traceback of the failure is logged
def test_a_subscriber_that_may_fail_the_run_ends_it_with_its_error(tmp_path):
    trainer = make_trainer(tmp_path)
    seen = record(trainer, et.RunFailed)

    @trainer.on(et.StepCompleted, on_error="fail")
    async def strict(event: et.StepCompleted) -> None:
        raise ValueError("never again")

    def endless(epoch: int) -> Any:
        while True:
            yield from batches(4)

    with pytest.raises(et.SubscriberError, match="never again"):
        trainer.fit(endless, epochs=1)
    assert "never again" in seen[0].error
    assert trainer.step > 0
    trainer.state  # noqa: B018  # it is there
