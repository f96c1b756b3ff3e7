"""``NotebookDisplay``: the bar of a run in a notebook, with small curves, redrawn in place through a display handle.

Nothing is redirected: what a program prints goes where it always goes. Jupyter, VS Code and Colab speak this protocol
(``display_data`` and ``update_display_data``), so no ipywidgets are needed.
"""

from __future__ import annotations

import logging
import sys
import threading
import uuid
from collections.abc import Iterable, Sequence
from contextvars import copy_context
from typing import Any

from rich.progress import Progress

from eventtrain.bus.subscription import SubscriptionStatistics
from eventtrain.control.loop_statistics import LoopStatistics
from eventtrain.events import EpochCompleted, StepsCompleted
from eventtrain.notebook import html
from eventtrain.subscribers._shared.curve import Curve
from eventtrain.subscribers._shared.display_text import duration_text
from eventtrain.subscribers._shared.small_chart import small_chart
from eventtrain.subscribers.progress.summary_table import HEAD, Summary
from eventtrain.subscribers.progress.text import Shown, compact, texts

logger = logging.getLogger("eventtrain")

REFRESH_S = 0.5
"""Seconds between two drawings: at most some 60 kB a second, a fraction of what Jupyter lets through."""
MOST_CHARTS = 6
JOIN_S = 5.0
BAR = "height:6px;border-radius:3px;background:rgba(128,128,128,.3);margin:4px 0"
DONE = "height:6px;border-radius:3px;background:#2f86c8"


def notebook_publisher() -> Any:  # Any: IPython is not among the dependencies
    """Returns the ``display_pub`` of the IPython kernel that runs this program; None outside of a notebook."""
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython is not None else None
    return shell.display_pub if getattr(shell, "kernel", None) is not None else None


class NotebookDisplay:
    """A bar over the whole run, metrics and their curves, redrawn every half second by a thread of its own.

    The curves have the windows of steps that arrived: of a bar that is behind, only the newest does.

    Args:
        publisher: of ``notebook_publisher``.
        total: steps of the run; None if unknown.
        metrics: names of those to draw; None: the first six.
    """

    disable = False
    """Whether nothing is drawn, as of a ``RunDisplay``."""
    print_blocks = False
    """A kernel buffers what is printed. On the event loop's thread a line cannot come between a handler's text and its
    line end, which ``print`` writes one after the other."""

    def __init__(self, publisher: Any, total: int | None, metrics: Sequence[str] | None) -> None:
        self._shown = Shown()
        self._publisher = publisher
        self._metrics = metrics
        self._id = uuid.uuid4().hex
        self._clock = Progress(disable=True)  # for the speed and the time left
        self._task = self._clock.add_task("starting", total=total)
        self._train: dict[str, Curve] = {}
        self._evaluation: dict[str, Curve] = {}
        self._lock = threading.Lock()  # the curves are drawn while windows arrive
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._table = ""

    def start(self) -> None:
        """Draws, and continues to in a thread. In the context of the cell, by which output finds its cell."""
        self._publish(update=False)
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._refresh,), name="eventtrain-progress", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Draws for the last time. Blocks until that is done."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(JOIN_S)

    def print_line(self, line: str, parts: Sequence[str] = (), last: Sequence[str] = ()) -> None:
        """Prints a line that stays, on standard output."""
        sys.stdout.write(line + " ".join([*parts, *last]) + "\n")

    def print_table(
        self,
        summary: Summary,
        loop: LoopStatistics,
        subscribers: Iterable[SubscriptionStatistics],
        metrics: Sequence[str] | None,
    ) -> None:
        """Draws the table of the run in place of the newest metrics, after ``stop``."""
        facts = [(name, text) for name, text, _ in summary.facts(loop, subscribers)]
        rows = summary.rows(metrics)
        self._table = html.facts(facts) + (html.table(HEAD, rows) if rows else "")
        self._try_to_publish()

    def epoch(self, number: int, of: int | None) -> None:
        """Shows the number of the epoch in progress."""
        self._clock.update(self._task, description=f"epoch {number}/{of}" if of else f"epoch {number}")

    def advance_to(self, steps: int) -> None:
        """Shows how many steps of this run are complete."""
        self._clock.update(self._task, completed=steps)

    def show(self, shown: Shown) -> None:
        """Sets the lines below the bar."""
        self._shown = shown

    def expect(self, steps: int) -> None:
        """Sets the number of steps of the run, if it was unknown."""
        if self._clock.tasks[0].total is None:
            self._clock.update(self._task, total=steps)

    def draw_steps(self, event: StepsCompleted) -> None:
        """Adds a window to the curves."""
        steps = range(event.first_step, event.last_step + 1)
        with self._lock:
            for name, column in event.metrics.items():
                if (curve := self._curve(self._train, name, name)) is not None:
                    curve.add(steps, column)

    def draw_epoch(self, event: EpochCompleted) -> None:
        """Adds the values of the evaluation at the end of an epoch to the curves."""
        values = {name: value for name, value in event.metrics.items() if name.startswith("val_")}
        with self._lock:
            for name, value in values.items():
                if (curve := self._curve(self._evaluation, name.removeprefix("val_"), name)) is not None:
                    curve.put(event.step, value)

    def _curve(self, curves: dict[str, Curve], name: str, shown_as: str) -> Curve | None:
        if self._metrics is not None and not {name, shown_as} & set(self._metrics):
            return None
        if name not in curves and len({*self._train, *self._evaluation, name}) > MOST_CHARTS:
            return None
        return curves.setdefault(name, Curve())

    def _refresh(self) -> None:
        while not self._stopping.wait(REFRESH_S):
            if not self._try_to_publish():
                return
        self._try_to_publish()

    def _try_to_publish(self) -> bool:
        try:
            self._publish(update=True)
        except Exception:  # the front end is gone, and training is not to notice
            logger.warning("The progress of the run cannot be drawn any more.", exc_info=True)
            return False
        return True

    def _publish(self, *, update: bool) -> None:
        data = {"text/html": self._html(), "text/plain": self._line()}
        self._publisher.publish(data, {}, transient={"display_id": self._id}, update=update)

    def _line(self) -> str:
        task = self._clock.tasks[0]
        parts = [
            f"{task.completed:.0f}/{task.total:.0f}" if task.total else f"{task.completed:.0f} steps",
            "" if task.speed is None else f"{compact(task.speed)} steps/s",
            duration_text(task.elapsed or 0.0),
            f"{duration_text(task.time_remaining)} left" if task.time_remaining else "",
        ]
        return f"{task.description}: {', '.join(filter(None, parts))}"

    def _html(self) -> str:
        task = self._clock.tasks[0]
        share = f"{task.percentage:.1f}%" if task.total else "0"
        bar = f'<div style="{BAR}"><div style="{DONE};width:{share}"></div></div>'
        with self._lock:
            names = dict.fromkeys([*self._train, *self._evaluation])
            charts = [small_chart(name, self._train.get(name), self._evaluation.get(name)) for name in names]
        others = [name for name in self._shown.metrics if name not in names]
        lines = "".join(
            f'<div style="{style}">{html.text("  ".join(parts))}</div>'
            for parts, style in ((texts(self._shown.metrics, others), ""), (self._shown.state, html.SOFT))
            if parts and not self._table
        )
        return html.box(f"<div>{html.text(self._line())}</div>", bar, lines, self._table, html.row_of(charts))
