from __future__ import annotations

import io
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers.progress.display import RunDisplay, can_redraw, shows_progress
from eventtrain.subscribers.progress.summary_table import Summary
from eventtrain.subscribers.progress.text import Shown, fitted, texts


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
    from eventtrain.subscribers.progress.progress_bar import ProgressBar

    assert subs.ProgressBar is ProgressBar
    assert {"Alerts", "Checkpointer", "EarlyStopping", "JSONLLogger", "ReduceLROnPlateau"} <= set(dir(subs))
    assert subs.restore_state is et.load_state  # its name before
    for name in set(subs.__all__) - {"restore_state"}:
        assert getattr(subs, name).__name__ == name
    with pytest.raises(AttributeError, match="Nothing"):
        subs.Nothing  # noqa: B018


# --- what is drawn --------------------------------------------------------------------------------------------


def drawn(display: RunDisplay, console: Console) -> list[str]:
    with console.capture() as captured:
        console.print(*display.get_renderables())
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [10, 24, 40, 60, 80, 120, 300])
@pytest.mark.parametrize("total", [None, 1_000_000])
def test_nothing_is_wider_than_the_console(width: int, total: int | None) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    display = RunDisplay(console, total, live=True)
    display.epoch(7, 100)
    display.advance_to(123_456)
    metrics = {f"层{index}/grad_norm": 0.123456789 * index for index in range(40)}
    display.shown = Shown(metrics, ("learning_rate=0.0001", "checkpoint 123000", "behind: JSONLLogger (3 s)"))
    lines = drawn(display, console)
    assert max(cell_len(line) for line in lines) <= width
    assert len(lines) <= 5
    if width >= 40:
        assert "epoch 7/100" in lines[0]
        assert "━" in lines[0] or "╸" in lines[0]
    if width >= 60:
        shown = lines[1].count("grad_norm")
        assert shown > 0
        assert lines[1].rstrip().endswith(f"+{40 - shown}") or shown == 40


@given(st.lists(st.text(st.characters(exclude_categories=("C",)), min_size=1)), st.integers(3, 80))
def test_parts_are_whole_fit_and_are_counted(parts: list[str], width: int) -> None:
    line = fitted(parts, width, gap="|")
    assert cell_len(line) <= width
    for count in range(len(parts), 0, -1):
        if line.startswith("|".join(parts[:count])):
            rest = line.removeprefix("|".join(parts[:count]))
            assert rest in ("", "…", f"|+{len(parts) - count}")
            break


async def test_where_the_data_has_no_length_its_first_epoch_tells_how_long_the_run_is(tmp_path: Path) -> None:
    bar = subs.ProgressBar(console=printed(force_terminal=True)[1])
    await make_trainer(tmp_path, bar).fit_async(lambda epoch: iter([np.float32(1)] * 7), epochs=3)
    assert bar._display is not None
    assert bar._display.tasks[0].total == 21


async def test_another_fit_counts_its_epochs_after_those_that_were(tmp_path: Path) -> None:
    text, console = printed(force_terminal=True, color_system=None)
    trainer = make_trainer(tmp_path, subs.ProgressBar(console=console))
    await trainer.fit_async([np.float32(1)] * 3, epochs=2)
    assert "epoch 2/2" in text.getvalue()
    await trainer.fit_async([np.float32(1)] * 3, epochs=2)
    assert "epoch 4/4" in text.getvalue()
    assert "epoch 4/2" not in text.getvalue()


def test_what_is_over_has_no_time_left() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    display = RunDisplay(console, 20, live=True)
    clock = iter(range(100))
    display.get_time = lambda: float(next(clock))
    for steps in (5, 10, 15):
        display.advance_to(steps)
    assert "left" in drawn(display, console)[0]
    display.advance_to(20)
    assert "20/20" in drawn(display, console)[0]
    assert "left" not in drawn(display, console)[0]


@pytest.mark.parametrize("width", [40, 80])
async def test_an_epochs_line_goes_on_below_where_the_terminal_is_narrow(tmp_path: Path, width: int) -> None:
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=True, color_system=None)

    def step(state: Any, batch: Any) -> Any:
        return state, {"accuracy": batch, "gradient_norm": batch, "loss": batch}

    trainer = et.Trainer(
        step,
        {"w": jnp.zeros(2)},
        eval_fn=lambda state, batch: {"accuracy": batch, "loss": 3 * batch},
        subscribers=[subs.ProgressBar(console=console)],
        run_dir=tmp_path,
    )
    await trainer.fit_async([np.float32(1)] * 2, epochs=1, eval_data=[np.float32(1)])
    shown = text.getvalue()
    values = ["accuracy=1", "gradient_norm=1", "loss=1", "val_accuracy=1", "val_loss=3"]
    assert shown[shown.index("epoch 1: ") :].split()[2:7] == values


@pytest.mark.parametrize("width", [40, 50, 60, 80])
def test_the_table_names_its_metrics_on_any_console(width: int) -> None:
    text = io.StringIO()
    summary = Summary(ended="completed")
    metrics = {"accuracy": 0.91234, "val_loss": 0.0123456}
    summary.note_epoch(et.EpochCompleted(step=9, epoch=0, metrics=metrics, steps=9, duration_s=1.0))
    table = summary.table(et.LoopStatistics(), (), width=width)
    Console(file=text, width=width).print(table)
    lines = [line.split() for line in text.getvalue().splitlines()]
    epoch = ["epoch", "1"] if width >= 60 else []
    assert ["val_loss", "0.01235", "0.01235", *epoch, "0.01235", *epoch] in lines
    assert ["accuracy", "0.9123", "0.9123", *epoch, "0.9123", *epoch] in lines


