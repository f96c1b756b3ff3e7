"""Your own loop on the same machinery."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

import eventtrain as et
from tests.conftest import python_path
from tests.support.models import batches, make_trainer, record


def test_a_session_trains_as_fit_does(tmp_path):
    data = batches(6)
    trainer = make_trainer(tmp_path)
    seen = record(trainer, et.StepCompleted)
    with trainer.session() as session:
        for batch in data:
            assert session.step(batch)
    fitted = make_trainer(tmp_path / "fit").fit(data, epochs=1)
    np.testing.assert_array_equal(trainer.state["params"]["w"], fitted.state["params"]["w"])
    assert [event.step for event in seen] == [1, 2, 3, 4, 5, 6]


def test_a_session_has_epochs_and_evaluation_if_you_ask_for_them(tmp_path):
    trainer = make_trainer(tmp_path)
    with trainer.session() as session:
        for _ in range(2):
            for batch in batches(3):
                session.step(batch)
            session.end_epoch(eval_data=batches(1))
    assert [(epoch.epoch, epoch.step, "val_loss" in epoch.metrics) for epoch in session.history] == [
        (0, 3, True),
        (1, 6, True),
    ]


def test_step_returns_false_and_does_nothing_once_the_run_has_to_end(tmp_path):
    trainer = make_trainer(tmp_path)
    with trainer.session() as session:
        assert session.step(batches(1)[0])
        session.control.stop("enough")
        assert not session.step(batches(1)[0])
        assert not session.step(batches(1)[0])
        assert session.stop_reason == "enough"
    assert trainer.step == 1


def test_an_exception_in_the_block_becomes_run_failed_and_goes_on(tmp_path):
    trainer = make_trainer(tmp_path)
    seen = record(trainer, et.StepCompleted, et.RunFailed)
    with pytest.raises(KeyError), trainer.session() as session:  # noqa: PT012
        session.step(batches(1)[0])
        raise KeyError("mine")
    assert [event.kind for event in seen] == ["step_completed", "run_failed"]
    assert trainer.step == 1


def test_a_command_after_the_last_step_takes_effect_at_the_last_boundary(tmp_path):
    trainer = make_trainer(tmp_path)
    changed = record(trainer, et.HyperparamChanged)
    with trainer.session() as session:
        assert session.begin_epoch()  # allowed before the first batch, which prepares the step
        session.step(batches(1)[0])
        session.control.set_hyperparam("learning_rate", 0.25)
    assert [(event.step, event.new) for event in changed] == [(1, 0.25)]
    assert float(trainer.state["opt_state"].hyperparams["learning_rate"]) == 0.25


def test_an_empty_session_is_a_run_without_steps(tmp_path):
    trainer = make_trainer(tmp_path)
    seen = record(trainer)
    with trainer.session():
        pass
    assert [event.kind for event in seen] == ["run_started", "run_completed"]


def test_no_thread_is_left_after_a_run(tmp_path):
    before = set(threading.enumerate())
    make_trainer(tmp_path).fit(batches(3), epochs=1, eval_data=batches(1))
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name.startswith("eventtrain")]
    for thread in left:  # anyio's idle workers are told to end, and not waited for
        thread.join(5)
    assert not [thread.name for thread in left if thread.is_alive()]


INTERRUPTED = """
    import os, signal, sys, threading, time
    import numpy as np
    from tests.support.models import batches, make_trainer, record
    from pathlib import Path
    import eventtrain as et

    trainer = make_trainer(Path({out!r}))
    seen = record(trainer)
    delays = np.random.default_rng(int(sys.argv[1])).uniform(0, 0.3, size=2)

    def data(epoch):
        while True:
            yield from batches(4)

    def interrupt():
        trainer_started.wait()
        time.sleep(delays[0])
        os.kill(os.getpid(), signal.{signal})

    trainer_started = threading.Event()

    @trainer.on(et.RunStarted)
    async def started(event):
        trainer_started.set()

    threading.Thread(target=interrupt).start()
    raised = ""
    try:
        trainer.fit(data, epochs=1)
    except KeyboardInterrupt:
        raised = "KeyboardInterrupt"
    except SystemExit as error:
        raised = f"SystemExit {{error.code}}"
    steps = [e.step for e in seen if e.kind == "step_completed"]
    assert steps == list(range(1, trainer.step + 1)), steps[-3:]
    assert seen[-1].kind == "run_completed", seen[-1]
    assert np.isfinite(np.asarray(trainer.state["params"]["w"])).all()
    assert not [t for t in threading.enumerate() if t.name.startswith("eventtrain")]
    print(raised, seen[-1].reason, trainer.step)
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [("SIGINT", "KeyboardInterrupt interrupted"), ("SIGTERM", "SystemExit 143 preempted")],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_signal_stops_at_a_boundary_with_state_alive_and_everything_delivered(
    tmp_path: Path, name, expected, seed
):
    script = tmp_path / "interrupted.py"
    script.write_text(textwrap.dedent(INTERRUPTED.format(signal=name, out=str(tmp_path))))
    done = subprocess.run(
        [sys.executable, str(script), str(seed)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": python_path(), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(expected)


def test_handlers_that_somebody_installed_on_purpose_stay(tmp_path):
    calls: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        trainer = make_trainer(tmp_path)

        def data(epoch: int):
            os.kill(os.getpid(), signal.SIGTERM)
            yield from batches(2)

        assert trainer.fit(data, epochs=1).stop_reason == "completed"
        assert calls == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_may_be_taken_for_sigterm_and_gets_its_handler_back(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, preempt_on=[signal.SIGUSR1])
    ended = record(trainer, et.RunCompleted)

    def data(epoch: int):
        yield from batches(2)
        os.kill(os.getpid(), signal.SIGUSR1)
        while True:
            yield batches(1)[0]

    with pytest.raises(SystemExit) as raised:
        trainer.fit(data, epochs=1)
    assert raised.value.code == 128 + signal.SIGUSR1
    assert [event.reason for event in ended] == ["preempted"]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, 0, 1.5, True])
def test_what_cannot_preempt_a_run_is_refused(tmp_path: Path, number) -> None:
    with pytest.raises(et.ConfigurationError, match="preempt_on"):
        make_trainer(tmp_path, preempt_on=[number])
