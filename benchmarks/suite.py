"""Runs the parts of the suite one after the other, each in a process of its own, within a limit of time.

A process of its own gives each part a fresh backend and fresh memory, and a part that fails, hangs or crashes does not
affect the others. This process never starts JAX, which would reserve the memory of an accelerator.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CHARTS = ROOT / "docs" / "images"

PARTS: dict[str, tuple[float, float]] = {
    "loop": (26, 260),
    "peers": (10, 60),
    "bus": (14, 70),
    "data": (8, 70),
    "control": (6, 40),
    "service": (9, 40),
    "dashboard": (7, 20),
    "features": (6, 40),
    "growth": (16, 70),
    "tails": (10, 30),
    "processes": (20, 41),
    "log_files": (6, 20),
    "brokers": (4, 8),
    "transformer": (13, 70),
    "checkpoints": (18, 350),
}
"""Name -> seconds with ``--quick``, and without."""
LIMIT_S = (175.0, 1190.0)
"""Seconds after which the last part is ended, with ``--quick`` and without."""


def run(
    parts: Mapping[str, float],
    limit_s: float,
    *,
    quick: bool = False,
    package: str = "benchmarks.parts",
    note: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures the parts; returns the document of their figures and errors.

    Args:
        parts: name of a module in ``package`` -> the seconds that it should take. If the parts before it took longer
            than theirs, it gets its share of what ``limit_s`` leaves.
        limit_s: seconds after which a part is ended, and the rest is not begun.
        quick: as for ``--quick``.
        note: is given a line for each part.
    """
    began_s = monotonic()
    document: dict[str, Any] = {
        "slug": "",
        "measured": datetime.now(UTC).date().isoformat(),
        "revision": machine.revision(),
        "quick": quick,
        "load": round(os.getloadavg()[0], 1),
        "machine": {},
        "seconds": {},
        "errors": {},
        "figures": [],
    }
    with tempfile.TemporaryDirectory() as cache:
        for index, (name, seconds) in enumerate(parts.items()):
            part_began_s = monotonic()
            left_s = limit_s - (part_began_s - began_s)
            share_s = seconds * min(1.0, 0.95 * left_s / sum(list(parts.values())[index:]))
            try:
                if share_s < 0.1 * seconds:
                    raise PartError(f"not begun: the parts before it took {limit_s - left_s:.0f} s")
                found = measured(f"{package}.{name}", share_s, min(left_s, 30 + 3 * share_s), quick, cache)
            except PartError as error:
                document["errors"][name] = str(error)
                note(f"{name}: {error}")
                continue
            document |= {key: found[key] for key in ("slug", "machine")}
            document["figures"] += found["figures"]
            document["seconds"][name] = round(monotonic() - part_began_s, 1)
            note(f"{name}: {len(found['figures'])} figures in {document['seconds'][name]:.0f} s")
    return document


class PartError(Exception):
    """A part ended without figures."""


def measured(module: str, budget_s: float, limit_s: float, quick: bool, cache: str) -> dict[str, Any]:
    """Measures one part in a new process, and ends it with its children after ``limit_s``.

    The parts share ``cache``, a folder of compiled functions: most of them compile the same steps.

    Raises:
        PartError: names the last line of its error output.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        extent = "quick" if quick else "whole"
        environment = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        command = [sys.executable, "-m", "benchmarks.part", module, str(budget_s), extent, str(out)]
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                _, errors = process.communicate(timeout=limit_s)
            except subprocess.TimeoutExpired:
                raise PartError(f"ended after {limit_s:.0f} s, without figures") from None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        if process.returncode == 0 and out.exists():
            return json.loads(out.read_text())
        last = next((line for line in reversed(errors.splitlines()) if line.strip()), "no error output")
        raise PartError(f"exit code {process.returncode}: {last}")
