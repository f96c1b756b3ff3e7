"""Time from the request of a checkpoint until it is committed, beside Orbax' own, with nothing else to do.

All variants write the same state from the device it is on:

- ``eventtrain``: ``control.checkpoint()`` until CheckpointCommitted, with checksums, manifest and ``fsync``;
- ``orbax async``: ``AsyncCheckpointer.save`` and ``wait_until_finished``;
- ``orbax sync``: ``Checkpointer.save``.

The variants alternate within a round. The figures are medians: seconds, and the ratio to each of Orbax' two in the same
round. Writing the same bytes to one file (``raw``) shows what the disk allows.

    python -m benchmarks.checkpoint_commit [--rounds 9] [--megabytes 540] [--json PATH]
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import typer
from rich.console import Console
from rich.table import Table

import eventtrain as et
from benchmarks.checkpoint_stall import new_state
from benchmarks.figures import spread
from benchmarks.machine import write_json
from eventtrain import subscribers as subs


def with_trainer(state: Any, folder: Path) -> float:
    """Returns the seconds of a checkpoint of ``state`` by a Checkpointer."""
    trainer = et.Trainer(
        lambda state, batch: (state, {"one": jnp.int32(1)}),
        state,
        subscribers=[subs.Checkpointer("checkpoints", at_end=False)],
        run_dir=folder,
        donate=False,
    )
    committed = threading.Event()

    @trainer.on(et.CheckpointCommitted | et.CheckpointFailed)
    async def note(event: et.CheckpointCommitted | et.CheckpointFailed) -> None:
        assert event.kind == "checkpoint_committed", event
        committed.set()

    with trainer.session() as session:
        session.step(np.float32(0))
        session.block_until_ready()
        began_s = perf_counter()
        trainer.control.checkpoint()
        session.idle(
            0.02
        )  # the command is applied at once, and the state of the last step is written meanwhile
        assert committed.wait(600)
        return perf_counter() - began_s


def with_orbax(state: Any, folder: Path, checkpointer: Any) -> float:
    """Returns the seconds of ``checkpointer.save``, until it is finished."""
    began_s = perf_counter()
    checkpointer.save(folder / "checkpoint", state)
    if isinstance(checkpointer, ocp.AsyncCheckpointer):
        checkpointer.wait_until_finished()
    return perf_counter() - began_s


def raw(state: Any, folder: Path) -> float:
    """Returns the seconds of writing the bytes of ``state`` to one file, with fsync."""
    began_s = perf_counter()
    with open(folder / "file", "wb") as file:
        for leaf in jax.tree.leaves(state):
            file.write(np.asarray(leaf).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    return perf_counter() - began_s


def main(
    rounds: Annotated[int, typer.Option(help="Number of measurements of each variant.")] = 9,
    megabytes: Annotated[int, typer.Option(help="Size of the state.")] = 540,
    json: Annotated[Path | None, typer.Option(help="File to write the figures to.")] = None,
) -> None:
    """Measures, prints a table, and writes the figures."""
    state = jax.block_until_ready(new_state(megabytes))
    asynchronous = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    synchronous = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    ways: dict[str, Callable[[Path], float]] = {
        "eventtrain": lambda folder: with_trainer(state, folder),
        "orbax async": lambda folder: with_orbax(state, folder, asynchronous),
        "orbax sync": lambda folder: with_orbax(state, folder, synchronous),
        "raw": lambda folder: raw(state, folder),
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in list(ways) if number % 2 else reversed(list(ways)):
            folder = Path(tempfile.mkdtemp())
            try:
                seconds = ways[name](folder)
            finally:
                shutil.rmtree(folder)
            if number:  # the first round obtains memory and compiles
                took[name].append(seconds)
    table = Table(title=f"commit of {megabytes} MB of state, {rounds} rounds")
    for column in ("", "seconds", "eventtrain / this", "quartiles"):
        table.add_column(column, justify="right")
    figures: dict[str, Any] = {"megabytes": megabytes, "rounds": rounds}
    for name, seconds in took.items():
        each = [ours / theirs for ours, theirs in zip(took["eventtrain"], seconds, strict=True)]
        ratio, quartiles = spread(each)
        figures[name] = {
            "seconds": round(float(np.median(seconds)), 3),
            "all_seconds": [round(each_s, 3) for each_s in seconds],
            "eventtrain_to_this": ratio,
            "quartiles": quartiles,
            "ratios": [round(one, 4) for one in each],
        }
        table.add_row(name, f"{np.median(seconds):.2f}", f"{ratio:.2f}", f"{quartiles[0]} to {quartiles[1]}")
    Console().print(table)
    if json is not None:
        write_json(json, "checkpoint_commit", figures)


if __name__ == "__main__":
    typer.run(main)
