"""Paths that users give: below run_dir, or absolute; nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

import eventtrain as et
from eventtrain.subscribers._shared.paths import file_path, inside_run_dir

RUN_DIR = Path("somewhere/run")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.csv", RUN_DIR / "a.csv"),
        ("logs/a.csv", RUN_DIR / "logs/a.csv"),
        ("logs/../a.csv", RUN_DIR / "a.csv"),
        ("./a.csv", RUN_DIR / "a.csv"),
        ("..a/b..", RUN_DIR / "..a/b.."),
        (Path("a.csv"), RUN_DIR / "a.csv"),
        ("/elsewhere/a.csv", Path("/elsewhere/a.csv")),
    ],
)
def test_a_path_lies_below_run_dir_or_where_an_absolute_one_says(path: str | Path, expected: Path) -> None:
    assert inside_run_dir(RUN_DIR, path, "Owner") == expected


@pytest.mark.parametrize("path", ["../a.csv", "..", "a/../../b", "../run/a.csv", "a/../..", Path("../x")])
def test_a_path_that_leaves_run_dir_is_refused_by_name(path: str | Path) -> None:
    with pytest.raises(et.ConfigurationError) as caught:
        inside_run_dir(RUN_DIR, path, "CSVLogger")
    assert "leads out of run_dir" in str(caught.value)
    assert f"CSVLogger({str(path)!r})" in str(caught.value)


@pytest.mark.parametrize("path", ["", ".", "a/..", "a\0b"])
def test_what_names_no_file_is_refused_before_there_is_a_run(path: str) -> None:
    with pytest.raises(et.ConfigurationError, match=r"CSVLogger\("):
        file_path(path, "CSVLogger")
