from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import sysconfig
import traceback
from pathlib import Path

import pytest
from typer.testing import CliRunner

import eventtrain as et
from eventtrain.cli import main as cli
from eventtrain.config.load import run_json_schema
from tests.conftest import python_path

runner = CliRunner()


def test_version_is_the_packages() -> None:
    result = runner.invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"eventtrain {et.__version__}\n"


def test_schema_is_that_of_all_events() -> None:
    result = runner.invoke(cli.app, ["schema"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == et.events_json_schema()


def test_help_names_the_commands() -> None:
    result = runner.invoke(cli.app, ["--help"], terminal_width=200)
    assert result.exit_code == 0
    assert {"demo", "run", "schema"} <= set(re.findall(r"\w+", result.stdout))


def test_a_demo_that_shows_less_than_it_promises_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[Path | None] = []

    def failing(out: Path | None) -> str:
        given.append(out)
        return "no checkpoint was committed."

    monkeypatch.setattr(cli, "run_demo", failing)
    result = runner.invoke(cli.app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr == "The demo failed: no checkpoint was committed.\n"
    assert given == [tmp_path]


# --- run --------------------------------------------------------------------------------------------------------

SCRIPT = """
from pathlib import Path

import eventtrain as et
from tests.support.models import batches, eval_fn, new_state, step_fn

def make_trainer(subscribers):
    folder = Path(__file__).parent / "run"
    return et.Trainer(step_fn, new_state(), eval_fn=eval_fn, subscribers=subscribers, run_dir=folder)

data = batches(4)
eval_data = batches(1)
"""

CONFIG = """
[fit]
epochs = 2

[[subscribers]]
type = "early_stopping"
patience = 5

[[subscribers]]
type = "jsonl_logger"
path = "epochs.jsonl"
events = "epoch_completed"
"""


def in_folder(folder: Path, script: str = SCRIPT, config: str = CONFIG) -> list[str]:
    """Write both files; the arguments that run them."""
    (folder / "train_it.py").write_text(script)
    (folder / "run.toml").write_text(config)
    return ["run", str(folder / "train_it.py"), "--config", str(folder / "run.toml")]


def test_run_trains_what_the_script_defines_with_the_subscribers_of_the_file(tmp_path: Path) -> None:
    before = list(sys.path), set(sys.modules)
    result = runner.invoke(cli.app, in_folder(tmp_path))
    assert result.exit_code == 0, result.output
    assert re.fullmatch(
        r"step 8 after 2 epochs \(completed\): examples=\S+ loss=\S+ rate=0.5 val_examples=\S+ val_loss=\S+\n",
        result.stdout,
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "epochs.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert "train_it" not in sys.modules
    assert sys.path == before[0]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ([], 8),
        (["--epochs", "3"], 12),
        (["--steps", "5"], 5),
        (["--set", "fit.epochs=1"], 4),
        (["--set", "fit.epochs=1", "--epochs", "2"], 8),
        (["--epochs", "9", "--set", "early_stopping.patience=1", "--set", "early_stopping.monitor=val_examples",
          "--set", "early_stopping.mode=min"], 8),
    ],
)  # fmt: skip
def test_options_of_the_command_line_count_more_than_the_file(
    tmp_path: Path, options: list[str], steps: int
) -> None:
    result = runner.invoke(cli.app, [*in_folder(tmp_path), *options])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"step {steps} after ")


OWN_SCRIPT = SCRIPT.replace("subscribers=subscribers", "subscribers=[JSONLLogger('events.jsonl')]").replace(
    "def make_trainer(subscribers)", "from eventtrain.subscribers import JSONLLogger\n\ndef make_trainer()"
)


@pytest.mark.parametrize(
    ("length", "options", "steps"),
    [("epochs = 2", [], 8), ("steps = 3", [], 3), ("epochs = 2", ["--steps", "5"], 5)],
)
def test_a_script_that_says_everything_needs_no_file(
    tmp_path: Path, length: str, options: list[str], steps: int
) -> None:
    (tmp_path / "train_it.py").write_text(f"{OWN_SCRIPT}\n{length}\n")
    result = runner.invoke(cli.app, ["run", str(tmp_path / "train_it.py"), *options])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"step {steps} after ")


