"""``quiet_libraries``: what other packages would log of a URL while it is used is logged nowhere."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator
from contextlib import contextmanager

PACKAGES = frozenset(
    {"apprise", "charset_normalizer", "httpcore", "httpx", "paho", "requests", "slixmpp", "urllib3"}
)
"""Whose loggers are meant: at DEBUG they write URLs, headers and answers out in full, httpx already at INFO."""


class _NotOfQuietThreads(logging.Filter):
    """Holds back what a thread logs while it is quiet; other threads log as ever."""

    def __init__(self) -> None:
        super().__init__()
        self.here = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(self.here, "quiet", False)


_FILTER = _NotOfQuietThreads()  # one for the process, as the loggers are, which take it in once


@contextmanager
def quiet_libraries() -> Generator[None]:
    """Within it this thread logs nothing by the loggers of ``PACKAGES``.

    Those that there are: a package has to be imported before, also where another one would import it when needed.
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
