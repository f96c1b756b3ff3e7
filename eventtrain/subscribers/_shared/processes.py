"""Whether the process that left something on a disk still runs. Pure but for one signal that does nothing."""

from __future__ import annotations

import os
import uuid

THIS_PROCESS = uuid.uuid4().hex[:8]
"""Distinguishes this process from a killed one with the same number, as in a container that is started again."""


def is_running(pid: int) -> bool:
    """Returns whether a process of this machine has this number."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
