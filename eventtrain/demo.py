"""``eventtrain demo``: a small network learns scikit-learn's handwritten digits with every kind of subscriber live.

The policies see the validation set only. The test set is read once, when training is over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
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

try:
    from sklearn.datasets import load_digits
except ImportError:
    load_digits = None

WIDTHS = (64, 512, 256, 10)
DROPOUT = 0.4
BATCH_SIZE = 32
SPLIT_SEED = 0
ACCURACY_WANTED = 0.97
EPOCHS = 100
MEASURED_STEPS = 1000
MEASURED_PAIRS = 5

State = dict[str, Any]
Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Digits:
    """1,797 images of 8 x 8 pixels: 70% to train on, 15% to decide by, 15% to be tested on once."""

    train: Batch
    validation: Batch
    test: Batch


def split_digits() -> Digits:
    """Load, shuffle by a fixed seed, split, and standardise with the mean and deviation of the training part."""
    assert load_digits is not None
    digits: Any = load_digits()
    images, labels = digits.data.astype(np.float32), digits.target.astype(np.int32)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    parts = np.split(order, [int(0.7 * len(order)), int(0.85 * len(order))])
    mean, deviation = images[parts[0]].mean(), images[parts[0]].std()
    train, validation, test = (((images[part] - mean) / deviation, labels[part]) for part in parts)
    return Digits(train, validation, test)


optimiser = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3, weight_decay=1e-2)


def new_state(seed: int) -> State:
    """Weights, optimiser state and the key that dropout draws from."""
    key, *layer_keys = jax.random.split(jax.random.key(seed), len(WIDTHS))
    params = [
        {"weight": jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, "bias": jnp.zeros(n)}
        for k, m, n in zip(layer_keys, WIDTHS, WIDTHS[1:], strict=False)
    ]
    return {"params": params, "opt_state": optimiser.init(params), "dropout": key}


def logits(
    params: list[dict[str, jax.Array]], images: jax.Array, dropout: jax.Array | None = None
) -> jax.Array:
    """The network's output for ``images`` float32[batch, 64]; with a key, hidden units are dropped at random."""
    hidden = images
    for index, layer in enumerate(params[:-1]):
        hidden = jax.nn.relu(hidden @ layer["weight"] + layer["bias"])
        if dropout is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(dropout, index), 1 - DROPOUT, hidden.shape)
            hidden = jnp.where(kept, hidden / (1 - DROPOUT), 0)
    return hidden @ params[-1]["weight"] + params[-1]["bias"]


