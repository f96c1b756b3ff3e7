"""CSVLogger: rows that csv and pandas read as they were, in a file that may grow in both directions."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers.loggers import csv_logger
from eventtrain.subscribers.loggers.csv_logger import CSVFile, CSVRows
from eventtrain.subscribers.loggers.row_file import RowBuffer
from tests.conftest import python_path
from tests.subscribers._shared.test_step_table import EXTREMES, NAMES, make_window


def read(path: Path, separator: str = ",") -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=separator, strict=True))


def context(run_dir: Path, **changes: Any) -> et.RunContext:
    control: Any = None
    return dataclasses.replace(et.RunContext("run", run_dir, control, lambda event: None), **changes)


def epoch_event(epoch: int, metrics: dict[str, Any], **hyperparams: Any) -> et.EpochCompleted:
    return et.EpochCompleted(
        step=2 * epoch + 2, epoch=epoch, metrics=metrics, hyperparams=hyperparams, steps=2, duration_s=0.5
    )


def make_file(path: Path, **options: Any) -> CSVFile:
    own = {"separator": ",", "own": ("step",), "fsync": False}
    return CSVFile(path, RowBuffer(), **(own | options))


def put(file: CSVFile, steps: range, **columns: Any) -> None:
    file.waiting.put(CSVRows(len(steps), {"step": steps, **columns}), len(steps), 100)


def test_a_run_has_one_row_per_step_which_csv_and_pandas_read(tmp_path: Path) -> None:
    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch, "count": jnp.int32(3), "good": batch > 1}

    batches = [np.float32("nan"), np.float32("-inf"), np.float32(0.1), np.float32(2)]
    trainer = et.Trainer(
        step, {"w": jnp.zeros(2)}, subscribers=[subs.CSVLogger("logs/a.csv")], run_dir=tmp_path
    )
    trainer.fit(batches, epochs=2)
    rows = read(tmp_path / "logs/a.csv")
    assert list(rows[0]) == ["step", "epoch", "batch", "count", "good", "loss"]
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 9)]
    assert [row["batch"] for row in rows] == list("01230123")
    assert [row["epoch"] for row in rows] == list("00001111")
    assert [row["loss"] for row in rows[:4]] == ["nan", "-inf", "0.10000000149011612", "2.0"]
    assert [row["good"] for row in rows[:4]] == ["False", "False", "False", "True"]
    table = pd.read_csv(tmp_path / "logs/a.csv")
    assert [str(kind) for kind in table.dtypes] == ["int64", "int64", "int64", "int64", "bool", "float64"]
    assert np.array_equal(table["loss"].to_numpy(np.float32), np.array(batches * 2), equal_nan=True)


async def test_it_writes_on_every_event_loop_without_blocking_it(tmp_path: Path) -> None:
    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch}

    loggers = [
        subs.CSVLogger("a.csv"),
        subs.CSVLogger("b.csv", per="epoch"),
        subs.JSONLLogger("c", by="window"),
    ]
    trainer = et.Trainer(step, {"w": jnp.zeros(2)}, subscribers=loggers, run_dir=tmp_path)
    await trainer.fit_async([np.float32(1)] * 200, epochs=2)
    assert [row["step"] for row in read(tmp_path / "a.csv")] == [str(step) for step in range(1, 401)]
    assert [row["epoch"] for row in read(tmp_path / "b.csv")] == ["0", "1"]


@pytest.mark.parametrize("dtype", EXTREMES)
def test_any_name_and_any_value_come_back(tmp_path: Path, dtype: str) -> None:
    values = np.array(EXTREMES[dtype], dtype)
    names = ["metrics.step" if name == "step" else name for name in NAMES]
    to_value = {"b": "True".__eq__, "i": int, "u": int, "f": float}[values.dtype.kind]

    async def write(separator: str, path: Path) -> None:
        logger = subs.CSVLogger(path, separator)
        await logger.start(context(tmp_path))
        await logger.handle(make_window(dict.fromkeys(NAMES, values), len(values)))
        await logger.stop()

    for index, separator in enumerate(",;\t| "):
        path = tmp_path / f"{index}.csv"
        anyio.run(write, separator, path)
        rows = read(path, separator)
        assert list(rows[0]) == ["step", "epoch", "batch", *names]
        for name in names:
            found = np.array([to_value(row[name]) for row in rows], dtype)
            assert np.array_equal(found, values, equal_nan=values.dtype.kind == "f")
            assert np.array_equal(np.signbit(found), np.signbit(values)) or values.dtype.kind != "f"
        table = pd.read_csv(path, sep=separator)
        assert np.array_equal(table["loss"].to_numpy(dtype), values, equal_nan=values.dtype.kind == "f")
        assert table.columns[-2] == "metrics.step"


async def test_half_a_surrogate_pair_in_a_name_costs_no_row(tmp_path: Path) -> None:
    for _ in range(2):
        logger = subs.CSVLogger("a.csv")
        await logger.start(context(tmp_path))
        await logger.handle(make_window({"a\udc80": np.ones(1)}, 1))
        await logger.stop()
    rows = await anyio.to_thread.run_sync(read, tmp_path / "a.csv")
    assert [row["a\\udc80"] for row in rows] == ["1.0", "1.0"]


async def test_an_epoch_is_a_row_with_its_hyperparameters_and_later_metrics_widen_the_file(
    tmp_path: Path,
) -> None:
    logger = subs.CSVLogger("a.csv", per="epoch")
    await logger.start(context(tmp_path))
    await logger.handle(epoch_event(0, {"loss": 1.5}, learning_rate=0.1))
    before = await anyio.to_thread.run_sync((tmp_path / "a.csv").read_text)
    assert before == "epoch,step,steps,duration_s,loss,hyperparams.learning_rate\n0,2,2,0.5,1.5,0.1\n"
    await logger.handle(epoch_event(1, {"loss": 1.25, "val_loss": 2.5, 'x,"y"\n': 7}, learning_rate=0.1))
    await logger.handle(epoch_event(2, {"epoch": 4, "metrics.epoch": 5, "hyperparams.learning_rate": 6}))
    await logger.stop()
    rows = await anyio.to_thread.run_sync(read, tmp_path / "a.csv")
    assert [row["loss"] for row in rows] == ["1.5", "1.25", ""]
    assert [row["val_loss"] for row in rows] == ["", "2.5", ""]
    assert [row['x,"y"\n'] for row in rows] == ["", "7", ""]
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert [row["hyperparams.learning_rate"] for row in rows] == ["0.1", "0.1", ""]
    assert rows[2]["metrics.epoch"] == "4"
    assert rows[2]["metrics.metrics.epoch"] == "5"
    assert rows[2]["metrics.hyperparams.learning_rate"] == "6"
    assert await anyio.to_thread.run_sync(os.listdir, tmp_path) == ["a.csv"]


def test_widening_changes_no_row_and_a_failure_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv"
    file = make_file(path)
    file.prepare()
    put(file, range(1, 4001), loss=np.arange(4000) / 7)
    file.commit()
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        put(file, range(4001, 4003), loss=np.zeros(2), late=np.ones(2))
        with pytest.raises(OSError, match="too large"):
            file.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert file.waiting.rows == 2

    def failing(old: Path, new: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="Input/output"):
            file.commit()
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["a.csv"]
    file.commit()
    rows = read(path)
    assert [float(row["loss"]) for row in rows] == [n / 7 for n in range(4000)] + [0, 0]
    assert [row["late"] for row in rows] == [""] * 4000 + ["1.0"] * 2


def test_a_process_killed_while_it_widens_leaves_every_row(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
import numpy as np
from eventtrain.subscribers.loggers.csv_logger import CSVFile, CSVRows
from eventtrain.subscribers.loggers.row_file import RowBuffer
file = CSVFile(Path(sys.argv[1]), RowBuffer(), separator=",", own=("step",), fsync=False)
file.prepare()
for n in range(10):
    if n == 5:
        setattr(os, sys.argv[2], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    file.waiting.put(CSVRows(1, {"step": range(n, n + 1), f"m{n}": np.array([n])}), 1, 100)
    file.commit()
"""
    env = {"PYTHONPATH": python_path(), "JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"]}
    moments = {moment: tmp_path / moment / "a.csv" for moment in ("fsync", "replace")}
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(path), moment], env=env)
        for moment, path in moments.items()
    ]
    assert [process.wait(120) for process in processes] == [-signal.SIGKILL] * 2
    for path in moments.values():
        rows = read(path)
        expected = [[str(n), str(n)] for n in range(5)]
        assert [[row["step"], row[f"m{n}"]] for n, row in enumerate(rows)] == expected
        file = make_file(path)
        file.prepare()
        put(file, range(5, 6), m9=np.array([9]))
        file.commit()
        assert read(path)[5]["m9"] == "9"
        assert [found.name for found in path.parent.iterdir()] == ["a.csv"]


