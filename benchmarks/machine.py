"""Describes the machine of a measurement."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import eventtrain


@dataclass(frozen=True)
class Device:
    """The device that a part measures."""

    kind: str
    """``device_kind`` of an accelerator, or the processor's name."""
    accelerator: bool
    memory_bytes: int
    """Memory of the device: of the host, for a CPU."""

    @property
    def slug(self) -> str:
        """Name of the results file: ``nvidia-h200``, ``cpu-amd-epyc``."""
        name = self.kind if self.accelerator else f"cpu {self.kind}"
        return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((?:r|tm)\)", "", name.lower())).strip("-")


def device() -> Device:
    """Returns the first device of JAX. Starts its backend."""
    found = jax.devices()[0]
    if found.platform == "cpu":
        return Device(_processor(), False, host_memory_bytes())
    return Device(found.device_kind, True, (found.memory_stats() or {}).get("bytes_limit", 0))


def host_memory_bytes() -> int:
    """Returns the memory that is available now; all of it on systems that do not tell."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+)", meminfo.read_text()) if meminfo.exists() else None
    return 1024 * int(found[1]) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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


def revision() -> str:
    """Returns the tested commit, with the suffix ``-dirty`` if files differ from it; results do not count."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )

    commit = git("describe", "--always").stdout.strip()
    if not commit:
        return "no checkout"
    is_changed = git("diff", "--quiet", "HEAD", "--", ":/", ":(exclude)results").returncode != 0
    return f"{commit}-dirty" if is_changed else commit


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
