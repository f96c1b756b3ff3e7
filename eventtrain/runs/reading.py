"""``read_events``: the typed events of a finished or running run, from its log."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, Generic, Self, TypeVar, cast, overload

from eventtrain.errors import ConfigurationError
from eventtrain.events import Event
from eventtrain.events.parsing import NONE, event_classes
from eventtrain.runs.cursor import Cursor
from eventtrain.runs.finding import CSV_SUFFIXES, find_log
from eventtrain.runs.journal import Journal, JSONLJournal
from eventtrain.runs.owner import is_held
from eventtrain.runs.rows import Identity, Wanted, wanted
from eventtrain.runs.tables import CSVJournal
from eventtrain.validation.annotations import checked
from eventtrain.validation.optional_imports import import_optional, require_installed

logger = logging.getLogger("eventtrain")

E = TypeVar("E", bound=Event)

POLL_S = 0.1
"""How often a reader that follows a run looks for new rows."""
UNLOCK_S = 10.0
"""How long a reader waits behind the last event of a run for the run to release its folder."""


class EventReader(Generic[E]):
    """Iterator over the events of a run, made by ``read_events``. One thread iterates; ``close`` is for any thread.

    ``with read_events(...) as events`` closes it at the end of the block.
    """

    def __init__(
        self, journal: Journal, folders: Sequence[Path], cursor: Cursor | None, *, follow: bool
    ) -> None:
        self._journal = journal
        self._folders = folders
        self._cursor = cursor
        self._follow = follow
        self._closed = threading.Event()
        self._give_up_s: float | None = None
        self._events = self._read()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> E:
        return next(self._events)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the iteration, also one that waits in another thread. Idempotent; never blocks on the run."""
        self._closed.set()
        with suppress(ValueError):  # another thread is in it, and finds `_closed` set
            self._events.close()
            if self._cursor is not None:  # also if it was never iterated
                self._cursor.close()

    def _read(self) -> Generator[E]:
        cursor = self._cursor
        try:
            while True:
                is_last = not self._follow or self._is_over()
                for event in self._journal.read():
                    yield event  # pyright: ignore[reportReturnType]  # `wanted` selects by class
                    if cursor is not None:
                        cursor.acknowledge()
                if cursor is not None:
                    cursor.acknowledge()
                    cursor.save()
                if is_last or self._closed.wait(POLL_S):
                    break
            self._report_torn_row()
        finally:
            if cursor is not None:
                cursor.close()

    def _is_over(self) -> bool:
        """Whether nothing can follow what the log has now. Asked before the log is read for the last time."""
        journal = self._journal
        if not self._is_held():
            return journal.ended or not journal.knows_end
        if not journal.ended:
            self._give_up_s = None
            return False
        self._give_up_s = self._give_up_s or monotonic() + UNLOCK_S
        return monotonic() >= self._give_up_s

    def _is_held(self) -> bool:
        return any(map(is_held, self._folders))

    def _report_torn_row(self) -> None:
        if self._journal.unread_bytes and not self._is_held():
            logger.warning(
                "%s ends in a torn row of %d bytes, as a killed run leaves it. It was not read.",
                self._journal.path, self._journal.unread_bytes,
            )  # fmt: skip


@overload
def read_events(
    run_dir: str | Path,
    *,
    after: Event | None = None,
    kinds: None = None,
    steps: range | None = None,
    types: Any = (),
    follow: bool = False,
    cursor: str | None = None,
) -> EventReader[Event]: ...


@overload
def read_events(
    run_dir: str | Path,
    *,
    after: Event | None = None,
    kinds: type[E] | tuple[type[E], ...],
    steps: range | None = None,
    types: Any = (),
    follow: bool = False,
    cursor: str | None = None,
) -> EventReader[E]: ...


@overload
def read_events(
    run_dir: str | Path,
    *,
    after: Event | None = None,
    kinds: Any,
    steps: range | None = None,
    types: Any = (),
    follow: bool = False,
    cursor: str | None = None,
) -> EventReader[Any]: ...


