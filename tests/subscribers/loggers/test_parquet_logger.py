"""ParquetLogger: whoever reads the folder finds whole files only, with each step once."""

from __future__ import annotations

import dataclasses
import errno
import json
import resource
from pathlib import Path
from typing import Any

import anyio.to_thread
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import dataset, parquet

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers._shared.step_table import StepTable
from eventtrain.subscribers.loggers import parquet_files, parquet_logger
from eventtrain.subscribers.loggers.parquet_files import ParquetFiles
from eventtrain.subscribers.loggers.row_file import RowBuffer
from eventtrain.validation.optional_imports import MissingModule
from tests.subscribers._shared.test_step_table import EXTREMES, NAMES, make_window


def context(run_dir: Path, **changes: Any) -> et.RunContext:
    control: Any = None
    return dataclasses.replace(et.RunContext("run", run_dir, control, lambda event: None), **changes)


def make_parts(path: Path, rows_per_part: int = 50_000) -> ParquetFiles:
    parts = ParquetFiles(path, RowBuffer(), rows_per_part)
    parts.prepare()
    return parts


def put(parts: ParquetFiles, first_step: int, rows: int, **metrics: Any) -> None:
    columns = metrics or {"loss": np.arange(first_step, first_step + rows, dtype=np.float32)}
    table = StepTable.of(make_window(columns, rows, first_step=first_step))
    parts.waiting.put(table, rows, table.size_bytes)


def steps_in(path: Path) -> list[int]:
    return parquet.read_table(path)["step"].to_pylist()


def names_in(path: Path) -> list[str]:
    return sorted(found.name for found in path.iterdir())


def test_a_run_is_a_folder_that_pyarrow_and_pandas_read(tmp_path: Path) -> None:
    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch, "count": jnp.int32(3), "good": batch > 1}

    batches = [np.float32("nan"), np.float32("-inf"), np.float32(0.1), np.float32(2)]
    trainer = et.Trainer(
        step, {"w": jnp.zeros(2)}, subscribers=[subs.ParquetLogger("logs/metrics")], run_dir=tmp_path
    )
    trainer.fit(batches, epochs=2)
    table = parquet.read_table(tmp_path / "logs/metrics")
    assert table.schema == pa.schema(
        {
            "step": pa.int64(),
            "epoch": pa.int64(),
            "batch": pa.int64(),
            "count": pa.int32(),
            "good": pa.bool_(),
            "loss": pa.float32(),
        }
    )
    frame = pd.read_parquet(tmp_path / "logs/metrics")
    assert frame["step"].tolist() == list(range(1, 9))
    assert frame["batch"].tolist() == [0, 1, 2, 3] * 2
    assert frame["epoch"].tolist() == [0] * 4 + [1] * 4
    assert np.array_equal(frame["loss"], np.array(batches * 2), equal_nan=True)
    assert frame["good"].tolist() == [False, False, False, True] * 2
    assert names_in(tmp_path / "logs/metrics") == ["part-00001.parquet"]


async def test_it_writes_on_every_event_loop_without_blocking_it(tmp_path: Path) -> None:
    def step(state: Any, batch: Any) -> Any:
        return state, {"loss": batch}

    logger = subs.ParquetLogger("m", rows_per_part=150)
    trainer = et.Trainer(step, {"w": jnp.zeros(2)}, subscribers=[logger], run_dir=tmp_path)
    await trainer.fit_async([np.float32(1)] * 200, epochs=2)
    assert await anyio.to_thread.run_sync(steps_in, tmp_path / "m") == list(range(1, 401))


def test_any_name_and_any_value_come_back(tmp_path: Path) -> None:
    for dtype, values in EXTREMES.items():
        parts, column = make_parts(tmp_path / dtype), np.array(values, dtype)
        put(parts, 1, len(values), **dict.fromkeys([*NAMES, "a\udc80"], column))
        parts.commit()
        table = parquet.read_table(tmp_path / dtype)
        names = ["metrics.step" if name == "step" else name for name in NAMES] + ["a\\udc80"]
        assert table.column_names == ["step", "epoch", "batch", *names]
        for name in names:
            assert table[name].to_numpy().tobytes() == column.tobytes()


