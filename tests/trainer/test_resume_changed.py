"""A run that resumes with other data, hyperparameters or policies: what differs is named, and no state goes astray."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.models import batches, examples, make_trainer, new_state, record, step_fn

STOPPING = subs.EarlyStopping


def loader(**changes: Any) -> et.ArrayLoader:
    return et.ArrayLoader(examples(32), **{"batch_size": 4, **changes})


class Described:
    """Data of the user's own."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def __call__(self, epoch: int) -> Any:
        return iter(batches(8))

    def fingerprint(self) -> Any:
        return self.given


@pytest.mark.parametrize(
    ("first", "then", "rate", "said"),
    [
        (loader(), loader(), 0.5, []),
        (
            loader(),
            loader(batch_size=8),
            0.5,
            ["data: batch_size=4 then, 8 now", "data: length=8 then, 4 now"],
        ),
        (loader(), loader(seed=5), 0.5, ["data: seed=0 then, 5 now"]),
        (loader(), loader(shuffle=False), 0.5, ["data: shuffle=True then, False now"]),
        (loader(), et.ArrayLoader(examples(40), 4), 0.5, ["data: examples=32 then, 40 now"]),
        (
            Described({"files": ["a"]}),
            Described({"files": ["b"]}),
            0.5,
            ["data: files=['a'] then, ['b'] now"],
        ),
        (batches(8), batches(9), 0.5, ["data: length=8 then, 9 now"]),
        (batches(8), loader(), 0.5, []),  # a list says nothing of a batch size
        (
            loader(),
            loader(),
            0.25,
            ["hyperparams: learning_rate=0.5 then, 0.25 now; the checkpoint's value 0.5 continues"],
        ),
    ],
)
def test_other_data_and_hyperparams_are_named_when_a_run_resumes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: Any, then: Any, rate: float, said: list[str]
) -> None:
    make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck")]).fit(first, epochs=1)
    caplog.clear()
    trainer = et.Trainer(
        step_fn, new_state(rate), run_dir=tmp_path / "run", subscribers=[subs.Checkpointer("ck")]
    )
    trainer.fit(then, epochs=2, resume=True)
    assert all(text in caplog.text for text in said)
    assert ("under different conditions" in caplog.text) == bool(said)


@pytest.mark.parametrize("given", [object(), {"a": {1, 2}}, 7])
def test_a_fingerprint_that_is_not_plain_data_is_refused_by_name(tmp_path: Path, given: Any) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(et.DataError, match=r"fingerprint\(\) of Described must return a dict"):
        trainer.fit(Described(given), epochs=1)
    assert trainer.step == 0


POLICIES: list[tuple[Any, Any, bool]] = [
    (STOPPING("val_loss"), STOPPING("val_loss", patience=7), True),
    (STOPPING("val_loss"), STOPPING("loss"), False),
    (STOPPING("loss", mode="min"), STOPPING("loss", mode="max"), False),
    (STOPPING("loss"), STOPPING("loss", patience_unit="steps"), False),
    (subs.ReduceLROnPlateau("loss"), subs.ReduceLROnPlateau("val_loss"), False),
    (subs.GradientSpike("loss"), subs.GradientSpike("rate"), False),
    (subs.TerminateOnNaN(monitor="loss"), subs.TerminateOnNaN(monitor="rate"), False),
]


@pytest.mark.parametrize(("first", "then", "same"), POLICIES)
def test_a_policy_takes_over_no_state_about_something_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: et.Subscriber, then: et.Subscriber, *, same: bool
) -> None:
    trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck"), first])
    trainer.fit(batches(4), epochs=2, eval_data=batches(1))
    caplog.clear()
    loaded: list[Any] = []
    load = then.load_state_dict
    then.load_state_dict = lambda state: (loaded.append(state), load(state))[1]  # type: ignore[method-assign]
    again = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck"), then])
    assert again.fit(batches(4), epochs=3, eval_data=batches(1), resume=True).step == 12
    name = type(first).__name__
    assert bool(loaded) == same
    assert (f"{name} starts from scratch: the checkpoint has a state of that name about" in caplog.text) == (
        not same
    )


def test_two_policies_whose_order_changed_do_not_take_over_one_anothers_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [("loss", "val_loss"), ("val_loss", "loss")]
    for epochs, names in zip((2, 3), pairs, strict=True):
        policies = [STOPPING(name, patience=50) for name in names]
        trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck"), *policies])
        trainer.fit(batches(4), epochs=epochs, eval_data=batches(1), resume=True)
    assert "EarlyStopping starts from scratch" in caplog.text
    assert "EarlyStopping-2 starts from scratch" in caplog.text


def test_a_best_value_of_another_metric_is_not_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def checkpointers(monitor: str) -> list[et.Subscriber]:
        best = subs.Checkpointer("best", save_best_only=True, monitor=monitor, mode="min")
        best.name = "best"
        return [subs.Checkpointer("ck"), best]

    make_trainer(tmp_path, subscribers=checkpointers("loss")).fit(batches(4), epochs=1)
    before = len(list((tmp_path / "run/best").iterdir()))
    make_trainer(tmp_path, subscribers=checkpointers("rate")).fit(batches(4), epochs=2, resume=True)
    assert "best leaves out the best value so far, since it is of loss (min, epochs)" in caplog.text
    assert len(list((tmp_path / "run/best").iterdir())) == before + 1


