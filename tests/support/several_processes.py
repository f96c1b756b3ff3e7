"""Runs a script as several JAX processes with forced CPU devices, as ``eventtrain launch`` does."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import pytest

from eventtrain.cli.processes import ProcessGroup, process_environment, reserved_port
from tests.conftest import python_path

WARNINGS_ARE_ERRORS = ("-W", "error", "-X", "faulthandler")


@dataclass
class Ended:
    """Output and exit code of one process."""

    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    lines: dict[int, list[str]] = field(default_factory=lambda: {1: [], 2: []}, repr=False)


def run_processes(
    n: int,
    script: str | Path,
    *arguments: str,
    devices: int = 1,
    timeout_s: float = 240,
    env: Mapping[str, str] | None = None,
    grace_s: float = 5,
    check: bool = True,
    cwd: Path | None = None,
) -> list[Ended]:
    """Runs ``script`` (source text, or a path) in ``n`` processes with ``devices`` CPU devices each.

    Plain ``jax.distributed.initialize()`` works in it; warnings are errors. An exit code other than 0 fails the test
    with the output of all, unless ``check=False``. So does a run that takes longer than ``timeout_s``.
    """
    ended = [Ended() for _ in range(n)]
    given = os.environ | {"PYTHONPATH": python_path()} | (env or {})

    def write(process: int, number: int, line: bytes) -> None:
        ended[process].lines[number].append(line.decode(errors="replace"))

    with TemporaryDirectory() as folder, reserved_port() as port:
        path = script
        if isinstance(script, str):
            path = Path(folder) / "in_several_processes.py"
            path.write_text(textwrap.dedent(script))
        environments = [process_environment(i, n, port, devices=devices, given=given) for i in range(n)]
        group = ProcessGroup(
            [str(path), *arguments],
            environments,
            write,
            grace_s=grace_s,
            cwd=cwd or Path(folder),
            python_options=WARNINGS_ARE_ERRORS,
        )

        async def run() -> bool:
            with anyio.move_on_after(timeout_s) as scope:
                await group.run()
            return scope.cancelled_caught

        late = anyio.run(run)
    for index, one in enumerate(ended):
        one.stdout, one.stderr = ("\n".join(one.lines[number]) for number in (1, 2))
        one.exit_code = group.exit_codes.get(index)
    if late:
        pytest.fail(f"{n} processes were not finished after {timeout_s} s:\n{_shown(ended)}", pytrace=False)
    if check and group.exit_code != 0:
        pytest.fail(f"{n} processes ended with {group.exit_codes}:\n{_shown(ended)}", pytrace=False)
    return ended


def _shown(ended: list[Ended]) -> str:
    return "\n".join(
        f"[{index}] {line}" for index, one in enumerate(ended) for line in (*one.lines[1], *one.lines[2])
    )
