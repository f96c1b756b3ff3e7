"""Describes the machine of a measurement, and writes the results file."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import eventtrain


def describe() -> dict[str, Any]:
    """Returns the machine and the versions, without names that identify the machine."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("jax", "jaxlib", "optax", "anyio", "pydantic")},
        "eventtrain": eventtrain.__version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_json(path: Path, benchmark: str, figures: Any) -> None:
    """Writes the figures with machine and date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "benchmark": benchmark,
        "measured": datetime.now(UTC).date().isoformat(),
        "machine": describe(),
        "figures": figures,
    }
    path.write_text(json.dumps(document, indent=2) + "\n")