@pytest.mark.parametrize("size", [4, 8])
def test_another_batch_size_of_data_that_describes_nothing_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck")]).fit(lambda epoch: batches(4), epochs=1)
    trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck")])
    trainer.fit(lambda epoch: batches(4, size), epochs=2, resume=True)
    said = "The first batch after the checkpoint is float32[8, 3]; float32[8], and that of the run was float32[4, 3]; "
    assert (said in caplog.text) == (size == 8)


def test_a_position_behind_the_end_of_the_data_is_refused_by_name(tmp_path: Path) -> None:
    stopped = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck")])
    stopped.on(et.StepCompleted, every=6, once=True, lag=0)(stop)
    stopped.fit(loader(), epochs=1)
    trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck")])
    with pytest.raises(et.DataError, match="resumes at batch 6 of epoch 0, and the data has only 4 batches"):
        trainer.fit(loader(batch_size=8), epochs=2, resume=True)


async def stop(event: et.StepCompleted, control: et.Control) -> None:
    control.stop("enough", final=False)


def resumed(
    tmp_path: Path, epochs: int, resume: Any = True, **options: Any
) -> tuple[et.Trainer[Any], list[Any]]:
    trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck", every=4, max_to_keep=None)])
    seen = record(trainer, et.RunResumed, et.HyperparamChanged, et.StepCompleted)
    trainer.fit(batches(4), epochs=epochs, resume=resume, **options)
    return trainer, seen


def test_a_resume_sets_other_values_once_and_again_where_the_checkpoint_is_named(tmp_path: Path) -> None:
    resumed(tmp_path, 1)
    other = {"hyperparams": {"learning_rate": 0.125}}
    trainer, seen = resumed(tmp_path, 2, **other)
    assert [event.kind for event in seen[:3]] == ["run_resumed", "hyperparam_changed", "step_completed"]
    assert (seen[1].step, seen[1].old, seen[1].new, seen[1].cause) == (4, 0.5, 0.125, None)
    assert [event.metrics["rate"] for event in seen[2:]] == [0.125] * 4

    trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck", every=4)])
    trainer.on(et.StepCompleted, once=True, lag=0)(halve)
    trainer.fit(batches(4), epochs=3, resume=True, **other)
    _, seen = resumed(tmp_path, 4, **other)  # the same script again: what was halved continues
    assert [event.metrics["rate"] for event in seen if event.kind == "step_completed"] == [0.0625] * 4
    _, seen = resumed(tmp_path, 5, resume=16, **other)
    assert [event.metrics["rate"] for event in seen if event.kind == "step_completed"] == [0.125] * 4


def test_a_session_sets_the_values_that_it_is_given_as_fit_does(tmp_path: Path) -> None:
    def session(resume: bool, rate: float) -> list[Any]:
        trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck", every=2)])
        seen = record(trainer, et.HyperparamChanged, et.StepCompleted)
        with trainer.session(resume=resume, hyperparams={"learning_rate": rate}) as session:
            for batch in batches(4)[:2]:
                session.step(batch)
        return [
            (event.step, event.old, event.new, event.reason)
            if isinstance(event, et.HyperparamChanged)
            else event.metrics["rate"]
            for event in seen
        ]

    reason = "session(hyperparams=...)"
    assert session(False, 0.25) == [(0, 0.5, 0.25, reason), 0.25, 0.25]
    assert session(True, 0.25) == [0.25, 0.25]  # the checkpoint remembers that it was set
    assert session(True, 0.125) == [(4, 0.25, 0.125, reason), 0.125, 0.125]


async def halve(event: et.StepCompleted, control: et.Control) -> None:
    control.scale_hyperparam("learning_rate", 0.5)


def test_values_that_cannot_be_set_are_refused_before_anything_has_changed(tmp_path: Path) -> None:
    resumed(tmp_path, 1)
    trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck")])
    for given, said in (
        ({"learning_rte": 0.1}, "Did you mean 'learning_rate'"),
        ({"learning_rate": float("nan")}, "finite"),
        ({"learning_rate": "fast"}, "one real number"),
    ):
        with pytest.raises(et.errors.HyperparamError, match=said):
            trainer.fit(batches(4), epochs=2, resume=True, hyperparams=given)
    for wrong in ([], {1: 0.1}, 0.1):
        with pytest.raises(et.ConfigurationError, match="hyperparams must be a dict of name -> value"):
            trainer.fit(batches(4), epochs=2, resume=True, hyperparams=wrong)  # type: ignore[arg-type]
        with (
            pytest.raises(et.ConfigurationError, match="session: hyperparams must be a dict"),
            trainer.session(hyperparams=wrong),  # type: ignore[arg-type]
        ):
            pass
    assert (trainer.step, trainer.control.hyperparams) == (0, {})


def test_a_run_that_resumes_is_decided_on_before_its_first_step(tmp_path: Path) -> None:
    resumed(tmp_path, 1)
    trainer = make_trainer(tmp_path, subscribers=[subs.Checkpointer("ck")])
    seen = record(trainer, et.HyperparamChanged, et.StepCompleted)

    @trainer.on(et.RunResumed, lag=0)
    def slow_down(event: et.RunResumed, control: et.Control) -> None:
        while trainer._model.compiled is None:
            time.sleep(0.01)
        end_s = time.monotonic() + 1.0
        while (
            trainer.step == 4 and time.monotonic() < end_s
        ):  # a step would be dispatched, if the loop did not wait
            time.sleep(0.01)
        control.set_hyperparam("learning_rate", 0.25)

    trainer.fit(batches(4), epochs=2, resume=True)
    assert (seen[0].step, seen[0].new) == (4, 0.25)
    assert [event.metrics["rate"] for event in seen[1:]] == [0.25] * 4