def test_a_full_disk_in_the_middle_of_a_row_tears_and_doubles_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    file = make_file(path)
    file.prepare()
    put(file, range(1, 51), loss=np.arange(50.0))
    file.commit()
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
    try:
        for start in (51, 101):
            put(file, range(start, start + 50), loss=np.arange(50.0))
            with pytest.raises(OSError, match="too large"):
                file.commit()
            assert path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file.commit()
    assert [int(row["step"]) for row in read(path)] == list(range(1, 151))
    assert file.row_count == 150


@pytest.mark.parametrize("rows", [0, 1, 299, 300, 600])
def test_a_cut_takes_rows_off_the_end_and_keeps_them_with_their_header(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_logger, "CHUNK_BYTES", 1000)
    path, name = tmp_path / "a.csv", 'a "name"\nof two lines'
    file = make_file(path)
    file.prepare()
    put(file, range(1, 301), **{name: np.arange(300.0)})
    file.commit()
    put(file, range(301, 601), late=np.arange(300.0))
    file.commit()
    whole = read(path)
    again = make_file(path)
    again.prepare()
    assert again.row_count == 600
    again.cut({"rows": rows})
    assert again.row_count == rows
    assert read(path) == whole[:rows]
    beside = tmp_path / "a.csv.cut-1"
    assert (read(beside) if beside.exists() else []) == whole[rows:]
    put(again, range(rows + 1, 601), late=np.zeros(600 - rows))
    again.commit()
    assert [int(row["step"]) for row in read(path)] == list(range(1, 601))


