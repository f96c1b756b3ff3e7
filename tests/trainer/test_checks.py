"""What is checked before the first step: eval_fn, predict_fn and the metrics that subscribers monitor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from tests.support.models import batches, eval_fn, make_trainer, record

RUN = {"epochs": 1, "eval_data": batches(2)}


def first_error(trainer: et.Trainer, data: Any = None, **options: Any) -> tuple[BaseException, list[Any]]:
    seen = record(trainer, et.StepCompleted)
    with pytest.raises(et.EventTrainError) as caught:
        trainer.fit(data or batches(3), **{**RUN, **options})
    return caught.value, seen


def broken(state: Any, batch: Any) -> Any:
    return {"loss": state["weights"]}


@pytest.mark.parametrize("steps_per_call", [1, 2])
def test_a_broken_eval_fn_fails_before_the_first_step(tmp_path: Path, steps_per_call: int) -> None:
    trainer = make_trainer(tmp_path, eval_fn=broken, steps_per_call=steps_per_call)
    error, seen = first_error(trainer)
    assert isinstance(error, et.StepError)
    assert "eval_fn raised KeyError: 'weights'" in str(error)
    assert (seen, trainer.step) == ([], 0)
    assert trainer.state["params"]["w"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("predict_fn", "message"),
    [
        (lambda state, batch: nothing(state), "predict_fn raised NameError"),  # type: ignore[name-defined]  # noqa: F821
        (lambda state, batch: {"label": "cat"}, r"predict_fn returned outputs\['label'\] as str"),
        (lambda state, batch: batch["image"], None),  # for other batches than those to train on
    ],
)
def test_a_predict_fn_that_no_batch_can_mend_fails_before_the_first_step(
    tmp_path: Path, predict_fn: Any, message: str | None
) -> None:
    trainer = make_trainer(tmp_path, predict_fn=predict_fn)
    if message is None:
        trainer.fit(batches(3), epochs=1)
        return
    with pytest.raises(et.StepError, match=message):
        trainer.fit(batches(3), epochs=1)
    assert trainer.step == 0


@pytest.mark.parametrize(
    ("subscriber", "listed"),
    [
        (lambda: subs.EarlyStopping("val_los", mode="min"), "val_loss"),
        (lambda: subs.EarlyStopping("val_los", mode="min", patience_unit="evaluations"), "val_loss"),
        (lambda: subs.EarlyStopping("val_loss", patience_unit="steps"), "rate"),
        (lambda: subs.ReduceLROnPlateau("los", mode="min"), "val_examples"),
        (lambda: subs.GradientSpike("grad_norm"), "rate"),
        (lambda: subs.TerminateOnNaN(monitor="losss"), "rate"),
        (lambda: subs.Checkpointer("best", monitor="val_los", mode="min", save_best_only=True), "val_loss"),
        (lambda: subs.Alerts([subs.Rule("los", above=1.0)]), "rule 'los above 1' of Alerts monitors 'los'"),
        (lambda: subs.Alerts([subs.Rule("val_loss", above=1.0, event=et.StepCompleted)]), "(loss, "),
        (lambda: subs.Alerts([subs.SpikeRule("val_loss", event=et.EvalCompleted)]), "(loss, "),
    ],
)
def test_a_misspelt_monitor_fails_before_the_first_step(tmp_path: Path, subscriber: Any, listed: str) -> None:
    error, seen = first_error(make_trainer(tmp_path, subscribers=[subscriber()]))
    assert isinstance(error, et.ConfigurationError)
    assert "which is not among the metrics (" in str(error)
    assert listed in str(error)
    assert seen == []


def test_a_misspelt_monitor_is_asked_for(tmp_path: Path) -> None:
    error, _ = first_error(make_trainer(tmp_path, subscribers=[subs.EarlyStopping("val_los", mode="min")]))
    assert str(error).endswith("so it has no effect. Did you mean 'val_loss'?")


def test_a_monitor_of_an_evaluation_fails_where_there_is_none(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, subscribers=[subs.EarlyStopping("val_loss")])
    error, _ = first_error(trainer, eval_data=None)
    assert "does fit(...) have eval_data?" in str(error)


def one_by_one() -> Iterator[Any]:
    yield from batches(2)


def not_yet(epoch: int) -> list[Any]:
    return batches(epoch)


@pytest.mark.parametrize(
    "eval_data", [lambda: {"a": batches(1), "b": batches(2)}, one_by_one, lambda: not_yet]
)
def test_names_that_are_known_later_or_come_from_sets_and_derived_values_are_no_false_alarm(
    tmp_path: Path, eval_data: Any
) -> None:
    data = eval_data()
    monitor = "val_a_double" if isinstance(data, dict) else "val_double"
    trainer = make_trainer(
        tmp_path,
        derive={"double": lambda means: 2 * means["loss"], "log": lambda means: 1 / (means["loss"] - 1)},
        subscribers=[
            subs.EarlyStopping(monitor, mode="min", patience=9),
            subs.EarlyStopping("log", mode="min"),
            subs.Alerts(
                [
                    subs.Rule(monitor, above=9.0),
                    subs.Rule(monitor.removeprefix("val_"), above=9.0, event=et.EvalCompleted),
                ]
            ),
        ],
    )
    if data is not_yet:
        with pytest.raises(et.DataError, match="evaluation data is empty"):
            trainer.fit(batches(2), epochs=1, eval_data=data)
    else:
        result = trainer.fit(batches(2), epochs=1, eval_data=data)
        assert monitor in result.history[0].metrics
    assert trainer.step == 2


def test_a_session_may_get_its_evaluation_data_later(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, subscribers=[subs.EarlyStopping("val_loss")])
    with trainer.session() as session:
        session.step(batches(1)[0])
        session.end_epoch(eval_data=batches(1))
    assert "val_loss" in session.history[0].metrics


def test_eval_fn_is_traced_once_for_the_check_and_the_evaluation(tmp_path: Path) -> None:
    traced = []

    def counted(state: Any, batch: Any) -> Any:
        traced.append(batch)
        return eval_fn(state, batch)

    make_trainer(tmp_path, eval_fn=counted).fit(batches(2), epochs=2, eval_data=batches(3))
    assert len(traced) == 1


def test_a_subscriber_can_have_functions_of_its_own_checked(tmp_path: Path) -> None:
    class Checks(et.Subscriber):
        found: Any = None

        async def start(self, run: et.RunContext) -> None:
            run.before_first_step(lambda traced: setattr(self, "found", traced))

        async def on_epoch_completed(self, event: et.EpochCompleted) -> None: ...

    subscriber = Checks()
    make_trainer(tmp_path, subscribers=[subscriber]).fit(batches(2), **RUN)
    found = subscriber.found
    assert found.state["params"]["w"].shape == (3,)
    assert found.metrics[et.StepCompleted] == {"loss", "rate", "examples"}
    assert found.metrics[et.EpochCompleted] >= {"rate", "val_loss"}
    assert found.metrics[et.EvalCompleted] == {"loss", "examples"}
