"""The run_dir of a run: created for it, checked, and locked, so that no other run writes to it meanwhile. Blocking.

The lock is ``flock`` on a file in run_dir, which the system releases when the process ends, however it ends. The file
says who holds it, for the message. It is removed at the end of the run. On a file system without ``flock`` the file
itself is the lock: it counts as left behind if its process no longer runs on this machine; that of another machine
cannot be checked, and is refused.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from eventtrain.errors import ConfigurationError, RunDirInUse
from eventtrain.runs.owner import ATTEMPTS, LOCK, Owner, owner_of
from eventtrain.subscribers._shared.atomic_files import open_replacement
from eventtrain.subscribers._shared.paths import require_writable_folder
from eventtrain.subscribers.base import Subscriber, name_of

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

logger = logging.getLogger("eventtrain")

CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""Errors of file systems without ``flock``."""


@contextmanager
def run_directory(
    path: Path, run_id: str, subscribers: Sequence[Subscriber], *, is_new: bool = False
) -> Generator[None]:
    """Creates and locks run_dir for the length of the block, if the run has subscribers.

    Folders that were created and are still empty at the end are removed.

    Args:
        path, run_id, subscribers: of the run.
        is_new: the run_id was made for this trainer, so that a folder with nothing but the attempts may be removed.

    Raises:
        ConfigurationError: nothing can be written there, or two subscribers write to one path.
        RunDirInUse: another run writes there.
    """
    if not subscribers:
        yield
        return
    _require_different_paths(path, subscribers)
    created = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    require_writable_folder(path, "Trainer(run_dir=...)")
    try:
        release = _lock(path / LOCK, Owner(run_id=run_id))
        try:
            yield
        finally:
            release()
    finally:
        if is_new and path in created and os.listdir(path) == [ATTEMPTS]:
            (path / ATTEMPTS).unlink(missing_ok=True)
        for folder in created:
            with suppress(OSError):  # not empty
                folder.rmdir()


def next_attempt(run_dir: Path, known: int) -> int:
    """Returns the number of the attempt that begins in run_dir, and records it there before its first event.

    Args:
        run_dir: locked by this run.
        known: an attempt that has begun, as a checkpoint or this trainer knows; 0 if there is none.
    """
    file = run_dir / ATTEMPTS
    try:
        text = file.read_text()
        known = max(known, int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read: %s", file, error)
    try:
        with open_replacement(file.with_name(f"{ATTEMPTS}.new"), file) as opened:
            opened.write(str(known + 1).encode())
    except OSError as error:  # the events of the next attempt may have the identity of these
        logger.warning("The attempt %d was not recorded in %s: %s", known + 1, file, error)
    return known + 1


def _require_different_paths(run_dir: Path, subscribers: Sequence[Subscriber]) -> None:
    owners: dict[str, str] = {}
    for subscriber in subscribers:
        name = name_of(subscriber)
        for path in subscriber.output_paths:
            other = owners.setdefault(os.path.realpath(run_dir / path), name)
            if other != name:
                raise ConfigurationError(
                    f"{other} and {name} both write to {path}, and would overwrite each other's output. Give one of "
                    "them another path."
                )


def _lock(file: Path, owner: Owner) -> Callable[[], None]:
    """Takes the lock and returns what releases it. Raises RunDirInUse."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            has_lock = _flock(descriptor)
            if has_lock is False:
                raise _in_use(file)
            # Else its last owner removed the file before this lock was taken, or it is the lock itself.
            is_ours = has_lock and _is_at(file, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if is_ours:
            break
        os.close(descriptor)
        if has_lock is None:
            return _lock_by_name(file, owner)
    _report_left_behind(file)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, owner.model_dump_json().encode())

    def release() -> None:
        file.unlink(missing_ok=True)
        os.close(descriptor)

    return release


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _flock(descriptor: int) -> bool | None:
    """Returns whether the lock was free; None if the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in CANNOT_LOCK:
            return None
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _lock_by_name(file: Path, owner: Owner) -> Callable[[], None]:
    """``_lock`` where there is no ``flock``: the run that creates the file has the lock."""
    left = owner_of(file.parent)
    if left is not None and left.may_run:
        raise _in_use(file)
    _report_left_behind(file)
    file.unlink(missing_ok=True)
    try:
        with open(file, "x", encoding="utf-8") as opened:
            opened.write(owner.model_dump_json())
    except FileExistsError as error:  # another run was faster
        raise _in_use(file) from error
    return partial(file.unlink, missing_ok=True)


def _in_use(file: Path) -> RunDirInUse:
    owner = owner_of(file.parent) or "another run"
    return RunDirInUse(
        f"{file.parent} is in use by {owner}: two runs must not write to one run_dir. Wait for it, "
        f"stop it, or pass another Trainer(run_dir=...). If nothing of that run is left, delete {file}."
    )


def _report_left_behind(file: Path) -> None:
    left = owner_of(file.parent)
    if left is not None:
        logger.warning("%s did not end properly; this run takes over its lock of %s.", left, file.parent)