def test_a_torn_last_row_is_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("step,loss\n1,0.5\n2,0.2")
    file = make_file(path)
    file.prepare()
    put(file, range(2, 3), loss=np.array([0.25]))
    file.commit()
    assert path.read_text() == "step,loss\n1,0.5\n2,0.25\n"
    assert (tmp_path / "a.csv.torn").read_text() == "2,0.2\n"


def test_a_file_that_lost_rows_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = make_file(tmp_path / "a.csv")
    file.prepare()
    file.cut({"rows": 7})
    assert (
        "a.csv lacks rows: it ends at rows=0, but ended at rows=7 when the checkpoint was written"
        in caplog.text
    )


def test_a_file_that_somebody_takes_away_begins_anew_with_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    file = make_file(path)
    file.prepare()
    for step in (1, 2):
        put(file, range(step, step + 1), loss=np.array([0.5]))
        file.commit()
        path.rename(tmp_path / f"taken-{step}")
    assert [row["step"] for row in read(tmp_path / "taken-2")] == ["2"]
    assert file.row_count == 1


async def test_append_false_moves_what_is_there_aside_unless_the_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for changes in ({}, {}, {"resumed": True}):
        logger = subs.CSVLogger("a.csv", append=False)
        await logger.start(context(tmp_path, **changes))
        await logger.handle(make_window({"loss": np.ones(1)}, 1))
        await logger.stop()
    assert len(await anyio.to_thread.run_sync(read, path)) == 2
    assert len(await anyio.to_thread.run_sync(read, tmp_path / "a.csv.before-1")) == 1


