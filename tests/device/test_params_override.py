"""Where averaged weights stand in for the params, and that training never sees them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import anyio
import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eventtrain as et
from eventtrain.device.extensions import Use
from eventtrain.device.model import ParamsOverride
from tests.conftest import RunOnDevices
from tests.support.jax_compilations import COMPILATIONS
from tests.support.models import (
    OPTIMISER,
    batches,
    eval_fn,
    loss_fn,
    make_trainer,
    new_state,
    record,
    step_fn,
)

DATA, VALIDATION = batches(6), batches(2)
USES: tuple[Use, ...] = get_args(Use)
SUBSETS = [set(uses) for count in range(4) for uses in combinations(USES, count)]


def trajectory(data: list[Any], epochs: int) -> list[Any]:
    """The weights after step 0, 1, ..., of the bare jitted loop."""
    state, jitted = new_state(), jax.jit(step_fn)
    found = [np.asarray(state["params"]["w"])]
    for _ in range(epochs):
        for batch in data:
            state, _ = jitted(state, batch)
            found.append(np.asarray(state["params"]["w"]))
    return found


def exponential(weights: Iterable[Any], decay: float) -> np.ndarray:
    """The average after the last of ``weights``, in float64."""
    first, *others = (np.asarray(w, np.float64) for w in weights)
    for new in others:
        first = decay * first + (1 - decay) * new
    return first


def val_loss(weights: Any) -> float:
    state = {"params": {"w": jnp.asarray(weights, jnp.float32)}}
    return float(np.mean([float(eval_fn(state, batch)["loss"]) for batch in VALIDATION]))


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# --- where the average is used ------------------------------------------------------------------------------


@pytest.mark.parametrize("uses", SUBSETS, ids=lambda uses: "+".join(sorted(uses)) or "nothing")
def test_the_average_is_used_where_use_for_says_and_nowhere_else(tmp_path: Path, uses: set[Use]) -> None:
    raw = trajectory(DATA, 3)
    average = {epoch: exponential(raw[: 6 * epoch + 1], 0.8) for epoch in (1, 2, 3)}

    def expected(use: Use, epoch: int = 3) -> np.ndarray:
        return average[epoch] if use in uses else raw[6 * epoch]

    trainer = make_trainer(tmp_path, step_extensions=[et.EMA(0.8, use_for=uses)])
    result = trainer.fit(DATA, epochs=3, eval_data=VALIDATION, progress=False)
    for epoch, completed in enumerate(result.history, 1):
        assert completed.metrics["val_loss"] == pytest.approx(val_loss(expected("eval", epoch)), rel=1e-6)
    np.testing.assert_array_equal(trainer.state["params"]["w"], raw[-1])
    np.testing.assert_allclose(result.state["params"]["w"], expected("final"), rtol=1e-6)
    assert trainer.evaluate(VALIDATION)["loss"] == pytest.approx(val_loss(expected("eval")), rel=1e-6)
    outputs = trainer.predict(VALIDATION)
    inputs = np.concatenate([np.asarray(batch["x"]) for batch in VALIDATION])
    np.testing.assert_allclose(outputs, inputs @ expected("predict"), rtol=1e-5)
    np.testing.assert_array_equal(trainer.state["params"]["w"], raw[-1])


def test_evaluations_that_a_subscriber_asks_for_use_the_average(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, step_extensions=[et.EMA(0.8, use_for=["eval"])])
    seen = record(trainer, et.EvalCompleted)

    @trainer.on(et.StepCompleted, every=2, lag=0)
    async def ask(event: et.StepCompleted, control: et.Control) -> None:
        control.evaluate()

    with trainer.session(eval_data=VALIDATION) as session:
        for batch in DATA:
            session.step(batch)
    raw = trajectory(DATA, 1)
    assert [event.step for event in seen] == [2, 4, 6]
    for event in seen:
        expected = val_loss(exponential(raw[: event.step + 1], 0.8))
        assert event.metrics["loss"] == pytest.approx(expected, rel=1e-6)


def test_each_use_may_have_an_average_of_its_own(
    tmp_path: Path, anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    extensions = [et.EMA(0.8, use_for=["eval"]), et.SWA(3, 2, use_for=["final", "predict"])]
    backend, backend_options = anyio_backend
    trainer = make_trainer(
        tmp_path, step_extensions=extensions, backend=backend, backend_options=backend_options
    )
    result = trainer.fit(DATA, epochs=2, eval_data=VALIDATION, progress=False)
    raw = trajectory(DATA, 2)
    assert result.history[-1].metrics["val_loss"] == pytest.approx(val_loss(exponential(raw, 0.8)), rel=1e-6)
    np.testing.assert_allclose(result.state["params"]["w"], np.mean(raw[3::2], 0), rtol=1e-6)


def test_before_the_first_run_the_params_stand_for_themselves(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, step_extensions=[et.EMA(0.8, use_for=USES)])
    assert trainer.evaluate(VALIDATION)["loss"] == pytest.approx(val_loss(np.zeros(3)), rel=1e-6)
    assert not trainer.predict(VALIDATION).any()
    with trainer.session():
        pass
    assert not trainer.predict(VALIDATION).any()


def test_before_its_first_sample_a_uniform_average_is_the_params(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, step_extensions=[et.SWA(100, use_for=["final"])])
    result = trainer.fit(DATA, epochs=1, progress=False)
    assert bits(result.state) == bits(trainer.state)


# --- nothing is swapped ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"donate": False}, {"steps_per_call": 4}, {"snapshot": "copy"}], ids=str
)
def test_looking_at_the_average_changes_nothing_in_training(tmp_path: Path, options: dict[str, Any]) -> None:
    """In Keras the averaged weights stay in the model after predict."""

    def broken(state: Any, batch: Any) -> Any:
        raise ValueError("no outputs")

    def trainer(**more: Any) -> et.Trainer:
        return make_trainer(tmp_path, step_extensions=[et.EMA(0.8, use_for=USES)], **options, **more)

    plain, watched, failing = trainer(), trainer(), trainer(predict_fn=broken)
    results = []
    for _ in range(3):
        plain.fit(DATA, epochs=1, progress=False)
        results.append(watched.fit(DATA, epochs=1, eval_data=VALIDATION, progress=False))
        failing.fit(DATA, epochs=1, progress=False)
        before = bits((watched.state, watched.extension_states()))
        first = watched.predict(VALIDATION)
        watched.evaluate(VALIDATION)
        np.testing.assert_array_equal(watched.predict(VALIDATION), first)
        assert bits((watched.state, watched.extension_states())) == before
        with pytest.raises(et.StepError, match="no outputs"):
            failing.predict(VALIDATION)
    expected = bits((plain.state, plain.extension_states()))
    assert bits((watched.state, watched.extension_states())) == expected
    assert bits((failing.state, failing.extension_states())) == expected
    raw = trajectory(DATA, 3)  # and the results are still alive, after two more runs have donated their state
    for epoch, result in enumerate(results, 1):
        found = result.state["params"]["w"]
        np.testing.assert_allclose(found, exponential(raw[: 6 * epoch + 1], 0.8), rtol=1e-6)


@pytest.mark.parametrize("snapshot", ["keep", "copy", "host"])
@pytest.mark.parametrize("part", ["all", "params"])
def test_a_restore_of_all_puts_the_average_back_and_one_of_the_params_leaves_it(
    tmp_path: Path, snapshot: str, part: str
) -> None:
    extensions = [et.EMA(0.8, use_for=["eval"]), et.SWA(2, 4)]
    trainer = make_trainer(tmp_path, step_extensions=extensions, snapshot=snapshot)
    seen = record(trainer, et.EvalCompleted)

    @trainer.on(et.StepCompleted, lag=0)
    async def decide(event: et.StepCompleted, control: et.Control) -> None:
        if event.step == 4:
            control.snapshot("four")
        if event.step == 7:
            control.restore("four", part=part)
            control.evaluate()

    with trainer.session(eval_data=VALIDATION) as session:
        for batch in [*DATA, *DATA][:9]:
            session.step(batch)
    raw = trajectory([*DATA, *DATA][:7], 1)
    averaged = raw[:5] if part == "all" else raw
    assert seen[0].metrics["loss"] == pytest.approx(val_loss(exponential(averaged, 0.8)), rel=1e-6)
    # Steps 2 and 6 of the trainer's life count, and the restore of all takes 6 away: it does not come again.
    assert trainer.extension_states()["swa"]["count"] == (1 if part == "all" else 2)


# --- any state ----------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class FlaxState:
    params: Any
    opt_state: Any


class Regression(eqx.Module):
    w: jax.Array
    activation: Any


def flax_step(state: Any, batch: Any) -> Any:
    new, metrics = step_fn({"params": state.params, "opt_state": state.opt_state}, batch)
    return state.replace(**new), metrics


def in_a_model(step: bool, state: Any, batch: Any) -> Any:
    """A state of an Equinox module and its optimiser's state, beside a number that belongs to neither."""
    if not step:
        return eval_fn({"params": {"w": state["model"].w}}, batch)
    plain = {"params": {"w": state["model"].w}, "opt_state": state["opt_state"]}
    new, metrics = step_fn(plain, batch)
    model = eqx.tree_at(lambda m: m.w, state["model"], new["params"]["w"])
    return {"model": model, "opt_state": new["opt_state"], "seen": state["seen"] + 1}, metrics


