"""``eventtrain demo``: a small network learns scikit-learn's handwritten digits with every kind of subscriber live.

The policies see the validation set only. The test set is read once, when training is over. Two batches are spoiled,
so that there is something to recover from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.cli import digits
from eventtrain.cli.digits import Batch

BATCH_SIZE = 32
ACCURACY_WANTED = 0.97
EPOCHS = 100
WARM_UP_EPOCHS = 3
SPOILED = {(6, 0): 30.0, (8, 0): np.nan}
"""Epoch and batch, 0-based -> what its images are multiplied by, as a wrong scale and a broken file would."""
MEASURED_STEPS = 1000
MEASURED_PAIRS = 5


def warm_up(epoch: int, learning_rate: float) -> float:
    """The learning rate of an epoch: it grows at first, and then belongs to the other policies."""
    if epoch < WARM_UP_EPOCHS:
        return digits.LEARNING_RATE * (epoch + 1) / WARM_UP_EPOCHS
    return learning_rate


@dataclass(frozen=True)
class SpoiledBatches:
    """The batches of a loader, two of them spoiled."""

    loader: et.ArrayLoader

    def __len__(self) -> int:
        return len(self.loader)

    def __call__(self, epoch: int) -> Iterator[Batch]:
        """Those of one epoch."""
        for index, (images, labels) in enumerate(self.loader(epoch)):
            yield images * np.float32(SPOILED.get((epoch, index), 1.0)), labels


def all_policies() -> list[et.Subscriber]:
    """Those that decide. NaN is the business of the last one, so the others do not look at it."""
    return [
        subs.LearningRateScheduler(warm_up),
        subs.ReduceLROnPlateau(
            "val_loss", factor=0.5, patience=3, min_delta=1e-3, cooldown=1, min_lr=1e-5, nan="ignore"
        ),
        subs.EarlyStopping("val_loss", min_delta=1e-3, patience=10, nan="ignore", restore_best_weights=True),
        subs.GradientSpike("grad_norm", factor=0.7),
        subs.TerminateOnNaN("rollback"),
    ]


def all_subscribers(
    console: Console, *, every: int | None = None, every_epochs: int | None = None
) -> list[et.Subscriber]:
    """The policies, and those that watch; ``every`` steps or ``every_epochs`` there is a checkpoint."""
    return [
        *all_policies(),
        subs.Checkpointer("checkpoints", every, every_epochs, max_to_keep=3),
        subs.JSONLLogger("events.jsonl"),
        subs.Alerts(
            [
                subs.Rule("loss", non_finite=True, severity="info", event=et.StepCompleted),
                subs.Rule("loss", above=2.0, name="high loss", severity="info", event=et.StepCompleted),
            ]
        ),
        subs.ProgressBar(("loss", "accuracy", "val_loss", "val_accuracy"), every_epochs=5, console=console),
    ]


def all_pictures() -> list[et.Subscriber]:
    """Those that draw when the run has ended; the report comes last, to tell how the others did."""
    return [
        subs.PlotCurves("curves.png", title="Handwritten digits"),
        subs.Report("report.html", "report.md", title="Handwritten digits"),
    ]


@dataclass
class Story:
    """Prints what happens besides the epochs, and remembers what the demo promises to show."""

    console: Console
    decisions: list[et.CommandApplied] = field(default_factory=list[et.CommandApplied])
    restored: list[et.CheckpointRestored] = field(default_factory=list[et.CheckpointRestored])
    commits: list[et.CheckpointCommitted] = field(default_factory=list[et.CheckpointCommitted])

    def tell(self, event: et.Event) -> None:
        """Runs in a worker thread, so that a slow terminal delays nobody."""
        match event:
            case et.CommandApplied():
                self.decisions.append(event)
            case et.HyperparamChanged():
                cause = (
                    f"{event.cause.subscriber} on {event.cause.event}"
                    if event.cause is not None
                    else "a command"
                )
                change = f"{event.name} {event.old:.2g} -> {event.new:.2g}"
                self._line("LR", "yellow", f"step {event.step}: {change}, by {cause}: {event.reason}")
            case et.CheckpointRestored():
                self.restored.append(event)
                what = "state" if event.part == "all" else "weights"
                self._line(
                    "restored",
                    "cyan",
                    f"step {event.step}: {what} of step {event.restored_step}, {event.tag}",
                )
            case et.CheckpointCommitted():
                self.commits.append(event)
                size = f"{event.size_bytes / 1e6:.1f} MB in {event.duration_s:.2f} s"
                self._line(
                    "checkpoint", "green", f"step {event.step}: {Path(event.path).name} committed, {size}"
                )
            case et.CheckpointFailed():
                self._line("checkpoint", "red", f"step {event.step}: failed, {event.error}")
            case et.AlertRaised():
                self._line("alert", "magenta", f"{event.name}: {event.message}")
            case et.AlertResolved():
                self._line("alert over", "magenta", f"{event.name}: {event.message}")
            case et.SubscriberFailed():
                self._line("failed", "red", f"{event.subscriber} on {event.event_kind}: {event.error}")
            case _:
                pass

    def _line(self, what: str, colour: str, text: str) -> None:
        # One print: between two of them the progress bar would draw itself.
        self.console.print(Text.assemble((f"  {what:<10} ", colour), text), soft_wrap=True)


def run_demo(out: Path | None = None, *, console: Console | None = None) -> str | None:
    """Train, measure and print; returns what went wrong, None if nothing did."""
    if digits.load_digits is None or find_spec("matplotlib") is None:
        return "it needs scikit-learn and matplotlib. Install the extra: pip install 'eventtrain[demo]'."
    began_s = perf_counter()
    console = console or Console()
    out = out if out is not None else Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    data, story = digits.split_digits(), Story(console)
    sizes = " + ".join(f"{len(part[1])} to {use}" for part, use in _parts(data))
    spoiled = ", ".join(f"times {factor:g} in epoch {epoch + 1}" for (epoch, _), factor in SPOILED.items())
    console.print(f"\n[bold]Handwritten digits[/]: {sizes}")
    console.print(
        f"A network of {'-'.join(map(str, digits.WIDTHS))} units, trained by AdamW in batches of {BATCH_SIZE}.\n"
        f"Two batches are spoiled: images {spoiled}.\n",
        highlight=False,
    )

    trainer = et.Trainer(
        digits.train_step,
        digits.new_state(seed=0),
        eval_fn=digits.evaluate_step,
        subscribers=[*all_subscribers(console, every_epochs=5), *all_pictures()],
        run_dir=out,
    )
    trainer.on(
        et.CommandApplied | et.HyperparamChanged | et.CheckpointRestored | et.CheckpointCommitted | et.CheckpointFailed
        | et.AlertRaised | et.AlertResolved | et.SubscriberFailed, name="demo output",
    )(story.tell)  # fmt: skip
    loader = et.ArrayLoader(data.train, BATCH_SIZE, seed=0)
    result = trainer.fit(SpoiledBatches(loader), epochs=EPOCHS, eval_data=[data.validation], progress=False)
    statistics = trainer.bus.statistics()
    accuracy = float(trainer.evaluate([data.test])["accuracy"])
    console.print(
        f"\n{result.epochs_completed} epochs, {result.step} steps\n"
        f"[bold]Accuracy on the test set, read once: {accuracy:.4f}[/]\n"
    )
    console.print(_decision_table(story.decisions))
    bare, observed = measure(list(loader(0)), data.validation, out / "measurement")
    console.print(_speed_table(bare, observed))
    console.print(_statistics_table(statistics.values()))
    console.print("Files:", style="bold")
    rows = (out / "events.jsonl").read_bytes().count(b"\n")
    for name, what in (
        ("report.html", "what came of the run: open it in a browser; report.md says the same"),
        ("curves.png", "the metrics, with the changes of the learning rate"),
        ("events.jsonl", f"{rows} rows, one per event of the training sequence"),
        ("checkpoints", f"the last {len(story.commits[-3:])} of {len(story.commits)} checkpoints"),
    ):
        console.print(f"  {out / name}  {what}", soft_wrap=True, highlight=False)
    console.print(f"\nAll in {perf_counter() - began_s:.1f} s.")
    return _problem(accuracy, story, result.stop_reason)


def _parts(data: digits.Digits) -> Sequence[tuple[Batch, str]]:
    return (data.train, "train on"), (data.validation, "decide by"), (data.test, "test on")


def _problem(accuracy: float, story: Story, stop_reason: str) -> str | None:
    if accuracy < ACCURACY_WANTED:
        return f"the accuracy on the test set is {accuracy:.4f}, and {ACCURACY_WANTED} was wanted."
    deciders = {_decider(applied) for applied in story.decisions}
    restored = {event.part for event in story.restored}
    for kept, problem in (
        ("ReduceLROnPlateau" in deciders, "ReduceLROnPlateau never cut the learning rate."),
        ("GradientSpike" in deciders, "GradientSpike found no spike."),
        ("all" in restored, "TerminateOnNaN never rolled back."),
        ("params" in restored, "EarlyStopping did not put the best weights back."),
        (story.commits, "no checkpoint was committed."),
        (
            stop_reason.startswith("early stopping"),
            f"EarlyStopping did not end the run, but {stop_reason!r}.",
        ),
    ):
        if not kept:
            return problem
    return None


def measure(batches: Sequence[Batch], validation: Batch, run_dir: Path) -> tuple[list[float], list[float]]:
    """Steps per second of the bare jitted loop and of an observed run, side by side, in pairs of alternating order.

    Both donate, both take the same batches that already lie on the device, both are timed from the first dispatch until
    the last step is complete.
    """
    on_device = [jax.device_put(batches[i % len(batches)]) for i in range(MEASURED_STEPS)]
    bare_step = jax.jit(digits.train_step, donate_argnums=0)
    state = jax.block_until_ready(bare_step(digits.new_state(seed=1), on_device[0])[0])

    def bare() -> float:
        nonlocal state
        began_s = perf_counter()
        for batch in on_device:
            state, _ = bare_step(state, batch)
        jax.block_until_ready(state)
        return MEASURED_STEPS / (perf_counter() - began_s)

    quiet = Console(quiet=True)
    trainer = et.Trainer(
        digits.train_step,
        digits.new_state(seed=1),
        eval_fn=digits.evaluate_step,
        subscribers=all_subscribers(quiet, every=MEASURED_STEPS // 2),
        run_dir=run_dir,
    )

    def observed() -> float:
        result = trainer.fit(on_device, epochs=1, eval_data=[validation], progress=False)
        return MEASURED_STEPS / result.history[0].duration_s

    bare()  # once each without measuring: to compile, and to let memory settle
    observed()
    return _in_pairs(bare, observed)


def _in_pairs(one: Callable[[], float], other: Callable[[], float]) -> tuple[list[float], list[float]]:
    ones: list[float] = []
    others: list[float] = []
    for pair in range(MEASURED_PAIRS):
        for run, results in ((one, ones), (other, others))[:: 1 if pair % 2 == 0 else -1]:
            results.append(run())
    return ones, others


def _speed_table(bare: Sequence[float], observed: Sequence[float]) -> Table:
    title = f"Steps per second ({MEASURED_PAIRS} alternating pairs of {MEASURED_STEPS} steps)"
    table = Table("", "median", "slowest", "fastest", title=title, title_justify="left", title_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, rates in (
        ("bare jitted loop", bare),
        ("with all subscribers but pictures, 2 checkpoints", observed),
    ):
        table.add_row(name, *(f"{rate:,.0f}" for rate in (median(rates), min(rates), max(rates))))
    ratio = median(b / o for b, o in zip(bare, observed, strict=True))
    table.add_row("time per step, observed / bare", f"{ratio:.3f}", "", "")
    return table


def _decider(applied: et.CommandApplied) -> str:
    return applied.command.cause.subscriber if applied.command.cause is not None else ""


def _decision_table(decisions: Sequence[et.CommandApplied]) -> Table:
    """Who issued which commands how often, and the last reason that was no snapshot's."""
    table = Table("policy", "commands", "the last one", title="What the policies decided")
    table.title_justify, table.title_style = "left", "bold"
    for policy in all_policies():
        name = type(policy).__name__
        own = [applied for applied in decisions if _decider(applied) == name]
        kinds = Counter(applied.command.kind for applied in own)
        last = [applied for applied in own if applied.command.kind != "take_snapshot"][-1:]
        table.add_row(
            name,
            "\n".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none",
            "".join(f"step {applied.step}: {applied.command.reason}" for applied in last),
        )
    return table


def _statistics_table(statistics: Any) -> Table:
    table = Table(
        "subscriber", "delivered", "dropped", "errors", "CPU", title="Subscribers of the training run"
    )
    table.title_justify, table.title_style = "left", "bold"
    for column in table.columns[1:]:
        column.justify = "right"
    for figures in statistics:
        cpu = f"{figures.handler_cpu_s * 1000:,.0f} ms"
        table.add_row(
            figures.name, f"{figures.delivered:,}", f"{figures.dropped:,}", f"{figures.errors:,}", cpu
        )
    return table
