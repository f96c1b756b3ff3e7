"""What the host and JAX's devices say about themselves. Needs psutil."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import jax
import psutil

SHORTEST_S = 0.1
"""CPU times are read off a clock of 10 ms: over less than this they would say nothing."""


class HostReadings:
    """Reads the host. Belongs to the thread that made it: psutil measures CPU time from one reading to the next.

    Args:
        folder: on the disk whose free space counts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = psutil.Process()
        self._read_s = monotonic()
        psutil.cpu_percent(None)
        self._process.cpu_percent(None)

    def read(self) -> dict[str, float]:
        """The figures of this moment; those that cannot be read are left out. May block."""
        found: dict[str, float] = {}
        for figures in (self._cpu, self._memory, self._disk):
            try:
                found |= figures()
            except (OSError, psutil.Error):
                continue
        return found

    def _cpu(self) -> dict[str, float]:
        if monotonic() - self._read_s < SHORTEST_S:
            return {}
        self._read_s = monotonic()
        return {
            "host_cpu_percent": psutil.cpu_percent(None),
            "process_cpu_percent": self._process.cpu_percent(None),
        }

    def _memory(self) -> dict[str, float]:
        memory = psutil.virtual_memory()
        return {
            "process_rss_bytes": self._process.memory_info().rss,
            "host_memory_available_bytes": memory.available,
            "host_memory_total_bytes": memory.total,
        }

    def _disk(self) -> dict[str, float]:
        return {"disk_free_bytes": psutil.disk_usage(str(self._folder)).free}


MEMORY = {
    "bytes_in_use": "memory_used_bytes",
    "peak_bytes_in_use": "memory_peak_bytes",
    "bytes_limit": "memory_limit_bytes",
}
"""What JAX calls it -> what we do."""


def device_memory() -> dict[str, float]:
    """Memory of each JAX device that tells, in bytes, as ``device0_memory_used_bytes``; the CPU tells nothing."""
    return {name: value for device in jax.local_devices() for name, value in _memory_of(device)}


def _memory_of(device: Any) -> Iterator[tuple[str, float]]:
    try:
        statistics = device.memory_stats() or {}
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return
    for key, name in MEMORY.items():
        if key in statistics:
            yield f"device{device.id}_{name}", statistics[key]