def flax_case() -> Any:
    state = FlaxState(**new_state())
    return flax_step, state, lambda s, b: eval_fn({"params": s.params}, b), None, lambda s: s.params["w"]


def equinox_case() -> Any:
    model = Regression(jnp.zeros(3), jnp.tanh)
    state = {"model": model, "opt_state": OPTIMISER.init({"w": model.w}), "seen": jnp.int32(0)}
    lens = lambda state: eqx.filter(state["model"], eqx.is_inexact_array)  # noqa: E731
    return partial(in_a_model, True), state, partial(in_a_model, False), lens, lambda s: s["model"].w


def bfloat16_case() -> Any:
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.shape == (3,) else leaf, new_state())

    def step(state: Any, batch: Any) -> Any:
        grads = jax.grad(loss_fn)(state["params"], batch)
        params = jax.tree.map(lambda p, g: (p - 0.5 * g).astype(p.dtype), state["params"], grads)
        return state | {"params": params}, {"loss": jnp.float32(0)}

    return step, state, eval_fn, None, lambda s: s["params"]["w"]


@pytest.mark.parametrize("case", [flax_case, equinox_case, bfloat16_case])
def test_any_state_and_lens_will_do_and_keeps_its_dtypes(tmp_path: Path, case: Any) -> None:
    step, state, evaluate, lens, weights = case()
    trainer = et.Trainer(
        step, state, evaluate, params=lens, run_dir=tmp_path, step_extensions=[et.EMA(0.8, use_for=USES)]
    )
    raw = [weights(state)]
    found = state
    for batch in DATA:
        found, _ = eqx.filter_jit(step)(found, batch)
        raw.append(weights(found))
    result = trainer.fit(DATA, epochs=1, eval_data=VALIDATION, progress=False)
    average = exponential(raw, 0.8)
    narrow = raw[0].dtype == jnp.bfloat16
    assert [leaf.dtype for leaf in jax.tree.leaves(eqx.filter(result.state, eqx.is_array))] == [
        leaf.dtype for leaf in jax.tree.leaves(eqx.filter(trainer.state, eqx.is_array))
    ]
    assert jax.tree.structure(result.state) == jax.tree.structure(state)
    tolerance = 1e-2 if narrow else 1e-6
    np.testing.assert_allclose(np.float64(weights(result.state)), average, rtol=tolerance)
    np.testing.assert_array_equal(weights(trainer.state), raw[-1])
    assert result.history[0].metrics["val_loss"] == pytest.approx(val_loss(average), rel=tolerance)


