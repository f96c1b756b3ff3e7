"""Tables of runs come back as events: equal metrics of every type, while they grow, get columns and are cut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.runs.owner import LOCK, Owner
from eventtrain.subscribers._shared.step_table import StepTable
from eventtrain.subscribers.loggers.csv_logger import CSVFile, CSVRows
from eventtrain.subscribers.loggers.parquet_files import ParquetFiles
from eventtrain.subscribers.loggers.row_file import RowBuffer
from eventtrain.testing import RecordingSubscriber
from eventtrain.validation.optional_imports import MissingModule


def step_fn(state: Any, batch: Any) -> Any:
    w = state["w"] + batch
    metrics = {"loss": 1 / w, "step": w, "n": jnp.int32(7), "ok": w > 3, "metrics.x": w, "bad": w * jnp.nan}
    return {"w": w}, metrics


@pytest.mark.parametrize(
    "logger",
    [
        subs.CSVLogger("steps.csv"),
        subs.CSVLogger("steps.tsv", separator="\t"),
        subs.ParquetLogger("steps", rows_per_part=3),
    ],
    ids=["csv", "tsv", "parquet"],
)
def test_steps_come_back_with_their_metrics(tmp_path: Path, logger: et.Subscriber) -> None:
    recorder = RecordingSubscriber(et.StepCompleted)
    trainer = et.Trainer(step_fn, {"w": np.float32(0)}, subscribers=[logger, recorder], run_dir=tmp_path)
    trainer.fit([np.float32(n + 1) for n in range(4)], steps=8, progress=False)
    found = list(et.read_events(tmp_path, kinds=et.StepCompleted))
    assert [(e.step, e.epoch, e.batch) for e in found] == [
        (e.step, e.epoch, e.batch) for e in recorder.of(et.StepCompleted)
    ]
    for one, other in zip(found, recorder.of(et.StepCompleted), strict=True):
        assert {k: v for k, v in one.metrics.items() if k != "bad"} == {
            k: v for k, v in other.metrics.items() if k != "bad"
        }
        assert math.isnan(one.metrics["bad"])
        assert one.metrics["ok"] is other.metrics["ok"]
    assert [e.step for e in et.read_events(tmp_path, steps=range(3, 6))] == [3, 4, 5]
    assert list(et.read_events(tmp_path, kinds=et.EpochCompleted)) == []


def test_epochs_come_back_with_their_hyperparams(tmp_path: Path) -> None:
    trainer = et.Trainer(
        step_fn,
        {"w": np.float32(0)},
        subscribers=[subs.CSVLogger("epochs.csv", per="epoch")],
        run_dir=tmp_path,
    )
    result = trainer.fit([np.float32(n + 1) for n in range(4)], epochs=2, progress=False)
    found = list(et.read_events(tmp_path, kinds=et.EpochCompleted))
    blank = {"run_id": "", "attempt": 0, "stream": None, "seq": 0, "time": found[0].time}
    assert [e.model_dump_json() for e in found] == [
        e.model_copy(update=blank).model_dump_json() for e in result.history
    ]


def csv_file(folder: Path) -> CSVFile:
    file = CSVFile(
        folder / "steps.csv", RowBuffer(), separator=",", own=("step", "epoch", "batch"), fsync=False
    )
    file.prepare()
    return file


def put_csv(file: CSVFile, steps: range, *names: str) -> None:
    columns: dict[str, Any] = {"step": steps, "epoch": 0, "batch": steps}
    file.waiting.put(
        CSVRows(len(steps), columns | {name: np.float32(steps) for name in names}), len(steps), 1
    )
    file.commit()


def parquet_files(folder: Path) -> ParquetFiles:
    file = ParquetFiles(folder / "steps", RowBuffer(), 4)
    file.prepare()
    return file


def put_parquet(file: ParquetFiles, steps: range, *names: str) -> None:
    table = StepTable(
        steps, 0, steps, {name: np.float32(steps) for name in names}, "r", 1, "training", et.Event().time
    )
    file.waiting.put(table, len(steps), 1)
    file.commit()


@pytest.mark.parametrize(
    ("make", "put"), [(csv_file, put_csv), (parquet_files, put_parquet)], ids=["csv", "parquet"]
)
def test_a_table_is_followed_while_it_grows_gets_columns_and_is_cut(
    tmp_path: Path, make: Any, put: Any
) -> None:
    (tmp_path / LOCK).write_text(Owner(run_id="r").model_dump_json())
    file = make(tmp_path)
    put(file, range(1, 4), "loss")
    events = et.read_events(tmp_path, follow=True)
    assert [next(events).step for _ in range(3)] == [1, 2, 3]
    position = dict(file.position)
    put(file, range(4, 7), "loss", "val_loss")
    found = [next(events) for _ in range(3)]
    assert [(e.step, *e.metrics) for e in found] == [(n, "loss", "val_loss") for n in (4, 5, 6)]  # type: ignore[attr-defined]
    file.cut(position)
    put(file, range(4, 10), "loss")
    assert [next(events).step for _ in range(6)] == [4, 5, 6, 7, 8, 9]
    (tmp_path / LOCK).unlink()
    assert list(events) == []
    assert [e.step for e in et.read_events(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_what_a_table_cannot_tell_is_refused_by_name(tmp_path: Path) -> None:
    put_csv(csv_file(tmp_path), range(1, 4), "loss")
    for arguments in ({"cursor": "one"}, {"after": et.StepCompleted(epoch=0, batch=0, metrics={}, seq=1)}):
        with pytest.raises(et.ConfigurationError, match="require a log of JSONLLogger"):
            et.read_events(tmp_path, **arguments)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(et.EventParseError, match=r"other.csv is not a table of CSVLogger"):
        list(et.read_events(tmp_path / "other.csv"))
    with (tmp_path / "steps.csv").open("a") as file:
        file.write("4,0,x,1\n")
    with pytest.raises(et.EventParseError, match=r"steps.csv, row 4"):
        list(et.read_events(tmp_path))


def test_a_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_parquet(parquet_files(tmp_path), range(1, 4), "loss")
    missing = MissingModule(
        ImportError("No module named 'pyarrow'", name="pyarrow"), "parquet", "read_events"
    )
    monkeypatch.setattr("eventtrain.runs.reading.import_optional", lambda *_, **__: missing)  # pyright: ignore[reportUnknownLambdaType]
    with pytest.raises(et.ConfigurationError, match=r"eventtrain\[parquet\]"):
        et.read_events(tmp_path)
