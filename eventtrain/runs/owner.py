"""``Owner``: the run that holds a run_dir, as the lock file in it says; readers look at it, and never lock."""

from __future__ import annotations

import os
import platform
import uuid
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

LOCK = ".eventtrain.lock"
ATTEMPTS = ".eventtrain.attempts"
"""File with the number of the newest attempt of the run: how many times it has begun or been resumed."""
THIS_PROCESS = uuid.uuid4().hex[:8]
"""Distinguishes this process from a killed one with the same number, as in a container that is started again."""


class Owner(BaseModel):
    """The run that holds a lock, as its file says."""

    pid: int = Field(default_factory=os.getpid, ge=1)
    host: str = Field(default_factory=platform.node)
    process: str = THIS_PROCESS
    since: datetime = Field(default_factory=lambda: datetime.now(UTC))
    run_id: str

    def __str__(self) -> str:
        return f"the run {self.run_id} (process {self.pid} on {self.host}, since {self.since:%Y-%m-%d %H:%M:%S} UTC)"

    @property
    def may_run(self) -> bool:
        """Whether its process may still run; True if it is on another machine."""
        if self.host != platform.node():
            return True
        return self.process == THIS_PROCESS if self.pid == os.getpid() else is_running(self.pid)


def owner_of(run_dir: Path) -> Owner | None:
    """Returns the run that holds ``run_dir``, or was killed while it did; None if there is none, or it is not known."""
    try:
        return Owner.model_validate_json((run_dir / LOCK).read_bytes())
    except (OSError, ValueError, ValidationError):
        return None


def is_held(run_dir: Path) -> bool:
    """Returns whether the process of a run that holds ``run_dir`` may still run."""
    owner = owner_of(run_dir)
    return owner is not None and owner.may_run


def is_running(pid: int) -> bool:
    """Returns whether a process of this machine has this number."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