def test_sharded_weights_are_averaged_and_used_where_they_lie(run_on_devices: RunOnDevices) -> None:
    def sharded() -> None:
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec

        import eventtrain as et

        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((4,), ("rows",), axis_types=(kind,))
            rows = NamedSharding(mesh, PartitionSpec("rows"))
            w = jax.device_put(jnp.zeros((8, 2)), rows)
            uses = ["eval", "predict", "final"]
            for extension, expected in ((et.EMA(0.5, use_for=uses), 2.125), (et.SWA(2, use_for=uses), 2.5)):
                trainer = et.Trainer(
                    lambda state, batch: (state | {"params": state["params"] + batch}, {"n": state["n"]}),
                    {"params": w, "n": jnp.int32(3)},
                    lambda state, batch: {"mean": jnp.mean(state["params"])},
                    lambda state, batch: state["params"] * batch,
                    step_extensions=[extension],
                )
                ones = [np.float32(1)] * 3
                result = trainer.fit(ones, epochs=1, eval_data=ones[:1], progress=False)
                assert result.state["params"].sharding == rows, result.state["params"].sharding
                assert len(result.state["params"].addressable_shards) == 4
                assert result.history[0].metrics["val_mean"] == expected
                assert (result.state["params"] == expected).all()
                assert (trainer.predict(ones[:1]) == expected).all()
                assert (trainer.state["params"] == 3).all()
                for leaf in jax.tree.leaves(trainer.extension_states()):
                    assert leaf.ndim == 0 or leaf.sharding.is_equivalent_to(rows, 2), leaf.sharding

    run_on_devices(4, sharded)