def test_the_last_part_grows_until_it_is_done_and_other_metrics_begin_another(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "m", rows_per_part=100)
    for first in range(1, 211, 30):
        put(parts, first, 30)
        parts.commit()
    assert [parquet.read_metadata(path).num_rows for path in sorted((tmp_path / "m").iterdir())] == [120, 90]
    put(parts, 211, 10, loss=np.zeros(10), late=np.ones(10, np.int8))
    put(parts, 221, 10, loss=np.zeros(10), late=np.ones(10, np.int8))
    put(parts, 231, 10)
    parts.commit()
    files = sorted((tmp_path / "m").iterdir())
    assert [parquet.read_metadata(path).num_rows for path in files] == [120, 90, 20, 10]
    assert all(parquet.read_metadata(path).num_row_groups == 1 for path in files)
    again = make_parts(tmp_path / "m", rows_per_part=100)
    assert (again.part, again.rows_in_part) == (4, 10)
    put(again, 241, 10)
    again.commit()
    schemas = [parquet.read_schema(path) for path in files]
    whole = pa.unify_schemas(schemas, promote_options="permissive")
    frame = dataset.dataset(tmp_path / "m", schema=whole).to_table().to_pandas()
    assert frame["step"].tolist() == list(range(1, 251))
    assert frame["late"].count() == 20


def test_folders_that_look_like_columns_are_none(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "lr=0.5" / "m")
    for first in (1, 4):
        put(parts, first, 3)
        parts.commit()
    assert parquet.ParquetFile(tmp_path / "lr=0.5/m/part-00001.parquet").schema_arrow.names[-1] == "loss"
    assert parts.part == 1


