"""``ForkServer``: a process that imports what jobs need once, and forks them from then on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ForkServer:
    """Runs ``python -m MODULE``, which answers each line on its standard input with a line of JSON.

    Args:
        module: name of the module.
        environment: variables that it gets besides those of this process.
        quiet: its standard error is not shown.
    """

    def __init__(self, module: str, environment: Mapping[str, str], *, quiet: bool = False) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
            cwd=Path(__file__).parents[2],
        )

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def ask(self, line: str) -> Any:
        """Writes a line, and returns the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """Returns the next answer. Raises RuntimeError if the process has died."""
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that forks jobs ({self._module}) has died")
        return json.loads(answer)