# --- what it costs --------------------------------------------------------------------------------------------------


def test_a_run_pays_one_dispatch_an_evaluation_and_one_compilation_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    inner = ParamsOverride.__call__

    def counted(self: ParamsOverride, *args: Any) -> Any:
        calls.append(threading.current_thread().name)
        return inner(self, *args)

    monkeypatch.setattr(ParamsOverride, "__call__", counted)
    trainer = make_trainer(tmp_path, step_extensions=[et.EMA(0.8, use_for=["eval", "predict"])])
    trainer.fit(DATA, epochs=2, progress=False)
    assert calls == []
    trainer.fit(DATA, epochs=1, eval_data=VALIDATION, progress=False)
    assert calls == [threading.current_thread().name]
    COMPILATIONS.start()
    trainer.fit(DATA, epochs=3, eval_data=VALIDATION, progress=False)
    trainer.evaluate(VALIDATION)
    assert len(calls) == 5
    assert COMPILATIONS.since() == 0


class Traced(et.EMA):
    """Notes the thread that traces it; the first time is in the constructor of the trainer."""

    def __init__(self) -> None:
        super().__init__(0.8, use_for=["eval", "final"])
        self.threads: list[str] = []

    def weights(self, ext_state: Any, params: Any) -> Any:
        self.threads.append(threading.current_thread().name)
        return super().weights(ext_state, params)


async def test_it_is_traced_on_the_thread_of_the_caller_and_lives_through_a_cancellation(
    tmp_path: Path,
) -> None:
    extension = Traced()
    trainer = make_trainer(tmp_path, step_extensions=[extension])
    result = await trainer.fit_async(DATA, epochs=1, eval_data=VALIDATION)
    assert set(extension.threads) == {threading.current_thread().name}
    raw = trajectory(DATA, 1)
    np.testing.assert_allclose(result.state["params"]["w"], exponential(raw, 0.8), rtol=1e-6)

    late = Traced()
    trainer = make_trainer(tmp_path, step_extensions=[late])
    with anyio.CancelScope() as scope:

        @trainer.on(et.StepCompleted, where=lambda event: event.step >= 3, once=True)
        async def enough(event: et.StepCompleted) -> None:
            scope.cancel()

        await trainer.fit_async(DATA, epochs=100_000)
    assert scope.cancelled_caught
    raw = trajectory(DATA, -(-trainer.step // 6))[: trainer.step + 1]
    np.testing.assert_array_equal(trainer.state["params"]["w"], raw[-1])
    assert await trainer.evaluate_async(VALIDATION) == {
        "loss": pytest.approx(val_loss(exponential(raw, 0.8)), rel=1e-5),
        "examples": 4.0,
    }


# --- what cannot work -----------------------------------------------------------------------------------------------


def test_two_averages_for_one_use_are_refused_when_the_trainer_is_built(tmp_path: Path) -> None:
    extensions = [et.EMA(0.9, name="fast", use_for=["eval"]), et.SWA(5, use_for=["final", "eval"])]
    with pytest.raises(et.ConfigurationError, match=r"EMA\(0\.9, name='fast'\).*SWA\(5.*'eval'"):
        make_trainer(tmp_path, step_extensions=extensions)


def test_a_lens_that_computes_is_refused_where_something_should_stand_in(tmp_path: Path) -> None:
    def lens(state: Any) -> Any:
        return {"doubled": 2 * state["params"]["w"]}

    make_trainer(tmp_path, params=lens, step_extensions=[et.EMA(0.9)])
    with pytest.raises(et.ConfigurationError, match=r"EMA.*params\['doubled'\].*leaves of the state"):
        make_trainer(tmp_path, params=lens, step_extensions=[et.EMA(0.9, use_for=["eval"])])


class Counter(et.StepExtension):
    """Counts steps; `weights` are what the test says."""

    def __init__(self, uses: Any, weights: Any = None) -> None:
        self.name = "counter"
        self.use_for = uses
        self.given = weights

    def init(self, params: Any) -> Any:
        return jnp.int32(0)

    def update(self, ext_state: Any, params: Any, step: Any) -> Any:
        return ext_state + 1

    def weights(self, ext_state: Any, params: Any) -> Any:
        return super().weights(ext_state, params) if self.given is None else self.given(params)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (lambda params: {"v": params["w"]}, "structure"),
        (lambda params: {"w": params["w"][:2]}, r"params\['w'\] is float32\[2\] instead of float32\[3\]"),
        (lambda params: {"w": "none"}, r"params\['w'\] is str instead of float32\[3\]"),
    ],
)
def test_weights_that_fit_nowhere_are_refused_when_the_trainer_is_built(
    tmp_path: Path, weights: Any, said: str
) -> None:
    with pytest.raises(et.StateError, match=f"(?s)Counter.*weights.*{said}"):
        make_trainer(tmp_path, step_extensions=[Counter({"final"}, weights)])


