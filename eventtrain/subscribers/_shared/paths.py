"""Where the files that users name may lie: below ``run_dir``, or where an absolute path says. Pure."""

from __future__ import annotations

import os.path
from pathlib import Path

from eventtrain.errors import ConfigurationError


def file_path(path: str | Path, owner: str) -> Path:
    """``path``, if it can name a file below any ``run_dir``, or is absolute. For constructors, which know no run yet.

    Args:
        path: as the user gave it.
        owner: the subscriber's name in the message.

    Raises:
        ConfigurationError: it leaves ``run_dir`` by ``..``, is no name of a file, or holds a NUL character.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise ConfigurationError(f"{owner}({text!r}): no path holds a NUL character.")
    if os.path.isabs(text):
        return Path(text)
    normal = os.path.normpath(text)
    if os.path.pardir in Path(normal).parts:
        raise ConfigurationError(
            f"{owner}({text!r}): leads out of run_dir. Name a file below it, or give an absolute path."
        )
    if normal == os.path.curdir:
        raise ConfigurationError(f"{owner}({text!r}): names no file. Say how it is to be called.")
    return Path(normal)


def inside_run_dir(run_dir: Path, path: str | Path, owner: str) -> Path:
    """Where ``path`` lies in a run: below ``run_dir``; an absolute path, which is the user's own choice, as it is.

    Symbolic links are not looked at. Raises as ``file_path``.
    """
    return run_dir / file_path(path, owner)