@pytest.mark.parametrize("failing", ["write", "sync", "replace"])
def test_a_failed_write_leaves_every_part_whole_and_the_rows_waiting(
    tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts(tmp_path / "m")
    put(parts, 1, 1000)
    parts.commit()
    before = (tmp_path / "m/part-00001.parquet").read_bytes()
    put(parts, 1001, 1000)
    put(parts, 2001, 1000, other=np.zeros(1000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        if failing == "write":  # a full disk: the kernel takes a part of the file, and refuses the rest
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
        elif failing == "sync":
            patch.setattr(parquet_files, "sync", fail)
        else:
            patch.setattr(parquet_files.os, "replace", fail)
        try:
            with pytest.raises(OSError, match=r"too large|Input/output"):
                parts.commit()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "m/part-00001.parquet").read_bytes() == before
    assert names_in(tmp_path / "m") == ["part-00001.parquet"]
    assert parts.waiting.rows == 2000
    parts.commit()
    assert parts.waiting.rows == 0
    assert steps_in(tmp_path / "m") == list(range(1, 3001))


def test_what_fails_in_the_middle_is_not_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make_parts(tmp_path / "m")
    put(parts, 1, 3)
    put(parts, 4, 3, other=np.zeros(3))
    put(parts, 7, 3)
    write, calls = parquet_files._write, []

    def second_fails(table: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(table, path)

    monkeypatch.setattr(parquet_files, "_write", second_fails)
    with pytest.raises(OSError, match="No space"):
        parts.commit()
    assert parts.waiting.rows == 6
    parts.commit()
    assert steps_in(tmp_path / "m") == list(range(1, 10))


@pytest.mark.parametrize("keep", [0, 1, 99, 100, 101, 250, 300])
def test_a_cut_takes_rows_off_the_end_and_keeps_them_beside(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "m"
    parts, states = make_parts(path, 100), {0: {"part": 0, "rows": 0}}
    for step in range(1, 301):
        put(parts, step, 1)
        if step in (1, 99, 100, 101, 250, 300):
            parts.commit()
            states[step] = parts.position
    again = make_parts(path, 100)
    again.cut(states[keep])
    left = steps_in(path) if names_in(path) else []
    assert left == list(range(1, keep + 1))
    beside = tmp_path / "m.cut-1"
    assert (steps_in(beside) if beside.exists() else []) == list(range(keep + 1, 301))
    put(again, keep + 1, 301 - keep)
    again.commit()
    assert steps_in(path) == list(range(1, 302))


def test_what_a_killed_run_left_unfinished_is_no_part_and_goes(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "m")
    put(parts, 1, 3)
    parts.commit()
    (tmp_path / "m/.part-00001.unfinished").write_bytes(b"PAR1half")
    assert steps_in(tmp_path / "m") == [1, 2, 3]  # readers see nothing of it
    make_parts(tmp_path / "m")
    assert names_in(tmp_path / "m") == ["part-00001.parquet"]


def test_a_part_that_is_none_stays_as_it_is_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/part-00003.parquet").write_text("mine")
    parts = make_parts(tmp_path / "m")
    put(parts, 1, 3)
    parts.commit()
    assert "part-00003.parquet is not a Parquet file" in caplog.text
    (tmp_path / "m" / f"part-{parts.part:05d}.parquet").write_text("mine, too")
    put(parts, 4, 3)
    parts.commit()
    assert "was changed by another program" in caplog.text
    assert steps_in(tmp_path / "m" / f"part-{parts.part:05d}.parquet") == [4, 5, 6]
    assert (tmp_path / "m/part-00003.parquet").read_text() == "mine"


def test_a_folder_that_lost_rows_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_parts(tmp_path / "m").cut({"part": 2, "rows": 7})
    assert "but ended at part=2, rows=7 when the checkpoint was written" in caplog.text


async def test_what_was_written_after_the_checkpoint_is_set_aside_at_resume(tmp_path: Path) -> None:
    logger = subs.ParquetLogger("m")
    await logger.start(context(tmp_path))
    await logger.handle(make_window({"loss": np.arange(3.0)}, 3))
    await logger.flush()
    saved = json.loads(json.dumps(logger.state_dict()))
    assert saved == {"version": 1, "path": "m", "part": 1, "rows": 3}
    await logger.handle(make_window({"loss": np.arange(2.0)}, 2, first_step=4))
    await logger.stop()
    for attempt in (1, 2):  # a second kill leaves another tail
        resumed = subs.ParquetLogger("m")
        resumed.load_state_dict(saved)
        await resumed.start(context(tmp_path, resumed=True))
        assert await anyio.to_thread.run_sync(steps_in, tmp_path / "m") == [1, 2, 3]
        assert await anyio.to_thread.run_sync(steps_in, tmp_path / f"m.cut-{attempt}") == [4, 5]
        await resumed.handle(make_window({"loss": np.arange(2.0)}, 2, first_step=4))
        await resumed.stop()
        assert await anyio.to_thread.run_sync(steps_in, tmp_path / "m") == [1, 2, 3, 4, 5]


async def test_the_end_of_an_epoch_has_the_part_written_soon(tmp_path: Path) -> None:
    logger = subs.ParquetLogger("m", flush_interval_s=1000.0)
    await logger.start(context(tmp_path))
    await logger.handle(make_window({"loss": np.arange(3.0)}, 3))
    await logger.handle(et.EpochCompleted(step=3, epoch=0, metrics={}, steps=3, duration_s=0.1))
    with anyio.fail_after(60):
        while await anyio.to_thread.run_sync(names_in, tmp_path / "m") != ["part-00001.parquet"]:  # noqa: ASYNC110
            await anyio.sleep(0.01)
    await logger.stop()


def test_without_pyarrow_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = MissingModule(ImportError("No module named 'pyarrow'"), "parquet", "ParquetLogger")
    monkeypatch.setattr(parquet_logger, "parquet_files", missing)
    with pytest.raises(et.ConfigurationError, match=r"pip install 'eventtrain\[parquet\]'"):
        subs.ParquetLogger("m")
