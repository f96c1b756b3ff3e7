"""The bar in a notebook, with a real Jupyter kernel; VS Code and Colab speak the same protocol."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import eventtrain as et
from eventtrain.subscribers.progress import notebook
from eventtrain.subscribers.progress.display import shows_progress
from eventtrain.subscribers.progress.notebook import MOST_CHARTS, NotebookDisplay, notebook_publisher
from eventtrain.subscribers.progress.text import Shown
from tests.support.notebook_kernel import Kernel, kernel

pytest.importorskip("ipykernel")
pytest.importorskip("jupyter_client")

SET_UP = """
import asyncio
import jax.numpy as jnp, numpy as np, eventtrain as et

def new_trainer():
    return et.Trainer(
        lambda state, batch: (state, {"loss": batch, "<b>odd</b>": batch * 2}),
        {"w": jnp.zeros(2)},
        eval_fn=lambda state, batch: {"loss": batch * 3},
        run_dir="run",
    )

trainer = new_trainer()

@trainer.on(et.EpochCompleted)
async def mine(event):
    print(f"mine {event.epoch + 1}")
"""


@pytest.fixture(scope="module")
def notebook_kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with kernel(tmp_path_factory.mktemp("notebook")) as running:
        assert running.run(SET_UP).error == ""
        yield running


def test_every_line_of_300_epochs_and_every_print_beside_the_bar_is_there(notebook_kernel: Kernel) -> None:
    output = notebook_kernel.run(
        "result = trainer.fit([np.float32(1)] * 3, epochs=300, eval_data=[np.float32(1)])"
    )
    assert output.error == ""
    assert re.findall(r"^epoch (\d+): ", output.printed, re.MULTILINE) == [str(n) for n in range(1, 301)]
    assert re.findall(r"^mine (\d+)$", output.printed, re.MULTILINE) == [str(n) for n in range(1, 301)]
    assert not output.of("clear_output")
    [shown] = output.shown
    assert len(output.of("update_display_data")) >= 2
    assert "epoch 300/300: 900/900" in shown
    assert "completed" in shown  # the table
    assert shown.count("<svg") == 2
    assert "&lt;b&gt;odd" in shown
    assert "<b>odd" not in shown
    assert len(shown) < 50_000


def test_fit_async_shows_progress_in_a_cell_that_awaits_it(notebook_kernel: Kernel) -> None:
    output = notebook_kernel.run(
        "result = await new_trainer().fit_async([np.float32(1)] * 3, epochs=5, progress=True)"
    )
    assert output.error == ""
    assert output.printed.count("epoch ") == 5
    [shown] = output.shown
    assert "epoch 5/5: 15/15" in shown


def test_the_stop_button_ends_a_run_and_its_bar(notebook_kernel: Kernel) -> None:
    output = notebook_kernel.run(
        """
def forever(epoch):
    while True:
        yield np.float32(1)

stopped = new_trainer()

@stopped.on(et.StepCompleted, where=lambda event: event.step == 50)
async def press(event):
    print("press the button")

stopped.fit(forever, epochs=1)
""",
        interrupt_at="press the button",
    )
    assert "KeyboardInterrupt" in output.error
    assert "interrupted" in output.shown[0]
    assert notebook_kernel.run("print(stopped.step >= 50, stopped.state['w'])").printed == "True [0. 0.]\n"


def test_a_cell_that_is_run_again_subscribes_once(notebook_kernel: Kernel) -> None:
    cell = "@counted.on(et.RunCompleted)\ndef told(event): print('told')"
    notebook_kernel.run("counted = new_trainer()")
    for _ in range(3):
        assert notebook_kernel.run(cell).error == ""
    output = notebook_kernel.run("counted.fit([np.float32(1)], epochs=1, progress=False)")
    assert output.printed == "told\n"


def test_an_error_in_a_cell_shows_the_lines_of_the_cell(notebook_kernel: Kernel) -> None:
    output = notebook_kernel.run(
        """
def inner(weights):
    return weights @ jnp.ones((3, 3))

def mistaken(state, batch):
    return state, {"loss": inner(state["w"]).mean()}

et.Trainer(mistaken, {"w": jnp.zeros(4)}, run_dir="mistaken").fit([np.float32(1)], epochs=1)
"""
    )
    lines = output.error.splitlines()
    assert len(lines) <= 30, output.error
    assert "contracting dimensions" in output.error
    assert "inner" in output.error
    assert not [line for line in lines if "eventtrain/" in line or "site-packages" in line]


# --- without a kernel -----------------------------------------------------------------------------------------


class Publisher:
    """Stands for the ``display_pub`` of IPython; keeps what was published."""

    def __init__(self, fails: bool = False) -> None:
        self.published: list[str] = []
        self._fails = fails

    def publish(self, data: dict[str, str], metadata: Any, *, transient: Any, update: bool) -> None:
        if self._fails and update:
            raise OSError("the front end is gone")
        self.published.append(data["text/html"])


def window(first: int, names: int) -> et.StepsCompleted:
    columns = {f"m{index}": np.ones(10, np.float32) for index in range(names)}
    return et.StepsCompleted(first_step=first, last_step=first + 9, epoch=0, metrics=columns, step=first + 9)


def test_it_is_a_notebook_only_if_a_kernel_runs_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    for shell, there in (
        (None, False),
        (SimpleNamespace(), False),
        (SimpleNamespace(kernel=1, display_pub=2), True),
    ):
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))
        assert (notebook_publisher() is not None) is there
        assert shows_progress() is there


def test_a_front_end_that_is_gone_is_logged_once_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notebook, "REFRESH_S", 0.001)
    display = NotebookDisplay(Publisher(fails=True), 10, None)
    display.start()
    assert display._thread is not None
    display._thread.join(10)
    display.stop()
    assert caplog.text.count("cannot be drawn any more") == 1


def test_of_many_metrics_some_have_curves_and_the_others_values() -> None:
    publisher = Publisher()
    display = NotebookDisplay(publisher, 10, None)
    display.draw_steps(window(1, 40))
    display.show(Shown({f"m{index}": 1.0 for index in range(40)}))
    display._publish(update=True)
    assert publisher.published[-1].count("<svg") == MOST_CHARTS
    assert "m0=1" not in publisher.published[-1]
    assert f"m{MOST_CHARTS}=1" in publisher.published[-1]


def test_metrics_that_were_named_get_the_curves() -> None:
    publisher = Publisher()
    display = NotebookDisplay(publisher, 10, ("m39",))
    display.draw_steps(window(1, 40))
    display._publish(update=True)
    assert publisher.published[-1].count("<svg") == 1
    assert "<b>m39</b>" in publisher.published[-1]


def test_a_million_steps_are_drawn_in_bounded_room() -> None:
    publisher = Publisher()
    display = NotebookDisplay(publisher, 1_000_000, None)
    columns = {f"m{index}": np.random.default_rng(index).normal(size=1_000_000) for index in range(8)}
    display.draw_steps(et.StepsCompleted(first_step=1, last_step=1_000_000, epoch=0, metrics=columns))
    display._publish(update=True)
    assert len(publisher.published[-1]) < 50_000
