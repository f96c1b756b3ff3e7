"""``Report``: the result of a run, as one HTML file that can be mailed, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from eventtrain._version import __version__
from eventtrain.bus.subscription import SubscriptionStatistics
from eventtrain.errors import ConfigurationError, SubscriberError
from eventtrain.events import Event, StepsCompleted
from eventtrain.subscribers._shared.atomic_files import write_atomically
from eventtrain.subscribers._shared.paths import file_path, require_writable_file
from eventtrain.subscribers._shared.run_series import COLLECTED, MOST_PANELS, RunSeries
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.worker_thread import WorkerThread, in_own_thread
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.reports.html import to_html
from eventtrain.subscribers.reports.markdown import to_markdown
from eventtrain.subscribers.reports.run_summary import REPORTED, RunSummary
from eventtrain.subscribers.reports.sections import (
    Content,
    Drawing,
    Markup,
    bars,
    figures,
    mapped,
    pictures,
    sections,
)
from eventtrain.validation.annotations import checked
from eventtrain.validation.arguments import require_number
from eventtrain.validation.optional_imports import import_optional, require_installed

plotting = import_optional("eventtrain.subscribers.reports.plotting", extra="plots", used_by="Report")


class ReportState(SavedState):
    """State in a checkpoint."""

    version: Literal[1] = 1
    facts: RunSummary
    series: RunSeries


class Report(Subscriber):
    """Writes a report when a run has ended, however it ended.

    It has the result, curves, metrics, changes of hyperparameters, commands, checkpoints, alerts, statistics of the
    subscribers, and the environment: versions and devices.

    Args:
        path: of the HTML file, relative to ``run_dir``; None: none.
        markdown: of the Markdown file; None: none.
        metrics: names of those whose curves are drawn, in this order; None: all, up to 24.
        title: of the report; the run's id if None.
        finish_timeout_s: how long ``stop`` waits until it is written, within the trainer's ``drain_timeout_s``.

    The HTML needs nothing but itself, and has no script. Text of the run is shown as text, with markup escaped. Neither
    file names the host, the user or an environment variable; ``run_dir`` and the home folder are cut out of paths. A
    thread writes the files atomically. Of a long run the newest 100 rows of each list are kept, and curves are
    downsampled. A run that resumes reports the whole run. List it last, so that it sees the others finish.

    Raises:
        ConfigurationError: matplotlib is missing, or an argument is invalid.
    """

    disable_after = None

    @checked
    def __init__(
        self,
        path: str | Path | None = "report.html",
        markdown: str | Path | None = "report.md",
        *,
        metrics: tuple[str, ...] | None = None,
        title: str | None = None,
        finish_timeout_s: float = 20.0,
    ) -> None:
        require_installed(plotting)
        require_number("Report", "finish_timeout_s", finish_timeout_s, at_least=0)
        if isinstance(metrics, str):
            raise ConfigurationError(
                f"Report(metrics={metrics!r}): metrics must be a tuple of names, such as ('loss',)."
            )
        if path is None and markdown is None:
            raise ConfigurationError("Report(path=None, markdown=None): there is nothing to write.")
        self._html = None if path is None else file_path(path, "Report")
        self._markdown = None if markdown is None else file_path(markdown, "Report")
        if self._html is not None and self._html == self._markdown:
            raise ConfigurationError(
                f"Report({str(path)!r}, {str(markdown)!r}): HTML and Markdown must not be one file."
            )
        self.output_paths = tuple(one for one in (self._html, self._markdown) if one is not None)
        self.events = tuple(dict.fromkeys([*COLLECTED, *REPORTED, StepsCompleted]))
        self._metrics = None if metrics is None else tuple(metrics)
        self._title = title
        self._finish_timeout_s = finish_timeout_s
        self._summary = RunSummary()
        self._series = RunSeries(metrics=self._metrics)
        self._run: RunContext | None = None

    async def start(self, run: RunContext) -> None:
        """Starts a new report, unless the run resumes. Raises ConfigurationError if it cannot be written."""
        for path in self.output_paths:
            await in_own_thread(partial(require_writable_file, run.run_dir / path, self.name or "Report"))
        if not run.resumed:
            self._summary, self._series = RunSummary(), RunSeries(metrics=self._metrics)
        self._run = run

    async def handle(self, event: Event) -> None:
        """Adds an event to the report."""
        if self._run is None:  # an evaluation outside the run
            return
        self._summary.add(event)
        self._series.add(event)

    async def stop(self) -> None:
        """Writes the report. Raises OSError if that fails, SubscriberError if it takes too long."""
        run, self._run = self._run, None
        if run is None:
            return
        thread = WorkerThread(self.name or "Report", run.publish)
        failures: list[Exception] = []
        thread.put(partial(self._write, run, list(run.statistics().values()), failures))
        thread.start()
        in_time = await thread.finish_within(self._finish_timeout_s)
        if failures:
            raise failures[0]
        if not in_time:
            raise SubscriberError(f"The report was not written within {self._finish_timeout_s:g} s.")

    def state_dict(self) -> dict[str, Any]:
        """Returns the report so far, as plain JSON data."""
        return ReportState(facts=self._summary, series=self._series).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the report of a checkpoint. Raises StateError for another version or invalid data."""
        saved = ReportState.parse(self.name or "Report", state)
        saved.facts.resume()
        saved.series.metrics = self._metrics
        self._summary, self._series = saved.facts, saved.series

    def _write(
        self, run: RunContext, statistics: Sequence[SubscriptionStatistics], failures: list[Exception]
    ) -> None:
        try:
            content = mapped(self._content(run, statistics), partial(without_folders, run_dir=run.run_dir))
        except Exception as error:
            failures.append(error)
            return
        for path, render in (
            (self._html, partial(to_html, content, plotting.LIGHT, plotting.DARK)),
            (self._markdown, partial(to_markdown, content)),
        ):
            try:
                if path is not None:
                    write_atomically(run.run_dir / path, render().encode())
            except Exception as error:  # of one file; the other may still work
                failures.append(error)

    def _content(self, run: RunContext, statistics: Sequence[SubscriptionStatistics]) -> Content:
        summary, series = self._summary, self._series
        return Content(
            run.run_id if self._title is None else self._title,
            summary.outcome,
            "" if summary.reason == summary.outcome else summary.reason,
            figures(summary),
            f"Written by eventtrain {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
            sections(summary, series, statistics),
            [
                Drawing(panel.name, Markup(plotting.fragment(panel, series.marked)), bars(panel.curves[0]))
                for panel in series.panels(series.changing_hyperparams()[:MOST_PANELS], most=MOST_PANELS)
            ],
            pictures(summary),
        )


def without_folders(text: str, run_dir: Path) -> str:
    """Returns ``text`` without the folders that would identify the machine or the user."""
    for folder, name in ((run_dir.absolute(), "run_dir"), (Path.home(), "~")):
        if len(folder.parts) > 1:
            text = text.replace(str(folder), name)
    return text
