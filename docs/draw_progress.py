"""Draws docs/images/progress.svg from a small run: ``python docs/draw_progress.py``."""

from __future__ import annotations

import io
import re
import tempfile
from pathlib import Path
from typing import Any

import anyio
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, RenderableType

import eventtrain as et
from eventtrain import subscribers as subs

WIDTH = 100
TARGET = Path(__file__).parent / "images" / "progress.svg"
optimiser = optax.inject_hyperparams(optax.adam)(learning_rate=3e-3)


def forward(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


def metrics_of(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    x, y = batch
    error = forward(params, x) - y
    loss = jnp.mean(error**2)
    return loss, {"loss": loss, "mae": jnp.mean(jnp.abs(error))}


def train_step(state: Any, batch: Any) -> Any:
    (_, metrics), grads = jax.value_and_grad(metrics_of, has_aux=True)(state["params"], batch)
    updates, opt_state = optimiser.update(grads, state["opt_state"])
    metrics["grad_norm"] = optax.tree.norm(grads)
    return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, metrics


def draw(run_dir: str) -> list[RenderableType]:
    """Trains, and returns the lines and the bar during the run, and the table at its end."""
    generator = np.random.default_rng(0)
    params = {"w1": generator.normal(size=(32, 256)) / 6, "w2": generator.normal(size=(256, 1)) / 16}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    x = generator.normal(size=(16_384, 32)).astype(np.float32)
    data = et.ArrayLoader((x, np.sin(x.sum(1, keepdims=True) / 3)), batch_size=64)
    lines = io.StringIO()
    bar = subs.ProgressBar(("loss", "grad_norm", "val_loss"), console=Console(file=lines, width=WIDTH))
    trainer = et.Trainer(
        train_step,
        {"params": params, "opt_state": optimiser.init(params)},
        eval_fn=lambda state, batch: metrics_of(state["params"], batch)[1],
        subscribers=[bar, subs.Checkpointer("checkpoints", every=500)],
        run_dir=run_dir,
    )
    seen: list[RenderableType] = []

    @trainer.on(et.StepCompleted, name="slow sink")
    async def slow(event: et.StepCompleted) -> None:
        if event.step > 500 and not seen:
            await anyio.sleep(1)

    @trainer.on(et.StepsCompleted, where=lambda event: event.step > 1000)
    async def keep(event: et.StepsCompleted) -> None:
        display = bar._display
        assert display is not None
        state = " ".join(display.shown.state)
        if not seen and "behind" in state and "checkpoint" in state and "..." not in state:
            seen.extend(display.get_renderables())
            seen.insert(0, lines.getvalue().rstrip())

    result = trainer.fit(
        data, epochs=20, eval_data=et.ArrayLoader((x[:640], np.sin(x[:640].sum(1, keepdims=True) / 3)), 64)
    )
    assert seen, result
    summary = bar._summary.table(bar._run.loop_statistics(), bar._run.statistics().values())
    return ["[dim]during the run[/]", *seen, "", "[dim]at the end[/]", summary]


def main() -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as run_dir:
        for part in draw(run_dir):
            console.print(part, highlight=False)
    # Without the font that rich's template would load from another site.
    template = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(console.export_svg(title="eventtrain", code_format=template, unique_id="progress"))
    print(TARGET)


if __name__ == "__main__":
    main()
