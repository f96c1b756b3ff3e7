"""The traceback of what leaves ``fit`` shows the frames that its user wrote, and the message."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain.trainer.tracebacks import VARIABLE, UserFrames

BATCH = np.float32(1)


def inner(weights: Any) -> Any:
    return weights @ jnp.ones((3, 3))  # the mistake


def loss_fn(weights: Any) -> Any:
    return inner(weights).mean()


def step_fn(state: Any, batch: Any) -> Any:
    loss, gradient = jax.value_and_grad(loss_fn)(state["w"])
    return {"w": state["w"] - gradient}, {"loss": loss}


def fine(state: Any, batch: Any) -> Any:
    return state, {"loss": batch}


def wrong(state: Any, batch: Any) -> Any:
    return {"loss": inner(state["w"])}


def new_trainer(step: Any = fine, **options: Any) -> et.Trainer[Any]:
    return et.Trainer(step, {"w": jnp.zeros(4)}, **options)


def session(trainer: et.Trainer[Any]) -> None:
    with trainer.session() as running:
        running.step(BATCH)


CALLS: dict[str, Callable[[], Any]] = {
    "fit": lambda: new_trainer(step_fn).fit([BATCH], epochs=1),
    "fit_async": lambda: anyio.run(lambda: new_trainer(step_fn).fit_async([BATCH], epochs=1)),
    "session": lambda: session(new_trainer(step_fn)),
    "eval_fn in fit": lambda: new_trainer(eval_fn=wrong).fit([BATCH], epochs=1, eval_data=[BATCH]),
    "evaluate": lambda: new_trainer(eval_fn=wrong).evaluate([BATCH]),
    "evaluate_async": lambda: anyio.run(lambda: new_trainer(eval_fn=wrong).evaluate_async([BATCH])),
    "predict": lambda: new_trainer(predict_fn=wrong).predict([BATCH]),
    "predict_async": lambda: anyio.run(lambda: new_trainer(predict_fn=wrong).predict_async([BATCH])),
}


def raised_by(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        call()
    return caught.value


def files(error: BaseException | None) -> set[str]:
    """Whose frames a traceback has: of this file, of eventtrain, of JAX."""
    assert error is not None
    names = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    owners = {"here": __file__, "ours": "/eventtrain/", "jax": "/jax/"}
    return {owner for owner, part in owners.items() if any(part in name for name in names)}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.allow_blocking
@pytest.mark.parametrize("name", CALLS)
def test_an_error_in_a_function_of_the_user_shows_the_users_frames_and_the_message(name: str) -> None:
    error = raised_by(CALLS[name])
    assert isinstance(error, et.errors.StepError)
    assert isinstance(error.__cause__, TypeError)
    assert files(error) == files(error.__cause__) == {"here"}
    whole = "".join(traceback.format_exception(error))
    assert "# the mistake" in whole
    assert "contracting dimensions" in whole
    assert "direct cause" in whole
    # A debugger that looks at the cause begins where the mistake is.
    last = traceback.extract_tb(error.__cause__.__traceback__)[-1]
    assert last.name == "inner"


def test_an_error_in_step_fn_is_at_most_twenty_lines() -> None:
    error = raised_by(CALLS["fit"])
    error.__notes__ = []  # JAX's own note, two lines
    lines = "".join(traceback.format_exception(error)).splitlines()
    # pytest's two frames, of raised_by and the lambda, belong to the caller
    assert len(lines) <= 26, "\n".join(lines)


@pytest.mark.parametrize("everything", ["variable", "debug"])
def test_everything_is_shown_if_that_is_wanted(monkeypatch: pytest.MonkeyPatch, everything: str) -> None:
    if everything == "variable":
        monkeypatch.setenv(VARIABLE, "full")
    trainer = new_trainer(step_fn, debug=everything == "debug")
    error = raised_by(lambda: trainer.fit([BATCH], epochs=1))
    assert {"here", "ours"} <= files(error)


def test_the_exception_of_the_data_is_itself_with_cause_context_and_notes() -> None:
    mine = OSError("the disk is gone")
    mine.add_note("look at the cable")
    cause = KeyError("cable")

    def batches(epoch: int) -> Any:
        yield BATCH
        raise mine from cause

    error = raised_by(lambda: new_trainer().fit(batches, epochs=1))
    assert error is mine
    assert error.__cause__ is cause
    assert error.__notes__[0] == "look at the cable"
    assert files(error) == {"here"}
    assert traceback.extract_tb(error.__traceback__)[-1].name == "batches"


def test_the_handler_that_fails_a_run_is_the_cause_with_its_frame() -> None:
    trainer = new_trainer()

    @trainer.on(et.StepCompleted, on_error="fail")
    async def picky(event: et.StepCompleted) -> None:
        raise ValueError("no")

    error = raised_by(lambda: trainer.fit([BATCH], epochs=1))
    assert isinstance(error, et.errors.SubscriberError)
    assert isinstance(error.__cause__, ValueError)
    assert files(error) == files(error.__cause__) == {"here"}


def test_an_error_that_says_what_to_do_has_no_frames_of_ours() -> None:
    error = raised_by(
        lambda: new_trainer(lambda state, batch: (state, {"loss": jnp.zeros(3)})).fit([BATCH], epochs=1)
    )
    assert isinstance(error, et.errors.MetricsError)
    assert files(error) == {"here"}


def test_an_error_of_eventtrain_itself_keeps_every_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_code = compile("def broken(*_): raise RuntimeError('a bug')", "/eventtrain/broken.py", "exec")
    names: dict[str, Any] = {"__name__": "eventtrain.broken"}
    exec(broken_code, names)
    monkeypatch.setattr("eventtrain.trainer.trainer.train", names["broken"])
    error = raised_by(lambda: new_trainer().fit([BATCH], epochs=1))
    assert isinstance(error, RuntimeError)
    assert "ours" in files(error)
    assert traceback.extract_tb(error.__traceback__)[-1].name == "broken"


def test_groups_and_circles_of_exceptions_are_followed_once() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__context__, other.__context__ = other, one

    def fail() -> None:
        raise ExceptionGroup("both", [one, other])

    def call() -> None:
        with UserFrames(everything=False):
            fail()

    error = raised_by(call)
    assert isinstance(error, ExceptionGroup)
    assert traceback.extract_tb(error.__traceback__)[-1].name == "fail"
