"""``Attachments``: files of a run that go with the message about its end. Blocking; any thread, one at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

logger = logging.getLogger("eventtrain")


class Attachments:
    """Says in the log which of the files are missing at the end, or were not written by the run.

    Args:
        paths: below ``run_dir``.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._run_dir = Path()
        self._older: Mapping[Path, int] = {}

    def __bool__(self) -> bool:
        return bool(self._paths)

    def begin(self, run_dir: Path) -> None:
        """Note what is there before the run."""
        self._run_dir = run_dir
        self._older = self._written_ns()

    def files(self) -> list[Path]:
        """Those that are there now."""
        written_ns = self._written_ns()
        for path in self._paths:
            if path not in written_ns:
                what = "there is no %s in the folder of the run"
            elif written_ns[path] == self._older.get(path):
                what = "%s is as it was before the run, and is sent so"
            else:
                continue
            logger.warning(
                f"Alerts(attach=...): {what}. List Alerts behind the subscriber that writes it.", path
            )
        return [self._run_dir / path for path in written_ns]

    def _written_ns(self) -> dict[Path, int]:
        """Those that are files, and when each was last written."""
        files = {path: self._run_dir / path for path in self._paths}
        return {path: file.stat().st_mtime_ns for path, file in files.items() if file.is_file()}
