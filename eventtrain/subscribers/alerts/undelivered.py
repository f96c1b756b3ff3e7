"""``DeadLetters``: a file of the alerts that reached nobody. Blocking; any thread."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from eventtrain.events import Event
from eventtrain.subscribers._shared.atomic_files import AppendedFile

logger = logging.getLogger("eventtrain")


class DeadLetters:
    """Appends one line of JSON for each event: ``time``, ``label``, ``reason`` and the ``event``.

    Where the alerts themselves are gone there is one line without an event. Rows are whole or not there: what a full
    disk cuts short is taken back, and a killed run's torn last row gets a line of its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = AppendedFile(path)
        self._lock = threading.Lock()

    def write(self, label: str, reason: str, events: Iterable[Event]) -> bool:
        """Have them on disk (not synced); whether that worked."""
        rows = [
            json.dumps(
                {
                    "time": datetime.now(UTC).isoformat(),
                    "label": label,
                    "reason": reason,
                    "event": None if event is None else json.loads(event.model_dump_json()),
                }
            )
            for event in (tuple(events) or (None,))
        ]
        try:
            with self._lock:
                self._append("".join(f"{row}\n" for row in rows).encode())
        except OSError as error:
            logger.error("%s cannot be written: %s", self.path, error.strerror or error)
            return False
        return True

    def _append(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file.repair()
        with open(self.path, "ab+") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            torn = file.read(1) not in (b"", b"\n")
        self._file.append(b"\n" + data if torn else data)
