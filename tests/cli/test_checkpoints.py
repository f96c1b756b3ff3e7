"""``eventtrain checkpoints``: ls, verify, rm; and ``eventtrain run --resume``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.cli import main as cli
from eventtrain.subscribers.checkpointing.manifest import MANIFEST, sealed
from tests.support.models import batches, new_state, step_fn

runner = CliRunner()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Of a run with checkpoints of the steps 2, 4 and 4 once more, by tag, and the weights of step 4."""
    run_dir = tmp_path / "run"
    weights = subs.Checkpointer("weights", save_best_only=True, monitor="loss", save_weights_only=True)
    weights.name = "weights"
    trainer = et.Trainer(
        step_fn, new_state(), subscribers=[subs.Checkpointer("ck", every=2), weights], run_dir=run_dir
    )

    @trainer.on(et.EpochCompleted, lag=0)
    async def ask(event: et.EpochCompleted, control: et.Control) -> None:
        control.checkpoint("asked")

    trainer.fit(batches(4), epochs=1)
    return run_dir


def call(*arguments: object, given: str | None = None) -> tuple[int, str]:
    result = runner.invoke(cli.app, ["checkpoints", *map(str, arguments)], input=given)
    return result.exit_code, result.output


def test_ls_shows_what_each_one_holds_in_the_order_of_commits(run_dir: Path) -> None:
    code, text = call("ls", run_dir)
    rows = [re.split(r" {2,}", line) for line in text.splitlines()]
    assert code == 0
    assert rows[0] == ["STEP", "EPOCH", "HOLDS", "SIZE", "COMMITTED", "TAG", "METRICS", "PATH"]
    assert [(row[0], row[1], row[2], row[5], row[7]) for row in rows[1:]] == [
        ("2", "0", "run", "-", "ck/step-00000002"),
        ("4", "1", "run", "asked", "ck/step-00000004-asked"),
        ("4", "1", "run", "-", "ck/step-00000004"),
        ("4", "1", "weights", "-", "weights/step-00000004"),
    ]
    assert rows[-1][6].startswith("loss=")
    assert call("ls", run_dir / "ck")[1].count("step-") == 3
    assert call("ls", run_dir / "ck/step-00000002")[1].splitlines()[1].endswith(".")


def test_verify_reads_everything_and_names_what_is_damaged(run_dir: Path) -> None:
    code, text = call("verify", run_dir)
    assert (code, text.count(": ok")) == (0, 4)
    files = [path for path in (run_dir / "ck/step-00000004/arrays").rglob("*") if path.is_file()]
    damaged = max(files, key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (run_dir / "weights/step-00000004/eventtrain.json").write_text("{")
    code, text = call("verify", run_dir)
    assert code == 1
    lines = text.splitlines()
    assert [line for line in lines if "damaged" in line] == [lines[2], lines[3]]
    assert "ck/step-00000004: damaged: " in lines[2]
    assert damaged.name in lines[2]
    assert text.count(": ok") == 2


def test_rm_asks_and_deletes_exactly_one(run_dir: Path) -> None:
    def names() -> list[str]:
        return sorted(path.name for path in (run_dir / "ck").iterdir())

    assert call("rm", run_dir, 2, given="n\n")[0] == 1
    assert names() == ["step-00000002", "step-00000004", "step-00000004-asked"]
    assert call("rm", run_dir, 2, given="y\n")[0] == 0
    assert names() == ["step-00000004", "step-00000004-asked"]
    code, text = call("rm", run_dir, 4, "--yes")
    assert code == 2
    assert "several" in text
    assert call("rm", run_dir, "asked", "--yes")[0] == 0
    assert names() == ["step-00000004"]
    assert call("rm", run_dir / "ck", "step-00000004", "-y")[0] == 0
    assert names() == []
    assert call("rm", run_dir, "nothing", "-y") == (
        2, f"Error: No checkpoint in {run_dir} has the step, tag or name 'nothing'.\n"
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [("ls",), ("verify",), ("rm", "2")])
def test_where_nothing_is_saved_the_command_says_so(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, text = call(arguments[0], tmp_path, *arguments[1:])
    assert (code, text) == (2, f"Error: There is no checkpoint in {tmp_path}.\n")


SCRIPT = """
from pathlib import Path

import eventtrain as et
from tests.support.models import batches, new_state, step_fn

def make_trainer(subscribers):
    return et.Trainer(step_fn, new_state(), subscribers=subscribers, run_dir=Path(__file__).parent / "run")

data = batches(4)
"""

CONFIG = """
[fit]
epochs = 2

[[subscribers]]
type = "checkpointer"
directory = "ck"
every = 2
"""


def test_run_resume_goes_on_from_the_newest_checkpoint(tmp_path: Path) -> None:
    script, config = tmp_path / "job.py", tmp_path / "run.toml"
    script.write_text(SCRIPT)
    config.write_text(CONFIG)
    arguments = ["run", str(script), "--config", str(config), "--resume"]
    first = runner.invoke(cli.app, [*arguments, "--epochs", "1"])
    assert first.output.startswith("step 4 after 1 epoch (completed)"), first.output
    second = runner.invoke(cli.app, arguments)
    assert second.output.startswith("step 8 after 2 epochs (completed)"), second.output
    third = runner.invoke(cli.app, arguments)
    assert third.output.startswith("step 8 after 2 epochs (completed)"), third.output


def test_text_of_a_checkpoint_moves_no_cursor(run_dir: Path) -> None:
    path = run_dir / "ck/step-00000002" / MANIFEST
    evil = "\x1b]0;title taken\x07\x1b[1A\x1b[2Kfake\nline\u202e"
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "tag": evil, "metrics": {evil: 1.0}})))
    code, text = call("ls", run_dir)
    assert code == 0
    assert len(text.splitlines()) == 5
    assert text.count("?]0;title taken??[1A?[2Kfake?line?") == 2
    path.write_text(json.dumps({"format": "eventtrain-checkpoint", "schema_version": evil}))
    for command in ("ls", "verify"):
        text = call(command, run_dir)[1]
        assert "?]0;title taken" in text
        assert all(c.isprintable() or c == "\n" for c in text)