def test_what_is_logged_stands_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console(stderr=True, width=80, force_terminal=True, color_system=None)
    display = RunDisplay(console, 20, live=True)
    logger = logging.getLogger("somebody's own")
    handler, elsewhere = logging.StreamHandler(terminal), logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(logger, "handlers", [handler, elsewhere])

    display.start()
    late = logging.StreamHandler()  # made while the bar is drawn, as by basicConfig
    monkeypatch.setattr(logging.getLogger("of a library"), "handlers", [late])
    display.advance_to(5)
    display.refresh()
    before = len(terminal.getvalue())
    logger.warning("mind this")
    shown = terminal.getvalue()[before:]
    display.stop()

    above, _, below = shown.partition("mind this\n")
    assert above == "\r\x1b[2K"  # the bar is taken away
    assert "5/20" in below
    assert handler.stream is late.stream is sys.stderr is terminal
    assert elsewhere.stream.getvalue() == "mind this\n"


def test_names_move_no_cursor() -> None:
    assert texts({"a\n\x1b[2Jb": 1.0}) == ["a??[2Jb=1"]
    text, console = printed(force_terminal=True)
    summary = Summary(ended="boom\x1b[2J")
    console.print(summary.table(et.LoopStatistics(), (), width=80))
    assert "\x1b[2J" not in text.getvalue()


def test_only_what_can_be_drawn_over_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert Console(stderr=True).is_terminal  # rich goes by FORCE_COLOR
    assert not can_redraw(Console(stderr=True), given=False)
    assert not shows_progress()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert shows_progress()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    assert can_redraw(Console(stderr=True), given=False)
    monkeypatch.setenv("CI", "true")
    assert not can_redraw(Console(stderr=True), given=False)
    monkeypatch.setenv("TERM", "dumb")
    assert not can_redraw(Console(stderr=True, force_interactive=None), given=True)
    monkeypatch.setattr(sys, "stderr", None)
    assert not shows_progress()


def test_rich_draws_no_bar_in_a_notebook() -> None:
    assert not can_redraw(Console(force_jupyter=True), given=False)
    assert not can_redraw(Console(force_jupyter=True), given=True)


async def test_checkpoints_and_who_is_behind_are_shown(tmp_path: Path) -> None:
    text, console = printed(force_terminal=True, color_system=None)
    bar = subs.ProgressBar(console=console)
    states: set[str] = set()
    release = anyio.Event()
    trainer = make_trainer(tmp_path, bar)
    trainer.subscribe(subs.Checkpointer("checkpoints", every=5))

    @trainer.on(et.StepCompleted, name="slow one")
    async def slow(event: et.StepCompleted) -> None:
        await release.wait()

    @trainer.on(et.StepCompleted, lag=0, every=1)
    async def look(event: et.StepCompleted) -> None:
        assert bar._display is not None
        states.update(bar._display.shown.state)
        if any(state.startswith("behind: slow one") for state in states):
            release.set()
        elif event.step > 2:
            await anyio.sleep(0.05)

    await trainer.fit_async([np.float32(1)] * 100, epochs=1)
    assert release.is_set()
    assert any(state.startswith("behind: slow one (1 s, ") for state in states)
    assert "learning_rate=0.5" in states
    assert any(state.startswith("checkpoint ") for state in states)
    assert "20 committed, the last of step 100" in text.getvalue()


async def test_a_failed_checkpoint_is_said_at_once_and_in_the_table(tmp_path: Path) -> None:
    text, console = printed()
    bar = subs.ProgressBar(table=True, console=console)
    trainer = make_trainer(tmp_path, bar)

    @trainer.on(et.StepCompleted)
    async def fail(event: et.StepCompleted) -> None:
        trainer.bus.publish(et.CheckpointFailed(step=event.step, path="c", error="no space left"))

    @trainer.on(et.EpochCompleted, name="picky")
    async def refuse(event: et.EpochCompleted) -> None:
        raise ValueError("no")

    await trainer.fit_async([np.float32(1)] * 2, epochs=2)
    shown = text.getvalue()
    assert "checkpoint of step 1 failed: no space left" in shown
    table = shown[shown.index("run completed") :]
    assert "0 committed, 4 failed" in table
    assert "picky: 2 failures" in table
    assert "steps/s" in table
    assert "\x1b" not in shown


def test_the_table_tells_the_last_the_lowest_and_the_highest_of_each_metric() -> None:
    text, console = printed()
    summary = Summary(ended="completed")
    for epoch, loss in enumerate((3.0, float("nan"), 1.0, 2.0)):
        metrics = {"loss": loss, **{f"metric {index}": 1 for index in range(30)}}
        summary.note_epoch(
            et.EpochCompleted(step=epoch, epoch=epoch, metrics=metrics, steps=1, duration_s=1.0)
        )
    console.print(summary.table(et.LoopStatistics(step=90, steps=40, duration_s=4000.0), (), width=80))
    loss = next(line for line in text.getvalue().splitlines() if line.split()[:1] == ["loss"])
    assert loss.split() == ["loss", "2", "1", "epoch", "3", "3", "epoch", "1"]
    assert "90 (40 of them now)" in text.getvalue()
    assert "1:06:40, 0.01 steps/s in all" in text.getvalue()
    assert "11 more" in text.getvalue()