def judged(outputs: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Mean loss and accuracy of a batch."""
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()
    return {"loss": loss, "accuracy": (outputs.argmax(-1) == labels).mean()}


def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    """One update by AdamW."""
    images, labels = batch
    key, dropout = jax.random.split(state["dropout"])

    def loss_fn(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        metrics = judged(logits(params, images, dropout), labels)
        return metrics["loss"], metrics

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state["params"])
    updates, opt_state = optimiser.update(grads, state["opt_state"], state["params"])
    metrics["grad_norm"] = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
    return {
        "params": optax.apply_updates(state["params"], updates),
        "opt_state": opt_state,
        "dropout": key,
    }, metrics


def evaluate_step(state: State, batch: Batch) -> dict[str, jax.Array]:
    """The metrics without dropout."""
    return judged(logits(state["params"], batch[0]), batch[1])


def all_subscribers(console: Console, **checkpoints: int) -> list[et.Subscriber]:
    """One of each kind; ``checkpoints`` says when: ``every=`` steps or ``every_epochs=``."""
    return [
        subs.ReduceLROnPlateau("val_loss", factor=0.3, patience=3, min_delta=1e-3, cooldown=1, min_lr=1e-5),
        subs.EarlyStopping("val_loss", min_delta=1e-3, patience=10),
        subs.Checkpointer("checkpoints", max_to_keep=3, **checkpoints),
        subs.JSONLLogger("events.jsonl"),
        subs.Alerts(
            [
                subs.Rule("loss", non_finite=True, severity="critical", event=et.StepCompleted),
                subs.Rule("loss", above=2.0, name="high loss", severity="info", event=et.StepCompleted),
            ]
        ),
        subs.ProgressBar(("loss", "accuracy", "val_loss", "val_accuracy"), every_epochs=5, console=console),
    ]


@dataclass
class Story:
    """Prints what happens besides the epochs, and remembers what the demo promises to show."""

    console: Console
    cuts: list[et.HyperparamChanged] = field(default_factory=list[et.HyperparamChanged])
    commits: list[et.CheckpointCommitted] = field(default_factory=list[et.CheckpointCommitted])

    def tell(self, event: et.Event) -> None:
        """Runs in a worker thread, so that a slow terminal delays nobody."""
        match event:
            case et.HyperparamChanged():
                cause = (
                    f"{event.cause.subscriber} on {event.cause.event}"
                    if event.cause is not None
                    else "a command"
                )
                self.cuts.append(event)
                change = f"{event.name} {event.old:.2g} -> {event.new:.2g}"
                self._line(
                    "LR cut", "yellow", f"step {event.step}: {change}, caused by {cause}: {event.reason}"
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
    if load_digits is None:
        return "it needs scikit-learn for its images. Install the extra: pip install 'eventtrain[demo]'."
    began_s = perf_counter()
    console = console or Console()
    out = out if out is not None else Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    digits, story = split_digits(), Story(console)
    sizes = " + ".join(f"{len(part[1])} to {use}" for part, use in _parts(digits))
    console.print(f"\n[bold]Handwritten digits[/]: {sizes}")
    console.print(
        f"A network of {'-'.join(map(str, WIDTHS))} units, trained by AdamW in batches of {BATCH_SIZE}\n",
        highlight=False,
    )

    trainer = et.Trainer(
        train_step,
        new_state(seed=0),
        eval_fn=evaluate_step,
        subscribers=all_subscribers(console, every_epochs=5),
        run_dir=out,
    )
    trainer.on(
        et.HyperparamChanged | et.CheckpointCommitted | et.CheckpointFailed | et.AlertRaised | et.AlertResolved
        | et.SubscriberFailed, name="demo output",
    )(story.tell)  # fmt: skip
    loader = et.ArrayLoader(digits.train, BATCH_SIZE, seed=0)
    result = trainer.fit(loader, epochs=EPOCHS, eval_data=[digits.validation], progress=False)
    statistics = trainer.bus.statistics()
    accuracy = float(trainer.evaluate([digits.test])["accuracy"])
    best = min(result.history, key=lambda epoch: epoch.metrics["val_loss"])
    console.print(
        f"\n{result.epochs_completed} epochs, {result.step} steps; lowest val_loss {best.metrics['val_loss']:.4f} "
        f"in epoch {best.epoch + 1}\n[bold]Accuracy on the test set, read once: {accuracy:.4f}[/]\n"
    )
    bare, observed = measure(list(loader(0)), digits.validation, out / "measurement")
    console.print(_speed_table(bare, observed))
    console.print(_statistics_table(statistics.values()))
    console.print("Files:", style="bold")
    rows = (out / "events.jsonl").read_bytes().count(b"\n")
    console.print(
        f"  {out / 'events.jsonl'}  {rows} rows, one per event of the training sequence",
        soft_wrap=True,
        highlight=False,
    )
    console.print(
        f"  {out / 'checkpoints'}  the last {len(story.commits[-3:])} of {len(story.commits)} checkpoints",
        soft_wrap=True,
        highlight=False,
    )
    console.print(f"\nAll in {perf_counter() - began_s:.1f} s.")
    return _problem(accuracy, story, result.stop_reason)


def _parts(digits: Digits) -> Sequence[tuple[Batch, str]]:
    return (digits.train, "train on"), (digits.validation, "decide by"), (digits.test, "test on")


def _problem(accuracy: float, story: Story, stop_reason: str) -> str | None:
    if accuracy < ACCURACY_WANTED:
        return f"the accuracy on the test set is {accuracy:.4f}, and {ACCURACY_WANTED} was wanted."
    if not any(cut.cause is not None and cut.cause.subscriber == "ReduceLROnPlateau" for cut in story.cuts):
        return "ReduceLROnPlateau never cut the learning rate."
    if not story.commits:
        return "no checkpoint was committed."
    if not stop_reason.startswith("early stopping"):
        return f"EarlyStopping did not end the run; it ended with {stop_reason!r}."
    return None


def measure(batches: Sequence[Batch], validation: Batch, run_dir: Path) -> tuple[list[float], list[float]]:
    """Steps per second of the bare jitted loop and of an observed run, side by side, in pairs of alternating order.

    Both donate, both take the same batches that already lie on the device, both are timed from the first dispatch until
    the last step is complete.
    """
    on_device = [jax.device_put(batches[i % len(batches)]) for i in range(MEASURED_STEPS)]
    bare_step = jax.jit(train_step, donate_argnums=0)
    state = jax.block_until_ready(bare_step(new_state(seed=1), on_device[0])[0])

    def bare() -> float:
        nonlocal state
        began_s = perf_counter()
        for batch in on_device:
            state, _ = bare_step(state, batch)
        jax.block_until_ready(state)
        return MEASURED_STEPS / (perf_counter() - began_s)

    quiet = Console(quiet=True)
    trainer = et.Trainer(
        train_step,
        new_state(seed=1),
        eval_fn=evaluate_step,
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
    for name, rates in (("bare jitted loop", bare), ("with all subscribers, 2 checkpoints", observed)):
        table.add_row(name, *(f"{rate:,.0f}" for rate in (median(rates), min(rates), max(rates))))
    ratio = median(b / o for b, o in zip(bare, observed, strict=True))
    table.add_row("time per step, observed / bare", f"{ratio:.3f}", "", "")
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
