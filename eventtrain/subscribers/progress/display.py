"""``RunDisplay``: the bar of a run, and below it the lines that fit into the width of the console."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.file_proxy import FileProxy
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from eventtrain.bus.subscription import SubscriptionStatistics
from eventtrain.control.loop_statistics import LoopStatistics
from eventtrain.events import EpochCompleted, StepsCompleted
from eventtrain.subscribers.progress.notebook import notebook_publisher
from eventtrain.subscribers.progress.summary_table import Summary
from eventtrain.subscribers.progress.text import Shown, compact, fitted, texts

NARROW = 80
"""Consoles with fewer columns show no times of day, and no bar at all below half of that."""
LINES = 3
"""Lines of a terminal that the metrics of an epoch may take."""


def shows_progress() -> bool:
    """Returns whether a user is likely to look: standard error is a terminal, or this is a notebook."""
    return _is_terminal() or notebook_publisher() is not None


def can_redraw(console: Console, *, given: bool) -> bool:
    """Returns whether lines on ``console`` can be redrawn; if not, a bar would be a new line at each refresh.

    Args:
        console: on standard error, unless it is ``given``: made by the user, who knows what it writes to.
    """
    if console.is_jupyter:
        return False  # rich would redirect the output of all threads into a widget that it clears
    if given:
        return console.is_interactive
    # FORCE_COLOR makes rich take a pipe for a terminal, and many CI systems have a terminal that keeps every line.
    return _is_terminal() and console.is_interactive and os.environ.get("CI", "").lower() not in ("1", "true")


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()  # pyright: ignore[reportUnnecessaryComparison]


class RunDisplay(Progress):
    """A bar over the whole run, with one line of metrics and one of everything else below it.

    Args:
        console: to draw on.
        total: steps of the run; None if unknown.
        live: whether anything is drawn at all.
    """

    print_blocks = True
    """A terminal may take nothing (Ctrl-S), so a line is printed in a thread."""

    def __init__(self, console: Console, total: int | None, *, live: bool) -> None:
        self.shown = Shown()
        self._drawn_on = console
        column = partial(Column, no_wrap=True)
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}", markup=False, table_column=column())
        ]
        if console.width >= NARROW // 2:
            columns.append(BarColumn(bar_width=None, table_column=Column(ratio=1)))
        columns += [MofNCompleteColumn(table_column=column()), _Rate(table_column=column())]
        if console.width >= NARROW:
            columns.append(TimeElapsedColumn(table_column=column()))
        columns.append(_Left(compact=True, table_column=column()))
        super().__init__(*columns, console=console, transient=True, expand=True, disable=not live)
        self._run = self.add_task("starting", total=total)
        self._proxies: list[FileProxy] = []

    def start(self) -> None:
        """Draws; what is printed or logged meanwhile appears above the bar."""
        real = (sys.stdout, sys.stderr)
        super().start()  # puts a proxy before each of the two, which prints above the bar
        proxies = (stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, FileProxy))
        self._proxies = [proxy for proxy in proxies if proxy.rich_proxied_file in real]
        # A handler that has the stream itself would write into the bar, and the bar would be drawn over it.
        for proxy in self._proxies:
            _hand_over(proxy.rich_proxied_file, proxy)

    def stop(self) -> None:
        """Removes the bar, and restores the streams."""
        super().stop()
        for proxy in self._proxies:
            _hand_over(proxy, proxy.rich_proxied_file)
        self._proxies = []

    def print_line(self, line: str, parts: Sequence[str] = (), last: Sequence[str] = ()) -> None:
        """Prints a line that stays, with as many ``parts`` as fit, above the bar. Blocks while the terminal does."""
        if not self.disable:  # else a line may be of any length: it goes to a file
            width = LINES * self._drawn_on.width - sum(cell_len(text) + 1 for text in (line, *last))
            parts = [fitted(parts, width, gap=" ")]
        # soft_wrap: not broken into lines, also if the console is a pipe of 80 columns.
        text = line + " ".join([*parts, *last])
        self._drawn_on.print(text, markup=False, highlight=False, soft_wrap=self.disable)

    def print_table(
        self,
        summary: Summary,
        loop: LoopStatistics,
        subscribers: Iterable[SubscriptionStatistics],
        metrics: Sequence[str] | None,
    ) -> None:
        """Prints the table of the run, after ``stop``."""
        table = summary.table(loop, subscribers, metrics, width=self._drawn_on.width)
        self._drawn_on.print(table)

    def epoch(self, number: int, of: int | None) -> None:
        """Shows the number of the epoch in progress."""
        self.update(self._run, description=f"epoch {number}/{of}" if of else f"epoch {number}")

    def advance_to(self, steps: int) -> None:
        """Shows how many steps of this run are complete."""
        self.update(self._run, completed=steps)

    def show(self, shown: Shown) -> None:
        """Sets the lines below the bar."""
        self.shown = shown

    def draw_steps(self, event: StepsCompleted) -> None:
        """Does nothing: there are no curves on a terminal."""

    def draw_epoch(self, event: EpochCompleted) -> None:
        """Does nothing: there are no curves on a terminal."""

    def expect(self, steps: int) -> None:
        """Sets the number of steps of the run, if it was unknown."""
        if self.tasks[0].total is None:
            self.update(self._run, total=steps)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yields the bar and the lines below it, each no wider than the console is now."""
        yield self.make_tasks_table(self.tasks)
        width, shown = self._drawn_on.width - 2, self.shown
        for parts, style in ((texts(shown.metrics), "none"), (shown.state, "dim")):
            if parts:
                yield Text("  " + fitted(parts, width), style=style, no_wrap=True, overflow="crop")


class _Left(TimeRemainingColumn):
    """The time left, if it is known."""

    def render(self, task: Task) -> Text:
        if task.total is None or task.speed is None or task.finished:
            return Text("")
        return Text.assemble(super().render(task), " left")


class _Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{compact(speed)} steps/s", style="cyan")


def _hand_over(old: object, new: Any) -> None:  # Any: a FileProxy is a stream in all but its type
    """Makes the log handlers that write to ``old`` write to ``new``."""
    for logger in [logging.root, *logging.Logger.manager.loggerDict.values()]:
        for handler in logger.handlers if isinstance(logger, logging.Logger) else ():
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)