async def test_append_adds_to_what_is_there_also_with_other_metrics(tmp_path: Path) -> None:
    for metrics in ({"loss": np.ones(1)}, {"accuracy": np.zeros(1)}):
        logger = subs.CSVLogger("a.csv")
        await logger.start(context(tmp_path))
        await logger.handle(make_window(metrics, 1))
        await logger.stop()
    text = await anyio.to_thread.run_sync((tmp_path / "a.csv").read_text)
    assert text == "step,epoch,batch,loss,accuracy\n1,3,0,1.0,\n1,3,0,,0.0\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "begins 'a,b'"),
        ("step;epoch;batch;loss\n1;0;0;2\n", "begins 'step;epoch;batch;loss'"),
        ("epoch,step,steps,duration_s,loss\n", "begins 'epoch,step"),
        ('"step,epoch\n', "cannot be read"),
        ("step,epoch,batch,loss,loss\n", "begins 'step,epoch,batch,loss,loss'"),
        ("\n", "begins ''"),
    ],
)
async def test_a_file_with_other_columns_is_refused_by_name_and_stays(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "a.csv"
    await anyio.to_thread.run_sync(path.write_text, text)
    logger = subs.CSVLogger("a.csv")
    with pytest.raises(et.ConfigurationError, match="cannot add rows to") as caught:
        await logger.start(context(tmp_path))
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert await anyio.to_thread.run_sync(path.read_text) == text


@pytest.mark.parametrize("separator", ["", ",,", "\n", "1", "e", ".", "-", '"', "+", "é", "\0"])
def test_what_cannot_separate_numbers_is_refused_by_name(separator: str) -> None:
    with pytest.raises(et.ConfigurationError, match=r"CSVLogger\(separator="):
        subs.CSVLogger("a.csv", separator)


async def test_what_was_written_after_the_checkpoint_is_cut_off_at_resume_and_kept_beside(
    tmp_path: Path,
) -> None:
    path, logger = tmp_path / "a.csv", subs.CSVLogger("a.csv")
    await logger.start(context(tmp_path))
    await logger.handle(make_window({"loss": np.arange(3.0)}, 3))
    await logger.flush()
    saved = json.loads(json.dumps(logger.state_dict()))
    await logger.handle(make_window({"loss": np.arange(2.0), "late": np.ones(2)}, 2, first_step=4))
    await logger.stop()
    whole = await anyio.to_thread.run_sync(read, path)
    for attempt in (1, 2):  # a second kill leaves another tail
        resumed = subs.CSVLogger("a.csv", append=False)
        resumed.load_state_dict(saved)
        await resumed.start(context(tmp_path, resumed=True))
        assert await anyio.to_thread.run_sync(read, path) == whole[:3]
        assert await anyio.to_thread.run_sync(read, tmp_path / f"a.csv.cut-{attempt}") == whole[3:]
        await resumed.handle(make_window({"loss": np.arange(2.0), "late": np.ones(2)}, 2, first_step=4))
        await resumed.stop()
        assert await anyio.to_thread.run_sync(read, path) == whole
        assert resumed.state_dict() == {"version": 1, "path": "a.csv", "rows": 5}


async def test_every_takes_the_steps_that_are_its_multiples(tmp_path: Path) -> None:
    logger = subs.CSVLogger("a.csv")
    logger.every = 4
    await logger.start(context(tmp_path))
    for first in range(1, 40, 3):
        window = make_window({"loss": np.arange(3.0) + first}, 3, first_step=first)
        if window.is_multiple_of(4):
            await logger.handle(window)
    await logger.stop()
    rows = await anyio.to_thread.run_sync(read, tmp_path / "a.csv")
    assert [int(row["step"]) for row in rows] == list(range(4, 40, 4))
    assert [float(row["loss"]) for row in rows] == list(range(4, 40, 4))
    assert not math.isnan(float(rows[0]["loss"]))