@pytest.mark.parametrize(
    ("length", "options", "expected"),
    [
        ("", [], "Define `epochs = 20` in"),
        ("epochs = 0", [], "Define `epochs` or `steps`, an integer >= 1"),
        ("epochs = 1\nsteps = 2", [], "expected epochs or steps, not both"),
        ("epochs = 1", ["--set", "fit.epochs=2"], "--set changes values"),
        ("epochs = 1", ["--replay-commands", "missing"], "missing does not exist"),
    ],
)
def test_what_a_script_without_a_file_lacks_is_named(
    tmp_path: Path, length: str, options: list[str], expected: str
) -> None:
    (tmp_path / "train_it.py").write_text(f"{OWN_SCRIPT}\n{length}\n")
    result = runner.invoke(cli.app, ["run", str(tmp_path / "train_it.py"), *options], terminal_width=300)
    assert result.exit_code == 2
    assert expected in result.stderr


def test_commands_of_another_run_are_repeated(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(OWN_SCRIPT + "\nsteps = 8\n")
    assert runner.invoke(cli.app, ["run", str(tmp_path / "one.py")]).exit_code == 0
    log = tmp_path / "run" / "events.jsonl"
    applied = et.CommandApplied(
        step=5, run_id="r", command=et.events.commands.Stop(reason="enough", source="control socket")
    )
    (tmp_path / "other.jsonl").write_text(applied.model_dump_json() + "\n")
    log.unlink()
    options = ["--replay-commands", str(tmp_path / "other.jsonl")]
    result = runner.invoke(cli.app, ["run", str(tmp_path / "one.py"), *options])
    assert result.stdout.startswith("step 5 after 1 epoch (enough)")


def test_init_writes_a_file_that_works_and_overwrites_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert runner.invoke(cli.app, ["init"]).exit_code == 0
    (tmp_path / "train_it.py").write_text(SCRIPT)
    result = runner.invoke(cli.app, ["run", "train_it.py", "--config", "run.toml", "--epochs", "1"])
    assert result.exit_code == 0, result.output
    result = runner.invoke(cli.app, ["init"])
    assert result.exit_code == 2
    assert "it exists" in result.stderr
    commented = (tmp_path / "run.toml").read_text().replace("# [[", "[[").replace("# type", "type")
    for key in ("monitor", "patience", "factor", "directory"):
        commented = commented.replace(f"# {key}", key)
    (tmp_path / "all.toml").write_text(commented)
    assert len(et.load_subscribers("all.toml")) == 6


def test_print_config_shows_what_counts_and_no_secret(tmp_path: Path) -> None:
    table = '[[subscribers]]\ntype = "nats_events"\nurl = "nats://me:planted@localhost"\n'
    arguments = [
        *in_folder(tmp_path, config=CONFIG + table),
        "--set",
        "early_stopping.patience=7",
        "--print-config",
    ]
    result = runner.invoke(cli.app, [*arguments, "--epochs", "9"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["fit"] == {"epochs": 9}
    assert printed["subscribers"][0] == {"type": "early_stopping", "patience": 7}
    assert "planted" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_progress_bar_of_the_file_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eventtrain.trainer.trainer.shows_progress", lambda: True)
    bar = '[[subscribers]]\ntype = "progress_bar"\n'
    for config, lines in ((CONFIG, 2), (CONFIG + bar, 2)):
        result = runner.invoke(cli.app, in_folder(tmp_path, config=config))
        assert len(re.findall(r"^epoch \d:", result.stderr, re.MULTILINE)) == lines


@pytest.mark.parametrize(
    ("script", "config", "options", "expected"),
    [
        (
            SCRIPT,
            CONFIG.replace("patience", "patince"),
            [],
            "unknown key 'patince'. Did you mean 'patience'?",
        ),
        (SCRIPT, CONFIG, ["--set", "early_stopping.patince=3"], "(--set early_stopping.patince)"),
        (
            SCRIPT,
            "",
            [],
            "run.toml does not set the length of the training. Add `epochs = 20` to [fit] of ",
        ),
        (
            SCRIPT.replace("make_trainer", "trainer"),
            CONFIG,
            [],
            "does not define make_trainer(). For example:",
        ),
        (SCRIPT.replace("eval_fn=eval_fn, ", ""), CONFIG, [], "requires an eval_fn"),
    ],
)
def test_what_cannot_work_is_told_without_a_traceback(
    tmp_path: Path, script: str, config: str, options: list[str], expected: str
) -> None:
    result = runner.invoke(cli.app, [*in_folder(tmp_path, script, config), *options])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert expected in result.stderr
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def test_options_that_only_a_trainer_can_judge_are_told_without_a_traceback(tmp_path: Path) -> None:
    script = SCRIPT.replace("subscribers=subscribers, ", "").replace("(subscribers)", "()")
    result = runner.invoke(cli.app, [*in_folder(tmp_path, script), "--set", "early_stopping.every_s=3"])
    assert result.exit_code == 2
    assert "Cannot subscribe EarlyStopping: " in result.stderr
    assert "every_s" in result.stderr
    assert "#" in result.stderr  # of the table


def test_an_optimiser_without_the_hyperparameter_is_told_without_a_traceback(tmp_path: Path) -> None:
    config = (
        CONFIG + '[[subscribers]]\ntype = "reduce_lr_on_plateau"\nmonitor = "loss"\nhyperparam = "momentum"\n'
    )
    result = runner.invoke(cli.app, in_folder(tmp_path, config=config))
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: No hyperparameter 'momentum'")
    assert "Raised by the subscriber ReduceLROnPlateau when the run started." in result.stderr


def test_no_secret_is_shown_when_the_file_or_the_script_fails(tmp_path: Path) -> None:
    token = "s3cr3t"
    alerts = f'[[subscribers]]\ntype = "alerts"\nurl = "https://host/{token}"\nrules = ['
    rule = '{ metric = "loss", above = 1 }]\n'
    given = ["--set", f"alerts.url=https://host/{token}"]
    result = runner.invoke(cli.app, in_folder(tmp_path, config=CONFIG + alerts + "3]\n"))
    assert result.exit_code == 2
    assert "rules[0] should be" in result.stderr
    assert token not in result.output
    arguments = in_folder(tmp_path, SCRIPT.replace("folder =", "1 / 0  #"), CONFIG + alerts + rule)
    done = eventtrain(*arguments, *given, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback ")  # the plain one: it shows no local variables
    assert "ZeroDivisionError" in done.stderr
    assert token not in done.stdout + done.stderr


def test_epochs_and_steps_at_once_are_refused(tmp_path: Path) -> None:
    result = runner.invoke(cli.app, [*in_folder(tmp_path), "--epochs", "1", "--steps", "1"])
    assert result.exit_code == 2
    assert "--epochs or --steps, not both" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("1 / 0", ZeroDivisionError),
        (SCRIPT.replace("data = batches(4)", "def make_data():\n    return {}['data']"), KeyError),
        (SCRIPT.replace("run_dir=folder", "steps_per_call=0"), et.ConfigurationError),
        ("import eventtrain as et\nraise et.ConfigurationError('mine')", et.ConfigurationError),
    ],
)
def test_errors_of_the_script_itself_keep_their_traceback(
    tmp_path: Path, script: str, error: type[Exception]
) -> None:
    result = runner.invoke(cli.app, in_folder(tmp_path, script))
    assert isinstance(result.exception, error)
    assert any(
        str(tmp_path / "train_it.py") == frame.filename for frame in traceback.extract_tb(result.exc_info[2])
    )
    assert "train_it" not in sys.modules


def test_a_resumed_run_counts_the_epochs_that_its_steps_are_of(tmp_path: Path) -> None:
    table = '[[subscribers]]\ntype = "checkpointer"\ndirectory = "checkpoints"\nevery_epochs = 1\n'
    arguments = in_folder(tmp_path, config=CONFIG + table)
    once = runner.invoke(cli.app, [*arguments, "--epochs", "1"])
    assert once.stdout.startswith("step 4 after 1 epoch (completed): ")
    more = runner.invoke(cli.app, [*arguments, "--epochs", "3", "--resume"])
    assert more.stdout.startswith("step 12 after 3 epochs (completed): ")


def test_the_help_of_run_is_whole() -> None:
    # Rich would take what stands in square brackets for markup, and show nothing of it.
    shown = " ".join(re.findall(r"\w+", runner.invoke(cli.app, ["run", "--help"]).stdout))
    assert "file with the sections fit and subscribers" in shown
    assert shown.count("Overrides the file") == 2


def eventtrain(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The installed program, in a process of its own."""
    program = Path(sysconfig.get_path("scripts")) / "eventtrain"
    env = os.environ | {"PYTHONPATH": python_path(), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [str(program), *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=240
    )


INTERRUPTED = """
import signal

class Interrupt(et.Subscriber):
    async def on_step_completed(self, event):
        if event.step == 6:
            signal.raise_signal(signal.SIGINT)

def make_trainer():
    folder = Path(__file__).parent / "run"
    return et.Trainer(step_fn, new_state(), eval_fn=eval_fn, subscribers=[Interrupt()], run_dir=folder)

def data(epoch):
    while True:
        yield from batches(4)
"""


def test_an_interrupted_run_says_how_far_it_came_and_exits_with_130(tmp_path: Path) -> None:
    result = runner.invoke(cli.app, in_folder(tmp_path, SCRIPT + INTERRUPTED))
    assert result.exit_code == 130
    assert re.fullmatch(r"Interrupted at step \d+\.\n", result.stderr)
    assert result.stdout == ""


@pytest.mark.slow
def test_the_example_runs_as_its_users_would_run_it(tmp_path: Path) -> None:
    examples = Path(__file__).resolve().parents[2] / "examples"
    files = [str(examples / "digits_script.py"), "--config", str(examples / "run.toml")]
    done = eventtrain("run", *files, "--epochs", "6", "--set", "progress_bar.every_epochs=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.match(r"step 168 after 6 epochs \(completed\): accuracy=0\.9", done.stdout)
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
        "epoch 2", "epoch 4", "epoch 6", "run completed at step 168",
    ]  # fmt: skip
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in run_dir.glob("[!.]*")} == {"checkpoints", "epochs.jsonl"}


def test_schema_of_a_file_names_every_type() -> None:
    expected = run_json_schema()  # here, since packages keep the stderr that they find when they are imported
    result = runner.invoke(cli.app, ["schema", "--config"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == expected


STOPS = """
def make_trainer(subscribers):
    folder = Path(__file__).parent / "run"
    trainer = et.Trainer(step_fn, new_state(), eval_fn=eval_fn, subscribers=subscribers, run_dir=folder)

    @trainer.on(et.StepCompleted, once=True, lag=0)
    async def stop(event, control):
        control.stop("\\x1b[2J\\x1b]0;owned\\x07 done\\nfake")

    return trainer
"""


def test_a_reason_moves_no_cursor(tmp_path: Path) -> None:
    result = runner.invoke(cli.app, in_folder(tmp_path, SCRIPT + STOPS))
    assert result.exit_code == 0, result.output
    assert "(?[2J?]0;owned? done?fake): " in result.output
    assert all(c.isprintable() or c == "\n" for c in result.output)


def test_what_is_logged_moves_no_cursor(caplog: pytest.LogCaptureFixture) -> None:
    evil = "a\x1b[2J\r\nWARNING fake"
    logging.getLogger("eventtrain").warning("%s, %s, %d" + evil, evil, ValueError(evil), 7)
    assert caplog.messages[0] == ", ".join(["a?[2J?\n    WARNING fake"] * 2) + ", 7a?[2J?\n    WARNING fake"
