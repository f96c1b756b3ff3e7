"""What a run averages and restores as the weights, for states of common shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eventtrain as et
from eventtrain import subscribers as subs

OPTIMISER = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
DATA = [jnp.full(3, 1.0)]
BEST, EPOCHS = 2, 8


@dataclass
class Case:
    """A state with a step whose loss is best after step 2, and how to read the state."""

    step: Callable[[Any, Any], Any]
    state: Any
    weights: Callable[[Any], Any]
    opt_state: Callable[[Any], Any]
    path: str | None = None  # of the learning rate to be cut


def updated(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any]:
    grads = jax.grad(lambda p: jnp.mean((p["w"] - batch) ** 2))(params)
    updates, opt_state = OPTIMISER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def losses(count: jax.Array) -> dict[str, jax.Array]:
    return {"loss": jnp.abs(count - BEST)}


def new(value: float = 0.0) -> dict[str, jax.Array]:
    return {"w": jnp.full(3, value)}


def in_a_tuple() -> Case:
    def step(state: Any, batch: Any) -> Any:
        return (*updated(state[0], state[1], batch), state[2] + 1), losses(state[2] + 1)

    return Case(step, (new(), OPTIMISER.init(new()), jnp.int32(0)), lambda s: s[0], lambda s: s[1])


def of_a_gan() -> Case:
    def step(state: Any, batch: Any) -> Any:
        generator, gen_opt = updated(state["gen_params"], state["gen_opt"], batch)
        discriminator, disc_opt = updated(state["disc_params"], state["disc_opt"], -batch)
        count = state["step"] + 1
        return {
            "gen_params": generator,
            "gen_opt": gen_opt,
            "disc_params": discriminator,
            "disc_opt": disc_opt,
            "step": count,
        }, losses(count)

    state = {
        "gen_params": new(),
        "disc_params": new(0.5),
        "gen_opt": OPTIMISER.init(new()),
        "disc_opt": OPTIMISER.init(new()),
        "step": jnp.int32(0),
    }
    return Case(
        step,
        state,
        lambda s: (s["gen_params"], s["disc_params"]),
        lambda s: (s["gen_opt"], s["disc_opt"]),
        "gen_opt",
    )


def of_nnx() -> Case:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    graph, state = nnx.split((model, nnx.Optimizer(model, OPTIMISER, wrt=nnx.Param)))

    def step(state: Any, batch: Any) -> Any:
        model, optimiser = nnx.merge(graph, state)
        grads = nnx.grad(lambda model: jnp.mean((model(batch) - 1.0) ** 2))(model)
        optimiser.update(model, grads)
        return nnx.state((model, optimiser)), losses(optimiser.step[...].astype(jnp.int32))

    return Case(step, state, lambda s: s[0], lambda s: s[1]["opt_state"])


CASES = [in_a_tuple, of_a_gan, of_nnx]


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))


def trajectory(case: Case, steps: int) -> list[Any]:
    """The weights after step 0, 1, ..., without subscribers."""
    state, jitted = case.state, jax.jit(case.step)
    found = [case.weights(state)]
    for _ in range(steps):
        state, _ = jitted(state, DATA[0])
        found.append(case.weights(state))
    return found


@pytest.mark.parametrize("make", CASES)
def test_restoring_the_best_weights_leaves_the_optimiser_and_its_reduced_rate_alone(
    tmp_path: Path, make: Callable[[], Case]
) -> None:
    case = make()
    trainer = et.Trainer(
        case.step,
        case.state,
        subscribers=[
            subs.ReduceLROnPlateau("loss", factor=0.5, patience=2, path=case.path),
            subs.EarlyStopping("loss", patience=5, restore_best_weights=True),
        ],
        run_dir=tmp_path / "run",
    )
    reduced: list[et.HyperparamChanged] = []
    restored: list[Any] = []

    @trainer.on(et.HyperparamChanged)
    async def note(event: et.HyperparamChanged) -> None:
        reduced.append(event)

    @trainer.on(et.RunCompleted)
    async def end(event: et.RunCompleted) -> None:
        restored.append(event.step)

    result = trainer.fit(DATA, epochs=EPOCHS, progress=False)
    assert same(case.weights(result.state), trajectory(case, BEST)[BEST])
    assert len(reduced) >= 2
    assert reduced[-1].new == pytest.approx(0.1 * 0.5 ** len(reduced))
    rates = [value for path, value in trainer.control.hyperparams.items() if "learning_rate" in path]
    assert min(rates) == pytest.approx(reduced[-1].new)
    counts = [leaf for leaf in leaves(case.opt_state(result.state)) if leaf.dtype == np.int32]
    assert {int(count) for count in counts} == {result.step} == set(restored)


@pytest.mark.parametrize("make", CASES)
def test_an_average_is_of_the_weights_and_not_of_the_moments(
    tmp_path: Path, make: Callable[[], Case]
) -> None:
    case = make()
    trainer = et.Trainer(
        case.step, case.state, step_extensions=[et.EMA(0.5, use_for=["final"])], run_dir=tmp_path / "run"
    )
    result = trainer.fit(DATA, epochs=4, progress=False)
    first, *others = (leaves(weights) for weights in trajectory(case, 4))
    for raw in others:
        first = [0.5 * old + 0.5 * fresh for old, fresh in zip(first, raw, strict=True)]
    for average, expected in zip(leaves(case.weights(result.state)), first, strict=True):
        np.testing.assert_allclose(average, expected, rtol=1e-5)
    assert same(case.opt_state(result.state), case.opt_state(trainer.state))
    averaged = jax.tree.leaves(trainer.extension_states()["ema"])
    assert len(averaged) == len(leaves(case.weights(case.state)))


@pytest.mark.parametrize("make", CASES)
def test_saved_weights_fill_a_whole_state(tmp_path: Path, make: Callable[[], Case]) -> None:
    case = make()
    trainer = et.Trainer(
        case.step,
        case.state,
        subscribers=[subs.Checkpointer("ck", save_weights_only=True)],
        run_dir=tmp_path / "run",
    )
    trainer.fit(DATA, epochs=3, progress=False)
    filled = et.load_state(tmp_path / "run/ck/step-00000003", like=case.state)
    assert same(case.weights(filled), case.weights(trainer.state))
    assert same(case.opt_state(filled), case.opt_state(case.state))


# --- a state that does not tell its weights -------------------------------------------------------------------


def untold(tmp_path: Path, **options: Any) -> et.Trainer[Any]:
    """A trainer whose state has two trees beside the optimiser's."""
    state = (new(), new(2.0), OPTIMISER.init(new()))

    def step(state: Any, batch: Any) -> Any:
        params, opt_state = updated(state[0], state[2], batch)
        return (params, state[1], opt_state), {"loss": params["w"].mean()}

    return et.Trainer(step, state, run_dir=tmp_path / "run", **options)


