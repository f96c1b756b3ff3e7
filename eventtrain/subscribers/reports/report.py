"""``Report``: what a run came to, as one HTML file that can be mailed, and as Markdown."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from eventtrain._version import __version__
from eventtrain.errors import ConfigurationError, SubscriberError
from eventtrain.events import Event, StepsCompleted
from eventtrain.subscribers._shared.atomic_files import write_atomically
from eventtrain.subscribers._shared.paths import file_path, inside_run_dir
from eventtrain.subscribers._shared.state import SavedState
from eventtrain.subscribers._shared.validation import require_number
from eventtrain.subscribers._shared.worker_thread import WorkerThread
from eventtrain.subscribers.base import RunContext, Subscriber
from eventtrain.subscribers.reports.environment import environment
from eventtrain.subscribers.reports.html import to_html
from eventtrain.subscribers.reports.markdown import to_markdown
from eventtrain.subscribers.reports.run_series import COLLECTED, RunSeries, RunSeriesState
from eventtrain.subscribers.reports.run_summary import REPORTED, ReportFacts
from eventtrain.subscribers.reports.sections import Content, Curve, bars, figures, mapped, sections

try:
    from eventtrain.subscribers.reports import plotting as curves
except ModuleNotFoundError:
    curves = None

CURVES_DRAWN = 24


class ReportState(SavedState):
    """What survives a restart."""

    version: Literal[1] = 1
    facts: ReportFacts
    series: RunSeriesState


class Report(Subscriber):
    """Writes, when a run has ended however it ended, what came of it.

    Result, curves, metrics, changes of hyperparameters, commands, checkpoints, alerts, statistics of the subscribers,
    and the environment: versions and devices.

    Args:
        path: of the HTML, relative to ``run_dir``; None: none.
        markdown: of the Markdown; None: none.
        metrics: names of those whose curves are drawn, in this order; None: all, up to 24.
        title: of the report; the run's id if None.
        finish_timeout_s: how long ``stop`` waits for it to be written, within the trainer's ``drain_timeout_s``.

    The HTML holds everything it shows, and no script. Text of the run is shown as text, markup in it too. Neither file
    names the host, the user or an environment variable; ``run_dir`` and the home folder are cut out of paths. Files are
    replaced whole, from a thread of its own. Of a long run the newest 100 rows of each list are kept, and curves are
    thinned. A run that resumes reports the whole run. List it last, so that it sees the others finish.

    Raises:
        ConfigurationError: matplotlib is missing, or an argument cannot work.
    """

    disable_after = None

    def __init__(
        self,
        path: str | Path | None = "report.html",
        markdown: str | Path | None = "report.md",
        *,
        metrics: tuple[str, ...] | None = None,
        title: str | None = None,
        finish_timeout_s: float = 20.0,
    ) -> None:
        if curves is None:
            raise ConfigurationError(
                "Report needs matplotlib, which draws its curves. Install it: pip install 'eventtrain[plots]'."
            )
        require_number("Report", "finish_timeout_s", finish_timeout_s, at_least=0)
        if isinstance(metrics, str):
            raise ConfigurationError(f"Report(metrics={metrics!r}): needs names, as in ('loss',).")
        if path is None and markdown is None:
            raise ConfigurationError("Report(path=None, markdown=None): there is nothing to write.")
        self._html = None if path is None else file_path(path, "Report")
        self._markdown = None if markdown is None else file_path(markdown, "Report")
        if self._html is not None and self._html == self._markdown:
            raise ConfigurationError(f"Report({str(path)!r}, {str(markdown)!r}): is one file for both.")
        self.events = (*dict.fromkeys([*COLLECTED, *REPORTED, StepsCompleted]),)
        self._metrics = None if metrics is None else tuple(metrics)
        self._title = title
        self._finish_timeout_s = finish_timeout_s
        self._facts = ReportFacts()
        self._series = RunSeries(self._metrics)
        self._run: RunContext | None = None

    async def start(self, run: RunContext) -> None:
        """Begin to listen."""
        if (
            not run.resumed
        ):  # what came before is another call of fit, or an attempt of which nothing was saved
            self._facts, self._series = ReportFacts(), RunSeries(self._metrics)
        self._run = run

    async def handle(self, event: Event) -> None:
        """Take in what it says."""
        if self._run is None:  # an evaluation outside of the run
            return
        self._facts.take(event)
        self._series.take(event)

    async def stop(self) -> None:
        """Write the report. Raises OSError where it cannot be written, SubscriberError where that takes too long."""
        run, self._run = self._run, None
        if run is None:
            return
        statistics = [
            (
                one.name,
                one.state,
                f"{one.delivered:,}",
                f"{one.errors:,}",
                f"{one.dropped:,}",
                f"{one.pending:,}",
                f"{one.lag_s:.1f} s",
                f"{one.handler_cpu_s:.2f} s",
            )
            for one in run.statistics().values()
        ]
        thread = WorkerThread(self.name or "Report", run.publish)
        failures: list[Exception] = []
        thread.put(partial(self._write, run, statistics, failures))
        thread.start()
        in_time = await thread.finish_within(self._finish_timeout_s)
        if failures:
            raise failures[0]
        if not in_time:
            raise SubscriberError(f"The report was not written within {self._finish_timeout_s:g} s.")

    def state_dict(self) -> dict[str, Any]:
        """What is known so far, as plain JSON data."""
        return ReportState(facts=self._facts, series=self._series.saved).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what was known at the cut.

        Raises:
            StateError: another version, or broken.
        """
        owner = self.name or "Report"
        saved = ReportState.parse(owner, state)
        series = RunSeries(self._metrics)
        series.load(owner, saved.series)
        saved.facts.resume()
        self._facts, self._series = saved.facts, series

    def _write(self, run: RunContext, statistics: list[tuple[str, ...]], failures: list[Exception]) -> None:
        assert curves is not None
        try:
            whole = self._content(run, statistics)
        except Exception as error:
            failures.append(error)
            return
        content = mapped(whole, partial(without_folders, run_dir=run.run_dir))
        footer = f"Written by eventtrain {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
        texts = (
            (self._html, partial(to_html, content, curves.LIGHT, curves.DARK, footer)),
            (self._markdown, partial(to_markdown, content, footer)),
        )
        for path, render in texts:
            if path is not None:
                try:
                    write_atomically(inside_run_dir(run.run_dir, path, "Report"), render().encode())
                except Exception as error:  # of one; the other may still work
                    failures.append(error)

    def _content(self, run: RunContext, statistics: list[tuple[str, ...]]) -> Content:
        assert curves is not None
        facts, series = self._facts, self._series
        changing = [
            name
            for name, curve in series.hyperparams.items()
            if len({*(points := curve.points()).lows, *points.highs}) > 1
        ]
        panels = series.panels(changing)
        metrics = [panel for panel in panels if panel.hyperparam is None]
        panels = [*metrics[:CURVES_DRAWN], *panels[len(metrics) : len(metrics) + CURVES_DRAWN]]
        drawn = [
            Curve(panel.name, curves.fragment(panel, series.marked), bars(next(iter(panel.curves))))
            for panel in panels
        ]
        return Content(
            run.run_id if self._title is None else self._title,
            facts.outcome,
            "" if facts.reason == facts.outcome else facts.reason,
            figures(facts),
            sections(facts, series, statistics, environment()),
            drawn,
        )


def without_folders(text: str, run_dir: Path) -> str:
    """``text`` without the folders that say whose machine it is."""
    for folder, name in ((run_dir.absolute(), "run_dir"), (Path.home(), "~")):
        if len(folder.parts) > 1:
            text = text.replace(str(folder), name)
    return text
