"""Checks every path that a user gives, before a run begins: what it names, and whether it can be written.

``local_path``, ``file_path`` and ``directory_path`` look at the text only, so constructors call them.
``require_writable_file`` and ``require_writable_folder`` look at the disk and block, so ``start`` calls them in a
thread.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from eventtrain.errors import ConfigurationError

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # two letters or more: one is a drive of Windows


def local_path(path: str | Path, owner: str) -> Path:
    """Returns ``path`` with ``~`` expanded, if it can name something on a local disk.

    Args:
        path: as the user gave it.
        owner: the class, function or argument for the message, such as ``"CSVLogger"``.

    Raises:
        ConfigurationError: it is not a path, is empty, is a URL, or contains a character that no path can have.
    """
    if not isinstance(path, (str, Path)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError(
            f"{owner}({path!r}): a path must be a string or a Path, got {type(path).__name__}."
        )
    text = str(path)
    if not text:
        raise ConfigurationError(f"{owner}(''): the path is empty. Give a name.")
    if "\0" in text:
        raise ConfigurationError(f"{owner}({text!r}): a path must not contain a NUL character.")
    if url := URL.match(text):  # not shown: it may contain secrets
        raise ConfigurationError(
            f"{owner}: the path is a {url[1]} URL, and a run writes to a local disk. Give a local path, and add "
            "subscribers.Uploader(url) to copy checkpoints and logs to a store; download_checkpoint fetches them."
        )
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded == text:
        raise ConfigurationError(
            f"{owner}({text!r}): there is no user of that name. Give ./{text} if the name begins with ~."
        )
    try:
        os.fsencode(expanded)
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"{owner}({text!r}): the path has characters that this system cannot store."
        ) from error
    return Path(expanded)


def file_path(path: str | Path, owner: str) -> Path:
    """Returns the path of a file, normalised: absolute, or relative to any ``run_dir`` and in it.

    Raises:
        ConfigurationError: as ``directory_path``, or it ends in a slash.
    """
    if isinstance(path, str) and path.endswith(("/", os.sep)):
        raise ConfigurationError(f"{owner}({path!r}): the path does not name a file. Give a file name.")
    return directory_path(path, owner)


def directory_path(path: str | Path, owner: str, *, may_be_run_dir: bool = False) -> Path:
    """Returns the path of a folder, normalised: absolute, or relative to any ``run_dir`` and in it.

    Raises:
        ConfigurationError: as ``local_path``; or it leaves ``run_dir`` by ``..``, or is ``run_dir`` itself.
    """
    local = local_path(path, owner)
    if local.is_absolute():
        return local
    normal = Path(os.path.normpath(local))
    if os.path.pardir in normal.parts:
        raise ConfigurationError(
            f"{owner}({str(path)!r}): the path leads out of run_dir. Give a path in run_dir, or an absolute path."
        )
    if normal == Path() and not may_be_run_dir:
        raise ConfigurationError(f"{owner}({str(path)!r}): the path is run_dir itself. Give a name in it.")
    return normal


def require_writable_folder(folder: Path, owner: str) -> None:
    """Creates ``folder`` if it is missing, and creates and removes a file in it. Blocks.

    Raises:
        ConfigurationError: nothing can be written there.
    """
    with _naming(folder, owner):
        _try_to_write_in(folder)


def require_writable_file(path: Path, owner: str) -> None:
    """Creates the folder of ``path`` if it is missing. Changes and creates no file. Blocks.

    Raises:
        ConfigurationError: a file at ``path`` cannot be written or replaced, or something else is there.
    """
    with _naming(path, owner):
        _try_to_write_in(path.parent)
        if path.is_dir():
            raise OSError("it is a folder")
        if path.is_file():
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
        elif path.exists():
            raise OSError("it is not a regular file")


def _try_to_write_in(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".eventtrain-probe-"):
        pass


@contextmanager
def _naming(path: Path, owner: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        reason = (
            "a file is in its place" if isinstance(error, FileExistsError) else error.strerror or f"{error}"
        )
        raise ConfigurationError(
            f"{owner} cannot write {path}: {reason}. Give a path at which this process may write."
        ) from error
