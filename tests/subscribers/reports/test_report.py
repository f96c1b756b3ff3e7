"""Report: HTML that needs nothing else, Markdown with the same facts, and nothing that says whose machine it was."""

from __future__ import annotations

import errno
import getpass
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import anyio.to_thread
import jax
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.events.commands import ScaleHyperparam, TakeSnapshot
from eventtrain.subscribers._shared import atomic_files
from eventtrain.subscribers._shared.curve import Curve
from eventtrain.subscribers._shared.display_text import duration_text, size_text
from eventtrain.subscribers.reports import report, run_summary
from eventtrain.subscribers.reports.markdown import escaped
from eventtrain.subscribers.reports.run_summary import RunSummary
from eventtrain.subscribers.reports.sections import bars, number
from eventtrain.testing import RecordingSubscriber, ScriptedStep
from eventtrain.validation.optional_imports import MissingModule
from tests.conftest import python_path
from tests.support.models import batches, new_state, step_fn
from tests.support.saved_in_memory import MemoryCheckpointer

pytestmark = pytest.mark.filterwarnings("error")
VOID = {"meta", "br", "hr", "img", "link", "input"}
SVG_SHAPES = {"path", "use", "rect", "circle", "line", "polyline", "polygon"}


class Page(HTMLParser):
    """A page as a reader sees it: its text, and everything that might lead elsewhere or run."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = ""
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.outside: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        if tag in ("td", "th", "dt", "dd", "h1"):
            self.cells.append("")
        for name, value in attrs:
            if (tag, name) == ("img", "src") and re.fullmatch(r"data:image/png;base64,[\w+/=]+", value or ""):
                continue  # an image of a sample
            if name.startswith("on") or re.search(r"https?:|//|url\((?!#)|data:text|javascript", value or ""):
                self.outside.append(f"{tag} {name}={value}")
            if name in ("src", "href", "xlink:href", "action") and not (value or "").startswith("#"):
                self.outside.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] in ("td", "th", "dt", "dd", "h1"):
            self.cells[-1] += data
        if self._open and self._open[-1] == "style":
            self.outside += re.findall(r"url\(|@import|https?:", data)


def pages(run_dir: Path) -> tuple[Page, str]:
    """The HTML, read, and the Markdown; the first needs nothing but itself."""
    page = Page((run_dir / "report.html").read_text())
    assert page.outside == []
    assert not {"script", "iframe", "object", "embed", "link", "form", "base"} & set(page.tags)
    return page, (run_dir / "report.md").read_text()


def scripted(run_dir: Path, *subscribers: et.Subscriber, **metrics: Any) -> tuple[et.Trainer, ScriptedStep]:
    script = ScriptedStep(
        metrics or {"loss": [3.0, 2.5, 2.0, 1.5, 1.25, 1.0]},
        eval_metrics={"accuracy": [0.25, 0.75, 0.5]},
        steps_per_epoch=2,
        learning_rate=0.5,
    )
    trainer = et.Trainer(
        script.step_fn,
        script.state,
        eval_fn=script.eval_fn,
        subscribers=[subs.Report(), *subscribers],
        run_dir=run_dir,
        run_id="digits-7",
    )
    return trainer, script


def test_both_files_hold_what_came_of_the_run(tmp_path: Path) -> None:
    trainer, script = scripted(
        tmp_path,
        subs.Alerts([subs.Rule("accuracy", below=0.5, name="weak", event=et.EvalCompleted)]),
        subs.Checkpointer("checkpoints", every_epochs=1, max_to_keep=2),
    )

    @trainer.on(et.EpochCompleted, lag=0, name="halve")
    async def halve(event: et.EpochCompleted, control: et.Control) -> None:
        if event.epoch == 0:
            control.scale_hyperparam("learning_rate", 0.5, reason="epoch 0 is over")

    @trainer.on(et.StepCompleted, where=lambda event: event.step == 3, name="fragile")
    async def fragile(event: et.StepCompleted) -> None:
        raise ValueError("no such thing")

    trainer.fit(script.data, epochs=3, eval_data=script.eval_data)
    page, text = pages(tmp_path)
    assert page.cells[0] == "digits-7"
    assert page.text.count("completed") >= 2
    rows = [
        ("loss", "1.125", "1.125", "6", "1.125", "2.75"),
        ("val_accuracy", "0.5", "0.75", "4", "0.25", "0.75"),
        ("2", "learning_rate", "0.5 → 0.25", "halve", "epoch 0 is over"),
        ("2", "halve", "scale_hyperparam(name=learning_rate, factor=0.5)", "epoch 0 is over"),
        ("3", "fragile", "failed on step_completed: ValueError: no such thing"),
    ]
    for row in rows:
        assert "\0".join(row) in "\0".join(page.cells), row
        assert f"| {' | '.join(map(escaped, row))} |" in text, row
    facts = {
        "steps": "6",
        "epochs completed": "3",
        "halve: scale_hyperparam": "1, the last at step 2",
        "jax": jax.__version__,
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "host cores": None,
        "devices": None,
    }
    for name, value in facts.items():
        assert name in page.cells
        assert f"- {escaped(name)}: {escaped(value or '')}" in text
        assert value is None or page.cells[page.cells.index(name) + 1] == value or name == "steps"
    for word in ("3 committed, 0 failed", "step-00000006", "weak", "fragile"):
        assert word in page.text
        assert escaped(word) in text
    assert (
        page.tags.count("svg") == 4
    )  # loss, learning_rate as a metric, val_accuracy, and the hyperparameter
    assert re.search(r"\| loss \| [▁-█]{6} \|", text)
    assert "prefers-color-scheme: dark" in (tmp_path / "report.html").read_text()
    statistics = {
        row.split(" | ")[0][2:]: row.split(" | ")[1:] for row in text.splitlines() if " 0.0 s " in row
    }
    assert statistics["fragile"][:3] == ["active", "0", "1"]
    assert int(statistics["Report"][1]) > 20


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=http://evil.example/x onerror=alert(1)>',
    "</svg></style><h1>",
    "a|b",
    "`code`\n# heading",
    "[link](http://evil.example)",
    "损失 \U0001f600",
    "\x00\x1b[31m\u202e",
    "&lt;b&gt;",
    "$x^{",
    "",
]


async def test_markup_in_names_and_errors_is_text(tmp_path: Path) -> None:
    subscriber = subs.Report(title=HOSTILE[0])
    control: Any = None
    await subscriber.start(et.RunContext("run", tmp_path, control, lambda event: None))
    cause = et.Cause(event="x", step=1, subscriber=HOSTILE[1])
    columns = {name: np.array([1.0, 2.0]) for name in HOSTILE}
    for event in (
        et.RunStarted(),
        et.EpochStarted(epoch=0, hyperparams={HOSTILE[1]: 1.0}),
        et.StepsCompleted(step=2, first_step=1, last_step=2, epoch=0, metrics=columns),
        et.HyperparamChanged(step=2, name=HOSTILE[1], path="", old=1.0, new=2.0, reason=HOSTILE[2], cause=cause),
        et.EvalCompleted(step=2, epoch=0, metrics=dict.fromkeys(HOSTILE, 0.5), steps=1, duration_s=0),
        et.EpochCompleted(step=2, epoch=0, metrics=dict.fromkeys(HOSTILE, 1.5), steps=2, duration_s=0),
        et.CommandApplied(step=2, command=ScaleHyperparam(name=HOSTILE[3], factor=0.1, reason=HOSTILE[4], cause=cause)),
        *(et.SampleTaken(step=2, name=name, media="text", value=name) for name in HOSTILE),
        et.SampleTaken(step=2, name=HOSTILE[1], media="image", value=b"\x89PNG\r\n\x1a\n"),
        *(et.AlertRaised(name=name, message=name) for name in HOSTILE),
        *(et.SubscriberFailed(subscriber=name, event_kind="x", error=name) for name in HOSTILE),
        et.CheckpointFailed(path=f"/x/{HOSTILE[1]}", error=HOSTILE[0]),
        et.RunFailed(step=2, error=f"ValueError: {HOSTILE[1]}"),
    ):  # fmt: skip
        await subscriber.handle(event)
    await subscriber.stop()
    page, text = await anyio.to_thread.run_sync(pages, tmp_path)
    assert page.cells[0] == HOSTILE[0]
    assert page.tags.count("h1") == page.tags.count("img") == 1
    assert HOSTILE[1] in page.cells
    assert "\\x00\\x1b[31m\\u202e" in page.cells
    assert page.cells.count("损失 \U0001f600") >= 3
    assert all(c.isprintable() or c == "\n" for c in text)
    assert not re.search(r"(?<!\\)[<>]|(?<!\\)\[", text)
    widths = {
        line.count(" | ") for line in text.splitlines() if line.startswith("| ") and "raised" not in line
    }
    assert widths <= {1, 2, 3, 4, 5, 7}
    assert [line for line in text.splitlines() if line.startswith("# ")] == [f"# {escaped(HOSTILE[0])}"]


def test_nothing_says_whose_machine_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home-of-alice"))
    monkeypatch.setenv("PLANTED", "planted-secret")
    monkeypatch.setattr(platform, "node", lambda: "planted-host")
    monkeypatch.setattr(getpass, "getuser", lambda: "planted-user")
    run_dir = tmp_path / "home-of-alice" / "runs" / "7"
    trainer, script = scripted(run_dir, subs.Checkpointer("checkpoints", every_epochs=1))

    @trainer.on(et.EpochCompleted)
    async def fails(event: et.EpochCompleted) -> None:
        home = Path.home()
        raise OSError(errno.EACCES, f"cannot write {run_dir}/logs/a and {home}/.cache/b")

    trainer.fit(script.data, epochs=1)
    page, text = pages(run_dir)
    for shown in (page.text, text, (run_dir / "report.html").read_text()):
        assert "alice" not in shown
        assert str(tmp_path) not in shown
        assert "planted" not in shown
        assert platform.node() not in shown
        assert (
            os.uname().nodename not in re.sub(r"localhost", "", shown) or os.uname().nodename == "localhost"
        )
    assert "run_dir/logs/a and ~/.cache/b" in page.text


@pytest.mark.parametrize("how", ["failed", "interrupted", "stopped", "in the first epoch"])
def test_a_run_that_ends_otherwise_is_reported_and_says_so(tmp_path: Path, how: str) -> None:
    trainer, script = scripted(tmp_path, loss=[float("nan"), 2.0, 1.0])

    @trainer.on(et.StepCompleted, lag=0, on_error="fail", where=lambda event: event.step == 3)
    async def end(event: et.StepCompleted, control: et.Control) -> None:
        if how == "failed":
            raise RuntimeError("<b>no more</b>")
        control.stop("preempted" if how == "interrupted" else "enough")

    data: Any = [np.zeros((), np.float32)] * 9 if how == "in the first epoch" else script.data
    if how == "failed":
        with pytest.raises(et.SubscriberError):
            trainer.fit(data, epochs=4)
    else:
        trainer.fit(data, epochs=4)
    page, text = pages(tmp_path)
    expected = {
        "failed": ("failed", "RuntimeError: <b>no more</b>"),
        "interrupted": ("interrupted", "preempted"),
    }.get(how, ("stopped", "enough"))
    assert f"{expected[0]}: " in page.text
    for word in expected:
        assert word in page.text
        assert escaped(word) in text
    if how == "in the first epoch":
        assert "no epoch was completed" in text
        assert f"| loss | {number(1.0)} |" in text


def test_a_resumed_run_reports_the_whole_run(tmp_path: Path) -> None:
    def trainer(*others: et.Subscriber) -> tuple[et.Trainer, Any]:
        subscriber = subs.Report()
        return et.Trainer(
            step_fn, new_state(), subscribers=[subscriber, *others], run_dir=tmp_path
        ), subscriber

    data, keeper = batches(4), MemoryCheckpointer(every=1)
    whole, _ = trainer(keeper)
    whole.fit(data, epochs=3)
    expected = metrics_of((tmp_path / "report.md").read_text())
    for step in (3, 8):
        resumed, subscriber = trainer(keeper)
        resumed.fit(data, epochs=3, resume=step)
        text = (tmp_path / "report.md").read_text()
        assert metrics_of(text) == expected
        assert "- epochs completed: 3" in text
        assert re.search(rf"- resumed: \d x: .*step {step}\n", text)
        assert len(subscriber._series.steps["loss"]) == 12
    again = RunSummary(earlier_s=5.0)
    again.add(et.RunStarted(time=datetime(2026, 1, 1, tzinfo=UTC)))
    again.add(et.RunCompleted(reason="completed", time=datetime(2026, 1, 1, 0, 1, tzinfo=UTC)))
    again.resume()
    assert again.duration_s == 65.0


def metrics_of(text: str) -> str:
    return text[text.index("## Metrics") : text.index("## Commands")]


def test_a_second_fit_is_reported_alone(tmp_path: Path) -> None:
    trainer, script = scripted(tmp_path)
    for first in (0, 4):
        trainer.fit(script.data, epochs=2, eval_data=script.eval_data)
        text = (tmp_path / "report.md").read_text()
        assert "- epochs completed: 2" in text
        assert ("began at step: 4" in text) == (first == 4)
    trainer.evaluate(script.eval_data)
    assert (tmp_path / "report.md").read_text() == text


def test_lists_are_bounded_and_say_how_much_there_was() -> None:
    facts = RunSummary()
    for step in range(1000):
        facts.add(et.AlertRaised(step=step, name=f"a{step}", message="x" * 10_000))
        facts.add(et.CommandApplied(step=step, command=TakeSnapshot(tag="t")))
        facts.add(et.EpochCompleted(step=step, epoch=step, metrics={f"m{step}": 1.0}, steps=1, duration_s=0))
    assert (facts.alerts.total, len(facts.alerts.rows)) == (1000, run_summary.MOST_ROWS)
    assert facts.alerts.rows[-1][0] == "999"
    assert max(len(cell) for row in facts.alerts.rows for cell in row) == run_summary.MOST_TEXT
    assert len(facts.metrics) == run_summary.MOST_NAMES
    assert facts.tallies[0].count == 1000
    assert facts.commands.total == 0
    assert len(json.dumps(facts.to_json())) < 200_000
    assert RunSummary().alerts.total == 0  # defaults are not shared


def test_what_cannot_be_written_is_said_and_the_other_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = RecordingSubscriber(et.SubscriberFailed)
    script = ScriptedStep({"loss": [1.0]})
    trainer = et.Trainer(
        script.step_fn,
        script.state,
        subscribers=[subs.Report("folder/r.html", "r.md"), failed],
        run_dir=tmp_path,
    )

    @trainer.on(et.RunStarted)
    def replace_the_folder(event: et.RunStarted) -> None:
        (tmp_path / "folder").rmdir()
        (tmp_path / "folder").write_text("no folder")

    trainer.fit(script.data, epochs=1)
    assert "cannot write" in failed.of(et.SubscriberFailed)[0].error
    assert "# " in (tmp_path / "r.md").read_text()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_files.os, "fsync", full)
    trainer, script = scripted(tmp_path / "full", failed)
    assert trainer.fit(script.data, epochs=1).step == 2
    assert "No space left on device" in failed.of(et.SubscriberFailed)[-1].error
    assert not (tmp_path / "full").exists()  # it was empty


def test_a_disk_that_hangs_delays_the_end_by_no_more_than_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(report, "write_atomically", lambda path, data: released.wait(60))
    failed = RecordingSubscriber(et.SubscriberFailed)
    script = ScriptedStep({"loss": [1.0]})
    try:
        et.Trainer(
            script.step_fn,
            script.state,
            subscribers=[subs.Report(finish_timeout_s=0.2), failed],
            run_dir=tmp_path,
        ).fit(script.data, epochs=1)
    finally:
        released.set()
    assert "was not written within 0.2 s" in failed.of(et.SubscriberFailed)[-1].error


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: subs.Report("../report.html"), "leads out of run_dir"),
        (lambda: subs.Report(markdown="x/../../report.md"), "leads out of run_dir"),
        (lambda: subs.Report(None, None), "nothing to write"),
        (lambda: subs.Report("r", "./r"), "must not be one file"),
        (lambda: subs.Report(metrics="loss"), "must be a tuple of names"),  # type: ignore[arg-type]
        (lambda: subs.Report(finish_timeout_s=float("nan")), "finish_timeout_s=nan"),
    ],
)
def test_what_cannot_work_is_refused_by_name(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(et.ConfigurationError, match=r"Report\(") as caught:
        make()
    assert said in str(caught.value)


def test_without_matplotlib_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = MissingModule(ModuleNotFoundError("No module named 'matplotlib'"), "plots", "Report")
    monkeypatch.setattr(report, "plotting", missing)
    with pytest.raises(et.ConfigurationError, match=r"pip install 'eventtrain\[plots\]'"):
        subs.Report()


def test_a_broken_state_is_refused() -> None:
    state = subs.Report().state_dict()
    assert subs.Report().state_dict() == json.loads(json.dumps(state))
    state["series"]["steps"]["loss"] = {"version": 1, "width": 2, "room": 0, "data": "AAAAAAAAAAA="}
    with pytest.raises(et.errors.StateError, match="Report cannot load its state"):
        subs.Report().load_state_dict(state)


def test_figures_are_for_people() -> None:
    assert [duration_text(s) for s in (0.04, 59.94, 61, 3725.2, 90061)] == [
        "0.0 s",
        "59.9 s",
        "0:01:01",
        "1:02:05",
        "25:01:01",
    ]
    assert [size_text(b) for b in (0, 999, 1_234_567, 10**16)] == ["0 B", "999 B", "1.2 MB", "10000.0 TB"]
    curve = Curve()
    curve.add([1, 2, 3, 4], [0.0, np.nan, 1.0, np.inf])
    assert bars(curve) == "▁·█·"
    assert bars(Curve()) == ""
    flat = Curve()
    flat.add([1, 2], [-1.7e308, 1.7e308])
    assert bars(flat) == "··"


async def test_it_is_written_on_every_event_loop_without_blocking_it(tmp_path: Path) -> None:
    trainer, script = scripted(tmp_path)
    await trainer.fit_async(script.data, epochs=2, eval_data=script.eval_data)
    page, _ = await anyio.to_thread.run_sync(pages, tmp_path)
    assert "digits-7" in page.text


KILLED = """
import os, signal, sys, time
import jax.numpy as jnp
import numpy as np
import optax
import eventtrain as et
from eventtrain import subscribers as subs

