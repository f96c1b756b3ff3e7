"""Small file systems that only one process sees. Linux, as root or where the system permits it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

NEW_MOUNTS = 0x20000
PRIVATE = 0x4000 | 1 << 18  # MS_REC | MS_PRIVATE
DETACH = 2


def leave_mounts() -> bool:
    """Gives this process mounts of its own, before it starts threads. Returns whether the system permits it."""
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.unshare(NEW_MOUNTS) == 0 and libc.mount(b"none", b"/", None, PRIVATE, None) == 0


def mount_tmpfs(folder: Path, size_bytes: int) -> None:
    """Mounts a file system of this size in memory. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size_bytes}".encode()) != 0:
        raise OSError(ctypes.get_errno(), "cannot mount", str(folder))


def unmount(folder: Path) -> None:
    """Unmounts it, also while files in it are open. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(folder), DETACH) != 0:
        raise OSError(ctypes.get_errno(), "cannot unmount", str(folder))
