"""Paths that users give: on a local disk, in run_dir or absolute, writable; anything else is refused by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import eventtrain as et
from eventtrain import subscribers as subs
from eventtrain.subscribers._shared.paths import directory_path, file_path, local_path
from tests.support.models import batches, make_trainer, new_state, step_fn

RULES = [subs.RunFailedRule()]
WEBHOOK = "http://127.0.0.1:9/hook"

READ: dict[str, Callable[[Any], object]] = {
    "load_state": et.load_state,
    "load_subscribers": et.load_subscribers,
    "download_checkpoint": lambda path: subs.download_checkpoint("/nowhere", path),
    "Trainer(run_dir)": lambda path: et.Trainer(step_fn, new_state(), run_dir=path),
}
"""Takes a path that may be anywhere."""

IN_RUN_DIR: dict[str, Callable[[Any], Any]] = {
    "Checkpointer": subs.Checkpointer,
    "JSONLLogger": subs.JSONLLogger,
    "CSVLogger": subs.CSVLogger,
    "ParquetLogger": subs.ParquetLogger,
    "TensorBoardLogger": lambda path: subs.TensorBoardLogger(path, program=False),
    "WandbLogger": lambda path: subs.WandbLogger("project", mode="offline", directory=path),
    "PlotCurves": subs.PlotCurves,
    "Report": lambda path: subs.Report(path, None),
    "Report(markdown)": lambda path: subs.Report(None, path),
    "Profiler": lambda path: subs.Profiler(((1, 2),), directory=path),
    "Alerts(attach)": lambda path: subs.Alerts(RULES, attach=(path,)),
    "Alerts(dead_letters)": lambda path: subs.Alerts(RULES, WEBHOOK, allow_private=True, dead_letters=path),
    "ModelRegistry": lambda path: subs.ModelRegistry("model", "sqlite:///x", directory=path),
}
"""Takes a path that is in ``run_dir`` or absolute."""

WRITES = sorted(IN_RUN_DIR.keys() - {"Alerts(attach)", "ModelRegistry"})


def test_every_subscriber_with_a_path_is_tried_here() -> None:
    classes = [getattr(subs, name) for name in subs.__all__]
    takes_path = {
        cls.__name__
        for cls in classes
        if isinstance(cls, type)
        and issubclass(cls, et.Subscriber)
        and any("Path" in str(one) for one in inspect.get_annotations(cls.__init__).values())
    }
    reads_elsewhere = {
        "CommandReplay",
        "NATSEvents",
    }  # another run; credentials, which are a file of the server's
    assert takes_path - reads_elsewhere <= {name.partition("(")[0] for name in IN_RUN_DIR}
    assert len(takes_path) >= 9


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.csv", "a.csv"),
        ("logs/a.csv", "logs/a.csv"),
        ("logs/../a.csv", "a.csv"),
        ("./a.csv", "a.csv"),
        ("..a/b..", "..a/b.."),
        (Path("a.csv"), "a.csv"),
        ("/elsewhere/a.csv", "/elsewhere/a.csv"),
        ("C:a.csv", "C:a.csv"),
        ("./~a.csv", "~a.csv"),
    ],
)
def test_a_path_lies_below_run_dir_or_where_an_absolute_one_says(path: str | Path, expected: str) -> None:
    assert file_path(path, "Owner") == directory_path(path, "Owner") == Path(expected)


def test_a_home_directory_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/runs", "Owner") == file_path("~/runs", "Owner") == tmp_path / "runs"
    trainer = et.Trainer(step_fn, new_state(), run_dir="~/runs/a", subscribers=[subs.JSONLLogger("e.jsonl")])
    trainer.fit(batches(2), epochs=1)
    assert (tmp_path / "runs/a/e.jsonl").exists()


@pytest.mark.parametrize("owner", IN_RUN_DIR)
@pytest.mark.parametrize("path", ["../a.csv", "..", "a/../../b", "../run/a.csv", "a/../..", Path("../x.png")])
def test_a_path_that_leaves_run_dir_is_refused_by_name(owner: str, path: str | Path) -> None:
    with pytest.raises(et.ConfigurationError, match="leads out of run_dir") as caught:
        IN_RUN_DIR[owner](path)
    assert f"{owner.partition('(')[0]}({str(path)!r})" in str(caught.value)


@pytest.mark.parametrize("owner", [*IN_RUN_DIR, *READ])
@pytest.mark.parametrize(
    "path",
    [
        "", "a\0b", "\ud800", "~no-such-user/x", b"bytes", 7, ["a"], object(), "gs://u:pass@bucket/a",
        "s3://u:pass@bucket/a.csv", Path("hf://u:pass@bucket/a"), "file:///u:pass@/a",
    ],
)  # fmt: skip
def test_what_is_not_a_path_on_a_local_disk_is_refused_by_name(owner: str, path: Any) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        (IN_RUN_DIR | READ)[owner](path)
    assert owner.partition("(")[0] in str(caught.value)
    assert "pass" not in str(caught.value)


@pytest.mark.parametrize("path", [".", "a/.."])
def test_a_file_needs_a_name(path: str) -> None:
    with pytest.raises(et.ConfigurationError, match=r"CSVLogger\(.*run_dir itself"):
        subs.CSVLogger(path)
    with pytest.raises(et.ConfigurationError, match="does not name a file"):
        subs.CSVLogger("logs/")
    assert directory_path(path, "Checkpointer", may_be_run_dir=True) == Path()


@pytest.mark.parametrize("owner", WRITES)
@pytest.mark.parametrize("way", ["below a file", "in a place without files", "of the other kind"])
def test_what_cannot_be_written_is_refused_before_the_first_step(
    tmp_path: Path, owner: str, way: str
) -> None:
    name = "out.png" if owner == "PlotCurves" else "out"
    path = Path(f"/proc/{name}")
    if way == "below a file":
        (tmp_path / "file").touch()
        path = tmp_path / "file" / name
    elif way == "of the other kind":
        path = tmp_path / name
        is_file = (
            owner in ("JSONLLogger", "CSVLogger", "PlotCurves", "Alerts(dead_letters)") or "Report" in owner
        )
        path.mkdir() if is_file else path.touch()
    trainer = make_trainer(tmp_path, subscribers=[IN_RUN_DIR[owner](path)])
    with pytest.raises(et.ConfigurationError, match=rf"{owner.partition('(')[0]} cannot write .*Give a path"):
        trainer.fit(batches(2), epochs=1)
    assert trainer.step == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("owner", WRITES)
def test_a_read_only_folder_is_refused_before_the_first_step(tmp_path: Path, owner: str) -> None:
    (tmp_path / "folder").mkdir(mode=0o555)
    trainer = make_trainer(tmp_path, subscribers=[IN_RUN_DIR[owner](tmp_path / "folder/out.png")])
    with pytest.raises(et.ConfigurationError, match=r"cannot write .*Permission denied"):
        trainer.fit(batches(2), epochs=1)


def test_two_subscribers_with_one_path_are_refused_by_name(tmp_path: Path) -> None:
    absolute = tmp_path / "run/log"
    trainer = make_trainer(tmp_path, subscribers=[subs.CSVLogger("a/../log"), subs.JSONLLogger(absolute)])
    with pytest.raises(et.ConfigurationError, match=r"CSVLogger and JSONLLogger both write to .*log"):
        trainer.fit(batches(2), epochs=1)
    same = make_trainer(tmp_path, subscribers=[subs.Report(), subs.Report()])
    with pytest.raises(et.ConfigurationError, match="Report and Report-2 both write"):
        same.fit(batches(2), epochs=1)


def test_two_checkpointers_may_share_a_folder(tmp_path: Path) -> None:
    checkpointers = [subs.Checkpointer("ck", every=2), subs.Checkpointer("ck", every=3)]
    assert make_trainer(tmp_path, subscribers=checkpointers).fit(batches(4), epochs=1).step == 4
