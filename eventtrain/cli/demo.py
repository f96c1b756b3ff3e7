"""``eventtrain demo``: a small network learns scikit-learn's handwritten digits with every kind of subscriber.

The policies decide by the validation set only; the test set is used once, after training. Two batches are spoiled, so
that the policies have something to recover from.
"""

from __future__ import annotations

import sys
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
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from rich.text import Text

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.validation.optional_imports import import_optional

BATCH_SIZE = 32
ACCURACY_WANTED = 0.97
EPOCHS = 100
WARM_UP_EPOCHS = 3
SPOILED = {(6, 0): 30.0, (8, 0): np.nan}
"""0-based epoch and batch -> factor of its images, as from a wrong scale and a broken file."""
MEASURED_STEPS = 1000
MEASURED_PAIRS = 5

WIDTHS = (64, 512, 256, 10)
DROPOUT = 0.4
SPLIT_SEED = 0
LEARNING_RATE = 1e-3

State = dict[str, Any]
Batch = tuple[Any, Any]


def split_digits() -> tuple[Batch, Batch, Batch]:
    """Returns 1,797 images of 8 x 8 pixels: 70% to train, 15% to decide, 15% for one test at the end.

    They are standardised with the mean and the deviation of the training part.
    """
    digits: Any = import_optional("sklearn.datasets", extra="demo", used_by="The demo").load_digits()
    images, labels = digits.data.astype(np.float32), digits.target.astype(np.int32)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    parts = np.split(order, [int(0.7 * len(order)), int(0.85 * len(order))])
    mean, deviation = images[parts[0]].mean(), images[parts[0]].std()
    train, validation, test = (((images[part] - mean) / deviation, labels[part]) for part in parts)
    return train, validation, test


optimiser = optax.inject_hyperparams(optax.adamw)(learning_rate=LEARNING_RATE, weight_decay=1e-2)


def new_state(seed: int) -> State:
    """Returns weights, optimiser state and the random key for dropout."""
    key, *layer_keys = jax.random.split(jax.random.key(seed), len(WIDTHS))
    params = [
        {"weight": jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, "bias": jnp.zeros(n)}
        for k, m, n in zip(layer_keys, WIDTHS, WIDTHS[1:], strict=False)
    ]
    return {"params": params, "opt_state": optimiser.init(params), "dropout": key}


def logits(
    params: list[dict[str, jax.Array]], images: jax.Array, dropout: jax.Array | None = None
) -> jax.Array:
    """Returns the output for ``images`` float32[batch, 64]; a key drops hidden units at random."""
    hidden = images
    for index, layer in enumerate(params[:-1]):
        hidden = jax.nn.relu(hidden @ layer["weight"] + layer["bias"])
        if dropout is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(dropout, index), 1 - DROPOUT, hidden.shape)
            hidden = jnp.where(kept, hidden / (1 - DROPOUT), 0)
    return hidden @ params[-1]["weight"] + params[-1]["bias"]


def metrics_of(outputs: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Returns mean loss and accuracy of a batch."""
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()
    return {"loss": loss, "accuracy": (outputs.argmax(-1) == labels).mean()}


def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    """Updates the weights once by AdamW."""
    images, labels = batch
    key, dropout = jax.random.split(state["dropout"])

    def loss_fn(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        metrics = metrics_of(logits(params, images, dropout), labels)
        return metrics["loss"], metrics

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state["params"])
    updates, opt_state = optimiser.update(grads, state["opt_state"], state["params"])
    metrics["grad_norm"] = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state, "dropout": key}, metrics


def evaluate_step(state: State, batch: Batch) -> dict[str, jax.Array]:
    """Returns the metrics without dropout."""
    return metrics_of(logits(state["params"], batch[0]), batch[1])


def warm_up(epoch: int, learning_rate: float) -> float:
    """Returns the learning rate of an epoch: it grows at first, and then other policies change it."""
    if epoch < WARM_UP_EPOCHS:
        return LEARNING_RATE * (epoch + 1) / WARM_UP_EPOCHS
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
    (train, validation, test), printer = split_digits(), EventPrinter(console)
    sizes = " / ".join(str(len(labels)) for _, labels in (train, validation, test))
    spoiled = ", ".join(
        f"multiplied by {factor:g} in epoch {epoch + 1}" for (epoch, _), factor in SPOILED.items()
    )
    console.print(
        f"\n[bold]Handwritten digits[/]: {sizes} images to train, to decide and to test.\n"
        f"A network with {'-'.join(map(str, WIDTHS))} units is trained by AdamW in batches of {BATCH_SIZE}.\n"
        f"Two batches are spoiled: images {spoiled}.\n",
        highlight=False,
    )
    trainer = et.Trainer(
        train_step,
        new_state(seed=0),
        eval_fn=evaluate_step,
        subscribers=[
            *all_subscribers(console, subs.Checkpointer("checkpoints", every_epochs=5, max_to_keep=3)),
            subs.PlotCurves("curves.png", title="Handwritten digits"),
            # Last, to report on all others.
            subs.Report("report.html", "report.md", title="Handwritten digits"),
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
    console.print(f"Its dashboard: {_command()} dashboard {out}", soft_wrap=True, highlight=False)
    return _problem(accuracy, printer, result.stop_reason)


def _command() -> str:
    """Returns how this program was called, such as ``.venv/bin/eventtrain``."""
    return sys.argv[0] if Path(sys.argv[0]).stem == "eventtrain" else "eventtrain"


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
    on_device = [jax.tree.map(jnp.asarray, batches[i % len(batches)]) for i in range(MEASURED_STEPS)]
    bare_step = jax.jit(train_step, donate_argnums=0)
    state = new_state(seed=1)

    def bare() -> float:
        nonlocal state
        began_s = perf_counter()
        for batch in on_device:
            state, _ = bare_step(state, batch)
        jax.block_until_ready(state)
        return MEASURED_STEPS / (perf_counter() - began_s)

    trainer = et.Trainer(
        train_step,
        new_state(seed=1),
        eval_fn=evaluate_step,
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
    table.add_row("time per step, observed / bare (median of the pairs)", f"{ratio:.3f}", "", "")
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
