"""Mistakes that are easy to make are named, with the way out."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.models import batches, examples, make_trainer, new_state, record, step_fn

WHOLE = tuple(examples(8)[name] for name in ("x", "y"))


@pytest.mark.parametrize("whole", [WHOLE, tuple(map(jax.numpy.asarray, WHOLE))], ids=["numpy", "jax"])
def test_a_tuple_of_whole_arrays_is_no_list_of_batches(tmp_path, whole):
    trainer = make_trainer(tmp_path)
    shapes = r"2 arrays of the shapes \(8, 3\), \(8,\)"
    with pytest.raises(et.DataError, match=f"The data of epoch 0 is a tuple of {shapes}.*ArrayLoader"):
        trainer.fit(whole, epochs=1)
    with pytest.raises(et.DataError, match=f"The evaluation data is a tuple of {shapes}"):
        trainer.fit(batches(1), epochs=1, eval_data=whole)
    with pytest.raises(et.DataError, match=f"The evaluation data is a tuple of {shapes}"):
        trainer.evaluate(whole)
    with pytest.raises(et.DataError, match=f"The data to predict on is a tuple of {shapes}"):
        trainer.predict(whole)


def test_a_tuple_of_batches_that_differ_in_their_rows_is_data():
    state = {"w": jax.numpy.zeros(())}
    trainer = et.Trainer(lambda state, batch: (state, {"loss": batch.sum()}), state)
    assert trainer.fit((np.ones((2, 3)), np.ones((1, 3))), epochs=1).step == 2


def test_evaluation_data_that_is_used_up_is_called_so(tmp_path):
    trainer = make_trainer(tmp_path)
    used_up = iter(batches(1))
    with pytest.raises(et.DataError, match=r"The evaluation data is empty.*can be iterated only once"):
        trainer.fit(batches(1), epochs=2, eval_data=used_up)
    with pytest.raises(et.DataError, match="The evaluation data is empty"):
        trainer.evaluate([])
    with pytest.raises(et.DataError, match="The data to predict on is empty"):
        trainer.predict([])


def test_training_without_compilation_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    with jax.disable_jit(), pytest.raises(et.ConfigurationError, match=r"Trainer\(debug=True\)"):
        trainer.fit(batches(1), epochs=1)
    assert trainer.fit(batches(1), epochs=1).step == 1


def test_a_state_is_loaded_into_abstract_arrays(tmp_path):
    trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck")])
    trainer.fit(batches(2), epochs=1)
    (path,) = (tmp_path / "run" / "ck").iterdir()
    whole = et.load_state(path, like=jax.eval_shape(new_state))
    assert_same(whole, trainer.state)
    params = et.load_state(path, like=jax.eval_shape(lambda: new_state()["params"]))
    assert_same(params, trainer.state["params"])


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert isinstance(a, jax.Array)
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_resuming_another_state_is_refused_in_short_and_names_the_trainers(tmp_path, caplog):
    def trainer(optimiser: Any) -> et.Trainer:
        params = {f"layer{n:04d}": jax.numpy.zeros(2) for n in range(500)}
        state = {"params": params, "opt_state": optimiser.init(params)}
        checkpointer = subs.Checkpointer("ck")
        return et.Trainer(
            lambda state, batch: (state, {"loss": batch}), state, run_dir=tmp_path, subscribers=[checkpointer]
        )

    trainer(optax.adam(0.1)).fit([np.float32(1)], epochs=1)
    with pytest.raises(
        et.StateError, match="the structure of the trainer's state: missing nothing"
    ) as raised:
        trainer(optax.sgd(0.1)).fit([np.float32(1)], epochs=2, resume=True)
    assert len(str(raised.value)) < 1000
    assert all(len(record.getMessage()) < 2000 for record in caplog.records)


def test_in_debug_mode_step_fn_sees_values_and_the_run_is_the_same(tmp_path, capsys):
    def printing(state: Any, batch: Any) -> Any:
        state, metrics = step_fn(state, batch)
        print("loss", metrics["loss"])
        return state, metrics

    trainer = et.Trainer(printing, new_state(), run_dir=tmp_path, debug=True)
    losses = record(trainer, et.StepCompleted)
    result = trainer.fit(batches(3), epochs=1)
    printed = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("loss ")]
    values = [float(text) for text in printed if not text.startswith(("Traced", "JitTracer"))]
    assert values == pytest.approx([event.metrics["loss"] for event in losses])
    assert_same(result.state, make_trainer(tmp_path / "plain").fit(batches(3), epochs=1).state)


def test_in_debug_mode_a_nan_is_raised_at_its_operation_and_the_state_is_that_before(tmp_path):
    def step(state: Any, batch: Any) -> Any:
        return {"w": state["w"] + 1}, {"loss": jax.numpy.log(batch)}

    trainer = et.Trainer(step, {"w": jax.numpy.zeros(())}, run_dir=tmp_path, debug=True)
    with pytest.raises(FloatingPointError, match=r"nan.*log"):
        trainer.fit([np.float32(1), np.float32(-1)], epochs=1)
    assert (trainer.step, float(trainer.state["w"])) == (1, 1.0)


def test_debug_mode_runs_one_step_at_a_time(tmp_path):
    with pytest.raises(et.ConfigurationError, match=r"steps_per_call=1\."):
        make_trainer(tmp_path, debug=True, steps_per_call=4)


def endless(epoch: int) -> Any:
    while True:
        yield from batches(4)


def policies() -> dict[str, et.Subscriber]:
    """Name -> a policy that goes by epochs."""
    made: dict[str, et.Subscriber] = {
        "stops": subs.EarlyStopping("loss"),
        "stops-by-time": subs.EarlyStopping("loss", patience_unit="seconds"),
        "stops-by-evaluations": subs.EarlyStopping("val_loss", patience_unit="evaluations"),
        "reduces": subs.ReduceLROnPlateau("loss"),
        "schedules": subs.LearningRateScheduler(lambda epoch: 0.5),
        "keeps-best": subs.Checkpointer("best", monitor="loss", save_best_only=True),
        "keeps": subs.Checkpointer("periodic", every_epochs=1),
        "evaluates": subs.EvaluateEvery(epochs=1),
    }
    for name, policy in made.items():
        policy.name = name
    return made


@pytest.mark.parametrize("name", policies())
@pytest.mark.parametrize("data", [endless, batches(4)], ids=["endless", "shorter"])
def test_a_policy_by_epochs_is_named_if_the_run_ends_within_the_first_one(
    tmp_path: Any, name: str, data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, subscribers=[policies()[name], subs.TerminateOnNaN()])
    trainer.on(et.EpochCompleted)(lambda event: None)  # observes, and decides nothing
    trainer.fit(data, steps=3, eval_data=batches(1))
    message = "No epoch of the data ended within 3 steps"
    assert [line for line in caplog.messages if message in line] == [
        line for line in caplog.messages if f"between the first step and the last: {name}. " in line
    ]
    assert caplog.text.count(message) == 1


@pytest.mark.parametrize(
    ("data", "aim"), [(batches(4), {"steps": 4}), (batches(4), {"steps": 5}), (batches(4), {"epochs": 1})]
)
def test_policies_by_epochs_are_not_named_if_an_epoch_ended(
    tmp_path: Any, data: Any, aim: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, subscribers=list(policies().values()))
    trainer.fit(data, **aim, eval_data=batches(1))
    assert "No epoch of the data ended" not in caplog.text


def test_policies_by_steps_are_not_named_in_an_endless_epoch(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    by_steps = [
        subs.EarlyStopping("loss", patience_unit="steps", patience=9),
        subs.EarlyStopping("val_loss", patience_unit="evaluations", patience=9),
        subs.LearningRateScheduler(lambda step: 0.5, by="step"),
        subs.Checkpointer("ck", every=2, every_epochs=1),
        subs.EvaluateEvery(steps=2),
    ]
    by_steps[1].name = "by evaluations"
    make_trainer(tmp_path, subscribers=by_steps).fit(endless, steps=3, eval_data=batches(1))
    assert "No epoch of the data ended" not in caplog.text


def project(state: Any, batch: Any) -> Any:
    return state, {"loss": (batch["x"] @ state["w"]).sum()}


def rows(*widths: int) -> list[dict[str, Any]]:
    return [{"x": np.ones((4, width), np.float32), "n": np.int32(width)} for width in widths]


@pytest.mark.parametrize("options", [{}, {"steps_per_call": 2}])
def test_a_batch_of_another_shape_is_named_with_its_place(tmp_path, options):
    trainer = et.Trainer(project, {"w": jax.numpy.ones(3)}, run_dir=tmp_path, **options)
    failed = record(trainer, et.RunFailed)
    odd = {2: rows(3, 3, 4, 4)}
    with pytest.raises(
        et.StepError, match=r"At step 11 \(epoch 2, batch 2\): step_fn raised TypeError"
    ) as caught:
        trainer.fit(lambda epoch: odd.get(epoch, rows(3, 3, 3, 3)), epochs=5)
    message = str(caught.value)
    assert message.endswith("Here batch['x'] is float32[4,4] instead of float32[4,3] as before.")
    assert failed[0].error == f"StepError: {message}"


def test_a_batch_of_another_structure_is_described(tmp_path):
    trainer = et.Trainer(project, {"w": jax.numpy.ones(3)}, run_dir=tmp_path)
    pairs = [(batch["x"], batch["n"]) for batch in rows(3)]
    described = r"Here batch\[0\] is float32\[4,3\]; batch\[1\] is int32\[\]\."
    with pytest.raises(et.StepError, match=f"^step_fn raised TypeError: .*{described}"):
        trainer.fit(pairs, epochs=1)
    with pytest.raises(et.StepError, match=rf"At step 2 \(epoch 0, batch 1\).*{described}"):
        trainer.fit([*rows(3), *pairs], epochs=1)
    words = [*rows(3), {"x": ["a"], "n": 1}]
    with pytest.raises(et.DataError, match=r"At step 3 \(epoch 0, batch 1\): batch\['x'\]\[0\] is str"):
        trainer.fit(words, epochs=1)


def test_a_batch_of_another_shape_in_an_evaluation_is_named_with_its_place(tmp_path):
    def evaluate(state: Any, batch: Any) -> Any:
        return project(state, batch)[1]

    def predict(state: Any, batch: Any) -> Any:
        return batch["x"] @ state["w"]

    trainer = et.Trainer(project, {"w": jax.numpy.ones(3)}, evaluate, predict, run_dir=tmp_path)
    here = r"Here batch\['x'\] is float32\[4,4\] instead of float32\[4,3\] as before\."
    with pytest.raises(et.StepError, match=rf"At batch 1 of the evaluation data, at step 2: eval_fn.*{here}"):
        trainer.fit(rows(3, 3), epochs=1, eval_data=rows(3, 4))
    with pytest.raises(et.StepError, match=rf"At batch 2 of the evaluation data 'a', at step 2: .*{here}"):
        trainer.evaluate({"a": rows(3, 3, 4)})
    with pytest.raises(et.StepError, match=rf"At batch 1 of the data to predict on: predict_fn.*{here}"):
        trainer.predict(rows(3, 4))
    first = r"eval_fn raised TypeError.*Here batch\['n'\] is int32\[\]; batch\['x'\] is float32\[4,5\]"
    with pytest.raises(et.StepError, match=first):
        trainer.fit(rows(3), epochs=1, eval_data=rows(5))
