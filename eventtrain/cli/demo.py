"""``eventtrain demo``: a small network learns scikit-learn's handwritten digits with every kind of subscriber.

The policies decide by the validation set only; the test set is used once, after training. Two batches are spoiled, so
that the policies have something to recover from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
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
"""0-based epoch and batch -> factor of its images, as from a wrong scale and a broken file."""
MEASURED_STEPS = 1000
MEASURED_PAIRS = 5


def warm_up(epoch: int, learning_rate: float) -> float:
    """Returns the learning rate of an epoch: it grows at first, and then other policies change it."""
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
        """Yields the batches of one epoch."""
        for index, (images, labels) in enumerate(self.loader(epoch)):
            yield images * np.float32(SPOILED.get((epoch, index), 1.0)), labels


def all_policies() -> list[et.Subscriber]:
    """Returns the policies. Only the last one handles NaN; the others ignore it."""
    return [
        subs.LearningRateScheduler(warm_up),
        subs.ReduceLROnPlateau(
            "val_loss", factor=0.5, patience=3, min_delta=1e-3, cooldown=1, min_lr=1e-5, nan="ignore"
        ),
        subs.EarlyStopping("val_loss", min_delta=1e-3, patience=10, nan="ignore", restore_best_weights=True),
        subs.GradientSpike("grad_norm", factor=0.7),
        subs.TerminateOnNaN("rollback"),
    ]


def all_subscribers(console: Console, checkpointer: subs.Checkpointer) -> list[et.Subscriber]:
    """Returns the policies and the observers."""
    alerts = [
        subs.Rule("loss", non_finite=True, severity="info", event=et.StepCompleted),
        subs.Rule("loss", above=2.0, name="high loss", severity="info", event=et.StepCompleted),
    ]
    return [
        *all_policies(),
        checkpointer,
        subs.JSONLLogger("events.jsonl"),
        subs.Alerts(alerts),
        subs.ProgressBar(("loss", "accuracy", "val_loss", "val_accuracy"), every_epochs=5, console=console),
    ]


@dataclass
class EventPrinter:
    """Prints the events other than epochs, and keeps those that the demo must show."""

    console: Console
    decisions: list[et.CommandApplied] = field(default_factory=list[et.CommandApplied])
    restored: set[str] = field(default_factory=set[str])
    commits: int = 0

    def handle(self, event: et.Event) -> None:
        """Prints one event. Runs in a worker thread, so that a slow terminal delays no other handler."""
        match event:
            case et.CommandApplied():
                self.decisions.append(event)
                return
            case et.HyperparamChanged():
                change = f"{event.name} {event.old:.2g} -> {event.new:.2g}"
                cause = f"{event.cause.subscriber} on {event.cause.event}" if event.cause else "a command"
                line = "LR", "yellow", f"step {event.step}: {change}, by {cause}: {event.reason}"
            case et.CheckpointRestored():
                self.restored.add(event.part)
                part = "state" if event.part == "all" else "weights"
                source = f"{part} of step {event.restored_step}, {event.tag}"
                line = "restored", "cyan", f"step {event.step}: {source}"
            case et.CheckpointCommitted():
                self.commits += 1
                size = f"{event.size_bytes / 1e6:.1f} MB in {event.duration_s:.2f} s"
                line = "checkpoint", "green", f"step {event.step}: {Path(event.path).name} committed, {size}"
            case et.CheckpointFailed():
                line = "checkpoint", "red", f"step {event.step}: failed, {event.error}"
            case et.AlertRaised() | et.AlertResolved():
                label = "alert" if isinstance(event, et.AlertRaised) else "resolved"
                line = label, "magenta", f"{event.name}: {event.message}"
            case et.SubscriberFailed():
                line = "failed", "red", f"{event.subscriber} on {event.event_kind}: {event.error}"
            case _:
                return
        label, colour, text = line
        # One print, because the progress bar may be redrawn between two.
        self.console.print(Text.assemble((f"  {label:<10} ", colour), text), soft_wrap=True)


def run_demo(out: Path | None = None, *, console: Console | None = None) -> str | None:
    """Trains, measures and prints; returns the problem if the demo did not work, else None."""
    if find_spec("sklearn") is None or find_spec("matplotlib") is None:
        return "scikit-learn or matplotlib is not installed. Run: pip install 'eventtrain[demo]'."
    began_s = perf_counter()
    console = console or Console()
    out = out if out is not None else Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    (train, validation, test), printer = digits.split_digits(), EventPrinter(console)
    sizes = " / ".join(str(len(labels)) for _, labels in (train, validation, test))
    spoiled = ", ".join(
        f"multiplied by {factor:g} in epoch {epoch + 1}" for (epoch, _), factor in SPOILED.items()
    )
    console.print(
        f"\n[bold]Handwritten digits[/]: {sizes} images to train, to decide and to test.\n"
        f"A network with {'-'.join(map(str, digits.WIDTHS))} units is trained by AdamW in batches of {BATCH_SIZE}.\n"
        f"Two batches are spoiled: images {spoiled}.\n",
        highlight=False,
    )
    trainer = et.Trainer(
        digits.train_step,
        digits.new_state(seed=0),
        eval_fn=digits.evaluate_step,
        subscribers=[
            *all_subscribers(console, subs.Checkpointer("checkpoints", every_epochs=5, max_to_keep=3)),
            subs.PlotCurves("curves.png", title="Handwritten digits"),
            subs.Report(
                "report.html", "report.md", title="Handwritten digits"
            ),  # last, to report on all others
        ],
        run_dir=out,
    )
    trainer.on(
        et.CommandApplied | et.HyperparamChanged | et.CheckpointRestored | et.CheckpointCommitted | et.CheckpointFailed
        | et.AlertRaised | et.AlertResolved | et.SubscriberFailed, name="demo output",
    )(printer.handle)  # fmt: skip
    loader = et.ArrayLoader(train, BATCH_SIZE, seed=0)
    result = trainer.fit(SpoiledBatches(loader), epochs=EPOCHS, eval_data=[validation], progress=False)
    statistics = trainer.bus.statistics()
    accuracy = float(trainer.evaluate([test])["accuracy"])
    console.print(
        f"\n{result.epochs_completed} epochs, {result.step} steps\n"
        f"[bold]Accuracy on the test set: {accuracy:.4f}[/]\n"
    )
    console.print(_decision_table(printer.decisions))
    console.print(_speed_table(*measure(list(loader(0)), validation, out / "measurement")))
    console.print(_statistics_table(statistics.values()))
    rows = (out / "events.jsonl").read_bytes().count(b"\n")
    console.print("Files:", style="bold")
    for name, contents in (
        ("report.html", "the report of the run, for a browser; report.md has the same contents"),
        ("curves.png", "the metrics, with the changes of the learning rate"),
        ("events.jsonl", f"{rows} rows, one per event of the training sequence"),
        ("checkpoints", f"the last {min(3, printer.commits)} of {printer.commits} checkpoints"),
    ):
        console.print(f"  {out / name}  {contents}", soft_wrap=True, highlight=False)
    console.print(f"\nTotal time: {perf_counter() - began_s:.1f} s.")
    return _problem(accuracy, printer, result.stop_reason)


def _problem(accuracy: float, printer: EventPrinter, stop_reason: str) -> str | None:
    deciders = {_decider(applied) for applied in printer.decisions}
    checks = (
        (
            accuracy >= ACCURACY_WANTED,
            f"the accuracy is {accuracy:.4f}, expected at least {ACCURACY_WANTED}.",
        ),
        ("ReduceLROnPlateau" in deciders, "ReduceLROnPlateau never cut the learning rate."),
        ("GradientSpike" in deciders, "GradientSpike found no spike."),
        ("all" in printer.restored, "TerminateOnNaN never rolled back."),
        ("params" in printer.restored, "EarlyStopping did not restore the best weights."),
        (printer.commits, "no checkpoint was committed."),
        (
            stop_reason.startswith("early stopping"),
            f"the run ended with {stop_reason!r}, not by EarlyStopping.",
        ),
    )
    return next((problem for holds, problem in checks if not holds), None)


def measure(batches: Sequence[Batch], validation: Batch, run_dir: Path) -> tuple[list[float], list[float]]:
    """Returns steps per second of the bare jitted loop and of an observed run, measured in alternating pairs.

    Both donate, use the same batches on the device, and are timed from the first dispatch until the last step is
    complete.
    """
    on_device = [jax.device_put(batches[i % len(batches)]) for i in range(MEASURED_STEPS)]
    bare_step = jax.jit(digits.train_step, donate_argnums=0)
    state = digits.new_state(seed=1)

    def bare() -> float:
        nonlocal state
        began_s = perf_counter()
        for batch in on_device:
            state, _ = bare_step(state, batch)
        jax.block_until_ready(state)
        return MEASURED_STEPS / (perf_counter() - began_s)

    trainer = et.Trainer(
        digits.train_step,
        digits.new_state(seed=1),
        eval_fn=digits.evaluate_step,
        subscribers=all_subscribers(
            Console(quiet=True), subs.Checkpointer("checkpoints", every=MEASURED_STEPS // 2)
        ),
        run_dir=run_dir,
    )

    def observed() -> float:
        result = trainer.fit(on_device, epochs=1, eval_data=[validation], progress=False)
        return MEASURED_STEPS / result.history[0].duration_s

    loops = (bare, observed)
    rates: dict[Any, list[float]] = {loop: [] for loop in loops}
    for pair in range(MEASURED_PAIRS + 1):
        for loop in loops[:: 1 if pair % 2 else -1]:
            rates[loop].append(loop())
    return rates[bare][1:], rates[observed][1:]  # the first pair compiles


def _table(title: str, *columns: str, right: bool = True) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if right and column != columns[0] else "left")
    return table


def _speed_table(bare: Sequence[float], observed: Sequence[float]) -> Table:
    title = f"Steps per second ({MEASURED_PAIRS} alternating pairs of {MEASURED_STEPS} steps)"
    table = _table(title, "", "median", "slowest", "fastest")
    for name, rates in (("bare jitted loop", bare), ("with all subscribers and 2 checkpoints", observed)):
        table.add_row(name, *(f"{rate:,.0f}" for rate in (median(rates), min(rates), max(rates))))
    ratio = median(b / o for b, o in zip(bare, observed, strict=True))
    table.add_row("time per step, observed / bare", f"{ratio:.3f}", "", "")
    return table


def _decider(applied: et.CommandApplied) -> str:
    return applied.command.cause.subscriber if applied.command.cause is not None else ""


def _decision_table(decisions: Sequence[et.CommandApplied]) -> Table:
    """Returns the number of commands of each policy by kind, and its last reason other than a snapshot's."""
    table = _table("Decisions of the policies", "policy", "commands", "last decision", right=False)
    for policy in all_policies():
        name = type(policy).__name__
        own = [applied for applied in decisions if _decider(applied) == name]
        kinds = Counter(applied.command.kind for applied in own)
        last = [applied for applied in own if applied.command.kind != "take_snapshot"][-1:]
        commands = "\n".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none"
        table.add_row(name, commands, "".join(f"step {one.step}: {one.command.reason}" for one in last))
    return table


def _statistics_table(statistics: Any) -> Table:
    table = _table(
        "Subscribers of the training run", "subscriber", "delivered", "dropped", "errors", "CPU time"
    )
    for figures in statistics:
        counts = (f"{count:,}" for count in (figures.delivered, figures.dropped, figures.errors))
        table.add_row(figures.name, *counts, f"{figures.handler_cpu_s * 1000:,.0f} ms")
    return table