def test_an_unknown_use_of_an_extension_is_refused_when_the_trainer_is_built(tmp_path: Path) -> None:
    with pytest.raises(et.ConfigurationError, match=r"Counter.*use_for must be .*'eval', 'predict', 'final'"):
        make_trainer(tmp_path, step_extensions=[Counter({"evaluation"})])


def test_an_extension_of_ones_own_stands_in_with_the_params_unless_it_says_otherwise(tmp_path: Path) -> None:
    own = Counter(["final"])
    trainer = make_trainer(tmp_path, step_extensions=[own])
    result = trainer.fit(DATA, epochs=1, progress=False)
    assert bits(result.state) == bits(trainer.state)
    zeros = Counter(["final"], partial(jax.tree.map, jnp.zeros_like))
    trainer = make_trainer(tmp_path, step_extensions=[zeros])
    result = trainer.fit(DATA, epochs=1, progress=False)
    assert not result.state["params"]["w"].any()
    assert trainer.extension_states()["counter"] == 6


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.9999])
@pytest.mark.parametrize("steps_per_call", [1, 8])
def test_an_exponential_average_in_a_run_equals_a_float64_reference(
    tmp_path: Path, decay: float, steps_per_call: int
) -> None:
    """Within 1e-6 for each of 500 weights, none of which comes near zero on average."""
    weights = np.random.default_rng(1).normal(1.0, 0.1, (1500, 500)).astype(np.float32)
    trainer = et.Trainer(
        lambda state, batch: ({"params": batch}, {}),
        {"params": weights[0]},
        run_dir=tmp_path,
        steps_per_call=steps_per_call,
        step_extensions=[et.EMA(decay, use_for=["final"])],
    )
    result = trainer.fit(list(weights[1:]), epochs=1, progress=False)
    assert result.step == 1499
    np.testing.assert_allclose(result.state["params"], exponential(weights, decay), rtol=1e-6)


# --- updates that are not finite --------------------------------------------------------------------------------------


def test_a_skipped_update_is_counted_in_the_metrics_and_its_learning_rate_can_be_set(tmp_path: Path) -> None:
    optimiser = optax.apply_if_finite(optax.inject_hyperparams(optax.sgd)(0.5), max_consecutive_errors=3)

    def step(state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
        updates, opt_state = optimiser.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {"loss": loss, "w": params["w"][0], **et.nonfinite_metrics(opt_state)}
        metrics["rate"] = opt_state.inner_state.hyperparams["learning_rate"]
        return {"params": params, "opt_state": opt_state}, metrics

    params = new_state()["params"]
    trainer = et.Trainer(step, {"params": params, "opt_state": optimiser.init(params)}, run_dir=tmp_path)
    seen = record(trainer, et.StepCompleted)
    changes = record(trainer, et.HyperparamChanged)

    @trainer.on(et.StepCompleted, lag=0, where=lambda event: not event.metrics["last_finite"])
    async def halve(event: et.StepCompleted, control: et.Control) -> None:
        control.scale_hyperparam("learning_rate", 0.5)

    data = batches(6)
    for bad in (1, 2, 4):
        data[bad] = data[bad] | {"y": data[bad]["y"] * jnp.nan}
    trainer.fit(data, epochs=1, progress=False)
    assert [event.metrics["notfinite_count"] for event in seen] == [0, 1, 2, 0, 1, 0]
    assert [event.metrics["total_notfinite"] for event in seen] == [0, 1, 2, 2, 3, 3]
    assert [event.metrics["last_finite"] for event in seen] == [True, False, False, True, False, True]
    assert [event.metrics["rate"] for event in seen] == [0.5, 0.5, 0.25, 0.125, 0.125, 0.0625]
    assert [(event.old, event.new, event.step) for event in changes] == [
        (0.5, 0.25, 2),
        (0.25, 0.125, 3),
        (0.125, 0.0625, 5),
    ]
    w = [event.metrics["w"] for event in seen]
    assert w[0] == w[1] == w[2] != w[3] == w[4] != w[5]
    assert np.isfinite(w).all()
