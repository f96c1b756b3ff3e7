"""What Checkpointers do to the disk themselves, one function a system call; tests make them fail one by one.

Arrays are written by Orbax, in C++, and not through here.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def make_folder(path: Path) -> None:
    """Make one folder, in one that is there."""
    path.mkdir()


def write_text(path: Path, text: str) -> None:
    """Write a file that was not there."""
    path.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(path: Path, name: Path) -> None:
    """Give a folder its name, in one step; nothing of that name is there."""
    os.rename(path, name)


def remove(path: Path) -> None:
    """Remove a folder with everything in it."""
    shutil.rmtree(path)
