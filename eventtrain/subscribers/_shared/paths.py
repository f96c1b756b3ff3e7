"""Checks the paths of files that users name: below ``run_dir``, or absolute. Pure."""

from __future__ import annotations

import os.path
from pathlib import Path

from eventtrain.errors import ConfigurationError


def file_path(path: str | Path, owner: str) -> Path:
    """Returns ``path``, normalised, if it is absolute or names a file below any ``run_dir``.

    For constructors, where the run is not known yet.

    Args:
        path: as the user gave it.
        owner: the subscriber's name for the message.

    Raises:
        ConfigurationError: it leaves ``run_dir`` by ``..``, does not name a file, or contains a NUL character.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise ConfigurationError(f"{owner}({text!r}): a path must not contain a NUL character.")
    if os.path.isabs(text):
        return Path(text)
    normal = os.path.normpath(text)
    if os.path.pardir in Path(normal).parts:
        raise ConfigurationError(
            f"{owner}({text!r}): the path leads out of run_dir. Name a file below it, or give an absolute path."
        )
    if normal == os.path.curdir:
        raise ConfigurationError(f"{owner}({text!r}): the path does not name a file. Give it a file name.")
    return Path(normal)


def inside_run_dir(run_dir: Path, path: str | Path, owner: str) -> Path:
    """Returns where ``path`` is in a run: below ``run_dir``, or unchanged if absolute, which is the user's choice.

    Symbolic links are not resolved. Raises as ``file_path``.
    """
    return run_dir / file_path(path, owner)