NEEDS = {
    "EarlyStopping(restore_best_weights=True)": lambda: subs.EarlyStopping("loss", restore_best_weights=True),
    "Checkpointer(save_weights_only=True)": lambda: subs.Checkpointer("ck", save_weights_only=True),
    "TensorBoardLogger(histogram_every=...)": lambda: subs.TensorBoardLogger(histogram_every=1),
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_needs_unknown_weights_is_refused_before_the_first_step(tmp_path: Path, name: str) -> None:
    trainer = untold(tmp_path, subscribers=[NEEDS[name]()])
    with pytest.raises(et.ConfigurationError) as caught:
        trainer.fit(DATA, epochs=2, progress=False)
    for text in (
        name,
        "beside an optimiser state it has state[0] (tree); state[1] (tree)",
        "params=lambda state",
    ):
        assert text in str(caught.value)
    assert trainer.step == 0
    told = untold(tmp_path / "told", subscribers=[NEEDS[name]()], params=lambda state: state[0])
    assert told.fit(DATA, epochs=2, progress=False).step == 2


@pytest.mark.parametrize("extension", [et.EMA(0.9), et.SWA(1)], ids=repr)
def test_an_average_of_unknown_weights_is_refused(tmp_path: Path, extension: Any) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        untold(tmp_path, step_extensions=[extension])
    for text in (repr(extension), "state[1] (tree)", "params=lambda state"):
        assert text in str(caught.value)
    untold(tmp_path, step_extensions=[extension], params=lambda state: state[0])


def test_restoring_unknown_weights_is_rejected_and_a_whole_state_is_not(tmp_path: Path) -> None:
    trainer = untold(tmp_path)
    answers: list[Any] = []

    @trainer.on(et.EpochCompleted, lag=0)
    async def back(event: et.EpochCompleted, control: et.Control) -> None:
        if event.epoch == 0:
            control.snapshot("first")
        else:
            control.restore("first", part="params")
            control.restore("first")

    @trainer.on(et.CommandRejected | et.CheckpointRestored)
    async def note(event: Any) -> None:
        answers.append(event)

    trainer.fit(DATA, epochs=2, progress=False)
    rejected, restored = answers
    assert 'restore(part="params") requires the weights' in rejected.reason
    assert "state[0] (tree)" in rejected.reason
    assert restored.part == "all"


# --- statistics of normalisation ------------------------------------------------------------------------------


def with_statistics(tmp_path: Path, **options: Any) -> et.Trainer[Any]:
    """A trainer whose batch statistics are the number of completed steps."""
    state = {
        "params": new(),
        "batch_stats": {"mean": jnp.float32(0)},
        "opt_state": OPTIMISER.init(new()),
        "step": jnp.int32(0),
    }

    def step(state: Any, batch: Any) -> Any:
        params, opt_state = updated(state["params"], state["opt_state"], batch)
        statistics = {"mean": state["batch_stats"]["mean"] + 1}
        count = state["step"] + 1
        return {"params": params, "batch_stats": statistics, "opt_state": opt_state, "step": count}, losses(
            count
        )

    return et.Trainer(step, state, run_dir=tmp_path / "run", **options)


def both(state: Any) -> Any:
    return {"params": state["params"], "batch_stats": state["batch_stats"]}


@pytest.mark.parametrize(("params", "expected"), [(None, 4.0), (both, 2.0)], ids=["newest", "of-the-best"])
def test_best_weights_come_with_the_statistics_that_the_lens_selects(
    tmp_path: Path, params: Any, expected: float
) -> None:
    policy = subs.EarlyStopping("loss", patience=2, restore_best_weights=True)
    trainer = with_statistics(tmp_path, params=params, subscribers=[policy])
    result = trainer.fit(DATA, epochs=EPOCHS, progress=False)
    assert result.step == 4
    assert float(result.state["batch_stats"]["mean"]) == expected
    best = with_statistics(tmp_path / "best").fit(DATA, epochs=BEST, progress=False)
    assert same(result.state["params"], best.state["params"])


def test_an_nnx_filter_selects_params_and_statistics(tmp_path: Path) -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    state = nnx.state((model, nnx.Optimizer(model, OPTIMISER, wrt=nnx.Param)))

    def step(state: Any, batch: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf + 1, state), {}

    trainer = et.Trainer(
        step,
        state,
        params=lambda state: nnx.filter_state(state[0], (nnx.Param, nnx.BatchStat)),
        step_extensions=[et.EMA(0.5, use_for=["final"])],
        run_dir=tmp_path / "run",
    )
    result = trainer.fit(DATA, epochs=1, progress=False)
    for averaged, newest in zip(leaves(result.state[0]), leaves(trainer.state[0]), strict=True):
        np.testing.assert_allclose(averaged, newest - 0.5)
    assert same(result.state[1], trainer.state[1])


@pytest.mark.parametrize(("params", "expected"), [(None, 2.0), (both, 1.25)], ids=["newest", "averaged"])
def test_an_average_has_the_statistics_that_the_lens_selects(
    tmp_path: Path, params: Any, expected: float
) -> None:
    trainer = with_statistics(tmp_path, params=params, step_extensions=[et.EMA(0.5, use_for=["final"])])
    result = trainer.fit(DATA, epochs=2, progress=False)
    assert float(result.state["batch_stats"]["mean"]) == expected


def test_saved_weights_include_the_statistics_that_the_lens_selects(tmp_path: Path) -> None:
    checkpointer = subs.Checkpointer("ck", save_weights_only=True)
    trainer = with_statistics(tmp_path, params=both, subscribers=[checkpointer])
    trainer.fit(DATA, epochs=3, progress=False)
    path = tmp_path / "run/ck/step-00000003"
    assert same(et.load_state(path, like=both(trainer.state)), both(trainer.state))
    filled = et.load_state(path, like=with_statistics(tmp_path / "fresh").state)
    assert float(filled["batch_stats"]["mean"]) == 3.0
    assert int(filled["step"]) == 0