@checked
def read_events(
    run_dir: str | Path,
    *,
    after: Event | None = None,
    kinds: Any = None,
    steps: range | None = None,
    types: Any = NONE,
    follow: bool = False,
    cursor: str | None = None,
) -> EventReader[Any]:
    """Reads the events of a finished or running run from its log, in the order in which they were written.

    Args:
        run_dir: of the run, or the path of one of its logs: a file of ``JSONLLogger``, which has every event that it
            was told to write, a folder of ``ParquetLogger`` or a file of ``CSVLogger``, which have the metrics. From
            these, events are ``StepCompleted`` (or ``EpochCompleted``) without run_id, attempt, seq and time.
        after: an event of this log: those behind it are read. If a resumed run has taken it back, those of later
            attempts. JSONL only.
        kinds: a class or a name, or several of them; a base class selects its subclasses.
        steps: ``range(100, 200)`` selects events by their step; ``range(0, 10**9, 100)`` every hundredth step. Rows
            that are not selected are not parsed.
        types: your own event classes. The built-in ones are always known.
        follow: wait for more, and end when the newest attempt has RunCompleted or RunFailed, or at ``close``. A killed
            run has neither, and is waited for until it is resumed; where only tables tell, its end is that of its
            process.
        cursor: name of a consumer. Reading begins behind what it has handled, in any process, and an event counts as
            handled *when the next one is asked for*. Each event is delivered at least once: after SIGKILL, those that
            were handled in the last 0.1 s come again. One reader at a time has a cursor. JSONL only.

    A last row without a line end is being written, and is left for the next look; if the run no longer lives, that is
    logged. Rows that a resumed run has cut off are no longer in the log: a reader that follows, or has a cursor, gets
    the rows that were written instead of them, also if it was ahead of the place of the cut.

    Returns:
        An iterator. It blocks while it reads and waits; use it in a thread beside an event loop.

    Raises:
        ConfigurationError: there is no log, or several; or an argument is invalid.
        EventParseError: in the iteration: a row is not a known event, with the file and the byte.
    """
    path = Path(run_dir).expanduser()
    classes = () if types is NONE else event_classes("read_events", types)
    selected = wanted(kinds, steps, classes)
    try:
        log = find_log(path)
    except ConfigurationError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"read_events cannot read {str(run_dir)[:200]!r}: {error}") from error
    journal = _journal(log, selected, classes)
    if not isinstance(journal, JSONLJournal) and (after is not None or cursor is not None):
        raise ConfigurationError(
            f"read_events: after and cursor require a log of JSONLLogger, and {log} is a table without the identity of "
            "events."
        )
    if after is not None and cursor is not None:
        raise ConfigurationError("read_events requires at most one of after and cursor, got both.")
    if after is not None:
        if after.seq == 0:
            raise ConfigurationError(
                f"read_events(after={after.kind}): the event has no seq, so its place in the log is not known. Pass "
                "one that was published, or use steps=range(...)."
            )
        cast("JSONLJournal", journal).skip_past(Identity(after.attempt, after.stream or "", after.seq))
    return EventReader(
        journal,
        log.parents[:2] if log == path else (path,),  # those of a run that may hold the log
        None if cursor is None else Cursor(cursor, cast("JSONLJournal", journal)),
        follow=follow,
    )


def _journal(log: Path, selected: Wanted, classes: tuple[type[Event], ...]) -> Journal:
    if log.is_dir():
        parquet_table = import_optional(
            "eventtrain.runs.parquet_table",
            extra="parquet",
            used_by="read_events of a folder of Parquet files",
        )
        require_installed(parquet_table)
        return parquet_table.ParquetJournal(log, selected)
    return (
        JSONLJournal(log, selected, classes) if log.suffix not in CSV_SUFFIXES else CSVJournal(log, selected)
    )
