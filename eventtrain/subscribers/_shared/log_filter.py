"""Filters of log records: secrets that other packages would log, and control characters in what eventtrain logs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import PurePath

from eventtrain.errors import printable

PACKAGES = frozenset(
    {
        "apprise",
        "charset_normalizer",
        "httpcore",
        "httpx",
        "nats",
        "paho",
        "redis",
        "requests",
        "slixmpp",
        "urllib3",
    }
)
"""Packages whose loggers write URLs, headers and responses in full, at DEBUG, httpx already at INFO."""


class _QuietThreadFilter(logging.Filter):
    """Drops the records of threads that are quiet; those of other threads pass."""

    def __init__(self) -> None:
        super().__init__()
        self.here = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(self.here, "quiet", False)


_FILTER = _QuietThreadFilter()
"""One for the process, as the loggers are; adding it to a logger again does nothing."""


@contextmanager
def quiet_libraries() -> Generator[None]:
    """Inside the block, the loggers of ``PACKAGES`` log nothing for this thread.

    Covers the loggers that exist at entry: import a package before, also one that another package imports on demand.
    """
    for name, found in list(logging.Logger.manager.loggerDict.items()):
        if isinstance(found, logging.Logger) and name.partition(".")[0] in PACKAGES:
            found.addFilter(_FILTER)
    before = getattr(_FILTER.here, "quiet", False)
    _FILTER.here.quiet = True
    try:
        yield
    finally:
        _FILTER.here.quiet = before


class PrintableLog(logging.Filter):
    """Makes the text of a record safe for a terminal: names, tags, reasons and errors come from data.

    Line ends stay, each with an indent behind it, so that no text looks like a record of its own.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = self._safe(record.msg)
        if isinstance(record.args, tuple):
            record.args = tuple(self._safe(value) for value in record.args)
        return True

    def _safe(self, value: object) -> object:
        if isinstance(value, (str, BaseException, PurePath)):
            return printable(str(value), lines=True).replace("\n", "\n    ")
        return value
