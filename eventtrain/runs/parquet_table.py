"""``ParquetJournal``: rows of a folder of ``ParquetLogger`` as events."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyarrow import parquet

from eventtrain.runs.rows import Wanted
from eventtrain.runs.tables import CHUNK_ROWS, Row, TableJournal


class ParquetJournal(TableJournal):
    """Reads the parts of a folder. Each is complete; the last one is replaced by a longer one."""

    def __init__(self, path: Path, wanted: Wanted) -> None:
        super().__init__(path, wanted)
        self._known: dict[tuple[Path, int], int] = {}
        """Path and time of a part -> number of its rows."""
        self._loaded: tuple[tuple[Path, int], Any] | None = None

    def _next_rows(self) -> Sequence[Row]:
        before = 0
        for part in _parts(self.path):
            count = self._count(part)
            if before + count > self.rows:
                return self._load(part).slice(self.rows - before, CHUNK_ROWS).to_pylist()
            before += count
        return []

    def _load(self, part: Path) -> Any:
        key = part, part.stat().st_mtime_ns
        if self._loaded is None or self._loaded[0] != key:
            with parquet.ParquetFile(part) as file:
                self._loaded = key, file.read()
        return self._loaded[1]

    def _count(self, part: Path) -> int:
        key = part, part.stat().st_mtime_ns
        if key not in self._known:
            self._known[key] = parquet.read_metadata(part).num_rows
        return self._known[key]

    def _steps(self) -> list[int]:
        return [step for part in _parts(self.path) for step in _column(part)]

    def _first_step(self, path: Path) -> int:
        return _column(_parts(path)[0])[0]


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"), key=lambda path: (len(path.name), path.name))


def _column(part: Path) -> list[int]:
    with parquet.ParquetFile(part) as file:
        return file.read(columns=["step"]).column(0).to_pylist()
