from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import eventtrain as et
from eventtrain import subscribers as subs


def make_trainer(tmp_path: Path, bar: et.Subscriber) -> et.Trainer:
    optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    params = jnp.zeros(2)

    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch, "odd [name]": batch * 2}

    state = {"params": params, "opt_state": optimiser.init(params)}
    return et.Trainer(step, state, subscribers=[bar], run_dir=tmp_path)


def printed(**options: Any) -> tuple[io.StringIO, Console]:
    text = io.StringIO()
    return text, Console(file=text, width=120, **options)


async def test_a_pipe_gets_a_line_per_epoch_and_nothing_else(tmp_path: Path) -> None:
    text, console = printed()
    trainer = make_trainer(tmp_path, subs.ProgressBar(console=console))
    await trainer.fit_async([np.float32(1)] * 20, epochs=3)
    lines = text.getvalue().splitlines()
    assert len(lines) == 4
    for number, line in enumerate(lines[:3], 1):
        assert line.startswith(f"epoch {number}: loss=1 odd [name]=2 learning_rate=0.5 (")
    assert lines[3] == "run completed at step 60: completed"
    assert "\x1b" not in text.getvalue()


def test_a_terminal_gets_a_bar_that_is_gone_in_the_end(tmp_path: Path) -> None:
    text, console = printed(force_terminal=True)
    bar = subs.ProgressBar(("loss",), every_epochs=2, console=console)
    make_trainer(tmp_path, bar).fit([np.float32(1)] * 20, epochs=4)
    shown = text.getvalue()
    assert "━" in shown  # the bar
    assert "odd" not in shown
    assert "epoch 2: loss=1" in shown
    assert "epoch 3: loss=1" not in shown
    assert "\x1b[?25h" in shown  # the cursor is back


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    text, console = printed()

    def batches() -> Any:
        yield np.float32(1)
        raise OSError("the disk with the data is gone")

    trainer = make_trainer(tmp_path, subs.ProgressBar(console=console))
    with pytest.raises(OSError, match="gone"):
        trainer.fit(lambda epoch: batches(), epochs=1)
    assert "run failed at step 1: OSError: the disk with the data is gone" in text.getvalue()


def test_a_terminal_that_takes_nothing_delays_no_step(tmp_path: Path) -> None:
    reached = threading.Event()

    class Stuck(io.StringIO):
        def write(self, text: str) -> int:
            if "epoch 1" in text:
                assert reached.wait(20)  # as after Ctrl-S
            return super().write(text)

    stuck = Stuck()
    trainer = make_trainer(tmp_path, subs.ProgressBar(console=Console(file=stuck, width=120)))

    @trainer.on(et.EpochCompleted, lag=0, where=lambda event: event.epoch == 9)
    async def last(event: et.EpochCompleted) -> None:
        reached.set()

    assert trainer.fit([np.float32(1)] * 5, epochs=10).step == 50
    assert stuck.getvalue().count("epoch") == 10


def test_it_is_the_same_class_everywhere() -> None:
    from eventtrain.progress import ProgressBar

    assert subs.ProgressBar is ProgressBar
    assert {"Alerts", "Checkpointer", "EarlyStopping", "JSONLLogger", "ReduceLROnPlateau"} <= set(dir(subs))
    assert subs.restore_state is et.load_state  # its name before
    for name in set(subs.__all__) - {"restore_state"}:
        assert getattr(subs, name).__name__ == name
    with pytest.raises(AttributeError, match="Nothing"):
        subs.Nothing  # noqa: B018