run_dir, kill_at = sys.argv[1], int(sys.argv[2])
optimiser = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)

def step_fn(state, batch):
    return {**state, "w": state["w"] * 0.9 + batch}, {"loss": state["w"] + batch}

state = {"w": jnp.zeros(()), "opt_state": optimiser.init(jnp.zeros(()))}
history = subs.History(steps=True)
trainer = et.Trainer(
    step_fn, state, run_dir=run_dir, run_id="killed",
    subscribers=[
        history, subs.PlotCurves("curves.svg"), subs.Report(), subs.Checkpointer("ck", every=5, at_end=False)
    ],
)

@trainer.on(et.StepCompleted, where=lambda event: event.step == kill_at, lag=0)
def kill(event):
    while not any(trainer.run_dir.glob("ck/step-*")):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

@trainer.on(et.EpochCompleted, lag=0)
async def shrink(event, control):
    control.scale_hyperparam("learning_rate", 0.5, reason="epoch")

trainer.fit([np.float32(n) for n in range(6)], epochs=3, resume=True)
frames = [history.to_dataframe("steps"), history.to_dataframe().drop(columns="duration_s")]
print("\\n".join(frame.to_csv(index=False) for frame in frames))
"""


@pytest.mark.slow
@pytest.mark.allow_blocking
def test_a_killed_run_that_goes_on_ends_with_the_history_and_curves_of_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    env = os.environ | {"PYTHONPATH": python_path(), "JAX_PLATFORMS": "cpu"}

    def run(folder: str, kill_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), str(tmp_path / folder), str(kill_at)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)

    with ThreadPoolExecutor() as pool:
        undisturbed, killed = pool.map(run, ("whole", "killed"), (-1, 13))
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed/report.html").exists()
    resumed = run("killed", -1)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == undisturbed.stdout
    texts = [(tmp_path / folder / "report.md").read_text() for folder in ("whole", "killed")]
    assert metrics_of(texts[0]) == metrics_of(texts[1])
    assert "- epochs completed: 3" in texts[1]
    assert re.search(r"- resumed: 1 x: step (5|10)\n", texts[1])
    pictures = [ElementTree.parse(tmp_path / folder / "curves.svg") for folder in ("whole", "killed")]
    drawn = [[path.get("d") for path in one.iter("{http://www.w3.org/2000/svg}path")] for one in pictures]
    assert drawn[0] == drawn[1]
    pages(tmp_path / "killed")
