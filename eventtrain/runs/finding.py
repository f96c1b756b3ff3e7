"""Finds the log of a run that can be read back. Blocking."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from eventtrain.errors import ConfigurationError, listed
from eventtrain.runs.rows import BEGINNING

FIRST = "events.jsonl"
"""The log that is read if a run has several."""
CSV_SUFFIXES = (".csv", ".tsv")
SNIFFED_BYTES = 1 << 12


def find_log(path: Path) -> Path:
    """Returns the log in a run_dir, or ``path`` itself if that is a log: a JSONL or CSV file, or a folder of Parquet.

    JSONL is preferred, because it has every event; then Parquet, then CSV. Folders in run_dir are searched too.

    Raises:
        ConfigurationError: there is none, or there are several of one format.
    """
    if path.is_file() or is_parquet(path):
        return path
    if not path.is_dir():
        raise ConfigurationError(f"{path} does not exist. Pass the run_dir of a run, or one of its logs.")
    folders = [path, *(folder for folder in _visible(path) if folder.is_dir())]
    formats: tuple[tuple[str, Callable[[Path], bool]], ...] = (
        ("JSONL files", is_jsonl), ("folders of Parquet files", is_parquet), ("CSV files", is_csv),
    )  # fmt: skip
    for name, fits in formats:
        found = [one for folder in folders for one in _visible(folder) if fits(one)]
        if path / FIRST in found or len(found) == 1:
            return path / FIRST if path / FIRST in found else found[0]
        if found:
            paths = listed([one.relative_to(path).as_posix() for one in found])
            raise ConfigurationError(
                f"{path} has {len(found)} {name}: {paths}. Pass the path of one of them."
            )
    raise ConfigurationError(
        f"{path} has no log that can be read back. Add subscribers.JSONLLogger({FIRST!r}), ParquetLogger or CSVLogger "
        "to the run."
    )


def is_jsonl(path: Path) -> bool:
    """Returns whether a file is empty or begins with an event, and is named as a JSONL log."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open("rb") as file:
        text = file.read(SNIFFED_BYTES)
    return not text or BEGINNING.match(text) is not None


def is_parquet(path: Path) -> bool:
    """Returns whether a folder has parts of a ParquetLogger."""
    is_cut = ".cut-" in path.name  # by a resumed run
    return path.is_dir() and not is_cut and next(path.glob("part-*.parquet"), None) is not None


def is_csv(path: Path) -> bool:
    """Returns whether a file begins with a header of a CSVLogger."""
    if path.suffix not in CSV_SUFFIXES or not path.is_file():
        return False
    with path.open("rb") as file:
        header = file.read(SNIFFED_BYTES)
    separator = header[4:5] if header.startswith(b"step") else header[5:6]
    return header.replace(b'"', b"").startswith((
        separator.join((b"step", b"epoch", b"batch")), separator.join((b"epoch", b"step", b"steps")),
    ))  # fmt: skip


def _visible(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
